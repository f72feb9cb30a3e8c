/*
 * The keeper: a tiny process that is the parent of the moved process. It makes the husk, holds the userfaultfd
 * (so that a thread that needs a missing page waits, and never reads zeroes, when the worker dies), and reaps.
 *
 *   keeper CONTROL REGION COURIER        (descriptor numbers)
 *
 * CONTROL is a SOCK_SEQPACKET socket; every request is one `struct request` and is answered by one
 * `struct answer`. When it closes before COMMIT, the husk is killed: nothing of it stays on this host.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MAKE_HUSK = 1, HOLD = 2, COMMIT = 3, RELEASE = 4, KILL = 5, EXITED = 6 };

struct request {
	int32_t what, pid;
	uint64_t base, size; /* MAKE_HUSK: where the region goes */
};

struct answer {
	int32_t what, value; /* value: a pid, 0, -errno; EXITED: the wait status */
};

#define RSEQ_SIGNATURE 0x53053053
extern const ptrdiff_t __rseq_offset;
extern const unsigned int __rseq_size;

static int control, region, courier, held = -1;

/*
 * The husk: its memory is replaced by the tracer, so all it does is to give up what would outlive that (rseq
 * registration, descriptors), map the region and wait. The first word of the region tells how that went.
 */
static void husk(const struct request *q)
{
	char *thread = __builtin_thread_pointer();
	volatile int32_t *state;

	if (__rseq_size)
		syscall(SYS_rseq, thread + __rseq_offset, 32, 1, RSEQ_SIGNATURE);
	state = mmap((void *)q->base, q->size, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_SHARED | MAP_FIXED_NOREPLACE,
		     region, 0);
	if (state == MAP_FAILED)
		_exit(1);
	dup3(courier, 0, O_CLOEXEC);
	syscall(SYS_close_range, 1, ~0u, 0);
	*state = 1;
	for (;;)
		pause();
}

static int make_husk(const struct request *q)
{
	pid_t tid = q->pid;
	struct clone_args a = {
		.flags = CLONE_CLEAR_SIGHAND,
		.exit_signal = SIGCHLD,
		.set_tid = (uint64_t)&tid,
		.set_tid_size = 1,
	};
	long pid = syscall(SYS_clone3, &a, sizeof a);

	if (pid == 0)
		husk(q);
	return pid < 0 ? -errno : (int)pid;
}

static void answer(int32_t what, int32_t value)
{
	struct answer a = {what, value};
	send(control, &a, sizeof a, MSG_NOSIGNAL);
}

/* Receives a request and, with HOLD, a descriptor. Returns 0 when the other end is gone. */
static int receive(struct request *q)
{
	char room[CMSG_SPACE(sizeof(int))];
	struct iovec v = {q, sizeof *q};
	struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof room};
	ssize_t n = recvmsg(control, &m, MSG_CMSG_CLOEXEC);
	struct cmsghdr *c = n > 0 ? CMSG_FIRSTHDR(&m) : NULL;

	if (c && c->cmsg_type == SCM_RIGHTS) {
		if (held >= 0)
			close(held);
		memcpy(&held, CMSG_DATA(c), sizeof held);
	}
	return n == sizeof *q;
}

int main(int argc, char **argv)
{
	pid_t child = 0;
	int committed = 0, status, connected = 1, last = 0;
	sigset_t all, chld;

	if (argc != 4)
		return 2;
	control = atoi(argv[1]);
	region = atoi(argv[2]);
	courier = atoi(argv[3]);
	prctl(PR_SET_NAME, "lazymig-keeper");
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	setsid();
	/* The husk inherits the mask: no signal may act on it before it has its own. */
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, NULL);
	sigemptyset(&chld);
	sigaddset(&chld, SIGCHLD);
	int children = signalfd(-1, &chld, SFD_CLOEXEC | SFD_NONBLOCK);

	for (;;) {
		struct pollfd p[2] = {{children, POLLIN, 0}, {connected ? control : -1, POLLIN, 0}};
		struct signalfd_siginfo si;
		struct request q;
		pid_t pid;

		if (poll(p, 2, -1) < 0 && errno != EINTR)
			return 1;
		while (read(children, &si, sizeof si) > 0)
			;
		while ((pid = waitpid(-1, &status, WNOHANG | __WALL)) > 0) {
			if (pid != child)
				continue;
			last = status;
			child = 0;
			if (held >= 0)
				close(held);
			held = -1;
			if (connected)
				answer(EXITED, status);
		}
		/* Children of the moved process that outlive it are reaped too; the last one ends the keeper. */
		if (pid < 0 && errno == ECHILD && (committed || !connected))
			return WIFEXITED(last) ? WEXITSTATUS(last) : 128 + WTERMSIG(last);
		if (!(p[1].revents & (POLLIN | POLLHUP | POLLERR)))
			continue;
		if (!receive(&q)) {
			connected = 0;
			close(control);
			if (!committed && child)
				kill(child, SIGKILL);
			if (!child)
				return 0;
			continue;
		}
		int32_t value = 0;
		switch (q.what) {
		case MAKE_HUSK:
			value = make_husk(&q);
			if (value > 0)
				child = value;
			break;
		case COMMIT:
			committed = 1;
			close(region);
			close(courier);
			break;
		case RELEASE:
			if (held >= 0)
				close(held);
			held = -1;
			break;
		case KILL:
			if (child)
				kill(child, SIGKILL);
			break;
		}
		answer(q.what, value);
	}
}
