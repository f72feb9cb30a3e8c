#define _GNU_SOURCE
#include "page_server/transfer.h"

#include <poll.h>
#include <sched.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static int wait_for(int sock, short events, lm_flag *cancel)
{
	struct pollfd p = {.fd = sock, .events = events};

	if (*cancel)
		return ECANCELED;
	if (poll(&p, 1, 100) < 0 && errno != EINTR)
		return errno;
	return 0;
}

int lm_send_all(int sock, struct iovec *iov, size_t n, lm_flag *cancel)
{
	while (n) {
		struct msghdr msg = {.msg_iov = iov, .msg_iovlen = n};
		ssize_t done = sendmsg(sock, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);

		if (done < 0) {
			int err = errno == EAGAIN ? wait_for(sock, POLLOUT, cancel) : errno == EINTR ? 0 : errno;

			if (err)
				return err;
			continue;
		}
		while (n && (size_t)done >= iov->iov_len) {
			done -= (ssize_t)iov->iov_len;
			iov++;
			n--;
		}
		if (n) {
			iov->iov_base = (char *)iov->iov_base + done;
			iov->iov_len -= (size_t)done;
		}
	}
	return 0;
}

int lm_recv_all(int sock, void *buf, size_t len, lm_flag *cancel)
{
	char *at = buf;

	while (len) {
		ssize_t n = recv(sock, at, len, MSG_DONTWAIT);

		if (n == 0)
			return EPIPE;
		if (n < 0) {
			int err = errno == EAGAIN ? wait_for(sock, POLLIN, cancel) : errno == EINTR ? 0 : errno;

			if (err)
				return err;
			continue;
		}
		at += n;
		len -= (size_t)n;
	}
	return 0;
}

void lm_let_others(unsigned int *pieces)
{
	/* Two take about as long as a slice (migrate/placement.py). To yield is to give up the rest of it: more often,
	 * and a busy host would leave the thread less than its share. */
	if (++*pieces % 2 == 0)
		sched_yield();
}

bool lm_page_is_zero(const void *page)
{
	const uint64_t *w = page;
	size_t i, j;

	for (i = 0; i < LM_PAGE / sizeof(*w); i += 16) {
		uint64_t any = 0;

		for (j = 0; j < 16; j++)
			any |= w[i + j];
		if (any)
			return false;
	}
	return true;
}

size_t lm_append_range(lm_bulk_range *list, size_t n, uint64_t addr, uint32_t npages, uint32_t flags)
{
	if (n && list[n - 1].addr + list[n - 1].npages * LM_PAGE == addr && list[n - 1].flags == flags) {
		list[n - 1].npages += npages;
		return n;
	}
	list[n] = (lm_bulk_range){addr, npages, flags};
	return n + 1;
}

/* One page at a time through /proc/PID/mem, which also reads what is mapped without the right to. */
static bool read_one(const lm_target *t, uint64_t addr, void *page)
{
	return pread(t->mem, page, LM_PAGE, (off_t)addr) == (ssize_t)LM_PAGE;
}

lm_result lm_read_pages(const lm_target *t, const lm_range *r, size_t n, uint32_t flags, uint8_t *buf,
			lm_bulk_range *got, void (*lost)(void *arg, uint64_t addr), void *arg)
{
	struct iovec remote[LM_MAX_RANGES];
	size_t i = 0, ngot = 0, at = 0, j;
	uint64_t offset = 0; /* into r[i] */

	while (i < n) {
		uint64_t want = 0;
		ssize_t done;

		for (j = i; j < n; j++) {
			uint64_t start = r[j].start + (j == i ? offset : 0);

			remote[j - i] = (struct iovec){(void *)(uintptr_t)start, r[j].end - start};
			want += r[j].end - start;
		}
		if (flags & LM_RANGE_FORCE) {
			/* Only its first range: a short read there says nothing about the others. */
			want = remote[0].iov_len;
			done = pread(t->mem, buf + at, want, (off_t)(uintptr_t)remote[0].iov_base);
			if (done < 0)
				done = 0;
		} else {
			struct iovec local = {buf + at, want};

			done = process_vm_readv(t->pid, &local, 1, remote, j - i, 0);
			if (done < 0 && errno != EFAULT)
				return lm_fail(ngot, errno);
			if (done < 0)
				done = 0;
		}
		done &= ~(ssize_t)(LM_PAGE - 1);
		want -= (uint64_t)done;
		while (done > 0) {
			uint64_t start = r[i].start + offset, len = r[i].end - start;

			if (len > (uint64_t)done)
				len = (uint64_t)done;
			ngot = lm_append_range(got, ngot, start, (uint32_t)(len / LM_PAGE), flags);
			at += len;
			done -= (ssize_t)len;
			offset += len;
			if (r[i].start + offset == r[i].end) {
				i++;
				offset = 0;
			}
		}
		if (!want)
			continue;
		/* It stopped at this page: unmapped meanwhile, or mapped without the right to read it. */
		if (read_one(t, r[i].start + offset, buf + at)) {
			ngot = lm_append_range(got, ngot, r[i].start + offset, 1, flags);
			at += LM_PAGE;
		} else {
			lost(arg, r[i].start + offset);
		}
		offset += LM_PAGE;
		if (r[i].start + offset == r[i].end) {
			i++;
			offset = 0;
		}
	}
	return lm_ok(ngot);
}

static int write_one(const lm_target *t, uint64_t addr, const uint8_t *buf, uint64_t len)
{
	while (len) {
		ssize_t n = pwrite(t->mem, buf, len, (off_t)addr);

		if (n <= 0)
			return n < 0 ? errno : EIO;
		addr += (uint64_t)n;
		buf += n;
		len -= (uint64_t)n;
	}
	return 0;
}

lm_result lm_write_pages(const lm_target *t, const lm_bulk_range *r, size_t n, const uint8_t *buf)
{
	struct iovec remote[LM_MAX_RANGES];
	uint64_t offset = 0; /* into r[i] */
	size_t i = 0, j;
	int err;

	while (i < n) {
		uint64_t want = 0;
		ssize_t done;

		if (r[i].flags & LM_RANGE_FORCE) {
			err = write_one(t, r[i].addr, buf, r[i].npages * LM_PAGE);
			if (err)
				return lm_fail(i, err);
			buf += r[i].npages * LM_PAGE;
			i++;
			continue;
		}
		for (j = i; j < n && !(r[j].flags & LM_RANGE_FORCE); j++) {
			uint64_t skip = j == i ? offset : 0;

			remote[j - i] = (struct iovec){(void *)(uintptr_t)(r[j].addr + skip), r[j].npages * LM_PAGE - skip};
			want += remote[j - i].iov_len;
		}
		done = process_vm_writev(t->pid, &(struct iovec){(void *)buf, want}, 1, remote, j - i, 0);
		if (done < 0 && errno != EFAULT)
			return lm_fail(i, errno);
		if (done < 0)
			done = 0;
		done &= ~(ssize_t)(LM_PAGE - 1);
		if ((uint64_t)done < want) {
			uint64_t left = (uint64_t)done, k = i, at = offset;

			while (left >= r[k].npages * LM_PAGE - at) {
				left -= r[k].npages * LM_PAGE - at;
				at = 0;
				k++;
			}
			/* A page without the right to write it, as far as process_vm_writev goes. */
			err = write_one(t, r[k].addr + at + left, buf + done, LM_PAGE);
			if (err)
				return lm_fail(k, err);
			done += (ssize_t)LM_PAGE;
		}
		buf += done;
		while (i < n && (uint64_t)done >= r[i].npages * LM_PAGE - offset) {
			done -= (ssize_t)(r[i].npages * LM_PAGE - offset);
			offset = 0;
			i++;
			if (!done)
				break;
		}
		offset += (uint64_t)done;
	}
	return lm_ok(n);
}
