/* Memory of a running process that is still at another host: pages are fetched when somebody needs them, and
 * placed when they arrive. docs/protocol-pages.md has the state diagram of a page.
 *
 * Threads: one runs lm_lazy_run(), any others place what arrives on bulk connections. What a page's state is,
 * UFFDIO_COPY according to it, and reading a userfaultfd event with the change it means, are each one step under
 * one lock: else a page placed between them would come back after madvise(MADV_DONTNEED), or be missing in a
 * forked child for ever. The kernel refuses UFFDIO_COPY with EAGAIN while such an event is unread. */
#ifndef LAZYMIG_LAZY_H
#define LAZYMIG_LAZY_H

#include "lazymig/kernel/lm.h"

/* cffi: begin */
typedef struct {
	uint64_t faults;      /* on pages that were still at the source */
	uint64_t zero_faults; /* on pages that nobody ever wrote */
	uint64_t requested;   /* pages asked for on the fault connection */
	uint64_t received;    /* pages placed from there */
	uint64_t pushed;      /* pages placed from bulk connections */
	uint64_t zeroed;      /* pages the source said are zero */
	uint64_t duplicates;  /* pages that came and were not pending any more */
	uint64_t dropped;     /* pages given up: unmapped, discarded, or their process ended */
	uint64_t events;      /* fork, mremap, munmap, madvise */
	uint64_t forks;
	uint64_t stall_ns; /* summed over faults: event read until woken */
	uint64_t hist[24]; /* the same, counted by microseconds: [i] is below 2^i us */
	uint64_t remaining;
	uint64_t spaces; /* address spaces still served */
	int32_t lost;    /* errno why the fault connection is not used any more, EPIPE at its end; 0 while it is */
	int32_t err;     /* errno of what made serving impossible; 0 */
} lm_lazy_stats;

typedef struct lm_lazy lm_lazy;

/* `done_fd`: an eventfd, written when nothing is pending any more, the connection was lost or serving failed.
 * Neither it nor uffd is closed by lm_lazy_free. NULL when out of memory or descriptors. */
lm_lazy *lm_lazy_new(int uffd, int done_fd);
void lm_lazy_free(lm_lazy *z);
/* Registers the areas MISSING and makes the pages of `pending` lazy; once. On error nothing stays registered,
 * `done` is the index of the area that failed. */
lm_result lm_lazy_arm(lm_lazy *z, const lm_range *areas, uint64_t nareas, const lm_range *pending,
		      uint64_t npending);
/* The same for areas that whoever made the userfaultfd registers, now or later. 0 or errno. */
int lm_lazy_adopt(lm_lazy *z, const lm_range *areas, uint64_t nareas, const lm_range *pending, uint64_t npending);
/* Uses a duplicate of this socket for requests from now on, asking again for all that has not arrived. 0 or errno. */
int lm_lazy_attach(lm_lazy *z, int sock);
/* The fault loop; returns when lm_lazy_stop was called. `spin_ns`: how long to look again before sleeping. */
void lm_lazy_run(lm_lazy *z, uint64_t spin_ns);
void lm_lazy_stop(lm_lazy *z);
/* 1 if all these pages are of this memory, pending or not. */
int lm_lazy_covers(lm_lazy *z, uint64_t addr, uint64_t pages);
/* Places pages that arrived on a bulk connection wherever they are pending (data NULL: they are zero).
 * EPROTO: not pages of this memory. */
int lm_lazy_place(lm_lazy *z, uint64_t addr, uint64_t pages, const uint8_t *data);
/* The same for the pages of n ranges, one after another in `data`. */
int lm_lazy_place_ranges(lm_lazy *z, const lm_range *r, uint64_t n, const uint8_t *data);
/* The pages pending in any space, by source address; returns how many ranges there are, writing up to `room`. */
uint64_t lm_lazy_pending(lm_lazy *z, lm_range *out, uint64_t room);
/* How many pages in a row from *addr on are pending in some space, all below `end`; *addr is moved to the first such
 * page. 0: there is none. */
uint64_t lm_lazy_wanted(lm_lazy *z, uint64_t *addr, uint64_t end);
/* Gives up the pages of address spaces that have ended: while no page comes, nothing else tells of that. */
void lm_lazy_look(lm_lazy *z);
void lm_lazy_get_stats(lm_lazy *z, lm_lazy_stats *out);
/* Takes the registrations off all areas. Only when nothing is pending, or whoever runs there is to be killed. */
void lm_lazy_unregister(lm_lazy *z);
/* cffi: end */

/* Puts the calling thread, which answers faults, before others. */
void lm_be_quick(void);
/* CLOCK_MONOTONIC, ns. */
uint64_t lm_now(void);

#endif
