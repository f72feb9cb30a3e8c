/* Counts what a msgpack message (github.com/msgpack/msgpack/blob/master/spec.md) holds, before anything is made of it. */
#ifndef LM_MSGPACK_H
#define LM_MSGPACK_H

#include "lazymig/kernel/lm.h"

/* cffi: begin */
/*
 * How many values (also arrays, maps and what is in them) `len` bytes hold, as far as they are sound; counting ends at
 * `most` + 1.
 */
uint64_t lm_msgpack_values(const uint8_t *p, uint64_t len, uint64_t most);
/* cffi: end */

#endif
