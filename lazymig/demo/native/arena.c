#define _GNU_SOURCE
#include <string.h>
#include <sys/mman.h>

#include "writer.h"

enum { HEAD = 4, LAST = 511, MIDDLE = LAST - HEAD, NAMED = 4 };

/* The version that wrote middle word `slot` last, 0 for the first fill. */
static u64 writer_of(u64 version, u64 slot)
{
	u64 back = (version + MIDDLE - (slot - HEAD)) % MIDDLE;

	return version > back ? version - back : 0;
}

/* In the pattern `text` middle words are alike in runs of 32, so a page compresses well until it was written often. */
static u64 middle(const struct arena *a, u64 key, u64 version, u64 slot)
{
	return mix(key, version, a->pattern == TEXT ? slot | 31 : slot);
}

/* One page as it is after `version` writes. */
static void arena_fill(const struct arena *a, u64 *page, u64 key, u64 version)
{
	for (u64 i = 0; i < HEAD; i++)
		page[i] = mix(key, version, i);
	for (u64 i = HEAD; i < LAST; i++)
		page[i] = middle(a, key, writer_of(version, i), i);
	page[LAST] = mix(key, version, LAST);
}

/* In the pattern `zero` every odd version of a page is all zeroes. */
static bool is_zero(const struct arena *a, u64 version)
{
	return a->pattern == ZERO && version % 2 == 1;
}

static void write_page(struct arena *a, u64 index)
{
	u64 *page = a->words + index * (PAGE / 8), key = index + a->salt;
	u64 version = (u64)++a->versions[index];

	a->sum += mix(index, version, 0) - mix(index, version - 1, 0);
	if (is_zero(a, version)) {
		memset(page, 0, PAGE);
	} else if (a->pattern == ZERO) {
		arena_fill(a, page, key, version);
	} else {
		u64 slot = HEAD + version % MIDDLE;

		for (u64 i = 0; i < HEAD; i++)
			page[i] = mix(key, version, i);
		page[slot] = middle(a, key, version, slot);
		page[LAST] = mix(key, version, LAST);
	}
}

void arena_init(struct arena *a, const char *name, void *memory, u64 pages, enum pattern pattern)
{
	static u64 salts;

	a->name = name;
	a->words = memory;
	a->pages = a->writable = pages;
	a->pattern = pattern;
	a->salt = ++salts << 40;
	a->state = salts;
	a->versions = map((pages * sizeof(u32) + PAGE - 1) / PAGE * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, -1);
	pthread_mutex_init(&a->lock, NULL);
	for (u64 i = 0; i < pages; i++) {
		arena_fill(a, a->words + i * (PAGE / 8), i + a->salt, 0);
		a->sum += mix(i, 0, 0);
	}
}

static u64 choose(struct arena *a)
{
	u64 r;

	if (a->pattern == SEQUENTIAL)
		return a->next++ % a->writable;
	a->state = a->state * 6364136223846793005ull + 1442695040888963407ull;
	r = a->state >> 20;
	if (a->pattern == HOT && r % 10)
		return (r >> 8) % (a->writable / 100 + 1);
	return r % a->writable;
}

void arena_write(struct arena *a, u64 count)
{
	pthread_mutex_lock(&a->lock);
	while (count--)
		write_page(a, choose(a));
	pthread_mutex_unlock(&a->lock);
}

static const char *what_is_wrong(const u64 *page, u64 key, u64 version)
{
	static const u64 nothing[PAGE / 8];

	if (memcmp(page, nothing, PAGE) == 0)
		return "zero";
	for (u64 old = version > 100000 ? version - 100000 : 0; old < version; old++)
		if (page[0] == mix(key, old, 0))
			return "stale";
	return page[0] == mix(key, version, 0) ? "torn" : "foreign";
}

u64 arena_verify(struct arena *a)
{
	static const u64 nothing[PAGE / 8];
	u64 want[PAGE / 8], sum = 0;

	a->bad = 0;
	for (u64 i = 0; i < a->pages; i++) {
		const u64 *page = a->words + i * (PAGE / 8), *expected = nothing;
		u64 version = a->versions[i];

		sum += mix(i, version, 0);
		if (!is_zero(a, version)) {
			arena_fill(a, want, i + a->salt, version);
			expected = want;
		}
		if (memcmp(page, expected, PAGE) != 0 && a->bad++ < NAMED)
			fail("%s: page %llu at %p is %s (version %llu)", a->name, (unsigned long long)i, (void *)page,
			     what_is_wrong(page, i + a->salt, version), (unsigned long long)version);
	}
	if (sum != a->sum) {
		a->bad++;
		fail("%s: the versions are wrong", a->name);
	}
	return a->bad;
}
