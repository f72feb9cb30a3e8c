/* Signals that wait for a stopped thread or its process. */
#ifndef LAZYMIG_SIGINFO_H
#define LAZYMIG_SIGINFO_H

#include "lazymig/kernel/lm.h"

/* cffi: begin */
/*
 * Copies the siginfo_t (128 bytes each) of signals that wait for a traced, stopped thread, oldest first, from the
 * queue of its process (`shared`) or its own, starting with number `from`. At most `cap` of them; `done` is how many.
 */
lm_result lm_peek_signals(int32_t tid, int32_t shared, uint64_t from, uint8_t *out, uint64_t cap);
/* cffi: end */

#endif
