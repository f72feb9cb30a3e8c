/*
 * The program that bench/dropin.py moves: fills memory, waits for a file to appear, then reads every page, in an order
 * that looks random, and checks all of it.
 *
 *   toucher MIB OUT GO
 *
 * It writes lines to OUT: "ready"; and at the end, "TOUCHED nanoseconds wrong-pages".
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

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

int main(int argc, char **argv)
{
	const struct timespec pause = {0, 2000000};
	uint64_t pages, i, k, begin, wrong = 0, *memory;
	unsigned int bits = 0;
	char line[100];

	if (argc != 4)
		return 2;
	pages = strtoull(argv[1], NULL, 10) << 8;
	while (1ull << (bits + 1) <= pages)
		bits++;
	memory = mmap(NULL, pages << 12, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED || pages != 1ull << bits)
		return 1;
	for (i = 0; i < pages; i++)
		for (k = 0; k < 512; k++)
			memory[i * 512 + k] = mix(i * 512 + k + 1);
	say(argv[2], "ready\n");
	while (access(argv[3], F_OK))
		nanosleep(&pause, NULL);
	begin = now();
	for (i = 0; i < pages; i++) {
		uint64_t page = shuffled(i, pages, bits), bad = 0;

		for (k = 0; k < 512; k++)
			bad |= memory[page * 512 + k] ^ mix(page * 512 + k + 1);
		wrong += bad != 0;
	}
	snprintf(line, sizeof(line), "TOUCHED %llu %llu\n", (unsigned long long)(now() - begin),
		 (unsigned long long)wrong);
	say(argv[2], line);
	for (;;)
		sleep(1000);
}
