/* Shared by the files that hold the probes; nothing of it is told to Python. */
#ifndef LAZYMIG_KDAT_PROBES_H
#define LAZYMIG_KDAT_PROBES_H

#include "lazymig/kernel/lm.h"

#define WRONG ENOTRECOVERABLE /* succeeded, but did not do what it should */

/* A probe runs in its own process, returns 0 or an errno, and need not tidy up. */
typedef struct {
	const char *name;
	int (*try)(int arg);
	int arg;
} lm_probe_entry;

/* The probes of memory: userfaultfd, write tracking, madvise. The last one has no name. */
extern const lm_probe_entry lm_memory_probes[];

/* `n` fresh private pages. */
char *lm_probe_pages(int n);

#endif
