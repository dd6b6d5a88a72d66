//! Settings of edgecore.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
};

use edgemesh_api::names;
use edgemesh_telemetry::{AdminConfig, LogConfig, Problems, Validate};
use serde::{Deserialize, Serialize};

use crate::network::cni::parse_range;

/// Where distributions put the CNI plugins.
const CNI_BIN_DIRS: [&str; 2] = ["/opt/cni/bin", "/usr/lib/cni"];

/// All settings. Where a setting is left out, its default holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Config {
    /// Folder of what edgecore keeps: `store.db`, `pki/`, `join.json`, `node.kubeconfig`.
    pub data_dir: PathBuf,
    /// Name of the Node; the one that it joined with if left out.
    pub node_name: Option<String>,
    /// Address of the node in its network; the one that leads to the hub if left out.
    pub node_ip: Option<IpAddr>,
    /// Its IPv6 address there, in a dual-stack cluster.
    pub node_ip6: Option<Ipv6Addr>,
    /// Name of the node's network: nodes of one network reach each other's pods directly.
    pub network: Option<String>,
    /// Whether the node is at the edge or beside the hub.
    pub role: Role,
    /// Further labels of the Node.
    pub labels: BTreeMap<String, String>,
    /// Cgroup below which pods run, in the runtime's hierarchy.
    pub cgroup_root: String,
    /// Socket of the container runtime (CRI v1). Empty: the node runs no pods.
    pub cri_socket: PathBuf,
    /// Where the runtime looks for CNI configuration; one is written when there is none.
    pub cni_conf_dir: PathBuf,
    /// Where the CNI plugins are.
    pub cni_bin_dir: PathBuf,
    /// Folder of the pods' volumes and logs; `pods` in `dataDir` if left out.
    pub pods_dir: Option<PathBuf>,
    /// Cluster DNS addresses for pods.
    pub cluster_dns: Vec<IpAddr>,
    /// Zone of the cluster's names.
    pub cluster_domain: String,
    /// Ranges to which pods keep their own address: the pod ranges of all nodes.
    pub cluster_ranges: Vec<String>,
    /// The node's resolver settings, for pods that want the node's DNS.
    pub resolv_conf: PathBuf,
    /// The Kubernetes API on this node.
    pub metaserver: ListenConfig,
    /// `/metrics`, `/readyz`, `/livez` and debug pages.
    pub admin: AdminConfig,
    /// Logging.
    pub log: LogConfig,
    /// How long work in flight may take when edgecore stops, in seconds.
    pub drain_seconds: u64,
}

/// Where a node is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Behind a link that breaks: when the node falls silent, its pods are taken to run on.
    #[default]
    Edge,
    /// Beside the hub: when the node falls silent, its pods are taken to be down.
    Cloud,
}

/// The metaserver.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct ListenConfig {
    /// Where it listens. It asks for no credentials, so it must be loopback.
    pub listen: SocketAddr,
}

impl Default for Config {
    fn default() -> Self {
        let cni_bin_dir = CNI_BIN_DIRS.into_iter().find(|dir| std::path::Path::new(dir).is_dir());
        Self {
            data_dir: PathBuf::from("/var/lib/edgemesh/edgecore"),
            node_name: None,
            node_ip: None,
            node_ip6: None,
            network: None,
            role: Role::Edge,
            labels: BTreeMap::new(),
            cgroup_root: "/kubepods".to_owned(),
            cri_socket: PathBuf::from("/run/containerd/containerd.sock"),
            cni_conf_dir: PathBuf::from("/etc/cni/net.d"),
            cni_bin_dir: PathBuf::from(cni_bin_dir.unwrap_or(CNI_BIN_DIRS[0])),
            pods_dir: None,
            cluster_dns: vec![IpAddr::from(Ipv4Addr::new(10, 96, 0, 10))],
            cluster_domain: names::DEFAULT_CLUSTER_DOMAIN.to_owned(),
            cluster_ranges: [names::DEFAULT_POD_CIDR, names::DEFAULT_POD_CIDR6].map(str::to_owned).into(),
            resolv_conf: PathBuf::from("/etc/resolv.conf"),
            metaserver: ListenConfig::default(),
            admin: AdminConfig::on(names::EDGECORE_ADMIN_PORT),
            log: LogConfig::default(),
            drain_seconds: 5,
        }
    }
}

impl Default for ListenConfig {
    fn default() -> Self {
        Self { listen: SocketAddr::from((Ipv4Addr::LOCALHOST, names::METASERVER_PORT)) }
    }
}

impl Config {
    /// The folder of the pods.
    pub fn pods_dir(&self) -> PathBuf {
        self.pods_dir.clone().unwrap_or_else(|| self.data_dir.join("pods"))
    }
}

impl Validate for Config {
    fn validate(&self, problems: &mut Problems) {
        if !self.data_dir.is_absolute() {
            problems.add("dataDir", "must be an absolute path");
        }
        if !self.metaserver.listen.ip().is_loopback() {
            problems.add("metaserver.listen", "must be a loopback address: it asks for no credentials");
        }
        if self.node_ip6.is_some() && self.node_ip.is_some_and(|address| address.is_ipv6()) {
            problems.add("nodeIp6", "can't be set together with a nodeIp that is an IPv6 address");
        }
        for range in &self.cluster_ranges {
            if let Err(error) = parse_range(range) {
                problems.add("clusterRanges", error);
            }
        }
        if !self.cgroup_root.starts_with('/') {
            problems.add("cgroupRoot", "must begin with /");
        }
        if self.labels.contains_key(names::GATEWAY_NODE_LABEL) {
            let label = names::GATEWAY_NODE_LABEL;
            problems.add(
                "labels",
                format!("{label} is not the node's to set: join with a token of `hub token create --gateway`"),
            );
        }
        for (name, value) in &self.labels {
            if !is_label_name(name) || !is_label_value(value) {
                problems.add("labels", format!("{name}: {value:?} is no valid label"));
            }
        }
        if let Some(network) = &self.network
            && (network.is_empty() || !is_label_value(network))
        {
            problems.add("network", format!("{network:?} can't be the value of a label"));
        }
    }
}

/// Kubernetes, "Labels and Selectors".
fn is_label_value(value: &str) -> bool {
    let inner = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    let ends = |b: Option<&u8>| b.is_none_or(u8::is_ascii_alphanumeric);
    value.len() <= 63 && value.bytes().all(inner) && ends(value.as_bytes().first()) && ends(value.as_bytes().last())
}

fn is_label_name(name: &str) -> bool {
    let (prefix, name) = name.split_once('/').unwrap_or(("x", name));
    let prefix_ok = prefix.len() <= 253
        && !prefix.is_empty()
        && prefix.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.'));
    prefix_ok && !name.is_empty() && is_label_value(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_metaserver_that_others_could_reach_is_refused() {
        let config =
            Config { metaserver: ListenConfig { listen: "0.0.0.0:10550".parse().unwrap() }, ..Config::default() };
        let mut problems = Problems::default();
        config.validate(&mut problems);
        assert!(problems.list()[0].contains("metaserver.listen"), "{:?}", problems.list());
    }

    #[test]
    fn labels_are_checked_before_the_api_refuses_the_node() {
        let labels = [(names::GATEWAY_NODE_LABEL.to_owned(), "true".to_owned())].into();
        let mut problems = Problems::default();
        Config { labels, ..Config::default() }.validate(&mut problems);
        assert!(problems.list()[0].contains("hub token create --gateway"), "{:?}", problems.list());
        assert!(is_label_name("edgemesh.dev/gateway") && is_label_name("zone"));
        assert!(!is_label_name("UPPER/x") && !is_label_name("a/b/c") && !is_label_name("x/"));
        assert!(is_label_value("") && is_label_value("site-a") && !is_label_value("-a"));
    }
}
