//! TLS of the link: version 1.3 only; the hub shows its server certificate, a node its client certificate.

use std::{io, sync::Arc};

use rustls::{ClientConfig, RootCertStore, ServerConfig, server::WebPkiClientVerifier, version::TLS13};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};

/// The one application protocol of the link's port.
const ALPN: &[u8] = b"http/1.1";

/// A certificate chain and its key, as PEM.
#[derive(Clone, Copy)]
pub struct KeyPair<'a> {
    /// The chain, leaf first.
    pub certificate: &'a [u8],
    /// The private key.
    pub key: &'a [u8],
}

/// The hub's side. Client certificates are optional at this level, because a node that joins has none yet; what needs one
/// checks for it.
///
/// # Errors
/// When a PEM is unreadable or the parts don't fit together.
pub fn server_config(pair: KeyPair<'_>, client_ca: &[u8]) -> io::Result<Arc<ServerConfig>> {
    let verifier =
        WebPkiClientVerifier::builder(Arc::new(roots(client_ca)?)).allow_unauthenticated().build().map_err(invalid)?;
    let mut config = ServerConfig::builder_with_protocol_versions(&[&TLS13])
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain(pair.certificate)?, key(pair.key)?)
        .map_err(invalid)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Arc::new(config))
}

/// The node's side: trusts only `hub_ca`, and shows `pair` where it has one.
///
/// # Errors
/// When a PEM is unreadable or the parts don't fit together.
pub fn client_config(hub_ca: &[u8], pair: Option<KeyPair<'_>>) -> io::Result<Arc<ClientConfig>> {
    let builder = ClientConfig::builder_with_protocol_versions(&[&TLS13]).with_root_certificates(roots(hub_ca)?);
    let mut config = match pair {
        Some(pair) => builder.with_client_auth_cert(chain(pair.certificate)?, key(pair.key)?).map_err(invalid)?,
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Arc::new(config))
}

fn chain(pem: &[u8]) -> io::Result<Vec<CertificateDer<'static>>> {
    let chain = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>().map_err(invalid)?;
    if chain.is_empty() { Err(invalid("no certificate in the PEM")) } else { Ok(chain) }
}

fn key(pem: &[u8]) -> io::Result<PrivateKeyDer<'static>> {
    PrivateKeyDer::from_pem_slice(pem).map_err(invalid)
}

fn roots(pem: &[u8]) -> io::Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for certificate in chain(pem)? {
        roots.add(certificate).map_err(invalid)?;
    }
    Ok(roots)
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
