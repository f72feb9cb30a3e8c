/* One TLS 1.3 connection: the handshake, who the peer is, and the pump that joins it to a plain socket. */
#ifndef LAZYMIG_TLS_H
#define LAZYMIG_TLS_H

#include <stddef.h>
#include <stdint.h>

/* cffi: begin */
/* How a handshake ended. */
enum lm_tls_kind {
	LM_TLS_OK,
	LM_TLS_TIMEOUT, /* the peer did not say enough in time */
	LM_TLS_CLOSED,  /* the connection ended; detail: errno, or 0 for a mere end */
	LM_TLS_PLAIN,   /* the peer does not speak TLS */
	LM_TLS_PEER,    /* the peer's certificate was refused here; detail: X509_V_ERR_* */
	LM_TLS_ALERT,   /* the peer refused; detail: the TLS alert's number */
	LM_TLS_OTHER,   /* see text */
};

typedef struct {
	int32_t kind, detail;
	int32_t ours;            /* the peer is lazymig too: it has agreed on our protocol (ALPN) */
	char text[200];          /* OpenSSL's words */
	char names[2048];        /* of the peer's certificate, one a line: DNS:... or IP:... */
	uint8_t fingerprint[32]; /* SHA-256 of that certificate */
} lm_tls_report;

typedef struct lm_tls lm_tls;

/* Loads PEM files: the authority that is believed, revocations (NULL: none are looked at), and what this side shows.
 * NULL with the reason in `report`. */
lm_tls *lm_tls_new(const char *ca, const char *crl, const char *cert, const char *key, int server,
		   lm_tls_report *report);
void lm_tls_free(lm_tls *t);

/* Shakes hands over the connected `fd`, which becomes non-blocking and stays the caller's. `name`: the name or address
 * that the peer's certificate must hold; NULL: any. Both certificates are accepted when this returns LM_TLS_OK, if
 * the peer is one of ours; another program's refusal may only show later, as the connection's end. */
int lm_tls_handshake(lm_tls *t, int fd, const char *name, int timeout_ms, lm_tls_report *report);

/* Moves bytes between the TLS connection and the plain stream socket, in both directions, until both have ended.
 * An end of one direction is passed on as one; a broken connection ends both, and the reset of a plain socket that is
 * TCP resets the other connection, without close_notify. `unit`: what the plain side says comes in pieces of so many
 * bytes, and no piece is spread over two records; 1 when that does not matter. */
void lm_tls_pump(lm_tls *t, int plain, unsigned int unit);
/* Gives up every capability and the right to gain one. 0 or an errno. */
int lm_tls_unprivileged(void);
/* cffi: end */

#endif
