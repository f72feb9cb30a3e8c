/*
 * The keeper: a tiny process that is the parent of the moved process. It makes the husk, holds the userfaultfd
 * (so that a thread that needs a missing page waits, and never reads zeroes, when the worker dies), and reaps.
 *
 *   keeper CONTROL REGION COURIER [LISTEN PATH]        (descriptor numbers; where LISTEN is bound)
 *
 * CONTROL is a SOCK_SEQPACKET socket; every request is one `struct request` and is answered by one
 * `struct answer`. When it closes before COMMIT, the husk is killed: nothing of it stays on this host. When it closes
 * afterwards and before RELEASE, the next worker may connect to LISTEN: it is given all that is held, and goes on
 * from there as the one before.
 *
 * A keeper with LISTEN has a guard: a second process that holds the same and does nothing, so that whoever kills worker
 * and keeper together does not make the process read zeroes. The guard takes the keeper's place when that is killed,
 * but for being the parent; each makes itself another guard as soon as the one it had is gone.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MAKE_HUSK = 1, HOLD = 2, COMMIT = 3, RELEASE = 4, KILL = 5, EXITED = 6, LISTED = 7 };
/* What is held: the process's userfaultfd, that of a forked child, and the memory with the record of pages. */
enum { UFFD = 0, CHILD = 1, MEMORY = 2 };

struct request {
	int32_t what, pid;   /* HOLD: the role of the descriptor instead of a pid */
	uint64_t base, size; /* MAKE_HUSK: where the region goes */
};

/* lm_keep of uffd/lazy_record.h: a HOLD that is not answered, and what a new worker is told. */
struct keep {
	uint32_t what, role, tag, pad;
};

struct answer {
	int32_t what, value; /* value: a pid, 0, -errno; EXITED: the wait status */
};

#define RSEQ_SIGNATURE 0x53053053
extern const ptrdiff_t __rseq_offset;
extern const unsigned int __rseq_size;

struct held {
	uint32_t role;
	int fd;
};

static int control, region, courier, listener = -1, guard = -1;
static int committed, connected = 1, promoted; /* promoted: it was a guard, and is no parent */
static const char *path;
static struct held *held;
static size_t nheld, room;

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

static void hold(uint32_t role, int fd)
{
	size_t i;

	/* There is one of these; a new one takes the place of the old. */
	for (i = 0; role != CHILD && i < nheld; i++)
		if (held[i].role == role) {
			close(held[i].fd);
			held[i].fd = fd;
			return;
		}
	if (nheld == room) {
		struct held *p = realloc(held, (room ? 2 * room : 8) * sizeof(*held));

		if (!p) {
			/* The descriptor stays open, so nobody reads zeroes, but no other worker can have it. */
			return;
		}
		held = p;
		room = room ? 2 * room : 8;
	}
	held[nheld++] = (struct held){role, fd};
}

static void stop_listening(void)
{
	if (listener < 0)
		return;
	unlink(path);
	close(listener);
	listener = -1;
}

static void drop_all(void)
{
	while (nheld)
		close(held[--nheld].fd);
	stop_listening();
}

/* Receives a request, or a keep, which is shorter; `fd` is what came with it, or -1. Returns the size, 0 when the other
 * end is gone. */
static size_t receive(struct request *q, int *fd)
{
	union {
		struct cmsghdr align;
		char room[CMSG_SPACE(sizeof(int))];
	} in;
	struct iovec v = {q, sizeof *q};
	struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = &in, .msg_controllen = sizeof in};
	ssize_t n = recvmsg(control, &m, MSG_CMSG_CLOEXEC);
	struct cmsghdr *c = n > 0 ? CMSG_FIRSTHDR(&m) : NULL;

	*fd = -1;
	if (c && c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS)
		memcpy(fd, CMSG_DATA(c), sizeof *fd);
	return n == sizeof *q || n == sizeof(struct keep) ? (size_t)n : 0;
}

static int pass_on(int to, const struct keep *k, int fd)
{
	union {
		struct cmsghdr align;
		char room[CMSG_SPACE(sizeof(int))];
	} out = {0};
	struct iovec v = {(void *)k, sizeof *k};
	struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1};

	if (fd >= 0) {
		struct cmsghdr *c;

		m.msg_control = &out;
		m.msg_controllen = sizeof out;
		c = CMSG_FIRSTHDR(&m);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(c), &fd, sizeof fd);
	}
	return sendmsg(to, &m, MSG_NOSIGNAL | MSG_DONTWAIT) == sizeof *k ? 0 : -1;
}

static void tell_guard(uint32_t what, uint32_t role, int fd)
{
	struct keep k = {what, role, 0, 0};

	if (guard >= 0)
		pass_on(guard, &k, fd); /* one that cannot take it now lacks it; so do many that are needed at once */
}

/* Gives a new worker all that is held; -1 when it went away. */
static int hand_over(int to)
{
	struct keep end = {LISTED, 0, (uint32_t)nheld, 0};
	size_t i;

	for (i = 0; i < nheld; i++) {
		struct keep k = {HOLD, held[i].role, 0, 0};

		if (pass_on(to, &k, held[i].fd))
			return -1;
	}
	return pass_on(to, &end, -1);
}

/* Not before commit: the husk would inherit it. */
static void settle_in(void)
{
	struct rlimit files;
	int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);

	/* It is small, and whoever kills it breaks the process it keeps. */
	if (fd >= 0) {
		if (write(fd, "-900", 4) < 0)
			errno = 0;
		close(fd);
	}
	if (!getrlimit(RLIMIT_NOFILE, &files)) {
		files.rlim_cur = files.rlim_max;
		setrlimit(RLIMIT_NOFILE, &files);
	}
}

/* Whether any process is left whose pages may be missing. Nothing is registered down there: ENOMEM tells of the end. */
static int needed(void)
{
	struct uffdio_range r = {4096, 4096};
	size_t i;

	for (i = 0; i < nheld; i++)
		if (held[i].role != MEMORY && (ioctl(held[i].fd, UFFDIO_UNREGISTER, &r) == 0 || errno != ENOMEM))
			return 1;
	return 0;
}

/* The directory of LISTEN is its owner's only; this is for one that somebody opened to others since. */
static int same_user(int fd)
{
	struct ucred peer;
	socklen_t size = sizeof peer;

	return !getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) && (peer.uid == 0 || peer.uid == geteuid());
}

static int serve(pid_t child);

/* Waits for the end of the keeper at the other end of `from`, and goes on in its place. */
static int stand_by(int from)
{
	struct request q;
	int fd;

	prctl(PR_SET_NAME, "lazymig-guard");
	setsid();
	control = from;
	while (receive(&q, &fd)) {
		if (q.what == HOLD && fd >= 0)
			hold((uint32_t)q.pid, fd);
		else if (q.what == RELEASE)
			return 0;
		else if (q.what == COMMIT) {
			committed = 1;
			settle_in();
		}
	}
	close(control);
	if (!committed)
		return 0; /* nothing runs, and nothing will */
	prctl(PR_SET_NAME, "lazymig-keeper");
	promoted = 1;
	connected = 0;
	return serve(0);
}

/* Starts a guard, which is nobody's child here: the last child's end is the keeper's. */
static void start_guard(void)
{
	int s[2];
	pid_t pid;

	if (guard >= 0)
		close(guard);
	guard = -1;
	if (listener < 0 || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, s))
		return;
	prctl(PR_SET_CHILD_SUBREAPER, 0);
	pid = fork();
	if (pid == 0) {
		if (fork())
			_exit(0);
		close(s[0]);
		if (connected)
			close(control);
		if (!committed) {
			close(region);
			close(courier);
		}
		_exit(stand_by(s[1]));
	}
	close(s[1]);
	guard = s[0];
	if (pid > 0)
		waitpid(pid, NULL, 0);
	prctl(PR_SET_CHILD_SUBREAPER, 1);
}

static int serve(pid_t child)
{
	int status, last = 0;
	sigset_t chld;

	sigemptyset(&chld);
	sigaddset(&chld, SIGCHLD);
	int children = signalfd(-1, &chld, SFD_CLOEXEC | SFD_NONBLOCK);

	start_guard();
	for (;;) {
		struct pollfd p[4] = {{children, POLLIN, 0},
				      {connected ? control : -1, POLLIN, 0},
				      {committed ? listener : -1, POLLIN, 0},
				      {guard, POLLIN, 0}};
		struct signalfd_siginfo si;
		struct request q = {0};
		size_t got;
		pid_t pid;
		int fd;

		if (poll(p, 4, promoted ? 1000 : -1) < 0 && errno != EINTR)
			return 1;
		while (read(children, &si, sizeof si) > 0)
			;
		while ((pid = waitpid(-1, &status, WNOHANG | __WALL)) > 0) {
			if (pid != child)
				continue;
			last = status;
			child = 0;
			if (connected)
				answer(EXITED, status);
		}
		/* Children of the moved process that outlive it are reaped too; the last one ends the keeper. */
		if (promoted ? !needed() : pid < 0 && errno == ECHILD && (committed || !connected)) {
			tell_guard(RELEASE, 0, -1);
			stop_listening();
			return WIFEXITED(last) ? WEXITSTATUS(last) : 128 + WTERMSIG(last);
		}
		if (p[3].revents)
			start_guard();
		if (p[2].revents) {
			int next = accept4(listener, NULL, NULL, SOCK_CLOEXEC);

			if (next >= 0 && (connected || !same_user(next) || hand_over(next))) {
				close(next); /* there is a worker already */
			} else if (next >= 0) {
				control = next;
				connected = 1;
			}
			continue;
		}
		if (!(p[1].revents & (POLLIN | POLLHUP | POLLERR)))
			continue;
		got = receive(&q, &fd);
		if (!got) {
			connected = 0;
			close(control);
			if (!committed && child)
				kill(child, SIGKILL);
			if (!child && !committed) {
				stop_listening();
				return 0;
			}
			continue;
		}
		if (q.what == HOLD && fd >= 0) {
			hold((uint32_t)q.pid, fd);
			tell_guard(HOLD, (uint32_t)q.pid, fd);
		}
		if (got != sizeof q)
			continue;
		int32_t value = 0;
		switch (q.what) {
		case MAKE_HUSK:
			value = make_husk(&q);
			if (value > 0)
				child = value;
			break;
		case COMMIT:
			committed = 1;
			tell_guard(COMMIT, 0, -1);
			close(region);
			close(courier);
			settle_in();
			break;
		case RELEASE:
			tell_guard(RELEASE, 0, -1);
			drop_all();
			if (guard >= 0)
				close(guard);
			guard = -1;
			break;
		case KILL:
			if (child)
				kill(child, SIGKILL);
			break;
		}
		answer(q.what, value);
	}
}

int main(int argc, char **argv)
{
	sigset_t all;

	if (argc != 4 && argc != 6)
		return 2;
	control = atoi(argv[1]);
	region = atoi(argv[2]);
	courier = atoi(argv[3]);
	if (argc == 6) {
		listener = atoi(argv[4]);
		path = argv[5];
		fcntl(listener, F_SETFD, FD_CLOEXEC);
	}
	prctl(PR_SET_NAME, "lazymig-keeper");
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	setsid();
	/* The husk inherits the mask: no signal may act on it before it has its own. */
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, NULL);
	return serve(0);
}
