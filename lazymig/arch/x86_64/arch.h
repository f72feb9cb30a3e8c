/* x86-64: registers, the batch interpreter that runs inside a stopped thread, and the syscall instruction. */
#ifndef LAZYMIG_ARCH_H
#define LAZYMIG_ARCH_H

#include <stdint.h>
#include <sys/user.h>

#include "lazymig/kernel/lm.h"

/* cffi: begin */
/* One system call of a batch; the interpreter stops at nr < 0 and stores the raw result in `ret`. */
typedef struct {
	int64_t nr;
	uint64_t args[6];
	int64_t ret;
} lm_call;

/* A thread's general registers, as PTRACE_GETREGS gives them (struct user_regs_struct). */
typedef struct {
	uint64_t r[27];
} lm_regs;

/* Copies the interpreter's machine code to `out` (at most `cap` bytes); returns its length. */
uint64_t lm_blob(uint8_t *out, uint64_t cap);
/* Offset of a `syscall` instruction in `code`, or `len` when there is none. */
uint64_t lm_find_syscall(const uint8_t *code, uint64_t len);
/* cffi: end */

_Static_assert(sizeof(lm_regs) == sizeof(struct user_regs_struct), "lm_regs mirrors the kernel's layout");

/* Registers that make a thread interpret the batch at `table` with the code at `blob`. */
void lm_arch_enter_blob(struct user_regs_struct *r, uint64_t blob, uint64_t table);
/* Registers that make a thread execute the one syscall instruction at `gadget`. */
void lm_arch_enter_syscall(struct user_regs_struct *r, uint64_t gadget, const lm_call *c);
/* Whether a thread that stands at the entry of a system call is in that very one, from that very place. */
int lm_arch_entered(const struct user_regs_struct *r, uint64_t gadget, const lm_call *c);
int64_t lm_arch_result(const struct user_regs_struct *r);

#endif
