#include "lazymig/images/preadv.h"

#define IOVS 1024 /* UIO_MAXIOV */

static uint64_t least(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

uint64_t lm_preadv_plan(const lm_extent *e, uint64_t n, lm_preadv_at *at, uint64_t most, uint64_t total,
			uint64_t *iov, uint64_t iov_room, lm_preadv *calls, uint64_t call_room)
{
	uint64_t planned = 0, used = 0, done = 0;
	lm_preadv *c = NULL;

	while (at->extent < n && planned < total && used < iov_room) {
		const lm_extent *x = &e[at->extent];
		uint64_t offset = x->offset + at->within;
		uint64_t len;

		if (!c || c->n == IOVS || c->bytes == most || c->offset + c->bytes != offset) {
			if (done == call_room)
				break;
			c = &calls[done++];
			*c = (lm_preadv){offset, 0, at->extent, at->within, (uint32_t)used, 0};
		}
		len = least(least(x->end - x->start - at->within, most - c->bytes), total - planned);
		iov[2 * used] = x->start + at->within;
		iov[2 * used + 1] = len;
		used++;
		c->n++;
		c->bytes += len;
		planned += len;
		at->within += len;
		if (at->within == x->end - x->start) {
			at->extent++;
			at->within = 0;
		}
	}
	return done;
}

uint64_t lm_preadv_rest(const lm_extent *e, const lm_preadv *c, uint64_t got, lm_extent *out)
{
	uint64_t skip = got / LM_PAGE * LM_PAGE, left = c->bytes - skip, within = c->within, done = 0;

	/* What came of a page that is not whole comes again. */
	for (; left; e++, within = 0) {
		const lm_extent *x = &e[c->extent];
		uint64_t start = x->start + within, len = x->end - start;

		if (skip >= len) {
			skip -= len;
			continue;
		}
		start += skip;
		len = least(len - skip, left);
		out[done++] = (lm_extent){start, start + len, x->offset + (start - x->start)};
		left -= len;
		skip = 0;
	}
	return done;
}
