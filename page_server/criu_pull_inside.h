/* Inside of the fetcher: the processes, what is in flight, and the connection. One thread uses it. */
#ifndef LAZYMIG_CRIU_PULL_INSIDE_H
#define LAZYMIG_CRIU_PULL_INSIDE_H

#include <stdatomic.h>
#include <stdbool.h>

#include "lazymig/kernel/pageindex.h"
#include "lazymig/uffd/fault_wire.h"
#include "page_server/criu_flow.h"
#include "page_server/criu_pull.h"

#define LM_PULL_BUFFER (1u << 20)
#define LM_PULL_STREAMS 4

/* Faults that went up the addresses lately: where the next one of them would be, and how much was asked for. */
typedef struct {
	uint64_t next;
	uint32_t pages, used;
} lm_pull_stream;

typedef struct {
	lm_lazy *z;
	uint32_t pid;
	int faults; /* -1: its lazy memory has let go of it */
	uint8_t part[sizeof(lm_fault_head)];
	size_t part_n;
	lm_index index;
	uint64_t *todo; /* by page number: not asked for */
	uint64_t ntodo, cursor;
	lm_piece *local;
	uint64_t nlocal;
	int *fds;
	lm_pull_stream stream[LM_PULL_STREAMS];
	uint32_t turn;
} lm_pull_task;

typedef struct {
	uint32_t task;
	uint64_t sent; /* ns */
} lm_pull_sent;

struct lm_pull {
	int sock, wake;
	size_t width; /* bytes of a message */
	lm_pull_task *task;
	uint32_t ntasks, next;
	_Atomic bool stop, background;
	lm_flow flow;
	lm_pull_record *record, own;
	lm_pull_sent in_flight[LM_PULL_RING]; /* of request n at n % LM_PULL_RING */
	uint64_t flying;                      /* bytes asked for and not come */
	bool uncounted;                       /* no TCP socket: it does not tell what went through it */
	uint64_t flushed;                     /* bytes of requests that the socket took */
	uint64_t placed;                      /* pages of the reply that is due that were placed or thrown away */
	uint64_t taken;                       /* bytes of that reply's pages */
	size_t have;                          /* bytes in the buffer */
	uint8_t *buffer, *from_images; /* each of LM_PULL_BUFFER bytes; the first may hold part of a page */
	struct {
		_Atomic uint64_t remote, local, requests, urgent, left, window, rate, round_trip;
	} stats;
};

uint64_t lm_pull_now(void);
/* Asks for pages that are still to be asked for; false when too many requests are in flight. */
bool lm_pull_ask(lm_pull *p, uint32_t task, uint64_t addr, uint64_t pages);
/* The connection: sends what is due; reads and places what came, within a budget. 0 or errno. */
int lm_pull_flush(lm_pull *p);
int lm_pull_receive(lm_pull *p);
/* These pages were not sent after all: they are to be asked for again. */
void lm_pull_again(lm_pull *p, lm_pull_task *t, uint64_t addr, uint64_t pages);
/* Takes pages out of `todo`; how many were in it. */
uint64_t lm_pull_claim(lm_pull *p, lm_pull_task *t, uint64_t page, uint64_t n);
/* How many of these pages are in images, or are not, like the first one. */
uint64_t lm_pull_span(const lm_pull_task *t, uint64_t addr, uint64_t pages, bool *local);
/* Reads pages from images and places them. The number of pages; 0 when they are not there. */
uint64_t lm_pull_local(lm_pull *p, lm_pull_task *t, uint64_t addr, uint64_t pages, int *err);

#endif
