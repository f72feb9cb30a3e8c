/* Damaged and made-up streams for the C that takes pages from a peer, built with AddressSanitizer and UBSan:
 * bulk frames at the destination, replies on its fault connection, and requests at the source. Whatever comes, no page
 * outside of what was allowed is written, and none outside of what was offered is told.
 *
 *   fuzz_pages SEED ROUNDS
 */
#define _GNU_SOURCE
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
#include <sys/syscall.h>
#include <unistd.h>

#include "fuzz_stream.h"
#include "lazymig/uffd/fault_wire.h"
#include "lazymig/uffd/lazy.h"
#include "lazymig/uffd/uffd.h"
#include "page_server/receive.h"
#include "page_server/source.h"

static void put_noise(size_t n)
{
	while (n-- && used < ROOM)
		stream[used++] = (uint8_t)dice(256);
}

static void put_frame(uint32_t type, uint32_t seq)
{
	lm_bulk_range r[6];
	lm_bulk_head h = {.type = type, .seq = seq, .n_ranges = (uint32_t)(1 + dice(5))};
	uint64_t i, pages = 0;

	if (type != LM_FRAME_PAGES && type != LM_FRAME_ZERO)
		h.n_ranges = 0;
	for (i = 0; i < h.n_ranges; i++) {
		r[i] = (lm_bulk_range){some_address(), dice(20) ? (uint32_t)(1 + dice(3)) : (uint32_t)dice(UINT32_MAX),
				       (uint32_t)dice(4)};
		pages += r[i].npages;
	}
	if (type == LM_FRAME_PAGES) {
		h.raw_len = pages * LM_PAGE;
		h.codec = dice(6) ? LM_CODEC_NONE : (uint32_t)dice(4);
		h.payload_len = h.codec ? dice(LM_PAGE) : h.raw_len;
	}
	put(&h, sizeof(h));
	put(r, h.n_ranges * sizeof(*r));
	if (type == LM_FRAME_PAGES && h.payload_len < ROOM)
		put_noise(h.payload_len);
}

static void begin(uint8_t pattern)
{
	memset(memory, pattern, ALL * LM_PAGE);
	used = 0;
}

static void outside_is_untouched(const uint8_t *allowed)
{
	uint64_t i, k;

	for (i = 0; i < ALL; i++) {
		if (allowed[i])
			continue;
		for (k = 0; k < LM_PAGE; k++)
			CHECK(memory[i * LM_PAGE + k] == PATTERN);
	}
}

static void pair(int s[2])
{
	int room = 4 * ROOM;

	CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, s));
	setsockopt(s[0], SOL_SOCKET, SO_SNDBUF, &room, sizeof(room));
	setsockopt(s[1], SOL_SOCKET, SO_SNDBUF, &room, sizeof(room));
}

static void bulk(void)
{
	static uint8_t raw[LM_MAX_PAYLOAD];
	uint8_t allowed[ALL] = {0};
	lm_range ranges[INSIDE];
	lm_receiver_event ev;
	lm_receiver *r;
	uint64_t n = 0, i;
	pthread_t t;
	int s[2], mem = open("/proc/self/mem", O_RDWR | O_CLOEXEC), err;

	begin(PATTERN);
	for (i = GUARD; i < GUARD + INSIDE; i++)
		allowed[i] = dice(8) > 0;
	for (i = GUARD; i < GUARD + INSIDE; i++) {
		if (!allowed[i])
			continue;
		if (allowed[i - 1])
			ranges[n - 1].end = page_at(i + 1);
		else
			ranges[n++] = (lm_range){page_at(i), page_at(i + 1)};
	}
	if (dice(8))
		put_frame(LM_FRAME_GATE, 1);
	for (i = dice(8); i; i--)
		put_frame(dice(10) ? (dice(3) ? LM_FRAME_PAGES : LM_FRAME_ZERO) : (uint32_t)dice(7), 1);
	put_frame(LM_FRAME_END, 1);
	if (!dice(3))
		put_frame(LM_FRAME_PAGES, 1); /* after its round */
	damage();
	pair(s);
	pthread_create(&t, NULL, writer, &s[1]);
	r = lm_receiver_new(s[0], getpid(), mem);
	while (!(err = lm_receiver_step(r, &ev))) {
		if (ev.type == LM_FRAME_GATE) {
			lm_receiver_allow(r, ranges, n);
		} else if (ev.type == LM_FRAME_PAGES) {
			CHECK(ev.raw_len <= LM_MAX_PAYLOAD && ev.len <= LM_MAX_PAYLOAD);
			if (lm_receiver_place(r, raw))
				break;
		}
	}
	shutdown(s[0], SHUT_RDWR);
	pthread_join(t, NULL);
	lm_receiver_free(r);
	close(s[0]);
	close(s[1]);
	close(mem);
	outside_is_untouched(allowed);
}

static void *loop(void *arg)
{
	lm_lazy_run(arg, 0);
	return NULL;
}

/* A source that answers what nobody asked for. The lazy memory is not looked at: who does would wait. */
static void replies(void)
{
	uint64_t i, ignored, features = UFFD_FEATURE_THREAD_ID;
	lm_range inside = {page_at(GUARD), page_at(GUARD + INSIDE)};
	int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK), done = eventfd(0, EFD_NONBLOCK), s[2];
	struct pollfd p = {done, POLLIN, 0};
	uint8_t allowed[ALL] = {0};
	pthread_t t, w;
	lm_lazy *z;

	begin(PATTERN);
	memset(allowed + GUARD, 1, INSIDE);
	madvise(memory + GUARD * LM_PAGE, INSIDE * LM_PAGE, MADV_DONTNEED);
	for (i = dice(12); i; i--) {
		lm_fault_head h = {some_address(), (uint32_t)(dice(10) ? 1 + dice(3) : dice(UINT32_MAX)),
				   dice(6) ? 0 : (uint32_t)dice(4)};

		put(&h, sizeof(h));
		if (!(h.flags & LM_FAULT_ZERO) && h.npages < 20)
			put_noise(h.npages * LM_PAGE);
	}
	damage();
	CHECK(!lm_uffd_api(uffd, &features, &ignored));
	pair(s);
	z = lm_lazy_new(uffd, done);
	CHECK(!lm_lazy_arm(z, &inside, 1, &inside, 1).err);
	CHECK(!lm_lazy_attach(z, s[0]));
	pthread_create(&t, NULL, loop, z);
	pthread_create(&w, NULL, writer, &s[1]);
	CHECK(poll(&p, 1, 20000) == 1); /* lost: by what was wrong, or by the end */
	shutdown(s[0], SHUT_RDWR);
	pthread_join(w, NULL);
	lm_lazy_unregister(z);
	lm_lazy_stop(z);
	pthread_join(t, NULL);
	lm_lazy_free(z);
	close(uffd);
	close(done);
	close(s[0]);
	close(s[1]);
	outside_is_untouched(allowed);
}

struct serving {
	lm_source *s;
	int sock, err;
};

static void *serve(void *arg)
{
	struct serving *v = arg;

	v->err = lm_source_serve(v->s, v->sock);
	shutdown(v->sock, SHUT_RDWR);
	return NULL;
}

static int exactly(int fd, void *buf, size_t n)
{
	return recv(fd, buf, n, MSG_WAITALL) == (ssize_t)n;
}

/* A destination that asks for what is not its own. */
static void requests(void)
{
	lm_range offered[2] = {{page_at(GUARD), page_at(GUARD + 9)}, {page_at(GUARD + 20), page_at(GUARD + INSIDE)}};
	struct serving v = {lm_source_new(getpid(), offered, 2), 0, 0};
	lm_fault_head h;
	uint8_t page[LM_PAGE];
	uint64_t i, n;
	pthread_t t, w;
	int s[2];

	begin(PATTERN);
	for (n = dice(20); n; n--) {
		h = (lm_fault_head){some_address(), (uint32_t)(dice(10) ? 1 + dice(3) : dice(UINT32_MAX)),
				    dice(15) ? 0 : (uint32_t)dice(3)};
		put(&h, sizeof(h));
	}
	damage();
	pair(s);
	v.sock = s[0];
	pthread_create(&t, NULL, serve, &v);
	pthread_create(&w, NULL, writer, &s[1]);
	while (exactly(s[1], &h, sizeof(h))) {
		for (i = 0; i < h.npages; i++) {
			uint64_t at = h.addr + i * LM_PAGE;

			CHECK((at >= offered[0].start && at < offered[0].end) ||
			      (at >= offered[1].start && at < offered[1].end));
			if (!(h.flags & LM_FAULT_ZERO))
				CHECK(exactly(s[1], page, LM_PAGE) && page[0] == PATTERN);
		}
	}
	shutdown(s[1], SHUT_RDWR);
	pthread_join(t, NULL);
	pthread_join(w, NULL);
	lm_source_free(v.s);
	close(s[0]);
	close(s[1]);
}

int main(int argc, char **argv)
{
	uint64_t first = argc > 1 ? strtoul(argv[1], NULL, 0) : 1, rounds = argc > 2 ? strtoul(argv[2], NULL, 0) : 100, i;

	memory = mmap(NULL, ALL * LM_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	for (i = 0; i < rounds; i++) {
		alarm(30);
		seed = began = first + i;
		dice(1);
		bulk();
		replies();
		requests();
	}
	return 0;
}
