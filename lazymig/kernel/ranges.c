#include "lazymig/kernel/ranges.h"

#include <stdbool.h>
#include <stdlib.h>

static int by_start(const void *x, const void *y)
{
	const lm_range *a = x, *b = y;

	return a->start < b->start ? -1 : a->start > b->start;
}

/* Appends to a result in the making, merging with its last range. `r` starts no earlier than that one. */
static inline uint64_t append(lm_range *out, uint64_t n, lm_range r)
{
	if (r.start >= r.end)
		return n;
	if (n && out[n - 1].end >= r.start) {
		if (out[n - 1].end < r.end)
			out[n - 1].end = r.end;
		return n;
	}
	out[n] = r;
	return n + 1;
}

uint64_t lm_ranges_normalise(lm_range *r, uint64_t n)
{
	uint64_t i, done = 0;

	/* Most lists come sorted from the kernel: then the sort is skipped. */
	for (i = 1; i < n && r[i - 1].start <= r[i].start; i++)
		;
	if (i < n)
		qsort(r, n, sizeof(*r), by_start);
	for (i = 0; i < n; i++)
		done = append(r, done, r[i]);
	return done;
}

int lm_ranges_valid(const lm_range *r, uint64_t n)
{
	uint64_t i, last = 0;

	for (i = 0; i < n; i++) {
		if ((r[i].start | r[i].end) & (LM_PAGE - 1) || r[i].start >= r[i].end || r[i].start < last)
			return 0;
		last = r[i].end;
	}
	return 1;
}

uint64_t lm_ranges_union(const lm_range *a, uint64_t na, const lm_range *b, uint64_t nb, lm_range *out)
{
	uint64_t i = 0, j = 0, n = 0;

	while (i < na || j < nb) {
		if (j == nb || (i < na && a[i].start <= b[j].start))
			n = append(out, n, a[i++]);
		else
			n = append(out, n, b[j++]);
	}
	return n;
}

uint64_t lm_ranges_subtract(const lm_range *a, uint64_t na, const lm_range *b, uint64_t nb, lm_range *out)
{
	uint64_t i, j = 0, n = 0;

	for (i = 0; i < na; i++) {
		lm_range left = a[i];

		while (j < nb && b[j].end <= left.start)
			j++;
		/* b[j] may reach into the next range of a as well, so j stays at the last one that was used. */
		for (; j < nb && b[j].start < left.end; j++) {
			n = append(out, n, (lm_range){left.start, b[j].start});
			left.start = b[j].end;
			if (left.start >= left.end)
				break;
		}
		n = append(out, n, left);
	}
	return n;
}

/* What is in both; `join`: touching pieces become one. */
static uint64_t common(const lm_range *a, uint64_t na, const lm_range *b, uint64_t nb, lm_range *out, bool join)
{
	uint64_t i = 0, j = 0, n = 0;

	while (i < na && j < nb) {
		lm_range both = {
			a[i].start > b[j].start ? a[i].start : b[j].start,
			a[i].end < b[j].end ? a[i].end : b[j].end,
		};

		if (join)
			n = append(out, n, both);
		else if (both.start < both.end)
			out[n++] = both;
		if (a[i].end < b[j].end)
			i++;
		else
			j++;
	}
	return n;
}

uint64_t lm_ranges_intersect(const lm_range *a, uint64_t na, const lm_range *b, uint64_t nb, lm_range *out)
{
	return common(a, na, b, nb, out, true);
}

uint64_t lm_ranges_cut(const lm_range *a, uint64_t na, const lm_range *b, uint64_t nb, lm_range *out)
{
	return common(a, na, b, nb, out, false);
}

uint64_t lm_ranges_chop(const lm_range *r, uint64_t n, uint64_t step, uint64_t most, lm_range *out, uint64_t cap)
{
	uint64_t i, found = 0;

	for (i = 0; i < n; i++) {
		uint64_t at, by = (r[i].end - r[i].start) / most & ~(step - 1);

		by = by > step ? by : step;
		for (at = r[i].start; at < r[i].end; at += by, found++)
			if (found < cap)
				out[found] = (lm_range){at, r[i].end - at < by ? r[i].end : at + by};
	}
	return found;
}

uint64_t lm_ranges_long(const lm_range *r, uint64_t n, uint64_t least, lm_range *out)
{
	uint64_t i, k = 0;

	for (i = 0; i < n; i++)
		if (r[i].end - r[i].start >= least)
			out[k++] = r[i];
	return k;
}

uint64_t lm_ranges_touching(const lm_range *a, uint64_t na, const lm_range *b, uint64_t nb, lm_range *out)
{
	uint64_t i, j = 0, n = 0;

	for (i = 0; i < na; i++) {
		while (j < nb && b[j].end <= a[i].start)
			j++;
		if (j < nb && b[j].start < a[i].end)
			out[n++] = a[i];
	}
	return n;
}

uint64_t lm_ranges_size(const lm_range *r, uint64_t n)
{
	uint64_t i, sum = 0;

	for (i = 0; i < n; i++)
		sum += r[i].end - r[i].start;
	return sum;
}

uint64_t lm_ranges_find(const lm_range *r, uint64_t n, uint64_t addr)
{
	uint64_t low = 0, high = n;

	while (low < high) {
		uint64_t mid = low + (high - low) / 2;

		if (r[mid].end <= addr)
			low = mid + 1;
		else
			high = mid;
	}
	return low;
}

int lm_ranges_cover(const lm_range *a, uint64_t na, const lm_range *b, uint64_t nb)
{
	uint64_t i = 0, j;

	for (j = 0; j < nb; j++) {
		uint64_t at = b[j].start;

		/* Touching ranges of a cover together what none covers alone. */
		while (at < b[j].end) {
			while (i < na && a[i].end <= at)
				i++;
			if (i == na || a[i].start > at)
				return 0;
			at = a[i].end;
		}
	}
	return 1;
}

void lm_ranges_iovec(const lm_range *r, uint64_t n, uint64_t *out)
{
	for (uint64_t i = 0; i < n; i++) {
		out[2 * i] = r[i].start;
		out[2 * i + 1] = r[i].end - r[i].start;
	}
}
