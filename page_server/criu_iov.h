/* CRIU's page protocol (its criu/page-xfer.c; docs/dropin.md tells it whole): every message begins with one of these,
 * in the byte order and layout of the host. There is no greeting, no version, and one session a connection.
 *
 * There are two layouts, though: since CRIU 4.2 the number of pages has 64 bits, and the message 32 bytes; before, the
 * number has 32 bits and stands where there is padding now, and the message has 24 bytes. Who serves finds out by
 * the first message (lm_ps_guess); who asks has to know. */
#ifndef LAZYMIG_CRIU_IOV_H
#define LAZYMIG_CRIU_IOV_H

#include <string.h>

#include "lazymig/kernel/lm.h"

/* cffi: begin */
typedef struct {
	uint32_t cmd; /* LM_PS_*, and PE_* flags from bit 16 on */
	uint32_t pad;
	uint64_t nr_pages;
	uint64_t vaddr;
	uint64_t dst_id; /* GET: a pid; else number << 8 | type of the image */
} lm_ps_iov;

enum {
	LM_PS_ADD = 1,
	LM_PS_HOLE = 2,
	LM_PS_OPEN = 3,
	LM_PS_OPEN2 = 4,
	LM_PS_PARENT = 5,
	LM_PS_ADD_F = 6,
	LM_PS_GET = 7,
	LM_PS_CLOSE = 0x1023,
	LM_PS_FORCE_CLOSE = 0x1024
};
/* cffi: end */

#define LM_PS_CMD(cmd) ((cmd) & 0xffffu)
#define LM_PS_FLAGS(cmd) ((cmd) >> 16)
#define LM_PS_MAKE(cmd, flags) ((cmd) | (uint32_t)(flags) << 16)

#define LM_PS_NARROW 24u
#define LM_PS_WIDE 32u

static inline void lm_ps_encode(const lm_ps_iov *m, size_t width, uint8_t *out)
{
	uint64_t first = m->cmd | m->nr_pages << 32;

	if (width == LM_PS_WIDE) {
		memcpy(out, m, sizeof(*m));
		return;
	}
	memcpy(out, &first, 8);
	memcpy(out + 8, &m->vaddr, 8);
	memcpy(out + 16, &m->dst_id, 8);
}

static inline lm_ps_iov lm_ps_decode(const uint8_t *in, size_t width)
{
	lm_ps_iov m;

	memcpy(&m, in, sizeof(m.cmd));
	m.pad = 0;
	if (width == LM_PS_WIDE) {
		memcpy(&m.nr_pages, in + 8, 24);
	} else {
		uint32_t n;

		memcpy(&n, in + 4, 4);
		m.nr_pages = n;
		memcpy(&m.vaddr, in + 8, 16);
	}
	return m;
}

/* Which of the two layouts the first 24 bytes of a connection are of. */
static inline size_t lm_ps_guess(const uint8_t *in)
{
	lm_ps_iov m = lm_ps_decode(in, LM_PS_NARROW);

	/* What opens an image has neither address nor length, and in the longer layout the id comes later. */
	if ((m.cmd & 0xffff) != LM_PS_GET)
		return m.dst_id || (m.cmd & 0xffff) == LM_PS_CLOSE ? LM_PS_NARROW : LM_PS_WIDE;
	/* The longer layout has here: padding, a number of pages, and an address. */
	if (m.dst_id % LM_PAGE || m.dst_id < 16 * LM_PAGE || m.vaddr >> 32)
		return LM_PS_NARROW;
	return m.nr_pages && !(m.vaddr % LM_PAGE) ? LM_PS_NARROW : LM_PS_WIDE;
}

/* More pages than this are no message: 1 TiB. */
#define LM_PS_MAX_PAGES (1ull << 28)

static inline int lm_ps_range_ok(const lm_ps_iov *m)
{
	return !(m->vaddr % LM_PAGE) && m->nr_pages && m->nr_pages <= LM_PS_MAX_PAGES &&
	       m->vaddr < 1ull << 47 && m->nr_pages <= ((1ull << 47) - m->vaddr) / LM_PAGE;
}

#endif
