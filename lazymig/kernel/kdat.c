#define _GNU_SOURCE
#include "kdat.h"

#include <fcntl.h>
#include <linux/filter.h>
#include <linux/kcmp.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "kdat_probes.h"

/* What the system's headers may be too old for (linux/ptrace.h, prctl.h, asm/prctl.h). */
#define GET_RSEQ_CONFIGURATION 0x420f
#define SECCOMP_GET_FILTER 0x420c
#define O_SUSPEND_SECCOMP (1 << 21)
#define TIMER_CREATE_RESTORE_IDS 77
#define MAP_VDSO_64 0x2003

static pid_t helped; /* the probe's helper, for it to be reaped */

/* Forks a helper that does `prepare`, then sleeps until this process ends; returns when it is prepared. */
static pid_t helper(int (*prepare)(void *), void *arg)
{
	pid_t parent = getpid();
	int ready[2], err = 0;

	if (pipe(ready))
		return -1;
	pid_t pid = helped = fork();
	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (getppid() != parent)
			_exit(1);
		err = prepare ? prepare(arg) : 0;
		if (write(ready[1], &err, sizeof err) != sizeof err)
			_exit(1);
		for (;;)
			pause();
	}
	close(ready[1]);
	if (pid < 0 || read(ready[0], &err, sizeof err) != sizeof err)
		return -1;
	errno = err;
	return err ? -1 : pid;
}

/* ---- another process's memory and descriptors ---- */

static int try_process_vm(int writing)
{
	char *page = lm_probe_pages(1), word[4] = "abc";
	struct iovec here = {word, sizeof word}, there = {page, sizeof word};
	pid_t pid;

	memcpy(page, "xyz", 4);
	if ((pid = helper(NULL, NULL)) < 0)
		return errno;
	if (writing && process_vm_writev(pid, &here, 1, &there, 1, 0) != sizeof word)
		return errno;
	memset(word, 0, sizeof word);
	if (process_vm_readv(pid, &here, 1, &there, 1, 0) != sizeof word)
		return errno;
	return memcmp(word, writing ? "abc" : "xyz", sizeof word) ? WRONG : 0;
}

static int seize(pid_t pid)
{
	int status;

	if (pid < 0 || ptrace(PTRACE_SEIZE, pid, 0, PTRACE_O_EXITKILL) || ptrace(PTRACE_INTERRUPT, pid, 0, 0) ||
	    waitpid(pid, &status, __WALL) != pid)
		return errno;
	return WIFSTOPPED(status) && status >> 16 == PTRACE_EVENT_STOP ? 0 : WRONG;
}

/* Read-only memory of a traced process can be written (depends on proc_mem.force_override too). */
static int try_forced_write(int arg)
{
	char path[64], *page = lm_probe_pages(1), got[4] = "";
	struct iovec here = {got, sizeof got}, there = {page, sizeof got};
	int err, fd;

	memcpy(page, "xyz", 4);
	if (mprotect(page, LM_PAGE, PROT_READ))
		return errno;
	pid_t pid = helper(NULL, NULL);
	if ((err = seize(pid)))
		return err;
	snprintf(path, sizeof path, "/proc/%d/mem", pid);
	if ((fd = open(path, O_RDWR | O_CLOEXEC)) < 0 || pwrite(fd, "abc", 4, (off_t)page) != 4 ||
	    process_vm_readv(pid, &here, 1, &there, 1, 0) != sizeof got)
		return errno;
	return memcmp(got, "abc", 4) || memcmp(page, "xyz", 4) ? WRONG : 0;
}

static int try_pidfd_getfd(int arg)
{
	int pair[2];
	char c = 0;

	if (pipe(pair))
		return errno;
	pid_t pid = helper(NULL, NULL);
	int pidfd = pid < 0 ? -1 : syscall(SYS_pidfd_open, pid, 0);
	if (pidfd < 0)
		return errno;
	int theirs = syscall(SYS_pidfd_getfd, pidfd, pair[1], 0);
	if (theirs < 0 || write(theirs, "x", 1) != 1 || read(pair[0], &c, 1) != 1)
		return errno;
	return c == 'x' ? 0 : WRONG;
}

static int try_kcmp(int arg)
{
	int pair[2], same, other;
	pid_t me = getpid();

	if (pipe(pair))
		return errno;
	same = syscall(SYS_kcmp, me, me, KCMP_FILE, pair[0], dup(pair[0]));
	other = syscall(SYS_kcmp, me, me, KCMP_FILE, pair[0], pair[1]);
	if (same < 0 || other < 0)
		return errno;
	return same == 0 && other != 0 ? 0 : WRONG;
}

/* ---- ptrace ---- */

static int install_filter(void *arg)
{
	struct sock_filter allow[] = {BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
	struct sock_fprog prog = {1, allow};

	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &prog))
		return errno;
	return 0;
}

static int try_ptrace_seize(int arg)
{
	return seize(helper(NULL, NULL));
}

static int try_rseq_configuration(int arg)
{
	uint64_t configuration[4]; /* struct ptrace_rseq_configuration: 24 bytes so far */
	pid_t pid = helper(NULL, NULL);
	int err = seize(pid);

	if (err)
		return err;
	return ptrace(GET_RSEQ_CONFIGURATION, pid, sizeof configuration, configuration) < 0 ? errno : 0;
}

static int try_seccomp_get_filter(int arg)
{
	struct sock_filter got[4];
	pid_t pid = helper(install_filter, NULL);
	int err = seize(pid);

	if (err)
		return err;
	long n = ptrace(SECCOMP_GET_FILTER, pid, 0, got);
	if (n < 0)
		return errno;
	return n == 1 && got[0].k == SECCOMP_RET_ALLOW ? 0 : WRONG;
}

static int try_suspend_seccomp(int arg)
{
	pid_t pid = helper(install_filter, NULL);
	int err = seize(pid);

	if (err)
		return err;
	return ptrace(PTRACE_SETOPTIONS, pid, 0, PTRACE_O_EXITKILL | O_SUSPEND_SECCOMP) ? errno : 0;
}

/* ---- a process made to look like another ---- */

static int try_clone3_set_tid(int arg)
{
	/* Numbers that are seldom in use; one that is (EEXIST) proves nothing. */
	for (pid_t tid = 30011; tid > 29000; tid -= 97) {
		struct clone_args args = {.exit_signal = SIGCHLD, .set_tid = (uint64_t)&tid, .set_tid_size = 1};
		pid_t pid = syscall(SYS_clone3, &args, sizeof args);
		if (pid == 0)
			_exit(0);
		if (pid > 0)
			return waitpid(pid, NULL, 0) == pid && pid == tid ? 0 : WRONG;
		if (errno != EEXIST)
			return errno;
	}
	return EEXIST;
}

/* Sets this process's own values again; fields as in proc(5), /proc/PID/stat. */
static int try_set_mm_map(int arg)
{
	uint64_t field[53] = {0};
	char text[2048], *p;
	int i, fd = open("/proc/self/stat", O_RDONLY | O_CLOEXEC);
	ssize_t n = read(fd, text, sizeof text - 1);

	if (n <= 0)
		return errno;
	text[n] = 0;
	p = strrchr(text, ')');
	for (i = 3, p = p ? p + 4 : NULL; p && i < 52; p = strchr(p + 1, ' '))
		field[++i] = strtoull(p, NULL, 10);
	if (i < 51)
		return WRONG;
	struct prctl_mm_map map = {
		.start_code = field[26],
		.end_code = field[27],
		.start_data = field[45],
		.end_data = field[46],
		.start_brk = field[47],
		.brk = (uint64_t)sbrk(0),
		.start_stack = field[28],
		.arg_start = field[48],
		.arg_end = field[49],
		.env_start = field[50],
		.env_end = field[51],
		.exe_fd = -1,
	};
	return prctl(PR_SET_MM, PR_SET_MM_MAP, &map, sizeof map, 0) ? errno : 0;
}

/* Takes the vDSO and its data away and has the kernel put them back where they were. */
static int try_map_vdso(int arg)
{
#ifdef __x86_64__
	uint64_t start, end, first = 0, vdso = 0, again = 0;
	char line[512];
	FILE *maps = fopen("/proc/self/maps", "re");

	if (!maps)
		return errno;
	while (fgets(line, sizeof line, maps)) {
		if (sscanf(line, "%lx-%lx", &start, &end) != 2 || (!strstr(line, "[vvar") && !strstr(line, "[vdso]")))
			continue;
		first = first ? first : start;
		vdso = strstr(line, "[vdso]") ? start : vdso;
		if (munmap((void *)start, end - start))
			return errno;
	}
	if (!first)
		return WRONG;
	if (syscall(SYS_arch_prctl, MAP_VDSO_64, first) < 0)
		return errno;
	/* When the place is taken the kernel silently takes another. */
	rewind(maps);
	while (fgets(line, sizeof line, maps))
		if (strstr(line, "[vdso]") && sscanf(line, "%lx-%lx", &start, &end) == 2)
			again = start;
	return vdso && again == vdso ? 0 : WRONG;
#else
	return ENOSYS;
#endif
}

static int make_timer(int wanted)
{
	struct sigevent none = {.sigev_notify = SIGEV_NONE};
	int id = wanted;
	return syscall(SYS_timer_create, CLOCK_MONOTONIC, &none, &id) ? -1 : id;
}

static int try_timer_ids(int arg)
{
	if (prctl(TIMER_CREATE_RESTORE_IDS, 1, 0, 0, 0))
		return errno;
	int id = make_timer(37);
	if (id < 0)
		return errno;
	return id == 37 ? 0 : WRONG;
}

static int try_proc_timers(int arg)
{
	char text[256];
	int fd = open("/proc/self/timers", O_RDONLY | O_CLOEXEC);

	if (fd < 0 || make_timer(0) < 0)
		return errno;
	ssize_t n = read(fd, text, sizeof text);
	return n > 3 && !memcmp(text, "ID:", 3) ? 0 : WRONG;
}

static int try_capability(int number)
{
	char line[128];
	uint64_t effective = 0;
	FILE *status = fopen("/proc/self/status", "re");

	if (!status)
		return errno;
	while (fgets(line, sizeof line, status))
		if (sscanf(line, "CapEff: %lx", &effective) == 1)
			break;
	return effective >> number & 1 ? 0 : EPERM;
}

/* CAP_SYS_ADMIN stands for CAP_CHECKPOINT_RESTORE (40) wherever the kernel asks for that. */
static int try_checkpoint_restore(int arg)
{
	return try_capability(40) && try_capability(21) ? EPERM : 0;
}

static const lm_probe_entry process_probes[] = {
	{"cap_sys_ptrace", try_capability, 19},
	{"cap_checkpoint_restore", try_checkpoint_restore, 0},
	{"cap_sys_admin", try_capability, 21},
	{"process_vm_readv", try_process_vm, 0},
	{"process_vm_writev", try_process_vm, 1},
	{"proc_mem_forced_write", try_forced_write, 0},
	{"pidfd_getfd", try_pidfd_getfd, 0},
	{"kcmp", try_kcmp, 0},
	{"ptrace_seize", try_ptrace_seize, 0},
	{"ptrace_rseq_configuration", try_rseq_configuration, 0},
	{"ptrace_seccomp_filter", try_seccomp_get_filter, 0},
	{"ptrace_suspend_seccomp", try_suspend_seccomp, 0},
	{"clone3_set_tid", try_clone3_set_tid, 0},
	{"set_mm_map", try_set_mm_map, 0},
	{"map_vdso", try_map_vdso, 0},
	{"timer_restore_ids", try_timer_ids, 0},
	{"proc_timers", try_proc_timers, 0},
	{NULL, NULL, 0},
};

static const lm_probe_entry *find(const lm_probe_entry *list, const char *name)
{
	while (list->name && strcmp(list->name, name))
		list++;
	return list->name ? list : NULL;
}

/* In the probe's process. A helper is not left to an init that may not reap it. */
static void answer_with(const lm_probe_entry *probe, volatile int *answer)
{
	int status;

	*answer = probe->try(probe->arg);
	if (helped <= 0)
		return;
	kill(helped, SIGKILL);
	while (waitpid(helped, &status, __WALL) == helped && WIFSTOPPED(status))
		;
}

/* Waits for the child's end; 0, or an errno after having killed it. */
static int await(pid_t pid, uint64_t timeout_ns)
{
	struct timespec limit = {timeout_ns / 1000000000, timeout_ns % 1000000000};
	struct pollfd p = {syscall(SYS_pidfd_open, pid, 0), POLLIN, 0};
	int r, err = 0;

	if (p.fd < 0)
		err = errno;
	else if ((r = ppoll(&p, 1, &limit, NULL)) <= 0)
		err = r ? errno : ETIMEDOUT;
	if (err)
		kill(pid, SIGKILL);
	while (waitpid(pid, NULL, 0) < 0 && errno == EINTR)
		;
	if (p.fd >= 0)
		close(p.fd);
	return err;
}

lm_result lm_probe(const char *name, uint64_t timeout_ns)
{
	const lm_probe_entry *probe;

	if (!(probe = find(process_probes, name)) && !(probe = find(lm_memory_probes, name)))
		return lm_fail(0, ENOENT);
	volatile int *answer = mmap(NULL, LM_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (answer == MAP_FAILED)
		return lm_fail(0, errno);
	*answer = ECHILD;
	pid_t parent = getpid(), pid = fork();
	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (getppid() == parent)
			answer_with(probe, answer);
		_exit(0);
	}
	int err = pid < 0 ? errno : await(pid, timeout_ns);
	if (!err)
		err = *answer;
	munmap((void *)answer, LM_PAGE);
	return err ? lm_fail(0, err) : lm_ok(1);
}
