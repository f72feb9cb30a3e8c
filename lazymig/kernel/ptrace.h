/* Stopping threads, reading and setting their registers, and running batches of system calls inside them. */
#ifndef LAZYMIG_PTRACE_H
#define LAZYMIG_PTRACE_H

#include "lazymig/arch/x86_64/arch.h"

/* cffi: begin */
/* What the kernel keeps of a thread that only a tracer can read. Sizes in bytes. */
typedef struct {
	lm_regs regs;
	uint64_t sigmask;
	uint64_t robust_head, robust_len;
	uint64_t rseq_ptr;
	uint32_t rseq_size, rseq_sig;
	uint64_t rseq_cs; /* the critical section the thread is in, or 0; running a batch would lose it */
	uint64_t dispatch; /* its mode of syscall user dispatch, 0: off */
	uint64_t xstate_len;
} lm_thread;

/* One thread that runs one batch; `err` says how that went. */
typedef struct {
	int32_t tid;
	int32_t err;
	uint64_t table;      /* address of the first lm_call in the thread's own memory */
	const lm_regs *regs; /* the registers it has otherwise */
	uint64_t settle;     /* whether it has them again afterwards, with this signal mask; see lm_settle */
	uint64_t mask;
} lm_runner;

/* What a stopped thread goes on with. */
typedef struct {
	int32_t tid;
	lm_regs regs;
	uint64_t mask;
	const uint8_t *xstate;
	uint64_t xstate_len; /* bytes */
} lm_final;

lm_result lm_seize(int32_t tid, uint64_t options);
/* Waits until `tid` stops (any stop; its raw wait status in *status); ETIMEDOUT, ESRCH when it is gone. */
lm_result lm_wait(int32_t tid, uint64_t timeout_ns, int32_t *status);
/*
 * Seizes and stops all threads of `pid`, also such as appear meanwhile; their ids go to `tids`. `done` is their
 * number. On failure all that were seized are let go and run on. Signals that arrive on the way are delivered.
 */
lm_result lm_stop_all(int32_t pid, int32_t *tids, uint64_t cap, uint64_t timeout_ns);
/* The same for the `n` threads in `tids`, but for those that have ended or cannot be seized; `done` are left there. */
lm_result lm_stop_some(int32_t pid, int32_t *tids, uint64_t n, uint64_t timeout_ns);
/* Lets the threads go. `sig` is 0, or a signal to leave each with. Gone threads are not an error. */
lm_result lm_detach_all(const int32_t *tids, uint64_t n, int32_t sig);
/* Reads `out` and the extended state (at most `cap` bytes) of a stopped thread. */
lm_result lm_thread_read(int32_t tid, lm_thread *out, uint8_t *xstate, uint64_t cap);
lm_result lm_set_regs(int32_t tid, const lm_regs *regs);
lm_result lm_get_regs(int32_t tid, lm_regs *regs);
lm_result lm_set_sigmask(int32_t tid, uint64_t mask);
lm_result lm_get_sigmask(int32_t tid, uint64_t *mask);
/* Extended state, registers and signal mask of many threads (done: how many). */
lm_result lm_finish_threads(const lm_final *threads, uint64_t n);
/* PTRACE_SETOPTIONS of stopped threads, up to the first that refuses (done: how many). */
lm_result lm_set_options(const int32_t *tids, uint64_t n, uint64_t options);
lm_result lm_cont(int32_t tid, int32_t sig);
/* Stops one seized thread. */
lm_result lm_interrupt(int32_t tid, uint64_t timeout_ns);
/* Registers that make a stopped thread interpret the batch at `table` once it runs on. */
lm_result lm_enter_batch(int32_t tid, const lm_regs *base, uint64_t blob, uint64_t table);
lm_result lm_event_message(int32_t tid, uint64_t *message);
/*
 * Executes one system call in a stopped thread at the instruction at `gadget`; sets call->ret. EFAULT: something else is
 * there. No signal has any part in it.
 */
lm_result lm_step_syscall(int32_t tid, const lm_regs *base, uint64_t gadget, lm_call *call, uint64_t timeout_ns);
/*
 * Gives a thread that has stopped after a step its own registers and signal mask back. A tracer may be killed at any
 * moment, and the thread then runs on from where it stands: amid what it was made to do, it would die of it.
 */
lm_result lm_settle(int32_t tid, const lm_regs *regs, uint64_t mask);
/* The same of a thread whose step or batch has failed, wherever it stands or runs. */
lm_result lm_recover(int32_t tid, const lm_regs *regs, uint64_t mask, uint64_t timeout_ns);
/* Runs all the batches at once and waits for every one. `done` counts the good ones; `err` is the first error. */
lm_result lm_run_batches(lm_runner *runners, uint64_t n, uint64_t blob, uint64_t timeout_ns);
/* Reads or writes another process's memory, whole or not at all (done: bytes). */
lm_result lm_peek(int32_t pid, uint64_t addr, void *out, uint64_t len);
lm_result lm_poke(int32_t pid, uint64_t addr, const void *data, uint64_t len);
/* The same for ranges, whose bytes lie one after another (done: ranges). Writing goes through a descriptor of
 * /proc/PID/mem, which takes no notice of the mappings' rights. */
lm_result lm_peek_ranges(int32_t pid, const lm_range *r, uint64_t n, uint8_t *out);
lm_result lm_write_ranges(int mem, const lm_range *r, uint64_t n, const uint8_t *data);
/* cffi: end */

#endif
