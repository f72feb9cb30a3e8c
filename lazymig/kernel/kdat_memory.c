#define _GNU_SOURCE
#include "kdat_probes.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "pagemap.h"

/* What the system's headers may be too old for (linux/userfaultfd.h, fs.h, mman.h, pidfd.h). */
/* As lazymig/uffd/uffd.py has them: WP_ASYNC, WP_UNPOPULATED, PAGEFAULT_FLAG_WP. */
#define FEATURES_TRACK (1ull << 15 | 1ull << 13 | 1ull)
#define GUARD_INSTALL 102
#define PIDFD_SELF_GROUP (-10000) /* PIDFD_SELF_THREAD's number; means this process to process_madvise */
#define SOFT_DIRTY_BIT (1ull << 55)

char *lm_probe_pages(int n)
{
	char *p = mmap(NULL, n * LM_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	return p == MAP_FAILED ? NULL : p;
}

/* ---- userfaultfd ---- */

static int uffd_open(uint64_t features)
{
	struct uffdio_api api = {.api = UFFD_API, .features = features};
	/* Without UFFD_USER_MODE_ONLY: system calls of the moved program fault in the kernel too. */
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

	if (fd < 0)
		return -1;
	return ioctl(fd, UFFDIO_API, &api) ? -1 : fd;
}

static int uffd_register(int fd, void *start, uint64_t len, uint64_t mode)
{
	struct uffdio_register r = {.range = {(uint64_t)start, len}, .mode = mode};
	return ioctl(fd, UFFDIO_REGISTER, &r);
}

static int uffd_next(int fd, struct uffd_msg *msg)
{
	struct pollfd p = {fd, POLLIN, 0};

	if (poll(&p, 1, -1) < 0)
		return errno;
	return read(fd, msg, sizeof *msg) == sizeof *msg ? 0 : errno;
}

static void *kernel_fault(void *page)
{
	int fd = open("/proc/self/comm", O_RDONLY);
	return read(fd, page, 4) == 4 ? page : NULL;
}

/* A page missing in a system call's buffer stops the call, and the page that is put there lets it go on. */
static int try_userfaultfd(int arg)
{
	char *area = lm_probe_pages(1), *full = lm_probe_pages(1);
	struct uffdio_copy copy = {.dst = (uint64_t)area, .src = (uint64_t)full, .len = LM_PAGE};
	struct uffd_msg msg;
	pthread_t thread;
	void *answer;
	int err, fd = uffd_open(0);

	if (fd < 0)
		return errno;
	memset(full, 'x', LM_PAGE);
	if (uffd_register(fd, area, LM_PAGE, UFFDIO_REGISTER_MODE_MISSING))
		return errno;
	if ((err = pthread_create(&thread, NULL, kernel_fault, area)) || (err = uffd_next(fd, &msg)))
		return err;
	if (msg.event != UFFD_EVENT_PAGEFAULT)
		return WRONG;
	if (ioctl(fd, UFFDIO_COPY, &copy))
		return errno;
	pthread_join(thread, &answer);
	return answer && area[0] != 'x' && area[LM_PAGE - 1] == 'x' ? 0 : WRONG;
}

static struct {
	char *area, *elsewhere;
	int event;
} layout;

static void *change_layout(void *arg)
{
	pid_t pid;

	switch (layout.event) {
	case UFFD_EVENT_FORK:
		pid = fork();
		if (pid == 0)
			_exit(0);
		waitpid(pid, NULL, 0);
		break;
	case UFFD_EVENT_REMAP:
		mremap(layout.area, LM_PAGE, LM_PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, layout.elsewhere);
		break;
	case UFFD_EVENT_REMOVE:
		madvise(layout.area, LM_PAGE, MADV_DONTNEED);
		break;
	case UFFD_EVENT_UNMAP:
		munmap(layout.area, LM_PAGE);
		break;
	}
	return arg;
}

static int try_uffd_event(int event)
{
	static const uint64_t feature[] = {
		[UFFD_EVENT_FORK] = UFFD_FEATURE_EVENT_FORK,
		[UFFD_EVENT_REMAP] = UFFD_FEATURE_EVENT_REMAP,
		[UFFD_EVENT_REMOVE] = UFFD_FEATURE_EVENT_REMOVE,
		[UFFD_EVENT_UNMAP] = UFFD_FEATURE_EVENT_UNMAP,
	};
	struct uffd_msg msg;
	pthread_t thread;
	int err, fd = uffd_open(feature[event]);

	if (fd < 0)
		return errno;
	layout.area = lm_probe_pages(1);
	layout.elsewhere = lm_probe_pages(1);
	layout.event = event;
	if (uffd_register(fd, layout.area, LM_PAGE, UFFDIO_REGISTER_MODE_MISSING))
		return errno;
	if ((err = pthread_create(&thread, NULL, change_layout, NULL)) || (err = uffd_next(fd, &msg)))
		return err;
	pthread_join(thread, NULL);
	return msg.event == event ? 0 : WRONG;
}

static int try_uffd_shmem(int arg)
{
	char *full = lm_probe_pages(1);
	int fd = uffd_open(UFFD_FEATURE_MISSING_SHMEM), mem = memfd_create("lazymig-probe", MFD_CLOEXEC);

	if (fd < 0 || mem < 0 || ftruncate(mem, LM_PAGE))
		return errno;
	char *area = mmap(NULL, LM_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, mem, 0);
	struct uffdio_copy copy = {.dst = (uint64_t)area, .src = (uint64_t)full, .len = LM_PAGE};
	full[5] = 'x';
	if (area == MAP_FAILED || uffd_register(fd, area, LM_PAGE, UFFDIO_REGISTER_MODE_MISSING) ||
	    ioctl(fd, UFFDIO_COPY, &copy))
		return errno;
	return area[5] == 'x' ? 0 : WRONG;
}

/* ---- which pages changed ---- */

/* How many of the pages match, or -1 with errno. */
static int scan(char *area, int n, uint64_t flags, uint64_t category)
{
	lm_scan_query query = {.flags = flags, .mask = category, .returned = category};
	lm_range span = {(uint64_t)area, (uint64_t)area + n * LM_PAGE};
	lm_region found[8];
	uint64_t at = 0, addr = 0;
	int count = 0, fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return -1;
	lm_result r = lm_pagemap_scan(fd, &query, &span, 1, found, 8, &at, &addr);
	close(fd);
	for (uint64_t i = 0; i < r.done; i++)
		count += (found[i].end - found[i].start) / LM_PAGE;
	errno = r.err;
	return r.err ? -1 : count;
}

static int try_pagemap_scan(int arg)
{
	char *area = lm_probe_pages(4);

	area[2 * LM_PAGE] = 1;
	int n = scan(area, 4, 0, IS_PRESENT);
	if (n < 0)
		return errno;
	return n == 1 ? 0 : WRONG;
}

/* Tracks for real: nothing, then exactly the page written, and after arming again nothing. */
static int try_wp_async(int arg)
{
	char *area = lm_probe_pages(4);
	int n, fd = uffd_open(FEATURES_TRACK);

	if (fd < 0)
		return errno;
	memset(area, 1, 4 * LM_PAGE);
	if (uffd_register(fd, area, 4 * LM_PAGE, UFFDIO_REGISTER_MODE_WP))
		return errno;
	for (int round = 0; round < 2; round++) {
		if (scan(area, 4, SCAN_WP_MATCHING | SCAN_CHECK_WPASYNC, IS_WRITTEN) < 0)
			return errno;
		if ((n = scan(area, 4, 0, IS_WRITTEN)))
			return n < 0 ? errno : WRONG;
		area[2 * LM_PAGE] = 2 + round;
		if ((n = scan(area, 4, 0, IS_WRITTEN)) != 1)
			return n < 0 ? errno : WRONG;
	}
	return 0;
}

/* Memory that is not tracked is told of, instead of passing for clean. */
static int try_check_wpasync(int arg)
{
	char *area = lm_probe_pages(2);
	int fd = uffd_open(FEATURES_TRACK);

	if (fd < 0)
		return errno;
	memset(area, 1, 2 * LM_PAGE);
	if (uffd_register(fd, area, LM_PAGE, UFFDIO_REGISTER_MODE_WP) ||
	    scan(area, 1, SCAN_CHECK_WPASYNC, IS_WRITTEN) < 0)
		return errno;
	return scan(area, 2, SCAN_CHECK_WPASYNC, IS_WRITTEN) < 0 && errno == EPERM ? 0 : WRONG;
}

static int soft_dirty(const char *page)
{
	uint64_t entry = 0;
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	ssize_t n = pread(fd, &entry, sizeof entry, (uint64_t)page / LM_PAGE * sizeof entry);

	close(fd);
	return n == sizeof entry ? !!(entry & SOFT_DIRTY_BIT) : -1;
}

/* Writing clear_refs succeeds in kernels that track nothing, so only the bits themselves tell. */
static int try_soft_dirty(int arg)
{
	volatile char *area = lm_probe_pages(1);
	int before, fd = open("/proc/self/clear_refs", O_WRONLY | O_CLOEXEC);

	area[0] = 1;
	if (fd < 0 || write(fd, "4", 1) != 1 || (before = soft_dirty((char *)area)) < 0)
		return errno;
	area[0] = 2;
	return before == 0 && soft_dirty((char *)area) == 1 ? 0 : WRONG;
}

static int try_procmap_query(int arg)
{
	lm_vma one;
	int fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return errno;
	lm_result r = lm_vma_snapshot(fd, &one, 1);
	if (r.done)
		return one.end > one.start ? 0 : WRONG;
	return r.err ? r.err : WRONG;
}

/* ---- madvise, memfd, map_files ---- */

static int try_madvise_self(int arg)
{
	volatile char *area = lm_probe_pages(2);
	struct iovec v = {(void *)area, 2 * LM_PAGE};

	area[LM_PAGE] = 1;
	if (syscall(SYS_process_madvise, PIDFD_SELF_GROUP, &v, 1, MADV_DONTNEED, 0) < 0)
		return errno;
	return area[LM_PAGE] == 0 ? 0 : WRONG;
}

static int try_guard_install(int arg)
{
	char c, *area = lm_probe_pages(2);
	struct iovec here = {&c, 1}, there = {area, 1};

	if (madvise(area, LM_PAGE, GUARD_INSTALL))
		return errno;
	return process_vm_readv(getpid(), &here, 1, &there, 1, 0) < 0 && errno == EFAULT ? 0 : WRONG;
}

static int try_memfd(int arg)
{
	int fd = memfd_create("lazymig-probe", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (fd < 0 || ftruncate(fd, LM_PAGE) || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK))
		return errno;
	return fcntl(fd, F_GET_SEALS) == F_SEAL_SHRINK ? 0 : WRONG;
}

static int try_map_files(int arg)
{
	char path[80], *area = mmap(NULL, LM_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	if (area == MAP_FAILED)
		return errno;
	area[0] = 'x';
	snprintf(path, sizeof path, "/proc/self/map_files/%lx-%lx", (long)area, (long)area + (long)LM_PAGE);
	int fd = open(path, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		return errno;
	char *again = mmap(NULL, LM_PAGE, PROT_READ, MAP_SHARED, fd, 0);
	return again != MAP_FAILED && again[0] == 'x' ? 0 : WRONG;
}

const lm_probe_entry lm_memory_probes[] = {
	{"userfaultfd", try_userfaultfd, 0},
	{"uffd_wp_async", try_wp_async, 0},
	{"uffd_event_fork", try_uffd_event, UFFD_EVENT_FORK},
	{"uffd_event_remap", try_uffd_event, UFFD_EVENT_REMAP},
	{"uffd_event_remove", try_uffd_event, UFFD_EVENT_REMOVE},
	{"uffd_event_unmap", try_uffd_event, UFFD_EVENT_UNMAP},
	{"uffd_shmem", try_uffd_shmem, 0},
	{"pagemap_scan", try_pagemap_scan, 0},
	{"pagemap_check_wpasync", try_check_wpasync, 0},
	{"soft_dirty", try_soft_dirty, 0},
	{"procmap_query", try_procmap_query, 0},
	{"map_files", try_map_files, 0},
	{"process_madvise_self", try_madvise_self, 0},
	{"madvise_guard", try_guard_install, 0},
	{"memfd_create", try_memfd, 0},
	{NULL, NULL, 0},
};
