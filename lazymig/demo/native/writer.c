/*
 * writer: a busy process that judges itself.
 *
 *   writer --mib N [--pages-per-tick P] [--tick-us T] [--pattern random|seq|hot|zero|text] [--out FILE] ...
 *
 * It fills N MiB of private memory, then writes P pages per tick, and keeps the wall-clock time of every tick.
 * It is asked by signals:
 *
 *   SIGUSR1  mark: measurements begin anew
 *   SIGUSR2  verify everything and append one JSON line to FILE (and all tick times since the mark to FILE.ticks)
 *   SIGHUP   fork a child that verifies its copy of everything and appends a line of its own
 *   SIGTERM  as SIGUSR2, then exit: 0 when nothing was ever wrong, else 1
 *
 * More work: --threads T, --timers, --signals, --append FILE [--append-every N], --churn, --sparse, --shared,
 * --shared-file FILE, --cow FILE, --vmas N, --odd; --log N sets how many tick times are kept.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "writer.h"

struct options opt = {.mib = 64, .pages_per_tick = 20, .tick_us = 200, .log = 1 << 18, .append_every = 1};

enum { EXTRA = 4, KEPT = 16, WORST = 16 };

static struct arena work, extra[EXTRA];
static int extras;
static u64 *ticks_at; /* ring of CLOCK_REALTIME ns */
static u64 tick, marked, reports, children, failures;
static char failure[KEPT][200];
static pthread_mutex_t failing = PTHREAD_MUTEX_INITIALIZER;
static int out = STDOUT_FILENO;
static volatile sig_atomic_t asked_mark, asked_report, asked_fork, asked_end;

u64 now_ns(int clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return t.tv_sec * NS + t.tv_nsec;
}

void die(const char *what)
{
	fprintf(stderr, "writer: %s: %s\n", what, strerror(errno));
	exit(2);
}

void fail(const char *format, ...)
{
	va_list args;

	pthread_mutex_lock(&failing);
	va_start(args, format);
	if (failures < KEPT)
		vsnprintf(failure[failures], sizeof failure[0], format, args);
	va_end(args);
	failures++;
	pthread_mutex_unlock(&failing);
}

void *map(size_t size, int prot, int flags, int fd)
{
	void *p = mmap(NULL, size, prot, fd < 0 ? flags | MAP_ANONYMOUS : flags, fd, 0);

	if (p == MAP_FAILED)
		die("mmap");
	return p;
}

/* --- more arenas: shared memory, a memfd, files mapped privately and shared --- */

static void add_arena(const char *name, void *memory, u64 size, bool shared)
{
	arena_init(&extra[extras], name, memory, size / PAGE, RANDOM);
	extra[extras++].shared = shared;
}

static int file_of(const char *path, u64 size)
{
	int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);

	if (fd < 0 || ftruncate(fd, size) != 0)
		die(path);
	return fd;
}

static void add_arenas(void)
{
	const u64 size = 4 * MIB;

	if (opt.shared) {
		int fd = memfd_create("writer", MFD_CLOEXEC | MFD_ALLOW_SEALING);

		if (fd < 0 || ftruncate(fd, size) != 0 || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) != 0)
			die("memfd");
		add_arena("memfd", map(size, PROT_READ | PROT_WRITE, MAP_SHARED, fd), size, true);
		add_arena("shared", map(size, PROT_READ | PROT_WRITE, MAP_SHARED, -1), size, true);
	}
	if (opt.shared_file) {
		int fd = file_of(opt.shared_file, size);

		add_arena("shared-file", map(size, PROT_READ | PROT_WRITE, MAP_SHARED, fd), size, true);
		close(fd);
	}
	if (opt.cow) {
		int fd = file_of(opt.cow, size);
		struct arena *a = &extra[extras];
		void *shared = map(size, PROT_READ | PROT_WRITE, MAP_SHARED, fd);

		add_arena("cow", shared, size, false);
		munmap(shared, size);
		/* Half of the pages are written, and so copied; the others keep coming from the file. */
		a->words = map(size, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd);
		a->writable = a->pages / 2;
		close(fd);
	}
}

/* --- reports --- */

static u64 verify_all(bool is_child)
{
	u64 bad;

	threads_hold();
	bad = arena_verify(&work);
	for (int i = 0; i < extras; i++)
		if (!is_child || !extra[i].shared) /* the parent goes on writing there */
			bad += arena_verify(&extra[i]);
	bad += threads_verify();
	bad += memory_verify();
	threads_release();
	return bad;
}

/* One entry per gap; the biggest first. */
static void print_gaps(FILE *to)
{
	u64 worst[WORST][2] = {{0}}, from = tick - marked > opt.log ? tick - opt.log : marked;

	for (u64 i = from + 1; i < tick; i++) {
		u64 start = ticks_at[(i - 1) % opt.log], end = ticks_at[i % opt.log];
		int at = WORST;

		while (at > 0 && end - start > worst[at - 1][1] - worst[at - 1][0])
			at--;
		if (at == WORST)
			continue;
		memmove(worst[at + 1], worst[at], (WORST - 1 - at) * sizeof worst[0]);
		worst[at][0] = start;
		worst[at][1] = end;
	}
	fprintf(to, "\"gaps\":[");
	for (int i = 0; i < WORST && worst[i][1]; i++)
		fprintf(to, "%s[%llu,%llu]", i ? "," : "", (unsigned long long)worst[i][0],
			(unsigned long long)worst[i][1]);
	fprintf(to, "]");
}

static void save_ticks(void)
{
	char path[4096];
	u64 from = tick - marked > opt.log ? tick - opt.log : marked;
	FILE *to;

	if (!opt.out || (size_t)snprintf(path, sizeof path, "%s.ticks", opt.out) >= sizeof path)
		return;
	to = fopen(path, "we");
	if (!to)
		die(path);
	for (u64 i = from; i < tick; i++)
		fwrite(&ticks_at[i % opt.log], sizeof(u64), 1, to);
	fclose(to);
}

static void print_text(FILE *to, const char *text)
{
	for (; *text; text++)
		if (*text == '"' || *text == '\\' || (unsigned char)*text < ' ')
			fputc('?', to);
		else
			fputc(*text, to);
}

/* Verifies and writes the line; `who` is "writer" or "child". Returns whether all was right, ever. */
static bool report(const char *who)
{
	char *text = NULL;
	size_t size = 0;
	bool is_child = who[0] == 'c';
	u64 bad = verify_all(is_child);
	FILE *to = open_memstream(&text, &size);

	if (!to)
		die("open_memstream");
	if (!is_child) {
		state_verify();
		save_ticks();
	}
	fprintf(to, "{\"event\":\"%s\",\"report\":%llu,\"pid\":%d,\"tid\":%d,", who, (unsigned long long)++reports, getpid(),
		gettid());
	fprintf(to, "\"ticks\":%llu,\"marked\":%llu,\"children\":%llu,", (unsigned long long)tick,
		(unsigned long long)marked, (unsigned long long)children);
	fprintf(to, "\"realtime_ns\":%llu,\"monotonic_ns\":%llu,", (unsigned long long)now_ns(CLOCK_REALTIME),
		(unsigned long long)now_ns(CLOCK_MONOTONIC));
	fprintf(to, "\"bad_pages\":%llu,\"failures\":%llu,\"errors\":[", (unsigned long long)bad,
		(unsigned long long)failures);
	for (u64 i = 0; i < failures && i < KEPT; i++) {
		fprintf(to, "%s\"", i ? "," : "");
		print_text(to, failure[i]);
		fprintf(to, "\"");
	}
	fprintf(to, "],");
	state_print(to);
	threads_print(to);
	print_gaps(to);
	fprintf(to, ",\"ok\":%s}\n", bad == 0 && failures == 0 ? "true" : "false");
	fclose(to);
	if (write(out, text, size) != (ssize_t)size)
		die("write of the report");
	free(text);
	return bad == 0 && failures == 0;
}

static void fork_child(void)
{
	pid_t pid;

	threads_hold();
	pid = fork();
	threads_release();
	if (pid < 0)
		die("fork");
	if (pid == 0)
		_exit(report("child") ? 0 : 1);
}

static void reap(void)
{
	int status;

	while (waitpid(-1, &status, WNOHANG) > 0) {
		children++;
		if (status != 0)
			fail("a forked child ended with status %x", status);
	}
}

/* --- the work --- */

static void asked(int number)
{
	signals_seen++;
	if (number == SIGUSR1)
		asked_mark = 1;
	else if (number == SIGUSR2)
		asked_report = 1;
	else if (number == SIGHUP)
		asked_fork = 1;
	else
		asked_end = 1;
}

static void mark(void)
{
	marked = tick;
	state_mark();
}

static bool take(volatile sig_atomic_t *flag)
{
	bool was = *flag;

	*flag = 0;
	return was;
}

static int run(void)
{
	for (;;) {
		sleep_with_registers(opt.tick_us * 1000);
		ticks_at[tick++ % opt.log] = now_ns(CLOCK_REALTIME);
		arena_write(&work, opt.pages_per_tick);
		for (int i = 0; i < extras; i++)
			arena_write(&extra[i], 2);
		memory_tick(tick);
		state_tick(tick);
		thread_self_check();
		if (tick % 256 == 0)
			reap();
		if (take(&asked_mark))
			mark();
		if (take(&asked_fork))
			fork_child();
		if (take(&asked_report))
			report("writer");
		if (asked_end)
			return report("writer") ? 0 : 1;
	}
}

static u64 number_of(const char *text)
{
	char *end;
	u64 n = strtoull(text, &end, 10);

	if (*end || end == text) {
		fprintf(stderr, "writer: not a number: %s\n", text);
		exit(2);
	}
	return n;
}

static enum pattern pattern_of(const char *text)
{
	static const char *const names[] = {[RANDOM] = "random", [SEQUENTIAL] = "seq", [HOT] = "hot", [ZERO] = "zero",
					     [TEXT] = "text"};

	for (u32 i = 0; i < sizeof names / sizeof names[0]; i++)
		if (strcmp(names[i], text) == 0)
			return i;
	fprintf(stderr, "writer: no such pattern: %s\n", text);
	exit(2);
}

static void parse(int argc, char **argv)
{
	static const struct option longs[] = {
		{"mib", 1, NULL, 'm'},	     {"pages-per-tick", 1, NULL, 'p'}, {"tick-us", 1, NULL, 't'},
		{"log", 1, NULL, 'l'},	     {"pattern", 1, NULL, 'P'},	       {"out", 1, NULL, 'o'},
		{"threads", 1, NULL, 'T'},   {"timers", 0, NULL, 'i'},	       {"signals", 0, NULL, 's'},
		{"append", 1, NULL, 'a'},    {"append-every", 1, NULL, 'e'},   {"churn", 0, NULL, 'c'},
		{"sparse", 0, NULL, 'S'},    {"shared", 0, NULL, 'h'},	       {"shared-file", 1, NULL, 'f'},
		{"cow", 1, NULL, 'w'},	     {"vmas", 1, NULL, 'v'},	       {"odd", 0, NULL, 'd'},
		{NULL, 0, NULL, 0},
	};

	for (int c; (c = getopt_long(argc, argv, "", longs, NULL)) != -1;) {
		switch (c) {
		case 'm': opt.mib = number_of(optarg); break;
		case 'p': opt.pages_per_tick = number_of(optarg); break;
		case 't': opt.tick_us = number_of(optarg); break;
		case 'l': opt.log = number_of(optarg); break;
		case 'P': opt.pattern = pattern_of(optarg); break;
		case 'o': opt.out = optarg; break;
		case 'T': opt.threads = number_of(optarg); break;
		case 'i': opt.timers = true; break;
		case 's': opt.signals = true; break;
		case 'a': opt.append = optarg; break;
		case 'e': opt.append_every = number_of(optarg); break;
		case 'c': opt.churn = true; break;
		case 'S': opt.sparse = true; break;
		case 'h': opt.shared = true; break;
		case 'f': opt.shared_file = optarg; break;
		case 'w': opt.cow = optarg; break;
		case 'v': opt.vmas = number_of(optarg); break;
		case 'd': opt.odd = true; break;
		default: exit(2);
		}
	}
	if (optind != argc || !opt.mib || !opt.log || !opt.append_every || opt.threads > 256) {
		fprintf(stderr, "writer: bad options\n");
		exit(2);
	}
}

int main(int argc, char **argv)
{
	static const int asks[] = {SIGUSR1, SIGUSR2, SIGHUP, SIGTERM};
	struct sigaction action = {.sa_handler = asked, .sa_flags = SA_RESTART};
	sigset_t blocked;

	parse(argc, argv);
	/* What is asked for while starting is done once started. */
	sigemptyset(&blocked);
	for (u32 i = 0; i < sizeof asks / sizeof asks[0]; i++) {
		sigaction(asks[i], &action, NULL);
		sigaddset(&blocked, asks[i]);
	}
	pthread_sigmask(SIG_BLOCK, &blocked, NULL);
	if (opt.out && (out = open(opt.out, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600)) < 0)
		die(opt.out);
	thread_self_init(0);
	ticks_at = map(opt.log * sizeof(u64), PROT_READ | PROT_WRITE, MAP_PRIVATE, -1);
	arena_init(&work, "work", map(opt.mib * MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE, -1), opt.mib * MIB / PAGE,
		   opt.pattern);
	add_arenas();
	memory_start();
	state_start();
	threads_start(opt.threads, 1);
	report("started");
	pthread_sigmask(SIG_UNBLOCK, &blocked, NULL);
	/* At once: exit() would wait for whatever lock of stdio another thread may hold just now. */
	_exit(run());
}
