/* Threads that make the same system calls as one of them: their batches lie in one region, laid out alike. */
#ifndef LAZYMIG_CHORUS_H
#define LAZYMIG_CHORUS_H

#include "lazymig/kernel/lm.h"

/* cffi: begin */
/* What of a batch is in use, in bytes from its table on: calls and the mark of their end, and data in [data, end). */
typedef struct {
	uint64_t calls;
	uint64_t data, end;
} lm_score;

/*
 * Copies the batch at offset `lead` of the region, which is at `base` in the threads' memory, to the offsets `at`.
 * Arguments that are addresses in there become such in the copy; addresses among the data do not.
 */
void lm_chorus_spread(uint8_t *view, uint64_t base, uint64_t lead, const uint64_t *at, uint64_t n, const lm_score *s);
/* Clears alike[i] where results or data differ from the lead's; `own` are ranges of bytes from `data` on, sorted, in
 * which they may. */
void lm_chorus_alike(const uint8_t *view, uint64_t lead, const uint64_t *at, uint64_t n, const lm_score *s,
		     const lm_range *own, uint64_t n_own, uint8_t *alike);
/* Moves what is in use of each between the view and the region of another process (done: how many batches). */
lm_result lm_chorus_flush(int32_t pid, uint64_t base, const uint8_t *view, const uint64_t *at, uint64_t n, const lm_score *s);
lm_result lm_chorus_fetch(int32_t pid, uint64_t base, uint8_t *view, const uint64_t *at, uint64_t n, const lm_score *s);
/* Clears alike[i] where /proc/TID/status has not the lines of `lines`: some, a zero, and some from further down. */
void lm_status_alike(const int32_t *tids, uint64_t n, const uint8_t *lines, uint64_t len, uint8_t *alike);
/* cffi: end */

#endif
