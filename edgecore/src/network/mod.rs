//! The network of the node's pods: CNI configuration where there is none, forwarding and masquerading.

pub mod addresses;
pub mod bridge;
pub mod cni;
pub mod link_address;
pub mod masquerade;

use std::{net::IpAddr, path::PathBuf, time::Duration};

use edgemesh_api::{ResourceName, cidr::Cidr};
use edgemesh_apiserver::{ApiError, EventKind, WatchOptions, store::Store};
use edgemesh_telemetry::drain::Shutdown;
use futures::StreamExt;
use serde_json::Value;
use tokio::sync::watch;

use self::cni::{CniConfig, Found};

/// How long is waited before something that failed is tried again.
const RETRY: Duration = Duration::from_secs(5);
/// Rules and files are checked again so often: others may have removed them.
const CHECK_INTERVAL: Duration = Duration::from_secs(60);

/// Why the node's pod network can't be set up.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// A pod range is none.
    #[error("the pod range {0:?} is not a range like 10.244.1.0/24 or fd00:10:244:1::/64")]
    Range(String),
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    File {
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The bridge's addresses can't be seen or changed.
    #[error("the bridge {bridge}: {0}", bridge = cni::BRIDGE)]
    Bridge(String),
    /// `nft` failed.
    #[error("nft: {0}")]
    Nft(String),
}

/// Where the pod network is set up, and how.
#[derive(Debug, Clone)]
pub struct NetworkConfig {
    /// This node; its `spec.podCIDRs` are the ranges of its pods.
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

/// Starts the task that follows this node's `spec.podCIDRs` and keeps its network set up. Tells from which ranges new pods get
/// their addresses: none before that is known, and while the configuration is somebody else's.
pub fn start(config: NetworkConfig, store: Store, shutdown: &Shutdown) -> watch::Receiver<Vec<Cidr>> {
    let (in_force, receiver) = watch::channel(Vec::new());
    let stopping = shutdown.stopping().clone();
    shutdown.spawn(async move {
        tokio::select! {
            () = follow(config, store, in_force) => {}
            () = stopping.cancelled() => {}
        }
    });
    receiver
}

async fn follow(config: NetworkConfig, store: Store, in_force: watch::Sender<Vec<Cidr>>) {
    loop {
        let error = match watch(&config, &store, &in_force).await {
            Ok(()) => continue,
            Err(error) => error,
        };
        tracing::debug!(%error, "the watch of the own Node starts again");
        tokio::time::sleep(RETRY).await;
    }
}

/// Follows the own Node until the watch ends.
async fn watch(config: &NetworkConfig, store: &Store, in_force: &watch::Sender<Vec<Cidr>>) -> Result<(), ApiError> {
    let options =
        WatchOptions { field_selector: Some(format!("metadata.name={}", config.node_name)), ..WatchOptions::default() };
    let mut events = store.watch(&ResourceName::new("", "v1", "nodes"), &options)?;
    let (mut of_node, mut said) = (Vec::new(), Vec::new());
    let mut wait = CHECK_INTERVAL;
    loop {
        tokio::select! {
            event = events.next() => match event {
                Some(event) => {
                    let event = event?;
                    let found = ranges_of(&event.object);
                    // A Node that is deleted for a moment doesn't take the network from its running pods.
                    if event.kind == EventKind::Deleted || found.is_empty() || found == of_node {
                        continue;
                    }
                    of_node = found;
                }
                None => return Ok(()),
            },
            () = tokio::time::sleep(wait) => {}
        }
        // Looked at each time: IPv6 may be switched on or off while the node runs.
        let (ranges, problems) = usable(&of_node, has_ipv6());
        if problems != said {
            problems.iter().for_each(|problem| tracing::warn!("{problem}"));
            said = problems;
        }
        if ranges.is_empty() {
            continue;
        }
        wait = match apply(config, &ranges, in_force).await {
            Ok(()) => CHECK_INTERVAL,
            Err(error) => {
                tracing::warn!(%error, ranges = listed(&ranges), "the pod network could not be set up");
                RETRY
            }
        };
    }
}

/// The pod ranges of a Node, each once as it has them.
fn ranges_of(node: &Value) -> Vec<String> {
    let several = node.pointer("/spec/podCIDRs").and_then(Value::as_array).into_iter().flatten();
    let mut ranges: Vec<String> = Vec::new();
    for text in several.chain(node.pointer("/spec/podCIDR")).filter_map(Value::as_str) {
        if !text.is_empty() && ranges.iter().all(|known| known != text) {
            ranges.push(text.to_owned());
        }
    }
    ranges
}

/// Those that pods can be given here, IPv4 first: at most one of each family. Beside them what is wrong with the others.
fn usable(of_node: &[String], has_ipv6: bool) -> (Vec<Cidr>, Vec<String>) {
    let (mut ranges, mut problems): (Vec<Cidr>, _) = (Vec::new(), Vec::new());
    for text in of_node {
        match cni::parse_node_range(text) {
            Ok(range) if ranges.iter().any(|known| known.network().is_ipv4() == range.network().is_ipv4()) => {}
            Ok(range) if range.network().is_ipv6() && !has_ipv6 => {
                problems.push(format!(
                    "IPv6 is off on this node, which has the pod range {range}: its pods get IPv4 addresses only"
                ));
            }
            Ok(range) => ranges.push(range),
            Err(error) => problems.push(format!("a pod range of this Node is passed over: {error}")),
        }
    }
    ranges.sort_by_key(|range| range.network().is_ipv6());
    (ranges, problems)
}

fn listed(ranges: &[Cidr]) -> String {
    ranges.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn has_ipv6() -> bool {
    std::fs::read_to_string("/proc/sys/net/ipv6/conf/all/disable_ipv6").is_ok_and(|value| value.trim() == "0")
}

/// Whether an address is outside of the range of its family. Where there is no such range it could be anywhere.
fn is_outside(address: IpAddr, ranges: &[Cidr]) -> bool {
    let of_family = |range: &&Cidr| range.network().is_ipv4() == address.is_ipv4();
    ranges.iter().any(|range| of_family(&range)) && !ranges.iter().any(|range| range.contains(address))
}

/// Sets everything up for pod ranges; what is right already stays. `in_force` gets the ranges as soon as new pods get addresses
/// from them.
async fn apply(
    config: &NetworkConfig,
    pod_ranges: &[Cidr],
    in_force: &watch::Sender<Vec<Cidr>>,
) -> Result<(), NetworkError> {
    let cni = CniConfig {
        ranges: pod_ranges.to_vec(),
        ipam_dir: config.ipam_dir.clone(),
        with_portmap: config.cni_bin_dir.join("portmap").exists(),
        mtu: config.mtu,
    };
    // Before the network plugin does it, which knows nothing of router advertisements.
    for range in pod_ranges {
        if range.network().is_ipv4() { forward("/proc/sys/net/ipv4/ip_forward")? } else { forward6()? }
    }
    let found = cni::write_if_none(&config.cni_conf_dir, &cni)?;
    if found == Found::Written {
        let folder = config.cni_conf_dir.display();
        tracing::info!(ranges = listed(pod_ranges), %folder, "wrote the CNI configuration");
    }
    let own_ranges = if found == Found::Foreign { Vec::new() } else { cni.ranges };
    in_force.send_if_modified(|known| {
        let changed = *known != own_ranges;
        known.clone_from(&own_ranges);
        changed
    });
    let bridge = bridge::leave_former_ranges(&own_ranges).await;
    masquerade::apply(pod_ranges, &config.cluster_ranges).await.and(bridge)
}

/// Pods' packets are forwarded by the node. The setting belongs to this network namespace.
fn forward(path: &str) -> Result<(), NetworkError> {
    if read_setting(path)? != "1" {
        write_setting(path, "1")?;
    }
    Ok(())
}

/// The same for IPv6. A host that forwards takes no more router advertisements, from which it may have its own address: where it
/// takes them now, it is told to go on (`accept_ra` 2, the kernel's ip-sysctl.rst).
fn forward6() -> Result<(), NetworkError> {
    const SETTINGS: &str = "/proc/sys/net/ipv6/conf";
    let all = format!("{SETTINGS}/all/forwarding");
    if read_setting(&all)? == "1" {
        return Ok(());
    }
    let error = |source| NetworkError::File { path: SETTINGS.into(), source };
    for interface in std::fs::read_dir(SETTINGS).map_err(error)? {
        let accepts = interface.map_err(error)?.path().join("accept_ra").display().to_string();
        // An interface may have gone meanwhile.
        if read_setting(&accepts).is_ok_and(|value| value == "1") {
            write_setting(&accepts, "2")?;
        }
    }
    forward(&all)
}

fn read_setting(path: &str) -> Result<String, NetworkError> {
    let text = std::fs::read_to_string(path).map_err(|source| NetworkError::File { path: path.into(), source })?;
    Ok(text.trim().to_owned())
}

fn write_setting(path: &str, value: &str) -> Result<(), NetworkError> {
    std::fs::write(path, format!("{value}\n")).map_err(|source| NetworkError::File { path: path.into(), source })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_node_has_one_range_of_each_family_and_ipv4_comes_first() {
        let usable = |spec: Value, has_ipv6| {
            let (ranges, problems) = usable(&ranges_of(&json!({"spec": spec})), has_ipv6);
            (listed(&ranges), problems.len())
        };
        assert_eq!(usable(json!({"podCIDR": "10.244.1.0/24"}), true), ("10.244.1.0/24".to_owned(), 0));
        // The API takes it, as Kubernetes does.
        assert_eq!(usable(json!({"podCIDR": "10.244.1.7/24"}), true), ("10.244.1.0/24".to_owned(), 0));
        let both =
            json!({"podCIDR": "fd00:1::/64", "podCIDRs": ["fd00:1::/64", "10.244.1.0/24", "10.244.2.0/24", "x"]});
        assert_eq!(usable(both.clone(), true), ("10.244.1.0/24, fd00:1::/64".to_owned(), 1));
        assert_eq!(usable(both, false), ("10.244.1.0/24".to_owned(), 2));
        assert_eq!(usable(json!({"podCIDR": ""}), true), (String::new(), 0));
    }
}
