//! `POST /v1/join`: a node shows its token and a certificate signing request, and gets its certificate.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use edgemesh_api::names::{GATEWAY_NODE_LABEL, NODE_USER_PREFIX, NODES_GROUP};
use edgemesh_apiserver::pki::CertificateAuthority;
use http::StatusCode;
use k8s_openapi::api::core::v1::Node;
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{
    identity::is_node_name,
    metrics::{Metrics, Outcome},
    tokens::{self, TokenError},
};

/// Largest request to join, in bytes.
pub(crate) const MAX_JOIN_BYTES: usize = 64 << 10;
/// How long a node's certificate is valid. It is long because nothing renews it yet.
const CERTIFICATE_TTL: Duration = Duration::from_secs(365 * 86_400);

/// What a node sends to join.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct JoinRequest {
    token: String,
    node: String,
    csr_pem: String,
}

/// What a node gets when it has joined.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct JoinResponse {
    certificate: String,
    ca: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    api_server: Option<String>,
}

/// What answers requests to join.
pub(crate) struct Joining {
    pub(crate) client: Client,
    pub(crate) authority: Arc<CertificateAuthority>,
    /// Where the cluster's API takes the certificates of this authority, if it does.
    pub(crate) api_server: Option<String>,
    pub(crate) metrics: Metrics,
}

/// An answer: status code, reason, and the body or the message.
pub(crate) type Answer = Result<Bytes, (StatusCode, &'static str, String)>;

impl Joining {
    /// Answers a request.
    pub(crate) async fn answer(&self, body: &[u8]) -> Answer {
        let result = self.try_answer(body).await;
        let label = match &result {
            Ok(_) => "joined",
            Err((label, ..)) => label,
        };
        self.metrics.joins.get_or_create(&Outcome { result: label }).inc();
        result.map_err(|(label, code, reason, message)| {
            tracing::warn!(result = label, message, "a request to join was refused");
            (code, reason, message)
        })
    }

    async fn try_answer(&self, body: &[u8]) -> Result<Bytes, (&'static str, StatusCode, &'static str, String)> {
        let request: JoinRequest = serde_json::from_slice(body).map_err(|error| {
            ("malformed", StatusCode::BAD_REQUEST, "BadRequest", format!("the request to join: {error}"))
        })?;
        if !is_node_name(&request.node) {
            let message = "the name can't be the name of a node".to_owned();
            return Err(("malformed", StatusCode::BAD_REQUEST, "BadRequest", message));
        }
        let refused = |error: TokenError| {
            let (code, reason) = match &error {
                TokenError::Api(_) => (StatusCode::SERVICE_UNAVAILABLE, "ServiceUnavailable"),
                _ => (StatusCode::UNAUTHORIZED, "Unauthorized"),
            };
            (error.label(), code, reason, error.to_string())
        };
        let token = tokens::check(&self.client, &request.token, &request.node).await.map_err(refused)?;
        // Signed before the token is used up: a request that can't be signed must not cost the token. The subject is
        // ours; of the request only the key counts.
        let common_name = format!("{NODE_USER_PREFIX}{}", request.node);
        let certificate = self
            .authority
            .sign_csr(&request.csr_pem, &common_name, &[NODES_GROUP], CERTIFICATE_TTL)
            .map_err(|error| ("malformed", StatusCode::BAD_REQUEST, "BadRequest", error.to_string()))?;
        if token.gateway {
            // Before the token is used up: whoever was given a gateway's token is to have a gateway, or a token.
            mark_gateway(&self.client, &request.node).await.map_err(|error| refused(error.into()))?;
        }
        tokens::use_up(&self.client, token).await.map_err(refused)?;
        tracing::info!(node = request.node, "a node joined");
        let response = JoinResponse {
            certificate,
            ca: self.authority.certificate_pem().to_owned(),
            api_server: self.api_server.clone(),
        };
        serde_json::to_vec(&response)
            .map(Bytes::from)
            .map_err(|error| ("internal", StatusCode::INTERNAL_SERVER_ERROR, "InternalError", error.to_string()))
    }
}

/// Labels a Node, which may not exist yet, as one that runs a gateway. A node can't do so itself.
async fn mark_gateway(client: &Client, node: &str) -> Result<(), kube::Error> {
    let nodes: Api<Node> = Api::all(client.clone());
    let label = json!({"metadata": {"labels": {GATEWAY_NODE_LABEL: "true"}}});
    match nodes.patch_metadata(node, &PatchParams::default(), &Patch::Merge(&label)).await {
        Err(kube::Error::Api(status)) if status.code == 404 => {
            let mut fresh = Node::default();
            fresh.metadata.name = Some(node.to_owned());
            fresh.metadata.labels = Some([(GATEWAY_NODE_LABEL.to_owned(), "true".to_owned())].into());
            nodes.create(&PostParams::default(), &fresh).await.map(drop)
        }
        result => result.map(drop),
    }
}
