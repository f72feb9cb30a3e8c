/*
 * The holder: a tiny process that keeps the write tracking of another process alive between two commands. It has
 * the userfaultfd (the kernel forgets all registrations with the last descriptor), a pidfd of the tracked process,
 * to end when that does, and a memfd with what the tracker knows, which it never reads.
 *
 *   holder LISTEN UFFD PIDFD STATE LOCK DIRECTORY        (five descriptor numbers, a path)
 *
 * LISTEN is a listening SOCK_SEQPACKET socket, DIRECTORY/socket is its name; LOCK is DIRECTORY, locked (flock) for as
 * long as this process lives, so that what a killed holder leaves can be told from what is in use. It talks to one client at a time: the
 * connection is the lock that keeps two commands from scanning by turns. A client is greeted by one int32: 0, or
 * -errno when it is turned away. Every request is one int32 and is answered by one, 0 or -errno. PUT carries a memfd,
 * the answer to GET carries the three descriptors.
 *
 * The state is replaced whole, by a memfd that is complete when it comes: a client that is killed leaves either the
 * old state or the new one.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { GET = 1, PUT = 2, END = 3 };
/* The descriptors' numbers from here on; everything above is closed, but for clients. */
enum { LISTEN = 3, UFFD, PIDFD, STATE, LOCK, FDS };

static const char *directory;
static int client = -1;

static void answer(int to, int32_t value, int with_fds)
{
	int fds[3] = {UFFD, PIDFD, STATE};
	char room[CMSG_SPACE(sizeof fds)];
	struct iovec v = {&value, sizeof value};
	struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1};

	if (with_fds) {
		memset(room, 0, sizeof room);
		m.msg_control = room;
		m.msg_controllen = sizeof room;
		struct cmsghdr *c = CMSG_FIRSTHDR(&m);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(sizeof fds);
		memcpy(CMSG_DATA(c), fds, sizeof fds);
	}
	/* A client that is gone, or does not read, is its own loss: nothing here may wait for it. */
	sendmsg(to, &m, MSG_NOSIGNAL | MSG_DONTWAIT);
}

/* Ends the tracking: when this returns, the tracked process has no trace of it (but for a client's descriptor). */
static void end(void)
{
	char path[512];

	if (snprintf(path, sizeof path, "%s/socket", directory) < (int)sizeof path) {
		unlink(path);
		rmdir(directory);
	}
	close(LISTEN);
	close(UFFD);
}

static void hang_up(void)
{
	close(client);
	client = -1;
}

static void serve(void)
{
	int32_t what = 0;
	int got = -1;
	char room[CMSG_SPACE(sizeof(int))];
	struct iovec v = {&what, sizeof what};
	struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof room};
	ssize_t n = recvmsg(client, &m, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);

	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	struct cmsghdr *c = n > 0 ? CMSG_FIRSTHDR(&m) : NULL;
	if (c && c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS)
		memcpy(&got, CMSG_DATA(c), sizeof got);
	if (n != sizeof what) {
		hang_up();
	} else if (what == GET) {
		answer(client, 0, 1);
	} else if (what == PUT && got >= 0) {
		answer(client, dup3(got, STATE, O_CLOEXEC) < 0 ? -errno : 0, 0);
	} else if (what == END) {
		end();
		answer(client, 0, 0);
		_exit(0);
	} else {
		answer(client, -EINVAL, 0);
	}
	if (got >= 0)
		close(got);
}

static void admit(void)
{
	struct ucred who;
	socklen_t size = sizeof who;
	int fd = accept4(LISTEN, NULL, NULL, SOCK_CLOEXEC);

	if (fd < 0)
		return;
	/* A client that hung up before this one called counts as gone, also where poll(2) looked in between. */
	if (client >= 0) {
		struct pollfd p = {client, 0, 0};
		if (poll(&p, 1, 0) > 0)
			hang_up();
	}
	if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &who, &size) || (who.uid != 0 && who.uid != geteuid())) {
		answer(fd, -EACCES, 0);
		close(fd);
	} else if (client >= 0) {
		answer(fd, -EBUSY, 0);
		close(fd);
	} else {
		client = fd;
		answer(fd, 0, 0);
	}
}

int main(int argc, char **argv)
{
	sigset_t all, ends;
	int fds[FDS - LISTEN];

	if (argc != FDS - LISTEN + 2)
		return 2;
	/* Out of the way first: one that stands where another is to go must not be overwritten. */
	for (int i = 0; i < FDS - LISTEN; i++) {
		fds[i] = fcntl(atoi(argv[i + 1]), F_DUPFD_CLOEXEC, 64);
		if (fds[i] < 0)
			return 2;
	}
	for (int i = 0; i < FDS - LISTEN; i++)
		dup3(fds[i], LISTEN + i, O_CLOEXEC);
	syscall(SYS_close_range, FDS, ~0u, 0);
	directory = argv[FDS - LISTEN + 1];

	/* Nobody's child: the command that started it waits for this parent only, and may be killed any time. */
	switch (fork()) {
	case -1:
		return 3;
	case 0:
		break;
	default:
		_exit(0);
	}
	setsid();
	prctl(PR_SET_NAME, "lazymig-holder");
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, NULL);
	sigemptyset(&ends);
	sigaddset(&ends, SIGTERM);
	sigaddset(&ends, SIGINT);
	int signals = signalfd(-1, &ends, SFD_CLOEXEC | SFD_NONBLOCK);

	for (;;) {
		struct pollfd p[4] = {{client, POLLIN, 0}, {PIDFD, POLLIN, 0}, {signals, POLLIN, 0}, {LISTEN, POLLIN, 0}};

		if (poll(p, 4, -1) < 0 && errno != EINTR)
			break;
		if (p[1].revents || p[2].revents)
			break;
		if (p[0].revents)
			serve();
		if (p[3].revents)
			admit();
	}
	end();
	return 0;
}
