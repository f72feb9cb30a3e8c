#define _GNU_SOURCE
#include "lazymig/uffd/areas.h"

#include <stdlib.h>
#include <string.h>

static bool make_room(lm_areas *t, size_t n)
{
	size_t room = t->room ? t->room : 16;
	lm_area *a;

	if (n <= t->room)
		return true;
	while (room < n)
		room *= 2;
	a = realloc(t->a, room * sizeof(*a));
	if (!a) {
		t->failed = true;
		return false;
	}
	t->a = a;
	t->room = room;
	return true;
}

void lm_areas_init(lm_areas *t, const lm_range *r, size_t n)
{
	size_t i;

	*t = (lm_areas){.stale = true};
	if (!make_room(t, n))
		return;
	for (i = 0; i < n; i++)
		t->a[i] = (lm_area){r[i].start, r[i].end, r[i].start};
	t->n = n;
}

void lm_areas_copy(lm_areas *t, const lm_areas *from)
{
	*t = (lm_areas){.stale = true, .failed = from->failed};
	if (!from->n || !make_room(t, from->n))
		return;
	memcpy(t->a, from->a, from->n * sizeof(*t->a));
	t->n = from->n;
}

void lm_areas_free(lm_areas *t)
{
	free(t->a);
	free(t->by_src);
	*t = (lm_areas){0};
}

/* Index of the first area that ends after addr. */
static size_t find(const lm_areas *t, uint64_t addr)
{
	size_t low = 0, high = t->n;

	while (low < high) {
		size_t mid = low + (high - low) / 2;

		if (t->a[mid].end <= addr)
			low = mid + 1;
		else
			high = mid;
	}
	return low;
}

const lm_area *lm_areas_at(const lm_areas *t, uint64_t addr)
{
	size_t i = find(t, addr);

	return i < t->n && t->a[i].start <= addr ? &t->a[i] : NULL;
}

static int compare_src(const void *x, const void *y, void *table)
{
	const lm_area *a = ((lm_areas *)table)->a;
	uint64_t i = a[*(const uint32_t *)x].src, j = a[*(const uint32_t *)y].src;

	return i < j ? -1 : i > j;
}

static bool sort_by_src(lm_areas *t)
{
	size_t i;

	if (t->by_src_room < t->n) {
		uint32_t *new = realloc(t->by_src, t->room * sizeof(*new));

		if (!new) {
			t->failed = true;
			return false;
		}
		t->by_src = new;
		t->by_src_room = t->room;
	}
	for (i = 0; i < t->n; i++)
		t->by_src[i] = (uint32_t)i;
	/* Until the first mremap both orders are the same, and glibc's merge sort is then linear in effect. */
	if (t->n)
		qsort_r(t->by_src, t->n, sizeof(*t->by_src), compare_src, t);
	t->stale = false;
	return true;
}

const lm_area *lm_areas_of_src(lm_areas *t, uint64_t src)
{
	size_t low = 0, high = t->n;

	if (t->stale && !sort_by_src(t))
		return NULL;
	while (low < high) {
		size_t mid = low + (high - low) / 2;
		const lm_area *a = &t->a[t->by_src[mid]];

		if (src < a->src)
			high = mid;
		else if (src - a->src >= a->end - a->start)
			low = mid + 1;
		else
			return a;
	}
	return NULL;
}

/* What of `a` lies in [start, end); they do overlap. */
static lm_area part(const lm_area *a, uint64_t start, uint64_t end)
{
	lm_area p = {a->start > start ? a->start : start, a->end < end ? a->end : end, a->src};

	p.src += p.start - a->start;
	return p;
}

void lm_areas_each(const lm_areas *t, uint64_t start, uint64_t end, lm_area_fn fn, void *arg)
{
	size_t i;

	for (i = find(t, start); i < t->n && t->a[i].start < end; i++) {
		lm_area p = part(&t->a[i], start, end);

		fn(arg, &p);
	}
}

/* Replaces a[at .. at + old) by `new` areas; false when out of memory. */
static bool splice(lm_areas *t, size_t at, size_t old, const lm_area *with, size_t new)
{
	if (!make_room(t, t->n - old + new))
		return false;
	if (t->n > at + old)
		memmove(t->a + at + new, t->a + at + old, (t->n - at - old) * sizeof(*t->a));
	if (new)
		memcpy(t->a + at, with, new * sizeof(*with));
	t->n = t->n - old + new;
	t->stale = true;
	return true;
}

void lm_areas_cut(lm_areas *t, uint64_t start, uint64_t end, lm_area_fn fn, void *arg)
{
	size_t first = find(t, start), last, kept = 0;
	lm_area keep[2];

	for (last = first; last < t->n && t->a[last].start < end; last++) {
		const lm_area *a = &t->a[last];
		lm_area p = part(a, start, end);

		if (a->start < start)
			keep[kept++] = part(a, a->start, start);
		if (a->end > end)
			keep[kept++] = part(a, end, a->end);
		if (fn)
			fn(arg, &p);
	}
	if (last > first)
		splice(t, first, last - first, keep, kept);
}

struct pieces {
	lm_area *p;
	size_t n, room;
	bool failed;
};

static void collect(void *arg, const lm_area *piece)
{
	struct pieces *c = arg;

	if (c->n == c->room) {
		size_t room = c->room ? 2 * c->room : 8;
		lm_area *p = realloc(c->p, room * sizeof(*p));

		if (!p) {
			c->failed = true;
			return;
		}
		c->p = p;
		c->room = room;
	}
	c->p[c->n++] = *piece;
}

void lm_areas_move(lm_areas *t, uint64_t from, uint64_t to, uint64_t len, lm_area_fn fn, void *arg)
{
	struct pieces moved = {0};
	size_t i;

	lm_areas_cut(t, from, from + len, collect, &moved);
	lm_areas_cut(t, to, to + len, fn, arg);
	for (i = 0; i < moved.n; i++) {
		moved.p[i].start += to - from;
		moved.p[i].end += to - from;
	}
	if (moved.n)
		splice(t, find(t, to), 0, moved.p, moved.n);
	t->failed |= moved.failed;
	free(moved.p);
}
