/* Pagemaps of random bytes and of random entries, under the sanitizers: buffers are as small as is promised. */
#include "lazymig/images/extents.h"
#include "lazymig/images/preadv.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint64_t state;

static uint64_t rnd(uint64_t n)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return n ? state % n : 0;
}

/* A copy with nothing around it, so that reading beyond it is seen. */
static uint8_t *exact(const uint8_t *data, uint64_t len)
{
	uint8_t *p = malloc(len ? len : 1);

	memcpy(p, data, len);
	return p;
}

static void check(const lm_entry *e, uint64_t n)
{
	for (uint64_t i = 0; i < n; i++) {
		assert(e[i].start < e[i].end && !(e[i].start % LM_PAGE) && !(e[i].end % LM_PAGE));
		assert(!i || e[i].start >= e[i - 1].end);
		assert(e[i].flags && e[i].flags < 8);
	}
}

static void any_bytes(void)
{
	uint8_t raw[200];
	uint64_t len = rnd(sizeof(raw)), i;
	uint8_t *data;

	for (i = 0; i < len; i++)
		raw[i] = rnd(3) ? (uint8_t)rnd(16) : (uint8_t)rnd(256);
	for (i = 0; i + 4 < len; i += 4 + raw[i]) { /* lengths that mostly fit */
		raw[i] = (uint8_t)rnd(12);
		raw[i + 1] = raw[i + 2] = raw[i + 3] = rnd(50) ? 0 : (uint8_t)rnd(256);
	}
	data = exact(raw, len);
	{
		uint64_t n = lm_pagemap_count(data, len);
		lm_entry *out = malloc((n ? n : 1) * sizeof(*out));
		lm_pagemap_end end = lm_pagemap_parse(data, len, 1, out);

		assert(end.entries <= n);
		check(out, end.entries);
		free(out);
	}
	free(data);
}

static void plan(const lm_extent *x, uint64_t n, uint64_t bytes)
{
	lm_preadv_at at = {0, 0};
	uint64_t total = 0, iov_room = 1 + rnd(7), call_room = 1 + rnd(4);

	while (at.extent < n) {
		uint64_t *iov = malloc(iov_room * 16);
		lm_preadv *calls = malloc(call_room * sizeof(*calls));
		uint64_t done = lm_preadv_plan(x, n, &at, (1 + rnd(9)) * LM_PAGE, (1 + rnd(30)) * LM_PAGE, iov,
					       iov_room, calls, call_room);

		assert(done);
		for (uint64_t c = 0; c < done; c++) {
			lm_extent rest[1024];
			uint64_t k = lm_preadv_rest(x, &calls[c], rnd(calls[c].bytes), rest), left = 0;

			for (uint64_t j = 0; j < k; j++)
				left += rest[j].end - rest[j].start;
			assert(left && left <= calls[c].bytes);
			total += calls[c].bytes;
		}
		free(iov);
		free(calls);
	}
	assert(total == bytes);
}

static void any_entries(void)
{
	uint64_t n = rnd(40), nw = rnd(40), i, at = 0, offset = 0, held = 0;
	lm_entry *e = malloc((n ? n : 1) * sizeof(*e));
	lm_range *w = malloc((nw ? nw : 1) * sizeof(*w)), *r = malloc((n ? n : 1) * sizeof(*r));
	lm_piece *p;
	lm_extent *x = malloc((n + nw ? n + nw : 1) * sizeof(*x));

	for (i = 0; i < n; i++) {
		static const uint32_t flags[] = {LM_PE_PARENT, LM_PE_LAZY, LM_PE_PRESENT, LM_PE_PRESENT | LM_PE_LAZY};

		at += rnd(3) * LM_PAGE;
		e[i] = (lm_entry){at, at + (1 + rnd(4)) * LM_PAGE, offset, flags[rnd(4)], (uint32_t)i};
		at = e[i].end;
		if (e[i].flags & LM_PE_PRESENT)
			offset += e[i].end - e[i].start;
	}
	for (i = 0, at = 0; i < nw; i++) {
		at += (1 + rnd(3)) * LM_PAGE;
		w[i] = (lm_range){at, at + (1 + rnd(5)) * LM_PAGE};
		at = w[i].end;
	}
	assert(lm_entries_ranges(e, n, LM_PE_PRESENT, r) <= n);
	i = nw ? lm_entries_between(e, n, w[0].start, w[nw - 1].end) : 0;
	assert(i <= n);
	p = malloc((i + nw ? i + nw : 1) * sizeof(*p));
	uint64_t got = lm_entries_locate(e, n, w, nw, 0, p);

	assert(got <= n + nw);
	for (i = 0; i < got; i++)
		held += p[i].end - p[i].start;
	uint64_t page, seen = 0, a, b;

	for (page = 0; page < 400 * LM_PAGE; page += LM_PAGE) {
		for (a = 0; a < n && !(e[a].start <= page && page < e[a].end); a++)
			;
		for (b = 0; b < nw && !(w[b].start <= page && page < w[b].end); b++)
			;
		if (a < n && b < nw && e[a].flags & LM_PE_PRESENT)
			seen += LM_PAGE;
	}
	assert(seen == held);
	lm_pieces_sort(p, got, 1);
	plan(x, lm_pieces_extents(p, got, x), held);
	free(e);
	free(w);
	free(r);
	free(p);
	free(x);
}

/* What is written is what is read. */
static void there_and_back(void)
{
	uint64_t n = rnd(30), i, at = 0;
	lm_range *r = malloc((n ? n : 1) * sizeof(*r));
	lm_entry *e = malloc((n ? n : 1) * sizeof(*e)), *back = malloc((n ? n : 1) * sizeof(*e));
	uint8_t *data = malloc(n * LM_PM_RECORD + 1);

	for (i = 0; i < n; i++) {
		at += rnd(1ull << (13 + rnd(38))) / LM_PAGE * LM_PAGE;
		r[i] = (lm_range){at, at + (1 + rnd(1ull << rnd(36))) * LM_PAGE};
		at = r[i].end;
	}
	lm_entries_make(r, n, 1 + (uint32_t)rnd(4), e);
	for (i = 0; n > 1 && i < n; i++) {
		uint64_t j = rnd(n);
		lm_entry swap = e[i];

		e[i] = e[j];
		e[j] = swap;
	}
	lm_entries_sort(e, n);
	{
		uint64_t size = lm_entries_encode(e, n, data);
		uint8_t *same = exact(data, size);
		lm_pagemap_end end = lm_pagemap_parse(same, size, 1, back);

		assert(size <= n * LM_PM_RECORD && lm_pagemap_count(same, size) == n);
		for (i = 0; i < end.entries; i++)
			assert(back[i].start == r[i].start && back[i].end == r[i].end && back[i].flags == e[i].flags);
		/* Only addresses that no process has end it. */
		assert(end.entries == n || r[end.entries].end > 1ull << 57);
		free(same);
	}
	free(r);
	free(e);
	free(back);
	free(data);
}

int main(int argc, char **argv)
{
	state = 88172645463325252ull + (argc > 1 ? strtoull(argv[1], NULL, 10) : 0) * 7919;
	for (int i = 0; i < 20000; i++) {
		any_bytes();
		any_entries();
		there_and_back();
	}
	return 0;
}
