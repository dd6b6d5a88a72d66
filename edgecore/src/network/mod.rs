//! The network of the node's pods: CNI configuration where there is none, forwarding and masquerading.

pub mod addresses;
pub mod cni;
pub mod link_address;
pub mod masquerade;

use std::{path::PathBuf, time::Duration};

use edgemesh_api::ResourceName;
use edgemesh_apiserver::{ApiError, EventKind, WatchOptions, store::Store};
use edgemesh_telemetry::drain::Shutdown;
use futures::StreamExt;
use serde_json::Value;

use self::cni::CniConfig;

/// How long is waited before something that failed is tried again.
const RETRY: Duration = Duration::from_secs(5);
/// Rules and files are checked again so often: others may have removed them.
const CHECK_INTERVAL: Duration = Duration::from_secs(60);

/// Why the node's pod network can't be set up.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// A pod range is no IPv4 range.
    #[error("the pod range {0:?} is not an IPv4 range like 10.244.1.0/24")]
    Range(String),
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    File {
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// `nft` failed.
    #[error("nft: {0}")]
    Nft(String),
}

/// Where the pod network is set up, and how.
#[derive(Debug, Clone)]
pub struct NetworkConfig {
    /// This node; its `spec.podCIDR` is the range of its pods.
    pub node_name: String,
    /// Where the runtime looks for CNI configuration.
    pub cni_conf_dir: PathBuf,
    /// Where the CNI plugins are.
    pub cni_bin_dir: PathBuf,
    /// Where the addresses that are in use are kept.
    pub ipam_dir: PathBuf,
    /// Ranges inside of the cluster: traffic to them keeps the pod's address.
    pub cluster_ranges: Vec<String>,
    /// The largest packet on the pods' links; `None` is the plugin's default.
    pub mtu: Option<u32>,
}

/// Starts the task that follows this node's `spec.podCIDR` and keeps its network set up.
pub fn start(config: NetworkConfig, store: Store, shutdown: &Shutdown) {
    let stopping = shutdown.stopping().clone();
    shutdown.spawn(async move {
        tokio::select! {
            () = follow(config, store) => {}
            () = stopping.cancelled() => {}
        }
    });
}

async fn follow(config: NetworkConfig, store: Store) {
    loop {
        let error = match watch(&config, &store).await {
            Ok(()) => continue,
            Err(error) => error,
        };
        tracing::debug!(%error, "the watch of the own Node starts again");
        tokio::time::sleep(RETRY).await;
    }
}

/// Follows the own Node until the watch ends.
async fn watch(config: &NetworkConfig, store: &Store) -> Result<(), ApiError> {
    let options =
        WatchOptions { field_selector: Some(format!("metadata.name={}", config.node_name)), ..WatchOptions::default() };
    let mut events = store.watch(&ResourceName::new("", "v1", "nodes"), &options)?;
    let mut range: Option<String> = None;
    let mut wait = CHECK_INTERVAL;
    loop {
        tokio::select! {
            event = events.next() => match event {
                Some(event) => {
                    let event = event?;
                    let found = event.object.pointer("/spec/podCIDR").and_then(Value::as_str).filter(|r| !r.is_empty());
                    // A Node that is deleted for a moment doesn't take the network from its running pods.
                    if event.kind == EventKind::Deleted || found.is_none() || found == range.as_deref() {
                        continue;
                    }
                    range = found.map(str::to_owned);
                }
                None => return Ok(()),
            },
            () = tokio::time::sleep(wait) => {}
        }
        let Some(range) = &range else { continue };
        wait = match apply(config, range).await {
            Ok(()) => CHECK_INTERVAL,
            Err(error) => {
                tracing::warn!(%error, range, "the pod network could not be set up");
                RETRY
            }
        };
    }
}

/// Sets everything up for a pod range; what is right already stays.
///
/// # Errors
/// When a file can't be written or `nft` fails.
pub async fn apply(config: &NetworkConfig, pod_range: &str) -> Result<(), NetworkError> {
    let range = cni::parse_range(pod_range)?;
    let cni = CniConfig {
        range,
        ipam_dir: config.ipam_dir.clone(),
        with_portmap: config.cni_bin_dir.join("portmap").exists(),
        mtu: config.mtu,
    };
    if cni::write_if_none(&config.cni_conf_dir, &cni)? {
        tracing::info!(range = pod_range, folder = %config.cni_conf_dir.display(), "wrote the CNI configuration");
    }
    enable_forwarding()?;
    masquerade::apply(pod_range, &config.cluster_ranges).await
}

/// Pods' packets are forwarded by the node. The setting belongs to this network namespace.
fn enable_forwarding() -> Result<(), NetworkError> {
    let path = PathBuf::from("/proc/sys/net/ipv4/ip_forward");
    let file = |source| NetworkError::File { path: path.clone(), source };
    if std::fs::read_to_string(&path).map_err(file)?.trim() != "1" {
        std::fs::write(&path, "1\n").map_err(file)?;
    }
    Ok(())
}
