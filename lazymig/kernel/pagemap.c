#include "pagemap.h"

#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

/* linux/fs.h of recent kernels; the system's headers may be older. */
struct pm_scan_arg {
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
	uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
#define PAGEMAP_SCAN _IOWR('f', 16, struct pm_scan_arg)

struct procmap_query {
	uint64_t size, query_flags, query_addr;
	uint64_t vma_start, vma_end, vma_flags, vma_page_size, vma_offset, inode;
	uint32_t dev_major, dev_minor, vma_name_size, build_id_size;
	uint64_t vma_name_addr, build_id_addr;
};
#define PROCMAP_QUERY _IOWR('f', 17, struct procmap_query)
#define COVERING_OR_NEXT_VMA 0x10

lm_result lm_pagemap_scan(int pagemap, const lm_scan_query *q, const lm_range *spans, uint64_t nspans,
			  lm_region *out, uint64_t cap, uint64_t *at, uint64_t *addr)
{
	uint64_t n = 0;

	for (; *at < nspans; (*at)++, *addr = 0) {
		uint64_t start = *addr > spans[*at].start ? *addr : spans[*at].start;
		uint64_t end = spans[*at].end;
		while (start < end) {
			*addr = start;
			if (n == cap)
				return lm_fail(n, ENOSPC);
			struct pm_scan_arg a = {
				.size = sizeof a,
				.flags = q->flags,
				.start = start,
				.end = end,
				.vec = (uint64_t)(out + n),
				.vec_len = cap - n,
				.category_inverted = q->inverted,
				.category_mask = q->mask,
				.category_anyof_mask = q->anyof,
				.return_mask = q->returned,
			};
			int r = ioctl(pagemap, PAGEMAP_SCAN, &a);
			if (r < 0) {
				/* What was walked before the error counts: walk_end is where it stopped. */
				if (a.walk_end > start && a.walk_end < end)
					*addr = a.walk_end;
				return lm_fail(n, errno);
			}
			n += r;
			/*
			 * walk_end lags when many regions come back, so a full vector is the only sign that the
			 * walk was cut short; it then goes on behind the last region.
			 */
			if ((uint64_t)r < a.vec_len)
				break;
			start = out[n - 1].end;
		}
	}
	return lm_ok(n);
}

lm_result lm_pagemap_arm(int pagemap, lm_range span)
{
	struct pm_scan_arg a = {
		.size = sizeof a,
		.flags = SCAN_WP_MATCHING | SCAN_CHECK_WPASYNC,
		.start = span.start,
		.end = span.end,
		.category_anyof_mask = IS_PRESENT | IS_SWAPPED,
	};

	return ioctl(pagemap, PAGEMAP_SCAN, &a) < 0 ? lm_fail(0, errno) : lm_ok(1);
}

uint64_t lm_regions_select(const lm_region *in, uint64_t n, uint64_t must, uint64_t must_not, lm_range *out)
{
	uint64_t k = 0;

	for (uint64_t i = 0; i < n; i++) {
		if ((in[i].categories & must) != must || (in[i].categories & must_not))
			continue;
		if (k && out[k - 1].end == in[i].start)
			out[k - 1].end = in[i].end;
		else
			out[k++] = (lm_range){in[i].start, in[i].end};
	}
	return k;
}

lm_result lm_vma_snapshot(int maps, lm_vma *out, uint64_t cap)
{
	uint64_t n = 0, addr = 0;

	for (;;) {
		struct procmap_query q;
		memset(&q, 0, sizeof q);
		q.size = sizeof q;
		q.query_flags = COVERING_OR_NEXT_VMA;
		q.query_addr = addr;
		if (ioctl(maps, PROCMAP_QUERY, &q) < 0)
			return errno == ENOENT ? lm_ok(n) : lm_fail(n, errno);
		if (q.vma_end < q.vma_start || q.vma_start >= 1ull << 63)
			return lm_ok(n); /* [vsyscall] */
		if (n == cap)
			return lm_fail(n, ENOSPC);
		out[n++] = (lm_vma){q.vma_start, q.vma_end, q.vma_flags, q.vma_offset, q.inode, q.dev_major, q.dev_minor};
		addr = q.vma_end;
	}
}

lm_result lm_maps_text(int maps, char *out, uint64_t cap)
{
	uint64_t n = 0;

	while (n < cap) {
		ssize_t got = pread(maps, out + n, cap - n, (off_t)n);

		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0)
			return got ? lm_fail(n, errno) : lm_ok(n);
		n += (uint64_t)got;
	}
	return lm_fail(n, ENOSPC);
}

lm_result lm_maps_text_after(int go, int maps, char *out, uint64_t cap)
{
	uint64_t ignored;

	while (read(go, &ignored, sizeof ignored) < 0)
		if (errno != EINTR)
			return lm_fail(0, errno);
	return lm_maps_text(maps, out, cap);
}
