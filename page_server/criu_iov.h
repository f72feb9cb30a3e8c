/* CRIU's page protocol (its criu/page-xfer.c; docs/dropin.md tells it whole): every message begins with one of these,
 * in the byte order and layout of the host. There is no greeting, no version, and one session a connection. */
#ifndef LAZYMIG_CRIU_IOV_H
#define LAZYMIG_CRIU_IOV_H

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

/* More pages than this are no message: 1 TiB. */
#define LM_PS_MAX_PAGES (1ull << 28)

static inline int lm_ps_range_ok(const lm_ps_iov *m)
{
	return !(m->vaddr % LM_PAGE) && m->nr_pages && m->nr_pages <= LM_PS_MAX_PAGES &&
	       m->vaddr < 1ull << 47 && m->nr_pages <= ((1ull << 47) - m->vaddr) / LM_PAGE;
}

#endif
