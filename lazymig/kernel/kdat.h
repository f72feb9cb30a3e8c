/* Tries what the kernel offers, each feature in a process of its own, so that a bad one hurts nobody. */
#ifndef LAZYMIG_KDAT_H
#define LAZYMIG_KDAT_H

#include "lazymig/kernel/lm.h"

/* cffi: begin */
/*
 * Tries the named feature. Works: done 1. Does not: the errno of the call that failed; ENOTRECOVERABLE when the
 * calls succeed but do not do what they should; ECHILD when the probe died; ETIMEDOUT. An unknown name: ENOENT.
 */
lm_result lm_probe(const char *name, uint64_t timeout_ns);
/* cffi: end */

#endif
