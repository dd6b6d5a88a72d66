//! `edgecore join`: from a token to the node's certificate.

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use edgemesh_apiserver::{
    kubeconfig::{Credentials, Kubeconfig},
    pki::{self, Issued},
};
use edgemesh_link::transport;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use rcgen::{CertificateParams, KeyPair};
use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::CryptoProvider,
    version::TLS13,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::timeout;

/// How long the hub may take to answer.
const REQUEST_DEADLINE: Duration = Duration::from_secs(30);
/// Largest answer that is read, in bytes.
const MAX_ANSWER_BYTES: usize = 256 << 10;

/// Who this node is and where its hub is: `join.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Membership {
    /// The node's name.
    pub node: String,
    /// The hub's address, for example `https://203.0.113.10:10443`.
    pub hub: String,
}

impl Membership {
    /// What an earlier join left in the folder.
    ///
    /// # Errors
    /// When the node has not joined, or the file is damaged.
    pub fn load(data_dir: &Path) -> anyhow::Result<Self> {
        let path = data_dir.join("join.json");
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                bail!("this node has not joined a hub yet ({} is missing): run `edgecore join` first", path.display())
            }
            Err(error) => return Err(error).with_context(|| path.display().to_string()),
        };
        serde_json::from_slice(&text).with_context(|| format!("{} is damaged; join again", path.display()))
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct JoinResponse {
    certificate: String,
    ca: String,
    api_server: Option<String>,
}

/// Joins the hub as `node` and writes the node's identity below `data_dir`.
///
/// # Errors
/// When the hub can't be reached, is not the one that made the token, or refuses; the message says which.
pub async fn join(data_dir: &Path, hub: &str, token: &str, node: &str) -> anyhow::Result<()> {
    let (host, port) = transport::hub_address(hub).map_err(|error| anyhow::anyhow!("--hub: {error}"))?;
    let token = token.trim();
    let pin = match token.split('.').collect::<Vec<_>>()[..] {
        [id, secret, pin] if !id.is_empty() && !secret.is_empty() && pin.len() == 64 => pin,
        _ => bail!("the token is malformed: it must read ID.SECRET.CAHASH"),
    };
    if let Ok(present) = Membership::load(data_dir) {
        ensure!(
            present.node == node,
            "{} belongs to node {:?}; choose another dataDir for node {node:?}",
            data_dir.display(),
            present.node
        );
    }

    let key = KeyPair::generate().context("the node's key can't be made")?;
    // The hub sets the subject; of the request only the key counts.
    let request = CertificateParams::new(Vec::<String>::new())?.serialize_request(&key)?.pem()?;
    let body = json!({"token": token, "node": node, "csrPem": request});
    let response = post(&host, port, pin, &body).await?;

    let authority = CertificateDer::from_pem_slice(response.ca.as_bytes()).context("the hub's answer has no CA")?;
    ensure!(pki::fingerprint_sha256(&authority) == pin, "the hub answered with another CA than the token names");
    let folder = data_dir.join("pki");
    std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let key = key.serialize_pem();
    pki::write_file(&folder.join("node.key"), key.as_bytes(), 0o600)?;
    pki::write_file(&folder.join("node.crt"), response.certificate.as_bytes(), 0o644)?;
    pki::write_file(&folder.join("ca.crt"), response.ca.as_bytes(), 0o644)?;
    if let Some(server) = response.api_server {
        let credentials = Credentials::Certificate(Issued { certificate: response.certificate, key });
        Kubeconfig { server, authority: Some(response.ca), credentials }.write(&data_dir.join("node.kubeconfig"))?;
    }
    // Last: with this file the node counts as joined.
    let membership = Membership { node: node.to_owned(), hub: hub.to_owned() };
    pki::write_file(&data_dir.join("join.json"), &serde_json::to_vec_pretty(&membership)?, 0o644)?;
    Ok(())
}

async fn post(host: &str, port: u16, pin: &str, body: &Value) -> anyhow::Result<JoinResponse> {
    let tls = pinned_client(pin)?;
    let exchange = async {
        let stream = transport::dial(host, port).await.with_context(|| format!("the hub at {host}:{port}"))?;
        let stream = transport::secure(stream, host, tls).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let request = Request::builder()
            .method(Method::POST)
            .uri("/v1/join")
            .header(header::HOST, host)
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body.to_string())))?;
        let answer = async {
            let response = sender.send_request(request).await?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES)
                .collect()
                .await
                .map_err(|error| anyhow::anyhow!("the hub's answer: {error}"))?;
            anyhow::Ok((status, body.to_bytes()))
        };
        // The connection lives as long as the answer is awaited.
        tokio::select! {
            answer = answer => answer,
            ended = connection => bail!("the hub closed the connection: {ended:?}"),
        }
    };
    let (status, body) = timeout(REQUEST_DEADLINE, exchange)
        .await
        .with_context(|| format!("the hub did not answer within {REQUEST_DEADLINE:?}"))??;
    if status != StatusCode::OK {
        let message = serde_json::from_slice::<Value>(&body).ok();
        let message = message.as_ref().and_then(|status| status["message"].as_str()).unwrap_or("no reason given");
        bail!("the hub refused the join ({status}): {message}");
    }
    serde_json::from_slice(&body).context("the hub's answer can't be read")
}

/// A client that trusts exactly the authority whose certificate has this hash.
fn pinned_client(pin: &str) -> anyhow::Result<Arc<ClientConfig>> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = PinnedAuthority { pin: pin.to_ascii_lowercase(), provider: Arc::clone(&provider) };
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// Finds the pinned authority in the chain that the server shows, and then checks everything as always, with it as the only root.
#[derive(Debug)]
struct PinnedAuthority {
    pin: String,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for PinnedAuthority {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let pinned = intermediates.iter().find(|certificate| pki::fingerprint_sha256(certificate) == self.pin);
        let Some(pinned) = pinned else {
            return Err(rustls::Error::General(
                "the hub is not the one that made the token: its CA is another".to_owned(),
            ));
        };
        let mut roots = RootCertStore::empty();
        roots.add(pinned.clone().into_owned())?;
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&self.provider))
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?
            .verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("the hub must speak TLS 1.3".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
