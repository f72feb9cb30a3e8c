#include "arch.h"

#include <string.h>

/*
 * The interpreter. Position independent; rbx points at the batch. It keeps nothing but rbx alive across system
 * calls (rcx and r11 are clobbered by `syscall`) and needs no stack, so it runs in a thread whose own stack is
 * not to be touched. It ends in int3, which the tracer sees as SIGTRAP.
 */
static const uint8_t blob[] = {
	0x48, 0x8b, 0x03,       /*  0: mov rax, [rbx]        */
	0x48, 0x85, 0xc0,       /*  3: test rax, rax         */
	0x78, 0x24,             /*  6: js 44                 */
	0x48, 0x8b, 0x7b, 0x08, /*  8: mov rdi, [rbx + 8]    */
	0x48, 0x8b, 0x73, 0x10, /* 12: mov rsi, [rbx + 16]   */
	0x48, 0x8b, 0x53, 0x18, /* 16: mov rdx, [rbx + 24]   */
	0x4c, 0x8b, 0x53, 0x20, /* 20: mov r10, [rbx + 32]   */
	0x4c, 0x8b, 0x43, 0x28, /* 24: mov r8, [rbx + 40]    */
	0x4c, 0x8b, 0x4b, 0x30, /* 28: mov r9, [rbx + 48]    */
	0x0f, 0x05,             /* 32: syscall               */
	0x48, 0x89, 0x43, 0x38, /* 34: mov [rbx + 56], rax   */
	0x48, 0x83, 0xc3, 0x40, /* 38: add rbx, 64           */
	0xeb, 0xd4,             /* 42: jmp 0                 */
	0xcc,                   /* 44: int3                  */
};

uint64_t lm_blob(uint8_t *out, uint64_t cap)
{
	if (cap >= sizeof blob)
		memcpy(out, blob, sizeof blob);
	return sizeof blob;
}

uint64_t lm_find_syscall(const uint8_t *code, uint64_t len)
{
	for (uint64_t i = 0; i + 1 < len; i++)
		if (code[i] == 0x0f && code[i + 1] == 0x05)
			return i;
	return len;
}

#define TRAP_FLAG 0x100ul

/*
 * orig_rax = -1 tells the kernel that the thread is in no system call: it then restarts none on our behalf. A program
 * that steps through itself has the trap flag set, and would stop after our first instruction.
 */
void lm_arch_enter_blob(struct user_regs_struct *r, uint64_t blob_addr, uint64_t table)
{
	r->rip = blob_addr;
	r->rbx = table;
	r->orig_rax = -1;
	r->eflags &= ~TRAP_FLAG;
}

void lm_arch_enter_syscall(struct user_regs_struct *r, uint64_t gadget, const lm_call *c)
{
	r->rip = gadget;
	r->rax = c->nr;
	r->rdi = c->args[0];
	r->rsi = c->args[1];
	r->rdx = c->args[2];
	r->r10 = c->args[3];
	r->r8 = c->args[4];
	r->r9 = c->args[5];
	r->orig_rax = -1;
	r->eflags &= ~TRAP_FLAG;
}

int lm_arch_entered(const struct user_regs_struct *r, uint64_t gadget, const lm_call *c)
{
	return r->rip == gadget + 2 && r->orig_rax == (uint64_t)c->nr && r->rdi == c->args[0] && r->rsi == c->args[1] &&
	       r->rdx == c->args[2] && r->r10 == c->args[3] && r->r8 == c->args[4] && r->r9 == c->args[5];
}

int64_t lm_arch_result(const struct user_regs_struct *r)
{
	return (int64_t)r->rax;
}
