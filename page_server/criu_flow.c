#include "page_server/criu_flow.h"

#define MIN_WINDOW (512ull << 10)
#define MAX_WINDOW (32ull << 20)
#define SECOND 1000000000ull
/* Replies are looked at together for so long: a rate over less is noise. */
#define SAMPLE (3 * SECOND / 1000)
/* For so long after a fault more are expected. */
#define FAULTS_LAST (50 * SECOND / 1000)

void lm_flow_init(lm_flow *f)
{
	*f = (lm_flow){.window = 2 * MIN_WINDOW};
}

void lm_flow_fault(lm_flow *f, uint64_t now)
{
	f->last_fault = now;
}

static void set_window(lm_flow *f, uint64_t now)
{
	int faults = now - f->last_fault < FAULTS_LAST;
	/* What is in flight beyond the round trip stands in a queue: it hides the server's pauses, and a fault waits
	 * behind it. It also lets the window grow while the link has more to give. */
	uint64_t queue = f->round_trip / (faults ? 4 : 1), least = faults ? SECOND / 2000 : 3 * SECOND / 1000;
	uint64_t span = f->round_trip + (queue > least ? queue : least);

	f->window = (uint64_t)((__uint128_t)f->rate * span / SECOND);
	if (f->window < MIN_WINDOW)
		f->window = MIN_WINDOW;
	if (f->window > MAX_WINDOW)
		f->window = MAX_WINDOW;
}

void lm_flow_reply(lm_flow *f, uint64_t now, uint64_t bytes, uint64_t sent, int busy)
{
	uint64_t took = now - sent;

	if (!f->round_trip || took < f->round_trip)
		f->round_trip = took;
	if (!f->begin) {
		f->begin = busy ? now : 0;
		f->bytes = 0;
		return;
	}
	f->bytes += bytes;
	if (now - f->begin >= SAMPLE) {
		uint64_t rate = (uint64_t)((__uint128_t)f->bytes * SECOND / (now - f->begin));

		/* Up at once, down slowly: a pause says nothing about the link. */
		f->rate = rate > f->rate ? rate : f->rate - f->rate / 8 + rate / 8;
		f->begin = now;
		f->bytes = 0;
		set_window(f, now);
	}
	if (!busy)
		f->begin = 0;
}

uint64_t lm_flow_chunk(const lm_flow *f)
{
	uint64_t pages = f->window / 4 / LM_PAGE;

	return pages < 16 ? 16 : pages > 1024 ? 1024 : pages;
}
