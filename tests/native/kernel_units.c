/* Unit tests of lazymig/kernel's C, built with AddressSanitizer and UBSan: ranges against bitmaps, page map scans
 * with vectors of every small size, VMA snapshots, and all feature probes. Prints what failed; exit status 0 or 1.
 *
 *   kernel_units SEED PROBE...
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "lazymig/kernel/kdat.h"
#include "lazymig/kernel/pagemap.h"
#include "lazymig/kernel/ranges.h"

#define PAGES 96u
#define PRESENT (1u << 3)

static int failures;

#define CHECK(what)                                                           \
	do {                                                                  \
		if (!(what)) {                                                \
			fprintf(stderr, "line %d: %s\n", __LINE__, #what);    \
			failures++;                                           \
		}                                                             \
	} while (0)

/* Exactly as much as is said, so that the sanitizer sees one range too many. */
static lm_range *room(uint64_t n)
{
	return malloc(n * sizeof(lm_range) + (n == 0));
}

static uint64_t of_bits(const uint8_t *bits, lm_range *out)
{
	uint64_t n = 0;

	for (uint64_t i = 0; i < PAGES; i++) {
		if (!bits[i])
			continue;
		if (n && out[n - 1].end == i * LM_PAGE)
			out[n - 1].end += LM_PAGE;
		else
			out[n++] = (lm_range){i * LM_PAGE, (i + 1) * LM_PAGE};
	}
	return n;
}

static void expect(const lm_range *got, uint64_t n, const uint8_t *bits)
{
	lm_range want[PAGES];
	uint64_t m = of_bits(bits, want);

	CHECK(n == m && !memcmp(got, want, n * sizeof *got));
	CHECK(lm_ranges_valid(got, n));
}

static void test_ranges(void)
{
	uint8_t x[PAGES], y[PAGES], both[PAGES], any[PAGES], less[PAGES];
	lm_range all[PAGES];
	int density = rand() % 8 + 1, cover = 1;
	uint64_t size = 0;

	for (unsigned i = 0; i < PAGES; i++) {
		x[i] = rand() % 9 < density;
		y[i] = rand() % 3 == 0;
		both[i] = x[i] && y[i];
		any[i] = x[i] || y[i];
		less[i] = x[i] && !y[i];
		cover &= x[i] || !y[i];
		size += x[i] * LM_PAGE;
	}
	uint64_t na = of_bits(x, all);
	lm_range *a = memcpy(room(na), all, na * sizeof *a);
	uint64_t nb = of_bits(y, all);
	lm_range *b = memcpy(room(nb), all, nb * sizeof *b), *out = room(na + nb);

	expect(out, lm_ranges_union(a, na, b, nb, out), any);
	expect(out, lm_ranges_intersect(a, na, b, nb, out), both);
	expect(out, lm_ranges_subtract(a, na, b, nb, out), less);
	CHECK(lm_ranges_cover(a, na, b, nb) == cover);
	CHECK(lm_ranges_size(a, na) == size);
	for (uint64_t i = 0; i < PAGES; i++) {
		uint64_t at = lm_ranges_find(a, na, i * LM_PAGE);
		CHECK((at < na && a[at].start <= i * LM_PAGE) == x[i]);
	}
	/* Shuffled, overlapping and empty ones. */
	for (uint64_t i = 0; i < na; i++)
		out[i] = a[rand() % na];
	for (uint64_t i = 0; i < nb; i++)
		out[na + i] = b[i];
	memset(any, 0, sizeof any);
	for (uint64_t i = 0; i < na + nb; i++)
		for (uint64_t p = out[i].start; p < out[i].end; p += LM_PAGE)
			any[p / LM_PAGE] = 1;
	expect(out, lm_ranges_normalise(out, na + nb), any);
	free(a);
	free(b);
	free(out);
}

/* Whatever the vector's size, going on where the last call ended finds every page once. */
static void test_scan(uint64_t cap)
{
	lm_scan_query query = {.mask = PRESENT, .returned = PRESENT};
	int fd = open("/proc/self/pagemap", O_RDONLY);
	char *m = mmap(NULL, PAGES * LM_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint64_t base = (uint64_t)m, at = 0, addr = 0, found = 0;
	lm_range spans[] = {{base, base + 40 * LM_PAGE}, {base + 44 * LM_PAGE, base + PAGES * LM_PAGE}};
	lm_region *out = malloc(cap * sizeof *out);
	uint8_t bits[PAGES] = {0}, seen[PAGES] = {0};
	lm_result r;

	for (unsigned i = 0; i < PAGES; i++)
		if (rand() % 2)
			bits[i] = m[i * LM_PAGE] = 1;
	memset(bits + 40, 0, 4); /* not asked for */
	do {
		r = lm_pagemap_scan(fd, &query, spans, 2, out, cap, &at, &addr);
		CHECK(r.err == 0 || r.err == ENOSPC);
		CHECK(r.done <= cap);
		for (uint64_t i = 0; i < r.done; i++)
			for (uint64_t p = out[i].start; p < out[i].end; p += LM_PAGE) {
				seen[(p - base) / LM_PAGE]++;
				found++;
			}
	} while (r.err == ENOSPC && found <= PAGES);
	CHECK(!memcmp(bits, seen, PAGES));
	free(out);
	munmap(m, PAGES * LM_PAGE);
	close(fd);
}

static void test_select(void)
{
	lm_region in[] = {{0, 1, 3}, {1, 2, 3}, {3, 4, 1}, {4, 5, 5}};
	lm_range out[4];

	CHECK(lm_regions_select(in, 4, 1, 4, out) == 2);
	CHECK(out[0].start == 0 && out[0].end == 2 && out[1].start == 3 && out[1].end == 4);
	CHECK(lm_regions_select(in, 4, 8, 0, out) == 0);
}

static void test_vmas(void)
{
	int fd = open("/proc/self/maps", O_RDONLY);
	lm_vma *all = malloc(4096 * sizeof *all);
	lm_result r = lm_vma_snapshot(fd, all, 4096);

	CHECK(r.err == 0 && r.done > 4);
	for (uint64_t i = 1; i < r.done; i++)
		CHECK(all[i - 1].end <= all[i].start && all[i].start < all[i].end);
	lm_vma *two = malloc(2 * sizeof *two);
	r = lm_vma_snapshot(fd, two, 2);
	CHECK(r.err == ENOSPC && r.done == 2 && two[1].start == all[1].start);
	free(two);
	free(all);
	close(fd);
}

int main(int argc, char **argv)
{
	srand(argc > 1 ? atoi(argv[1]) : 1);
	for (int i = 0; i < 2000; i++)
		test_ranges();
	for (uint64_t cap = 1; cap < 70; cap++)
		test_scan(cap);
	test_select();
	test_vmas();
	for (int i = 2; i < argc; i++)
		printf("%s %d\n", argv[i], lm_probe(argv[i], 5000000000ull).err);
	return failures != 0;
}
