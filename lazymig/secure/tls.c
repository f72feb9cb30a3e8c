#define _GNU_SOURCE
#include "lazymig/secure/tls.h"

#include "lazymig/secure/tls_conn.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <openssl/err.h>
#include <openssl/x509v3.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* TLS 1.3 only. The short key first: it is as good for what travels for minutes, and the cheapest per byte. */
#define SUITES "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"
/* Agreed on by both ends of ours: the server then says with one byte that it has accepted the client's certificate.
 * (In TLS 1.3 a client has finished before the server looks at it, and would learn of a refusal as a mere end.) */
static const unsigned char PROTOCOL[] = "\x09lazymig/1";
#define PROTOCOL_LEN (sizeof(PROTOCOL) - 1)
#define READ_AHEAD (128 << 10)
#define HANDSHAKE_RECORD 0x16

static int choose_protocol(SSL *ssl, const unsigned char **out, unsigned char *out_len, const unsigned char *in,
			   unsigned int in_len, void *arg)
{
	unsigned char *found;

	if (SSL_select_next_proto(&found, out_len, PROTOCOL, PROTOCOL_LEN, in, in_len) != OPENSSL_NPN_NEGOTIATED)
		return SSL_TLSEXT_ERR_NOACK;
	*out = found;
	return SSL_TLSEXT_ERR_OK;
}

static void say(lm_tls_report *r, int kind, int detail, const char *text)
{
	r->kind = kind;
	r->detail = detail;
	strncpy(r->text, text ? text : "", sizeof(r->text) - 1);
}

static void say_error(lm_tls_report *r, const char *what)
{
	const char *reason = ERR_reason_error_string(ERR_peek_last_error());

	r->kind = LM_TLS_OTHER;
	snprintf(r->text, sizeof(r->text), "%s: %s", what, reason ? reason : "not usable");
}

/* Nobody is there to be asked: each connection reads the key again, in a process without a terminal. */
static int no_passphrase(char *buf, int size, int writing, void *report)
{
	((lm_tls_report *)report)->detail = 1;
	return -1;
}

static int load(SSL_CTX *ctx, const char *ca, const char *crl, const char *cert, const char *key, lm_tls_report *r)
{
	X509_STORE *store = SSL_CTX_get_cert_store(ctx);
	X509_LOOKUP *lookup;

	if (!SSL_CTX_load_verify_file(ctx, ca)) {
		say_error(r, ca);
		return 0;
	}
	if (crl) {
		lookup = X509_STORE_add_lookup(store, X509_LOOKUP_file());
		if (!lookup || X509_load_crl_file(lookup, crl, X509_FILETYPE_PEM) < 1) {
			say_error(r, crl);
			return 0;
		}
		X509_STORE_set_flags(store, X509_V_FLAG_CRL_CHECK);
	}
	SSL_CTX_set_default_passwd_cb(ctx, no_passphrase);
	SSL_CTX_set_default_passwd_cb_userdata(ctx, r);
	if (SSL_CTX_use_certificate_chain_file(ctx, cert) != 1) {
		say_error(r, cert);
		return 0;
	}
	if (SSL_CTX_use_PrivateKey_file(ctx, key, SSL_FILETYPE_PEM) != 1 || SSL_CTX_check_private_key(ctx) != 1) {
		say_error(r, key);
		return 0;
	}
	return 1;
}

lm_tls *lm_tls_new(const char *ca, const char *crl, const char *cert, const char *key, int server,
		   lm_tls_report *report)
{
	lm_tls *t = calloc(1, sizeof(*t));

	memset(report, 0, sizeof(*report));
	ERR_clear_error();
	if (!t)
		return NULL;
	t->server = server;
	t->ctx = SSL_CTX_new(server ? TLS_server_method() : TLS_client_method());
	if (!t->ctx || SSL_CTX_set_min_proto_version(t->ctx, TLS1_3_VERSION) != 1 ||
	    SSL_CTX_set_ciphersuites(t->ctx, SUITES) != 1) {
		say_error(report, "TLS 1.3");
		goto fail;
	}
	if (!load(t->ctx, ca, crl, cert, key, report))
		goto fail;
	SSL_CTX_set_verify(t->ctx, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, NULL);
	/* Every connection is judged anew: no tickets, no sessions. */
	SSL_CTX_set_num_tickets(t->ctx, 0);
	SSL_CTX_set_session_cache_mode(t->ctx, SSL_SESS_CACHE_OFF);
	SSL_CTX_set_options(t->ctx, SSL_OP_NO_TICKET | SSL_OP_NO_COMPRESSION | SSL_OP_NO_RENEGOTIATION);
	SSL_CTX_set_read_ahead(t->ctx, 1);
	SSL_CTX_set_default_read_buffer_len(t->ctx, READ_AHEAD);
	if (server)
		SSL_CTX_set_alpn_select_cb(t->ctx, choose_protocol, NULL);
	else
		SSL_CTX_set_alpn_protos(t->ctx, PROTOCOL, PROTOCOL_LEN);
	return t;
fail:
	lm_tls_free(t);
	return NULL;
}

void lm_tls_free(lm_tls *t)
{
	if (!t)
		return;
	SSL_free(t->ssl);
	SSL_CTX_free(t->ctx);
	free(t);
}

static int expect_name(SSL *ssl, const char *name)
{
	X509_VERIFY_PARAM *param = SSL_get0_param(ssl);
	unsigned char raw[16];

	X509_VERIFY_PARAM_set_hostflags(param, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS | X509_CHECK_FLAG_NEVER_CHECK_SUBJECT);
	if (inet_pton(AF_INET, name, raw) == 1 || inet_pton(AF_INET6, name, raw) == 1)
		return X509_VERIFY_PARAM_set1_ip_asc(param, name);
	SSL_set_tlsext_host_name(ssl, name);
	return X509_VERIFY_PARAM_set1_host(param, name, 0);
}

static void add_name(lm_tls_report *r, const char *kind, const char *text, int len)
{
	size_t at = strlen(r->names), room = sizeof(r->names) - at;
	int i;

	for (i = 0; i < len; i++)
		if (text[i] <= ' ' || text[i] > '~') /* a name that is not what it looks like is no name */
			return;
	if (len > 0 && strlen(kind) + (size_t)len + 2 < room)
		snprintf(r->names + at, room, "%s%.*s\n", kind, len, text);
}

static void describe(X509 *cert, lm_tls_report *r)
{
	GENERAL_NAMES *names = X509_get_ext_d2i(cert, NID_subject_alt_name, NULL, NULL);
	char text[INET6_ADDRSTRLEN];
	unsigned int n = sizeof(r->fingerprint);
	int i;

	X509_digest(cert, EVP_sha256(), r->fingerprint, &n);
	for (i = 0; i < sk_GENERAL_NAME_num(names); i++) {
		const GENERAL_NAME *g = sk_GENERAL_NAME_value(names, i);

		if (g->type == GEN_DNS) {
			add_name(r, "DNS:", (const char *)ASN1_STRING_get0_data(g->d.dNSName), ASN1_STRING_length(g->d.dNSName));
		} else if (g->type == GEN_IPADD) {
			int len = ASN1_STRING_length(g->d.iPAddress);

			if ((len == 4 || len == 16) && inet_ntop(len == 4 ? AF_INET : AF_INET6,
								  ASN1_STRING_get0_data(g->d.iPAddress), text, sizeof(text)))
				add_name(r, "IP:", text, (int)strlen(text));
		}
	}
	GENERAL_NAMES_free(names);
}

/* A certificate that is refused never gets into the session: only here it can be seen whose it says it is. */
static int judged(int ok, X509_STORE_CTX *store)
{
	SSL *ssl = X509_STORE_CTX_get_ex_data(store, SSL_get_ex_data_X509_STORE_CTX_idx());
	X509 *cert = X509_STORE_CTX_get0_cert(store);
	lm_tls_report *r = SSL_get_app_data(ssl);

	if (!ok && cert && !r->names[0])
		describe(cert, r);
	return ok;
}

static int64_t now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000ll + t.tv_nsec / 1000000;
}

/* Why a call failed for good, or 0 when it may be repeated. */
static int failure(lm_tls *t, int ret, int64_t deadline, lm_tls_report *r)
{
	int error = SSL_get_error(t->ssl, ret), at = errno;
	struct pollfd p = {t->fd, error == SSL_ERROR_WANT_WRITE ? POLLOUT : POLLIN, 0};
	unsigned long code = ERR_peek_error();
	int64_t left = deadline - now_ms();
	long verdict;

	if (error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE) {
		if (left <= 0 || !poll(&p, 1, (int)left)) {
			say(r, LM_TLS_TIMEOUT, 0, "it does not answer");
			return 1;
		}
		return 0;
	}
	verdict = SSL_get_verify_result(t->ssl);
	if (verdict != X509_V_OK)
		say(r, LM_TLS_PEER, (int)verdict, X509_verify_cert_error_string(verdict));
	else if (error == SSL_ERROR_ZERO_RETURN)
		say(r, LM_TLS_CLOSED, 0, "closed");
	else if (error == SSL_ERROR_SYSCALL)
		say(r, LM_TLS_CLOSED, at, at ? strerror(at) : "closed");
	else if (ERR_GET_REASON(code) > SSL_AD_REASON_OFFSET)
		say(r, LM_TLS_ALERT, ERR_GET_REASON(code) - SSL_AD_REASON_OFFSET, ERR_reason_error_string(code));
	else if (ERR_GET_REASON(code) == SSL_R_UNEXPECTED_EOF_WHILE_READING)
		say(r, LM_TLS_CLOSED, 0, "closed");
	else if (ERR_GET_REASON(code) == SSL_R_WRONG_VERSION_NUMBER || ERR_GET_REASON(code) == SSL_R_HTTP_REQUEST)
		say(r, LM_TLS_PLAIN, 0, ERR_reason_error_string(code));
	else
		say(r, LM_TLS_OTHER, 0, ERR_reason_error_string(code));
	return 1;
}

/* Looks at the first byte: a peer without TLS is to be told so in its own language. */
static int speaks_tls(lm_tls *t, int64_t deadline, lm_tls_report *r)
{
	struct pollfd p = {t->fd, POLLIN, 0};
	int64_t left = deadline - now_ms();
	unsigned char first;
	ssize_t n;

	if (left <= 0 || poll(&p, 1, (int)left) <= 0) {
		say(r, LM_TLS_TIMEOUT, 0, "it says nothing");
		return 0;
	}
	n = recv(t->fd, &first, 1, MSG_PEEK | MSG_DONTWAIT);
	if (n == 1 && first == HANDSHAKE_RECORD)
		return 1;
	if (n == 1)
		say(r, LM_TLS_PLAIN, first, "not TLS");
	else
		say(r, LM_TLS_CLOSED, n ? errno : 0, n ? strerror(errno) : "closed");
	return 0;
}

/* Both sides of ours: the server's byte that says that it has accepted. */
static int confirm(lm_tls *t, int64_t deadline, lm_tls_report *r)
{
	unsigned char byte = 1;
	size_t n;
	int ret;

	do {
		ERR_clear_error();
		ret = t->server ? SSL_write_ex(t->ssl, &byte, 1, &n) : SSL_read_ex(t->ssl, &byte, 1, &n);
	} while (ret != 1 && !failure(t, ret, deadline, r));
	return ret == 1;
}

int lm_tls_handshake(lm_tls *t, int fd, const char *name, int timeout_ms, lm_tls_report *report)
{
	int64_t deadline = now_ms() + timeout_ms;
	const unsigned char *protocol;
	unsigned int len;
	X509 *peer;
	int ret;

	memset(report, 0, sizeof(*report));
	t->fd = fd;
	t->ssl = SSL_new(t->ctx);
	if (!t->ssl || SSL_set_fd(t->ssl, fd) != 1 || (name && expect_name(t->ssl, name) != 1) ||
	    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK)) {
		say_error(report, "TLS");
		return report->kind;
	}
	SSL_set_app_data(t->ssl, report);
	SSL_set_verify(t->ssl, SSL_get_verify_mode(t->ssl), judged);
	if (t->server && !speaks_tls(t, deadline, report))
		return report->kind;
	do {
		ERR_clear_error();
		ret = t->server ? SSL_accept(t->ssl) : SSL_connect(t->ssl);
	} while (ret != 1 && !failure(t, ret, deadline, report));
	if (ret != 1)
		return report->kind;
	peer = SSL_get0_peer_certificate(t->ssl);
	if (peer)
		describe(peer, report);
	SSL_get0_alpn_selected(t->ssl, &protocol, &len);
	report->ours = len > 0;
	if (len && !confirm(t, deadline, report))
		return report->kind;
	return report->kind = LM_TLS_OK;
}

int lm_tls_unprivileged(void)
{
	struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
	struct __user_cap_data_struct none[2] = {0};

	if (syscall(SYS_capset, &head, none))
		return errno;
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_DUMPABLE, 0, 0, 0, 0))
		return errno;
	prctl(PR_SET_NAME, "lazymig-tls", 0, 0, 0);
	return 0;
}
