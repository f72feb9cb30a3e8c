/* Fetches the lazy pages of processes that CRIU restores: from a page server that speaks CRIU's protocol, over one
 * connection, and from local images.
 *
 * The connection answers in order, so what a thread waits for queues behind all that was asked for before. Many
 * requests are in flight, as many as the measured rate and round trip need to keep the link busy and no more, and
 * those for faults carry the pages that follow. Pages are placed in lazy memory, whose loop tells of faults. */
#ifndef LAZYMIG_CRIU_PULL_H
#define LAZYMIG_CRIU_PULL_H

#include "lazymig/images/extents.h"
#include "lazymig/uffd/lazy.h"
#include "page_server/criu_iov.h"

#define LM_PULL_RING 4096

/* cffi: begin */
typedef struct {
	uint64_t remote, local;      /* pages placed from the connection, and from images */
	uint64_t requests, urgent;   /* sent; of them for faults */
	uint64_t left;               /* pages that were not asked for yet */
	uint64_t window;             /* bytes that may be in flight now */
	uint64_t rate, round_trip;   /* measured: bytes a second, ns */
} lm_pull_stats;

/* What whoever takes the connection over has to know of it; lies in shared memory. 0: nothing yet. */
typedef struct {
	uint64_t rx_base, tx_base;  /* the socket's counts when the connection was made */
	uint64_t sent, answered;    /* requests that were put to be sent; replies that were taken whole */
	uint64_t at;                /* bytes of the stream before the reply that is due now */
	uint64_t pages;             /* in that reply; 0: its head was not taken */
	lm_ps_iov ring[4096];   /* request n is at n % LM_PULL_RING */
} lm_pull_record;

typedef struct lm_pull lm_pull;

/* `sock` (-1: none) and the record stay the caller's. `wide`: the server is CRIU 4.2 or newer, or lazymig. NULL: out
 * of memory or descriptors. */
lm_pull *lm_pull_new(int sock, int wide, lm_pull_record *record);
void lm_pull_free(lm_pull *p);
/* Adds a process: its lazy memory, the pid that the server knows, the other end of its fault connection, and what is
 * pending. `local` (sorted, present everywhere) says which pages are in which of `fds`, by their
 * `layer`; the others come from the connection. All but `z` and the descriptors is copied. 0 or errno. */
int lm_pull_add(lm_pull *p, lm_lazy *z, uint32_t pid, int faults, const lm_range *pending, uint64_t n,
		const lm_piece *local, uint64_t nlocal, const int *fds, uint32_t nfds);
/* Notes where a new connection begins, so that it can be taken over later. 0 or errno. */
int lm_pull_begin(lm_pull *p);
/* Gets what is left on a connection that another process used out of the way. 0; EPROTO: that cannot be told. */
int lm_pull_resume(lm_pull *p);
/* Also fetches what nobody waits for, from now on. */
void lm_pull_background(lm_pull *p);
/* Serves until lm_pull_stop (0) or until the connection is of no use: EPIPE at its end, EPROTO, or its errno. */
int lm_pull_run(lm_pull *p);
void lm_pull_stop(lm_pull *p);
/* Says goodbye: no requests may be in flight. The server's status: 0 well, -1 not; or errno. */
int lm_pull_close(lm_pull *p, int *status);
void lm_pull_get_stats(const lm_pull *p, lm_pull_stats *out);
/* cffi: end */

#endif
