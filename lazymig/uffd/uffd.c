#define _GNU_SOURCE
#include "lazymig/uffd/uffd.h"

#include <linux/userfaultfd.h>
#include <sys/ioctl.h>

static int done_or_errno(int ret)
{
	return ret < 0 ? errno : 0;
}

int lm_uffd_api(int fd, uint64_t *features, uint64_t *ioctls)
{
	struct uffdio_api api = {.api = UFFD_API, .features = *features};
	int err = done_or_errno(ioctl(fd, UFFDIO_API, &api));

	*features = api.features;
	*ioctls = api.ioctls;
	return err;
}

int lm_uffd_register(int fd, uint64_t start, uint64_t len, uint64_t mode, uint64_t *ioctls)
{
	struct uffdio_register reg = {.range = {start, len}, .mode = mode};
	int err = done_or_errno(ioctl(fd, UFFDIO_REGISTER, &reg));

	*ioctls = reg.ioctls;
	return err;
}

lm_result lm_uffd_register_many(int fd, const lm_range *r, uint64_t n, uint64_t mode, lm_range *failed)
{
	lm_result result = {0};
	uint64_t i, ioctls;

	for (i = 0; i < n; i++) {
		int err = lm_uffd_register(fd, r[i].start, r[i].end - r[i].start, mode, &ioctls);

		if (err) {
			failed[result.done++] = r[i];
			result.err = err;
		}
	}
	return result;
}

int lm_uffd_unregister(int fd, uint64_t start, uint64_t len)
{
	struct uffdio_range range = {start, len};

	return done_or_errno(ioctl(fd, UFFDIO_UNREGISTER, &range));
}

int lm_uffd_wake(int fd, uint64_t start, uint64_t len)
{
	struct uffdio_range range = {start, len};

	return done_or_errno(ioctl(fd, UFFDIO_WAKE, &range));
}

lm_result lm_uffd_copy(int fd, uint64_t dst, const void *src, uint64_t len, uint64_t mode)
{
	struct uffdio_copy copy = {.dst = dst, .src = (uintptr_t)src, .len = len, .mode = mode};

	if (!ioctl(fd, UFFDIO_COPY, &copy))
		return lm_ok(len);
	return lm_fail(copy.copy > 0 ? (uint64_t)copy.copy : 0, errno);
}

lm_result lm_uffd_zeropage(int fd, uint64_t start, uint64_t len, uint64_t mode)
{
	struct uffdio_zeropage zero = {.range = {start, len}, .mode = mode};

	if (!ioctl(fd, UFFDIO_ZEROPAGE, &zero))
		return lm_ok(len);
	return lm_fail(zero.zeropage > 0 ? (uint64_t)zero.zeropage : 0, errno);
}
