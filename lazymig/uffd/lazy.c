/* The fault loop, the fault connection, and what other threads may call. */
#define _GNU_SOURCE
#include "lazymig/uffd/lazy.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "lazymig/uffd/lazy_table.h"
#include "lazymig/uffd/uffd.h"

#define MODE_MISSING 1
/* Pages placed under one lock, which is how long a fault may have to wait for it. */
#define STEP 8

lm_lazy *lm_lazy_new(int uffd, int done_fd)
{
	struct epoll_event ev = {.events = EPOLLIN};
	lm_lazy *z = calloc(1, sizeof(*z));

	if (!z)
		return NULL;
	pthread_mutex_init(&z->bulk, NULL);
	pthread_mutex_init(&z->next, NULL);
	pthread_mutex_init(&z->data, NULL);
	z->sock = z->new_sock = -1;
	z->done_fd = done_fd;
	z->epoll = epoll_create1(EPOLL_CLOEXEC);
	z->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	ev.data.fd = z->wake_fd;
	if (z->epoll < 0 || z->wake_fd < 0 || epoll_ctl(z->epoll, EPOLL_CTL_ADD, z->wake_fd, &ev) ||
	    !lm_space_add(z, uffd)) {
		lm_lazy_free(z);
		return NULL;
	}
	return z;
}

void lm_lazy_free(lm_lazy *z)
{
	int fds[] = {z->epoll, z->wake_fd, z->sock, z->new_sock};
	size_t i;

	for (i = 0; i < z->nspaces; i++) {
		lm_space *s = z->space[i];

		if (i && s->uffd >= 0)
			close(s->uffd);
		lm_areas_free(&s->areas);
		free(s->pending);
		free(s);
	}
	for (i = 0; i < sizeof(fds) / sizeof(*fds); i++)
		if (fds[i] >= 0)
			close(fds[i]);
	lm_index_free(&z->index);
	free(z->space);
	free(z->asked);
	free(z->waiting.w);
	free(z->deferred.w);
	free(z->out);
	free(z);
}

/* What lm_lazy_arm does but for the kernel's part. Locked. */
static int fill_in(lm_lazy *z, const lm_range *areas, uint64_t nareas, const lm_range *pending, uint64_t npending)
{
	lm_space *s = z->space[0];
	int err = z->asked ? EALREADY : lm_index_init(&z->index, pending, npending);

	if (err)
		return err;
	lm_areas_init(&s->areas, areas, nareas);
	s->pending = lm_bits_ones(z->index.pages);
	z->asked = calloc(lm_bits_words(z->index.pages) + 1, sizeof(*z->asked));
	if (s->areas.failed || !s->pending || !z->asked)
		return ENOMEM;
	s->left = z->stats.remaining = z->index.pages;
	return 0;
}

int lm_lazy_adopt(lm_lazy *z, const lm_range *areas, uint64_t nareas, const lm_range *pending, uint64_t npending)
{
	int err;

	lm_lock_fault(z);
	err = fill_in(z, areas, nareas, pending, npending);
	z->told_done = false;
	lm_tell_if_done(z);
	lm_unlock_fault(z);
	return err;
}

lm_result lm_lazy_arm(lm_lazy *z, const lm_range *areas, uint64_t nareas, const lm_range *pending,
		      uint64_t npending)
{
	lm_space *s = z->space[0];
	lm_result result = {0};
	uint64_t ioctls;

	lm_lock_fault(z);
	result.err = fill_in(z, areas, nareas, pending, npending);
	if (result.err)
		goto out;
	for (; result.done < nareas; result.done++) {
		const lm_range *r = &areas[result.done];

		result.err = lm_uffd_register(s->uffd, r->start, r->end - r->start, MODE_MISSING, &ioctls);
		if (result.err)
			break;
	}
	if (result.err) {
		uint64_t i;

		for (i = 0; i < result.done; i++)
			lm_uffd_unregister(s->uffd, areas[i].start, areas[i].end - areas[i].start);
		s->left = z->stats.remaining = 0;
		s->areas.n = 0;
	}
	/* The loop may have run before, with nothing pending: that was not the end. */
	z->told_done = false;
	lm_tell_if_done(z);
out:
	lm_unlock_fault(z);
	return result;
}

static void lose(lm_lazy *z, int err)
{
	if (z->sock < 0)
		return;
	epoll_ctl(z->epoll, EPOLL_CTL_DEL, z->sock, NULL); /* the caller may have a duplicate of it open */
	close(z->sock);
	z->sock = -1;
	z->stats.lost = err;
	eventfd_write(z->done_fd, 1);
}

/* Sends the requests that are due, as far as the socket takes them. Locked. */
static void flush_requests(lm_lazy *z)
{
	struct epoll_event ev = {.events = EPOLLIN, .data.fd = z->sock};
	bool want;

	if (z->sock < 0)
		return;
	if (z->out_n) {
		ssize_t n = send(z->sock, z->out, z->out_n, MSG_DONTWAIT | MSG_NOSIGNAL);

		if (n < 0 && errno != EAGAIN && errno != EINTR) {
			lose(z, errno);
			return;
		}
		if (n > 0) {
			z->out_n -= (size_t)n;
			memmove(z->out, z->out + n, z->out_n);
		}
	}
	want = z->out_n > 0;
	if (want != z->want_write) {
		ev.events |= want ? EPOLLOUT : 0;
		z->want_write = want;
		epoll_ctl(z->epoll, EPOLL_CTL_MOD, z->sock, &ev);
	}
}

int lm_lazy_attach(lm_lazy *z, int sock)
{
	int own = dup(sock), old;

	if (own < 0)
		return errno;
	lm_lock_fault(z);
	old = z->new_sock;
	z->new_sock = own;
	z->stats.lost = 0;
	lm_unlock_fault(z);
	if (old >= 0)
		close(old);
	eventfd_write(z->wake_fd, 1);
	return 0;
}

/* Takes up a connection that lm_lazy_attach left here. Locked. */
static void switch_socket(lm_lazy *z)
{
	struct epoll_event ev = {.events = EPOLLIN};
	uint64_t page, run, end, addr;
	int one = 1;

	if (z->new_sock < 0)
		return;
	if (z->sock >= 0) {
		epoll_ctl(z->epoll, EPOLL_CTL_DEL, z->sock, NULL);
		close(z->sock);
	}
	z->sock = z->new_sock;
	z->new_sock = -1;
	z->in_n = z->out_n = 0;
	z->want_write = false;
	ev.data.fd = z->sock;
	setsockopt(z->sock, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	if (epoll_ctl(z->epoll, EPOLL_CTL_ADD, z->sock, &ev)) {
		lose(z, errno);
		return;
	}
	if (!z->asked)
		return;
	for (page = lm_bits_next(z->asked, 0, z->index.pages); page < z->index.pages;
	     page = lm_bits_next(z->asked, end, z->index.pages)) {
		addr = lm_index_addr(&z->index, page, &run);
		end = lm_bits_next_clear(z->asked, page, page + (run < LM_FAULT_MAX_PAGES ? run : LM_FAULT_MAX_PAGES));
		lm_request(z, addr, (uint32_t)(end - page));
	}
}

/* An event of userfaultfd is over when the thread that caused it has run again. */
static void pause_a_little(unsigned int tries)
{
	struct timespec t = {0, tries < 200 ? 50000 : 1000000};

	if (tries < 50)
		sched_yield();
	else
		nanosleep(&t, NULL);
}

/* Places up to STEP pages of the ranges from (*i, *at) on, all under one lock, and moves that position on. Pages of
 * data come one after another. False when an event has to be read first; `placed` is of the step that is not done. */
static bool place_some(lm_lazy *z, const lm_range *r, uint64_t n, uint64_t *i, uint64_t *at, const uint8_t **data,
		       bool fault, uint64_t *placed, int *err)
{
	uint64_t left = STEP, *count = *data ? fault ? &z->stats.received : &z->stats.pushed : &z->stats.zeroed;

	while (*i < n && left) {
		uint64_t addr = r[*i].start + *at, some = (r[*i].end - addr) / LM_PAGE, run = 0;
		uint64_t page = lm_index_of(&z->index, addr, &run);

		if (page == LM_NO_PAGE) {
			*err = EPROTO;
			return true;
		}
		if (some > run)
			some = run;
		if (*data && some > left)
			some = left;
		if (!lm_place_step(z, page, addr, some, *data, placed))
			return false;
		*count += *placed;
		z->stats.duplicates += *placed < some ? some - *placed : 0;
		*placed = 0;
		left -= some < left ? some : left;
		if (*data)
			*data += some * LM_PAGE;
		*at += some * LM_PAGE;
		if (r[*i].start + *at == r[*i].end) {
			++*i;
			*at = 0;
		}
	}
	return true;
}

static int place(lm_lazy *z, const lm_range *r, uint64_t n, const uint8_t *data, bool fault)
{
	uint64_t placed = 0, i = 0, at = 0;
	unsigned int tries = 0;
	int err = 0;

	while (i < n && !err) {
		bool done;

		if (fault)
			lm_lock_fault(z);
		else
			lm_lock_bulk(z);
		done = place_some(z, r, n, &i, &at, &data, fault, &placed, &err);
		if (!done) {
			lm_read_events(z, -1);
			lm_retry_deferred(z);
		}
		flush_requests(z);
		lm_tell_if_done(z);
		if (!err)
			err = z->stop ? ECANCELED : z->stats.err;
		if (fault)
			lm_unlock_fault(z);
		else
			lm_unlock_bulk(z);
		if (done)
			tries = 0;
		else
			pause_a_little(tries++);
	}
	return err;
}

int lm_lazy_covers(lm_lazy *z, uint64_t addr, uint64_t pages)
{
	return lm_index_covers(&z->index, addr, pages); /* the index never changes once armed */
}

int lm_lazy_place(lm_lazy *z, uint64_t addr, uint64_t pages, const uint8_t *data)
{
	return lm_lazy_place_ranges(z, &(lm_range){addr, addr + pages * LM_PAGE}, 1, data);
}

int lm_lazy_place_ranges(lm_lazy *z, const lm_range *r, uint64_t n, const uint8_t *data)
{
	uint64_t i;

	for (i = 0; i < n; i++)
		if (!lm_index_covers(&z->index, r[i].start, (r[i].end - r[i].start) / LM_PAGE))
			return EPROTO;
	return place(z, r, n, data, false);
}

/* Takes one whole reply out of the buffer: its size, 0 if it is not all there; err EPROTO if it cannot be one. */
static size_t take_reply(lm_lazy *z, const uint8_t *in, size_t n, int *err)
{
	lm_fault_head head;
	size_t size = sizeof(head);
	lm_range range;

	if (n < size)
		return 0;
	memcpy(&head, in, sizeof(head));
	if (!head.npages || head.npages > LM_FAULT_MAX_PAGES || head.addr % LM_PAGE || head.addr >= LM_ADDR_END ||
	    head.flags & ~LM_FAULT_ZERO || !lm_index_covers(&z->index, head.addr, head.npages)) {
		*err = EPROTO;
		return 0;
	}
	if (!(head.flags & LM_FAULT_ZERO))
		size += head.npages * LM_PAGE;
	if (n < size)
		return 0;
	range = (lm_range){head.addr, head.addr + head.npages * LM_PAGE};
	*err = place(z, &range, 1, head.flags & LM_FAULT_ZERO ? NULL : in + sizeof(head), true);
	return size;
}

/* Reads and places what has come on the fault connection; only the loop does. */
static void read_replies(lm_lazy *z)
{
	ssize_t n = recv(z->sock, z->in + z->in_n, sizeof(z->in) - z->in_n, MSG_DONTWAIT);
	size_t at = 0, size;
	int err = 0;

	if (n > 0) {
		z->in_n += (size_t)n;
		while (!err && (size = take_reply(z, z->in + at, z->in_n - at, &err)))
			at += size;
		z->in_n -= at;
		memmove(z->in, z->in + at, z->in_n);
	} else if (n == 0) {
		err = EPIPE;
	} else if (errno != EAGAIN && errno != EINTR) {
		err = errno;
	}
	if (err && err != ECANCELED) {
		lm_lock_fault(z);
		lose(z, err);
		lm_unlock_fault(z);
	}
}

void lm_be_quick(void)
{
	/* sched_setattr(2), for which the C library has no name. A running thread may end its slice before one that wakes
	 * up has a turn, unless the slice of that one is shorter: this is the shortest (Linux 6.12; not looked at before).
	 */
	const struct {
		uint32_t size, policy;
		uint64_t flags;
		int32_t nice;
		uint32_t priority;
		uint64_t slice_ns, deadline, period;
	} attr = {.size = sizeof(attr), .policy = SCHED_OTHER, .nice = -15, .slice_ns = 100000};

	/* Somebody waits for whatever the thread does, and it does little: it goes before threads that move bulk data.
	 * Halves the stall on a busy host; without the right to it all works as well. */
	syscall(SYS_sched_setattr, 0, &attr, 0);
}

void lm_lazy_run(lm_lazy *z, uint64_t spin_ns)
{
	struct epoll_event ev[16];
	uint64_t busy = lm_now();
	unsigned int idle = 0;

	lm_be_quick();

	while (!z->stop) {
		bool replies = false, spin = spin_ns && lm_now() - busy < spin_ns, waiting;
		eventfd_t ignored;
		int i, n;

		lm_lock_fault(z);
		switch_socket(z);
		flush_requests(z);
		waiting = z->deferred.n > 0;
		lm_unlock_fault(z);
		n = epoll_wait(z->epoll, ev, 16, spin || (waiting && idle < 100) ? 0 : waiting ? 1 : -1);
		if (n <= 0 && !waiting)
			continue;
		lm_lock_fault(z);
		for (i = 0; i < n; i++) {
			if (ev[i].data.fd == z->wake_fd)
				eventfd_read(z->wake_fd, &ignored);
			else if (ev[i].data.fd == z->sock)
				replies = ev[i].events & ~(uint32_t)EPOLLOUT;
			else
				lm_read_events(z, ev[i].data.fd);
		}
		lm_retry_deferred(z);
		flush_requests(z);
		lm_tell_if_done(z);
		replies &= z->sock >= 0;
		lm_unlock_fault(z);
		if (replies)
			read_replies(z);
		if (n > 0) {
			busy = spin_ns ? lm_now() : 0;
			idle = 0;
		} else {
			idle++;
			sched_yield(); /* to whoever caused the event that is in the way */
		}
	}
}

void lm_lazy_stop(lm_lazy *z)
{
	z->stop = true;
	eventfd_write(z->wake_fd, 1);
}

uint64_t lm_lazy_pending(lm_lazy *z, lm_range *out, uint64_t room)
{
	uint64_t page, end, run, found = 0, words = lm_bits_words(z->index.pages), i;
	uint64_t *any = calloc(words + 1, sizeof(*any));
	size_t s;

	if (!any)
		return UINT64_MAX;
	lm_lock_bulk(z);
	for (s = 0; s < z->nspaces; s++)
		for (i = 0; z->space[s]->left && i < words; i++)
			any[i] |= z->space[s]->pending[i];
	lm_unlock_bulk(z);
	for (page = lm_bits_next(any, 0, z->index.pages); page < z->index.pages;
	     page = lm_bits_next(any, end, z->index.pages)) {
		uint64_t addr = lm_index_addr(&z->index, page, &run);

		end = lm_bits_next_clear(any, page, page + run);
		if (found++ < room)
			out[found - 1] = (lm_range){addr, addr + (end - page) * LM_PAGE};
	}
	free(any);
	return found;
}

uint64_t lm_lazy_wanted(lm_lazy *z, uint64_t *addr, uint64_t end)
{
	uint64_t page, run, at = *addr, first = LM_NO_PAGE, n = 0;
	size_t i;

	lm_lock_bulk(z);
	while (first == LM_NO_PAGE && lm_index_next(&z->index, &at, end, &page, &run)) {
		for (i = 0; i < z->nspaces; i++) {
			uint64_t begin, stop = page + run, length;

			if (!z->space[i]->left || (begin = lm_bits_next(z->space[i]->pending, page, stop)) == stop)
				continue;
			length = lm_bits_next_clear(z->space[i]->pending, begin, stop) - begin;
			if (begin < first) {
				first = begin;
				n = length;
			} else if (begin == first && length > n) {
				n = length;
			}
		}
	}
	if (first != LM_NO_PAGE)
		*addr = lm_index_addr(&z->index, first, &run);
	lm_unlock_bulk(z);
	return n;
}

void lm_lazy_look(lm_lazy *z)
{
	size_t i;

	lm_lock_bulk(z);
	for (i = 0; i < z->nspaces; i++) {
		lm_space *s = z->space[i];

		/* Nothing is registered down there: ENOMEM only tells that the address space is gone. */
		if (s->uffd >= 0 && lm_uffd_unregister(s->uffd, LM_PAGE, LM_PAGE) == ENOMEM)
			lm_space_drop(z, s);
	}
	lm_tell_if_done(z);
	lm_unlock_bulk(z);
}

void lm_lazy_get_stats(lm_lazy *z, lm_lazy_stats *out)
{
	lm_lock_bulk(z);
	*out = z->stats;
	lm_unlock_bulk(z);
}

void lm_lazy_unregister(lm_lazy *z)
{
	size_t i, j;

	lm_lock_bulk(z);
	for (i = 0; i < z->nspaces; i++) {
		lm_space *s = z->space[i];

		for (j = 0; s->uffd >= 0 && j < s->areas.n; j++) {
			const lm_area *a = &s->areas.a[j];

			lm_uffd_unregister(s->uffd, a->start, a->end - a->start);
		}
	}
	lm_unlock_bulk(z);
}
