/* The sending end of a bulk connection: reads another process's pages in batches and writes them as frames. */
#ifndef LAZYMIG_BULK_H
#define LAZYMIG_BULK_H

#include "lazymig/kernel/lm.h"
#include "page_server/wire.h"

/* cffi: begin */
typedef struct {
	const lm_range *r;
	uint64_t n;
	uint32_t flags, pad;
} lm_part;

typedef struct {
	uint64_t pages, zero_pages, skipped_pages; /* sent, told to be zero, not there any more */
	uint64_t bytes_wire, raw_bytes;            /* of frames; of pages before compression */
} lm_bulk_stats;

typedef struct lm_bulk lm_bulk;

/* NULL: out of memory, or no such process (errno). `sock` -1 is allowed where nothing is sent. */
lm_bulk *lm_bulk_new(int sock, int pid);
void lm_bulk_free(lm_bulk *b);
/* Makes every call return ECANCELED soon, for good. */
void lm_bulk_cancel(lm_bulk *b);
/* Bytes per second; 0: no limit. */
void lm_bulk_limit(lm_bulk *b, uint64_t rate);

/* A round: begin, then fill and flush until fill says ENODATA. The parts stay the caller's, as long as it takes. */
void lm_bulk_begin(lm_bulk *b, const lm_part *parts, uint64_t n);
/* Arms pages shortly before they are read in the rounds to come, through this descriptor of /proc/PID/pagemap; -1: not.
 * What is written before that needs not be sent again. */
void lm_bulk_arm(lm_bulk *b, int pagemap);
/* Reads the next batch. ENODATA: no more; ESRCH: the process ended. */
int lm_bulk_fill(lm_bulk *b);
/* The batch: done bytes of raw pages at *data. */
lm_result lm_bulk_batch(lm_bulk *b, const uint8_t **data);
/* Sends the batch; with a codec, `data` are its pages compressed. */
int lm_bulk_flush(lm_bulk *b, uint32_t seq, uint32_t codec, const uint8_t *data, uint64_t len);
/* All of it in one call, uncompressed. */
int lm_bulk_round(lm_bulk *b, uint32_t seq);
/* GATE or END. */
int lm_bulk_mark(lm_bulk *b, uint32_t type, uint32_t seq);
/* Tells that these pages are zero. */
int lm_bulk_zero(lm_bulk *b, uint32_t seq, const lm_range *r, uint64_t n);

void lm_bulk_get_stats(const lm_bulk *b, lm_bulk_stats *out);
/* The ranges of the pages that could not be read since the last lm_bulk_begin; returns how many. */
uint64_t lm_bulk_skipped(const lm_bulk *b, const lm_range **out);
/* cffi: end */

#include <stdbool.h>

#include "page_server/transfer.h"

/* 128 KiB: full speed (it stays in the cache), and nobody waits long for the processor while it is read or sent. */
#define LM_BATCH_PAGES 32u

struct lm_bulk {
	int sock;
	lm_target target;
	lm_flag cancel;
	_Atomic uint64_t rate;
	uint64_t next_ns; /* when the limit lets the next frame go */

	const lm_part *parts;
	uint64_t nparts, part, range, offset; /* where the next batch starts */
	int pagemap;			      /* -1: pages are armed already */
	uint64_t armed;			      /* how far the range is */

	uint8_t *data; /* LM_BATCH_PAGES pages */
	lm_bulk_range got[LM_BATCH_PAGES], zero[LM_BATCH_PAGES];
	size_t ngot, nzero;
	uint64_t bytes;
	unsigned int pieces; /* see lm_let_others */
	lm_range *skipped;
	size_t nskipped, skipped_room;
	bool failed; /* no memory for the list of skipped pages */
	lm_bulk_stats stats;
};

/* Reads up to LM_BATCH_PAGES pages as the batch. */
int lm_bulk_read(lm_bulk *b, const lm_range *r, size_t n, uint32_t flags);

#endif
