/* Two real processes for the tests of lazy memory.
 *
 *   lazy_child source BASE PAGES SEED      fills its memory, says so on descriptor 3, and waits to be killed
 *   lazy_child target BASE PAGES SEED MODE sends a userfaultfd of its own over descriptor 3, waits for a byte,
 *                                          then uses the memory as MODE says, checking all it reads; exit 0 if right
 *
 * A page's bytes follow from its number and the seed. Kinds: absent (zero, not pending), zero (pending), data. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ul
#define WORDS (PAGE / 8)

static uint8_t *base;
static uint64_t pages, seed, zone;

static void die(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	vfprintf(stderr, format, args);
	va_end(args);
	fputc('\n', stderr);
	_exit(1);
}

static uint64_t mix(uint64_t x)
{
	x = (x ^ (x >> 31)) * 0x9e3779b97f4a7c15ull;
	x = (x ^ (x >> 29)) * 0xbf58476d1ce4e5b9ull;
	return x ^ (x >> 32);
}

enum { ABSENT, ZERO, DATA };

static int kind(uint64_t page)
{
	uint64_t k = mix(page * 31 + seed) % 8;

	return k == 0 ? ABSENT : k == 1 ? ZERO : DATA;
}

static uint64_t word(uint64_t page, uint64_t i)
{
	return kind(page) == DATA ? mix(page * 1000003 + seed) + i : 0;
}

static void check(const uint64_t *at, uint64_t page, const char *what)
{
	uint64_t i;

	for (i = 0; i < WORDS; i += 73)
		if (at[i] != word(page, i))
			die("%s: page %lu (kind %d) word %lu: %lx, not %lx", what, page, kind(page), i, at[i],
			    word(page, i));
}

static void check_zero(const uint64_t *at, uint64_t page, const char *what)
{
	uint64_t i;

	for (i = 0; i < WORDS; i += 73)
		if (at[i])
			die("%s: page %lu word %lu: %lx, not zero", what, page, i, at[i]);
}

static void *at(uint64_t page)
{
	return base + page * PAGE;
}

static uint64_t first_of(unsigned int z)
{
	return z * zone;
}

static void nap(unsigned int us)
{
	struct timespec t = {0, us * 1000};

	nanosleep(&t, NULL);
}

/* Zone 0: four threads read at random, then write and read back. */
static void *touch(void *arg)
{
	uint64_t me = (uintptr_t)arg, r = seed + me, i, page;

	for (i = 0; i < zone; i++) {
		page = first_of(0) + (r = mix(r + i)) % zone;
		if (page % 4 == me && i % 3 == 0)
			continue; /* is written below, perhaps before it was read */
		if (page % 8 < 4)
			check(at(page), page, "touch");
	}
	for (page = first_of(0); page < first_of(1); page++) {
		uint64_t *w = at(page);

		if (page % 8 < 4 || page % 4 != me)
			continue;
		w[7] = page + me;
		if (w[7] != page + me || w[8] != word(page, 8))
			die("write: page %lu: %lx %lx", page, w[7], w[8]);
	}
	return NULL;
}

static uint64_t *move(void *from, uint64_t n, void *to)
{
	void *p = to ? mremap(from, n * PAGE, n * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to)
		     : mremap(from, n * PAGE, n * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED,
			      mmap(NULL, n * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));

	if (p == MAP_FAILED)
		die("mremap: %s", strerror(errno));
	return p;
}

/* Zone 1: moved there and back, in whole and in part, while pages come. */
static void *remap(void *arg)
{
	uint64_t half = zone / 2, page, f = first_of(1), *p;

	p = move(at(f), half, NULL);
	for (page = 0; page < half; page += 5)
		check(p + page * WORDS, f + page, "remap");
	move(p, half, at(f)); /* back */
	for (page = 0; page < half; page++)
		check(at(f + page), f + page, "remap back");
	p = move(at(f + half + 3), half / 2, NULL); /* out of the middle */
	nap(300);
	for (page = 0; page < half / 2; page++)
		check(p + page * WORDS, f + half + 3 + page, "remap part");
	for (page = half; page < half + 3; page++)
		check(at(f + page), f + page, "beside the part");
	for (page = half + 3 + half / 2; page < zone; page++)
		check(at(f + page), f + page, "behind the part");
	return NULL;
}

/* Zone 2: discarded pages are zero for ever, their neighbours are not. */
static void *discard(void *arg)
{
	uint64_t page, f = first_of(2), *w;
	int round;

	for (round = 0; round < 2; round++) {
		for (page = 0; page + 8 <= zone; page += 8)
			if (madvise(at(f + page), 3 * PAGE, MADV_DONTNEED))
				die("madvise: %s", strerror(errno));
		for (page = 0; page < zone; page++) {
			w = at(f + page);
			if (page % 8 < 3 && page + 8 <= zone + page % 8) {
				check_zero(w, f + page, "discarded");
				w[1] = 77;
			} else {
				check(w, f + page, "beside discarded");
			}
		}
	}
	return NULL;
}

/* Zone 3: a hole, and something new in it. */
static void *unmap(void *arg)
{
	uint64_t page, f = first_of(3), quarter = zone / 4;

	if (munmap(at(f + quarter), quarter * PAGE))
		die("munmap: %s", strerror(errno));
	if (mmap(at(f + quarter), quarter * PAGE, PROT_READ | PROT_WRITE,
		 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) == MAP_FAILED)
		die("mmap: %s", strerror(errno));
	for (page = 0; page < zone; page++) {
		if (page >= quarter && page < 2 * quarter)
			check_zero(at(f + page), f + page, "mapped anew");
		else
			check(at(f + page), f + page, "beside the hole");
	}
	return NULL;
}

static void reap(pid_t pid)
{
	int status;

	if (waitpid(pid, &status, 0) != pid || status)
		die("a child ended with %x", status);
}

/* Zone 4: children, and a child of theirs, each with its own copy. */
static void *forks(void *arg)
{
	uint64_t page, f = first_of(4);
	pid_t pid[4];
	int i;

	for (i = 0; i < 4; i++) {
		pid[i] = fork();
		if (pid[i] < 0)
			die("fork: %s", strerror(errno));
		if (!pid[i]) {
			if (i == 3)
				_exit(0); /* before its pages came */
			if (i == 1 && !(pid[0] = fork())) {
				for (page = 0; page < zone; page++)
					check(at(f + page), f + page, "grandchild");
				_exit(0);
			}
			for (page = 0; page < zone; page++) {
				check(at(f + page), f + page, "child");
				*(uint64_t *)at(f + page) = 99; /* nobody else's business */
			}
			for (page = first_of(5); page < first_of(5) + 16; page++)
				check(at(page), page, "child, another zone");
			if (i == 1)
				reap(pid[0]);
			_exit(0);
		}
		for (page = (uint64_t)i; page < zone; page += 7)
			check(at(f + page), f + page, "parent");
	}
	for (i = 0; i < 4; i++)
		reap(pid[i]);
	for (page = 0; page < zone; page++)
		check(at(f + page), f + page, "parent afterwards");
	return NULL;
}

static void interrupted(int number)
{
	(void)number;
	check(at(pages / 4), pages / 4, "in a handler");
}

static void run(int sock, const char *mode)
{
	static void *(*const chaos[])(void *) = {remap, discard, unmap, forks};
	pthread_t thread[8];
	uintptr_t i;
	uint64_t page;
	char byte;

	signal(SIGUSR1, interrupted);
	if (!strcmp(mode, "chaos")) {
		for (i = 0; i < 4; i++)
			pthread_create(&thread[i], NULL, touch, (void *)i);
		for (i = 0; i < 4; i++)
			pthread_create(&thread[4 + i], NULL, chaos[i], NULL);
		for (i = 0; i < 8; i++)
			pthread_join(thread[i], NULL);
		for (page = first_of(5); page < pages; page++)
			check(at(page), page, "at the end");
	} else if (!strcmp(mode, "read")) {
		uint64_t r = seed;

		for (i = 0; i < pages; i++) {
			page = (r = mix(r + i)) % pages;
			check(at(page), page, "read");
		}
		for (page = 0; page < pages; page++)
			check(at(page), page, "at the end");
	} else if (!strcmp(mode, "move")) { /* all of it, there and back, while pages are placed one by one */
		void *there = base;

		for (i = 0; i < 2000; i++)
			there = move(there, pages, i % 2 ? base : NULL);
		for (page = 0; page < pages; page++)
			check(at(page), page, "after many moves");
	} else if (!strcmp(mode, "wait")) { /* a thread waits for its page; then we are told to look at all */
		check(at(pages / 2), pages / 2, "first");
		if (write(sock, "1", 1) != 1 || read(sock, &byte, 1) != 1)
			die("the test went away");
		for (page = 0; page < pages; page++)
			check(at(page), page, "at the end");
	} else if (strcmp(mode, "leave")) {
		die("mode %s", mode);
	}
}

static int send_fd(int sock, int fd)
{
	char byte = 'u', control[CMSG_SPACE(sizeof(int))] = {0};
	struct iovec iov = {&byte, 1};
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
	struct cmsghdr *c = CMSG_FIRSTHDR(&msg);

	c->cmsg_level = SOL_SOCKET;
	c->cmsg_type = SCM_RIGHTS;
	c->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(c), &fd, sizeof(int));
	return sendmsg(sock, &msg, 0) == 1 ? 0 : -1;
}

int main(int argc, char **argv)
{
	uint64_t page, i;
	char byte;
	int fd;

	if (argc < 5)
		die("arguments");
	base = (void *)strtoul(argv[2], NULL, 0);
	pages = strtoul(argv[3], NULL, 0);
	seed = strtoul(argv[4], NULL, 0);
	zone = pages / 6;
	if (mmap(base, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) !=
	    base)
		die("mmap: %s", strerror(errno));
	if (!strcmp(argv[1], "source")) {
		for (page = 0; page < pages; page++) {
			if (kind(page) == ZERO && page % 2)
				*(volatile char *)at(page) = 0; /* a page of its own, of zeroes */
			for (i = 0; kind(page) == DATA && i < WORDS; i++)
				((uint64_t *)at(page))[i] = word(page, i);
		}
		if (write(3, "r", 1) != 1)
			die("the test went away");
		for (;;)
			pause();
	}
	fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	if (fd < 0 || send_fd(3, fd) || read(3, &byte, 1) != 1)
		die("userfaultfd: %s", strerror(errno));
	close(fd);
	run(3, argv[5]);
	return 0;
}
