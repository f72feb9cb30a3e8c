/* What is fetched when: faults first, with what follows them, and the rest behind. */
#define _GNU_SOURCE
#include "page_server/criu_pull.h"

#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "page_server/criu_pull_inside.h"

/* Pages of a request for a fault that nothing is known about: one that stands alone pays little for them. */
#define AROUND 16u
#define AROUND_MAX 1024u
#define SPIN_NS 100000u
#define SPIN_BYTES (1u << 20)
/* Room that is kept in the ring for faults. */
#define RING_FREE 256u

uint64_t lm_pull_now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

lm_pull *lm_pull_new(int sock, int wide, lm_pull_record *record)
{
	lm_pull *p = calloc(1, sizeof(*p));

	if (!p)
		return NULL;
	p->sock = sock;
	p->width = wide ? LM_PS_WIDE : LM_PS_NARROW;
	p->record = record ? record : &p->own;
	p->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	p->buffer = aligned_alloc(LM_PAGE, LM_PULL_BUFFER);
	p->from_images = aligned_alloc(LM_PAGE, LM_PULL_BUFFER);
	lm_flow_init(&p->flow);
	if (p->wake < 0 || !p->buffer || !p->from_images) {
		lm_pull_free(p);
		return NULL;
	}
	return p;
}

static void free_task(lm_pull_task *t)
{
	lm_index_free(&t->index);
	free(t->todo);
	free(t->local);
	free(t->fds);
}

void lm_pull_free(lm_pull *p)
{
	uint32_t i;

	for (i = 0; i < p->ntasks; i++)
		free_task(&p->task[i]);
	if (p->wake >= 0)
		close(p->wake);
	free(p->task);
	free(p->buffer);
	free(p->from_images);
	free(p);
}

static void *copy_of(const void *from, size_t size)
{
	void *to = malloc(size + 1);

	if (to && size)
		memcpy(to, from, size);
	return to;
}

int lm_pull_add(lm_pull *p, lm_lazy *z, uint32_t pid, int faults, const lm_range *pending, uint64_t n,
		const lm_piece *local, uint64_t nlocal, const int *fds, uint32_t nfds)
{
	lm_pull_task t = {.z = z, .pid = pid, .faults = faults, .nlocal = nlocal};
	lm_pull_task *all = realloc(p->task, (p->ntasks + 1) * sizeof(*all));

	if (!all)
		return ENOMEM;
	p->task = all;
	t.local = copy_of(local, nlocal * sizeof(*local));
	t.fds = copy_of(fds, nfds * sizeof(*fds));
	if (lm_index_init(&t.index, pending, n) || !(t.todo = lm_bits_ones(t.index.pages)) || !t.local || !t.fds) {
		free_task(&t);
		return ENOMEM;
	}
	t.ntodo = t.index.pages;
	p->stats.left += t.ntodo;
	p->task[p->ntasks++] = t;
	return 0;
}

uint64_t lm_pull_claim(lm_pull *p, lm_pull_task *t, uint64_t page, uint64_t n)
{
	uint64_t cleared = lm_bits_clear(t->todo, page, n);

	t->ntodo -= cleared;
	p->stats.left -= cleared;
	return cleared;
}

void lm_pull_again(lm_pull *p, lm_pull_task *t, uint64_t addr, uint64_t pages)
{
	uint64_t end = addr + pages * LM_PAGE, page, run;

	while (lm_index_next(&t->index, &addr, end, &page, &run)) {
		lm_bits_set(t->todo, page, run);
		t->ntodo += run;
		p->stats.left += run;
		t->cursor = page;
	}
}

/* How many pages from this one on are to be asked for, at most `most`. */
static uint64_t run_from(const lm_pull_task *t, uint64_t page, uint64_t most)
{
	uint64_t run;

	lm_index_addr(&t->index, page, &run);
	return lm_bits_next_clear(t->todo, page, page + (run < most ? run : most)) - page;
}

/* How many pages to ask for with this fault: more the longer faults have gone up the addresses. */
static uint32_t around(lm_pull_task *t, uint64_t addr)
{
	lm_pull_stream *oldest = t->stream;
	uint32_t i;

	t->turn++;
	for (i = 0; i < LM_PULL_STREAMS; i++) {
		lm_pull_stream *s = &t->stream[i];

		/* What was prefetched by others may lie between. */
		if (s->pages && addr - s->next < (uint64_t)s->pages * LM_PAGE) {
			s->pages = s->pages * 2 < AROUND_MAX ? s->pages * 2 : AROUND_MAX;
			s->next = addr + s->pages * LM_PAGE;
			s->used = t->turn;
			return s->pages;
		}
		if (s->used < oldest->used)
			oldest = s;
	}
	*oldest = (lm_pull_stream){addr + AROUND * LM_PAGE, AROUND, t->turn};
	return AROUND;
}

static int local_pages(lm_pull *p, lm_pull_task *t, uint64_t addr, uint64_t page, uint64_t pages)
{
	int err = 0;

	while (pages && !err) {
		uint64_t n = lm_pull_local(p, t, addr, pages, &err);

		if (!n)
			return err ? err : EPROTO;
		lm_pull_claim(p, t, page, n);
		addr += n * LM_PAGE;
		page += n;
		pages -= n;
	}
	return err;
}

static int fault(lm_pull *p, uint32_t i, const lm_fault_head *head)
{
	lm_pull_task *t = &p->task[i];
	uint64_t run, page = lm_index_of(&t->index, head->addr, &run), want;
	bool local;

	lm_flow_fault(&p->flow, lm_pull_now());
	/* Not to be asked for: it is on its way. */
	if (page == LM_NO_PAGE || !lm_bit(t->todo, page))
		return 0;
	want = lm_pull_span(t, head->addr, run_from(t, page, around(t, head->addr)), &local);
	p->stats.urgent++;
	if (local)
		return local_pages(p, t, head->addr, page, want);
	if (lm_pull_ask(p, i, head->addr, want))
		lm_pull_claim(p, t, page, want);
	else
		t->cursor = page; /* 4000 requests are in flight: it is the next one then */
	return 0;
}

/* Reads what a process's lazy memory asks for. */
static int read_faults(lm_pull *p, uint32_t i)
{
	lm_pull_task *t = &p->task[i];
	uint8_t in[64 * sizeof(lm_fault_head)];
	int err = 0;

	for (;;) {
		ssize_t got;
		size_t n, at;

		memcpy(in, t->part, t->part_n);
		got = recv(t->faults, in + t->part_n, sizeof(in) - t->part_n, MSG_DONTWAIT);
		if (got < 0 && (errno == EAGAIN || errno == EINTR))
			return err;
		if (got <= 0) {
			t->faults = -1;
			return err;
		}
		n = t->part_n + (size_t)got;
		for (at = 0; !err && n - at >= sizeof(lm_fault_head); at += sizeof(lm_fault_head)) {
			lm_fault_head head;

			memcpy(&head, in + at, sizeof(head));
			err = fault(p, i, &head);
		}
		if (err)
			return err;
		t->part_n = n - at;
		memcpy(t->part, in + at, t->part_n);
	}
}

/* The next pages of a process that are to be asked for and still wanted; 0: there are none. */
static uint64_t next_run(lm_pull *p, lm_pull_task *t, uint64_t *page, uint64_t *addr)
{
	bool wrapped = false;
	uint64_t run;

	while (t->ntodo) {
		uint64_t at = lm_bits_next(t->todo, t->cursor, t->index.pages), from, wanted, to;

		if (at == t->index.pages) {
			if (wrapped)
				break;
			wrapped = true;
			t->cursor = 0;
			continue;
		}
		*addr = from = lm_index_addr(&t->index, at, &run);
		wanted = lm_lazy_wanted(t->z, addr, LM_ADDR_END);
		/* What was unmapped or discarded meanwhile lies before that. */
		to = wanted && lm_index_of(&t->index, *addr, &run) != LM_NO_PAGE ? lm_index_of(&t->index, *addr, &run)
										: t->index.pages;
		if (to > at)
			lm_pull_claim(p, t, at, to - at);
		t->cursor = to;
		if (to == t->index.pages || !lm_bit(t->todo, to))
			continue;
		*page = to;
		from = run_from(t, to, lm_flow_chunk(&p->flow));
		return from < wanted ? from : wanted;
	}
	return 0;
}

/* Fills the window, the processes in turn; and reads one chunk from images. */
static int background(lm_pull *p, bool *more)
{
	uint64_t page, addr, n;
	uint32_t idle = 0;
	bool local, full;
	int err = 0;

	*more = false;
	while (idle < p->ntasks && !err) {
		uint32_t i = p->next++ % p->ntasks;
		lm_pull_task *t = &p->task[i];

		idle++;
		if (!t->ntodo)
			continue;
		n = next_run(p, t, &page, &addr);
		if (!n)
			continue;
		n = lm_pull_span(t, addr, n, &local);
		full = p->flying >= p->flow.window ||
		       p->record->sent - p->record->answered >= LM_PULL_RING - RING_FREE;
		if (local ? *more : full)
			continue;
		t->cursor = page + n;
		idle = 0;
		if (local) {
			err = local_pages(p, t, addr, page, n);
			*more = true;
		} else if (lm_pull_ask(p, i, addr, n)) {
			lm_pull_claim(p, t, page, n);
		}
	}
	return err;
}

/* Waits. A halted processor takes longer to wake than an answer on a fast link to come: so it looks again for a
 * moment, when one is due and it is much that is fetched. */
static int wait_for_work(lm_pull *p, struct pollfd *fds, bool busy)
{
	uint64_t until = p->flying >= SPIN_BYTES ? lm_pull_now() + SPIN_NS : 0;
	nfds_t n = 2;
	uint32_t i;
	int found;

	fds[0] = (struct pollfd){p->wake, POLLIN, 0};
	fds[1] = (struct pollfd){p->sock, POLLIN, 0};
	if (p->flushed < p->record->sent * p->width)
		fds[1].events |= POLLOUT;
	for (i = 0; i < p->ntasks; i++)
		fds[n++] = (struct pollfd){p->task[i].faults, POLLIN, 0};
	do
		found = poll(fds, n, busy || until ? 0 : -1);
	while (!found && until && !busy && lm_pull_now() < until);
	if (!found && !busy)
		found = poll(fds, n, -1);
	return found < 0 && errno != EINTR ? errno : 0;
}

int lm_pull_run(lm_pull *p)
{
	struct pollfd *fds = calloc(p->ntasks + 2, sizeof(*fds));
	int err = fds ? 0 : ENOMEM;
	bool more = false;
	uint32_t i;

	while (!err && !p->stop) {
		eventfd_t ignored;

		err = wait_for_work(p, fds, more);
		if (!err && fds[0].revents)
			eventfd_read(p->wake, &ignored);
		for (i = 0; i < p->ntasks && !err; i++)
			if (fds[i + 2].revents)
				err = read_faults(p, i);
		if (!err && fds[1].revents & ~POLLOUT)
			err = lm_pull_receive(p);
		/* Behind it: what an answer left out is asked for again before anything is waited for. */
		if (!err && p->background)
			err = background(p, &more);
		if (!err && p->sock >= 0)
			err = lm_pull_flush(p);
		p->stats.window = p->flow.window;
		p->stats.rate = p->flow.rate;
		p->stats.round_trip = p->flow.round_trip;
	}
	free(fds);
	return err;
}

void lm_pull_background(lm_pull *p)
{
	p->background = true;
	eventfd_write(p->wake, 1);
}

void lm_pull_stop(lm_pull *p)
{
	p->stop = true;
	eventfd_write(p->wake, 1);
}

void lm_pull_get_stats(const lm_pull *p, lm_pull_stats *out)
{
	*out = (lm_pull_stats){p->stats.remote, p->stats.local,	 p->stats.requests, p->stats.urgent,
			       p->stats.left,	p->stats.window, p->stats.rate,	    p->stats.round_trip};
}
