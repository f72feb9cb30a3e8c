/* The serving side of CRIU's page protocol: pages that are pushed go to a file, pages that are asked for come from
 * files. What happens per message and not per page (opening images, the end) is left to Python. */
#ifndef LAZYMIG_CRIU_SESSION_H
#define LAZYMIG_CRIU_SESSION_H

#include "lazymig/images/extents.h"
#include "page_server/criu_iov.h"

/* cffi: begin */
typedef struct lm_ps lm_ps;

/* `sock` must not block; it stays the caller's. NULL: out of memory. */
lm_ps *lm_ps_new(int sock);
void lm_ps_free(lm_ps *s);
void lm_ps_cancel(lm_ps *s);
/* The socket leads to a TLS door behind which CRIU reads. That waits for the network while the beginning of its next
 * message, or the pages behind a message, lie in a record that it has read already. So no two go out together. */
void lm_ps_pace(lm_ps *s);
/* What is pushed for `dst_id` goes to this file from now on, which stays the caller's; -1: nothing may be pushed. */
void lm_ps_receive(lm_ps *s, uint64_t dst_id, int pages);
/* What has been pushed since then, in order (lm_entry with address, flags and offset); how many entries. */
uint64_t lm_ps_received(const lm_ps *s, const lm_entry **out);
/* A process whose pages may be asked for, and where they are: sorted pieces in `fds` by their `layer`. All but the
 * descriptors is copied. 0 or errno. */
int lm_ps_serve(lm_ps *s, uint64_t pid, const lm_piece *pieces, uint64_t n, const int *fds, uint32_t nfds);
/* Works until another message comes, which is put in `out`: 0. EPIPE: the peer closed between messages; ECONNABORTED:
 * amid one; EPROTO: a message that is not allowed; ENOENT: pages that are not here were asked for (both in `out`);
 * or errno. */
int lm_ps_step(lm_ps *s, lm_ps_iov *out);
/* Sends an answer. 0 or errno. */
int lm_ps_answer(lm_ps *s, const void *data, uint64_t n);
/* How many bytes the messages of a connection have that begins with these 24. */
uint64_t lm_ps_width(const uint8_t *first);
/* Pages received and sent so far. */
void lm_ps_counts(const lm_ps *s, uint64_t *received, uint64_t *sent);
/* cffi: end */

#endif
