//! `MeshNode`: how the other nodes reach a node's tunnel. Only that node's identity may write it.

use std::collections::BTreeMap;

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The tunnel endpoints of the node of the same name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, CustomResource)]
#[kube(
    group = "edgemesh.dev",
    version = "v1alpha1",
    kind = "MeshNode",
    plural = "meshnodes",
    singular = "meshnode",
    shortname = "mn",
    derive = "Default",
    derive = "PartialEq"
)]
#[serde(rename_all = "camelCase")]
pub struct MeshNodeSpec {
    /// The node's tunnel endpoints by component: `agent` and, on a gateway node, `gateway`. Each component writes its own entry.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub peers: BTreeMap<String, MeshPeer>,
}

/// One libp2p host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MeshPeer {
    /// libp2p PeerId, in base58.
    pub peer_id: String,
    /// Multiaddrs at which it listens or is known from outside, without the `/p2p/` suffix.
    #[serde(default)]
    pub addresses: Vec<String>,
    /// Whether it relays for others.
    #[serde(default)]
    pub relay: bool,
}
