/* The fetcher's connection: requests out, replies in and placed, and taking over a connection amid all that. */
#define _GNU_SOURCE
#include <linux/sockios.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <poll.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "page_server/criu_pull_inside.h"

/* Read at once before faults are looked at again. */
#define BUDGET (256u << 10)
/* Bytes that are placed together when more is coming. */
#define BATCH (64u << 10)
#define CLOSE_WAIT_MS 10000

static lm_ps_iov *request_at(const lm_pull *p, uint64_t n)
{
	return &p->record->ring[n % LM_PULL_RING];
}

bool lm_pull_ask(lm_pull *p, uint32_t task, uint64_t addr, uint64_t pages)
{
	lm_pull_record *r = p->record;

	if (r->sent - r->answered >= LM_PULL_RING)
		return false;
	*request_at(p, r->sent) = (lm_ps_iov){LM_PS_GET, 0, pages, addr, p->task[task].pid};
	p->in_flight[r->sent % LM_PULL_RING] = (lm_pull_sent){task, lm_pull_now()};
	r->sent++;
	p->flying += pages * LM_PAGE;
	p->stats.requests++;
	return true;
}

int lm_pull_flush(lm_pull *p)
{
	while (p->flushed < p->record->sent * p->width) {
		uint64_t first = p->flushed / p->width, skip = p->flushed % p->width, n;
		uint8_t out[64 * LM_PS_WIDE];
		ssize_t done;

		for (n = 0; n < 64 && first + n < p->record->sent; n++)
			lm_ps_encode(request_at(p, first + n), p->width, out + n * p->width);
		done = send(p->sock, out + skip, n * p->width - skip, MSG_DONTWAIT | MSG_NOSIGNAL);
		if (done < 0)
			return errno == EAGAIN || errno == EINTR ? 0 : errno;
		p->flushed += (uint64_t)done;
	}
	return 0;
}

/* Looks at a reply's head without taking it, writes down how long the reply is, then takes it: whoever takes over finds
 * out from the socket how much was read, and from the record what that was. 0, EAGAIN or errno. */
static int take_head(lm_pull *p)
{
	const lm_ps_iov *asked = request_at(p, p->record->answered);
	uint8_t in[LM_PS_WIDE];
	lm_ps_iov head;
	ssize_t n = recv(p->sock, in, p->width, MSG_PEEK | MSG_DONTWAIT);

	if (n > 0 && (size_t)n < p->width) {
		struct pollfd end = {p->sock, POLLRDHUP, 0};

		/* The rest of the head is on its way, and poll() for data would return at once for this part; or this
		 * was all, which a look at the data does not show. */
		if (poll(&end, 1, 1) <= 0)
			return EAGAIN;
		n = recv(p->sock, in, p->width, MSG_PEEK | MSG_DONTWAIT);
		if (n > 0 && (size_t)n < p->width)
			return EPIPE;
	}
	if (n < 0)
		return errno == EINTR ? EAGAIN : errno;
	if (!n)
		return EPIPE;
	if (p->record->answered == p->record->sent)
		return EPROTO;
	head = lm_ps_decode(in, p->width);
	if (head.cmd != LM_PS_MAKE(LM_PS_ADD_F, LM_PE_PRESENT) || head.vaddr != asked->vaddr ||
	    head.dst_id != asked->dst_id || !head.nr_pages || head.nr_pages > asked->nr_pages)
		return EPROTO;
	p->record->pages = head.nr_pages;
	p->placed = p->taken = 0;
	return recv(p->sock, in, p->width, 0) == (ssize_t)p->width ? 0 : EPROTO;
}

/* Places whole pages from the buffer; what is left of one stays in it. */
static int place(lm_pull *p, lm_pull_task *t)
{
	const lm_ps_iov *asked = request_at(p, p->record->answered);
	uint64_t n = p->have / LM_PAGE;
	int err = 0;

	if (n && t)
		err = lm_lazy_place(t->z, asked->vaddr + p->placed * LM_PAGE, n, p->buffer);
	if (err == ECANCELED)
		err = 0; /* its lazy memory was told to stop */
	p->stats.remote += n;
	p->placed += n;
	p->have -= n * LM_PAGE;
	memmove(p->buffer, p->buffer + n * LM_PAGE, p->have);
	return err;
}

static void reply_done(lm_pull *p, lm_pull_task *t)
{
	lm_pull_record *r = p->record;
	const lm_ps_iov *asked = request_at(p, r->answered);
	uint64_t bytes = r->pages * LM_PAGE, missing = asked->nr_pages - r->pages;

	p->flying -= asked->nr_pages * LM_PAGE;
	/* The server splits where its own buffers end. */
	if (missing && t)
		lm_pull_again(p, t, asked->vaddr + bytes, missing);
	lm_flow_reply(&p->flow, lm_pull_now(), bytes + p->width, p->in_flight[r->answered % LM_PULL_RING].sent,
		      r->answered + 1 < r->sent);
	r->at += p->width + bytes;
	r->pages = 0;
	r->answered++;
}

int lm_pull_receive(lm_pull *p)
{
	uint64_t budget = BUDGET;
	int err = 0;

	while (budget && !err) {
		lm_pull_task *t;
		uint64_t left, room;
		ssize_t n;

		if (!p->record->pages) {
			err = take_head(p);
			if (err)
				break;
		}
		t = &p->task[p->in_flight[p->record->answered % LM_PULL_RING].task];
		left = p->record->pages * LM_PAGE - p->taken;
		room = LM_PULL_BUFFER - p->have;
		if (left > room)
			left = room;
		if (left > budget)
			left = budget;
		n = recv(p->sock, p->buffer + p->have, left, MSG_DONTWAIT);
		if (n <= 0) {
			err = !n ? EPIPE : errno == EINTR ? EAGAIN : errno;
			break;
		}
		budget -= (uint64_t)n;
		p->have += (size_t)n;
		p->taken += (uint64_t)n;
		if (p->have >= BATCH || p->taken == p->record->pages * LM_PAGE)
			err = place(p, t);
		if (!err && p->taken == p->record->pages * LM_PAGE)
			reply_done(p, t);
	}
	/* Nothing more has come for now: whoever waits for what there is gets it. */
	if (err == EAGAIN)
		err = p->record->pages ? place(p, &p->task[p->in_flight[p->record->answered % LM_PULL_RING].task]) : 0;
	return err;
}

/* What a socket has taken of us and given to us since it was made. Both halves of each sum change meanwhile. */
static int counts(int sock, uint64_t *sent, uint64_t *received)
{
	int tries;

	for (tries = 0; tries < 1000; tries++) {
		struct tcp_info a, b;
		socklen_t n = sizeof(a), m = sizeof(b);
		int in, out;

		memset(&a, 0, sizeof(a));
		memset(&b, 0, sizeof(b));
		if (getsockopt(sock, IPPROTO_TCP, TCP_INFO, &a, &n) || ioctl(sock, SIOCINQ, &in) ||
		    ioctl(sock, SIOCOUTQ, &out) || getsockopt(sock, IPPROTO_TCP, TCP_INFO, &b, &m))
			return errno;
		if (a.tcpi_bytes_acked == b.tcpi_bytes_acked && a.tcpi_bytes_received == b.tcpi_bytes_received) {
			*sent = a.tcpi_bytes_acked + (uint64_t)out;
			*received = a.tcpi_bytes_received - (uint64_t)in;
			return 0;
		}
	}
	return EBUSY;
}

int lm_pull_begin(lm_pull *p)
{
	int err;

	memset(p->record, 0, sizeof(*p->record));
	err = counts(p->sock, &p->record->tx_base, &p->record->rx_base);
	p->uncounted = err == EOPNOTSUPP || err == ENOPROTOOPT;
	return p->uncounted ? 0 : err;
}

/* Reads and throws away, waiting for it. */
static int discard(int sock, uint64_t bytes)
{
	char waste[65536];

	while (bytes) {
		struct pollfd f = {sock, POLLIN, 0};
		ssize_t n = poll(&f, 1, CLOSE_WAIT_MS);

		if (!n)
			return ETIMEDOUT;
		n = recv(sock, waste, bytes < sizeof(waste) ? bytes : sizeof(waste), MSG_DONTWAIT);
		if (!n)
			return EPIPE;
		if (n < 0 && errno != EAGAIN && errno != EINTR)
			return errno;
		bytes -= n > 0 ? (uint64_t)n : 0;
	}
	return 0;
}

int lm_pull_resume(lm_pull *p)
{
	lm_pull_record *r = p->record;
	uint64_t sent, received, until;
	int err;

	if (p->uncounted) {
		/* Who began knows itself what went through; nobody else can go on with such a connection. */
		received = r->at + (r->pages ? p->width + p->taken : 0);
	} else {
		err = counts(p->sock, &sent, &received);
		if (err)
			return err;
		p->flushed = sent - r->tx_base;
		received -= r->rx_base;
	}
	err = 0;
	if (r->sent < r->answered || r->sent - r->answered > LM_PULL_RING ||
	    p->flushed > r->sent * p->width || received < r->at)
		return EPROTO;
	/* Requests that were not sent whole are finished, then all replies are thrown away: the pages of those
	 * that the record does not call placed are asked for again, like all others. */
	while (p->flushed < r->sent * p->width) {
		struct pollfd f = {p->sock, POLLOUT, 0};

		err = lm_pull_flush(p);
		if (err)
			return err;
		if (p->flushed < r->sent * p->width && poll(&f, 1, CLOSE_WAIT_MS) == 0)
			return ETIMEDOUT;
	}
	until = lm_pull_now() + CLOSE_WAIT_MS * 1000000ull;
	while (!err && r->answered < r->sent) {
		uint64_t size;

		if (!r->pages) {
			if (received != r->at)
				return EPROTO;
			err = take_head(p);
			if (err == EAGAIN) {
				struct pollfd f = {p->sock, POLLIN, 0};

				/* A part of a head is something to read, too. */
				err = poll(&f, 1, CLOSE_WAIT_MS) && lm_pull_now() < until ? 0 : ETIMEDOUT;
				continue;
			}
			if (err)
				return err;
			received += p->width;
		}
		size = p->width + r->pages * LM_PAGE;
		if (received > r->at + size)
			return EPROTO;
		err = discard(p->sock, r->at + size - received);
		if (err)
			return err;
		r->at += size;
		received = r->at;
		r->pages = 0;
		r->answered++;
		until = lm_pull_now() + CLOSE_WAIT_MS * 1000000ull;
	}
	return err;
}

/* CRIU's server takes a reset for a failure, even now, and with TLS it says something more. So this end is ended first,
 * and closed when the other one has ended too. */
static void end_politely(int sock)
{
	struct pollfd f = {sock, POLLIN, 0};
	char waste[256];

	shutdown(sock, SHUT_WR);
	while (poll(&f, 1, CLOSE_WAIT_MS) > 0 && recv(sock, waste, sizeof(waste), MSG_DONTWAIT) > 0)
		;
}

int lm_pull_close(lm_pull *p, int *status)
{
	lm_ps_iov bye = {.cmd = LM_PS_CLOSE};
	struct pollfd f = {p->sock, POLLIN, 0};
	int32_t said = -1;
	uint8_t out[LM_PS_WIDE];

	lm_ps_encode(&bye, p->width, out);
	if (send(p->sock, out, p->width, MSG_NOSIGNAL) != (ssize_t)p->width)
		return errno;
	if (poll(&f, 1, CLOSE_WAIT_MS) == 0)
		return ETIMEDOUT;
	if (recv(p->sock, &said, sizeof(said), MSG_WAITALL) != sizeof(said))
		return EPIPE;
	*status = said;
	end_politely(p->sock);
	return 0;
}
