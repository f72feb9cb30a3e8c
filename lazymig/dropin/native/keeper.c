/*
 * The drop-in's keeper: holds what must outlive the lazy-pages daemon, and hands it to the next one.
 *
 *   keeper CONTROL LISTEN PATH        (two descriptor numbers; where LISTEN is bound)
 *
 * A userfaultfd whose last descriptor is closed lets its process read zeroes, and CRIU's dump takes the end of its
 * connection for success and kills the original. So when the daemon dies, both stay open here, until another daemon
 * connects to LISTEN. CONTROL and what is accepted from LISTEN are SOCK_SEQPACKET; every message is a `struct keep`,
 * with a descriptor where it says so.
 *
 * Whether the processes run is known by the daemon's COMMIT, or, when that died before, by what CRIU's restore sends
 * at its end. If that never comes, nothing runs here: the connection to the source is reset, so that CRIU lets the
 * original go on.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

enum { HOLD = 1, COMMIT = 2, DROP = 3, END = 4, ABORT = 5, LISTED = 6 };
enum { UFFD = 1, CHILD = 2, MEMORY = 3, SERVER = 4, RESTORE = 5 };
#define RESTORE_FINISHED 0x52535446

struct keep {
	uint32_t what, role, tag, pad;
};

struct held {
	uint32_t role, tag;
	int fd;
};

static struct held *held;
static size_t nheld, room;
static int committed;

static void hold(uint32_t role, uint32_t tag, int fd)
{
	size_t i;

	/* There is one of these; a new connection takes the place of a broken one. */
	for (i = 0; role >= MEMORY && i < nheld; i++)
		if (held[i].role == role) {
			close(held[i].fd);
			held[i].fd = fd;
			return;
		}
	if (nheld == room) {
		room = room ? 2 * room : 64;
		held = realloc(held, room * sizeof(*held));
		if (!held)
			_exit(1);
	}
	held[nheld++] = (struct held){role, tag, fd};
}

/* All pages of this process are there. */
static void drop(uint32_t tag)
{
	size_t i, n = 0;

	for (i = 0; i < nheld; i++) {
		if (held[i].role <= CHILD && held[i].tag == tag)
			close(held[i].fd);
		else
			held[n++] = held[i];
	}
	nheld = n;
}

static int find(uint32_t role)
{
	size_t i;

	for (i = 0; i < nheld; i++)
		if (held[i].role == role)
			return held[i].fd;
	return -1;
}

/* A message, and the descriptor that came with it, or -1. Returns recvmsg's result. */
static ssize_t receive(int from, void *message, size_t size, int *fd)
{
	union {
		struct cmsghdr align;
		char room[CMSG_SPACE(sizeof(int))];
	} control;
	struct iovec v = {message, size};
	struct msghdr m = {
		.msg_iov = &v, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)};
	ssize_t n = recvmsg(from, &m, MSG_CMSG_CLOEXEC);
	struct cmsghdr *c = n > 0 ? CMSG_FIRSTHDR(&m) : NULL;

	*fd = -1;
	if (c && c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS)
		memcpy(fd, CMSG_DATA(c), sizeof(*fd));
	return n;
}

static int pass_on(int to, const struct keep *k, int fd)
{
	union {
		struct cmsghdr align;
		char room[CMSG_SPACE(sizeof(int))];
	} control = {0};
	struct iovec v = {(void *)k, sizeof(*k)};
	struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1};
	struct cmsghdr *c;

	if (fd >= 0) {
		m.msg_control = &control;
		m.msg_controllen = sizeof(control);
		c = CMSG_FIRSTHDR(&m);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(c), &fd, sizeof(fd));
	}
	return sendmsg(to, &m, MSG_NOSIGNAL) == sizeof(*k) ? 0 : -1;
}

/* Tells a new daemon of everything. */
static int hand_over(int to)
{
	struct keep end = {LISTED, (uint32_t)committed, (uint32_t)nheld, 0};
	size_t i;

	for (i = 0; i < nheld; i++) {
		struct keep k = {HOLD, held[i].role, held[i].tag, 0};

		if (pass_on(to, &k, held[i].fd))
			return -1;
	}
	return pass_on(to, &end, -1);
}

/* What the end of the source's connection is to be: CRIU takes a reset, unlike a mere end, for a failure, and lets the
 * original go on. It is one from the beginning, until the processes run here. */
static void reset_server(int on)
{
	struct linger how = {on, 0};
	int fd = find(SERVER);

	if (fd >= 0)
		setsockopt(fd, SOL_SOCKET, SO_LINGER, &how, sizeof(how));
}

static void commit(void)
{
	committed = 1;
	reset_server(0);
}

/* 0: go on; 1: the keeper is not needed any more; -1: the connection is gone. */
static int serve(int control)
{
	struct keep k;
	int fd;

	if (receive(control, &k, sizeof(k), &fd) != sizeof(k))
		return -1;
	switch (k.what) {
	case HOLD:
		if (fd >= 0)
			hold(k.role, k.tag, fd);
		break;
	case COMMIT:
		commit();
		break;
	case DROP:
		drop(k.tag);
		break;
	case ABORT:
		reset_server(1);
		return 1;
	case END:
		return 1;
	}
	return 0;
}

/* Reads what CRIU's restore still sends when no daemon does. -1: it has failed. */
static int follow_restore(void)
{
	static int32_t pid;
	int32_t word = 0;
	int fd;
	ssize_t n = receive(find(RESTORE), &word, sizeof(word), &fd);

	if (n < 0 && errno == EINTR)
		return 0;
	if (n <= 0)
		return -1;
	if (fd >= 0)
		hold(UFFD, (uint32_t)pid, fd);
	else if (n == sizeof(word) && (uint32_t)word == RESTORE_FINISHED)
		commit();
	else
		pid = word;
	return 0;
}

/* Whether any process still lives whose pages are missing. */
static int anybody(void)
{
	size_t i;

	for (i = 0; i < nheld; i++) {
		/* Nothing is registered down there: ENOMEM only tells that the address space is gone. */
		struct uffdio_range r = {0x1000, 0x1000};

		if (held[i].role <= CHILD && (!ioctl(held[i].fd, UFFDIO_UNREGISTER, &r) || errno != ENOMEM))
			return 1;
	}
	return 0;
}

static void settle_in(void)
{
	struct rlimit files;
	sigset_t all;
	int fd;

	prctl(PR_SET_NAME, "lazymig-keeper");
	setsid();
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, NULL);
	if (!getrlimit(RLIMIT_NOFILE, &files)) {
		files.rlim_cur = files.rlim_max;
		setrlimit(RLIMIT_NOFILE, &files);
	}
	/* It is small, and whoever kills it breaks the processes it keeps. */
	fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
	if (fd >= 0) {
		if (write(fd, "-900", 4) < 0)
			errno = 0;
		close(fd);
	}
}

int main(int argc, char **argv)
{
	int control, listener, done = 0;

	if (argc != 4)
		return 2;
	control = atoi(argv[1]);
	listener = atoi(argv[2]);
	settle_in();
	while (!done) {
		struct pollfd p[3] = {
			{control, POLLIN, 0},
			{listener, POLLIN, 0},
			{control < 0 && !committed ? find(RESTORE) : -1, POLLIN, 0},
		};
		int n = poll(p, 3, control < 0 ? 1000 : -1);

		if (n < 0 && errno != EINTR)
			break;
		if (n <= 0) {
			done = control < 0 && committed && !anybody();
			continue;
		}
		if (p[0].revents) {
			done = serve(control);
			if (done < 0) {
				close(control);
				control = -1;
				done = find(RESTORE) < 0;
			}
		}
		if (p[2].revents && follow_restore() < 0) {
			reset_server(1);
			done = 1;
		}
		if (p[1].revents) {
			int next = accept4(listener, NULL, NULL, SOCK_CLOEXEC);

			if (next >= 0 && (control >= 0 || hand_over(next)))
				close(next); /* there is a daemon already */
			else if (next >= 0)
				control = next;
		}
	}
	unlink(argv[3]);
	return 0;
}
