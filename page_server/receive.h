/* The receiving end of a bulk connection: places pages in the skeleton, or in lazy memory. */
#ifndef LAZYMIG_RECEIVE_H
#define LAZYMIG_RECEIVE_H

#include "lazymig/uffd/lazy.h"
#include "page_server/wire.h"

/* cffi: begin */
typedef struct lm_receiver lm_receiver;

/* What lm_receiver_step came back for. */
typedef struct {
	uint32_t type;     /* 1 PAGES that are compressed, 3 GATE, 4 END */
	uint32_t seq, codec, pad;
	const uint8_t *data; /* of compressed pages */
	uint64_t len, raw_len;
} lm_receiver_event;

typedef struct {
	uint64_t pages, zero_pages, bytes_wire; /* since the last lm_receiver_next_round */
	uint64_t failed_addr;                   /* where placing went wrong */
} lm_receiver_stats;

/* Neither descriptor is closed with it. NULL: out of memory. */
lm_receiver *lm_receiver_new(int sock, int pid, int mem);
void lm_receiver_free(lm_receiver *r);
void lm_receiver_cancel(lm_receiver *r);
/* Receives and places until Python has to do something. 0; EPIPE: the peer closed between frames; EPROTO; ECONNRESET
 * and the like; with failed_addr set: a page could not be placed. */
int lm_receiver_step(lm_receiver *r, lm_receiver_event *ev);
/* Only pages of these ranges are accepted until the next END; NULL: all. Stays the caller's. Before: none are. */
void lm_receiver_allow(lm_receiver *r, const lm_range *allowed, uint64_t n);
/* From now on pages go to lazy memory (NULL: to the target again). */
void lm_receiver_lazy(lm_receiver *r, lm_lazy *lazy);
/* Places the pages of the compressed frame that step came back for. */
int lm_receiver_place(lm_receiver *r, const uint8_t *raw);
/* Zero ranges since the last lm_receiver_next_round: in the order they came. */
uint64_t lm_receiver_zero(const lm_receiver *r, const lm_range **out);
void lm_receiver_get_stats(const lm_receiver *r, lm_receiver_stats *out);
void lm_receiver_next_round(lm_receiver *r);
/* cffi: end */

#endif
