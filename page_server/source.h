/* The frozen process's side of post-copy: answers page requests, and pushes what nobody asked for. */
#ifndef LAZYMIG_SOURCE_H
#define LAZYMIG_SOURCE_H

#include "page_server/bulk.h"

/* cffi: begin */
typedef struct {
	uint64_t requests, served, served_zero; /* requests; pages answered with bytes, and as zero */
	uint64_t pushed, skipped;               /* pages pushed; pages not pushed, as a fault had been quicker */
	uint64_t left;                          /* pages neither pushed nor served */
} lm_source_stats;

typedef struct lm_source lm_source;

/* Serves only pages of `pending`. NULL: out of memory, or no such process (errno). */
lm_source *lm_source_new(int pid, const lm_range *pending, uint64_t n);
void lm_source_free(lm_source *s);
/* Answers requests from one fault connection until it ends (0), breaks (errno) or asks for what it may not have
 * (EPROTO), or until lm_source_stop. Again with another connection is allowed. */
int lm_source_serve(lm_source *s, int sock);
void lm_source_stop(lm_source *s);
/* Whether to push next what lies behind the page asked for last, as it does at first, or all in order. */
void lm_source_follow(lm_source *s, int follow);
/* These pages, of `pending`, are to be pushed. */
void lm_source_want(lm_source *s, const lm_range *r, uint64_t n);
/* Pushes what is left until nothing is, then sends END. Several may push at once: `turn` of `turns`. */
int lm_source_push(lm_source *s, lm_bulk *b, uint32_t seq, uint32_t turn, uint32_t turns);
void lm_source_get_stats(const lm_source *s, lm_source_stats *out);
/* cffi: end */

#endif
