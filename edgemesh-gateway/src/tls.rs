//! TLS termination: certificates from Secrets, chosen by the server name of the client's hello.

use std::{fmt, sync::Arc};

use k8s_openapi::api::core::v1::Secret;
use rustls::{
    ServerConfig,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};

use crate::routing::HostPattern;

/// Why a Secret's certificate can't be used.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// A key of the Secret is missing.
    #[error("the Secret has no {0}")]
    Missing(&'static str),
    /// It isn't PEM.
    #[error("{0} is not valid PEM")]
    Pem(&'static str),
    /// The certificate and the key don't belong together, or aren't supported.
    #[error("the certificate can't be used: {0}")]
    Unusable(#[from] rustls::Error),
}

/// The certificate and key of a Secret of type `kubernetes.io/tls`.
///
/// # Errors
/// When a part is missing, isn't PEM, or the two don't belong together.
pub fn certificate(secret: &Secret) -> Result<Arc<CertifiedKey>, CertificateError> {
    let part = |name: &'static str| {
        let data = secret.data.as_ref().and_then(|data| data.get(name)).ok_or(CertificateError::Missing(name))?;
        Ok::<_, CertificateError>(data.0.as_slice())
    };
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(part("tls.crt")?)
        .collect::<Result<_, _>>()
        .map_err(|_| CertificateError::Pem("tls.crt"))?;
    if chain.is_empty() {
        return Err(CertificateError::Pem("tls.crt"));
    }
    let key = PrivateKeyDer::from_pem_slice(part("tls.key")?).map_err(|_| CertificateError::Pem("tls.key"))?;
    let provider = rustls::crypto::ring::default_provider();
    Ok(Arc::new(CertifiedKey::from_der(chain, key, &provider)?))
}

/// A server configuration with certificates by host name. HTTP/2 is offered first.
pub fn server(certificates: Vec<(HostPattern, Arc<CertifiedKey>)>) -> Arc<ServerConfig> {
    let mut by_name = certificates;
    by_name.sort_by_key(|(host, _)| host.specificity());
    let mut config = ServerConfig::builder().with_no_client_auth().with_cert_resolver(Arc::new(ByName(by_name)));
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Arc::new(config)
}

/// Certificates, the most specific host name first.
struct ByName(Vec<(HostPattern, Arc<CertifiedKey>)>);

impl fmt::Debug for ByName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|(host, _)| host)).finish()
    }
}

impl ResolvesServerCert for ByName {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        // A client that names no server gets the first certificate, as from other proxies.
        let name = hello.server_name().map(str::to_ascii_lowercase);
        let found = match &name {
            Some(name) => self.0.iter().find(|(host, _)| host.matches(name)),
            None => self.0.first(),
        };
        found.map(|(_, certificate)| Arc::clone(certificate))
    }
}
