#define _GNU_SOURCE
#include "page_server/receive.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "lazymig/kernel/ranges.h"
#include "page_server/transfer.h"

/* A round's zero ranges that a peer may make us remember. */
#define MAX_ZERO (16u << 20)

/* Outside a round no page is welcome. */
static const lm_range nothing;

struct lm_receiver {
	int sock;
	lm_target target;
	lm_flag cancel;
	_Atomic(lm_lazy *) lazy;
	const lm_range *allowed;
	uint64_t nallowed;
	lm_bulk_head head;
	lm_bulk_range ranges[LM_MAX_RANGES];
	uint8_t *data; /* LM_MAX_PAYLOAD bytes */
	unsigned int pieces; /* see lm_let_others */
	lm_range *zero;
	size_t nzero, zero_room;
	lm_receiver_stats stats;
};

lm_receiver *lm_receiver_new(int sock, int pid, int mem)
{
	lm_receiver *r = calloc(1, sizeof(*r));

	if (!r)
		return NULL;
	r->sock = sock;
	r->target = (lm_target){pid, mem};
	r->allowed = &nothing;
	r->data = mmap(NULL, LM_MAX_PAYLOAD, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (r->data == MAP_FAILED) {
		free(r);
		return NULL;
	}
	return r;
}

void lm_receiver_free(lm_receiver *r)
{
	munmap(r->data, LM_MAX_PAYLOAD);
	free(r->zero);
	free(r);
}

void lm_receiver_cancel(lm_receiver *r)
{
	r->cancel = true;
}

void lm_receiver_allow(lm_receiver *r, const lm_range *allowed, uint64_t n)
{
	r->allowed = allowed;
	r->nallowed = n;
}

void lm_receiver_lazy(lm_receiver *r, lm_lazy *lazy)
{
	r->lazy = lazy;
}

static bool may_be_placed(lm_receiver *r, lm_lazy *lazy)
{
	uint32_t i;

	for (i = 0; i < r->head.n_ranges; i++) {
		const lm_bulk_range *at = &r->ranges[i];
		lm_range range = {at->addr, at->addr + at->npages * LM_PAGE};
		uint64_t from;

		if (lazy) {
			if (!lm_lazy_covers(lazy, at->addr, at->npages))
				return false;
		} else if (r->allowed) {
			from = lm_ranges_find(r->allowed, r->nallowed, range.start);
			if (!lm_ranges_cover(r->allowed + from, r->nallowed - from, &range, 1))
				return false;
		}
	}
	return true;
}

static int place_lazy(lm_receiver *r, lm_lazy *lazy, const uint8_t *data)
{
	lm_range range[LM_MAX_RANGES];
	uint32_t i;

	for (i = 0; i < r->head.n_ranges; i++)
		range[i] = (lm_range){r->ranges[i].addr, r->ranges[i].addr + r->ranges[i].npages * LM_PAGE};
	return lm_lazy_place_ranges(lazy, range, r->head.n_ranges, data);
}

int lm_receiver_place(lm_receiver *r, const uint8_t *raw)
{
	lm_lazy *lazy = r->lazy;
	lm_result result;

	r->stats.pages += r->head.raw_len / LM_PAGE;
	if (lazy)
		return place_lazy(r, lazy, raw);
	result = lm_write_pages(&r->target, r->ranges, r->head.n_ranges, raw);
	if (result.err)
		r->stats.failed_addr = r->ranges[result.done].addr;
	return result.err;
}

static int keep_zero(lm_receiver *r)
{
	lm_lazy *lazy = r->lazy;
	uint32_t i;

	for (i = 0; i < r->head.n_ranges; i++)
		r->stats.zero_pages += r->ranges[i].npages;
	if (lazy)
		return place_lazy(r, lazy, NULL);
	if (r->nzero + r->head.n_ranges > r->zero_room) {
		size_t room = r->zero_room ? 2 * r->zero_room : 4 * LM_MAX_RANGES;
		lm_range *p = room > MAX_ZERO ? NULL : realloc(r->zero, room * sizeof(*p));

		if (!p)
			return ENOMEM;
		r->zero = p;
		r->zero_room = room;
	}
	for (i = 0; i < r->head.n_ranges; i++) {
		uint64_t addr = r->ranges[i].addr;

		r->zero[r->nzero++] = (lm_range){addr, addr + r->ranges[i].npages * LM_PAGE};
	}
	return 0;
}

/* Inside a frame the end of the stream is not a clean one. */
static int receive(lm_receiver *r, void *buf, size_t len)
{
	int err = lm_recv_all(r->sock, buf, len, &r->cancel);

	r->stats.bytes_wire += len;
	return err == EPIPE ? ECONNRESET : err;
}

int lm_receiver_step(lm_receiver *r, lm_receiver_event *ev)
{
	for (;;) {
		int err = lm_recv_all(r->sock, &r->head, sizeof(r->head.type), &r->cancel);

		if (!err)
			err = receive(r, (char *)&r->head + sizeof(r->head.type), sizeof(r->head) - sizeof(r->head.type));
		if (!err)
			err = lm_bulk_check_head(&r->head);
		if (!err)
			err = receive(r, r->ranges, r->head.n_ranges * sizeof(*r->ranges));
		if (!err)
			err = lm_bulk_check_ranges(&r->head, r->ranges);
		if (!err && !may_be_placed(r, r->lazy))
			err = EPROTO;
		if (!err)
			err = receive(r, r->data, r->head.payload_len);
		if (err)
			return err;
		if (r->head.type == LM_FRAME_ZERO) {
			err = keep_zero(r);
		} else if (r->head.type == LM_FRAME_PAGES && r->head.codec == LM_CODEC_NONE) {
			err = lm_receiver_place(r, r->data);
			lm_let_others(&r->pieces);
		} else {
			if (r->head.type == LM_FRAME_END)
				lm_receiver_allow(r, &nothing, 0);
			*ev = (lm_receiver_event){
				.type = r->head.type,
				.seq = r->head.seq,
				.codec = r->head.codec,
				.data = r->data,
				.len = r->head.payload_len,
				.raw_len = r->head.raw_len,
			};
			return 0;
		}
		if (err)
			return err;
	}
}

uint64_t lm_receiver_zero(const lm_receiver *r, const lm_range **out)
{
	*out = r->zero;
	return r->nzero;
}

void lm_receiver_get_stats(const lm_receiver *r, lm_receiver_stats *out)
{
	*out = r->stats;
}

void lm_receiver_next_round(lm_receiver *r)
{
	r->stats = (lm_receiver_stats){0};
	r->nzero = 0;
}
