/* Finding the pages of a process that a layer on disk already holds as they are. */
#ifndef LAZYMIG_STORE_SAME_H
#define LAZYMIG_STORE_SAME_H

#include "page_server/store.h"

/* cffi: begin */
/*
 * Compares the memory of `pid` with the pages that extents of `file` hold. Pages that are equal go to `out`
 * (merged, room for `cap`); those that cannot be read are not equal. `done` ranges; ENOSPC: `out` is full, and
 * the rest counts as different. Any other errno: reading the file failed.
 */
lm_result lm_same_pages(int32_t pid, int file, const lm_extent *extents, uint64_t n, lm_range *out, uint64_t cap);
/* cffi: end */

#endif
