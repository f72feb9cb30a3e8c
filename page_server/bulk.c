#define _GNU_SOURCE
#include "page_server/bulk.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "lazymig/kernel/pagemap.h"

/* How far ahead of the limit a frame may go: what a limited connection may send at once. */
#define BURST_NS 20000000ull
/* Bytes armed at a time: few, as what is armed early is the sooner written again; but each time costs other processors
 * an interrupt. Whole huge pages, which would be split otherwise. */
#define ARM (4ull << 20)

lm_bulk *lm_bulk_new(int sock, int pid)
{
	lm_bulk *b = calloc(1, sizeof(*b));
	char path[64];

	if (!b)
		return NULL;
	snprintf(path, sizeof(path), "/proc/%d/mem", pid);
	b->sock = sock;
	b->pagemap = -1;
	b->target.pid = pid;
	b->target.mem = open(path, O_RDONLY | O_CLOEXEC);
	b->data = mmap(NULL, LM_BATCH_PAGES * LM_PAGE, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (b->target.mem < 0 || b->data == MAP_FAILED) {
		int err = errno;

		lm_bulk_free(b);
		errno = err;
		return NULL;
	}
	return b;
}

void lm_bulk_free(lm_bulk *b)
{
	if (b->data && b->data != MAP_FAILED)
		munmap(b->data, LM_BATCH_PAGES * LM_PAGE);
	if (b->target.mem >= 0)
		close(b->target.mem);
	free(b->skipped);
	free(b);
}

void lm_bulk_cancel(lm_bulk *b)
{
	b->cancel = true;
}

void lm_bulk_limit(lm_bulk *b, uint64_t rate)
{
	b->rate = rate;
}

void lm_bulk_arm(lm_bulk *b, int pagemap)
{
	b->pagemap = pagemap;
}

void lm_bulk_begin(lm_bulk *b, const lm_part *parts, uint64_t n)
{
	b->parts = parts;
	b->nparts = n;
	b->part = b->range = b->offset = 0;
	b->nskipped = 0;
	b->ngot = b->nzero = b->bytes = 0;
	b->stats = (lm_bulk_stats){0};
}

static void skip(void *arg, uint64_t addr)
{
	lm_bulk *b = arg;

	b->stats.skipped_pages++;
	if (b->nskipped && b->skipped[b->nskipped - 1].end == addr) {
		b->skipped[b->nskipped - 1].end += LM_PAGE;
		return;
	}
	if (b->nskipped == b->skipped_room) {
		size_t room = b->skipped_room ? 2 * b->skipped_room : 64;
		lm_range *p = realloc(b->skipped, room * sizeof(*p));

		if (!p) {
			b->failed = true;
			return;
		}
		b->skipped = p;
		b->skipped_room = room;
	}
	b->skipped[b->nskipped++] = (lm_range){addr, addr + LM_PAGE};
}

/* Takes the zero pages out of the batch. */
static void sift(lm_bulk *b, lm_bulk_range *read, size_t n)
{
	uint8_t *from = b->data, *to = b->data;
	size_t i;
	uint32_t k;

	for (i = 0; i < n; i++) {
		for (k = 0; k < read[i].npages; k++, from += LM_PAGE) {
			uint64_t addr = read[i].addr + k * LM_PAGE;

			if (lm_page_is_zero(from)) {
				b->nzero = lm_append_range(b->zero, b->nzero, addr, 1, read[i].flags);
				continue;
			}
			b->ngot = lm_append_range(b->got, b->ngot, addr, 1, read[i].flags);
			if (to != from)
				memcpy(to, from, LM_PAGE);
			to += LM_PAGE;
		}
	}
	b->bytes = (uint64_t)(to - b->data);
}

int lm_bulk_read(lm_bulk *b, const lm_range *r, size_t n, uint32_t flags)
{
	lm_bulk_range read[LM_BATCH_PAGES];
	lm_bulk_range *into = flags & LM_RANGE_ZEROABLE ? read : b->got;
	lm_result result;
	size_t i;

	b->ngot = b->nzero = b->bytes = 0;
	result = lm_read_pages(&b->target, r, n, flags, b->data, into, skip, b);
	if (result.err)
		return result.err;
	if (b->failed)
		return ENOMEM;
	if (into == read) {
		sift(b, read, result.done);
	} else {
		b->ngot = result.done;
		for (i = 0; i < b->ngot; i++)
			b->bytes += b->got[i].npages * LM_PAGE;
	}
	return 0;
}

/* Whatever goes wrong, the next scan finds: pages that are not armed count as written. */
static void arm_some(lm_bulk *b, lm_range r)
{
	b->armed = (r.start | (ARM - 1)) + 1;
	if (b->armed > r.end)
		b->armed = r.end;
	lm_pagemap_arm(b->pagemap, (lm_range){r.start, b->armed});
}

int lm_bulk_fill(lm_bulk *b)
{
	lm_range batch[LM_BATCH_PAGES];
	uint64_t room = LM_BATCH_PAGES * LM_PAGE;
	size_t n = 0;
	const lm_part *p;

	if (b->cancel)
		return ECANCELED;
	while (b->part < b->nparts && b->range == b->parts[b->part].n) {
		b->part++;
		b->range = 0;
	}
	if (b->part == b->nparts)
		return ENODATA;
	p = &b->parts[b->part]; /* a batch never mixes parts, which differ in their flags */
	while (room && b->range < p->n) {
		const uint64_t end = p->r[b->range].end;
		lm_range r = {p->r[b->range].start + b->offset, end};

		if (b->pagemap >= 0) {
			if (!b->offset || r.start == b->armed)
				arm_some(b, r);
			if (r.end > b->armed)
				r.end = b->armed;
		}
		if (r.end - r.start > room)
			r.end = r.start + room;
		b->offset += r.end - r.start;
		if (r.end == end) {
			b->range++;
			b->offset = 0;
		}
		room -= r.end - r.start;
		batch[n++] = r;
	}
	return lm_bulk_read(b, batch, n, p->flags);
}

lm_result lm_bulk_batch(lm_bulk *b, const uint8_t **data)
{
	*data = b->data;
	return lm_ok(b->bytes);
}

/* Sleeps as the limit on bytes per second wants it. */
static int hold_back(lm_bulk *b, uint64_t bytes)
{
	uint64_t rate = b->rate, now;
	struct timespec t;

	if (!rate)
		return 0;
	for (;;) {
		clock_gettime(CLOCK_MONOTONIC, &t);
		now = (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
		if (b->cancel)
			return ECANCELED;
		if (b->next_ns <= now + BURST_NS)
			break;
		now = b->next_ns - BURST_NS - now;
		t = (struct timespec){0, now < 50000000 ? (long)now : 50000000};
		nanosleep(&t, NULL);
	}
	b->next_ns = (b->next_ns > now ? b->next_ns : now) + bytes * 1000000000u / rate;
	return 0;
}

static int send_frame(lm_bulk *b, lm_bulk_head head, const lm_bulk_range *r, const uint8_t *data)
{
	struct iovec iov[3] = {
		{&head, sizeof(head)},
		{(void *)r, head.n_ranges * sizeof(*r)},
		{(void *)data, head.payload_len},
	};
	uint64_t bytes = iov[0].iov_len + iov[1].iov_len + iov[2].iov_len;
	int err = hold_back(b, bytes);

	if (!err)
		err = lm_send_all(b->sock, iov, 3, &b->cancel);
	if (!err)
		b->stats.bytes_wire += bytes;
	return err;
}

static uint64_t count(const lm_bulk_range *r, size_t n)
{
	uint64_t pages = 0;
	size_t i;

	for (i = 0; i < n; i++)
		pages += r[i].npages;
	return pages;
}

int lm_bulk_flush(lm_bulk *b, uint32_t seq, uint32_t codec, const uint8_t *data, uint64_t len)
{
	int err = 0;

	if (b->nzero)
		err = send_frame(b, (lm_bulk_head){LM_FRAME_ZERO, (uint32_t)b->nzero, 0, seq, 0, 0}, b->zero, NULL);
	if (!err && b->ngot) {
		lm_bulk_head head = {LM_FRAME_PAGES, (uint32_t)b->ngot, b->bytes, seq, codec, b->bytes};

		if (codec)
			head.payload_len = len;
		err = send_frame(b, head, b->got, codec ? data : b->data);
	}
	if (err)
		return err;
	b->stats.zero_pages += count(b->zero, b->nzero);
	b->stats.pages += b->bytes / LM_PAGE;
	b->stats.raw_bytes += b->bytes;
	b->ngot = b->nzero = b->bytes = 0;
	lm_let_others(&b->pieces);
	return 0;
}

int lm_bulk_round(lm_bulk *b, uint32_t seq)
{
	int err;

	while (!(err = lm_bulk_fill(b))) {
		err = lm_bulk_flush(b, seq, LM_CODEC_NONE, NULL, 0);
		if (err)
			return err;
	}
	return err == ENODATA ? 0 : err;
}

int lm_bulk_mark(lm_bulk *b, uint32_t type, uint32_t seq)
{
	return send_frame(b, (lm_bulk_head){type, 0, 0, seq, 0, 0}, NULL, NULL);
}

int lm_bulk_zero(lm_bulk *b, uint32_t seq, const lm_range *r, uint64_t n)
{
	lm_bulk_range list[LM_MAX_RANGES];
	uint64_t i = 0, offset = 0;
	int err = 0;

	while (i < n && !err) {
		uint32_t k;

		for (k = 0; i < n && k < LM_MAX_RANGES; k++) {
			uint64_t pages = (r[i].end - r[i].start - offset) / LM_PAGE;

			if (pages > UINT32_MAX / 2)
				pages = UINT32_MAX / 2;
			list[k] = (lm_bulk_range){r[i].start + offset, (uint32_t)pages, LM_RANGE_ZEROABLE};
			b->stats.zero_pages += pages;
			offset += pages * LM_PAGE;
			if (r[i].start + offset == r[i].end) {
				i++;
				offset = 0;
			}
		}
		err = send_frame(b, (lm_bulk_head){LM_FRAME_ZERO, k, 0, seq, 0, 0}, list, NULL);
	}
	return err;
}

void lm_bulk_get_stats(const lm_bulk *b, lm_bulk_stats *out)
{
	*out = b->stats;
}

uint64_t lm_bulk_skipped(const lm_bulk *b, const lm_range **out)
{
	*out = b->skipped;
	return b->nskipped;
}
