/* Inside of lazy memory: the spaces, their pages' states, and who waits. Everything here is called locked. */
#ifndef LAZYMIG_LAZY_TABLE_H
#define LAZYMIG_LAZY_TABLE_H

#include <pthread.h>
#include <stdatomic.h>

#include "lazymig/kernel/pageindex.h"
#include "lazymig/uffd/areas.h"
#include "lazymig/uffd/fault_wire.h"
#include "lazymig/uffd/lazy.h"
#include "lazymig/uffd/lazy_record.h"

#define LM_EXPECTED 16

/* One address space: that of the moved process, or of a child it forked meanwhile. */
typedef struct {
	int uffd; /* -1: the process ended */
	lm_areas areas;
	uint64_t *pending; /* by page number */
	uint64_t left;     /* bits set in it */
	/* mremap reports the move and then, separately, that the old place was unmapped. Meanwhile another area
	 * may have been moved there, so the second report must not touch it. */
	lm_range expected[LM_EXPECTED];
	unsigned int next_expected;
} lm_space;

/* A thread that waits for a page; or, in `deferred`, a fault to be looked at again. */
typedef struct {
	lm_space *space;
	uint64_t dst, page, since;
	uint32_t tid;
} lm_waiter;

typedef struct {
	lm_waiter *w;
	size_t n, room;
} lm_waiters;

struct lm_lazy {
	/* A fault never waits for more than one step of a bulk thread: see lock_fault() and lock_bulk(). */
	pthread_mutex_t bulk, next, data;
	lm_index index;
	lm_space **space;
	size_t nspaces, room;
	uint64_t *asked; /* by page number: requested and not received */
	lm_waiters waiting, deferred;
	uint8_t *out; /* requests not sent yet */
	size_t out_n, out_room;
	int sock, epoll, wake_fd, done_fd;
	int new_sock; /* to be used instead, by the loop; -1 none */
	bool want_write, told_done;
	uint8_t in[2 * (sizeof(lm_fault_head) + LM_FAULT_MAX_PAGES * LM_PAGE)]; /* replies as far as they have come */
	size_t in_n;
	_Atomic bool stop;
	lm_record *record; /* NULL: none is written */
	int keeper;
	lm_keep keep;
	lm_lazy_stats stats;
};

void lm_lock_fault(lm_lazy *z);
void lm_lock_bulk(lm_lazy *z);
void lm_unlock_fault(lm_lazy *z);
void lm_unlock_bulk(lm_lazy *z);

/* NULL when out of memory. Adds it to the table and to epoll; uffd -1 is a space without a kernel side (tests). */
lm_space *lm_space_add(lm_lazy *z, int uffd);
void lm_space_drop(lm_lazy *z, lm_space *s);
/* What the events of userfaultfd mean for the table. */
void lm_space_fork(lm_lazy *z, const lm_space *parent, int uffd);
void lm_space_remap(lm_lazy *z, lm_space *s, uint64_t from, uint64_t to, uint64_t len);
void lm_space_unmap(lm_lazy *z, lm_space *s, uint64_t start, uint64_t end);
void lm_space_remove(lm_lazy *z, lm_space *s, uint64_t start, uint64_t end);
void lm_space_fault(lm_lazy *z, lm_space *s, uint64_t dst, uint32_t tid, uint64_t since);

/* Reads the events of one userfaultfd, or of all (-1). */
void lm_read_events(lm_lazy *z, int uffd);
/* Looks again at the faults that could not be answered. */
void lm_retry_deferred(lm_lazy *z);
/* Queues a request. */
void lm_request(lm_lazy *z, uint64_t src, uint32_t pages);
void lm_failed(lm_lazy *z, int err);
void lm_tell_if_done(lm_lazy *z);
/* Places n pages, all numbered in a row from `page`, where they are pending; `placed` grows by how many were.
 * false: events have to be read before the rest can be placed. */
bool lm_place_step(lm_lazy *z, uint64_t page, uint64_t src, uint64_t n, const uint8_t *data, uint64_t *placed);

#endif
