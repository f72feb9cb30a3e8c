/* What this processor and kernel let programs use of the extended state. */
#ifndef LAZYMIG_CPU_H
#define LAZYMIG_CPU_H

#include "lazymig/kernel/lm.h"

/* cffi: begin */
/* Intel SDM, volume 1, chapter 13. */
typedef struct {
	uint64_t xcr0;          /* components the kernel has switched on (XGETBV 0) */
	uint64_t size;          /* bytes of the standard-format area for these (CPUID 13.0 EBX) */
	uint64_t offset[64];    /* of each component in that area; 0 when it is not there */
} lm_xstate;

/* ENOSYS when the processor or the kernel has no XSAVE. */
lm_result lm_xstate_facts(lm_xstate *out);
/* cffi: end */

#endif
