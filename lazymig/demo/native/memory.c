#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "writer.h"

#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102 /* linux 6.13 */
#endif

static pid_t owner; /* a forked child is another process: some memory is not inherited */
static u64 seed = 1, wrong;

static u64 dice(u64 sides)
{
	seed = seed * 6364136223846793005ull + 1442695040888963407ull;
	return (seed >> 33) % sides;
}

static void bad(const char *what, const void *at)
{
	wrong++;
	fail("%s: wrong content at %p", what, at);
}

/* A stamped page holds its stamp in its first and last word. */
static void stamp(u64 *page, u64 value)
{
	page[0] = page[511] = value;
}

static bool stamped(const volatile u64 *page, u64 value)
{
	return page[0] == value && page[511] == value && page[77] == 0;
}

/* --- churn: mappings that come, go, move, shrink and grow; the program break; short-lived threads --- */

enum { SLOTS = 32, WIDE = 4, UNITS = 64 };

/* UNITS units of `stride` pages, of which the first page is stamped or zero; `wide` slots have holes of 2 MiB. */
struct slot {
	char *at; /* NULL: not mapped */
	u64 units, stride, key;
	u64 present, maybe; /* bit per unit: stamped; stamped or zero (after MADV_FREE) */
	bool readonly;
	/* What was done to it last: (m)ap, map (a)gain, (r)esize, m(o)ve, (p)rotect, (d)rop, (f)ree, (s)tamp. */
	char history[17];
};
static struct slot slots[SLOTS];

static u64 *unit(const struct slot *s, u64 i)
{
	return (u64 *)(s->at + i * s->stride * PAGE);
}

static u64 bytes(const struct slot *s)
{
	return s->units * s->stride * PAGE;
}

static void check_slot(const struct slot *s)
{
	for (u64 i = 0; s->at && i < s->units; i++) {
		const volatile u64 *page = unit(s, i);
		bool is = stamped(page, mix(s->key, i, 0)), zero = stamped(page, 0);

		if (s->maybe >> i & 1 ? !is && !zero : s->present >> i & 1 ? !is : !zero) {
			wrong++;
			fail("churn: page at %p is %s, must be %s; after %s", (const void *)page,
			     zero ? "zero" : is ? "stamped" : "foreign", s->present >> i & 1 ? "stamped" : "zero",
			     s->history);
		}
		if (s->stride > 1 && page[513] != 0)
			bad("churn hole", (const void *)(page + 513));
	}
}

static void stamp_slot(struct slot *s, u64 count)
{
	while (count--) {
		u64 i = dice(s->units);

		stamp(unit(s, i), mix(s->key, i, 0));
		s->present |= 1ull << i;
		s->maybe &= ~(1ull << i);
	}
}

static void map_slot(struct slot *s, void *where)
{
	static u64 keys;

	s->stride = s < slots + WIDE ? 513 : 1;
	if (!where)
		s->units = 1 + dice(UNITS);
	s->key = ++keys << 8 | 1ull << 60;
	if (!where)
		memcpy(s->history, "               m", sizeof s->history);
	s->present = s->maybe = 0;
	s->at = mmap(where, bytes(s), PROT_READ | PROT_WRITE,
		     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (where ? MAP_FIXED : 0), -1, 0);
	if (s->at == MAP_FAILED)
		die("mmap");
	stamp_slot(s, 1 + dice(s->units));
}

static void resize_slot(struct slot *s)
{
	u64 old = bytes(s), units = 1 + dice(UNITS);

	s->units = units;
	s->at = mremap(s->at, old, bytes(s), MREMAP_MAYMOVE);
	if (s->at == MAP_FAILED)
		die("mremap");
	if (units < UNITS) {
		s->present &= (1ull << units) - 1;
		s->maybe &= (1ull << units) - 1;
	}
}

static void move_slot(struct slot *s)
{
	void *to = map(bytes(s), PROT_NONE, MAP_PRIVATE | MAP_NORESERVE, -1);

	s->at = mremap(s->at, bytes(s), bytes(s), MREMAP_MAYMOVE | MREMAP_FIXED, to);
	if (s->at == MAP_FAILED)
		die("mremap");
}

static void advise_slot(struct slot *s, int advice)
{
	u64 from = dice(s->units), count = 1 + dice(s->units - from);
	u64 bits = (count == 64 ? ~0ull : (1ull << count) - 1) << from;

	if (madvise(unit(s, from), count * s->stride * PAGE, advice) != 0)
		die("madvise");
	if (advice == MADV_FREE) {
		s->maybe |= s->present & bits;
	} else {
		s->present &= ~bits;
		s->maybe &= ~bits;
	}
}

static void churn_slot(struct slot *s)
{
	u64 what;

	if (!s->at) {
		map_slot(s, NULL);
		return;
	}
	if (s->readonly) {
		check_slot(s);
		mprotect(s->at, bytes(s), PROT_READ | PROT_WRITE);
		s->readonly = false;
	}
	what = dice(8);
	memmove(s->history, s->history + 1, sizeof s->history - 2);
	s->history[sizeof s->history - 2] = "maropdfs"[what];
	switch (what) {
	case 0:
		check_slot(s);
		munmap(s->at, bytes(s));
		s->at = NULL;
		break;
	case 1: map_slot(s, s->at); break; /* anew at the same place: untouched pages must be zero */
	case 2: resize_slot(s); break;
	case 3: move_slot(s); break;
	case 4:
		mprotect(s->at, bytes(s), PROT_READ);
		s->readonly = true;
		break;
	case 5: advise_slot(s, MADV_DONTNEED); break;
	case 6: advise_slot(s, MADV_FREE); break;
	default: stamp_slot(s, 1 + dice(8));
	}
}

/* The break goes up and down. malloc may move it as well: then our part is left alone and a new one begun. */
static struct {
	char *from;
	u64 pages;
} heap;

static void check_heap(void)
{
	for (u64 i = 0; i < heap.pages; i++)
		if (!stamped((u64 *)(heap.from + i * PAGE), mix((u64)heap.from, i, 0)))
			bad("brk", heap.from + i * PAGE);
}

static void churn_heap(void)
{
	u64 count = 1 + dice(16);

	if (!heap.from || (char *)sbrk(0) != heap.from + heap.pages * PAGE) {
		check_heap();
		heap.from = sbrk(0);
		heap.from += -(u64)heap.from % PAGE;
		heap.pages = 0;
		if (brk(heap.from) != 0)
			die("brk");
	}
	if (heap.pages > 64 || (heap.pages > count && dice(2))) {
		check_heap();
		heap.pages -= count;
		if (brk(heap.from + heap.pages * PAGE) != 0)
			die("brk");
		return;
	}
	if (brk(heap.from + (heap.pages + count) * PAGE) != 0)
		die("brk");
	while (count--) {
		u64 *page = (u64 *)(heap.from + heap.pages * PAGE);

		if (!stamped(page, 0))
			bad("grown brk", page);
		stamp(page, mix((u64)heap.from, heap.pages++, 0));
	}
}

/* A thread that lives shortly and dies with a robust mutex in its hand. */
static struct {
	pthread_t thread;
	pthread_mutex_t mutex;
	bool runs;
	u64 lives;
} guest;

static void *visit(void *argument)
{
	thread_self_init((u64)argument);
	pthread_mutex_lock(&guest.mutex);
	for (int i = 0; i < 100; i++) {
		sleep_with_registers(500000);
		thread_self_check();
	}
	return argument;
}

static void churn_threads(void)
{
	void *result;

	if (guest.runs) {
		if (pthread_tryjoin_np(guest.thread, &result) != 0)
			return;
		guest.runs = false;
		if (result != (void *)(1000 + guest.lives))
			fail("a thread returned something else");
		if (pthread_mutex_lock(&guest.mutex) != EOWNERDEAD)
			fail("the kernel did not release a dead thread's robust mutex");
		pthread_mutex_consistent(&guest.mutex);
		pthread_mutex_unlock(&guest.mutex);
	}
	guest.lives++;
	if (pthread_create(&guest.thread, NULL, visit, (void *)(1000 + guest.lives)) != 0)
		die("pthread_create");
	guest.runs = true;
}

static void start_churn(void)
{
	pthread_mutexattr_t kind;

	pthread_mutexattr_init(&kind);
	pthread_mutexattr_setrobust(&kind, PTHREAD_MUTEX_ROBUST);
	pthread_mutex_init(&guest.mutex, &kind);
	for (int i = 0; i < SLOTS; i++)
		map_slot(&slots[i], NULL);
}

/* --- sparse: a huge reservation, and a large area of which little was ever touched --- */

enum { TOUCHED = 64 };
static char *sparse;
static u64 sparse_writes[TOUCHED];
static const u64 sparse_size = 100ull << 30;

static u64 *sparse_page(u64 i)
{
	return (u64 *)(sparse + i * (sparse_size / TOUCHED) + i * 5 * PAGE);
}

static void start_sparse(void)
{
	map(16ull << 40, PROT_NONE, MAP_PRIVATE | MAP_NORESERVE, -1);
	sparse = map(sparse_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, -1);
	for (u64 i = 0; i < TOUCHED; i++)
		stamp(sparse_page(i), mix(i, 0, 9));
}

static void write_sparse(void)
{
	u64 i = dice(TOUCHED);

	stamp(sparse_page(i), mix(i, ++sparse_writes[i], 9));
}

static void check_sparse(void)
{
	for (u64 i = 0; sparse && i < TOUCHED; i++) {
		if (!stamped(sparse_page(i), mix(i, sparse_writes[i], 9)))
			bad("sparse", sparse_page(i));
		if (*(sparse_page(i) + 512) != 0)
			bad("sparse hole", sparse_page(i) + 512);
	}
}

/* --- many VMAs: every other page is read-only --- */

static char *comb;

static void start_vmas(void)
{
	comb = map(opt.vmas * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, -1);
	for (u64 i = 0; i < opt.vmas; i++) {
		stamp((u64 *)(comb + i * PAGE), mix(i, 0, 8));
		if (i % 2 && mprotect(comb + i * PAGE, PAGE, PROT_READ) != 0)
			die("mprotect");
	}
}

/* --- odd: one area of each kind that the kernel treats in a way of its own --- */

enum { AREA = 16 };
static struct area {
	const char *name;
	int advice, flags;
	char *at;
} areas[] = {
	{.name = "huge", .advice = MADV_HUGEPAGE},	  {.name = "nohuge", .advice = MADV_NOHUGEPAGE},
	{.name = "dontfork", .advice = MADV_DONTFORK},	  {.name = "dontdump", .advice = MADV_DONTDUMP},
	{.name = "wipe", .advice = MADV_WIPEONFORK},	  {.name = "random", .advice = MADV_RANDOM},
	{.name = "sequential", .advice = MADV_SEQUENTIAL}, {.name = "locked", .advice = -1},
	{.name = "noreserve", .flags = MAP_NORESERVE},	  {.name = "stack", .flags = MAP_STACK},
};
static char *guarded, *grows; /* grows: its highest page */
static u64 grown;

static void grow(void)
{
	grown++;
	stamp((u64 *)(grows - grown * PAGE), mix(grown, 0, 7));
}

static void start_odd(void)
{
	char *space;

	for (u32 i = 0; i < sizeof areas / sizeof areas[0]; i++) {
		struct area *a = &areas[i];
		u64 size = a->advice == MADV_HUGEPAGE ? 4 * MIB : AREA * PAGE;

		a->at = map(size, PROT_READ | PROT_WRITE, MAP_PRIVATE | a->flags, -1);
		if (a->advice > 0 && madvise(a->at, size, a->advice) != 0)
			die(a->name);
		if (a->advice < 0 && mlock(a->at, size) != 0)
			die("mlock");
		for (u64 j = 0; j < AREA; j++)
			stamp((u64 *)(a->at + j * PAGE), mix(i, j, 6));
	}
	guarded = map(3 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, -1);
	stamp((u64 *)guarded, 1);
	stamp((u64 *)(guarded + 2 * PAGE), 2);
	if (madvise(guarded + PAGE, PAGE, MADV_GUARD_INSTALL) != 0)
		guarded = NULL; /* an older kernel */
	/* The barrier keeps others out of what it grows into; the kernel itself leaves a gap of 256 pages. */
	space = map(2 * MIB, PROT_NONE, MAP_PRIVATE, -1);
	munmap(space + MIB, MIB);
	grows = mmap(space + 2 * MIB - PAGE, PAGE, PROT_READ | PROT_WRITE,
		     MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN | MAP_FIXED, -1, 0);
	if (grows == MAP_FAILED)
		die("mmap growing down");
	for (int i = 0; i < 8; i++)
		grow();
}

static void check_odd(void)
{
	bool child = getpid() != owner;

	for (u32 i = 0; i < sizeof areas / sizeof areas[0]; i++) {
		struct area *a = &areas[i];

		if (child && (a->advice == MADV_DONTFORK || a->advice == MADV_WIPEONFORK))
			continue;
		for (u64 j = 0; j < AREA; j++)
			if (!stamped((u64 *)(a->at + j * PAGE), mix(i, j, 6)))
				bad(a->name, a->at + j * PAGE);
	}
	for (u64 i = 1; i <= grown; i++)
		if (!stamped((u64 *)(grows - i * PAGE), mix(i, 0, 7)))
			bad("grows", grows - i * PAGE);
	if (guarded) {
		char byte;
		struct iovec here = {&byte, 1}, there = {guarded + PAGE, 1};

		if (!stamped((u64 *)guarded, 1) || !stamped((u64 *)(guarded + 2 * PAGE), 2))
			bad("guarded", guarded);
		if (!child && (process_vm_readv(getpid(), &here, 1, &there, 1, 0) != -1 || errno != EFAULT))
			fail("a guard page can be read");
	}
}

/* --- all of it --- */

void memory_start(void)
{
	owner = getpid();
	if (opt.churn)
		start_churn();
	if (opt.sparse)
		start_sparse();
	if (opt.vmas)
		start_vmas();
	if (opt.odd)
		start_odd();
}

void memory_tick(u64 tick)
{
	if (opt.churn) {
		churn_slot(&slots[dice(SLOTS)]);
		if (tick % 16 == 0)
			churn_heap();
		if (tick % 32 == 0)
			churn_threads();
	}
	if (sparse && tick % 16 == 0)
		write_sparse();
	if (opt.odd && opt.churn && tick % 1024 == 0 && grown < 100)
		grow();
}

u64 memory_verify(void)
{
	wrong = 0;
	if (opt.churn) {
		for (int i = 0; i < SLOTS; i++)
			check_slot(&slots[i]);
		check_heap();
	}
	check_sparse();
	for (u64 i = 0; i < opt.vmas; i++)
		if (!stamped((u64 *)(comb + i * PAGE), mix(i, 0, 8)))
			bad("vmas", comb + i * PAGE);
	if (opt.odd)
		check_odd();
	return wrong;
}
