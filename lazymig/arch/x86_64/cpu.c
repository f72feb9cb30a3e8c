#define _GNU_SOURCE
#include "cpu.h"

#include <cpuid.h>
#include <string.h>

#define XSTATE_LEAF 13

lm_result lm_xstate_facts(lm_xstate *out)
{
	uint32_t a, b, c, d, lo, hi;

	memset(out, 0, sizeof *out);
	if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE))
		return lm_fail(0, ENOSYS);
	__asm__("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
	out->xcr0 = (uint64_t)hi << 32 | lo;
	if (!__get_cpuid_count(XSTATE_LEAF, 0, &a, &b, &c, &d))
		return lm_fail(0, ENOSYS);
	out->size = b;
	/* 0 and 1 (x87, SSE) lie in the legacy area, whose layout never changes. */
	for (unsigned i = 2; i < 63; i++)
		if (out->xcr0 >> i & 1 && __get_cpuid_count(XSTATE_LEAF, i, &a, &b, &c, &d))
			out->offset[i] = b;
	return lm_ok(1);
}
