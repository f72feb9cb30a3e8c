/*
 * The unavoidable: what the kernel and the link cost when a program does nothing but move memory.
 *
 *   floor serve ADDRESS PORT MIB     takes MIB into fresh memory, then answers requests with pages; prints "listening"
 *   floor ask ADDRESS PORT MIB N     sends MIB out of its memory, then asks for N pages; prints one JSON object
 *   floor local                      userfaultfd alone: UFFDIO_COPY, and a fault that a thread answers; JSON
 *
 * A stream is as fast as one thread writes memory into a socket and another reads it out of it, twice: the second time
 * into memory that is there already. A request is 8 bytes, its answer a page.
 */
#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ull
enum { ASKED = 100000, PIECE = 1 << 20, COPIES = 16384, FAULTS = 4000, BATCH = 64 };

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static char *memory(uint64_t size)
{
	char *m = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (m == MAP_FAILED)
		die("mmap");
	return m;
}

static void all(int fd, char *at, uint64_t size, int out)
{
	while (size) {
		size_t piece = size < PIECE ? size : PIECE;
		ssize_t n = out ? send(fd, at, piece, MSG_NOSIGNAL) : recv(fd, at, piece, 0);

		if (n <= 0)
			die(out ? "send" : "recv");
		at += n;
		size -= (uint64_t)n;
	}
}

static int ascending(const void *a, const void *b)
{
	const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

static double quantile(uint64_t *sorted, unsigned int n, double q)
{
	return (double)sorted[(unsigned int)(q * (n - 1))] / 1e3;
}

static struct sockaddr_in address_of(char **argv)
{
	struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(argv[3]))};

	if (inet_pton(AF_INET, argv[2], &a.sin_addr) != 1)
		exit(2);
	return a;
}

static int serve(char **argv)
{
	const int on = 1;
	const uint64_t size = strtoull(argv[4], NULL, 10) << 20;
	struct sockaddr_in here = address_of(argv);
	int listener = socket(AF_INET, SOCK_STREAM, 0), fd;
	char *m = memory(size);
	uint64_t asked;

	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	if (bind(listener, (struct sockaddr *)&here, sizeof(here)) || listen(listener, 4))
		die("listen");
	puts("listening");
	fflush(stdout);
	fd = accept(listener, NULL, NULL);
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
	for (int i = 0; i < 2; i++) {
		all(fd, m, size, 0);
		all(fd, m, 1, 1); /* that it is all here */
	}
	while (recv(fd, &asked, sizeof(asked), MSG_WAITALL) == sizeof(asked)) {
		all(fd, m + asked % (size / PAGE) * PAGE, PAGE, 1);
	}
	return 0;
}

static int ask(char **argv)
{
	const int on = 1;
	const uint64_t size = strtoull(argv[4], NULL, 10) << 20;
	struct sockaddr_in there = address_of(argv);
	int fd = socket(AF_INET, SOCK_STREAM, 0);
	char *m = memory(size), *page = memory(PAGE), word;
	static uint64_t took[ASKED];
	const unsigned int asked = (unsigned int)atoi(argv[5]);
	double mbps[2];

	if (!asked || asked > ASKED)
		return 2;

	memset(m, 1, size);
	if (connect(fd, (struct sockaddr *)&there, sizeof(there)))
		die("connect");
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
	for (int i = 0; i < 2; i++) {
		uint64_t begin = now();

		all(fd, m, size, 1);
		all(fd, &word, 1, 0);
		mbps[i] = (double)size * 1e3 / (double)(now() - begin);
	}
	for (uint64_t i = 0; i < asked; i++) {
		uint64_t number = i * 7919, begin = now();

		all(fd, (char *)&number, sizeof(number), 1);
		all(fd, page, PAGE, 0);
		took[i] = now() - begin;
	}
	qsort(took, asked, sizeof(*took), ascending);
	printf("{\"stream_mbps\": %.1f, \"stream_again_mbps\": %.1f, \"request_p50_us\": %.2f, "
	       "\"request_p99_us\": %.2f, \"request_p999_us\": %.2f}\n",
	       mbps[0], mbps[1], quantile(took, asked, 0.5), quantile(took, asked, 0.99), quantile(took, asked, 0.999));
	return 0;
}

static int uffd;
static char *page_to_give;

static void copy(char *to, char *from, uint64_t size)
{
	struct uffdio_copy c = {.dst = (uintptr_t)to, .src = (uintptr_t)from, .len = size};

	if (ioctl(uffd, UFFDIO_COPY, &c))
		die("UFFDIO_COPY");
}

static void *answer(void *argument)
{
	struct uffd_msg m;
	struct pollfd p = {uffd, POLLIN, 0};

	for (int i = 0; i < FAULTS;) {
		if (poll(&p, 1, -1) < 0)
			die("poll");
		if (read(uffd, &m, sizeof(m)) != sizeof(m))
			continue;
		copy((char *)(uintptr_t)(m.arg.pagefault.address & -PAGE), page_to_give, PAGE);
		i++;
	}
	return argument;
}

static char *lazy(uint64_t size)
{
	char *m = memory(size);
	struct uffdio_register r = {.range = {(uintptr_t)m, size}, .mode = UFFDIO_REGISTER_MODE_MISSING};

	if (ioctl(uffd, UFFDIO_REGISTER, &r))
		die("UFFDIO_REGISTER");
	return m;
}

static int local(void)
{
	struct uffdio_api api = {.api = UFFD_API};
	static uint64_t took[FAULTS];
	uint64_t begin, one, many;
	char *from = memory(BATCH * PAGE), *m;
	pthread_t thread;

	memset(from, 1, BATCH * PAGE);
	page_to_give = from;
	uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api))
		die("userfaultfd");
	m = lazy(COPIES * PAGE);
	begin = now();
	for (uint64_t i = 0; i < COPIES; i++)
		copy(m + i * PAGE, from, PAGE);
	one = now() - begin;
	m = lazy(COPIES * PAGE);
	begin = now();
	for (uint64_t i = 0; i < COPIES; i += BATCH)
		copy(m + i * PAGE, from, BATCH * PAGE);
	many = now() - begin;
	m = lazy(FAULTS * PAGE);
	if (pthread_create(&thread, NULL, answer, NULL))
		die("pthread_create");
	for (uint64_t i = 0; i < FAULTS; i++) {
		begin = now();
		if (*(volatile char *)(m + i * PAGE) != 1)
			return 1;
		took[i] = now() - begin;
	}
	pthread_join(thread, NULL);
	qsort(took, FAULTS, sizeof(*took), ascending);
	printf("{\"copy_us\": %.3f, \"copy_batch_us\": %.3f, \"fault_p50_us\": %.2f, \"fault_p99_us\": %.2f, "
	       "\"fault_p999_us\": %.2f}\n",
	       (double)one / COPIES / 1e3, (double)many / COPIES / 1e3, quantile(took, FAULTS, 0.5),
	       quantile(took, FAULTS, 0.99), quantile(took, FAULTS, 0.999));
	return 0;
}

int main(int argc, char **argv)
{
	if (argc == 5 && !strcmp(argv[1], "serve"))
		return serve(argv);
	if (argc == 6 && !strcmp(argv[1], "ask"))
		return ask(argv);
	if (argc == 2 && !strcmp(argv[1], "local"))
		return local();
	fputs("floor serve ADDRESS PORT MIB | ask ADDRESS PORT MIB N | local\n", stderr);
	return 2;
}
