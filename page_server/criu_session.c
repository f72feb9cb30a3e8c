#define _GNU_SOURCE
#include "page_server/criu_session.h"

#include <errno.h>
#include <linux/sockios.h>
#include <poll.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <unistd.h>

#include "page_server/transfer.h"

#define BUFFER (1u << 20)
/* Pages of one answer: the asking side knows that it may get fewer than it asked for. */
#define MOST 1024u

struct served {
	uint64_t pid, n;
	lm_piece *piece;
	int *fds;
};

struct lm_ps {
	int sock, pages;
	size_t width; /* of messages; 0: not known yet */
	uint64_t dst_id;
	lm_entry *entry;
	uint64_t entries, room, end, offset;
	struct served *served;
	uint32_t nserved;
	bool paced;
	lm_flag cancel;
	uint8_t *buffer;
	_Atomic uint64_t received, sent;
};

lm_ps *lm_ps_new(int sock)
{
	lm_ps *s = calloc(1, sizeof(*s));

	if (!s)
		return NULL;
	s->sock = sock;
	s->pages = -1;
	s->buffer = malloc(BUFFER);
	if (!s->buffer) {
		free(s);
		return NULL;
	}
	return s;
}

void lm_ps_pace(lm_ps *s)
{
	s->paced = true;
}

void lm_ps_free(lm_ps *s)
{
	uint32_t i;

	for (i = 0; i < s->nserved; i++) {
		free(s->served[i].piece);
		free(s->served[i].fds);
	}
	free(s->served);
	free(s->entry);
	free(s->buffer);
	free(s);
}

void lm_ps_cancel(lm_ps *s)
{
	s->cancel = true;
}

void lm_ps_receive(lm_ps *s, uint64_t dst_id, int pages)
{
	s->dst_id = dst_id;
	s->pages = pages;
	s->entries = s->end = s->offset = 0;
}

uint64_t lm_ps_received(const lm_ps *s, const lm_entry **out)
{
	*out = s->entry;
	return s->entries;
}

int lm_ps_serve(lm_ps *s, uint64_t pid, const lm_piece *pieces, uint64_t n, const int *fds, uint32_t nfds)
{
	struct served *all = realloc(s->served, (s->nserved + 1) * sizeof(*all)), *new;

	if (!all)
		return ENOMEM;
	s->served = all;
	new = &all[s->nserved];
	*new = (struct served){pid, n, malloc(n * sizeof(*pieces) + 1), malloc(nfds * sizeof(*fds) + 1)};
	s->nserved++;
	if (!new->piece || !new->fds)
		return ENOMEM;
	memcpy(new->piece, pieces, n * sizeof(*pieces));
	memcpy(new->fds, fds, nfds * sizeof(*fds));
	return 0;
}

/* Reads from the socket to the file. */
static int take_pages(lm_ps *s, uint64_t bytes)
{
	while (bytes) {
		size_t n = bytes < BUFFER ? bytes : BUFFER, at;
		int err = lm_recv_all(s->sock, s->buffer, n, &s->cancel);

		if (err)
			return err == EPIPE ? ECONNABORTED : err;
		for (at = 0; at < n;) {
			ssize_t w = pwrite(s->pages, s->buffer + at, n - at, (off_t)(s->offset + at));

			if (w < 0 && errno != EINTR)
				return errno;
			at += w > 0 ? (size_t)w : 0;
		}
		s->offset += n;
		s->received += n / LM_PAGE;
		bytes -= n;
	}
	return 0;
}

static int add(lm_ps *s, const lm_ps_iov *m, uint32_t flags)
{
	lm_entry *e;

	if (s->pages < 0 || m->dst_id != s->dst_id || !lm_ps_range_ok(m) || m->vaddr < s->end)
		return EPROTO;
	/* In the parent, or at the source, or here; here and lazy means that a restore need not wait for it. */
	if (flags != LM_PE_PARENT && flags != LM_PE_LAZY && (flags & ~LM_PE_LAZY) != LM_PE_PRESENT)
		return EPROTO;
	if (s->entries == s->room) {
		uint64_t room = s->room ? 2 * s->room : 256;
		lm_entry *p = realloc(s->entry, room * sizeof(*p));

		if (!p)
			return ENOMEM;
		s->entry = p;
		s->room = room;
	}
	s->end = m->vaddr + m->nr_pages * LM_PAGE;
	e = &s->entry[s->entries];
	*e = (lm_entry){m->vaddr, s->end, s->offset, flags, 0};
	s->entries++;
	return flags & LM_PE_PRESENT ? take_pages(s, m->nr_pages * LM_PAGE) : 0;
}

static const lm_piece *find(const struct served *t, uint64_t addr)
{
	uint64_t low = 0, high = t->n;

	while (low < high) {
		uint64_t mid = low + (high - low) / 2;

		if (t->piece[mid].end <= addr)
			low = mid + 1;
		else
			high = mid;
	}
	return low < t->n && t->piece[low].start <= addr ? &t->piece[low] : NULL;
}

static int wait_writable(lm_ps *s)
{
	struct pollfd f = {s->sock, POLLOUT, 0};

	if (s->cancel)
		return ECANCELED;
	return poll(&f, 1, 100) < 0 && errno != EINTR ? errno : 0;
}

/* Waits until the other end of a local socket has taken all that was sent. */
static int wait_taken(lm_ps *s)
{
	int left;

	while (!s->cancel) {
		if (ioctl(s->sock, SIOCOUTQ, &left))
			return errno;
		if (!left)
			return 0;
		usleep(20);
	}
	return ECANCELED;
}

static int send_head(lm_ps *s, const lm_ps_iov *head)
{
	uint8_t out[LM_PS_WIDE];
	size_t at = 0;
	int err = s->paced ? wait_taken(s) : 0;

	if (err)
		return err;
	lm_ps_encode(head, s->width, out);
	while (at < s->width) {
		ssize_t n = send(s->sock, out + at, s->width - at, (s->paced ? 0 : MSG_MORE) | MSG_DONTWAIT | MSG_NOSIGNAL);

		err = n >= 0 || errno == EINTR ? 0 : errno == EAGAIN ? wait_writable(s) : errno;
		if (err)
			return err;
		at += n > 0 ? (size_t)n : 0;
	}
	return s->paced ? wait_taken(s) : 0;
}

/* For files that the kernel sends from in no other way: a process's memory. */
static int send_copied(lm_ps *s, int fd, off_t at, uint64_t left)
{
	int err = 0;

	while (left && !err) {
		ssize_t n = pread(fd, s->buffer, left < BUFFER ? left : BUFFER, at);
		struct iovec iov = {s->buffer, n > 0 ? (size_t)n : 0};

		if (!n)
			return ENODATA;
		if (n < 0) {
			err = errno == EINTR ? 0 : errno;
			continue;
		}
		err = lm_send_all(s->sock, &iov, 1, &s->cancel);
		at += n;
		left -= (uint64_t)n;
	}
	return err;
}

static int send_pages(lm_ps *s, int fd, off_t at, uint64_t left)
{
	int err = 0;

	while (!err && left) {
		ssize_t n = sendfile(s->sock, fd, &at, left);

		if (!n)
			return ENODATA; /* the file was cut short: what is missing is never made up */
		if (n < 0 && (errno == EINVAL || errno == EOVERFLOW))
			return send_copied(s, fd, at, left);
		if (n < 0)
			err = errno == EINTR ? 0 : errno == EAGAIN ? wait_writable(s) : errno;
		else
			left -= (uint64_t)n;
	}
	return err;
}

static int get(lm_ps *s, const lm_ps_iov *m)
{
	const lm_piece *piece = NULL;
	lm_ps_iov head = *m;
	uint64_t left;
	uint32_t i;
	off_t at;
	int err;

	if (!lm_ps_range_ok(m))
		return EPROTO;
	for (i = 0; i < s->nserved && s->served[i].pid != m->dst_id; i++)
		;
	if (i < s->nserved)
		piece = find(&s->served[i], m->vaddr);
	if (!piece)
		return ENOENT;
	left = (piece->end - m->vaddr) / LM_PAGE;
	if (left < head.nr_pages)
		head.nr_pages = left;
	if (head.nr_pages > MOST)
		head.nr_pages = MOST;
	head.cmd = LM_PS_MAKE(LM_PS_ADD_F, LM_PE_PRESENT);
	err = send_head(s, &head);
	at = (off_t)(piece->offset + (m->vaddr - piece->start));
	if (!err)
		err = send_pages(s, s->served[i].fds[piece->layer], at, head.nr_pages * LM_PAGE);
	s->sent += head.nr_pages;
	return err;
}

/* EPIPE: the peer closed before it. */
static int next_message(lm_ps *s, lm_ps_iov *out)
{
	size_t least = s->width ? s->width : LM_PS_NARROW;
	uint8_t in[LM_PS_WIDE];
	int err = lm_recv_all(s->sock, in, 1, &s->cancel);

	if (err)
		return err;
	err = lm_recv_all(s->sock, in + 1, least - 1, &s->cancel);
	if (!err && !s->width) {
		s->width = lm_ps_guess(in);
		if (s->width > least)
			err = lm_recv_all(s->sock, in + least, s->width - least, &s->cancel);
	}
	*out = lm_ps_decode(in, s->width ? s->width : least);
	return err == EPIPE ? ECONNABORTED : err;
}

int lm_ps_step(lm_ps *s, lm_ps_iov *out)
{
	for (;;) {
		int err = next_message(s, out);

		if (err)
			return err;
		switch (LM_PS_CMD(out->cmd)) {
		case LM_PS_ADD:
			err = add(s, out, LM_PE_PRESENT);
			break;
		case LM_PS_HOLE:
			err = add(s, out, LM_PE_PARENT);
			break;
		case LM_PS_ADD_F:
			err = add(s, out, LM_PS_FLAGS(out->cmd));
			break;
		case LM_PS_GET:
			err = get(s, out);
			break;
		default:
			return 0;
		}
		if (err)
			return err;
	}
}

int lm_ps_answer(lm_ps *s, const void *data, uint64_t n)
{
	struct iovec v = {(void *)data, n};
	int err = s->paced ? wait_taken(s) : 0;

	return err ? err : lm_send_all(s->sock, &v, 1, &s->cancel);
}

uint64_t lm_ps_width(const uint8_t *first)
{
	return lm_ps_guess(first);
}

void lm_ps_counts(const lm_ps *s, uint64_t *received, uint64_t *sent)
{
	*received = s->received;
	*sent = s->sent;
}
