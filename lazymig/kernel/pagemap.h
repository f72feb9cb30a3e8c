/* The PAGEMAP_SCAN ioctl (Linux commit 52526ca7fdb9, since 6.7) over many spans, and snapshots of the VMAs. */
#ifndef LAZYMIG_PAGEMAP_H
#define LAZYMIG_PAGEMAP_H

#include "lazymig/kernel/lm.h"

/* cffi: begin */
/* Pages with the same categories (PAGE_IS_* bits, as far as they were asked for). Mirrors struct page_region. */
typedef struct {
	uint64_t start, end, categories;
} lm_region;

/* What to look for: the masks of struct pm_scan_arg. */
typedef struct {
	uint64_t flags, inverted, mask, anyof, returned;
} lm_scan_query;

/*
 * Scans the spans in order, filling `out`. `done` regions were found. ENOSPC: `out` is full, go on from
 * *at (span) and *addr. EPERM with PM_SCAN_CHECK_WPASYNC: something at or behind *addr in span *at is not
 * registered. Any other errno: the ioctl's, at that place.
 */
lm_result lm_pagemap_scan(int pagemap, const lm_scan_query *query, const lm_range *spans, uint64_t nspans,
			  lm_region *out, uint64_t cap, uint64_t *at, uint64_t *addr);
/* Protects the pages of `span` that are there, so that a later scan tells which were written since. Stops at memory that
 * is not registered (EPERM). */
lm_result lm_pagemap_arm(int pagemap, lm_range span);
/* The regions with all bits of `must` and none of `must_not`, merged where they touch; returns how many. */
uint64_t lm_regions_select(const lm_region *in, uint64_t n, uint64_t must, uint64_t must_not, lm_range *out);

/* A VMA as PROCMAP_QUERY (Linux commit ed5d583a88a9, since 6.11) gives it; flags: 1 r, 2 w, 4 x, 8 shared. */
typedef struct {
	uint64_t start, end, flags, offset, inode;
	uint32_t dev_major, dev_minor;
} lm_vma;

/* All VMAs below the kernel's half, by a descriptor of /proc/PID/maps. `done` of them; ENOSPC, ENOTTY. */
lm_result lm_vma_snapshot(int maps, lm_vma *out, uint64_t cap);
/* The text of such a file from its beginning. `done` bytes of it; ENOSPC: there is more than `cap`. */
lm_result lm_maps_text(int maps, char *out, uint64_t cap);
/* The same once something can be read from `go`, an eventfd: for a thread that shall begin without a word to Python. */
lm_result lm_maps_text_after(int go, int maps, char *out, uint64_t cap);
/* cffi: end */

/* linux/fs.h of recent kernels: the flags of a scan, and PAGE_IS_*; the system's headers may be older. */
#define SCAN_WP_MATCHING 1
#define SCAN_CHECK_WPASYNC 2
#define IS_WRITTEN (1ull << 1)
#define IS_PRESENT (1ull << 3)
#define IS_SWAPPED (1ull << 4)

#endif
