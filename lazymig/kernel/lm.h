/* What every C file of the project shares: the result convention and the page size. */
#ifndef LAZYMIG_LM_H
#define LAZYMIG_LM_H

#include <errno.h>
#include <stddef.h>
#include <stdint.h>

/* cffi: begin */
/* How a call ended: `done` units were done (each function says which), then `err` stopped it (0: all done). */
typedef struct {
	uint64_t done;
	int32_t err;
	int32_t pad;
} lm_result;

/* A page-aligned half-open range of addresses, in bytes. */
typedef struct {
	uint64_t start, end;
} lm_range;
/* cffi: end */

#define LM_PAGE 4096ull

static inline lm_result lm_ok(uint64_t done)
{
	return (lm_result){done, 0, 0};
}

static inline lm_result lm_fail(uint64_t done, int err)
{
	return (lm_result){done, err, 0};
}

#endif
