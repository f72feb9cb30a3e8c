/* userfaultfd(2): the ioctls, with the definitions that older system headers lack
 * (include/uapi/linux/userfaultfd.h of Linux 6.18). All return 0 or an errno. */
#ifndef LAZYMIG_UFFD_H
#define LAZYMIG_UFFD_H

#include "lazymig/kernel/lm.h"

/* cffi: begin */
int lm_uffd_api(int fd, uint64_t *features, uint64_t *ioctls);
int lm_uffd_register(int fd, uint64_t start, uint64_t len, uint64_t mode, uint64_t *ioctls);
/* Registers each range; those that could not be are written to `failed` (room for n), their number to done.
 * err is that of the last one that failed. */
lm_result lm_uffd_register_many(int fd, const lm_range *r, uint64_t n, uint64_t mode, lm_range *failed);
int lm_uffd_unregister(int fd, uint64_t start, uint64_t len);
int lm_uffd_wake(int fd, uint64_t start, uint64_t len);
/* done: bytes copied (zeroed), also when err is not 0. EAGAIN with done > 0: go on behind them. */
lm_result lm_uffd_copy(int fd, uint64_t dst, const void *src, uint64_t len, uint64_t mode);
lm_result lm_uffd_zeropage(int fd, uint64_t start, uint64_t len, uint64_t mode);
/* cffi: end */

#endif
