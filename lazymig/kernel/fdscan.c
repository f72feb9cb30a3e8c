/* Reads descriptors in bulk: at the freeze every microsecond per descriptor counts. */
#define _GNU_SOURCE
#include "lazymig/kernel/fdscan.h"

#include <fcntl.h>
#include <linux/kcmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

/* Room that one path or one seq_file read may need. */
#define LM_FD_ROOM 4096u

/* Reads the whole fdinfo file; its length, -ENOBUFS, or -errno. */
static int64_t read_info(int dir, const char *name, char *buf, uint64_t room)
{
	int fd = openat(dir, name, O_RDONLY | O_CLOEXEC);
	uint64_t len = 0;

	if (fd < 0)
		return -errno;
	for (;;) {
		ssize_t n;

		if (room - len < LM_FD_ROOM) {
			close(fd);
			return -ENOBUFS;
		}
		n = read(fd, buf + len, room - len);
		if (n <= 0) {
			int64_t r = n < 0 ? -errno : (int64_t)len;

			close(fd);
			return r;
		}
		len += n;
	}
}

static int64_t scan_one(int fd_dir, int info_dir, lm_fd *f, char *buf, uint64_t at, uint64_t size)
{
	struct stat st;
	char name[16];
	ssize_t link;
	int64_t info;

	if (size - at < 2 * LM_FD_ROOM)
		return -ENOBUFS;
	snprintf(name, sizeof(name), "%d", f->fd);
	link = readlinkat(fd_dir, name, buf + at, LM_FD_ROOM);
	if (link < 0)
		return -errno;
	f->link = at;
	f->link_len = link;
	info = read_info(info_dir, name, buf + at + link, size - at - link);
	if (info < 0)
		return info;
	f->info = at + link;
	f->info_len = info;
	if (fstatat(fd_dir, name, &st, 0))
		return -errno;
	f->mode = st.st_mode;
	f->nlink = st.st_nlink;
	f->dev = st.st_dev;
	f->rdev = st.st_rdev;
	f->ino = st.st_ino;
	f->size = st.st_size;
	f->mtime_ns = st.st_mtim.tv_sec * 1000000000ull + st.st_mtim.tv_nsec;
	return link + info;
}

lm_result lm_fd_scan(int fd_dir, int info_dir, lm_fd *fds, uint64_t count, char *buf, uint64_t size)
{
	uint64_t at = 0;

	if (size > UINT32_MAX)
		return lm_fail(0, EINVAL);
	for (uint64_t i = 0; i < count; i++) {
		int64_t n = scan_one(fd_dir, info_dir, &fds[i], buf, at, size);

		if (n == -ENOBUFS)
			return lm_fail(i, ENOBUFS);
		fds[i].err = n < 0 ? -n : 0;
		at += n < 0 ? 0 : n;
	}
	return lm_ok(count);
}

static int order(const void *a, const void *b, void *pid)
{
	int p = *(int *)pid;
	long r = syscall(SYS_kcmp, p, p, KCMP_FILE, (long)*(const int32_t *)a, (long)*(const int32_t *)b);

	/* 1 is less, 2 greater; a descriptor that is closed meanwhile fails, and is seen later. */
	return r == 1 ? -1 : r > 0 ? 1 : *(const int32_t *)a - *(const int32_t *)b;
}

lm_result lm_fd_groups(int pid, int32_t *fds, int32_t *first, uint64_t count)
{
	qsort_r(fds, count, sizeof(*fds), order, &pid);
	for (uint64_t i = 0; i < count; i++) {
		/* Descriptors of one description are sorted by number, so the first of a run is the lowest. */
		first[i] = fds[i];
		if (i && syscall(SYS_kcmp, pid, pid, KCMP_FILE, (long)fds[i - 1], (long)fds[i]) == 0)
			first[i] = first[i - 1];
	}
	return lm_ok(count);
}
