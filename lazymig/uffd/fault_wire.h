/* The fault channel: one page request and one reply, little endian. Never compressed, and on a connection of its
 * own, so that a page somebody waits for never queues behind bulk data. docs/protocol-pages.md tells the rest. */
#ifndef LAZYMIG_FAULT_WIRE_H
#define LAZYMIG_FAULT_WIRE_H

#include <stdint.h>

#define LM_FAULT_MAX_PAGES 16u /* of one request or reply */
#define LM_FAULT_ZERO 1u       /* reply flag: all these pages are zero, no bytes follow */
#define LM_ADDR_END (1ull << 47)

typedef struct {
	uint64_t addr; /* at the source */
	uint32_t npages, flags;
} lm_fault_head; /* of requests and replies; a reply without LM_FAULT_ZERO is followed by its pages */

#endif
