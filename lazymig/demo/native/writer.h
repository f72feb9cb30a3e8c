/*
 * The self-verifying writer: does real work on memory and all kinds of process state, and can tell at any moment
 * whether any of it is wrong. See writer.c for its use.
 */
#ifndef WRITER_H
#define WRITER_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#define PAGE 4096ull
#define MIB (1ull << 20)
#define NS 1000000000ull

typedef uint64_t u64;
typedef uint32_t u32;

enum pattern { RANDOM, SEQUENTIAL, HOT, ZERO, TEXT };

/* Every option of the command line; numbers are 0 and strings NULL when not given. */
struct options {
	u64 mib, pages_per_tick, tick_us, log, threads, vmas, append_every;
	enum pattern pattern;
	bool timers, signals, churn, sparse, shared, odd;
	const char *out, *append, *cow, *shared_file;
};
extern struct options opt;

u64 now_ns(int clock);
/* Remembers that something was wrong; the next report tells. */
void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* Ends the program because it cannot even start. */
void die(const char *what) __attribute__((noreturn));
void *map(size_t size, int prot, int flags, int fd);

/* The value of word `slot` of page `index` after its write number `version`. */
static inline u64 mix(u64 index, u64 version, u64 slot)
{
	u64 x = (index + 1) * 0x9e3779b97f4a7c15ull + version * 0xd6e8feb86659fd93ull + slot * 0xa0761d6478bd642full;

	x ^= x >> 32;
	x *= 0xd6e8feb86659fd93ull;
	return x ^ x >> 29;
}

/*
 * An arena: memory whose every byte is known at every moment. A write changes the page's head, its last word and
 * one word between (a different one each time), so what all 4096 bytes must hold follows from (index, version).
 * The versions are kept apart, with a checksum of their own.
 */
struct arena {
	const char *name;
	u64 *words;
	u64 pages, writable, salt; /* writable: how many pages, from the first, are ever written */
	u32 *versions;
	u64 sum; /* of mix(page, version) over all pages */
	u64 state, next; /* of the page chooser */
	enum pattern pattern;
	bool shared; /* with forked children */
	pthread_mutex_t lock;
	u64 bad; /* pages found wrong by the last verify */
};
void arena_init(struct arena *a, const char *name, void *memory, u64 pages, enum pattern pattern);
void arena_write(struct arena *a, u64 count);
u64 arena_verify(struct arena *a); /* number of bad pages; the first few are named by fail() */

/* Threads (threads.c): `count` threads beside the main one, each with an arena, in pairs that play ping-pong. */
void threads_start(u64 count, u64 mib_each);
void threads_hold(void); /* no thread writes until threads_release() */
void threads_release(void);
u64 threads_verify(void);
void threads_print(FILE *to);
/* Sleeps, with values in every register that can hold one, and checks that they are still there. */
void sleep_with_registers(u64 ns);
/* What every thread checks about itself in each tick: TLS, tid, floating point modes. */
void thread_self_init(u64 number);
void thread_self_check(void);
extern __thread volatile u64 signals_seen; /* handlers that ran in this thread */

/* More memory (memory.c): churn, sparse, odd, many VMAs. */
void memory_start(void);
void memory_tick(u64 tick);
u64 memory_verify(void);

/* Process state (state.c): timers, signals, append, identity. */
void state_start(void);
void state_tick(u64 tick);
void state_mark(void);
void state_verify(void);
void state_print(FILE *to);

#endif
