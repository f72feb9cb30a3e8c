#define _GNU_SOURCE
#include "lazymig/uffd/lazy_record.h"

#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "lazymig/uffd/lazy_table.h"
#include "lazymig/uffd/uffd.h"

#define ENDED 0
#define EVENTS (1u << 20)

struct event {
	uint32_t kind, space;
	uint64_t a, b, c;
};

struct lm_record {
	uint64_t pages;
	_Atomic uint64_t events; /* that happened; those behind EVENTS are not known */
	struct event event[EVENTS];
	uint64_t placed[]; /* by page number */
};

uint64_t lm_lazy_record_size(uint64_t pages)
{
	return sizeof(lm_record) + (lm_bits_words(pages) + 1) * sizeof(uint64_t);
}

static uint32_t number_of(const lm_lazy *z, const void *space)
{
	uint32_t i;

	for (i = 0; i < z->nspaces && z->space[i] != space; i++)
		;
	return i;
}

void lm_record_event(lm_lazy *z, uint32_t kind, const void *space, uint64_t a, uint64_t b, uint64_t c)
{
	lm_record *r = z->record;

	if (!r)
		return;
	if (r->events < EVENTS)
		r->event[r->events] = (struct event){kind, number_of(z, space), a, b, c};
	r->events++; /* last: what is not whole is not told of */
}

/* The keeper gets it before anything else is done: without it the child would read zeroes when this process dies. */
void lm_record_fork(lm_lazy *z, const void *parent, int uffd)
{
	union {
		struct cmsghdr align;
		char room[CMSG_SPACE(sizeof(int))];
	} control = {0};
	struct iovec v = {&z->keep, sizeof(z->keep)};
	struct msghdr m = {
		.msg_iov = &v, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)};
	struct cmsghdr *c = CMSG_FIRSTHDR(&m);

	if (!z->record)
		return;
	c->cmsg_level = SOL_SOCKET;
	c->cmsg_type = SCM_RIGHTS;
	c->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(c), &uffd, sizeof(uffd));
	sendmsg(z->keeper, &m, MSG_NOSIGNAL);
	lm_record_event(z, UFFD_EVENT_FORK, parent, 0, 0, 0);
}

void lm_record_placed(lm_lazy *z, uint64_t page, uint64_t n)
{
	if (z->record)
		lm_bits_set(z->record->placed, page, n);
}

static bool fits(const lm_lazy *z, const lm_record *r, uint64_t size)
{
	return z->asked && size >= lm_lazy_record_size(z->index.pages) && r->pages == z->index.pages;
}

int lm_lazy_record(lm_lazy *z, void *record, uint64_t size, int keeper, const lm_keep *keep)
{
	lm_record *r = record;
	int err = 0;

	lm_lock_bulk(z);
	if (!r->pages && !r->events)
		r->pages = z->index.pages;
	if (fits(z, r, size)) {
		z->record = r;
		z->keeper = keeper;
		z->keep = *keep;
	} else {
		err = EINVAL;
	}
	lm_unlock_bulk(z);
	return err;
}

static int replay(lm_lazy *z, const lm_record *r, const int *child, uint64_t children)
{
	uint64_t i, next = 0;

	for (i = 0; i < r->events; i++) {
		const struct event *e = &r->event[i];
		lm_space *s;

		if (e->space >= z->nspaces)
			return EINVAL;
		s = z->space[e->space];
		switch (e->kind) {
		case ENDED:
			lm_space_drop(z, s);
			break;
		case UFFD_EVENT_FORK:
			lm_space_fork(z, s, next < children ? child[next] : -1);
			next++;
			break;
		case UFFD_EVENT_REMAP:
			lm_space_remap(z, s, e->a, e->b, e->c);
			break;
		case UFFD_EVENT_REMOVE:
			lm_space_remove(z, s, e->a, e->b);
			break;
		case UFFD_EVENT_UNMAP:
			lm_space_unmap(z, s, e->a, e->b);
			break;
		default:
			return EINVAL;
		}
	}
	return z->stats.err;
}

int lm_lazy_replay(lm_lazy *z, const void *record, uint64_t size, const int *child, uint64_t children)
{
	const lm_record *r = record;
	size_t i, k;
	int err;

	if (!fits(z, r, size))
		return EINVAL;
	if (r->events > EVENTS)
		return EOVERFLOW;
	lm_lock_bulk(z);
	err = replay(z, r, child, children);
	for (i = 0; !err && i < z->nspaces; i++) {
		lm_space *s = z->space[i];
		uint64_t page = 0, end, pages = z->index.pages;

		for (; s->pending && (page = lm_bits_next(r->placed, page, pages)) < pages; page = end) {
			uint64_t gone;

			end = lm_bits_next_clear(r->placed, page, pages);
			gone = lm_bits_clear(s->pending, page, end - page);
			s->left -= gone;
			z->stats.remaining -= gone;
		}
		for (k = 0; s->uffd >= 0 && k < s->areas.n; k++)
			lm_uffd_wake(s->uffd, s->areas.a[k].start, s->areas.a[k].end - s->areas.a[k].start);
	}
	z->told_done = false;
	lm_tell_if_done(z);
	lm_unlock_bulk(z);
	return err;
}
