/* Damaged and made-up streams for the C that speaks CRIU's page protocol, built with AddressSanitizer and UBSan: what a
 * page server gets, pushed or asked for, and what the fetcher of lazy pages is answered. Whatever comes, no page outside
 * of what was pending is written, none outside of what is served is told, and what is noted of pushed pages is sound.
 *
 *   fuzz_criu SEED ROUNDS
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "fuzz_stream.h"
#include "lazymig/uffd/fault_wire.h"
#include "lazymig/uffd/lazy.h"
#include "lazymig/uffd/uffd.h"
#include "page_server/criu_pull.h"
#include "page_server/criu_session.h"

#define PID 77u
#define IMAGE 0x4d01u
#define TASKS 2u

static int image; /* a file with as many pages of the pattern as the memory */

static uint64_t some_pages(void)
{
	static const uint64_t odd[] = {0, LM_PS_MAX_PAGES, LM_PS_MAX_PAGES + 1, UINT32_MAX, 1ull << 35, UINT64_MAX};

	return dice(15) ? 1 + dice(4) : odd[dice(sizeof(odd) / sizeof(*odd))];
}

static void put_pages(uint64_t n)
{
	n = n > 8 ? 8 : n;
	if (used + n * LM_PAGE > ROOM)
		return;
	memset(stream + used, PATTERN, n * LM_PAGE);
	used += n * LM_PAGE;
}

static void put_message(const lm_ps_iov *m, size_t width)
{
	uint8_t out[LM_PS_WIDE];

	lm_ps_encode(m, width, out);
	put(out, width);
}

/* --- the server: pages are pushed, and asked for --- */

static void messages(size_t width)
{
	static const uint32_t commands[] = {LM_PS_ADD, LM_PS_HOLE, LM_PS_ADD_F, LM_PS_GET, LM_PS_GET};
	uint64_t n = dice(30), vaddr = page_at(GUARD);

	if (dice(4)) {
		lm_ps_iov open = {LM_PS_OPEN2, 0, 0, 0, IMAGE};

		put_message(&open, width);
	}
	while (n--) {
		uint32_t command = dice(25) ? commands[dice(5)] : (uint32_t)dice(1 << 16);
		uint32_t flags = dice(8) ? (uint32_t[]){LM_PE_PARENT, LM_PE_LAZY, LM_PE_PRESENT, 6}[dice(4)]
					 : (uint32_t)dice(1 << 16);
		lm_ps_iov m = {command, 0, some_pages(), dice(4) ? vaddr : some_address(), IMAGE};

		if (command == LM_PS_GET)
			m.dst_id = dice(10) ? PID : dice(UINT32_MAX);
		else if (!dice(20))
			m.dst_id = dice(UINT32_MAX);
		if (command == LM_PS_ADD_F || !dice(10))
			m.cmd = LM_PS_MAKE(command, flags);
		put_message(&m, width);
		if (command == LM_PS_ADD || (command == LM_PS_ADD_F && flags & LM_PE_PRESENT))
			put_pages(m.nr_pages);
		vaddr = m.vaddr + m.nr_pages * LM_PAGE;
	}
	if (dice(2))
		put_message(&(lm_ps_iov){.cmd = LM_PS_CLOSE}, width);
}

struct told {
	int fd;
	uint64_t bytes, odd;
};

/* Whatever is answered holds nothing but heads and the served file's bytes; heads hold what was asked. */
static void *reader(void *arg)
{
	struct told *t = arg;
	uint8_t in[65536];
	ssize_t n, i;

	while ((n = recv(t->fd, in, sizeof(in), 0)) > 0) {
		t->bytes += (uint64_t)n;
		for (i = 0; i < n; i++)
			t->odd += in[i] != PATTERN;
	}
	return NULL;
}

static void server(void)
{
	/* In two parts, and a hole between. */
	lm_piece pieces[2] = {{page_at(GUARD), page_at(GUARD + 9), GUARD * LM_PAGE, 0, LM_PE_PRESENT},
			      {page_at(GUARD + 20), page_at(GUARD + INSIDE), (GUARD + 20) * LM_PAGE, 0, LM_PE_PRESENT}};
	size_t width = dice(2) ? LM_PS_WIDE : LM_PS_NARROW;
	uint64_t received, sent, n, i, end = 0, at = 0;
	const lm_entry *e;
	struct told told = {0};
	struct stat st;
	pthread_t w, r;
	lm_ps_iov m;
	int s[2], pages = memfd_create("pages", MFD_CLOEXEC), err;
	lm_ps *p;

	used = 0;
	messages(width);
	damage();
	connection(s);
	fcntl(s[0], F_SETFL, O_NONBLOCK);
	p = lm_ps_new(s[0]);
	CHECK(!lm_ps_serve(p, PID, pieces, 2, &image, 1));
	told.fd = s[1];
	pthread_create(&w, NULL, writer, &s[1]);
	pthread_create(&r, NULL, reader, &told);
	while (!(err = lm_ps_step(p, &m))) {
		/* As the Python above it does: an image that is named is opened. */
		if (LM_PS_CMD(m.cmd) == LM_PS_OPEN2 || LM_PS_CMD(m.cmd) == LM_PS_OPEN) {
			CHECK(!ftruncate(pages, 0));
			lm_ps_receive(p, m.dst_id, pages);
			if (lm_ps_answer(p, "\xa5", 1))
				break;
		} else if (LM_PS_CMD(m.cmd) == LM_PS_CLOSE || dice(2)) {
			break;
		}
	}
	n = lm_ps_received(p, &e);
	CHECK(!fstat(pages, &st));
	for (i = 0; i < n; i++) {
		CHECK(e[i].start >= end && e[i].end > e[i].start && e[i].end <= 1ull << 47);
		CHECK(!((e[i].start | e[i].end) % LM_PAGE));
		end = e[i].end;
		if (!(e[i].flags & LM_PE_PRESENT))
			continue;
		CHECK(e[i].offset == at);
		at += e[i].end - e[i].start;
		/* Of the last one the peer may owe some. */
		CHECK(i == n - 1 || at <= (uint64_t)st.st_size);
	}
	lm_ps_counts(p, &received, &sent);
	CHECK(received <= used / LM_PAGE);
	lm_ps_free(p);
	shutdown(s[0], SHUT_RDWR);
	close(s[0]);
	shutdown(s[1], SHUT_RD);
	pthread_join(w, NULL);
	pthread_join(r, NULL);
	CHECK(told.odd <= 30 * LM_PS_WIDE); /* the heads */
	CHECK(told.bytes <= sent * LM_PAGE + 31 * LM_PS_WIDE);
	close(s[1]);
	close(pages);
}

/* --- the fetcher: what a server answers --- */

struct answering {
	int fd;
	size_t width;
	uint64_t seed;
};

static int send_whole(int fd, const void *data, size_t n)
{
	size_t at = 0;

	while (at < n) {
		ssize_t done = send(fd, (const char *)data + at, n - at, MSG_NOSIGNAL);

		if (done <= 0)
			return 0;
		at += (size_t)done;
	}
	return 1;
}

/* Answers what is asked, until it does something wrong, which it does soon. */
static void *answer(void *arg)
{
	struct answering *a = arg;
	uint8_t in[LM_PS_WIDE], page[LM_PAGE], noise[64];
	uint64_t i;

	memset(page, PATTERN, sizeof(page));
	for (;;) {
		lm_ps_iov m;

		if (recv(a->fd, in, a->width, MSG_WAITALL) != (ssize_t)a->width)
			break;
		m = lm_ps_decode(in, a->width);
		CHECK(m.cmd != LM_PS_GET || lm_ps_range_ok(&m));
		m.cmd = LM_PS_MAKE(LM_PS_ADD_F, LM_PE_PRESENT);
		if (!roll(&a->seed, 3) && m.nr_pages > 1)
			m.nr_pages = 1 + roll(&a->seed, m.nr_pages);
		switch (roll(&a->seed, 60)) {
		case 0:
			m.vaddr += LM_PAGE * (roll(&a->seed, 200) - 100);
			break;
		case 1:
			m.nr_pages = roll(&a->seed, 3) ? m.nr_pages + 1 : (uint64_t[]){0, UINT32_MAX, UINT64_MAX}[roll(&a->seed, 3)];
			break;
		case 2:
			m.dst_id += 1;
			break;
		case 3:
			m.cmd = (uint32_t)roll(&a->seed, UINT32_MAX);
			break;
		case 4:
			for (i = 0; i < sizeof(noise); i++)
				noise[i] = (uint8_t)roll(&a->seed, 256);
			send_whole(a->fd, noise, roll(&a->seed, sizeof(noise)));
			break;
		case 5:
			goto out;
		}
		lm_ps_encode(&m, a->width, in);
		if (!roll(&a->seed, 40)) { /* the end amid a head */
			send_whole(a->fd, in, roll(&a->seed, a->width));
			break;
		}
		if (!send_whole(a->fd, in, roll(&a->seed, 80) ? a->width : roll(&a->seed, a->width)))
			break;
		for (i = 0; i < m.nr_pages && i < 2048; i++)
			if (!send_whole(a->fd, page, roll(&a->seed, 500) ? LM_PAGE : roll(&a->seed, LM_PAGE)))
				goto out;
	}
out:
	shutdown(a->fd, SHUT_RDWR);
	return NULL;
}

static void *loop(void *arg)
{
	lm_lazy_run(arg, 0);
	return NULL;
}

struct running {
	lm_pull *p;
	int err;
};

static void *pull(void *arg)
{
	struct running *r = arg;

	r->err = lm_pull_run(r->p);
	return NULL;
}

/* A peer that has nothing more to say, and does not end either, is waited for: so it ends. */
static void *hang_up(void *arg)
{
	usleep(5000);
	shutdown(*(int *)arg, SHUT_WR);
	return NULL;
}

/* Threads of the process whose pages are missing; they wait where one never comes. */
static void *toucher(void *arg)
{
	uint64_t from = (uintptr_t)arg, i;
	volatile uint8_t *m = memory;

	for (i = 0; i < INSIDE; i++)
		(void)m[(GUARD + (from + i * 7) % INSIDE) * LM_PAGE];
	return NULL;
}

static void fetcher(void)
{
	uint64_t ignored, features = UFFD_FEATURE_THREAD_ID, i;
	int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK), done = eventfd(0, EFD_NONBLOCK), s[2], f[2];
	lm_range inside = {page_at(GUARD), page_at(GUARD + INSIDE)};
	lm_piece local = {page_at(GUARD + 40), page_at(GUARD + 48), (GUARD + 40) * LM_PAGE, 0, LM_PE_PRESENT};
	int with_images = !dice(3), again, err;
	struct answering a = {0, dice(2) ? LM_PS_WIDE : LM_PS_NARROW, dice(UINT32_MAX)};
	lm_pull_record *record = calloc(1, sizeof(*record));
	struct running run = {0};
	pthread_t t, w, q, h, touch;
	lm_lazy *z;

	CHECK(!lm_uffd_api(uffd, &features, &ignored));
	madvise(memory, ALL * LM_PAGE, MADV_DONTNEED);
	z = lm_lazy_new(uffd, done);
	CHECK(!lm_lazy_arm(z, &inside, 1, &inside, 1).err);
	CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, f));
	CHECK(!lm_lazy_attach(z, f[0]));
	pthread_create(&t, NULL, loop, z);
	pthread_create(&touch, NULL, toucher, (void *)(uintptr_t)dice(INSIDE));
	connection(s);
	fcntl(s[0], F_SETFL, O_NONBLOCK);
	a.fd = s[1];
	pthread_create(&w, NULL, answer, &a);
	run.p = lm_pull_new(s[0], a.width == LM_PS_WIDE, record);
	CHECK(!lm_pull_begin(run.p));
	CHECK(!lm_pull_add(run.p, z, PID, f[1], &inside, 1, &local, (uint64_t)with_images, &image, 1));
	if (dice(4))
		lm_pull_background(run.p);
	pthread_create(&q, NULL, pull, &run);
	usleep((useconds_t)dice(5000));
	again = (int)dice(2);
	if (again)
		lm_pull_stop(run.p);
	else
		shutdown(s[1], SHUT_RDWR);
	pthread_join(q, NULL);
	lm_pull_free(run.p);
	if (again) { /* somebody else takes over what is in flight */
		run.p = lm_pull_new(s[0], a.width == LM_PS_WIDE, record);
		CHECK(!lm_pull_add(run.p, z, PID, f[1], &inside, 1, &local, (uint64_t)with_images, &image, 1));
		pthread_create(&h, NULL, hang_up, &s[1]);
		err = lm_pull_resume(run.p);
		pthread_join(h, NULL);
		if (!err) {
			int status;

			lm_pull_background(run.p);
			pthread_create(&q, NULL, pull, &run);
			usleep((useconds_t)dice(5000));
			lm_pull_stop(run.p);
			pthread_join(q, NULL);
			if (!run.err && record->sent == record->answered) {
				shutdown(s[1], SHUT_WR);
				lm_pull_close(run.p, &status);
			}
		}
		lm_pull_free(run.p);
	}
	shutdown(s[1], SHUT_RDWR);
	pthread_join(w, NULL);
	lm_lazy_unregister(z); /* and whoever waits there reads zeroes: nobody else is to be asked */
	lm_lazy_stop(z);
	pthread_join(touch, NULL);
	pthread_join(t, NULL);
	lm_lazy_free(z);
	for (i = 0; i < ALL; i++) {
		uint8_t *page = memory + i * LM_PAGE;
		/* The bytes within a page may be any that such a peer likes, but none is its own outside. */
		CHECK(i >= GUARD && i < GUARD + INSIDE ? 1 : !page[0] && !page[LM_PAGE - 1]);
	}
	close(uffd);
	close(done);
	close(f[0]);
	close(f[1]);
	close(s[0]);
	close(s[1]);
	free(record);
}

int main(int argc, char **argv)
{
	uint64_t first = argc > 1 ? strtoul(argv[1], NULL, 0) : 1, rounds = argc > 2 ? strtoul(argv[2], NULL, 0) : 100, i;
	uint8_t page[LM_PAGE];

	memory = mmap(NULL, ALL * LM_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	image = memfd_create("image", MFD_CLOEXEC);
	memset(page, PATTERN, sizeof(page));
	for (i = 0; i < ALL; i++)
		CHECK(write(image, page, sizeof(page)) == sizeof(page));
	for (i = 0; i < rounds; i++) {
		alarm(30);
		seed = began = first + i;
		dice(1);
		server();
		fetcher();
	}
	return 0;
}
