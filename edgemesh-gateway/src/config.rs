//! The gateway's settings.

use std::{
    net::{IpAddr, Ipv4Addr},
    path::PathBuf,
};

use edgemesh_api::names;
use edgemesh_telemetry::{AdminConfig, LogConfig, Problems, Validate};
use serde::{Deserialize, Serialize};

/// All settings. Where a setting is left out, its default holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Config {
    /// Folder of what the gateway keeps across restarts: `identity.key`, `catalog.json`, `gateway.json` (with TLS keys).
    pub data_dir: PathBuf,
    /// Name of the Node on which the gateway runs; the host name if left out.
    pub node_name: String,
    /// Kubeconfig of the Kubernetes API. With neither this nor `apiServer`, the metaserver on this node is used.
    pub kubeconfig: Option<PathBuf>,
    /// URL of a Kubernetes API that needs no credentials, such as the metaserver.
    pub api_server: Option<String>,
    /// Address on which the listeners of Gateways are opened.
    pub listen: IpAddr,
    /// Most client connections at a time; further ones wait.
    pub max_connections: usize,
    /// How long a request may wait for the head of the answer, in seconds.
    pub response_timeout_seconds: u64,
    /// `/metrics`, `/readyz`, `/livez` and debug pages.
    pub admin: AdminConfig,
    /// The overlay to nodes of other networks.
    pub tunnel: TunnelConfig,
    /// Logging.
    pub log: LogConfig,
    /// How long requests in flight may take when the gateway stops, in seconds.
    pub drain_seconds: u64,
}

/// The overlay to nodes of other networks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct TunnelConfig {
    /// Port of the tunnel, UDP (QUIC) and TCP, on all addresses; 0 takes any.
    pub port: u16,
    /// Further multiaddrs under which this node is reached, for example of a public address in front of it.
    pub advertise: Vec<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            data_dir: PathBuf::from("/var/lib/edgemesh/gateway"),
            node_name: std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned(),
            kubeconfig: None,
            api_server: None,
            listen: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            max_connections: 8192,
            response_timeout_seconds: 60,
            admin: AdminConfig::on(names::GATEWAY_ADMIN_PORT),
            tunnel: TunnelConfig::default(),
            log: LogConfig::default(),
            drain_seconds: 10,
        }
    }
}

impl Default for TunnelConfig {
    fn default() -> Self {
        Self { port: names::GATEWAY_TUNNEL_PORT, advertise: Vec::new() }
    }
}

impl Config {
    /// The API to watch when neither `kubeconfig` nor `apiServer` is set: this node's metaserver.
    pub fn api_url(&self) -> String {
        self.api_server.clone().unwrap_or_else(|| format!("http://127.0.0.1:{}", names::METASERVER_PORT))
    }
}

impl Validate for Config {
    fn validate(&self, problems: &mut Problems) {
        if !self.data_dir.is_absolute() {
            problems.add("dataDir", "must be an absolute path");
        }
        if self.node_name.is_empty() {
            problems.add("nodeName", "must be the name of this Node");
        }
        if self.kubeconfig.is_some() && self.api_server.is_some() {
            problems.add("apiServer", "can't be used together with kubeconfig; remove one");
        }
        if self.max_connections == 0 {
            problems.add("maxConnections", "must be at least 1");
        }
        if self.response_timeout_seconds == 0 {
            problems.add("responseTimeoutSeconds", "must be at least 1");
        }
        for address in &self.tunnel.advertise {
            if let Err(error) = address.parse::<edgemesh_tunnel::Multiaddr>() {
                problems.add(
                    "tunnel.advertise",
                    format!("{address:?} is no multiaddr ({error}); like /dns4/gw.example/udp/4002/quic-v1"),
                );
            }
        }
    }
}
