#include "lazymig/images/extents.h"

#include <stdlib.h>
#include <string.h>

#define TOP (1ull << 57) /* no user address is at or above, with five-level page tables too */
#define KNOWN (LM_PE_PARENT | LM_PE_LAZY | LM_PE_PRESENT)

/* Fields of pagemap_entry. */
enum { VADDR = 1, COMPAT_NR = 2, IN_PARENT = 3, FLAGS = 4, NR = 5, FIELDS };

/* Reads a varint, at most ten bytes long; NULL when there is none. */
static const uint8_t *varint(const uint8_t *p, const uint8_t *end, uint64_t *value)
{
	int shift;

	*value = 0;
	for (shift = 0; p < end && shift < 70; shift += 7) {
		uint8_t b = *p++;

		if (shift == 63 && b > 1)
			return NULL;
		*value |= (uint64_t)(b & 127) << shift;
		if (!(b & 128))
			return p;
	}
	return NULL;
}

/* Passes over a field that is not ours, as protobuf asks. Groups are not used by anybody. */
static const uint8_t *skip(const uint8_t *p, const uint8_t *end, unsigned wire)
{
	uint64_t n;

	switch (wire) {
	case 0:
		return varint(p, end, &n);
	case 1:
		n = 8;
		break;
	case 2:
		p = varint(p, end, &n);
		break;
	case 5:
		n = 4;
		break;
	default:
		return NULL;
	}
	return p && n <= (uint64_t)(end - p) ? p + n : NULL;
}

/* The fields of one record; `seen` gets a bit for each. False when it is no message of this type. */
static int fields(const uint8_t *p, const uint8_t *end, uint64_t *value, unsigned *seen)
{
	*seen = 0;
	while (p < end) {
		uint64_t tag;

		p = varint(p, end, &tag);
		if (!p || tag >> 32 || !(tag >> 3))
			return 0;
		if (tag >> 3 < FIELDS && !(tag & 7)) {
			p = varint(p, end, &value[tag >> 3]);
			*seen |= 1u << (tag >> 3);
		} else {
			p = skip(p, end, tag & 7);
		}
		if (!p)
			return 0;
	}
	return (*seen >> VADDR & 1) && (*seen >> COMPAT_NR & 1);
}

static uint32_t length(const uint8_t *p)
{
	return p[0] | p[1] << 8 | p[2] << 16 | (uint32_t)p[3] << 24;
}

uint64_t lm_pagemap_count(const uint8_t *data, uint64_t len)
{
	uint64_t at = 0, n = 0;

	while (len - at >= 4) {
		uint32_t size = length(data + at);

		if (size > len - at - 4)
			break;
		at += 4 + (uint64_t)size;
		n++;
	}
	return n;
}

/* Which kind of entry it is. Before CRIU had flags there was only in_parent, and before 4.2 only compat_nr_pages. */
static int entry(const uint64_t *value, unsigned seen, uint64_t last, lm_entry *e)
{
	uint64_t pages = seen >> NR & 1 ? value[NR] : (uint32_t)value[COMPAT_NR];
	int in_parent = (seen >> IN_PARENT & 1) && value[IN_PARENT];

	e->flags = seen >> FLAGS & 1 ? (uint32_t)value[FLAGS] : 0;
	if (in_parent)
		e->flags |= LM_PE_PARENT;
	else if (!(seen >> FLAGS & 1))
		e->flags = LM_PE_PRESENT;
	if (value[VADDR] % LM_PAGE || value[VADDR] >= TOP || !pages || pages > (TOP - value[VADDR]) / LM_PAGE)
		return LM_PM_RANGE;
	e->start = value[VADDR];
	e->end = e->start + pages * LM_PAGE;
	if (e->start < last)
		return LM_PM_ORDER;
	if (!e->flags || e->flags & ~(uint32_t)KNOWN ||
	    (e->flags & (LM_PE_PARENT | LM_PE_PRESENT)) == (LM_PE_PARENT | LM_PE_PRESENT))
		return LM_PM_FLAGS;
	return LM_PM_OK;
}

lm_pagemap_end lm_pagemap_parse(const uint8_t *data, uint64_t len, uint64_t record, lm_entry *out)
{
	lm_pagemap_end r = {0, 0, record, LM_PM_OK, 0};
	uint64_t at = 0, last = 0;

	while (at < len && r.what == LM_PM_OK) {
		uint64_t value[FIELDS];
		unsigned seen;
		uint32_t size;

		if (len - at < 4 || (size = length(data + at)) > len - at - 4) {
			r.what = LM_PM_TRUNCATED;
			break;
		}
		at += 4;
		if (!fields(data + at, data + at + size, value, &seen)) {
			r.what = LM_PM_BROKEN;
			break;
		}
		at += size;
		r.what = entry(value, seen, last, &out[r.entries]);
		if (r.what != LM_PM_OK)
			break;
		last = out[r.entries].end;
		out[r.entries].offset = r.pages;
		out[r.entries].record = (uint32_t)r.record;
		if (out[r.entries].flags & LM_PE_PRESENT)
			r.pages += last - out[r.entries].start;
		r.entries++;
		r.record++;
	}
	return r;
}

/* The one thing that an entry is: bytes that are here count most, then those of the parent. */
static uint32_t kind_of(const lm_entry *e)
{
	if (e->flags & LM_PE_PRESENT)
		return LM_PE_PRESENT;
	return e->flags & LM_PE_PARENT ? LM_PE_PARENT : LM_PE_LAZY;
}

uint64_t lm_entries_ranges(const lm_entry *e, uint64_t n, uint32_t kind, lm_range *out)
{
	uint64_t i, done = 0;

	for (i = 0; i < n; i++) {
		if (kind_of(&e[i]) != kind)
			continue;
		if (done && out[done - 1].end == e[i].start)
			out[done - 1].end = e[i].end;
		else
			out[done++] = (lm_range){e[i].start, e[i].end};
	}
	return done;
}

void lm_entries_make(const lm_range *r, uint64_t n, uint32_t flags, lm_entry *out)
{
	uint64_t i;

	for (i = 0; i < n; i++)
		out[i] = (lm_entry){r[i].start, r[i].end, 0, flags, 0};
}

static int by_address(const void *x, const void *y)
{
	const lm_entry *a = x, *b = y;

	return a->start < b->start ? -1 : a->start > b->start;
}

void lm_entries_sort(lm_entry *e, uint64_t n)
{
	if (n > 1)
		qsort(e, n, sizeof(*e), by_address);
}

static uint8_t *put(uint8_t *p, uint64_t value)
{
	for (; value > 127; value >>= 7)
		*p++ = (uint8_t)(value | 128);
	*p++ = (uint8_t)value;
	return p;
}

uint64_t lm_entries_encode(const lm_entry *e, uint64_t n, uint8_t *out)
{
	uint8_t *p = out;
	uint64_t i;

	for (i = 0; i < n; i++) {
		uint64_t pages = (e[i].end - e[i].start) / LM_PAGE;
		uint8_t *head = p;
		uint32_t size;

		p = put(p + 4, VADDR << 3);
		p = put(p, e[i].start);
		/* Readers before CRIU 4.2 know only this field, and later ones only look at it without the other. */
		p = put(p, COMPAT_NR << 3);
		p = put(p, pages <= UINT32_MAX ? pages : 0);
		p = put(p, FLAGS << 3);
		p = put(p, e[i].flags);
		p = put(p, NR << 3);
		p = put(p, pages);
		size = (uint32_t)(p - head - 4);
		head[0] = (uint8_t)size; /* less than LM_PM_RECORD */
		head[1] = head[2] = head[3] = 0;
	}
	return (uint64_t)(p - out);
}

/* The first entry that ends after `addr`. */
static uint64_t find(const lm_entry *e, uint64_t n, uint64_t addr)
{
	uint64_t low = 0, high = n;

	while (low < high) {
		uint64_t mid = low + (high - low) / 2;

		if (e[mid].end > addr)
			high = mid;
		else
			low = mid + 1;
	}
	return low;
}

uint64_t lm_entries_between(const lm_entry *e, uint64_t n, uint64_t start, uint64_t end)
{
	uint64_t first = find(e, n, start), last = find(e, n, end);

	return (last < n ? last + 1 : n) - first;
}

uint64_t lm_entries_locate(const lm_entry *e, uint64_t n, const lm_range *wanted, uint64_t nw, uint32_t layer,
			   lm_piece *out)
{
	uint64_t w, i, done = 0;

	i = nw ? find(e, n, wanted[0].start) : 0;
	for (w = 0; w < nw; w++) {
		/* Both are sorted: the walk goes on from where it is, but for a long way it is searched anew. */
		if (i < n && e[i].end <= wanted[w].start)
			i += find(e + i, n - i, wanted[w].start);
		for (; i < n && e[i].start < wanted[w].end; i++) {
			uint64_t start = e[i].start > wanted[w].start ? e[i].start : wanted[w].start;
			uint64_t end = e[i].end < wanted[w].end ? e[i].end : wanted[w].end;

			if (kind_of(&e[i]) == LM_PE_PRESENT)
				out[done++] = (lm_piece){start, end, e[i].offset + (start - e[i].start), layer,
							 e[i].flags};
			if (e[i].end > wanted[w].end)
				break;
		}
	}
	return done;
}

static int by_start(const void *x, const void *y)
{
	const lm_piece *a = x, *b = y;

	return a->start < b->start ? -1 : a->start > b->start;
}

static int by_place(const void *x, const void *y)
{
	const lm_piece *a = x, *b = y;

	if (a->layer != b->layer)
		return a->layer < b->layer ? -1 : 1;
	return a->offset < b->offset ? -1 : a->offset > b->offset;
}

void lm_pieces_sort(lm_piece *p, uint64_t n, int by_offset)
{
	if (n > 1)
		qsort(p, n, sizeof(*p), by_offset ? by_place : by_start);
}

uint64_t lm_pieces_extents(const lm_piece *p, uint64_t n, lm_extent *out)
{
	uint64_t i, done = 0;

	for (i = 0; i < n; i++) {
		lm_extent *last = done ? &out[done - 1] : NULL;

		if (last && last->end == p[i].start && last->offset + (last->end - last->start) == p[i].offset)
			last->end = p[i].end;
		else
			out[done++] = (lm_extent){p[i].start, p[i].end, p[i].offset};
	}
	return done;
}
