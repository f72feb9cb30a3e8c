#define _GNU_SOURCE
#include "page_server/store.h"

#include <stdlib.h>
#include <unistd.h>

#define CHUNK (256 * LM_PAGE)

lm_result lm_bulk_store(lm_bulk *b, int file, uint64_t *offset, lm_range *got)
{
	uint64_t done = 0;
	size_t n = b->ngot, i;

	while (done < b->bytes) {
		ssize_t wrote = pwrite(file, b->data + done, b->bytes - done, (off_t)(*offset + done));

		if (wrote < 0 && errno != EINTR)
			return lm_fail(0, errno);
		done += wrote > 0 ? (uint64_t)wrote : 0;
	}
	*offset += done;
	for (i = 0; i < n; i++)
		got[i] = (lm_range){b->got[i].addr, b->got[i].addr + b->got[i].npages * LM_PAGE};
	b->stats.pages += done / LM_PAGE;
	b->stats.raw_bytes += done;
	for (i = 0; i < b->nzero; i++)
		b->stats.zero_pages += b->zero[i].npages;
	b->ngot = b->nzero = b->bytes = 0;
	return lm_ok(n);
}

lm_result lm_store_load(int file, const lm_extent *e, uint64_t n, int pid, int mem)
{
	uint8_t *data = malloc(CHUNK);
	lm_target target = {pid, mem};
	lm_result r = {0};
	uint64_t i = 0;

	if (!data)
		return lm_fail(0, ENOMEM);
	while (i < n && !r.err) {
		uint64_t addr = e[i].start, offset = e[i].offset;

		while (addr < e[i].end && !r.err) {
			uint64_t len = e[i].end - addr < CHUNK ? e[i].end - addr : CHUNK;
			lm_bulk_range to = {addr, (uint32_t)(len / LM_PAGE), 0};
			ssize_t got = pread(file, data, len, (off_t)offset);

			if (got != (ssize_t)len)
				r.err = got < 0 ? errno : EPIPE;
			else
				r = lm_write_pages(&target, &to, 1, data);
			addr += len;
			offset += len;
		}
		i += !r.err;
	}
	free(data);
	r.done = i;
	return r;
}
