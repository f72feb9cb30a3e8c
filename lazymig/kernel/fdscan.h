/* What /proc tells of many descriptors of a process, read in one go. */
#ifndef LAZYMIG_FDSCAN_H
#define LAZYMIG_FDSCAN_H

#include "lazymig/kernel/lm.h"

/* cffi: begin */
/* One descriptor: `fd` is given, the rest is filled in. Offsets and lengths are bytes of the scan's buffer. */
typedef struct {
	int32_t fd;
	int32_t err; /* why it could not be read (it was closed), or 0 */
	uint32_t link, link_len, info, info_len;
	uint32_t mode, nlink;
	uint64_t dev, rdev, ino, size, mtime_ns;
} lm_fd;

/*
 * Reads link, fdinfo and stat of each descriptor. `fd_dir` and `info_dir` are open on /proc/PID/fd and fdinfo.
 * done: how many were read; err ENOBUFS: the next one did not fit into what was left of the buffer.
 */
lm_result lm_fd_scan(int fd_dir, int info_dir, lm_fd *fds, uint64_t count, char *buf, uint64_t size);

/*
 * Sorts descriptor numbers of a process by the open file description behind them (kcmp(2)); `first[i]` becomes
 * the lowest number of those that share fds[i]'s. done: count.
 */
lm_result lm_fd_groups(int pid, int32_t *fds, int32_t *first, uint64_t count);
/* cffi: end */

#endif
