/* Streams of pages for the fuzzers: memory with a guard on each side of it, and damage. */
#ifndef LAZYMIG_FUZZ_STREAM_H
#define LAZYMIG_FUZZ_STREAM_H

#include <string.h>

#include "fuzz_kit.h"
#include "lazymig/kernel/lm.h"

#define GUARD 16u
#define INSIDE 64u
#define ALL (GUARD + INSIDE + GUARD)
#define PATTERN 0xa5
#define ROOM (1u << 20)

static uint8_t stream[ROOM];
static size_t used;
static uint8_t *memory;

static uint64_t dice(uint64_t n)
{
	return roll(&seed, n);
}

static uint64_t page_at(uint64_t page)
{
	return (uintptr_t)memory + page * LM_PAGE;
}

/* Mostly one inside; else anywhere that somebody might try. */
static uint64_t some_address(void)
{
	static const uint64_t odd[] = {0, 1, LM_PAGE, 1ull << 47, (1ull << 47) - LM_PAGE, 1ull << 63, UINT64_MAX,
				       UINT64_MAX - LM_PAGE + 1, 0xffff800000000000ull};

	if (dice(12))
		return page_at(GUARD + dice(INSIDE));
	return dice(3) ? page_at(dice(ALL)) + (dice(4) ? 0 : dice(LM_PAGE)) : odd[dice(sizeof(odd) / sizeof(*odd))];
}

static void put(const void *data, size_t n)
{
	if (used + n > ROOM)
		return;
	memcpy(stream + used, data, n);
	used += n;
}

static void damage(void)
{
	uint64_t i, times = dice(2) ? 0 : 1 + dice(4);

	for (i = 0; i < times && used; i++) {
		size_t at = dice(used);

		switch (dice(4)) {
		case 0:
			stream[at] = (uint8_t)dice(256);
			break;
		case 1:
			stream[at] ^= (uint8_t)(1u << dice(8));
			break;
		case 2:
			used = at;
			break;
		default:
			memset(stream + at, dice(2) ? 0xff : 0, used - at < 8 ? used - at : 8);
		}
	}
}

/* Sends the stream, then hangs up. */
static void *writer(void *arg)
{
	size_t at = 0;
	ssize_t n;
	int fd = *(int *)arg;

	while (at < used && (n = send(fd, stream + at, used - at, MSG_NOSIGNAL)) > 0)
		at += (size_t)n;
	shutdown(fd, SHUT_WR);
	return NULL;
}

#endif
