//! Join tokens: each is for one node name, once, for a short time.
//!
//! A token reads `ID.SECRET.CAHASH`. The cluster holds a Secret `edgemesh-join-ID` with the hash of SECRET, the node's name
//! the expiry and what the node may be; CAHASH lets the node check that it talks to the right hub before it says SECRET.

use anyhow::Context;
use edgemesh_api::names::SYSTEM_NAMESPACE;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Secret;
use kube::{
    Api, Client,
    api::{DeleteParams, PostParams, Preconditions},
};
use rand::Rng;
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::identity::{self, is_node_name};

const ID_CHARS: &[u8] = b"abcdefghijklmnopqrstuvwxyz0123456789";
const ID_LENGTH: usize = 10;
const SECRET_BYTES: usize = 32;
/// Longest lifetime of a token: a week.
const MAX_TTL_SECONDS: u64 = 7 * 86_400;
/// Marks the Secrets of tokens.
const SECRET_TYPE: &str = "edgemesh.dev/join-token";

/// Why a token does not admit a node.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TokenError {
    #[error("the token is malformed: it must read ID.SECRET.CAHASH")]
    Malformed,
    #[error("the token {0} is unknown: it was used already, was removed, or never existed")]
    Unknown(String),
    #[error("the token's secret is wrong")]
    Wrong,
    #[error("the token expired at {0}")]
    Expired(String),
    #[error("the token is for node {for_node:?}, not for node {asked:?}")]
    OtherNode { for_node: String, asked: String },
    #[error("the token is being used by another request")]
    Raced,
    #[error("the cluster's API can't be asked: {0}")]
    Api(#[from] kube::Error),
}

impl TokenError {
    /// The word for metrics.
    pub(crate) fn label(&self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Unknown(_) => "unknown_token",
            Self::Wrong => "wrong_secret",
            Self::Expired(_) => "expired",
            Self::OtherNode { .. } => "other_node",
            Self::Raced => "raced",
            Self::Api(_) => "api",
        }
    }
}

/// Makes a token for one node, which may run a gateway or not.
///
/// # Errors
/// When the name is no node name, the lifetime is out of range, or the API refuses.
pub(crate) async fn create(client: &Client, node: &str, gateway: bool, ttl_seconds: u64) -> anyhow::Result<String> {
    anyhow::ensure!(is_node_name(node), "{node:?} can't be the name of a node");
    anyhow::ensure!(
        (1..=MAX_TTL_SECONDS).contains(&ttl_seconds),
        "the lifetime must be from 1 second to {MAX_TTL_SECONDS} seconds"
    );
    let fingerprint = identity::published_fingerprint(client).await?;
    let (id, secret) = {
        let mut random = rand::rng();
        let id: String = (0..ID_LENGTH).map(|_| char::from(ID_CHARS[random.random_range(0..ID_CHARS.len())])).collect();
        let secret: [u8; SECRET_BYTES] = random.random();
        (id, hex(&secret))
    };
    let expires = Timestamp::now() + std::time::Duration::from_secs(ttl_seconds);
    let object: Secret = serde_json::from_value(json!({
        "metadata": {"name": secret_name(&id), "namespace": SYSTEM_NAMESPACE},
        "type": SECRET_TYPE,
        "stringData": {"node": node, "secretHash": hash(&secret), "expires": expires.to_string(), "gateway": gateway.to_string()},
    }))?;
    let secrets: Api<Secret> = Api::namespaced(client.clone(), SYSTEM_NAMESPACE);
    secrets.create(&PostParams::default(), &object).await.context("the token can't be stored in the cluster")?;
    Ok(format!("{id}.{secret}.{fingerprint}"))
}

/// A token that was found good, and is still to be used up.
#[derive(Debug)]
pub(crate) struct GoodToken {
    /// Whether the node may run a gateway.
    pub(crate) gateway: bool,
    name: String,
    uid: Option<String>,
    resource_version: Option<String>,
}

/// Checks a token for a node.
///
/// # Errors
/// What is wrong with it.
pub(crate) async fn check(client: &Client, token: &str, node: &str) -> Result<GoodToken, TokenError> {
    let mut parts = token.split('.');
    let (Some(id), Some(secret), Some(_), None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
        return Err(TokenError::Malformed);
    };
    if id.len() != ID_LENGTH || !id.bytes().all(|b| ID_CHARS.contains(&b)) || secret.len() > 256 {
        return Err(TokenError::Malformed);
    }
    let secrets: Api<Secret> = Api::namespaced(client.clone(), SYSTEM_NAMESPACE);
    let found = secrets.get_opt(&secret_name(id)).await?.filter(|found| found.type_.as_deref() == Some(SECRET_TYPE));
    let Some(found) = found else { return Err(TokenError::Unknown(id.to_owned())) };
    let text = |name: &str| {
        let value = found.data.as_ref().and_then(|data| data.get(name));
        value.and_then(|value| String::from_utf8(value.0.clone()).ok()).unwrap_or_default()
    };
    // Hashes are compared, so the time that it takes tells nothing about the secret.
    if hash(secret) != text("secretHash") {
        return Err(TokenError::Wrong);
    }
    let expires = text("expires");
    if expires.parse::<Timestamp>().is_ok_and(|at| at <= Timestamp::now()) || expires.is_empty() {
        return Err(TokenError::Expired(expires));
    }
    let for_node = text("node");
    if for_node != node {
        return Err(TokenError::OtherNode { for_node, asked: node.chars().take(253).collect() });
    }
    Ok(GoodToken {
        gateway: text("gateway") == "true",
        name: secret_name(id),
        uid: found.metadata.uid.clone(),
        resource_version: found.metadata.resource_version.clone(),
    })
}

/// Uses a token up. Of several that try, one succeeds: the delete names the very object that was checked.
///
/// # Errors
/// When another request was faster, or the API does not answer.
pub(crate) async fn use_up(client: &Client, token: GoodToken) -> Result<(), TokenError> {
    let secrets: Api<Secret> = Api::namespaced(client.clone(), SYSTEM_NAMESPACE);
    let preconditions = Preconditions { uid: token.uid, resource_version: token.resource_version };
    match secrets.delete(&token.name, &DeleteParams::default().preconditions(preconditions)).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Err(TokenError::Raced),
        Err(error) => Err(error.into()),
    }
}

fn secret_name(id: &str) -> String {
    format!("edgemesh-join-{id}")
}

fn hash(secret: &str) -> String {
    hex(&Sha256::digest(secret.as_bytes()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// A duration such as `90s`, `15m`, `1h`, `2d`, in seconds.
///
/// # Errors
/// When it is none.
pub fn parse_ttl(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no duration such as 90s, 15m, 1h or 2d");
    let unit = text.chars().last().ok_or_else(wrong)?;
    let factor = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3_600,
        'd' => 86_400,
        _ => return Err(wrong()),
    };
    let number: u64 = text[..text.len() - unit.len_utf8()].parse().map_err(|_| wrong())?;
    number.checked_mul(factor).filter(|seconds| *seconds > 0).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lifetimes_have_a_unit() {
        assert_eq!(parse_ttl("90s"), Ok(90));
        assert_eq!(parse_ttl("1h"), Ok(3_600));
        for wrong in ["", "1", "h", "-1h", "1y", "99999999999999999999d", "0s"] {
            assert!(parse_ttl(wrong).is_err(), "{wrong}");
        }
    }
}
