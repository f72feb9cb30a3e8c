#include "page_server/wire.h"

#include "lazymig/uffd/fault_wire.h"

_Static_assert(sizeof(lm_bulk_head) == 32, "on the wire");
_Static_assert(sizeof(lm_bulk_range) == 16, "on the wire");
_Static_assert(sizeof(lm_fault_head) == 16, "on the wire");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "frames are sent as they are in memory");

int lm_bulk_check_head(const lm_bulk_head *h)
{
	switch (h->type) {
	case LM_FRAME_PAGES:
		if (!h->n_ranges || h->n_ranges > LM_MAX_RANGES || !h->raw_len || h->raw_len > LM_MAX_PAYLOAD)
			return EPROTO;
		if (h->codec == LM_CODEC_NONE)
			return h->payload_len == h->raw_len ? 0 : EPROTO;
		/* What did not shrink is sent as it is. */
		return h->codec <= LM_CODEC_ZSTD && h->payload_len && h->payload_len < h->raw_len ? 0 : EPROTO;
	case LM_FRAME_ZERO:
		if (!h->n_ranges || h->n_ranges > LM_MAX_RANGES)
			return EPROTO;
		break;
	case LM_FRAME_GATE:
	case LM_FRAME_END:
		if (h->n_ranges)
			return EPROTO;
		break;
	default:
		return EPROTO;
	}
	return h->payload_len || h->raw_len || h->codec ? EPROTO : 0;
}

int lm_bulk_check_ranges(const lm_bulk_head *h, const lm_bulk_range *r)
{
	uint64_t bytes = 0;
	uint32_t i;

	for (i = 0; i < h->n_ranges; i++) {
		uint64_t len = r[i].npages * LM_PAGE;

		if (!len || r[i].addr % LM_PAGE || r[i].addr >= LM_ADDR_END || len > LM_ADDR_END - r[i].addr)
			return EPROTO;
		if (r[i].flags & ~(uint32_t)(LM_RANGE_ZEROABLE | LM_RANGE_FORCE))
			return EPROTO;
		bytes += len;
	}
	return h->type == LM_FRAME_PAGES && bytes != h->raw_len ? EPROTO : 0;
}
