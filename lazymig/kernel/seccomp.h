/* A stopped thread's seccomp filters, as its tracer may read them. */
#ifndef LAZYMIG_SECCOMP_H
#define LAZYMIG_SECCOMP_H

#include <stdbool.h>

#include "lazymig/kernel/lm.h"

/* cffi: begin */
/*
 * Reads the `index`th filter of a stopped thread (0: the oldest) into `out`, an array of struct sock_filter of at
 * most `cap` entries (BPF_MAXINSNS, 4096, always suffices), and its SECCOMP_FILTER_FLAG_* into `flags`.
 * done: its number of entries; err ENOENT: there are no more.
 */
lm_result lm_seccomp_get(int32_t tid, uint64_t index, uint64_t *out, uint64_t cap, uint64_t *flags);
/* Whether any of these stopped threads has a filter; false where one may not ask. */
bool lm_seccomp_any(const int32_t *tids, uint64_t n);
/* cffi: end */

#endif
