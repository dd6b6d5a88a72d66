//! Who is who: the certificate authority of the nodes, and the node that a client certificate stands for.

use std::path::Path;

use anyhow::{Context, bail};
use base64::{Engine, prelude::BASE64_STANDARD};
use edgemesh_api::names::{NODE_USER_PREFIX, NODES_GROUP, SYSTEM_NAMESPACE};
use edgemesh_apiserver::pki::CertificateAuthority;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Secret};
use kube::{Api, Client, api::PostParams};
use rustls_pki_types::CertificateDer;
use serde_json::{Value, json};
use x509_parser::prelude::{FromDer, X509Certificate};

/// Name of the Secret with the authority, and of the ConfigMap with its certificate.
const AUTHORITY_NAME: &str = "edgemesh-ca";
/// Longest node name: a DNS subdomain (Kubernetes, "Object Names and IDs").
const MAX_NODE_NAME: usize = 253;

/// The authority of `hub --standalone`: on this disk.
///
/// # Errors
/// When the folder can't be used.
pub(crate) fn local_authority(data_dir: &Path) -> anyhow::Result<CertificateAuthority> {
    Ok(CertificateAuthority::load_or_create(&data_dir.join("pki"))?)
}

/// The authority of a cluster: in a Secret that the first hub creates and all hubs read. The API server decides which
/// one was first, so two hubs never work with different authorities.
///
/// # Errors
/// When the API does not answer, or holds a Secret that is no authority.
pub(crate) async fn cluster_authority(client: &Client, data_dir: &Path) -> anyhow::Result<CertificateAuthority> {
    ensure_namespace(client).await?;
    let secrets: Api<Secret> = Api::namespaced(client.clone(), SYSTEM_NAMESPACE);
    let folder = data_dir.join("pki");
    let present = match secrets.get_opt(AUTHORITY_NAME).await? {
        Some(secret) => secret,
        None => {
            // A draft: it counts only if the API server takes it.
            CertificateAuthority::load_or_create(&folder)?;
            let read =
                |name: &str| std::fs::read(folder.join(name)).with_context(|| folder.join(name).display().to_string());
            let draft: Secret = serde_json::from_value(json!({
                "metadata": {"name": AUTHORITY_NAME, "namespace": SYSTEM_NAMESPACE},
                "type": "kubernetes.io/tls",
                "data": {
                    "tls.crt": BASE64_STANDARD.encode(read("ca.crt")?),
                    "tls.key": BASE64_STANDARD.encode(read("ca.key")?),
                },
            }))?;
            match secrets.create(&PostParams::default(), &draft).await {
                Ok(secret) => secret,
                Err(kube::Error::Api(status)) if status.code == 409 => secrets.get(AUTHORITY_NAME).await?,
                Err(error) => return Err(error).context("the Secret with the nodes' authority can't be created"),
            }
        }
    };
    let part = |name: &str| -> anyhow::Result<String> {
        let bytes = present.data.as_ref().and_then(|data| data.get(name));
        let bytes = bytes.with_context(|| format!("Secret {SYSTEM_NAMESPACE}/{AUTHORITY_NAME} has no {name}"))?;
        Ok(String::from_utf8(bytes.0.clone())?)
    };
    Ok(CertificateAuthority::from_pem(&part("tls.crt")?, &part("tls.key")?)?)
}

/// Makes the authority's certificate known in the cluster: `hub token create` pins it in its tokens.
///
/// # Errors
/// When the API refuses.
pub(crate) async fn publish(client: &Client, authority: &CertificateAuthority) -> anyhow::Result<()> {
    ensure_namespace(client).await?;
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), SYSTEM_NAMESPACE);
    let mut wanted: ConfigMap = serde_json::from_value(json!({
        "metadata": {"name": AUTHORITY_NAME, "namespace": SYSTEM_NAMESPACE},
        "data": {"ca.crt": authority.certificate_pem(), "sha256": authority.fingerprint_sha256()},
    }))?;
    match maps.get_opt(AUTHORITY_NAME).await? {
        None => match maps.create(&PostParams::default(), &wanted).await {
            Ok(_) => Ok(()),
            // Another hub was faster, with the same authority.
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
            Err(error) => Err(error.into()),
        },
        Some(present) if present.data == wanted.data => Ok(()),
        Some(present) => {
            wanted.metadata.resource_version = present.metadata.resource_version;
            maps.replace(AUTHORITY_NAME, &PostParams::default(), &wanted).await?;
            Ok(())
        }
    }
}

/// SHA-256 of the authority's certificate, as [`publish`] made it known.
///
/// # Errors
/// When no hub has made one known yet.
pub(crate) async fn published_fingerprint(client: &Client) -> anyhow::Result<String> {
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), SYSTEM_NAMESPACE);
    let Some(map) = maps.get_opt(AUTHORITY_NAME).await? else {
        bail!("the hub has not started yet: there is no ConfigMap {SYSTEM_NAMESPACE}/{AUTHORITY_NAME}");
    };
    let fingerprint = map.data.and_then(|data| data.get("sha256").cloned());
    fingerprint.with_context(|| format!("ConfigMap {SYSTEM_NAMESPACE}/{AUTHORITY_NAME} has no sha256"))
}

/// Creates the mesh's namespace where it is missing.
///
/// # Errors
/// When the API refuses.
pub(crate) async fn ensure_namespace(client: &Client) -> anyhow::Result<()> {
    let namespaces: Api<Namespace> = Api::all(client.clone());
    if namespaces.get_opt(SYSTEM_NAMESPACE).await?.is_some() {
        return Ok(());
    }
    let namespace: Namespace = serde_json::from_value(json!({"metadata": {"name": SYSTEM_NAMESPACE}}))?;
    match namespaces.create(&PostParams::default(), &namespace).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
        Err(error) => Err(error).context("the namespace of the mesh can't be created"),
    }
}

/// The node that a client certificate stands for (Kubernetes, "Using Node Authorization"). The TLS layer has checked
/// that it is the authority's.
///
/// # Errors
/// What the certificate lacks.
pub(crate) fn node_of(certificate: &CertificateDer<'_>) -> Result<String, &'static str> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|_| "the certificate can't be read")?;
    let subject = parsed.subject();
    let in_group = subject.iter_organization().filter_map(|o| o.as_str().ok()).any(|o| o == NODES_GROUP);
    if !in_group {
        return Err("the certificate is not a node's: its organisation is not system:nodes");
    }
    let mut names = subject.iter_common_name().filter_map(|name| name.as_str().ok());
    match (names.next().and_then(|name| name.strip_prefix(NODE_USER_PREFIX)), names.next()) {
        (Some(node), None) if is_node_name(node) => Ok(node.to_owned()),
        _ => Err("the certificate is not a node's: its common name is not system:node:NAME"),
    }
}

/// Whether a text can be the name of a Node.
pub(crate) fn is_node_name(name: &str) -> bool {
    let good = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.');
    let ends = |b: Option<&u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    name.len() <= MAX_NODE_NAME
        && name.bytes().all(good)
        && ends(name.as_bytes().first())
        && ends(name.as_bytes().last())
}

/// A Kubernetes `Status` for an HTTP error of the link's port.
pub(crate) fn status(code: u16, reason: &str, message: &str) -> Value {
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code,
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rustls_pki_types::pem::PemObject;

    use super::*;

    #[test]
    fn only_a_node_certificate_names_a_node() {
        let folder = tempfile::tempdir().unwrap();
        let authority = local_authority(folder.path()).unwrap();
        let node = |name: &str, groups: &[&str]| {
            let issued = authority.issue_client(name, groups, Duration::from_secs(60)).unwrap();
            node_of(&CertificateDer::from_pem_slice(issued.certificate.as_bytes()).unwrap())
        };
        assert_eq!(node("system:node:edge-1", &["system:nodes"]), Ok("edge-1".to_owned()));
        assert!(node("system:node:edge-1", &["system:masters"]).is_err());
        assert!(node("admin", &["system:nodes"]).is_err());
        assert!(node("system:node:", &["system:nodes"]).is_err());
        assert!(node("system:node:../x", &["system:nodes"]).is_err());
    }
}
