/* Moves bytes: over sockets, without waiting for ever, and in and out of other processes' memory. */
#ifndef LAZYMIG_TRANSFER_H
#define LAZYMIG_TRANSFER_H

#include <stdbool.h>
#include <sys/types.h>
#include <sys/uio.h>

#include "lazymig/kernel/lm.h"
#include "page_server/wire.h"

typedef _Atomic bool lm_flag;

/* Sends (receives) all, whether or not the socket blocks; looks at `cancel` at least every 100 ms.
 * 0, ECANCELED, EPIPE when the peer closed, or an errno. The iovecs are used up. */
int lm_send_all(int sock, struct iovec *iov, size_t n, lm_flag *cancel);
int lm_recv_all(int sock, void *buf, size_t len, lm_flag *cancel); /* EPIPE also amid the bytes */

/* For a thread that moves bulk data, after each piece of it: lets others have its processor, every few pieces.
 * A thread that wakes up is not always put before a running one of a lower priority: it may be ahead of its share, and
 * then nobody looks again until the next tick, 4 ms later. The process that is copied would stand still for as long. */
void lm_let_others(unsigned int *pieces);

/* Some other process's memory. */
typedef struct {
	pid_t pid;
	int mem; /* /proc/PID/mem: for what process_vm_readv and process_vm_writev may not touch */
} lm_target;

/* Reads the pages of up to LM_MAX_RANGES ranges one after another into buf, leaving out those that cannot be read:
 * `got` (room for as many entries as pages) says which are there, with these flags; `lost`, called with `arg`, is told
 * of each that is not. done: entries of got. err: ESRCH when the process ended, or what else is wrong with it. */
lm_result lm_read_pages(const lm_target *t, const lm_range *r, size_t n, uint32_t flags, uint8_t *buf,
			lm_bulk_range *got, void (*lost)(void *arg, uint64_t addr), void *arg);
/* Writes pages to these ranges (at most LM_MAX_RANGES). done: ranges written whole. */
lm_result lm_write_pages(const lm_target *t, const lm_bulk_range *r, size_t n, const uint8_t *buf);
bool lm_page_is_zero(const void *page);

/* Puts (addr, npages) at the end of a list of n, merging with the last one; returns the new n. */
size_t lm_append_range(lm_bulk_range *list, size_t n, uint64_t addr, uint32_t npages, uint32_t flags);

#endif
