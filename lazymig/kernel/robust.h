/* Robust futex lists of another process (set_robust_list(2), Documentation/locking/robust-futexes.rst). */
#ifndef LM_ROBUST_H
#define LM_ROBUST_H

#include "lazymig/kernel/lm.h"

/* cffi: begin */
/*
 * The addresses that the kernel reads and writes when threads with these list heads end: of each lock's entry and of
 * its futex, in `out`. Lists that cannot be read, and what is beyond `cap` addresses, are left out.
 */
uint64_t lm_robust_addresses(int32_t pid, const uint64_t *heads, uint64_t n, uint64_t *out, uint64_t cap);
/* cffi: end */

#endif
