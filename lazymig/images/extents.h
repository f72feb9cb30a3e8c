/* Pagemap images: which pages an image holds, and where in its pages file. */
#ifndef LAZYMIG_EXTENTS_H
#define LAZYMIG_EXTENTS_H

#include "lazymig/kernel/lm.h"

/* cffi: begin */
/* Bytes of a file that belong at these addresses. */
typedef struct {
	uint64_t start, end, offset;
} lm_extent;

/* Flags of pagemap entries, as CRIU's include/pagemap.h has them. */
enum { LM_PE_PARENT = 1, LM_PE_LAZY = 2, LM_PE_PRESENT = 4 };

/* A pagemap entry. `offset`: of its bytes in the pages file, when it is present. */
typedef struct {
	uint64_t start, end, offset;
	uint32_t flags, record;
} lm_entry;

/* What was wrong with a record. */
enum {
	LM_PM_OK,
	LM_PM_TRUNCATED, /* it does not fit in the file */
	LM_PM_BROKEN,    /* it is no pagemap_entry */
	LM_PM_RANGE,     /* not page-aligned, empty, or beyond any address */
	LM_PM_ORDER,     /* out of order, or overlapping the one before */
	LM_PM_FLAGS      /* flags that are unknown or contradict each other */
};

typedef struct {
	uint64_t entries; /* good ones, before `record` */
	uint64_t pages;   /* bytes that the pages file must have */
	uint64_t record;
	int32_t what;
	int32_t pad;
} lm_pagemap_end;

/* Bytes of layer `layer`'s file that belong at these addresses; `flags` of the entry that they are part of. */
typedef struct {
	uint64_t start, end, offset;
	uint32_t layer, flags;
} lm_piece;

/* How many records there are from `data` on; those that do not fit in `len` bytes are not counted. */
uint64_t lm_pagemap_count(const uint8_t *data, uint64_t len);
/* Reads records, the first of which is number `record` of the file, to `out` (room for what was counted). */
lm_pagemap_end lm_pagemap_parse(const uint8_t *data, uint64_t len, uint64_t record, lm_entry *out);
/* The ranges of entries that are of `kind`, merged, to `out` (room for n); their number. */
uint64_t lm_entries_ranges(const lm_entry *e, uint64_t n, uint32_t kind, lm_range *out);
/*
 * Where the bytes of `wanted` ranges, all of them in present entries, are: pieces to `out`, which has room for
 * one for each range and each entry between the first and the last. The number of pieces.
 */
uint64_t lm_entries_locate(const lm_entry *e, uint64_t n, const lm_range *wanted, uint64_t nw, uint32_t layer,
			   lm_piece *out);
/* How many entries at most share anything with the addresses from `start` to `end`. */
uint64_t lm_entries_between(const lm_entry *e, uint64_t n, uint64_t start, uint64_t end);
/* Makes entries of ranges, with these flags, at `out` (room for n). */
void lm_entries_make(const lm_range *r, uint64_t n, uint32_t flags, lm_entry *out);
/* Sorts entries by address. */
void lm_entries_sort(lm_entry *e, uint64_t n);
/* Writes entries as records of a pagemap image to `out`, which has room for LM_PM_RECORD bytes each; the bytes. */
uint64_t lm_entries_encode(const lm_entry *e, uint64_t n, uint8_t *out);
enum { LM_PM_RECORD = 40 };
/* Sorts pieces: by address, or by layer and offset. */
void lm_pieces_sort(lm_piece *p, uint64_t n, int by_offset);
/* The extents of pieces, merged where both address and offset go on, to `out` (room for n); their number. */
uint64_t lm_pieces_extents(const lm_piece *p, uint64_t n, lm_extent *out);
/* cffi: end */

#endif
