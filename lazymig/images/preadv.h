/* Cutting extents of a file into preadv(2) calls. */
#ifndef LAZYMIG_PREADV_H
#define LAZYMIG_PREADV_H

#include "lazymig/images/extents.h"

/* cffi: begin */
/* One call: iovecs [first, first + n) of the table, filled from `offset` of the file on. `extent`: of the first. */
typedef struct {
	uint64_t offset, bytes, extent, within;
	uint32_t first, n;
} lm_preadv;

/* Where the cutting goes on: so many bytes within an extent. */
typedef struct {
	uint64_t extent, within;
} lm_preadv_at;

/*
 * Plans calls for extents that are sorted by offset, from *at on, until `calls` or the table of `iov` (pairs of
 * address and length) is full, or `total` bytes are planned. Each call reads one piece of the file, of at most
 * `most` bytes, to at most 1024 iovecs. Returns the number of calls; *at moves on.
 */
uint64_t lm_preadv_plan(const lm_extent *e, uint64_t n, lm_preadv_at *at, uint64_t most, uint64_t total,
			uint64_t *iov, uint64_t iov_room, lm_preadv *calls, uint64_t call_room);
/* The extents, or parts of them, that the planned call `c` should fill after its first `got` bytes, to `out`
 * (room for 1024); their number. */
uint64_t lm_preadv_rest(const lm_extent *e, const lm_preadv *c, uint64_t got, lm_extent *out);
/* cffi: end */

#endif
