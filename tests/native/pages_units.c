/* Unit tests of the C that moves pages, built with AddressSanitizer and UBSan: page numbers and bitmaps, the table of
 * lazy memory against a model of single pages, frames that are noise, another process's memory with holes, a bulk
 * connection from end to end, and lazy memory of this process's own while it is moved and discarded.
 *
 *   pages_units SEED
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lazymig/uffd/lazy_table.h"
#include "lazymig/uffd/uffd.h"
#include "page_server/receive.h"
#include "page_server/source.h"

#define BASE 0x200000000000ull
#define PAGES 64u
#define NO_AREA UINT32_MAX

static int failures;

#define CHECK(what)                                                           \
	do {                                                                  \
		if (!(what)) {                                                \
			fprintf(stderr, "line %d: %s\n", __LINE__, #what);    \
			failures++;                                           \
		}                                                             \
	} while (0)

static uint64_t seed;

static uint64_t dice(uint64_t n)
{
	seed = seed * 6364136223846793005ull + 1442695040888963407ull;
	return (seed >> 33) % n;
}

static uint64_t at(uint64_t page)
{
	return BASE + page * LM_PAGE;
}

/* Ranges of the pages whose byte is set; exactly as much memory as they need. */
static lm_range *ranges_of(const uint8_t *set, uint64_t pages, uint64_t *n)
{
	lm_range *r;
	uint64_t i;
	int pass;

	for (pass = 0, r = NULL;; pass++) {
		for (i = 0, *n = 0; i < pages; i++) {
			if (!set[i])
				continue;
			if (i == 0 || !set[i - 1])
				++*n;
			if (pass && (i == 0 || !set[i - 1]))
				r[*n - 1].start = at(i);
			if (pass)
				r[*n - 1].end = at(i + 1);
		}
		if (pass)
			return r;
		r = malloc(*n * sizeof(*r) + !*n);
	}
}

static void test_index(void)
{
	uint64_t n, i, number = 0, run, bits = 1 + dice(300), from, len, addr, page;
	uint8_t set[PAGES], model[300];
	uint64_t *w;
	lm_range *r;
	lm_index ix;

	for (i = 0; i < PAGES; i++)
		set[i] = dice(3) > 0;
	r = ranges_of(set, PAGES, &n);
	CHECK(lm_index_init(&ix, r, n) == 0);
	free(r);
	for (i = 0; i < PAGES; i++) {
		run = 0;
		if (!set[i]) {
			CHECK(lm_index_of(&ix, at(i), &run) == LM_NO_PAGE);
			continue;
		}
		CHECK(lm_index_of(&ix, at(i), &run) == number);
		CHECK(run >= 1 && (i + run == PAGES || !set[i + run]));
		CHECK(lm_index_addr(&ix, number, &run) == at(i));
		number++;
	}
	CHECK(ix.pages == number);
	for (i = 0; i < 20; i++) {
		uint64_t a = dice(PAGES), b = a + dice(PAGES - a), k, seen = 0, wanted = 0;

		addr = at(a);
		while (lm_index_next(&ix, &addr, at(b), &page, &run)) {
			CHECK(run > 0 && addr <= at(b));
			seen += run;
		}
		for (k = a; k < b; k++)
			wanted += set[k];
		CHECK(seen == wanted);
		CHECK(lm_index_covers(&ix, at(a), b - a) == (wanted == b - a));
	}
	lm_index_free(&ix);

	w = lm_bits_ones(bits);
	memset(model, 1, sizeof(model));
	for (i = 0; i < 20; i++) {
		uint64_t k, cleared = 0, set_bit, clear_bit;

		from = dice(bits);
		len = dice(bits - from + 1);
		for (k = from; k < from + len; k++) {
			cleared += model[k];
			model[k] = 0;
		}
		CHECK(lm_bits_clear(w, from, len) == cleared);
		if (dice(2)) {
			lm_bits_set(w, from, len / 2);
			memset(model + from, 1, len / 2);
		}
		from = dice(bits);
		for (set_bit = from; set_bit < bits && !model[set_bit]; set_bit++)
			;
		for (clear_bit = from; clear_bit < bits && model[clear_bit]; clear_bit++)
			;
		CHECK(lm_bits_next(w, from, bits) == set_bit);
		CHECK(lm_bits_next_clear(w, from, bits) == clear_bit);
	}
	free(w);
}

/* What a space should look like, page by page. */
struct model {
	lm_space *space;
	uint32_t src[PAGES]; /* source page that is at this place, or NO_AREA */
	uint8_t pending[PAGES];
};

static void compare(lm_lazy *z, struct model *m, unsigned int n)
{
	uint64_t remaining = 0, left, page, run;
	unsigned int k, i;

	for (k = 0; k < n; k++) {
		for (left = 0, i = 0; i < PAGES; i++) {
			const lm_area *a = lm_areas_at(&m[k].space->areas, at(i));
			bool pending;

			CHECK((a != NULL) == (m[k].src[i] != NO_AREA));
			if (a) {
				uint64_t src = a->src + (at(i) - a->start);
				const lm_area *back = lm_areas_of_src(&m[k].space->areas, src);

				CHECK(src == at(m[k].src[i]));
				CHECK(back == a);
			}
			page = lm_index_of(&z->index, at(i), &run);
			pending = page != LM_NO_PAGE && lm_bit(m[k].space->pending, page);
			CHECK(pending == m[k].pending[i]);
			left += m[k].pending[i];
		}
		CHECK(m[k].space->left == left);
		remaining += left;
	}
	CHECK(z->stats.remaining == remaining);
}

static void forget(struct model *m, uint64_t place, bool area)
{
	if (m->src[place] == NO_AREA)
		return;
	m->pending[m->src[place]] = 0;
	if (area)
		m->src[place] = NO_AREA;
}

static void test_table(void)
{
	static struct model m[6];
	int done = eventfd(0, EFD_NONBLOCK), null = open("/dev/null", O_RDWR);
	uint8_t mapped[PAGES], pending[PAGES];
	lm_lazy *z = lm_lazy_new(-1, done);
	uint64_t nareas, npending, i, step, page, run, placed;
	lm_range *areas, *want;
	unsigned int n = 1, k;
	lm_result r;

	for (i = 0; i < PAGES; i++) {
		mapped[i] = dice(8) > 0;
		pending[i] = mapped[i] && dice(3) > 0;
		m[0].src[i] = mapped[i] ? (uint32_t)i : NO_AREA;
		m[0].pending[i] = pending[i];
	}
	areas = ranges_of(mapped, PAGES, &nareas);
	want = ranges_of(pending, PAGES, &npending);
	/* Without a userfaultfd nothing can be registered, so this arms by hand. */
	r = lm_lazy_arm(z, areas, 0, want, npending);
	CHECK(!r.err);
	m[0].space = z->space[0];
	lm_areas_free(&m[0].space->areas);
	lm_areas_init(&m[0].space->areas, areas, nareas);
	compare(z, m, n);
	for (step = 0; step < 60; step++) {
		struct model *one = &m[k = (unsigned int)dice(n)];
		uint64_t from = dice(PAGES), len = 1 + dice(PAGES - from), to;
		uint32_t moved[PAGES];

		switch (dice(6)) {
		case 0:
			lm_space_unmap(z, one->space, at(from), at(from + len));
			for (i = from; i < from + len; i++)
				forget(one, i, true);
			break;
		case 1:
			lm_space_remove(z, one->space, at(from), at(from + len));
			for (i = from; i < from + len; i++)
				forget(one, i, false);
			break;
		case 2:
			if (n == 6)
				break;
			lm_space_fork(z, one->space, -1);
			m[n] = *one;
			m[n++].space = z->space[z->nspaces - 1];
			break;
		case 3: /* pages said to be zero */
			for (i = from; i < from + len; i++) {
				page = lm_index_of(&z->index, at(i), &run);
				if (page == LM_NO_PAGE)
					continue;
				placed = 0;
				CHECK(lm_place_step(z, page, at(i), 1, NULL, &placed));
				for (k = 0; k < n; k++) {
					placed -= m[k].pending[i];
					m[k].pending[i] = 0;
				}
				CHECK(placed == 0);
			}
			break;
		default:
			len = 1 + dice(PAGES / 2);
			from = dice(PAGES - 2 * len + 1);
			to = from + len + dice(PAGES - from - 2 * len + 1);
			if (dice(2)) {
				uint64_t t = from;

				from = to;
				to = t;
			}
			lm_space_remap(z, one->space, at(from), at(to), len * LM_PAGE);
			memcpy(moved, one->src + from, len * sizeof(*moved));
			for (i = 0; i < len; i++)
				one->src[from + i] = NO_AREA;
			for (i = 0; i < len; i++)
				forget(one, to + i, true);
			memcpy(one->src + to, moved, len * sizeof(*moved));
			/* The kernel's report that the old place was unmapped comes late: it is not about what was moved
			 * there meanwhile. */
			if (dice(2)) {
				lm_space_remap(z, one->space, at(to), at(from), len * LM_PAGE);
				memcpy(one->src + from, moved, len * sizeof(*moved));
				for (i = 0; i < len; i++)
					one->src[to + i] = NO_AREA;
				lm_space_unmap(z, one->space, at(to), at(to + len));
			}
			lm_space_unmap(z, one->space, at(from), at(from + len));
		}
		compare(z, m, n);
	}
	for (k = 1; k < n; k++) {
		lm_space_drop(z, m[k].space);
		z->stats.spaces++; /* it had no userfaultfd to lose */
	}
	compare(z, m, 1);
	lm_lazy_free(z);
	free(areas);
	free(want);
	close(done);
	close(null);
}

static void test_frames(void)
{
	lm_bulk_range r[8];
	lm_bulk_head h;
	uint64_t i, k, sum;

	for (i = 0; i < 2000; i++) {
		h = (lm_bulk_head){(uint32_t)dice(6), (uint32_t)dice(9), dice(5) * LM_PAGE, 0, (uint32_t)dice(4),
				   dice(5) * LM_PAGE};
		for (k = 0, sum = 0; k < 8; k++) {
			r[k] = (lm_bulk_range){dice(3) ? at(dice(9)) : (1ull << 47) - dice(2) * LM_PAGE,
					       dice(4) ? (uint32_t)dice(3) : UINT32_MAX, (uint32_t)dice(4)};
			if (k < h.n_ranges)
				sum += r[k].npages * LM_PAGE;
		}
		if (lm_bulk_check_head(&h) || h.n_ranges > 8 || lm_bulk_check_ranges(&h, r))
			continue;
		CHECK(h.type != LM_FRAME_PAGES || sum == h.raw_len);
		CHECK(h.type == LM_FRAME_PAGES || !h.payload_len);
		for (k = 0; k < h.n_ranges; k++)
			CHECK(r[k].npages && r[k].addr + r[k].npages * LM_PAGE <= 1ull << 47);
	}
}

/* A stopped process with our memory, where the pages whose byte is set are unmapped. */
static pid_t twin(uint8_t *memory, const uint8_t *hole, bool empty)
{
	pid_t pid = fork();
	int status;
	uint64_t i;

	if (!pid) {
		if (empty)
			madvise(memory, PAGES * LM_PAGE, MADV_DONTNEED);
		for (i = 0; hole && i < PAGES; i++)
			if (hole[i])
				syscall(SYS_munmap, memory + i * LM_PAGE, LM_PAGE);
		for (i = 0; hole && i < PAGES; i++)
			if (hole[i] == 2) /* readable only through /proc/PID/mem */
				syscall(SYS_mmap, memory + i * LM_PAGE, LM_PAGE, PROT_NONE,
					MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
		syscall(SYS_kill, getpid(), SIGSTOP);
		_exit(0);
	}
	waitpid(pid, &status, WUNTRACED);
	return pid;
}

static void end(pid_t pid)
{
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
}

struct receiving {
	lm_receiver *r;
	lm_receiver_event event;
	int err;
};

static void *receive(void *arg)
{
	struct receiving *in = arg;

	in->err = lm_receiver_step(in->r, &in->event);
	return NULL;
}

static void test_round(void)
{
	uint8_t *memory = mmap(NULL, PAGES * LM_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint8_t hole[PAGES], set[PAGES], *copy = malloc(PAGES * LM_PAGE);
	uint64_t i, n, k, start = (uintptr_t)memory, skipped = 0, sent = 0, zeroes = 0;
	const lm_range *lost, *zero;
	struct receiving in = {0};
	lm_bulk_stats stats;
	lm_bulk_range *to;
	lm_range *r;
	pid_t source, target;
	int sock[2], mem;
	pthread_t thread;
	char path[64];
	lm_part part;
	lm_bulk *b;

	for (i = 0; i < PAGES; i++) {
		hole[i] = (uint8_t)(dice(4) ? 0 : 1 + dice(2));
		set[i] = dice(4) > 0;
		if (dice(4))
			memset(memory + i * LM_PAGE, (int)i + 1, LM_PAGE);
		if (!set[i])
			continue;
		if (hole[i] == 1)
			skipped++;
		else if (hole[i] == 2 || !memory[i * LM_PAGE])
			zeroes++;
		else
			sent++;
	}
	source = twin(memory, hole, false);
	target = twin(memory, NULL, true);
	r = ranges_of(set, PAGES, &n);
	for (i = 0; i < n; i++) {
		r[i].start += start - BASE;
		r[i].end += start - BASE;
	}
	CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, sock));
	snprintf(path, sizeof(path), "/proc/%d/mem", target);
	mem = open(path, O_RDWR);
	b = lm_bulk_new(sock[0], source);
	in.r = lm_receiver_new(sock[1], target, mem);
	lm_receiver_allow(in.r, NULL, 0);
	pthread_create(&thread, NULL, receive, &in);
	part = (lm_part){r, n, LM_RANGE_ZEROABLE, 0};
	lm_bulk_begin(b, &part, 1);
	CHECK(!lm_bulk_round(b, 1) && !lm_bulk_mark(b, LM_FRAME_END, 1));
	pthread_join(thread, NULL);
	CHECK(!in.err && in.event.type == LM_FRAME_END);
	lm_bulk_get_stats(b, &stats);
	CHECK(stats.pages == sent && stats.zero_pages == zeroes && stats.skipped_pages == skipped);
	k = lm_bulk_skipped(b, &lost);
	CHECK(lm_ranges_size(lost, k) == skipped * LM_PAGE);
	k = lm_receiver_zero(in.r, &zero);
	for (i = 0; k; k--)
		i += zero[k - 1].end - zero[k - 1].start;
	CHECK(i == zeroes * LM_PAGE);
	CHECK(pread(mem, copy, PAGES * LM_PAGE, (off_t)start) == (ssize_t)(PAGES * LM_PAGE));
	for (i = 0; i < PAGES; i++)
		CHECK(copy[i * LM_PAGE] == (set[i] && !hole[i] ? memory[i * LM_PAGE] : 0));

	/* Writing: some through process_vm_writev, some through /proc/PID/mem, some where nothing is. */
	end(target);
	target = twin(memory, hole, true);
	close(mem);
	snprintf(path, sizeof(path), "/proc/%d/mem", target);
	mem = open(path, O_RDWR);
	to = malloc(PAGES * sizeof(*to));
	for (i = 0, k = 0; i < PAGES; i++)
		if (hole[i] != 1)
			k = lm_append_range(to, k, start + i * LM_PAGE, 1, (uint32_t)dice(2) * LM_RANGE_FORCE);
	for (i = 0, n = 0; i < PAGES; i++)
		if (hole[i] != 1)
			memset(copy + LM_PAGE * n++, (int)i + 3, LM_PAGE);
	CHECK(lm_write_pages(&(lm_target){target, mem}, to, k, copy).err == 0);
	for (i = 0; i < PAGES; i++) {
		uint8_t byte = 0;

		if (hole[i] == 1)
			continue;
		CHECK(pread(mem, &byte, 1, (off_t)(start + (i + 1) * LM_PAGE - 1)) == 1 && byte == i + 3);
	}
	to[0].addr = BASE - LM_PAGE;
	CHECK(lm_write_pages(&(lm_target){target, mem}, to, 1, copy).err != 0);
	free(to);
	lm_bulk_free(b);
	lm_receiver_free(in.r);
	close(sock[0]);
	close(sock[1]);
	close(mem);
	end(source);
	end(target);
	free(r);
	free(copy);
	munmap(memory, PAGES * LM_PAGE);
}

struct serving {
	lm_source *s;
	int sock, err;
};

static void *serve(void *arg)
{
	struct serving *s = arg;

	s->err = lm_source_serve(s->s, s->sock);
	return NULL;
}

static void *loop(void *arg)
{
	lm_lazy_run(arg, 20000);
	return NULL;
}

static void *pushed(void *arg)
{
	struct receiving *in = arg;

	return receive(in);
}

static void expect(const uint8_t *place, uint64_t page, uint8_t value)
{
	CHECK(place[0] == value && place[LM_PAGE - 1] == value);
	(void)page;
}

/* The whole way of lazy pages, with this process as its own destination. */
static void test_lazy(void)
{
	uint64_t n = 4 * PAGES, i, ignored, features = UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_REMOVE |
		 UFFD_FEATURE_EVENT_UNMAP | UFFD_FEATURE_THREAD_ID;
	uint8_t *memory = mmap(NULL, n * LM_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), *moved;
	int uffd, done = eventfd(0, EFD_NONBLOCK), fault[2], bulk[2], status;
	pthread_t loop_thread, serve_thread, receive_thread;
	struct serving serving = {0};
	struct receiving in = {0};
	lm_source_stats served;
	lm_lazy_stats stats;
	lm_range all;
	lm_lazy *z;
	lm_bulk *b;
	pid_t source;

	for (i = 0; i < n; i++)
		memset(memory + i * LM_PAGE, (int)(i % 3 ? i % 251 + 1 : 0), LM_PAGE);
	source = fork();
	if (!source) {
		syscall(SYS_kill, getpid(), SIGSTOP);
		_exit(0);
	}
	waitpid(source, &status, WUNTRACED);
	madvise(memory, n * LM_PAGE, MADV_DONTNEED);
	uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	CHECK(!lm_uffd_api(uffd, &features, &ignored));
	CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, fault) && !socketpair(AF_UNIX, SOCK_STREAM, 0, bulk));
	all = (lm_range){(uintptr_t)memory, (uintptr_t)memory + n * LM_PAGE};
	z = lm_lazy_new(uffd, done);
	CHECK(!lm_lazy_arm(z, &all, 1, &all, 1).err);
	CHECK(!lm_lazy_attach(z, fault[0]));
	serving = (struct serving){lm_source_new(source, &all, 1), fault[1], 0};
	b = lm_bulk_new(bulk[1], source);
	in.r = lm_receiver_new(bulk[0], getpid(), -1);
	lm_receiver_lazy(in.r, z);
	pthread_create(&loop_thread, NULL, loop, z);
	pthread_create(&serve_thread, NULL, serve, &serving);
	pthread_create(&receive_thread, NULL, pushed, &in);

	for (i = 0; i < PAGES; i += 5)
		expect(memory + i * LM_PAGE, i, i % 3 ? i % 251 + 1 : 0);
	moved = mmap(NULL, PAGES * LM_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(mremap(memory, PAGES * LM_PAGE, PAGES * LM_PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, moved) == moved);
	CHECK(!madvise(memory + PAGES * LM_PAGE, PAGES * LM_PAGE / 2, MADV_DONTNEED));
	CHECK(!munmap(memory + 2 * PAGES * LM_PAGE, PAGES * LM_PAGE / 4));
	for (i = 0; i < PAGES; i += 3)
		expect(moved + i * LM_PAGE, i, i % 3 ? i % 251 + 1 : 0);
	lm_source_want(serving.s, &all, 1);
	CHECK(!lm_source_push(serving.s, b, 0, 0, 1));
	for (i = 0; i < PAGES; i++)
		expect(moved + i * LM_PAGE, i, i % 3 ? i % 251 + 1 : 0);
	for (i = PAGES; i < n; i++) {
		if (i >= 2 * PAGES && i < 2 * PAGES + PAGES / 4)
			continue;
		expect(memory + i * LM_PAGE, i, i < PAGES + PAGES / 2 || !(i % 3) ? 0 : i % 251 + 1);
	}
	pthread_join(receive_thread, NULL);
	CHECK(!in.err && in.event.type == LM_FRAME_END);
	lm_lazy_get_stats(z, &stats);
	lm_source_get_stats(serving.s, &served);
	CHECK(!stats.remaining && !stats.err && !stats.lost && stats.faults && stats.events >= 3 && stats.dropped);
	CHECK(!served.left && served.requests == stats.requested);
	CHECK(lm_lazy_pending(z, NULL, 0) == 0);
	lm_lazy_unregister(z);
	lm_lazy_stop(z);
	pthread_join(loop_thread, NULL);
	close(fault[0]);
	lm_lazy_free(z);
	pthread_join(serve_thread, NULL);
	CHECK(!serving.err);
	lm_source_free(serving.s);
	lm_bulk_free(b);
	lm_receiver_free(in.r);
	close(fault[1]);
	close(bulk[0]);
	close(bulk[1]);
	close(uffd);
	close(done);
	end(source);
	munmap(memory, n * LM_PAGE);
	munmap(moved, PAGES * LM_PAGE);
}

int main(int argc, char **argv)
{
	int i;

	alarm(90);
	seed = argc > 1 ? strtoul(argv[1], NULL, 0) : 1;
	for (i = 0; i < 50; i++) {
		test_index();
		test_table();
	}
	test_frames();
	for (i = 0; i < 5; i++) {
		test_round();
		test_lazy();
	}
	return failures != 0;
}
