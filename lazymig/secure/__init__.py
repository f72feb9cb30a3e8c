"""Who may connect: TLS 1.3 on every connection, the small authority that makes certificates, and the policy."""
