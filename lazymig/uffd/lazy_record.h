/* What whoever takes lazy memory over from a process that died has to know: which pages have come, and what fork,
 * mremap, munmap and madvise did to the areas. It lies in memory that outlives the process (a memfd that a keeper
 * holds), as do the userfaultfds: each one of a forked child is sent to the keeper at once. */
#ifndef LAZYMIG_LAZY_RECORD_H
#define LAZYMIG_LAZY_RECORD_H

#include "lazymig/uffd/lazy.h"

/* cffi: begin */
/* What the keeper is sent, with a descriptor: `role` of it and the number that tells which memory it belongs to. */
typedef struct {
	uint32_t what, role, tag, pad;
} lm_keep;

/* Bytes of a record for so many pages (of the areas' pending ones); mostly never touched. */
uint64_t lm_lazy_record_size(uint64_t pages);
/* Writes a record from now on; once armed. `keeper`: a SOCK_SEQPACKET socket that takes the userfaultfds of forked
 * children, each with `keep`. Neither is freed or closed with lm_lazy. EINVAL: not a record of this memory. */
int lm_lazy_record(lm_lazy *z, void *record, uint64_t size, int keeper, const lm_keep *keep);
/* Does what a record says, which another process wrote; `child` are the userfaultfds of forked children, in order, and
 * become lm_lazy's. Wakes all that wait, as their faults were told to that process. EINVAL: not a record of this
 * memory; EOVERFLOW: it is not whole, as too much has happened. */
int lm_lazy_replay(lm_lazy *z, const void *record, uint64_t size, const int *child, uint64_t children);
/* cffi: end */

typedef struct lm_record lm_record;

/* kind: UFFD_EVENT_*, or 0 when the process of the space ended. Locked. */
void lm_record_event(lm_lazy *z, uint32_t kind, const void *space, uint64_t a, uint64_t b, uint64_t c);
void lm_record_fork(lm_lazy *z, const void *parent, int uffd);
void lm_record_placed(lm_lazy *z, uint64_t page, uint64_t n);

#endif
