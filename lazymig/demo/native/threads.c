#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "writer.h"

struct worker {
	pthread_t thread;
	u64 number;
	struct arena arena;
	_Atomic u64 ticks;
	u32 *ball; /* shared with the partner; NULL without one */
	char stack[16384];
};

static struct worker *workers;
static u64 worker_count;

__thread volatile u64 signals_seen;
static __thread u64 my_number, my_cookie, sleeps;
static __thread pid_t my_tid;
static __thread u32 my_mxcsr;
static __thread uint16_t my_x87;

/* --- registers --- */

/* The values that go into registers: general ones, x87, and 16 vector registers. */
struct registers {
	u64 general[4], x87, mask, vector[16][8];
};

#define GENERAL_IN \
	"movq 0(%[in]), %%r12\n movq 8(%[in]), %%r13\n movq 16(%[in]), %%r14\n movq 24(%[in]), %%r15\n" \
	"fldl 32(%[in])\n"
#define GENERAL_OUT \
	"fstpl 32(%[out])\n" \
	"movq %%r12, 0(%[out])\n movq %%r13, 8(%[out])\n movq %%r14, 16(%[out])\n movq %%r15, 24(%[out])\n"
#define EACH(move, kind, a, b, c, d, e, f, g, h) \
	move(kind #a, 0) move(kind #b, 1) move(kind #c, 2) move(kind #d, 3) \
	move(kind #e, 4) move(kind #f, 5) move(kind #g, 6) move(kind #h, 7)
#define AT(n) "48+64*" #n
#define SSE_IN(r, n) "movdqu " AT(n) "(%[in]), %%" r "\n"
#define SSE_OUT(r, n) "movdqu %%" r ", " AT(n) "(%[out])\n"
#define AVX_IN(r, n) "vmovdqu " AT(n) "(%[in]), %%" r "\n"
#define AVX_OUT(r, n) "vmovdqu %%" r ", " AT(n) "(%[out])\n"
#define AVX512_IN(r, n) "vmovdqu64 " AT(n) "(%[in]), %%" r "\n"
#define AVX512_OUT(r, n) "vmovdqu64 %%" r ", " AT(n) "(%[out])\n"
#define CALL(before, after, ...) \
	asm volatile(GENERAL_IN before "syscall\n" after GENERAL_OUT \
		     : "+a"(result) \
		     : "D"(arguments[0]), "S"(arguments[1]), "d"(arguments[2]), "r"(r10), [in] "r"(in), [out] "r"(out) \
		     : "rcx", "r11", "r12", "r13", "r14", "r15", "memory", __VA_ARGS__)
#define LOW "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"
#define HIGH "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23"

static long call_sse(long number, const long *arguments, const struct registers *in, struct registers *out)
{
	long result = number;
	register long r10 asm("r10") = arguments[3];

	CALL(EACH(SSE_IN, "xmm", 8, 9, 10, 11, 12, 13, 14, 15), EACH(SSE_OUT, "xmm", 8, 9, 10, 11, 12, 13, 14, 15), LOW);
	return result;
}

__attribute__((target("avx"))) static long call_avx(long number, const long *arguments, const struct registers *in,
						    struct registers *out)
{
	long result = number;
	register long r10 asm("r10") = arguments[3];

	CALL(EACH(AVX_IN, "ymm", 8, 9, 10, 11, 12, 13, 14, 15), EACH(AVX_OUT, "ymm", 8, 9, 10, 11, 12, 13, 14, 15), LOW);
	return result;
}

__attribute__((target("avx512f"))) static long call_avx512(long number, const long *arguments,
							   const struct registers *in, struct registers *out)
{
	long result = number;
	register long r10 asm("r10") = arguments[3];

	CALL(EACH(AVX512_IN, "zmm", 16, 17, 18, 19, 20, 21, 22, 23) "kmovw 40(%[in]), %%k3\n",
	     EACH(AVX512_OUT, "zmm", 16, 17, 18, 19, 20, 21, 22, 23) "kmovw %%k3, 40(%[out])\n", HIGH, "k3");
	return result;
}

void sleep_with_registers(u64 ns)
{
	static int kind = -1; /* bytes of a vector register */
	struct registers in = {0}, out = {0};
	struct timespec t;
	long arguments[4] = {0}, number = SYS_nanosleep, result;
	u64 seen = signals_seen, start = now_ns(CLOCK_MONOTONIC), until = start + ns;

	if (kind < 0)
		kind = __builtin_cpu_supports("avx512f") ? 64 : __builtin_cpu_supports("avx") ? 32 : 16;
	for (int i = 0; i < 4; i++)
		in.general[i] = mix(my_number, start, i);
	in.x87 = 0x3ff0000000000000 | start >> 12; /* some double */
	for (int i = 0; i < 8; i++)
		for (int j = 0; j < kind / 8; j++)
			in.vector[i][j] = mix(my_number, start, 8 * i + j);
	in.mask = kind == 64 ? start & 0xffff : 0;
	if (sleeps++ % 2) { /* one relative, one absolute: they restart by different means */
		t = (struct timespec){until / NS, until % NS};
		number = SYS_clock_nanosleep;
		memcpy(arguments, (long[4]){CLOCK_MONOTONIC, TIMER_ABSTIME, (long)&t, 0}, sizeof arguments);
	} else {
		t = (struct timespec){ns / NS, ns % NS};
		arguments[0] = (long)&t;
	}
	if (kind == 64)
		result = call_avx512(number, arguments, &in, &out);
	else if (kind == 32)
		result = call_avx(number, arguments, &in, &out);
	else
		result = call_sse(number, arguments, &in, &out);
	if (memcmp(&in, &out, sizeof in) != 0)
		fail("thread %llu: registers changed across a sleep", (unsigned long long)my_number);
	if (result == -EINTR && signals_seen == seen)
		fail("thread %llu: a sleep was interrupted by nothing", (unsigned long long)my_number);
	else if (result != 0 && result != -EINTR)
		fail("thread %llu: a sleep returned %ld", (unsigned long long)my_number, result);
	else if (result == 0 && now_ns(CLOCK_MONOTONIC) < until)
		fail("thread %llu: a sleep was too short", (unsigned long long)my_number);
}

/* --- what belongs to a thread --- */

static u32 mxcsr(void)
{
	u32 value;

	asm volatile("stmxcsr %0" : "=m"(value));
	return value & ~0x3fu; /* without the sticky exception flags */
}

static uint16_t x87(void)
{
	uint16_t value;

	asm volatile("fnstcw %0" : "=m"(value));
	return value;
}

void thread_self_init(u64 number)
{
	my_number = number;
	my_cookie = mix(number, 1, 1);
	my_tid = (pid_t)syscall(SYS_gettid);
	my_mxcsr = (mxcsr() & ~0x6000u) | (u32)(number % 4) << 13; /* a rounding mode of its own */
	my_x87 = (uint16_t)((x87() & ~0xc00) | (number + 1) % 4 << 10);
	asm volatile("ldmxcsr %0\n fldcw %1" : : "m"(my_mxcsr), "m"(my_x87));
}

/* glibc's sched_getcpu reads the rseq area; the kernel's answer must be the same. */
static bool rseq_lives(void)
{
	for (int i = 0; i < 100; i++) {
		unsigned int cpu = ~0u;

		syscall(SYS_getcpu, &cpu, NULL, NULL);
		if ((int)cpu == sched_getcpu())
			return true;
	}
	return false;
}

void thread_self_check(void)
{
	unsigned long long n = my_number;

	if (my_cookie != mix(my_number, 1, 1))
		fail("thread %llu: thread-local storage changed", n);
	if (my_mxcsr != mxcsr() || my_x87 != x87())
		fail("thread %llu: floating point modes changed", n);
	if (sleeps % 64)
		return;
	if (my_tid != syscall(SYS_gettid))
		fail("thread %llu: its tid changed", n);
	if (!rseq_lives())
		fail("thread %llu: rseq is not up to date", n);
}

/* Everything that the kernel keeps for one thread, as text. */
static void describe_thread(char *text, size_t size)
{
	char name[16] = "";
	cpu_set_t cpus;
	sigset_t mask;
	stack_t stack;
	struct sched_param param;
	void *robust = NULL, *clear_tid = NULL;
	size_t length = 0;

	prctl(PR_GET_NAME, name);
	CPU_ZERO(&cpus);
	sched_getaffinity(0, sizeof cpus, &cpus);
	pthread_sigmask(SIG_SETMASK, NULL, &mask);
	sigaltstack(NULL, &stack);
	sched_getparam(0, &param);
	syscall(SYS_get_robust_list, 0, &robust, &length);
	prctl(PR_GET_TID_ADDRESS, &clear_tid, 0, 0, 0);
	snprintf(text, size, "name %s cpus %lx mask %lx stack %p+%zu/%x policy %d/%d nice %d robust %p+%zu tid at %p", name,
		 cpus.__bits[0], mask.__val[0], stack.ss_sp, stack.ss_size, stack.ss_flags, sched_getscheduler(0),
		 param.sched_priority, getpriority(PRIO_PROCESS, (id_t)my_tid), robust, length, clear_tid);
}

static void decorate(struct worker *w)
{
	char name[16];
	sigset_t mask;
	stack_t stack = {.ss_sp = w->stack, .ss_size = sizeof w->stack};
	struct sched_param param = {0};

	snprintf(name, sizeof name, "worker %llu)", (unsigned long long)w->number);
	prctl(PR_SET_NAME, name);
	sigfillset(&mask);
	sigdelset(&mask, SIGRTMIN + 10 + (int)(w->number % 4));
	pthread_sigmask(SIG_SETMASK, &mask, NULL);
	if (w->number % 4 == 1) {
		cpu_set_t cpus;

		CPU_ZERO(&cpus);
		CPU_SET(0, &cpus);
		sched_setaffinity(0, sizeof cpus, &cpus);
	}
	if (w->number % 4 == 2 && sched_setscheduler(0, SCHED_BATCH, &param) == 0)
		setpriority(PRIO_PROCESS, (id_t)my_tid, 3);
	if (w->number % 4 == 3)
		sigaltstack(&stack, NULL);
}

/* --- the work --- */

/* Waits for the ball to be on our side (parity), then returns it. */
static void play(struct worker *w, u64 round)
{
	u32 side = (w->number + 1) % 2, mine = (u32)(2 * round + side), value;
	int private = (w->number - 1) / 2 % 2 ? FUTEX_PRIVATE_FLAG : 0;
	const struct timespec second = {1, 0};

	while ((value = __atomic_load_n(w->ball, __ATOMIC_ACQUIRE)) != mine) {
		if (value != mine - 1) {
			fail("thread %llu: the ball is %u, not %u", (unsigned long long)w->number, value, mine);
			return;
		}
		/* With and without a timeout: the kernel restarts them by different means. */
		long r = syscall(SYS_futex, w->ball, FUTEX_WAIT | private, value, round % 2 ? &second : NULL, NULL, 0);

		if (r != 0 && errno != EAGAIN && errno != ETIMEDOUT)
			fail("thread %llu: futex: %s", (unsigned long long)w->number, strerror(errno));
	}
	__atomic_store_n(w->ball, mine + 1, __ATOMIC_RELEASE);
	syscall(SYS_futex, w->ball, FUTEX_WAKE | private, 1, NULL, NULL, 0);
}

static void *worker(void *argument)
{
	struct worker *w = argument;
	char before[512], after[512];

	thread_self_init(w->number);
	decorate(w);
	describe_thread(before, sizeof before);
	for (u64 round = 0;; round++) {
		sleep_with_registers(opt.tick_us * 1000 * (1 + worker_count));
		arena_write(&w->arena, 4);
		if (w->ball)
			play(w, round);
		thread_self_check();
		if (round % 64 == 0) {
			describe_thread(after, sizeof after);
			if (strcmp(before, after) != 0)
				fail("thread %llu: was «%s», is «%s»", (unsigned long long)w->number, before, after);
			strcpy(before, after); /* told once */
		}
		w->ticks++;
	}
	return NULL;
}

void threads_start(u64 count, u64 mib_each)
{
	worker_count = count;
	workers = map((count + 1) * sizeof *workers, PROT_READ | PROT_WRITE, MAP_PRIVATE, -1);
	for (u64 i = 0; i < count; i++) {
		struct worker *w = &workers[i];

		w->number = i + 1;
		if (i % 2 == 0 && i + 1 < count)
			w->ball = map(PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, -1);
		else if (i % 2 == 1)
			w->ball = workers[i - 1].ball;
		arena_init(&w->arena, "thread", map(mib_each * MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE, -1),
			   mib_each * MIB / PAGE, opt.pattern);
	}
	for (u64 i = 0; i < count; i++)
		if (pthread_create(&workers[i].thread, NULL, worker, &workers[i]) != 0)
			die("pthread_create");
}

void threads_hold(void)
{
	for (u64 i = 0; i < worker_count; i++)
		pthread_mutex_lock(&workers[i].arena.lock);
}

void threads_release(void)
{
	for (u64 i = 0; i < worker_count; i++)
		pthread_mutex_unlock(&workers[i].arena.lock);
}

u64 threads_verify(void)
{
	u64 bad = 0;

	for (u64 i = 0; i < worker_count; i++)
		bad += arena_verify(&workers[i].arena);
	return bad;
}

void threads_print(FILE *to)
{
	fprintf(to, "\"threads\":[");
	for (u64 i = 0; i < worker_count; i++)
		fprintf(to, "%s%llu", i ? "," : "", (unsigned long long)workers[i].ticks);
	fprintf(to, "],");
}
