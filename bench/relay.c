/*
 * A TCP relay that delays: a link with a given round trip and all the bandwidth there is, in both directions.
 *
 *   relay LISTEN-ADDRESS LISTEN-PORT ADDRESS PORT ROUND-TRIP-US
 *
 * Every byte leaves half a round trip after it came. What is under way is bounded, as in a real link. Prints
 * "listening" when it does; serves any number of connections, until it is killed.
 */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { CHUNKS = 512, CHUNK = 128 << 10 };

static uint64_t delay_ns;

struct chunk {
	uint64_t due;
	ssize_t size; /* not above 0: the end */
};

/* One direction of a connection: a ring of chunks between a thread that takes and one that gives. */
struct way {
	int from, to;
	unsigned long taken, given;
	pthread_mutex_t lock;
	pthread_cond_t changed;
	struct chunk chunk[CHUNKS];
	char *bytes;
};

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void advance(struct way *w, unsigned long *counter)
{
	pthread_mutex_lock(&w->lock);
	++*counter;
	pthread_cond_broadcast(&w->changed);
	pthread_mutex_unlock(&w->lock);
}

static void *take(void *argument)
{
	struct way *w = argument;
	ssize_t got = 1;

	for (unsigned long i = 0; got > 0; i++) {
		pthread_mutex_lock(&w->lock);
		while (i - w->given >= CHUNKS)
			pthread_cond_wait(&w->changed, &w->lock);
		pthread_mutex_unlock(&w->lock);
		got = recv(w->from, w->bytes + i % CHUNKS * CHUNK, CHUNK, 0);
		w->chunk[i % CHUNKS] = (struct chunk){now() + delay_ns, got};
		advance(w, &w->taken);
	}
	return NULL;
}

static void *give(void *argument)
{
	struct way *w = argument;

	for (unsigned long i = 0;; i++) {
		struct chunk c;
		struct timespec due;

		pthread_mutex_lock(&w->lock);
		while (w->taken == i)
			pthread_cond_wait(&w->changed, &w->lock);
		pthread_mutex_unlock(&w->lock);
		c = w->chunk[i % CHUNKS];
		due = (struct timespec){(time_t)(c.due / 1000000000u), (long)(c.due % 1000000000u)};
		clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &due, NULL);
		if (c.size <= 0) {
			shutdown(w->to, SHUT_WR);
			return NULL;
		}
		for (ssize_t done = 0, n; done < c.size; done += n) {
			n = send(w->to, w->bytes + i % CHUNKS * CHUNK + done, (size_t)(c.size - done), MSG_NOSIGNAL);
			if (n <= 0) {
				/* The other end is gone: the near one must notice too. */
				shutdown(w->from, SHUT_RDWR);
				return NULL;
			}
		}
		advance(w, &w->given);
	}
}

static void start(int from, int to)
{
	struct way *w = calloc(1, sizeof(*w));
	pthread_t thread;

	w->from = from;
	w->to = to;
	w->bytes = malloc((size_t)CHUNKS * CHUNK);
	pthread_mutex_init(&w->lock, NULL);
	pthread_cond_init(&w->changed, NULL);
	pthread_create(&thread, NULL, take, w);
	pthread_create(&thread, NULL, give, w);
}

static struct sockaddr_in address_of(const char *host, const char *port)
{
	struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port))};

	if (inet_pton(AF_INET, host, &a.sin_addr) != 1)
		exit(2);
	return a;
}

int main(int argc, char **argv)
{
	const int on = 1;
	struct sockaddr_in here, there;
	int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (argc != 6)
		return 2;
	/* Sleeps end when they should, and not up to 50 us later. */
	prctl(PR_SET_TIMERSLACK, 1);
	here = address_of(argv[1], argv[2]);
	there = address_of(argv[3], argv[4]);
	delay_ns = strtoull(argv[5], NULL, 10) * 1000 / 2;
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	if (bind(listener, (struct sockaddr *)&here, sizeof(here)) || listen(listener, 64)) {
		perror("relay");
		return 1;
	}
	puts("listening");
	fflush(stdout);
	for (;;) {
		int near = accept(listener, NULL, NULL), far = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

		if (near < 0)
			continue;
		if (connect(far, (struct sockaddr *)&there, sizeof(there))) {
			close(near);
			close(far);
			continue;
		}
		setsockopt(near, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
		setsockopt(far, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
		start(near, far);
		start(far, near);
	}
}
