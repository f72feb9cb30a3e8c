/* Pages to and from the files of layers. */
#ifndef LAZYMIG_STORE_H
#define LAZYMIG_STORE_H

#include "lazymig/images/extents.h"
#include "page_server/bulk.h"

/* cffi: begin */
/* Appends the batch that lm_bulk_fill read to a file, at *offset, which moves on. The ranges that the file now
 * holds are copied to `got` (room for 256), their number to done. */
lm_result lm_bulk_store(lm_bulk *b, int file, uint64_t *offset, lm_range *got);
/* Places parts of a file in another process, which must be stopped: done extents. EPIPE: the file is too short. */
lm_result lm_store_load(int file, const lm_extent *e, uint64_t n, int pid, int mem);
/* cffi: end */

#endif
