#include "lazymig/kernel/robust.h"

#include "lazymig/kernel/ptrace.h"

enum { LIMIT = 2048 }; /* ROBUST_LIST_LIMIT of the kernel: longer lists are not followed when a thread ends */

/* struct robust_list_head of linux/futex.h */
struct head {
	uint64_t next;
	int64_t futex_offset;
	uint64_t pending;
};

/* The lowest bit of a pointer in the list says that the lock has priority inheritance. */
static uint64_t entry_of(uint64_t pointer)
{
	return pointer & ~1ull;
}

uint64_t lm_robust_addresses(int32_t pid, const uint64_t *heads, uint64_t n, uint64_t *out, uint64_t cap)
{
	uint64_t k = 0;

	for (uint64_t i = 0; i < n; i++) {
		struct head h;

		if (lm_peek(pid, heads[i], &h, sizeof h).err)
			continue;
		if (h.pending && k + 2 <= cap) {
			out[k++] = entry_of(h.pending);
			out[k++] = entry_of(h.pending) + (uint64_t)h.futex_offset;
		}
		uint64_t next = h.next;
		for (int j = 0; j < LIMIT && entry_of(next) != heads[i] && k + 2 <= cap; j++) {
			out[k++] = entry_of(next);
			out[k++] = entry_of(next) + (uint64_t)h.futex_offset;
			if (lm_peek(pid, entry_of(next), &next, sizeof next).err)
				break;
		}
	}
	return k;
}
