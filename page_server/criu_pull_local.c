/* The fetcher's other source: images on this host. */
#define _GNU_SOURCE
#include <unistd.h>

#include "page_server/criu_pull_inside.h"

/* The first piece that ends after addr. */
static uint64_t find(const lm_pull_task *t, uint64_t addr)
{
	uint64_t low = 0, high = t->nlocal;

	while (low < high) {
		uint64_t mid = low + (high - low) / 2;

		if (t->local[mid].end <= addr)
			low = mid + 1;
		else
			high = mid;
	}
	return low;
}

uint64_t lm_pull_span(const lm_pull_task *t, uint64_t addr, uint64_t pages, bool *local)
{
	uint64_t i = find(t, addr), end = addr + pages * LM_PAGE, at;

	*local = i < t->nlocal && t->local[i].start <= addr;
	if (!*local)
		at = i < t->nlocal ? t->local[i].start : end;
	else
		for (at = addr; i < t->nlocal && at < end && t->local[i].start <= at; i++)
			at = t->local[i].end;
	return at < end ? (at - addr) / LM_PAGE : pages;
}

uint64_t lm_pull_local(lm_pull *p, lm_pull_task *t, uint64_t addr, uint64_t pages, int *err)
{
	uint64_t i = find(t, addr), want, got = 0;
	const lm_piece *piece = &t->local[i];

	*err = 0;
	if (i == t->nlocal || piece->start > addr)
		return 0;
	want = (piece->end - addr) / LM_PAGE < pages ? piece->end - addr : pages * LM_PAGE;
	if (want > LM_PULL_BUFFER)
		want = LM_PULL_BUFFER;
	while (got < want) {
		ssize_t n = pread(t->fds[piece->layer], p->from_images + got, want - got,
				  (off_t)(piece->offset + (addr - piece->start) + got));

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0) { /* a file that was cut short: never placed, so that whoever needs it waits */
			*err = n ? errno : ENODATA;
			return 0;
		}
		got += (uint64_t)n;
	}
	*err = lm_lazy_place(t->z, addr, want / LM_PAGE, p->from_images);
	if (*err == ECANCELED)
		*err = 0;
	p->stats.local += want / LM_PAGE;
	return want / LM_PAGE;
}
