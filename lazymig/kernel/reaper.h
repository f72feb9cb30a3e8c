/*
 * A thread that calls execve(2) holds a lock while it waits for the ends of all others, and the kernel waits with the end
 * of a traced one until its tracer has taken note. PTRACE_SEIZE needs that very lock: a tracer that has seized some of
 * the threads would wait in it for itself, for ever. So while it seizes, a timer interrupts it to take note of ends.
 */
#ifndef LAZYMIG_REAPER_H
#define LAZYMIG_REAPER_H

#include <stdbool.h>
#include <stdint.h>
#include <time.h>

typedef struct {
	timer_t timer;
	bool armed;
} lm_reaper;

/* From now on ends among the first `n` of `tids`, which this thread traces, are taken note of; again when there are more. */
void lm_reaper_watch(lm_reaper *r, const int32_t *tids, uint64_t n);
void lm_reaper_stop(lm_reaper *r);

#endif
