#define _GNU_SOURCE
#include "page_server/store_same.h"

#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#define BLOCK (256 * LM_PAGE)

/* Appends a page that was found equal; returns false when there is no room. */
static int add(lm_range *out, uint64_t *n, uint64_t cap, uint64_t page)
{
	if (*n && out[*n - 1].end == page) {
		out[*n - 1].end += LM_PAGE;
		return 1;
	}
	if (*n == cap)
		return 0;
	out[(*n)++] = (lm_range){page, page + LM_PAGE};
	return 1;
}

lm_result lm_same_pages(int32_t pid, int file, const lm_extent *extents, uint64_t n, lm_range *out, uint64_t cap)
{
	uint8_t *mine = malloc(BLOCK), *stored = malloc(BLOCK);
	uint64_t found = 0;
	int err = mine && stored ? 0 : ENOMEM;

	for (uint64_t i = 0; i < n && !err; i++) {
		for (uint64_t at = extents[i].start; at < extents[i].end && !err; at += BLOCK) {
			uint64_t len = extents[i].end - at < BLOCK ? extents[i].end - at : BLOCK;
			uint64_t offset = extents[i].offset + (at - extents[i].start);
			struct iovec l = {mine, len}, r = {(void *)at, len};
			ssize_t have = process_vm_readv(pid, &l, 1, &r, 1, 0);
			ssize_t got = pread(file, stored, len, offset);

			if (got != (ssize_t)len) {
				err = got < 0 ? errno : EIO;
				break;
			}
			/* A read that stops short met a page that is gone: what lies before it still counts. */
			for (uint64_t p = 0; have > 0 && p + LM_PAGE <= (uint64_t)have && !err; p += LM_PAGE)
				if (!memcmp(mine + p, stored + p, LM_PAGE) && !add(out, &found, cap, at + p))
					err = ENOSPC;
		}
	}
	free(mine);
	free(stored);
	return lm_fail(found, err);
}
