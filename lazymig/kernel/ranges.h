/* Algebra on sorted, disjoint, page-aligned ranges. Every output array is the caller's and large enough for
 * the worst case told below; no output may overlap an input, but for lm_ranges_normalise, which works in place. */
#ifndef LAZYMIG_RANGES_H
#define LAZYMIG_RANGES_H

#include "lazymig/kernel/lm.h"

/* cffi: begin */
/* Sorts and merges what overlaps or touches; drops empty ranges. Returns the number of ranges left. */
uint64_t lm_ranges_normalise(lm_range *r, uint64_t n);
/* 1 if aligned, none empty, sorted and disjoint (touching is allowed); else 0. */
int lm_ranges_valid(const lm_range *r, uint64_t n);
/* These return the number of ranges written; `out` has room for na + nb. The result never has ranges that touch. */
uint64_t lm_ranges_union(const lm_range *a, uint64_t na, const lm_range *b, uint64_t nb, lm_range *out);
uint64_t lm_ranges_subtract(const lm_range *a, uint64_t na, const lm_range *b, uint64_t nb, lm_range *out);
uint64_t lm_ranges_intersect(const lm_range *a, uint64_t na, const lm_range *b, uint64_t nb, lm_range *out);
/* What a and b share, in as many pieces as there are: here both may hold ranges that touch, and so does the result. */
uint64_t lm_ranges_cut(const lm_range *a, uint64_t na, const lm_range *b, uint64_t nb, lm_range *out);
/* Cuts ranges into pieces of `step` bytes (a power of two), but none into many more than `most`. Returns how many there
 * are, also when that is more than `cap`; touching ranges stay apart. */
uint64_t lm_ranges_chop(const lm_range *r, uint64_t n, uint64_t step, uint64_t most, lm_range *out, uint64_t cap);
/* Those of at least this many bytes; `out` has room for n. Touching ranges stay apart. */
uint64_t lm_ranges_long(const lm_range *r, uint64_t n, uint64_t least, lm_range *out);
/* Those ranges of a, whole, that share anything with b; `out` has room for na. */
uint64_t lm_ranges_touching(const lm_range *a, uint64_t na, const lm_range *b, uint64_t nb, lm_range *out);
/* Sum of the lengths in bytes. */
uint64_t lm_ranges_size(const lm_range *r, uint64_t n);
/* Index of the first range that ends after `addr` (n if there is none). */
uint64_t lm_ranges_find(const lm_range *r, uint64_t n, uint64_t addr);
/* 1 if every byte of b is in a. */
int lm_ranges_cover(const lm_range *a, uint64_t na, const lm_range *b, uint64_t nb);
/* Writes the ranges as struct iovec (address, length), as process_madvise wants them. */
void lm_ranges_iovec(const lm_range *r, uint64_t n, uint64_t *out);
/* cffi: end */

#endif
