#include "lazymig/kernel/seccomp.h"

#include <stdbool.h>
#include <sys/ptrace.h>
#include <sys/types.h>

/* linux/ptrace.h, which does not go together with sys/ptrace.h */
#define GET_FILTER 0x420c
#define GET_METADATA 0x420d

struct metadata {
	uint64_t filter_off; /* in: which filter */
	uint64_t flags;      /* out */
};

lm_result lm_seccomp_get(int32_t tid, uint64_t index, uint64_t *out, uint64_t cap, uint64_t *flags)
{
	long n = ptrace(GET_FILTER, (pid_t)tid, (void *)index, NULL);

	if (n < 0)
		return lm_fail(0, errno);
	if ((uint64_t)n > cap)
		return lm_fail(0, E2BIG);
	n = ptrace(GET_FILTER, (pid_t)tid, (void *)index, out);
	if (n < 0)
		return lm_fail(0, errno);

	struct metadata m = {.filter_off = index};

	if (ptrace(GET_METADATA, (pid_t)tid, (void *)sizeof(m), &m) < 0)
		return lm_fail(0, errno);
	*flags = m.flags;
	return lm_ok((uint64_t)n);
}

bool lm_seccomp_any(const int32_t *tids, uint64_t n)
{
	for (uint64_t i = 0; i < n; i++)
		if (ptrace(GET_FILTER, tids[i], NULL, NULL) >= 0)
			return true;
	return false;
}
