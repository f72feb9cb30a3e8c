/* Frames of the bulk connections, little endian; docs/protocol-pages.md. Both hosts run the same architecture. */
#ifndef LAZYMIG_WIRE_H
#define LAZYMIG_WIRE_H

#include "lazymig/kernel/lm.h"

#define LM_MAX_RANGES 1024u
#define LM_MAX_PAYLOAD (4u << 20)

enum { LM_FRAME_PAGES = 1, LM_FRAME_ZERO, LM_FRAME_GATE, LM_FRAME_END };
enum { LM_CODEC_NONE, LM_CODEC_LZ4, LM_CODEC_ZSTD };
enum { LM_RANGE_ZEROABLE = 1, LM_RANGE_FORCE = 2 };

/* cffi: begin */
typedef struct {
	uint32_t type, n_ranges;
	uint64_t payload_len; /* bytes on the wire, behind the ranges */
	uint32_t seq, codec;
	uint64_t raw_len; /* bytes when decompressed: 4096 for each page of the ranges */
} lm_bulk_head;

typedef struct {
	uint64_t addr;
	uint32_t npages, flags;
} lm_bulk_range;

/* 0, or EPROTO for a frame that this side does not have to accept. */
int lm_bulk_check_head(const lm_bulk_head *h);
int lm_bulk_check_ranges(const lm_bulk_head *h, const lm_bulk_range *r);
/* cffi: end */

#endif
