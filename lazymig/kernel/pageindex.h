/* Numbers the pages of a fixed set of ranges 0..pages-1, so that bitmaps over a sparse address space are dense. */
#ifndef LAZYMIG_PAGEINDEX_H
#define LAZYMIG_PAGEINDEX_H

#include <stdbool.h>
#include <stdlib.h>

#include "lazymig/kernel/ranges.h"

#define LM_NO_PAGE UINT64_MAX

typedef struct {
	lm_range *r;
	uint64_t *first; /* number of the first page of r[i]; first[n] is `pages` */
	uint64_t n, pages;
} lm_index;

/* Copies the ranges (sorted, disjoint). 0 or ENOMEM. */
int lm_index_init(lm_index *ix, const lm_range *r, uint64_t n);
void lm_index_free(lm_index *ix);

/* Number of the page at addr, or LM_NO_PAGE. `run` gets how many pages follow in the same range, it included. */
uint64_t lm_index_of(const lm_index *ix, uint64_t addr, uint64_t *run);
/* Address of a page by number; `run` as above. */
uint64_t lm_index_addr(const lm_index *ix, uint64_t page, uint64_t *run);
/* 1 if every page of [addr, addr + pages) has a number. */
bool lm_index_covers(const lm_index *ix, uint64_t addr, uint64_t pages);
/* The first numbered run in [*addr, end): its number and length, with *addr moved behind it. false: none left. */
bool lm_index_next(const lm_index *ix, uint64_t *addr, uint64_t end, uint64_t *page, uint64_t *run);

/* Bitmaps. */
static inline size_t lm_bits_words(uint64_t bits)
{
	return (bits + 63) / 64;
}

static inline bool lm_bit(const uint64_t *w, uint64_t i)
{
	return w[i / 64] >> (i % 64) & 1;
}

static inline void lm_bit_set(uint64_t *w, uint64_t i)
{
	w[i / 64] |= 1ull << (i % 64);
}

/* A bitmap with `bits` ones (and zeroes after them), or NULL. */
uint64_t *lm_bits_ones(uint64_t bits);
/* Sets, or clears, bits [first, first + n). */
void lm_bits_set(uint64_t *w, uint64_t first, uint64_t n);
/* Clears the same and returns how many had been set. */
uint64_t lm_bits_clear(uint64_t *w, uint64_t first, uint64_t n);
/* First set (clear) bit in [from, end), or `end`. */
uint64_t lm_bits_next(const uint64_t *w, uint64_t from, uint64_t end);
uint64_t lm_bits_next_clear(const uint64_t *w, uint64_t from, uint64_t end);

#endif
