/* How much may be in flight on a connection that answers in order: enough that the link is busy, little enough that
 * a fault does not queue for long. From the measured rate and the shortest round trip; no clock of the peer. */
#ifndef LAZYMIG_CRIU_FLOW_H
#define LAZYMIG_CRIU_FLOW_H

#include "lazymig/kernel/lm.h"

typedef struct {
	uint64_t window;     /* bytes */
	uint64_t rate;       /* bytes a second; 0: not known */
	uint64_t round_trip; /* ns, the shortest seen; 0: not known */
	uint64_t begin, bytes, last_fault;
} lm_flow;

void lm_flow_init(lm_flow *f);
/* A thread waits for a page. */
void lm_flow_fault(lm_flow *f, uint64_t now);
/* A reply came: bytes with its head, when the request was sent, and whether others are in flight. */
void lm_flow_reply(lm_flow *f, uint64_t now, uint64_t bytes, uint64_t sent, int busy);
/* Pages of one request that nobody waits for. */
uint64_t lm_flow_chunk(const lm_flow *f);

#endif
