//! The server's certificate, and whose client certificates it takes.

use std::sync::Arc;

use rustls::{RootCertStore, ServerConfig, crypto::ring, server::WebPkiClientVerifier};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tokio_rustls::TlsAcceptor;

use crate::pki::Issued;

/// What TLS needs, all PEM.
#[derive(Debug, Clone)]
pub struct TlsOptions {
    /// The server's certificate (with its chain) and key.
    pub server: Issued,
    /// The authority of client certificates; `None` takes none. Clients without one stay anonymous or use a token.
    pub client_authority: Option<String>,
}

/// Why certificates can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// Not PEM.
    #[error("TLS: not PEM: {0}")]
    Pem(#[from] rustls_pki_types::pem::Error),
    /// The certificate or key doesn't fit.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// The authority can't be used.
    #[error("TLS: client authority: {0}")]
    Authority(#[from] rustls::server::VerifierBuilderError),
}

impl TlsOptions {
    pub(crate) fn acceptor(&self) -> Result<TlsAcceptor, TlsError> {
        let provider = Arc::new(ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
        let builder = match &self.client_authority {
            None => builder.with_no_client_auth(),
            Some(authority) => {
                let mut roots = RootCertStore::empty();
                for certificate in CertificateDer::pem_slice_iter(authority.as_bytes()) {
                    roots.add(certificate?)?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                    .allow_unauthenticated()
                    .build()?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let chain =
            CertificateDer::pem_slice_iter(self.server.certificate.as_bytes()).collect::<Result<Vec<_>, _>>()?;
        let key = PrivateKeyDer::from_pem_slice(self.server.key.as_bytes())?;
        let mut config = builder.with_single_cert(chain, key)?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(TlsAcceptor::from(Arc::new(config)))
    }
}
