#include "lazymig/kernel/msgpack.h"

/* A number of `bytes` bytes, the most significant first. */
static uint64_t number(const uint8_t *p, unsigned bytes)
{
	uint64_t n = 0;

	while (bytes--)
		n = n << 8 | *p++;
	return n;
}

/*
 * What follows the first byte of formats 0xc0 to 0xdf: `fixed` bytes of payload, or a length of `length` bytes and so
 * many bytes behind it (`extra`: one more, an extension's type). Elements of arrays and maps are values of their own.
 */
static const struct {
	uint8_t fixed, length, extra, elements;
} formats[32] = {
	[0x04] = {0, 1, 0, 0}, [0x05] = {0, 2, 0, 0}, [0x06] = {0, 4, 0, 0}, /* bin */
	[0x07] = {0, 1, 1, 0}, [0x08] = {0, 2, 1, 0}, [0x09] = {0, 4, 1, 0}, /* ext */
	[0x0a] = {4, 0, 0, 0}, [0x0b] = {8, 0, 0, 0},			     /* float */
	[0x0c] = {1, 0, 0, 0}, [0x0d] = {2, 0, 0, 0}, [0x0e] = {4, 0, 0, 0}, [0x0f] = {8, 0, 0, 0}, /* unsigned */
	[0x10] = {1, 0, 0, 0}, [0x11] = {2, 0, 0, 0}, [0x12] = {4, 0, 0, 0}, [0x13] = {8, 0, 0, 0}, /* signed */
	[0x14] = {2, 0, 0, 0}, [0x15] = {3, 0, 0, 0}, [0x16] = {5, 0, 0, 0}, [0x17] = {9, 0, 0, 0},
	[0x18] = {17, 0, 0, 0},						     /* fixext */
	[0x19] = {0, 1, 0, 0}, [0x1a] = {0, 2, 0, 0}, [0x1b] = {0, 4, 0, 0}, /* str */
	[0x1c] = {0, 2, 0, 1}, [0x1d] = {0, 4, 0, 1},			     /* array */
	[0x1e] = {0, 2, 0, 1}, [0x1f] = {0, 4, 0, 1},			     /* map */
};

uint64_t lm_msgpack_values(const uint8_t *p, uint64_t len, uint64_t most)
{
	uint64_t at = 0, n = 0;

	while (at < len && n <= most) {
		uint8_t first = p[at++];
		uint64_t skip = 0;

		n++;
		if (first >= 0xa0 && first < 0xc0) {
			skip = first & 0x1f; /* a short string */
		} else if (first >= 0xc0 && first < 0xe0) {
			unsigned f = first & 0x1f, length = formats[f].length;

			if (length > len - at)
				break;
			skip = formats[f].fixed + formats[f].extra;
			if (length && !formats[f].elements)
				skip += number(p + at, length);
			at += length;
		}
		if (skip > len - at)
			break;
		at += skip;
	}
	return n;
}
