/* What the handshake leaves to the pump. */
#ifndef LAZYMIG_TLS_CONN_H
#define LAZYMIG_TLS_CONN_H

#include <openssl/ssl.h>

struct lm_tls {
	SSL_CTX *ctx;
	SSL *ssl;
	int fd, server;
};

#endif
