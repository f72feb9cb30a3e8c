#define _GNU_SOURCE
#include "chorus.h"

#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "lazymig/arch/x86_64/arch.h"

enum {
	STATUS = 16384, /* more than a status file has, however many groups a thread is in */
	AT_ONCE = 256,  /* batches; IOV_MAX is 1024 */
};

static uint64_t table(const lm_score *s)
{
	return (s->calls + 1) * sizeof(lm_call);
}

void lm_chorus_spread(uint8_t *view, uint64_t base, uint64_t lead, const uint64_t *at, uint64_t n, const lm_score *s)
{
	for (uint64_t i = 0; i < n; i++) {
		lm_call *calls = (lm_call *)(view + at[i]);

		memcpy(calls, view + lead, table(s));
		memcpy(view + at[i] + s->data, view + lead + s->data, s->end - s->data);
		for (uint64_t c = 0; c < s->calls; c++)
			for (int k = 0; k < 6; k++)
				if (calls[c].args[k] - (base + lead) < s->end)
					calls[c].args[k] += at[i] - lead;
	}
}

static bool same(const uint8_t *a, const uint8_t *b, const lm_score *s, const lm_range *own, uint64_t n_own)
{
	const lm_call *x = (const lm_call *)a, *y = (const lm_call *)b;
	uint64_t from = s->data;

	for (uint64_t c = 0; c < s->calls; c++)
		if (x[c].ret != y[c].ret)
			return false;
	for (uint64_t i = 0; i < n_own; i++) {
		if (memcmp(a + from, b + from, s->data + own[i].start - from))
			return false;
		from = s->data + own[i].end;
	}
	return !memcmp(a + from, b + from, s->end - from);
}

void lm_chorus_alike(const uint8_t *view, uint64_t lead, const uint64_t *at, uint64_t n, const lm_score *s,
		     const lm_range *own, uint64_t n_own, uint8_t *alike)
{
	for (uint64_t i = 0; i < n; i++)
		if (!same(view + lead, view + at[i], s, own, n_own))
			alike[i] = 0;
}

typedef ssize_t mover(pid_t, const struct iovec *, unsigned long, const struct iovec *, unsigned long, unsigned long);

/* What lies between the table and the data is moved along: a call costs more than these bytes do. */
static lm_result move(mover *m, int32_t pid, uint64_t base, uint8_t *view, const uint64_t *at, uint64_t n, const lm_score *s)
{
	struct iovec here[AT_ONCE], there[AT_ONCE];

	for (uint64_t i = 0; i < n; i += AT_ONCE) {
		uint64_t k = n - i < AT_ONCE ? n - i : AT_ONCE;

		for (uint64_t j = 0; j < k; j++) {
			here[j] = (struct iovec){view + at[i + j], s->end};
			there[j] = (struct iovec){(void *)(base + at[i + j]), s->end};
		}
		ssize_t got = m(pid, here, k, there, k, 0);
		if (got < 0 || (uint64_t)got != k * s->end)
			return lm_fail(i + (got < 0 ? 0 : (uint64_t)got / s->end), got < 0 ? errno : EFAULT);
	}
	return lm_ok(n);
}

lm_result lm_chorus_flush(int32_t pid, uint64_t base, const uint8_t *view, const uint64_t *at, uint64_t n, const lm_score *s)
{
	return move(process_vm_writev, pid, base, (uint8_t *)view, at, n, s);
}

lm_result lm_chorus_fetch(int32_t pid, uint64_t base, uint8_t *view, const uint64_t *at, uint64_t n, const lm_score *s)
{
	return move(process_vm_readv, pid, base, view, at, n, s);
}

/* `lines` are of two places, with a zero between them. */
static bool has_lines(int32_t tid, const uint8_t *lines, uint64_t len)
{
	size_t first = strnlen((const char *)lines, len), rest = first < len ? first + 1 : len;
	char path[32], text[STATUS];
	ssize_t got = -1;

	snprintf(path, sizeof path, "/proc/%d/status", tid);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd >= 0) {
		got = read(fd, text, sizeof text);
		close(fd);
	}
	return got > 0 && memmem(text, (size_t)got, lines, first) && memmem(text, (size_t)got, lines + rest, len - rest);
}

void lm_status_alike(const int32_t *tids, uint64_t n, const uint8_t *lines, uint64_t len, uint8_t *alike)
{
	for (uint64_t i = 0; i < n; i++)
		if (alike[i] && !has_lines(tids[i], lines, len))
			alike[i] = 0;
}
