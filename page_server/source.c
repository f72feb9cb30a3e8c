#define _GNU_SOURCE
#include "page_server/source.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include "lazymig/kernel/pageindex.h"
#include "lazymig/uffd/fault_wire.h"
#include "lazymig/uffd/lazy.h"

/* Of a push: pages in a frame, as a page request waits for the CPU while they are read and sent; and bytes that may
 * wait in the socket, as what follows a fault must not queue behind megabytes. */
struct pace {
	uint64_t pages;
	int queue;
};
static const struct pace full = {32, 256 << 10};
/* While pages are asked for. On a busy host all that is pushed in between is time that somebody waits. */
static const struct pace gentle = {8, 64 << 10};
#define GENTLE_NS 1000000ull /* after the last request */

struct lm_source {
	lm_target target;
	lm_index index;
	_Atomic uint64_t *left; /* by page number: to be pushed */
	_Atomic uint64_t *served;
	_Atomic uint64_t hint; /* where to push next: behind the page that was asked for */
	_Atomic uint64_t asked_ns; /* when a page was asked for last */
	bool follow;
	lm_flag stop;
	_Atomic uint64_t requests, nserved, nserved_zero, pushed, skipped, nleft;
};

lm_source *lm_source_new(int pid, const lm_range *pending, uint64_t n)
{
	lm_source *s = calloc(1, sizeof(*s));
	char path[64];
	int err;

	if (!s)
		return NULL;
	snprintf(path, sizeof(path), "/proc/%d/mem", pid);
	s->target = (lm_target){pid, open(path, O_RDONLY | O_CLOEXEC)};
	err = s->target.mem < 0 ? errno : lm_index_init(&s->index, pending, n);
	if (!err) {
		size_t words = lm_bits_words(s->index.pages) + 1;

		s->left = calloc(words, sizeof(*s->left));
		s->served = calloc(words, sizeof(*s->served));
		err = s->left && s->served ? 0 : ENOMEM;
	}
	s->hint = LM_NO_PAGE;
	s->follow = true;
	if (err) {
		lm_source_free(s);
		errno = err;
		return NULL;
	}
	return s;
}

void lm_source_free(lm_source *s)
{
	if (s->target.mem >= 0)
		close(s->target.mem);
	lm_index_free(&s->index);
	free((void *)s->left);
	free((void *)s->served);
	free(s);
}

void lm_source_stop(lm_source *s)
{
	s->stop = true;
}

void lm_source_follow(lm_source *s, int follow)
{
	s->follow = follow;
}

static bool test_and_clear(_Atomic uint64_t *w, uint64_t i)
{
	uint64_t bit = 1ull << (i % 64);

	return atomic_fetch_and(&w[i / 64], ~bit) & bit;
}

static void ignore(void *arg, uint64_t addr)
{
}

static int answer(lm_source *s, int sock, uint64_t addr)
{
	lm_fault_head head = {addr, 1, 0};
	uint64_t page[LM_PAGE / 8];
	struct iovec iov[2] = {{&head, sizeof(head)}, {page, sizeof(page)}};
	lm_bulk_range got[1];
	lm_result r;

	r = lm_read_pages(&s->target, &(lm_range){addr, addr + LM_PAGE}, 1, 0, (uint8_t *)page, got, ignore, NULL);
	if (r.err)
		return r.err;
	/* Frozen, and of this memory: a page that cannot be read was never there (or is a guard page). */
	if (!r.done || lm_page_is_zero(page)) {
		head.flags = LM_FAULT_ZERO;
		s->nserved_zero++;
	} else {
		s->nserved++;
	}
	return lm_send_all(sock, iov, head.flags & LM_FAULT_ZERO ? 1 : 2, &s->stop);
}

int lm_source_serve(lm_source *s, int sock)
{
	lm_fault_head head;
	int one = 1, err;
	uint32_t i;

	lm_be_quick();
	setsockopt(sock, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	for (;;) {
		uint64_t run = 0, page;

		err = lm_recv_all(sock, &head, sizeof(head), &s->stop);
		if (err)
			return err == EPIPE ? 0 : err;
		if (!head.npages || head.npages > LM_FAULT_MAX_PAGES || head.flags || head.addr % LM_PAGE ||
		    head.addr >= LM_ADDR_END || !lm_index_covers(&s->index, head.addr, head.npages))
			return EPROTO;
		s->requests++;
		s->asked_ns = lm_now();
		for (i = 0; i < head.npages; i++) {
			uint64_t addr = head.addr + i * LM_PAGE;

			page = lm_index_of(&s->index, addr, &run);
			atomic_fetch_or(&s->served[page / 64], 1ull << (page % 64));
			if (s->follow)
				s->hint = page + 1;
			err = answer(s, sock, addr);
			if (err)
				return err;
			if (test_and_clear(s->left, page)) {
				s->nleft--;
				s->skipped++;
			}
		}
	}
}

void lm_source_want(lm_source *s, const lm_range *r, uint64_t n)
{
	uint64_t i, k, page, run;

	for (i = 0; i < n; i++) {
		uint64_t addr = r[i].start;

		while (lm_index_next(&s->index, &addr, r[i].end, &page, &run)) {
			s->nleft += run;
			for (k = page; k < page + run; k++)
				atomic_fetch_or(&s->left[k / 64], 1ull << (k % 64));
		}
	}
}

/* Claims up to `most` pages, at most LM_BATCH_PAGES, from *cursor on, around the end; returns the number of ranges. */
static size_t claim(lm_source *s, uint64_t *cursor, uint64_t most, lm_range *r)
{
	uint64_t at = *cursor, end = s->index.pages, pages = 0, run;
	bool wrapped = false;
	size_t n = 0;

	while (pages < most) {
		uint64_t page = lm_bits_next((const uint64_t *)s->left, at, end), addr;

		if (page == end) {
			if (wrapped)
				break;
			wrapped = true;
			end = *cursor;
			at = 0;
			continue;
		}
		at = page + 1;
		if (!test_and_clear(s->left, page))
			continue;
		s->nleft--;
		if (lm_bit((const uint64_t *)s->served, page)) {
			s->skipped++;
			continue;
		}
		addr = lm_index_addr(&s->index, page, &run);
		pages++;
		if (n && r[n - 1].end == addr)
			r[n - 1].end += LM_PAGE;
		else
			r[n++] = (lm_range){addr, addr + LM_PAGE};
	}
	*cursor = at;
	return n;
}

/* How fast to push now; tells the socket, too. */
static const struct pace *pace_now(const lm_source *s, int sock, const struct pace *last)
{
	const struct pace *p = lm_now() - s->asked_ns < GENTLE_NS ? &gentle : &full;

	if (p != last)
		setsockopt(sock, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &p->queue, sizeof(p->queue));
	return p;
}

int lm_source_push(lm_source *s, lm_bulk *b, uint32_t seq, uint32_t turn, uint32_t turns)
{
	uint64_t cursor = s->index.pages / turns * turn;
	const struct pace *pace = NULL;
	lm_range r[LM_BATCH_PAGES];
	size_t n;
	int err;

	lm_bulk_begin(b, NULL, 0);
	for (;;) {
		uint64_t hint = atomic_exchange(&s->hint, LM_NO_PAGE);
		const lm_range *lost;

		if (hint < s->index.pages)
			cursor = hint;
		pace = pace_now(s, b->sock, pace);
		n = claim(s, &cursor, pace->pages, r);
		if (!n)
			break;
		b->nskipped = 0;
		err = lm_bulk_read(b, r, n, LM_RANGE_ZEROABLE);
		if (err)
			return err;
		s->pushed += b->bytes / LM_PAGE;
		err = lm_bulk_flush(b, seq, LM_CODEC_NONE, NULL, 0);
		n = lm_bulk_skipped(b, &lost);
		if (!err && n)
			err = lm_bulk_zero(b, seq, lost, n);
		if (err)
			return err;
	}
	return lm_bulk_mark(b, LM_FRAME_END, seq);
}

void lm_source_get_stats(const lm_source *s, lm_source_stats *out)
{
	*out = (lm_source_stats){s->requests, s->nserved, s->nserved_zero, s->pushed, s->skipped, s->nleft};
}
