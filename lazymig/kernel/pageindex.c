#include "lazymig/kernel/pageindex.h"

#include <string.h>

int lm_index_init(lm_index *ix, const lm_range *r, uint64_t n)
{
	uint64_t i;

	*ix = (lm_index){.n = n};
	ix->r = malloc((n + 1) * sizeof(*ix->r));
	ix->first = malloc((n + 1) * sizeof(*ix->first));
	if (!ix->r || !ix->first) {
		lm_index_free(ix);
		return ENOMEM;
	}
	for (i = 0; i < n; i++) {
		ix->r[i] = r[i];
		ix->first[i] = ix->pages;
		ix->pages += (r[i].end - r[i].start) / LM_PAGE;
	}
	ix->first[n] = ix->pages;
	return 0;
}

void lm_index_free(lm_index *ix)
{
	free(ix->r);
	free(ix->first);
	*ix = (lm_index){0};
}

uint64_t lm_index_of(const lm_index *ix, uint64_t addr, uint64_t *run)
{
	uint64_t i = lm_ranges_find(ix->r, ix->n, addr);

	if (i == ix->n || ix->r[i].start > addr)
		return LM_NO_PAGE;
	*run = (ix->r[i].end - addr + LM_PAGE - 1) / LM_PAGE;
	return ix->first[i] + (addr - ix->r[i].start) / LM_PAGE;
}

uint64_t lm_index_addr(const lm_index *ix, uint64_t page, uint64_t *run)
{
	uint64_t low = 0, high = ix->n - 1;

	while (low < high) {
		uint64_t mid = low + (high - low + 1) / 2;

		if (ix->first[mid] <= page)
			low = mid;
		else
			high = mid - 1;
	}
	*run = ix->first[low + 1] - page;
	return ix->r[low].start + (page - ix->first[low]) * LM_PAGE;
}

bool lm_index_covers(const lm_index *ix, uint64_t addr, uint64_t pages)
{
	uint64_t run;

	while (pages) {
		if (lm_index_of(ix, addr, &run) == LM_NO_PAGE)
			return false;
		if (run >= pages)
			return true;
		pages -= run;
		addr += run * LM_PAGE;
	}
	return true;
}

bool lm_index_next(const lm_index *ix, uint64_t *addr, uint64_t end, uint64_t *page, uint64_t *run)
{
	uint64_t i = lm_ranges_find(ix->r, ix->n, *addr), start, stop;

	if (*addr >= end || i == ix->n || ix->r[i].start >= end)
		return false;
	start = ix->r[i].start > *addr ? ix->r[i].start : *addr;
	stop = ix->r[i].end < end ? ix->r[i].end : end;
	*page = ix->first[i] + (start - ix->r[i].start) / LM_PAGE;
	*run = (stop - start + LM_PAGE - 1) / LM_PAGE;
	*addr = stop;
	return true;
}

uint64_t *lm_bits_ones(uint64_t bits)
{
	uint64_t *w = calloc(lm_bits_words(bits) + 1, sizeof(*w));

	if (w)
		lm_bits_set(w, 0, bits);
	return w;
}

/* The bits of word `i / 64` that lie in [i, end). */
static inline uint64_t mask_of(uint64_t i, uint64_t end)
{
	uint64_t mask = ~0ull << (i % 64);

	if (end - (i & ~63ull) < 64)
		mask &= (1ull << (end % 64)) - 1;
	return mask;
}

void lm_bits_set(uint64_t *w, uint64_t first, uint64_t n)
{
	uint64_t i, end = first + n;

	for (i = first; i < end; i = (i | 63) + 1)
		w[i / 64] |= mask_of(i, end);
}

uint64_t lm_bits_clear(uint64_t *w, uint64_t first, uint64_t n)
{
	uint64_t i, end = first + n, cleared = 0;

	for (i = first; i < end; i = (i | 63) + 1) {
		uint64_t mask = mask_of(i, end);

		cleared += (uint64_t)__builtin_popcountll(w[i / 64] & mask);
		w[i / 64] &= ~mask;
	}
	return cleared;
}

static uint64_t next(const uint64_t *w, uint64_t from, uint64_t end, uint64_t flip)
{
	uint64_t i;

	for (i = from; i < end; i = (i | 63) + 1) {
		uint64_t found = (w[i / 64] ^ flip) & mask_of(i, end);

		if (found)
			return (i & ~63ull) + (uint64_t)__builtin_ctzll(found);
	}
	return end;
}

uint64_t lm_bits_next(const uint64_t *w, uint64_t from, uint64_t end)
{
	return next(w, from, end, 0);
}

uint64_t lm_bits_next_clear(const uint64_t *w, uint64_t from, uint64_t end)
{
	return next(w, from, end, ~0ull);
}
