/*
 * A program to be moved: fills memory, waits for a file to appear, then reads every page, in an order that looks
 * random, and checks all of it.
 *
 *   toucher MIB OUT GO
 *
 * It writes lines to OUT: "ready"; "WAITED" with the times of the first touches of pages as a histogram, of which
 * number i counts those below 2^i * UNIT_NS and not below half of that, and with their quantiles (below); and at the
 * end, "TOUCHED nanoseconds wrong-pages".
 *
 * A touch that took less than WAITED_NS found its page there. The quantiles are of the others: how many there were,
 * then p50, p99 and p99.9 in nanoseconds.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { WAITED_NS = 4000, UNIT_NS = 125, BUCKETS = 32 };

static uint64_t mix(uint64_t x)
{
	x = (x ^ (x >> 31)) * 0x9e3779b97f4a7c15u;
	return x ^ (x >> 29);
}

static void say(const char *out, const char *text)
{
	int fd = open(out, O_WRONLY | O_CREAT | O_APPEND, 0644);

	if (fd < 0 || write(fd, text, strlen(text)) < 0)
		_exit(1);
	close(fd);
}

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* A permutation of 0 .. pages-1, a power of two: a fault tells nothing about where the next one will be. */
static uint64_t shuffled(uint64_t i, uint64_t pages, unsigned int bits)
{
	i = i * 0x9e3779b1u & (pages - 1);
	i ^= i >> (bits / 2);
	i = i * 0x85ebca6bu & (pages - 1);
	i ^= i >> (bits / 2);
	return i * 0xc2b2ae35u & (pages - 1);
}

static int ascending(const void *a, const void *b)
{
	const uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

	return x < y ? -1 : x > y;
}

/* `took`: of every page, up to 4 s each. */
static void tell_times(const char *out, uint32_t *took, uint64_t pages)
{
	static const double wanted[] = {0.5, 0.99, 0.999};
	uint64_t count[BUCKETS] = {0}, i, waited = 0;
	char line[2000] = "WAITED";
	size_t at = strlen(line);

	for (i = 0; i < pages; i++) {
		const uint32_t units = took[i] / UNIT_NS;
		const unsigned int slot = units ? 32 - (unsigned int)__builtin_clz(units) : 0;

		count[slot]++;
		if (took[i] >= WAITED_NS)
			took[waited++] = took[i];
	}
	qsort(took, waited, sizeof(*took), ascending);
	for (i = 0; i < BUCKETS; i++)
		at += (size_t)snprintf(line + at, sizeof(line) - at, " %llu", (unsigned long long)count[i]);
	at += (size_t)snprintf(line + at, sizeof(line) - at, " : %llu", (unsigned long long)waited);
	for (i = 0; i < 3; i++)
		at += (size_t)snprintf(line + at, sizeof(line) - at, " %u",
				       waited ? took[(uint64_t)(wanted[i] * (double)(waited - 1))] : 0);
	snprintf(line + at, sizeof(line) - at, "\n");
	say(out, line);
}

int main(int argc, char **argv)
{
	const struct timespec pause = {0, 2000000};
	uint64_t pages, i, k, begin, wrong = 0, *memory;
	uint32_t *took;
	unsigned int bits = 0;
	char line[100];

	if (argc != 4)
		return 2;
	pages = strtoull(argv[1], NULL, 10) << 8;
	while (1ull << (bits + 1) <= pages)
		bits++;
	memory = mmap(NULL, pages << 12, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	took = mmap(NULL, pages * sizeof(*took), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED || took == MAP_FAILED || pages != 1ull << bits)
		return 1;
	for (i = 0; i < pages; i++)
		for (k = 0; k < 512; k++)
			memory[i * 512 + k] = mix(i * 512 + k + 1);
	say(argv[2], "ready\n");
	while (access(argv[3], F_OK))
		nanosleep(&pause, NULL);
	begin = now();
	for (i = 0; i < pages; i++) {
		uint64_t page = shuffled(i, pages, bits), bad = 0, started = now(), ns;

		(void)*(volatile uint64_t *)(memory + page * 512);
		ns = now() - started;
		took[i] = ns < UINT32_MAX ? (uint32_t)ns : UINT32_MAX;
		for (k = 0; k < 512; k++)
			bad |= memory[page * 512 + k] ^ mix(page * 512 + k + 1);
		wrong += bad != 0;
	}
	begin = now() - begin;
	tell_times(argv[2], took, pages);
	snprintf(line, sizeof(line), "TOUCHED %llu %llu\n", (unsigned long long)begin, (unsigned long long)wrong);
	say(argv[2], line);
	for (;;)
		sleep(1000);
}
