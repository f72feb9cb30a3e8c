#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#include "writer.h"

/* --- timers: a thread of its own takes their signals --- */

enum { PERIOD = 10000000 }; /* ns */
static _Atomic u64 alarms, expirations;
static u64 alarms_marked, expirations_marked, marked_at, started_at;
static timer_t periodic, far;

static void on_alarm(int number)
{
	(void)number;
	signals_seen++;
	alarms++;
}

static void on_timer(int number, siginfo_t *info, void *context)
{
	(void)number, (void)context;
	signals_seen++;
	expirations += 1 + (u64)info->si_overrun;
}

static void *take_timers(void *argument)
{
	sigset_t mine;
	struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGRTMIN};
	struct sigevent silent = {.sigev_notify = SIGEV_NONE};
	struct itimerspec each = {{0, PERIOD}, {0, PERIOD}}, hour = {{0, 0}, {3600, 0}};
	struct itimerval real = {{0, PERIOD / 1000}, {0, PERIOD / 1000}}, virtual = {{1000, 0}, {1000, 0}};

	event._sigev_un._tid = gettid();
	if (timer_create(CLOCK_MONOTONIC, &event, &periodic) || timer_create(CLOCK_REALTIME, &silent, &far) ||
	    timer_settime(periodic, 0, &each, NULL) || timer_settime(far, 0, &hour, NULL) ||
	    setitimer(ITIMER_REAL, &real, NULL) || setitimer(ITIMER_VIRTUAL, &virtual, NULL))
		die("timers");
	started_at = now_ns(CLOCK_MONOTONIC);
	sigemptyset(&mine);
	sigaddset(&mine, SIGALRM);
	sigaddset(&mine, SIGRTMIN);
	*(_Atomic bool *)argument = true;
	pthread_sigmask(SIG_UNBLOCK, &mine, NULL);
	for (;;)
		pause();
	return NULL;
}

static void start_timers(void)
{
	static _Atomic bool ready;
	struct sigaction alarm = {.sa_handler = on_alarm, .sa_flags = SA_RESTART};
	struct sigaction timer = {.sa_sigaction = on_timer, .sa_flags = SA_RESTART | SA_SIGINFO};
	pthread_t thread;

	sigaction(SIGALRM, &alarm, NULL);
	sigaction(SIGRTMIN, &timer, NULL);
	if (pthread_create(&thread, NULL, take_timers, (void *)&ready) != 0)
		die("pthread_create");
	while (!ready)
		usleep(100);
}

/* There are never more expirations than were due. Those that merge while nobody takes signals are lost. */
static void check_count(const char *what, u64 count, u64 elapsed)
{
	u64 due = elapsed / PERIOD;

	if (count > due + 3 || (due > 50 && count == 0))
		fail("%s: %llu expirations, %llu were due", what, (unsigned long long)count, (unsigned long long)due);
}

static void check_timers(void)
{
	u64 now = now_ns(CLOCK_MONOTONIC), left;
	struct itimerspec each, hour;
	struct itimerval virtual;

	check_count("setitimer", alarms - alarms_marked, now - marked_at);
	check_count("timer_create", expirations - expirations_marked, now - marked_at);
	if (timer_gettime(periodic, &each) || each.it_interval.tv_nsec != PERIOD || each.it_value.tv_nsec > PERIOD)
		fail("the periodic timer changed");
	if (timer_gettime(far, &hour)) {
		fail("the one-hour timer is gone");
	} else {
		left = hour.it_value.tv_sec * NS + hour.it_value.tv_nsec;
		if (llabs((long long)(left + (now - started_at) - 3600 * NS)) > (long long)NS)
			fail("the one-hour timer has %llu ns left", (unsigned long long)left);
	}
	if (getitimer(ITIMER_VIRTUAL, &virtual) || virtual.it_interval.tv_sec != 1000 || virtual.it_value.tv_sec < 900)
		fail("the virtual timer changed");
}

/* --- signals: pending ones (shared and private), handled ones, on an alternate stack --- */

enum { QUEUED = 3, EVERY = 64 };
static _Atomic u64 handled;
static u64 raised;
static char stack[32768];
static u64 generation;

static void on_signal(int number, siginfo_t *info, void *context)
{
	char here;

	(void)number, (void)context;
	signals_seen++;
	if (&here < stack || &here >= stack + sizeof stack)
		fail("a handler did not run on the alternate stack");
	if (info->si_pid != getpid())
		fail("a signal came from %d", info->si_pid);
	handled++;
}

static void queue(void)
{
	generation++;
	for (u64 i = 0; i < QUEUED; i++) {
		union sigval value = {.sival_ptr = (void *)(generation << 8 | i)};

		if (sigqueue(getpid(), SIGRTMIN + 3, value) || pthread_sigqueue(pthread_self(), SIGRTMIN + 4, value))
			die("sigqueue");
	}
}

static void check_queue(int number)
{
	const struct timespec none = {0, 0};
	sigset_t set;
	siginfo_t info;

	sigemptyset(&set);
	sigaddset(&set, number);
	for (u64 i = 0; i < QUEUED; i++) {
		if (sigtimedwait(&set, &info, &none) != number)
			fail("pending signal %d is gone", number);
		else if (info.si_value.sival_ptr != (void *)(generation << 8 | i) || info.si_code != SI_QUEUE ||
			 info.si_pid != getpid())
			fail("pending signal %d changed", number);
	}
	if (sigtimedwait(&set, &info, &none) != -1)
		fail("signal %d is pending once more", number);
}

static void start_signals(void)
{
	stack_t alternate = {.ss_sp = stack, .ss_size = sizeof stack};
	struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_RESTART | SA_SIGINFO | SA_ONSTACK};

	sigaltstack(&alternate, NULL);
	sigaddset(&action.sa_mask, SIGCHLD);
	sigaction(SIGRTMIN + 5, &action, NULL);
	queue();
}

static void check_signals(void)
{
	if (raised != handled)
		fail("%llu signals raised, %llu handled", (unsigned long long)raised, (unsigned long long)handled);
	check_queue(SIGRTMIN + 3);
	check_queue(SIGRTMIN + 4);
	queue();
}

/* --- identity: what the kernel knows of the process, as lines of text --- */

static char *identity;

static void print_file(FILE *to, const char *path)
{
	char data[16384];
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, data, sizeof data);

	close(fd);
	fprintf(to, "%s", path);
	for (ssize_t i = 0; i < n; i++)
		fprintf(to, data[i] >= ' ' && data[i] < 127 ? "%c" : "%02x", data[i] & 0xff);
	fprintf(to, "\n");
}

static void print_status(FILE *to)
{
	static const char *const keys[] = {"Name:", "Umask:", "Pid:",	 "Uid:",    "Gid:",    "Groups:", "SigIgn:",
					   "SigCgt:", "CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:", "NoNewPrivs:",
					   "Seccomp:", "THP_enabled:"};
	char line[4096];
	FILE *from = fopen("/proc/self/status", "re");

	while (from && fgets(line, sizeof line, from))
		for (u32 i = 0; i < sizeof keys / sizeof keys[0]; i++)
			if (strncmp(line, keys[i], strlen(keys[i])) == 0)
				fputs(line, to);
	if (from)
		fclose(from);
}

static char *describe(void)
{
	static const char *const links[] = {"/proc/self/cwd", "/proc/self/root", "/proc/self/exe"};
	static const char *const files[] = {"/proc/self/cmdline", "/proc/self/environ", "/proc/self/auxv",
					    "/proc/self/oom_score_adj", "/proc/self/coredump_filter"};
	char *text = NULL, target[4096];
	size_t size;
	int value = 0;
	FILE *to = open_memstream(&text, &size);

	if (!to)
		die("open_memstream");
	print_status(to);
	for (u32 i = 0; i < sizeof links / sizeof links[0]; i++) {
		ssize_t n = readlink(links[i], target, sizeof target - 1);

		target[n < 0 ? 0 : n] = 0;
		fprintf(to, "%s %s\n", links[i], target);
	}
	for (u32 i = 0; i < sizeof files / sizeof files[0]; i++)
		print_file(to, files[i]);
	fprintf(to, "session %d group %d\n", getsid(0), getpgid(0));
	fprintf(to, "personality %x\n", personality(0xffffffff));
	fprintf(to, "dumpable %d\n", prctl(PR_GET_DUMPABLE));
	prctl(PR_GET_PDEATHSIG, &value);
	fprintf(to, "pdeathsig %d\n", value);
	prctl(PR_GET_CHILD_SUBREAPER, &value);
	fprintf(to, "subreaper %d\n", value);
	fprintf(to, "nice %d\n", getpriority(PRIO_PROCESS, 0));
	for (int i = 0; i < RLIM_NLIMITS; i++) {
		struct rlimit limit = {0};

		getrlimit(i, &limit);
		fprintf(to, "rlimit %d %lu %lu\n", i, limit.rlim_cur, limit.rlim_max);
	}
	fclose(to);
	return text;
}

static void check_identity(void)
{
	char *now = describe(), *a = identity, *b = now;

	while (*a && *b) {
		size_t n = strcspn(a, "\n"), m = strcspn(b, "\n");

		if (n != m || memcmp(a, b, n) != 0)
			fail("was «%.*s», is «%.*s»", (int)(n > 80 ? 80 : n), a, (int)(m > 80 ? 80 : m), b);
		a += n + (a[n] != 0);
		b += m + (b[m] != 0);
	}
	free(identity);
	identity = now; /* told once */
}

/* Makes what is usually at its default differ from it. */
static void be_odd(void)
{
	struct rlimit limit;
	gid_t groups[] = {100, 200};

	umask(027);
	getrlimit(RLIMIT_NOFILE, &limit);
	limit.rlim_cur = 500;
	setrlimit(RLIMIT_NOFILE, &limit);
	setgroups(2, groups);
	setpriority(PRIO_PROCESS, 0, 1);
	personality(ADDR_NO_RANDOMIZE);
	prctl(PR_SET_NAME, "odd name)");
	prctl(PR_SET_PDEATHSIG, SIGWINCH);
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	prctl(PR_CAPBSET_DROP, 23 /* CAP_SYS_NICE */);
}

/* glibc installs its own signal handlers with the first thread: that must not look like a change. */
static void *nothing(void *argument)
{
	return argument;
}

static void have_had_a_thread(void)
{
	pthread_t thread;

	if (pthread_create(&thread, NULL, nothing, NULL) != 0 || pthread_join(thread, NULL) != 0)
		die("pthread_create");
}

/* --- appended lines --- */

static int append_fd = -1;
static u64 appended;

static void append_line(void)
{
	char line[32];
	int n = snprintf(line, sizeof line, "%llu\n", (unsigned long long)appended++);

	if (write(append_fd, line, n) != n)
		fail("append: %s", strerror(errno));
}

/* --- all of it --- */

void state_start(void)
{
	sigset_t blocked;

	sigemptyset(&blocked);
	sigaddset(&blocked, SIGALRM);
	for (int i = 0; i < 5; i++)
		sigaddset(&blocked, SIGRTMIN + i);
	pthread_sigmask(SIG_BLOCK, &blocked, NULL);
	if (opt.odd)
		be_odd();
	if (opt.timers)
		start_timers();
	if (opt.signals)
		start_signals();
	if (opt.append && (append_fd = open(opt.append, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600)) < 0)
		die(opt.append);
	have_had_a_thread();
	identity = describe();
	state_mark();
}

void state_tick(u64 tick)
{
	if (append_fd >= 0 && tick % opt.append_every == 0)
		append_line();
	if (opt.signals && tick % EVERY == 0) {
		raised++;
		raise(SIGRTMIN + 5);
	}
}

void state_mark(void)
{
	alarms_marked = alarms;
	expirations_marked = expirations;
	marked_at = now_ns(CLOCK_MONOTONIC);
}

void state_verify(void)
{
	if (opt.timers)
		check_timers();
	if (opt.signals)
		check_signals();
	check_identity();
}

void state_print(FILE *to)
{
	fprintf(to, "\"appended\":%llu,\"alarms\":%llu,\"expirations\":%llu,\"handled\":%llu,", (unsigned long long)appended,
		(unsigned long long)alarms, (unsigned long long)expirations, (unsigned long long)handled);
}
