/* Where the pages of a lazy process are now: areas of its address space, each with the source address it had.
 * mremap moves areas and munmap cuts them, while requests and arriving pages go on using source addresses. */
#ifndef LAZYMIG_AREAS_H
#define LAZYMIG_AREAS_H

#include <stdbool.h>

#include "lazymig/kernel/lm.h"

typedef struct {
	uint64_t start, end; /* at the destination, now */
	uint64_t src;        /* source address of `start` */
} lm_area;

typedef struct {
	lm_area *a; /* sorted by start, disjoint; their source ranges are disjoint too */
	size_t n, room;
	uint32_t *by_src; /* indices of a[], sorted by src; valid while !stale */
	size_t by_src_room;
	bool stale;
	bool failed; /* out of memory: the table is not the truth any more */
} lm_areas;

void lm_areas_init(lm_areas *t, const lm_range *r, size_t n);
void lm_areas_copy(lm_areas *t, const lm_areas *from);
void lm_areas_free(lm_areas *t);
/* The area that holds this destination (source) address, or NULL. */
const lm_area *lm_areas_at(const lm_areas *t, uint64_t addr);
const lm_area *lm_areas_of_src(lm_areas *t, uint64_t src);
/* Called with each piece [start, end), src that is cut out. */
typedef void (*lm_area_fn)(void *arg, const lm_area *piece);
/* Takes [start, end) out of the table; `fn` may be NULL. */
void lm_areas_cut(lm_areas *t, uint64_t start, uint64_t end, lm_area_fn fn, void *arg);
/* Calls fn with what of [start, end) is in the table, without changing it. */
void lm_areas_each(const lm_areas *t, uint64_t start, uint64_t end, lm_area_fn fn, void *arg);
/* mremap: what was at [from, from + len) is at `to` now. What had been at the target is cut out, through fn. */
void lm_areas_move(lm_areas *t, uint64_t from, uint64_t to, uint64_t len, lm_area_fn fn, void *arg);

#endif
