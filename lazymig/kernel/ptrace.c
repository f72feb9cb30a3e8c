#define _GNU_SOURCE
#include "ptrace.h"
#include "reaper.h"

#include <dirent.h>
#include <elf.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define GET_RSEQ_CONFIGURATION 0x420f /* linux/ptrace.h; the system's header may be older */
#define GET_SYSCALL_USER_DISPATCH_CONFIG 0x4211
#define STOP_EVENT(status) ((status) >> 16)

enum { LET_GO_NS = 250000000 };

struct rseq_configuration {
	uint64_t ptr;
	uint32_t size, signature, flags, pad;
};

struct dispatch_configuration {
	uint64_t mode, selector, offset, len;
};

static uint64_t now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static lm_result of_ptrace(long r)
{
	return r == -1 ? lm_fail(0, errno) : lm_ok(1);
}

lm_result lm_seize(int32_t tid, uint64_t options)
{
	return of_ptrace(ptrace(PTRACE_SEIZE, tid, 0, options));
}

/*
 * A stop is announced by SIGCHLD to this process. The callers block that signal in all threads, so that a wait
 * is one sigtimedwait: it sleeps (which hands the processor to a tracee on the same one), and has a deadline,
 * which waitpid has not. A signal that came for another tracee only makes the loop look once more.
 */
lm_result lm_wait(int32_t tid, uint64_t timeout_ns, int32_t *status)
{
	uint64_t deadline = now_ns() + timeout_ns;
	sigset_t chld;

	sigemptyset(&chld);
	sigaddset(&chld, SIGCHLD);
	for (;;) {
		int st;
		pid_t r = waitpid(tid, &st, __WALL | WNOHANG);
		if (r == tid) {
			*status = st;
			return WIFSTOPPED(st) ? lm_ok(1) : lm_fail(0, ESRCH);
		}
		if (r < 0)
			return lm_fail(0, errno == ECHILD ? ESRCH : errno);
		uint64_t now = now_ns();
		if (now >= deadline)
			return lm_fail(0, ETIMEDOUT);
		/* Another thread of ours may have taken the signal: look again after 2 ms at the latest. */
		uint64_t left = deadline - now < 2000000 ? deadline - now : 2000000;
		struct timespec t = {left / 1000000000, left % 1000000000};
		sigtimedwait(&chld, NULL, &t);
	}
}

static lm_result wait_until(int32_t tid, uint64_t deadline, int32_t *status)
{
	uint64_t now = now_ns();

	return lm_wait(tid, deadline > now ? deadline - now : 0, status);
}

static bool known(const int32_t *tids, uint64_t n, int32_t tid)
{
	for (uint64_t i = 0; i < n; i++)
		if (tids[i] == tid)
			return true;
	return false;
}

/* Whether a thread is dead and only not reaped yet: seizing such a one fails with EPERM. */
static bool ended(int32_t pid, int32_t tid)
{
	char path[64], line[512], state = 'X', *after;
	int saved = errno;

	snprintf(path, sizeof path, "/proc/%d/task/%d/stat", pid, tid);
	FILE *f = fopen(path, "re");
	if (f) {
		/* The name is in parentheses and may hold any character: what counts is behind the last one. */
		if (fgets(line, sizeof line, f) && (after = strrchr(line, ')')) && after[1])
			state = after[2];
		fclose(f);
	}
	errno = saved;
	return state == 'Z' || state == 'X';
}

/* Seizes and interrupts a thread; ESRCH when it has ended. */
static int seize(int32_t pid, int32_t tid)
{
	int why = EPERM;

	/* Twice: in between the number may have become another thread's, by execve(2). */
	for (int i = 0; i < 2 && why == EPERM; i++) {
		why = ptrace(PTRACE_SEIZE, tid, 0, 0) == -1 ? errno : 0;
		/* One that could not be stopped last time, and so not let go either, is ours still. */
		if ((!why || why == EPERM) && ptrace(PTRACE_INTERRUPT, tid, 0, 0) == 0)
			return 0;
		if (why == EPERM && ended(pid, tid))
			return ESRCH;
	}
	return why;
}

/* The same for those that are not in `tids` yet; returns how many were added, or sets *err. */
static uint64_t seize_new(int32_t pid, int32_t *tids, uint64_t n, uint64_t cap, lm_reaper *reaper, int *err)
{
	char path[64];
	struct dirent *e;
	uint64_t before = n;

	snprintf(path, sizeof path, "/proc/%d/task", pid);
	DIR *d = opendir(path);
	if (!d) {
		*err = errno == ENOENT ? ESRCH : errno;
		return 0;
	}
	while ((e = readdir(d))) {
		int32_t tid = atoi(e->d_name);
		/* Threads are listed in order of creation: only the first ones can be known. */
		if (tid <= 0 || known(tids, before, tid))
			continue;
		if (n == cap) {
			*err = E2BIG;
			break;
		}
		if (n)
			lm_reaper_watch(reaper, tids, n);
		int why = seize(pid, tid);
		if (why == ESRCH)
			continue;
		if (why) {
			*err = why;
			break;
		}
		tids[n++] = tid;
	}
	closedir(d);
	return n - before;
}

/* Waits for the stop that PTRACE_INTERRUPT asked for, delivering signals that are already on their way. */
static int wait_interrupted(int32_t tid, uint64_t deadline)
{
	for (;;) {
		int32_t st;
		lm_result r = wait_until(tid, deadline, &st);
		if (r.err)
			return r.err;
		if (STOP_EVENT(st) == PTRACE_EVENT_STOP)
			return WSTOPSIG(st) == SIGTRAP ? 0 : EBUSY; /* else: a group stop, the process is stopped (T) */
		if (STOP_EVENT(st) == PTRACE_EVENT_EXIT)
			return ESRCH;
		/* It stops for a signal first. Any stop takes a pending interrupt along, so it is asked again. */
		ptrace(PTRACE_INTERRUPT, tid, 0, 0);
		ptrace(PTRACE_CONT, tid, 0, WSTOPSIG(st));
	}
}

/* Waits for the stops of `tids` from `n` to `end` on; how many there are then: those that have ended are left out. */
static uint64_t wait_for_stops(int32_t *tids, uint64_t n, uint64_t end, uint64_t deadline, int *err)
{
	uint64_t keep = n;

	for (uint64_t i = n; i < end; i++) {
		int e = *err ? *err : wait_interrupted(tids[i], deadline);
		if (e == ESRCH)
			continue;
		if (e)
			*err = e;
		tids[keep++] = tids[i];
	}
	return keep;
}

/* Who has executed a program goes by the main thread's number since then, and may be ours still. */
static uint64_t with_renamed(int32_t pid, int32_t *tids, uint64_t n, uint64_t cap, uint64_t deadline)
{
	if (n == cap || known(tids, n, pid) || ptrace(PTRACE_INTERRUPT, pid, 0, 0) == -1)
		return n;
	if (!wait_interrupted(pid, deadline))
		tids[n++] = pid;
	return n;
}

/* The end of stopping threads, which on an error are let go again. */
static lm_result stopped(int32_t pid, int32_t *tids, uint64_t n, uint64_t cap, lm_reaper *reaper, int err)
{
	n = with_renamed(pid, tids, n, cap, now_ns() + LET_GO_NS);
	lm_reaper_stop(reaper);
	if (!err)
		return lm_ok(n);
	lm_detach_all(tids, n, 0);
	return lm_fail(n, err);
}

lm_result lm_stop_all(int32_t pid, int32_t *tids, uint64_t cap, uint64_t timeout_ns)
{
	uint64_t deadline = now_ns() + timeout_ns, n = 0, added;
	lm_reaper reaper = {0};
	int err = 0;

	do {
		added = seize_new(pid, tids, n, cap, &reaper, &err);
		n = wait_for_stops(tids, n, n + added, deadline, &err);
	} while (added && !err);
	return stopped(pid, tids, n, cap, &reaper, err || n ? err : ESRCH);
}

lm_result lm_stop_some(int32_t pid, int32_t *tids, uint64_t cap, uint64_t timeout_ns)
{
	uint64_t deadline = now_ns() + timeout_ns, taken = 0, n;
	lm_reaper reaper = {0};
	int err = 0;

	for (uint64_t i = 0; i < cap; i++) {
		if (taken)
			lm_reaper_watch(&reaper, tids, taken);
		int32_t tid = tids[i];
		if (!seize(pid, tid))
			tids[taken++] = tid;
	}
	n = wait_for_stops(tids, 0, taken, deadline, &err);
	return stopped(pid, tids, n, cap, &reaper, err);
}

lm_result lm_detach_all(const int32_t *tids, uint64_t n, int32_t sig)
{
	uint64_t done = 0;
	int err = 0;

	/* First those that stand: none of them is to wait for one that does not. */
	for (uint64_t i = n; i-- > 0;)
		if (ptrace(PTRACE_DETACH, tids[i], 0, sig) == 0)
			done++;
	for (uint64_t i = n; done < n && i-- > 0;) {
		int32_t st;

		/* A thread that is not stopped cannot be detached: stop it, then let it go. (ESRCH: it is gone, or free.) */
		if (ptrace(PTRACE_INTERRUPT, tids[i], 0, 0) == -1)
			continue;
		lm_result r = lm_wait(tids[i], LET_GO_NS, &st);
		if (!r.err) {
			ptrace(PTRACE_DETACH, tids[i], 0, STOP_EVENT(st) ? 0 : WSTOPSIG(st));
			done++;
		} else if (r.err != ESRCH && !err) {
			err = r.err;
		}
	}
	return lm_fail(done, err);
}

lm_result lm_thread_read(int32_t tid, lm_thread *out, uint8_t *xstate, uint64_t cap)
{
	struct iovec xs = {xstate, cap};
	struct rseq_configuration rq = {0};
	struct dispatch_configuration dispatch;
	void *head = NULL;
	size_t len = 0;

	memset(out, 0, sizeof *out);
	if (ptrace(PTRACE_GETREGS, tid, 0, &out->regs) == -1 ||
	    ptrace(PTRACE_GETREGSET, tid, NT_X86_XSTATE, &xs) == -1 ||
	    ptrace(PTRACE_GETSIGMASK, tid, sizeof out->sigmask, &out->sigmask) == -1)
		return lm_fail(0, errno);
	out->xstate_len = xs.iov_len;
	if (ptrace(GET_RSEQ_CONFIGURATION, tid, sizeof rq, &rq) >= 0 && rq.ptr) {
		out->rseq_ptr = rq.ptr;
		out->rseq_size = rq.size;
		out->rseq_sig = rq.signature;
		/* struct rseq: cpu_id_start, cpu_id (u32 each), then rseq_cs (u64) */
		lm_result r = lm_peek(tid, rq.ptr + 8, &out->rseq_cs, sizeof out->rseq_cs);
		if (r.err)
			return r;
	}
	if (ptrace(GET_SYSCALL_USER_DISPATCH_CONFIG, tid, sizeof dispatch, &dispatch) == 0)
		out->dispatch = dispatch.mode;
	if (syscall(SYS_get_robust_list, tid, &head, &len) == 0) {
		out->robust_head = (uint64_t)head;
		out->robust_len = len;
	}
	return lm_ok(1);
}

lm_result lm_set_regs(int32_t tid, const lm_regs *regs)
{
	return of_ptrace(ptrace(PTRACE_SETREGS, tid, 0, regs));
}

lm_result lm_get_regs(int32_t tid, lm_regs *regs)
{
	return of_ptrace(ptrace(PTRACE_GETREGS, tid, 0, regs));
}

lm_result lm_set_sigmask(int32_t tid, uint64_t mask)
{
	return of_ptrace(ptrace(PTRACE_SETSIGMASK, tid, sizeof mask, &mask));
}

lm_result lm_get_sigmask(int32_t tid, uint64_t *mask)
{
	return of_ptrace(ptrace(PTRACE_GETSIGMASK, tid, sizeof *mask, mask));
}

lm_result lm_set_options(const int32_t *tids, uint64_t n, uint64_t options)
{
	for (uint64_t i = 0; i < n; i++)
		if (ptrace(PTRACE_SETOPTIONS, tids[i], 0, options) == -1)
			return lm_fail(i, errno);
	return lm_ok(n);
}

lm_result lm_cont(int32_t tid, int32_t sig)
{
	return of_ptrace(ptrace(PTRACE_CONT, tid, 0, sig));
}

lm_result lm_event_message(int32_t tid, uint64_t *message)
{
	return of_ptrace(ptrace(PTRACE_GETEVENTMSG, tid, 0, message));
}

static bool trap(int32_t st)
{
	return WSTOPSIG(st) == SIGTRAP;
}

/*
 * Waits for the SIGTRAP that the interpreter's int3 makes, or for the entry of a system call, where the thread was set
 * going by `how`. EFAULT: it died of something else. A SIGCONT that anybody sends stops a seized thread too.
 */
static int wait_trap(int32_t tid, int how, uint64_t deadline)
{
	for (;;) {
		int32_t st;
		lm_result r = wait_until(tid, deadline, &st);

		if (r.err)
			return r.err;
		if (!STOP_EVENT(st))
			return trap(st) ? 0 : EFAULT;
		if (STOP_EVENT(st) != PTRACE_EVENT_STOP || !trap(st))
			return EFAULT;
		if (ptrace(how, tid, 0, 0) == -1)
			return errno;
	}
}

/*
 * No single step: its SIGTRAP is forced upon the thread, and so makes the kernel forget what the program does on SIGTRAP
 * (with all signals blocked, as here). The entry of a system call is told of without any signal, and shows which one it
 * is: at the gadget may be something else by now, which the program put there. The interrupt stops the thread on its
 * way out of the call.
 */
lm_result lm_step_syscall(int32_t tid, const lm_regs *base, uint64_t gadget, lm_call *call, uint64_t timeout_ns)
{
	uint64_t deadline = now_ns() + timeout_ns;
	struct user_regs_struct r;

	memcpy(&r, base, sizeof r);
	lm_arch_enter_syscall(&r, gadget, call);
	if (ptrace(PTRACE_SETREGS, tid, 0, &r) == -1 || ptrace(PTRACE_SYSCALL, tid, 0, 0) == -1)
		return lm_fail(0, errno);
	int err = wait_trap(tid, PTRACE_SYSCALL, deadline);
	if (err)
		return lm_fail(0, err);
	if (ptrace(PTRACE_GETREGS, tid, 0, &r) == -1)
		return lm_fail(0, errno);
	if (!lm_arch_entered(&r, gadget, call))
		return lm_fail(0, EFAULT);
	if (ptrace(PTRACE_INTERRUPT, tid, 0, 0) == -1 || ptrace(PTRACE_CONT, tid, 0, 0) == -1)
		return lm_fail(0, errno);
	err = wait_interrupted(tid, deadline);
	if (err)
		return lm_fail(0, err);
	if (ptrace(PTRACE_GETREGS, tid, 0, &r) == -1)
		return lm_fail(0, errno);
	call->ret = lm_arch_result(&r);
	return lm_ok(1);
}

lm_result lm_interrupt(int32_t tid, uint64_t timeout_ns)
{
	if (ptrace(PTRACE_INTERRUPT, tid, 0, 0) == -1)
		return lm_fail(0, errno);
	int err = wait_interrupted(tid, now_ns() + timeout_ns);
	return err ? lm_fail(0, err) : lm_ok(1);
}

lm_result lm_enter_batch(int32_t tid, const lm_regs *base, uint64_t blob, uint64_t table)
{
	struct user_regs_struct r;

	memcpy(&r, base, sizeof r);
	lm_arch_enter_blob(&r, blob, table);
	return of_ptrace(ptrace(PTRACE_SETREGS, tid, 0, &r));
}

static int put_back(int32_t tid, const lm_regs *regs, uint64_t mask)
{
	if (ptrace(PTRACE_SETREGS, tid, 0, regs) == -1 || ptrace(PTRACE_SETSIGMASK, tid, sizeof mask, &mask) == -1)
		return errno;
	return 0;
}

lm_result lm_finish_threads(const lm_final *threads, uint64_t n)
{
	for (uint64_t i = 0; i < n; i++) {
		const lm_final *t = &threads[i];
		struct iovec xs = {(void *)t->xstate, t->xstate_len};

		if (ptrace(PTRACE_SETREGSET, t->tid, NT_X86_XSTATE, &xs) == -1)
			return lm_fail(i, errno);
		int err = put_back(t->tid, &t->regs, t->mask);
		if (err)
			return lm_fail(i, err);
	}
	return lm_ok(n);
}

lm_result lm_settle(int32_t tid, const lm_regs *regs, uint64_t mask)
{
	int err = put_back(tid, regs, mask);

	return err ? lm_fail(0, err) : lm_ok(1);
}

/* The thread may run, or stand at any stop: what it is at there is dropped, and it executes nothing more. */
lm_result lm_recover(int32_t tid, const lm_regs *regs, uint64_t mask, uint64_t timeout_ns)
{
	uint64_t deadline = now_ns() + timeout_ns;
	struct user_regs_struct r;
	int32_t st = 0;

	if (ptrace(PTRACE_INTERRUPT, tid, 0, 0) == -1)
		return lm_fail(0, errno);
	if (ptrace(PTRACE_GETREGS, tid, 0, &r) == -1) { /* it runs */
		lm_result waited = lm_wait(tid, timeout_ns, &st);

		if (waited.err)
			return waited;
	}
	while (STOP_EVENT(st) != PTRACE_EVENT_STOP) {
		lm_result waited;

		/* At the entry of a system call it would still be made. */
		memcpy(&r, regs, sizeof r);
		r.orig_rax = -1;
		if (ptrace(PTRACE_SETREGS, tid, 0, &r) == -1 || ptrace(PTRACE_INTERRUPT, tid, 0, 0) == -1 ||
		    ptrace(PTRACE_CONT, tid, 0, 0) == -1)
			return lm_fail(0, errno);
		waited = wait_until(tid, deadline, &st);
		if (waited.err)
			return waited;
	}
	return lm_settle(tid, regs, mask);
}

/* All at once: each has a stop to wait for. */
static void settle_all(lm_runner *runners, uint64_t n, uint64_t deadline)
{
	for (uint64_t i = 0; i < n; i++)
		if (runners[i].settle && !runners[i].err &&
		    (ptrace(PTRACE_INTERRUPT, runners[i].tid, 0, 0) == -1 || ptrace(PTRACE_CONT, runners[i].tid, 0, 0) == -1))
			runners[i].err = errno;
	for (uint64_t i = 0; i < n; i++) {
		lm_runner *r = &runners[i];

		if (r->settle && !r->err)
			r->err = wait_interrupted(r->tid, deadline);
		if (r->settle && !r->err)
			r->err = put_back(r->tid, r->regs, r->mask);
	}
}

lm_result lm_run_batches(lm_runner *runners, uint64_t n, uint64_t blob, uint64_t timeout_ns)
{
	uint64_t deadline = now_ns() + timeout_ns, done = 0;
	int err = 0;

	for (uint64_t i = 0; i < n; i++) {
		struct user_regs_struct r;
		memcpy(&r, runners[i].regs, sizeof r);
		lm_arch_enter_blob(&r, blob, runners[i].table);
		runners[i].err = 0;
		/* Signals wait meanwhile: a handler would run with these registers. */
		if ((runners[i].settle && lm_set_sigmask(runners[i].tid, ~0ull).err) ||
		    ptrace(PTRACE_SETREGS, runners[i].tid, 0, &r) == -1 ||
		    ptrace(PTRACE_CONT, runners[i].tid, 0, 0) == -1)
			runners[i].err = errno;
	}
	for (uint64_t i = 0; i < n; i++) {
		if (!runners[i].err)
			runners[i].err = wait_trap(runners[i].tid, PTRACE_CONT, deadline);
	}
	settle_all(runners, n, deadline);
	for (uint64_t i = 0; i < n; i++) {
		if (!runners[i].err)
			done++;
		else if (!err)
			err = runners[i].err;
	}
	return lm_fail(done, err);
}

lm_result lm_peek(int32_t pid, uint64_t addr, void *out, uint64_t len)
{
	struct iovec l = {out, len}, r = {(void *)addr, len};
	ssize_t got = process_vm_readv(pid, &l, 1, &r, 1, 0);

	if (got < 0)
		return lm_fail(0, errno);
	return (uint64_t)got == len ? lm_ok(len) : lm_fail(got, EFAULT);
}

lm_result lm_peek_ranges(int32_t pid, const lm_range *r, uint64_t n, uint8_t *out)
{
	for (uint64_t i = 0; i < n; i++) {
		lm_result one = lm_peek(pid, r[i].start, out, r[i].end - r[i].start);

		if (one.err)
			return lm_fail(i, one.err);
		out += r[i].end - r[i].start;
	}
	return lm_ok(n);
}

lm_result lm_write_ranges(int mem, const lm_range *r, uint64_t n, const uint8_t *data)
{
	for (uint64_t i = 0; i < n; i++) {
		ssize_t size = (ssize_t)(r[i].end - r[i].start), put = pwrite(mem, data, (size_t)size, (off_t)r[i].start);

		if (put != size)
			return lm_fail(i, put < 0 ? errno : EFAULT);
		data += size;
	}
	return lm_ok(n);
}

lm_result lm_poke(int32_t pid, uint64_t addr, const void *data, uint64_t len)
{
	struct iovec l = {(void *)data, len}, r = {(void *)addr, len};
	ssize_t put = process_vm_writev(pid, &l, 1, &r, 1, 0);

	if (put < 0)
		return lm_fail(0, errno);
	return (uint64_t)put == len ? lm_ok(len) : lm_fail(put, EFAULT);
}
