/* What the fuzzers share: checks that name their seed, and dice that it throws. */
#ifndef LAZYMIG_FUZZ_KIT_H
#define LAZYMIG_FUZZ_KIT_H

#include <arpa/inet.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/socket.h>
#include <unistd.h>

#define CHECK(what)                                                                  \
	do {                                                                         \
		if (!(what)) {                                                       \
			fprintf(stderr, "seed %lu: line %d: %s\n", began, __LINE__, #what); \
			_exit(1); /* others run */                                   \
		}                                                                    \
	} while (0)

static uint64_t seed;
static unsigned long began;

static inline uint64_t roll(uint64_t *s, uint64_t n)
{
	*s = *s * 6364136223846793005ull + 1442695040888963407ull;
	return (*s >> 33) % n;
}

/* Both ends of a TCP connection. */
static inline void connection(int s[2])
{
	struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	socklen_t n = sizeof(a);

	CHECK(!bind(listener, (struct sockaddr *)&a, n) && !listen(listener, 1));
	CHECK(!getsockname(listener, (struct sockaddr *)&a, &n));
	s[0] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	CHECK(!connect(s[0], (struct sockaddr *)&a, n));
	s[1] = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
	CHECK(s[1] >= 0);
	close(listener);
}

#endif
