/* TLS connections through a hostile middle, for the handshake and the pump built with AddressSanitizer and UBSan: bytes
 * are changed, put in, left out, held up, and connections end, at any moment. Whatever comes, each plain side gets a
 * beginning of what the other said and nothing else, all of it where nothing was done, and everything ends.
 *
 *   fuzz_tls DIRECTORY SEED ROUNDS      DIRECTORY has ca.pem, cert.pem, key.pem
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "fuzz_kit.h"
#include "lazymig/secure/tls.h"

#define MOST (600u << 10)

static char ca[4096], cert[4096], key[4096];

/* --- the two ends that speak TLS --- */

struct end {
	int server, tcp, plain, patience_ms;
	unsigned int unit;
	lm_tls_report report;
};

static void *speak(void *arg)
{
	struct end *e = arg;
	lm_tls *t = lm_tls_new(ca, NULL, cert, key, e->server, &e->report);

	CHECK(t);
	if (lm_tls_handshake(t, e->tcp, e->server ? NULL : "soak", e->patience_ms, &e->report) == LM_TLS_OK)
		lm_tls_pump(t, e->plain, e->unit);
	lm_tls_free(t);
	close(e->tcp);
	close(e->plain);
	return NULL;
}

/* --- those who have the plain sockets --- */

struct user {
	int fd, direction;
	size_t says, hears, leaves_after; /* the last: it hangs up when it has heard so much */
	size_t expects;
	useconds_t late; /* to hear, so that much waits for it */
};

static uint8_t byte_at(int direction, size_t i)
{
	return (uint8_t)((i * 2654435761u >> 13) + (unsigned)direction * 101);
}

static void *use(void *arg)
{
	struct user *u = arg;
	uint8_t out[5000], in[7000];
	size_t said = 0, i;
	int saying = 1;

	usleep(u->late);
	for (;;) {
		struct pollfd p = {u->fd, POLLIN, 0};
		ssize_t n;

		if (saying)
			p.events |= POLLOUT;
		CHECK(poll(&p, 1, 40000) == 1);
		if (saying && p.revents & (POLLOUT | POLLERR)) {
			size_t some = u->says - said < sizeof(out) ? u->says - said : sizeof(out);

			for (i = 0; i < some; i++)
				out[i] = byte_at(u->direction, said + i);
			n = some ? send(u->fd, out, some, MSG_DONTWAIT | MSG_NOSIGNAL) : 0;
			said += n > 0 ? (size_t)n : 0;
			if (said == u->says || (n < 0 && errno != EAGAIN)) {
				shutdown(u->fd, SHUT_WR);
				saying = 0;
			}
		}
		if (!(p.revents & (POLLIN | POLLHUP | POLLERR)))
			continue;
		n = recv(u->fd, in, sizeof(in), MSG_DONTWAIT);
		if (n < 0 && errno == EAGAIN)
			continue;
		if (n <= 0 && !saying)
			break;
		if (n <= 0) { /* it hears no more, and says the rest, if anybody wants it */
			struct pollfd w = {u->fd, POLLOUT, 0};

			if (p.revents & (POLLHUP | POLLERR) || poll(&w, 1, 40000) != 1)
				break;
			continue;
		}
		for (i = 0; i < (size_t)n; i++)
			CHECK(in[i] == byte_at(!u->direction, u->hears + i));
		u->hears += (size_t)n;
		CHECK(u->hears <= u->expects);
		if (u->hears >= u->leaves_after)
			break;
	}
	close(u->fd);
	return NULL;
}

/* --- the middle --- */

enum deed { NOTHING, FLIP, PUT_IN, LEAVE_OUT, END, RESET, HOLD_UP, DEEDS };

struct middle {
	int fd[2];
	uint64_t seed;
	enum deed deed;
	int way;     /* in which direction */
	size_t when; /* after so many bytes */
};

static void reset(int fd)
{
	struct linger now = {1, 0};

	setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof(now));
}

static int pass(const struct middle *m, int way, const uint8_t *data, size_t n)
{
	while (n) {
		ssize_t done = send(m->fd[!way], data, n, MSG_NOSIGNAL);

		if (done <= 0)
			return 0;
		data += done;
		n -= (size_t)done;
	}
	return 1;
}

struct lane {
	struct middle *m;
	int way;
};

static void *carry(void *arg)
{
	struct lane *l = arg;
	struct middle *m = l->m;
	uint64_t s = m->seed + (uint64_t)l->way;
	uint8_t in[4096], noise[64];
	size_t seen = 0, i;
	ssize_t n;

	while ((n = recv(m->fd[l->way], in, sizeof(in), 0)) > 0) {
		int now = m->deed != NOTHING && m->way == l->way && seen <= m->when && m->when < seen + (size_t)n;
		size_t at = now ? m->when - seen : 0;

		seen += (size_t)n;
		if (now) {
			switch (m->deed) {
			case FLIP:
				in[at] ^= (uint8_t)(1u << roll(&s, 8));
				break;
			case PUT_IN:
				for (i = 0; i < sizeof(noise); i++)
					noise[i] = (uint8_t)roll(&s, 256);
				if (!pass(m, l->way, in, at) || !pass(m, l->way, noise, 1 + roll(&s, sizeof(noise) - 1)) ||
				    !pass(m, l->way, in + at, (size_t)n - at))
					goto out;
				continue;
			case LEAVE_OUT:
				if (!pass(m, l->way, in, at))
					goto out;
				continue;
			case END:
				pass(m, l->way, in, at);
				goto out;
			case RESET:
				pass(m, l->way, in, at);
				reset(m->fd[0]);
				reset(m->fd[1]);
				shutdown(m->fd[0], SHUT_RDWR);
				shutdown(m->fd[1], SHUT_RDWR);
				return NULL;
			default:
				usleep((useconds_t)roll(&s, 20000));
			}
		}
		if (!pass(m, l->way, in, (size_t)n))
			break;
	}
out:
	shutdown(m->fd[!l->way], SHUT_WR);
	if (n > 0 || (m->deed != NOTHING && m->deed != HOLD_UP))
		shutdown(m->fd[l->way], SHUT_RD);
	return NULL;
}

static void once(void)
{
	static const unsigned int units[] = {1, 1, 24, 32, 4096};
	static const size_t moments[] = {8, 2000, 6000, MOST};
	struct middle m = {.seed = seed, .deed = (enum deed)roll(&seed, DEEDS), .way = (int)roll(&seed, 2)};
	struct lane lanes[2] = {{&m, 0}, {&m, 1}};
	struct end ends[2] = {{.server = 0}, {.server = 1}};
	struct user users[2];
	pthread_t t[6];
	int i, s[2], early = !roll(&seed, 4);

	m.when = roll(&seed, moments[roll(&seed, 4)]);
	for (i = 0; i < 2; i++) {
		connection(s);
		ends[i].tcp = s[0];
		m.fd[i] = s[1];
		CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, s));
		ends[i].plain = s[0];
		/* Where bytes are left out both wait for more. */
		ends[i].patience_ms = m.deed == NOTHING || m.deed == HOLD_UP ? 20000 : 300;
		ends[i].unit = units[roll(&seed, 5)];
		users[i] = (struct user){s[1], i, roll(&seed, roll(&seed, 3) ? MOST : 2000), 0, SIZE_MAX, 0, 0};
		users[i].late = roll(&seed, 4) ? 0 : (useconds_t)roll(&seed, 40000);
		if (early && !roll(&seed, 2))
			users[i].leaves_after = 1 + roll(&seed, MOST);
	}
	users[0].expects = users[1].says;
	users[1].expects = users[0].says;
	for (i = 0; i < 2; i++) {
		pthread_create(&t[i], NULL, speak, &ends[i]);
		pthread_create(&t[2 + i], NULL, use, &users[i]);
		pthread_create(&t[4 + i], NULL, carry, &lanes[i]);
	}
	for (i = 0; i < 4; i++)
		pthread_join(t[i], NULL);
	for (i = 0; i < 2; i++)
		shutdown(m.fd[i], SHUT_RDWR);
	for (i = 4; i < 6; i++)
		pthread_join(t[i], NULL);
	if ((m.deed == NOTHING || m.deed == HOLD_UP) && !early) {
		CHECK(ends[0].report.kind == LM_TLS_OK && ends[1].report.kind == LM_TLS_OK);
		CHECK(users[0].hears == users[0].expects && users[1].hears == users[1].expects);
	}
	close(m.fd[0]);
	close(m.fd[1]);
}

int main(int argc, char **argv)
{
	uint64_t first = argc > 2 ? strtoul(argv[2], NULL, 0) : 1, rounds = argc > 3 ? strtoul(argv[3], NULL, 0) : 100, i;

	snprintf(ca, sizeof(ca), "%s/ca.pem", argv[1]);
	snprintf(cert, sizeof(cert), "%s/cert.pem", argv[1]);
	snprintf(key, sizeof(key), "%s/key.pem", argv[1]);
	for (i = 0; i < rounds; i++) {
		alarm(60);
		seed = began = first + i;
		roll(&seed, 2);
		once();
	}
	return 0;
}
