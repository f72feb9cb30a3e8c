#define _GNU_SOURCE
#include "siginfo.h"

#include <signal.h>
#include <sys/ptrace.h>

_Static_assert(sizeof(siginfo_t) == 128, "siginfo_t is 128 bytes everywhere");

/* ptrace(2), PTRACE_PEEKSIGINFO: a copy, the queue stays as it is. */
lm_result lm_peek_signals(int32_t tid, int32_t shared, uint64_t from, uint8_t *out, uint64_t cap)
{
	struct __ptrace_peeksiginfo_args args = {
		.off = from,
		.flags = shared ? PTRACE_PEEKSIGINFO_SHARED : 0,
		.nr = cap > INT32_MAX ? INT32_MAX : (int32_t)cap,
	};
	long n = ptrace(PTRACE_PEEKSIGINFO, tid, &args, out);

	return n < 0 ? lm_fail(0, errno) : lm_ok(n);
}
