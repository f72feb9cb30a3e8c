#define _GNU_SOURCE
#include "lazymig/secure/tls.h"

#include "lazymig/secure/tls_conn.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define RECORD 16384u    /* the most that one holds */
#define ROOM (128 << 10) /* eight records */
/* Bytes that wait in the TCP socket unsent: more would only hold up what comes after them. */
#define QUEUE (256 << 10)
#define LAST_WORDS_S 30    /* for what was said before a full close to leave this host */
#define LAST_WORDS_MS 1000 /* and to arrive, when a reset is to follow */

typedef struct {
	char *data; /* stays where it is: OpenSSL wants a write repeated with the same bytes */
	size_t at, end;
} buffer;

typedef struct {
	lm_tls *t;
	int plain;
	size_t unit;        /* what the plain side says comes in pieces of this size: a record holds whole ones */
	bool plain_is_tcp;  /* it can be reset, and that is passed on as what it is */
	buffer out, in;     /* plain to TLS, TLS to plain */
	size_t rest;        /* bytes behind out.end: a piece that is not whole yet */
	bool plain_ended;   /* the plain side will say no more */
	bool plain_gone;    /* and hear no more */
	bool tls_ended;     /* the peer will say no more */
	bool told_end;      /* close_notify and FIN are out */
	bool passed_end;    /* the plain side has been told of the peer's end */
	bool failed;        /* nothing more can be read from the TLS connection, nor written to it */
	bool notified;      /* close_notify is made */
	bool reset;         /* the plain side has reset its connection: not to be told as an end */
	bool tcp_dead;      /* an error waits in the TCP socket, behind bytes that the plain side has no room for */
	short tcp_wants;    /* what to wait for */
	short plain_wants;
	bool unflushed;     /* records wait in the BIO's buffer */
	bool more;          /* there was progress: look again before waiting */
} pump;

/* Notes what a call that did not succeed waits for; true when it waits in vain. */
static bool fatal(pump *p, int ret)
{
	switch (SSL_get_error(p->t->ssl, ret)) {
	case SSL_ERROR_WANT_READ:
		p->tcp_wants |= POLLIN;
		break;
	case SSL_ERROR_WANT_WRITE:
		p->tcp_wants |= POLLOUT;
		break;
	case SSL_ERROR_ZERO_RETURN:
		p->tls_ended = true;
		break;
	default:
		return true;
	}
	return false;
}

/* Nothing that is written arrives any more. What the peer said last may still be there to read: often the reason. */
static void unheard(pump *p)
{
	p->plain_ended = p->told_end = true;
	p->out.at = p->out.end;
	p->unflushed = false;
	shutdown(p->plain, SHUT_RD); /* the plain side's next write fails */
	p->more = true;
}

/* More of what the plain side says. */
static void take(pump *p)
{
	ssize_t got;

	memmove(p->out.data, p->out.data + p->out.end, p->rest);
	p->out.at = p->out.end = 0;
	got = recv(p->plain, p->out.data + p->rest, ROOM - p->rest, MSG_DONTWAIT);
	if (got > 0) {
		size_t all = p->rest + (size_t)got;

		p->rest = all % p->unit;
		p->out.end = all - p->rest;
		p->more = true;
	} else if (got == 0 || (errno != EAGAIN && errno != EINTR)) {
		p->reset |= got < 0 && p->plain_is_tcp;
		p->plain_ended = true;
		p->plain_gone |= got < 0;
		p->out.end = p->rest;
		p->rest = 0;
	} else {
		p->plain_wants |= POLLIN;
	}
}

/* Plain to TLS. */
static void outwards(pump *p)
{
	size_t n, record = RECORD - RECORD % p->unit;
	int ret;

	if (p->out.at == p->out.end && !p->plain_ended)
		take(p);
	if (p->reset)
		return;
	if (p->out.at < p->out.end) {
		n = p->out.end - p->out.at;
		if (p->unit > 1 && n > record)
			n = record;
		ERR_clear_error();
		ret = SSL_write_ex(p->t->ssl, p->out.data + p->out.at, n, &n);
		if (ret != 1) {
			if (fatal(p, ret))
				unheard(p);
			return;
		}
		p->out.at += n;
		p->unflushed = p->more = true;
	}
	if (p->plain_ended && p->out.at == p->out.end && !p->notified) {
		ERR_clear_error();
		ret = SSL_shutdown(p->t->ssl); /* close_notify; 0: the peer's is still to come */
		if (ret < 0) {
			if (fatal(p, ret))
				unheard(p);
			return;
		}
		p->notified = p->unflushed = true;
	}
	if (p->unflushed) {
		ERR_clear_error();
		if (BIO_flush(SSL_get_wbio(p->t->ssl)) != 1) {
			if (BIO_should_retry(SSL_get_wbio(p->t->ssl)))
				p->tcp_wants |= POLLOUT;
			else
				unheard(p);
			return;
		}
		p->unflushed = false;
	}
	if (p->notified) {
		shutdown(p->t->fd, SHUT_WR);
		p->told_end = true;
		p->more = true;
	}
}

/* TLS to plain. */
static void inwards(pump *p)
{
	ssize_t sent;
	size_t n;
	int ret;

	if (p->in.at == p->in.end && !p->tls_ended) {
		p->in.at = p->in.end = 0;
		/* Several records at once, as long as they are here already. */
		do {
			ERR_clear_error();
			ret = SSL_read_ex(p->t->ssl, p->in.data + p->in.end, ROOM - p->in.end, &n);
			if (ret != 1) {
				/* What was read before is still delivered. */
				if (fatal(p, ret))
					p->tls_ended = p->failed = true;
				break;
			}
			p->in.end += n;
		} while (p->in.end < ROOM && SSL_has_pending(p->t->ssl));
	}
	if (p->in.at < p->in.end) {
		sent = send(p->plain, p->in.data + p->in.at, p->in.end - p->in.at, MSG_DONTWAIT | MSG_NOSIGNAL);
		if (sent > 0) {
			p->in.at += (size_t)sent;
			p->tcp_dead = false;
			p->more = true;
		} else if (errno == EAGAIN || errno == EINTR) {
			p->plain_wants |= POLLOUT;
		} else {
			p->plain_gone = true;
			p->reset |= p->plain_is_tcp; /* this call has taken the error: nothing else would tell of it */
		}
	}
	if (p->tls_ended && p->in.at == p->in.end && !p->passed_end) {
		shutdown(p->plain, SHUT_WR);
		p->passed_end = true;
	}
}

static time_t seconds(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec;
}

static void run(pump *p)
{
	time_t deadline = 0;

	for (;;) {
		struct pollfd f[2];
		int wait = -1;

		p->more = false;
		p->tcp_wants = p->plain_wants = 0;
		if (!p->told_end && !p->failed)
			outwards(p);
		if (!p->passed_end && !p->plain_gone)
			inwards(p);
		if (p->reset)
			return;
		if ((p->told_end || p->failed) && (p->passed_end || p->plain_gone))
			return;
		if (p->more)
			continue;
		if (p->plain_gone) {
			deadline = deadline ? deadline : seconds() + LAST_WORDS_S;
			if (seconds() >= deadline)
				return;
			wait = 1000;
		}
		f[0] = (struct pollfd){p->tcp_dead || p->failed ? -1 : p->t->fd, p->tcp_wants, 0};
		/* Once nothing is expected of the plain end its hang-up would only be told again and again. */
		f[1] = (struct pollfd){p->plain_gone ? -1 : p->plain, p->plain_wants, 0};
		if (poll(f, 2, wait) < 0 && errno != EINTR)
			return;
		if (f[1].revents & (POLLHUP | POLLERR))
			p->plain_gone = true; /* both directions: nobody is there to hear any more */
		if (f[0].revents & (POLLERR | POLLHUP)) {
			p->tcp_dead = p->in.at < p->in.end;
			p->failed |= p->passed_end || p->plain_gone;
		}
	}
}

/* Gives what was written a moment to arrive: a reset would take it away again. */
static void last_words(int fd)
{
	struct timespec pause = {0, 5000000};
	int i, left;

	for (i = 0; i < LAST_WORDS_MS / 5 && !ioctl(fd, SIOCOUTQ, &left) && left > 0; i++)
		nanosleep(&pause, NULL);
}

/* All records of one write leave with one call: by themselves they would take one each. */
static bool gather_writes(lm_tls *t)
{
	BIO *tcp = BIO_new_socket(t->fd, BIO_NOCLOSE), *gathered = BIO_new(BIO_f_buffer());

	if (!tcp || !gathered || BIO_set_write_buffer_size(gathered, ROOM + ROOM / 8) != 1) {
		BIO_free(tcp);
		BIO_free(gathered);
		return false;
	}
	SSL_set0_wbio(t->ssl, BIO_push(gathered, tcp));
	return true;
}

void lm_tls_pump(lm_tls *t, int plain, unsigned int unit)
{
	pump p = {.t = t, .plain = plain, .unit = unit};
	int queue = QUEUE, one = 1, domain = AF_UNIX;
	socklen_t size = sizeof(domain);
	struct linger reset = {1, 0};

	getsockopt(plain, SOL_SOCKET, SO_DOMAIN, &domain, &size);
	p.plain_is_tcp = domain != AF_UNIX;

	signal(SIGPIPE, SIG_IGN); /* OpenSSL writes without MSG_NOSIGNAL */
	fcntl(plain, F_SETFL, fcntl(plain, F_GETFL) | O_NONBLOCK);
	setsockopt(t->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	setsockopt(t->fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &queue, sizeof(queue));
	p.out.data = malloc(ROOM);
	p.in.data = malloc(ROOM);
	if (unit && unit <= RECORD && p.out.data && p.in.data && gather_writes(t))
		run(&p);
	shutdown(plain, SHUT_RDWR);
	/* What the peer says to somebody who is gone is answered as the kernel would: by a reset. */
	if (p.reset || !p.told_end || p.in.at < p.in.end || SSL_has_pending(t->ssl)) {
		if (p.told_end && !p.failed && !p.reset)
			last_words(t->fd);
		setsockopt(t->fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
	}
	free(p.out.data);
	free(p.in.data);
}
