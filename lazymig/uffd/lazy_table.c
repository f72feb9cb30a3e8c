/* The states of lazy pages, and what faults, events and arriving pages do to them. */
#define _GNU_SOURCE
#include "lazymig/uffd/lazy_table.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "lazymig/uffd/uffd.h"

uint64_t lm_now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* pthread mutexes are not fair: a bulk thread that unlocks and locks again would win over a waiting fault loop.
 * With three of them it has to queue behind that one: whoever wants `data` holds `next` while it waits. */
void lm_lock_fault(lm_lazy *z)
{
	pthread_mutex_lock(&z->next);
	pthread_mutex_lock(&z->data);
	pthread_mutex_unlock(&z->next);
}

void lm_unlock_fault(lm_lazy *z)
{
	pthread_mutex_unlock(&z->data);
}

void lm_lock_bulk(lm_lazy *z)
{
	pthread_mutex_lock(&z->bulk);
	lm_lock_fault(z);
}

void lm_unlock_bulk(lm_lazy *z)
{
	lm_unlock_fault(z);
	pthread_mutex_unlock(&z->bulk);
}

static void notify(lm_lazy *z)
{
	eventfd_write(z->done_fd, 1);
}

/* Serving goes no further: whoever waits, waits on. A missing page is never answered with zeroes. */
void lm_failed(lm_lazy *z, int err)
{
	if (!z->stats.err) {
		z->stats.err = err;
		notify(z);
	}
}

void lm_tell_if_done(lm_lazy *z)
{
	if (!z->stats.remaining && !z->told_done) {
		z->told_done = true;
		notify(z);
	}
}

static void add_waiter(lm_lazy *z, lm_waiters *list, lm_waiter w)
{
	if (list->n == list->room) {
		size_t room = list->room ? 2 * list->room : 64;
		lm_waiter *p = realloc(list->w, room * sizeof(*p));

		if (!p) {
			lm_failed(z, ENOMEM);
			return;
		}
		list->w = p;
		list->room = room;
	}
	list->w[list->n++] = w;
}

static void account(lm_lazy *z, uint64_t since, uint64_t now)
{
	uint64_t ns = now - since, us = ns / 1000;
	unsigned int slot = us ? 64 - (unsigned int)__builtin_clzll(us) : 0;

	z->stats.stall_ns += ns;
	z->stats.hist[slot < 24 ? slot : 23]++;
}

/* Those who waited for pages [page, page + n) of this space have been woken. */
static void settle(lm_lazy *z, const lm_space *s, uint64_t page, uint64_t n)
{
	uint64_t now = 0;
	size_t i = 0;

	while (i < z->waiting.n) {
		lm_waiter *w = &z->waiting.w[i];

		if (w->space != s || w->page - page >= n) {
			i++;
			continue;
		}
		if (!now)
			now = lm_now();
		account(z, w->since, now);
		*w = z->waiting.w[--z->waiting.n];
	}
}

/* Forgets who waits in [start, end): they were woken, to find out what is there now. */
static void forget_waiters(lm_waiters *list, const lm_space *s, uint64_t start, uint64_t end)
{
	size_t i = 0;

	while (i < list->n) {
		if (list->w[i].space == s && list->w[i].dst - start < end - start)
			list->w[i] = list->w[--list->n];
		else
			i++;
	}
}

static uint64_t clear_pending(lm_lazy *z, lm_space *s, uint64_t page, uint64_t n)
{
	uint64_t cleared = lm_bits_clear(s->pending, page, n);

	s->left -= cleared;
	z->stats.remaining -= cleared;
	return cleared;
}

lm_space *lm_space_add(lm_lazy *z, int uffd)
{
	lm_space *s = NULL;
	size_t i;

	for (i = 1; i < z->nspaces && !s; i++)
		if (!z->space[i]->pending)
			s = z->space[i]; /* one whose process ended */
	if (!s && z->nspaces == z->room) {
		size_t room = z->room ? 2 * z->room : 4;
		lm_space **p = realloc(z->space, room * sizeof(*p));

		if (!p)
			return NULL;
		z->space = p;
		z->room = room;
	}
	if (!s) {
		s = calloc(1, sizeof(*s));
		if (!s)
			return NULL;
		s->uffd = -1;
		z->space[z->nspaces++] = s;
	}
	if (uffd >= 0) {
		struct epoll_event ev = {.events = EPOLLIN, .data.fd = uffd};

		/* poll() of a blocking userfaultfd only ever says POLLERR. */
		fcntl(uffd, F_SETFL, fcntl(uffd, F_GETFL) | O_NONBLOCK);
		if (epoll_ctl(z->epoll, EPOLL_CTL_ADD, uffd, &ev))
			return NULL;
		s->uffd = uffd;
	}
	z->stats.spaces++;
	return s;
}

/* The process has ended, or runs another program. The space stays in the list, empty, for the next child. */
void lm_space_drop(lm_lazy *z, lm_space *s)
{
	lm_record_event(z, 0, s, 0, 0, 0);
	if (s->pending)
		z->stats.dropped += clear_pending(z, s, 0, z->index.pages);
	free(s->pending);
	s->pending = NULL;
	forget_waiters(&z->waiting, s, 0, UINT64_MAX);
	forget_waiters(&z->deferred, s, 0, UINT64_MAX);
	if (s->uffd >= 0) {
		epoll_ctl(z->epoll, EPOLL_CTL_DEL, s->uffd, NULL);
		if (s != z->space[0]) /* the first one is the caller's */
			close(s->uffd);
		s->uffd = -1;
	}
	z->stats.spaces--;
	memset(s->expected, 0, sizeof(s->expected));
	lm_areas_free(&s->areas);
}

static void wake(const lm_space *s, uint64_t start, uint64_t end)
{
	if (s->uffd >= 0)
		lm_uffd_wake(s->uffd, start, end - start);
}

struct in_space {
	lm_lazy *z;
	lm_space *s;
};

/* Nobody will ever need these pages of the area. */
static void give_up(void *arg, const lm_area *piece)
{
	struct in_space *in = arg;
	uint64_t addr = piece->src, end = piece->src + (piece->end - piece->start), page, run;

	while (lm_index_next(&in->z->index, &addr, end, &page, &run))
		in->z->stats.dropped += clear_pending(in->z, in->s, page, run);
}

void lm_space_fork(lm_lazy *z, const lm_space *parent, int uffd)
{
	lm_space *s = lm_space_add(z, uffd);
	size_t words = lm_bits_words(z->index.pages) + 1;

	z->stats.forks++;
	if (s) {
		lm_areas_copy(&s->areas, &parent->areas);
		s->pending = malloc(words * sizeof(*s->pending));
	}
	if (!s || !s->pending || s->areas.failed) {
		lm_failed(z, ENOMEM); /* its uffd stays open: the child waits rather than read zeroes */
		return;
	}
	memcpy(s->pending, parent->pending, words * sizeof(*s->pending));
	s->left = parent->left;
	z->stats.remaining += s->left;
}

void lm_space_remap(lm_lazy *z, lm_space *s, uint64_t from, uint64_t to, uint64_t len)
{
	struct in_space in = {z, s};

	if (from == to)
		return;
	lm_areas_move(&s->areas, from, to, len, give_up, &in);
	s->expected[s->next_expected++ % LM_EXPECTED] = (lm_range){from, from + len};
	forget_waiters(&z->waiting, s, from, from + len);
	wake(s, from, from + len);
}

void lm_space_unmap(lm_lazy *z, lm_space *s, uint64_t start, uint64_t end)
{
	struct in_space in = {z, s};
	unsigned int i;

	for (i = 0; i < LM_EXPECTED; i++) {
		if (s->expected[i].end == end && s->expected[i].start == start) {
			s->expected[i] = (lm_range){0, 0};
			wake(s, start, end);
			return;
		}
	}
	lm_areas_cut(&s->areas, start, end, give_up, &in);
	forget_waiters(&z->waiting, s, start, end);
	wake(s, start, end);
}

void lm_space_remove(lm_lazy *z, lm_space *s, uint64_t start, uint64_t end)
{
	struct in_space in = {z, s};

	lm_areas_each(&s->areas, start, end, give_up, &in);
	forget_waiters(&z->waiting, s, start, end);
	wake(s, start, end);
}

void lm_request(lm_lazy *z, uint64_t src, uint32_t pages)
{
	lm_fault_head head = {src, pages, 0};

	z->stats.requested += pages;
	if (z->sock < 0)
		return; /* asked for again when a connection is attached */
	if (z->out_n + sizeof(head) > z->out_room) {
		size_t room = z->out_room ? 2 * z->out_room : 4096;
		uint8_t *p = realloc(z->out, room);

		if (!p) {
			lm_failed(z, ENOMEM);
			return;
		}
		z->out = p;
		z->out_room = room;
	}
	memcpy(z->out + z->out_n, &head, sizeof(head));
	z->out_n += sizeof(head);
}

/* A page that nobody ever wrote, or that was discarded: the kernel's zero page is what belongs there. */
static void zero_fault(lm_lazy *z, lm_space *s, uint64_t dst, uint32_t tid, uint64_t since)
{
	lm_result r;

	if (s->uffd < 0)
		return;
	r = lm_uffd_zeropage(s->uffd, dst, LM_PAGE, 0);
	switch (r.err) {
	case 0:
		break;
	case EAGAIN: /* an event is unread: it may say that other pages are here now */
	case ENOMEM:
		add_waiter(z, &z->deferred, (lm_waiter){s, dst, LM_NO_PAGE, since, tid});
		return;
	case ESRCH:
		lm_space_drop(z, s);
		return;
	default: /* EEXIST: somebody was quicker. ENOENT: unmapped. Both find out when they try again. */
		wake(s, dst, dst + LM_PAGE);
	}
	z->stats.zero_faults++;
	account(z, since, lm_now());
}

void lm_space_fault(lm_lazy *z, lm_space *s, uint64_t dst, uint32_t tid, uint64_t since)
{
	const lm_area *a;
	uint64_t src, page = LM_NO_PAGE, run;
	size_t i;

	if (z->stats.err)
		return;
	dst &= ~(LM_PAGE - 1);
	a = lm_areas_at(&s->areas, dst);
	if (a) {
		src = a->src + (dst - a->start);
		page = lm_index_of(&z->index, src, &run);
	}
	if (page == LM_NO_PAGE || !lm_bit(s->pending, page)) {
		zero_fault(z, s, dst, tid, since);
		return;
	}
	/* A signal makes a thread fault again on the page it already waits for, or first on what its handler needs: then it
	 * waits for the other page, which stays asked for, no longer. */
	for (i = 0; tid && i < z->waiting.n; i++) {
		lm_waiter *w = &z->waiting.w[i];

		if (w->tid != tid || w->space != s)
			continue;
		if (w->dst == dst)
			return;
		account(z, w->since, since);
		*w = z->waiting.w[--z->waiting.n];
		break;
	}
	z->stats.faults++;
	add_waiter(z, &z->waiting, (lm_waiter){s, dst, page, since, tid});
	if (!lm_bit(z->asked, page)) {
		lm_bit_set(z->asked, page);
		lm_request(z, src, 1);
	}
}

void lm_retry_deferred(lm_lazy *z)
{
	lm_waiters again = z->deferred;
	size_t i;

	if (!again.n)
		return;
	z->deferred = (lm_waiters){0};
	for (i = 0; i < again.n; i++)
		if (again.w[i].space->uffd >= 0)
			lm_space_fault(z, again.w[i].space, again.w[i].dst, again.w[i].tid, again.w[i].since);
	free(again.w);
}

static void event(lm_lazy *z, lm_space *s, const struct uffd_msg *m)
{
	z->stats.events++;
	switch (m->event) {
	case UFFD_EVENT_FORK:
		lm_record_fork(z, s, (int)m->arg.fork.ufd);
		lm_space_fork(z, s, (int)m->arg.fork.ufd);
		break;
	case UFFD_EVENT_REMAP:
		lm_record_event(z, m->event, s, m->arg.remap.from, m->arg.remap.to, m->arg.remap.len);
		lm_space_remap(z, s, m->arg.remap.from, m->arg.remap.to, m->arg.remap.len);
		break;
	case UFFD_EVENT_REMOVE:
		lm_record_event(z, m->event, s, m->arg.remove.start, m->arg.remove.end, 0);
		lm_space_remove(z, s, m->arg.remove.start, m->arg.remove.end);
		break;
	case UFFD_EVENT_UNMAP:
		lm_record_event(z, m->event, s, m->arg.remove.start, m->arg.remove.end, 0);
		lm_space_unmap(z, s, m->arg.remove.start, m->arg.remove.end);
		break;
	}
	if (s->areas.failed)
		lm_failed(z, ENOMEM);
}

static void read_space(lm_lazy *z, lm_space *s)
{
	struct uffd_msg msg[16];
	uint64_t now;
	size_t i, n;

	do {
		ssize_t got = read(s->uffd, msg, sizeof(msg));

		if (got <= 0)
			return; /* EAGAIN: nothing there */
		n = (size_t)got / sizeof(*msg);
		now = lm_now();
		/* The kernel hands out faults first. But a fault may be about the place that mremap has just moved
		 * pages to, and once both are read nothing keeps us from zeroing it: events come first here. */
		for (i = 0; i < n; i++)
			if (msg[i].event != UFFD_EVENT_PAGEFAULT)
				event(z, s, &msg[i]);
		for (i = 0; i < n; i++)
			if (msg[i].event == UFFD_EVENT_PAGEFAULT)
				lm_space_fault(z, s, msg[i].arg.pagefault.address,
					       msg[i].arg.pagefault.feat.ptid, now);
	} while (n == 16 && s->uffd >= 0);
}

void lm_read_events(lm_lazy *z, int uffd)
{
	size_t i;

	for (i = 0; i < z->nspaces; i++)
		if (z->space[i]->uffd >= 0 && (uffd < 0 || z->space[i]->uffd == uffd))
			read_space(z, z->space[i]);
}

/* Places pending pages of one space. false: events must be read first, nothing else is wrong. */
static bool place_in_space(lm_lazy *z, lm_space *s, uint64_t page, uint64_t src, uint64_t n, const uint8_t *data,
			   uint64_t *placed)
{
	uint64_t at = page, end = page + n;

	while (s->uffd >= 0 && s->left) {
		uint64_t from = lm_bits_next(s->pending, at, end), count, dst, done;
		const lm_area *a;
		lm_result r;

		if (from == end)
			return true;
		count = lm_bits_next_clear(s->pending, from, end) - from;
		src += (from - at) * LM_PAGE;
		data += (from - at) * LM_PAGE;
		at = from;
		a = lm_areas_of_src(&s->areas, src);
		if (!a) { /* unmapped pages are not pending: only when memory for the table ran out */
			lm_failed(z, ENOMEM);
			return true;
		}
		dst = a->start + (src - a->src);
		if (count > (a->end - dst) / LM_PAGE)
			count = (a->end - dst) / LM_PAGE;
		r = lm_uffd_copy(s->uffd, dst, data, count * LM_PAGE, 0);
		done = r.done / LM_PAGE;
		if (r.err && !done) {
			switch (r.err) {
			case EAGAIN:
			case ENOMEM:
				return false;
			case ESRCH:
				lm_space_drop(z, s);
				return true;
			case ENOENT:
				/* Not in one mapping, or not mapped. Once more, also for a single page: the kernel may
				 * have looked whether mappings change just before an mremap took this one away, and a
				 * page given up now would be zero at its new place. Until that event is read, which
				 * nobody else does meanwhile, a second try says EAGAIN. */
				r = lm_uffd_copy(s->uffd, dst, data, LM_PAGE, 0);
				if (r.err == EAGAIN || r.err == ENOMEM)
					return false;
				/* fall through */
			case EEXIST:
				done = 1;
				if (r.err)
					wake(s, dst, dst + LM_PAGE);
				break;
			default:
				lm_failed(z, r.err);
				return true;
			}
		}
		clear_pending(z, s, at, done);
		settle(z, s, at, done);
		*placed += done;
		at += done;
		src += done * LM_PAGE;
		data += done * LM_PAGE;
	}
	return true;
}

/* These pages are zero at the source. Those who wait get the zero page; the others when they come. */
static void zero_in_space(lm_lazy *z, lm_space *s, uint64_t page, uint64_t n, uint64_t *placed)
{
	size_t i = 0;

	*placed += clear_pending(z, s, page, n);
	while (i < z->waiting.n) {
		lm_waiter w = z->waiting.w[i];

		if (w.space != s || w.page - page >= n) {
			i++;
			continue;
		}
		z->waiting.w[i] = z->waiting.w[--z->waiting.n];
		add_waiter(z, &z->deferred, w);
	}
}

bool lm_place_step(lm_lazy *z, uint64_t page, uint64_t src, uint64_t n, const uint8_t *data, uint64_t *placed)
{
	bool again = false;
	size_t i;

	for (i = 0; i < z->nspaces; i++) {
		if (!z->space[i]->left)
			continue;
		if (data)
			again |= !place_in_space(z, z->space[i], page, src, n, data, placed);
		else
			zero_in_space(z, z->space[i], page, n, placed);
	}
	if (again)
		return false;
	lm_bits_clear(z->asked, page, n);
	lm_record_placed(z, page, n);
	if (!data)
		lm_retry_deferred(z);
	return true;
}
