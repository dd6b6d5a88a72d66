//! Settings of the agent.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
};

use edgemesh_api::names;
use edgemesh_mesh::{Catalog, Viewpoint, from_kubernetes::ServiceSelection};
use edgemesh_telemetry::{AdminConfig, LogConfig, Problems, Validate};
use serde::{Deserialize, Serialize};

use crate::{
    datapath::map_sizes::MapSizes,
    dns::UpstreamAddress,
    node_local::{Ipv4Range, Ipv6Range},
};

/// Servers of one list in the DNS settings: the last of more would never be asked in time.
const MAX_UPSTREAMS: usize = 8;
/// Domains with servers of their own.
const MAX_ZONES: usize = 64;

/// All settings. Where a setting is left out, its default holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Config {
    /// Folder of what the agent keeps across restarts: `identity.key`, `catalog.json`, `node-local.json`.
    pub data_dir: PathBuf,
    /// Name of the Node on which the agent runs; the host name if left out.
    pub node_name: String,
    /// Kubeconfig of the Kubernetes API. With neither this nor `apiServer`, the metaserver on this node is used.
    pub kubeconfig: Option<PathBuf>,
    /// URL of a Kubernetes API that needs no credentials, such as the metaserver.
    pub api_server: Option<String>,
    /// Network of this node, in place of the label `edgemesh.dev/network` of its Node.
    pub network: Option<String>,
    /// Which Services the mesh carries: `all` that no label leaves to others, or those only that are `labelled`.
    pub services: ServiceSelection,
    /// How Service addresses are translated.
    pub datapath: DatapathMode,
    /// Cgroup below which sockets are served, relative to the cgroup2 mount. `/` serves the whole host.
    pub cgroup: PathBuf,
    /// Folder of the BPF filesystem in which the programs and their maps outlive the agent; it is mounted there if none is.
    pub bpffs: PathBuf,
    /// Slots for backends in the maps of the eBPF programs, a power of two; 0 for as many as suit the machine's memory.
    pub backend_slots: u32,
    /// Whether the programs are removed when the agent stops. They serve on if not: see `edgemesh-agent uninstall`.
    pub detach_on_stop: bool,
    /// Addresses that exist on this node for itself: the first is the DNS listener's, the others belong to Service ports that the agent proxies.
    pub node_local_cidr: Ipv4Range,
    /// As `nodeLocalCidr`, for Service ports that are called by an IPv6 address.
    pub node_local_cidr6: Ipv6Range,
    /// Whether the agent keeps routes to the pod ranges of the other nodes of its network.
    pub routes: bool,
    /// Whether pods of other networks are reached by their own addresses, through the tunnel.
    pub capture_pods: bool,
    /// `/metrics`, `/readyz`, `/livez` and debug pages.
    pub admin: AdminConfig,
    /// Cluster DNS.
    pub dns: DnsConfig,
    /// The overlay to nodes of other networks.
    pub tunnel: TunnelConfig,
    /// Service ports that go through the agent.
    pub proxied: ProxiedConfig,
    /// How often endpoints of this network are looked at while the cloud is away, in seconds. 0 leaves them as they were.
    pub island_check_seconds: u64,
    /// The longest pause between two calls of an endpoint of this network that takes no connections, in seconds, after which
    /// it is used again if it answers. 0 looks for no such endpoints.
    pub silent_check_seconds: u64,
    /// Logging.
    pub log: LogConfig,
    /// How long work in flight may take when the agent stops, in seconds.
    pub drain_seconds: u64,
}

/// How Service addresses are translated.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DatapathMode {
    /// eBPF where its programs can be loaded, else nftables.
    #[default]
    Auto,
    /// eBPF programs at the cgroup.
    Ebpf,
    /// Rules of nftables.
    Nftables,
}

/// Cluster DNS.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct DnsConfig {
    /// The address that pods have in resolv.conf. It leads to `listenAddress` on this node.
    pub cluster_address: Ipv4Addr,
    /// The IPv6 address that pods have there, if any. It leads to the first address of `nodeLocalCidr6` on this node.
    pub cluster_address6: Option<Ipv6Addr>,
    /// Single address on which the agent answers; the first of `nodeLocalCidr` if left out.
    pub listen_address: Option<IpAddr>,
    /// Port on which the agent answers.
    pub port: u16,
    /// Zone of the cluster's names.
    pub cluster_domain: String,
    /// Servers for all other names; those of the host's resolv.conf if empty. `ADDRESS[:PORT]` or `tls://ADDRESS[:PORT][#NAME]`.
    pub upstreams: Vec<String>,
    /// Servers for the names of single domains, in place of `upstreams`.
    pub zones: BTreeMap<String, Vec<String>>,
    /// PEM file of the CAs that upstreams over TLS may have their certificates from.
    pub tls_ca: PathBuf,
    /// Where the host names its servers, used if `upstreams` is empty, and its search domains. Followed as it changes.
    pub resolv_conf: PathBuf,
    /// Whether a query for the first entry of a pod's search path is answered with what the later entries have.
    pub search_path_completion: bool,
    /// How long clients may keep an answer about a cluster name, in seconds.
    pub ttl: u32,
    /// Answers of upstreams that are kept, with at most 1 KiB of memory each on average. 0 keeps none.
    pub cache_entries: usize,
    /// Whether popular answers of upstreams are asked for anew shortly before they expire.
    pub prefetch: bool,
    /// Whether the host is kept from tracking the flows of questions and answers, where it tracks flows at all and nothing
    /// translates these.
    pub untracked: bool,
    /// Queries that wait for upstreams at one time.
    pub max_queries: usize,
    /// Those of one client address; 0 for as many as there are.
    pub max_queries_per_client: usize,
}

/// The overlay to nodes of other networks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct TunnelConfig {
    /// Addresses on which the tunnel listens, UDP (QUIC) and TCP.
    pub listen: Vec<IpAddr>,
    /// Port of the tunnel, UDP and TCP.
    pub port: u16,
    /// Whether this node relays for nodes that can't reach each other.
    pub relay: bool,
    /// Further multiaddrs under which this node is reached, for example of a public address in front of it.
    pub advertise: Vec<String>,
}

/// Service ports that go through the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct ProxiedConfig {
    /// A UDP flow without datagrams ends after this time, in seconds.
    pub udp_idle_seconds: u64,
    /// A TCP connection on which nothing is said is probed after this time, in seconds. 0 probes none.
    pub keepalive_seconds: u64,
    /// Longest time for which an endpoint that could not be reached is passed over, in seconds. 0 passes none over.
    pub max_ejection_seconds: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            data_dir: PathBuf::from("/var/lib/edgemesh/agent"),
            node_name: host_name(),
            kubeconfig: None,
            api_server: None,
            network: None,
            services: ServiceSelection::All,
            datapath: DatapathMode::Auto,
            cgroup: PathBuf::from("/"),
            bpffs: PathBuf::from("/sys/fs/bpf"),
            backend_slots: 0,
            detach_on_stop: false,
            node_local_cidr: Ipv4Range::default(),
            node_local_cidr6: Ipv6Range::default(),
            routes: true,
            capture_pods: true,
            admin: AdminConfig::on(names::AGENT_ADMIN_PORT),
            dns: DnsConfig::default(),
            tunnel: TunnelConfig::default(),
            proxied: ProxiedConfig::default(),
            island_check_seconds: 2,
            silent_check_seconds: 15,
            log: LogConfig::default(),
            drain_seconds: 5,
        }
    }
}

impl Default for DnsConfig {
    fn default() -> Self {
        Self {
            cluster_address: Ipv4Addr::new(10, 96, 0, 10),
            cluster_address6: None,
            listen_address: None,
            port: 53,
            cluster_domain: names::DEFAULT_CLUSTER_DOMAIN.to_owned(),
            upstreams: Vec::new(),
            zones: BTreeMap::new(),
            tls_ca: PathBuf::from("/etc/ssl/certs/ca-certificates.crt"),
            resolv_conf: PathBuf::from("/etc/resolv.conf"),
            search_path_completion: true,
            ttl: 5,
            cache_entries: 5_000,
            prefetch: true,
            untracked: true,
            max_queries: 1_000,
            max_queries_per_client: 250,
        }
    }
}

impl Default for TunnelConfig {
    fn default() -> Self {
        Self {
            listen: vec![IpAddr::V4(Ipv4Addr::UNSPECIFIED)],
            port: names::TUNNEL_PORT,
            relay: false,
            advertise: Vec::new(),
        }
    }
}

impl Default for ProxiedConfig {
    fn default() -> Self {
        Self { udp_idle_seconds: 60, keepalive_seconds: 60, max_ejection_seconds: 60 }
    }
}

impl Config {
    /// Where DNS listens: the configured address, else the first of the node-local range.
    pub fn dns_listen(&self) -> SocketAddr {
        let address = self.dns.listen_address.unwrap_or(IpAddr::V4(self.node_local_cidr.dns_address()));
        SocketAddr::new(address, self.dns.port)
    }

    /// The same for queries by IPv6, where pods send some.
    pub fn dns_listen6(&self) -> Option<SocketAddr> {
        let address = SocketAddr::from((self.node_local_cidr6.dns_address(), self.dns.port));
        (self.dns.cluster_address6.is_some() && self.dns_listen().is_ipv4()).then_some(address)
    }

    /// From where endpoints are chosen: this node, in the configured network or else in the one of its Node.
    pub fn viewpoint(&self, catalog: &Catalog) -> Viewpoint {
        let viewpoint = Viewpoint::of(catalog, &self.node_name);
        match &self.network {
            Some(network) => Viewpoint { network: network.as_str().into(), ..viewpoint },
            None => viewpoint,
        }
    }

    /// URL of the Kubernetes API when there is no kubeconfig.
    pub fn api_url(&self) -> String {
        self.api_server.clone().unwrap_or_else(|| format!("http://127.0.0.1:{}", names::METASERVER_PORT))
    }
}

impl Validate for Config {
    fn validate(&self, problems: &mut Problems) {
        if !self.data_dir.is_absolute() {
            problems.add("dataDir", "must be an absolute path");
        }
        if !self.bpffs.is_absolute() {
            problems.add("bpffs", "must be an absolute path, for example /sys/fs/bpf");
        }
        if self.backend_slots != 0
            && !(self.backend_slots.is_power_of_two() && MapSizes::SLOTS.contains(&self.backend_slots))
        {
            problems.add("backendSlots", "must be 0 or a power of two from 16 to 16777216");
        }
        if self.node_name.is_empty() {
            problems.add("nodeName", "must be set: the host has no name");
        }
        if self.kubeconfig.is_some() && self.api_server.is_some() {
            problems.add("apiServer", "can't be set together with kubeconfig");
        }
        if let Some(url) = &self.api_server
            && !url.starts_with("http://")
            && !url.starts_with("https://")
        {
            problems.add("apiServer", "must be a URL that begins with http:// or https://");
        }
        if self.network.as_deref() == Some("") {
            problems.add("network", "must not be empty; leave it out to use the Node's label");
        }
        if self.cgroup.components().any(|part| part == std::path::Component::ParentDir) {
            problems.add("cgroup", "must not contain `..`");
        }
        self.dns.validate(problems);
        if self.tunnel.listen.is_empty() {
            problems.add("tunnel.listen", "must hold at least one address, for example 0.0.0.0");
        }
        if !(1..=80).contains(&self.proxied.udp_idle_seconds) {
            problems.add("proxied.udpIdleSeconds", "must be between 1 and 80: the other side ends a flow after 90");
        }
        if self.proxied.keepalive_seconds > 7200 {
            problems.add("proxied.keepaliveSeconds", "must be at most 7200");
        }
        if self.proxied.max_ejection_seconds > 3600 {
            problems.add("proxied.maxEjectionSeconds", "must be at most 3600");
        }
        if self.island_check_seconds > 60 {
            problems.add("islandCheckSeconds", "must be at most 60; 0 for no checks");
        }
        if self.silent_check_seconds > 300 {
            problems.add("silentCheckSeconds", "must be at most 300; 0 to use endpoints that take no connections");
        }
        if self.drain_seconds > 300 {
            problems.add("drainSeconds", "must be at most 300");
        }
    }
}

impl Validate for DnsConfig {
    fn validate(&self, problems: &mut Problems) {
        if self.port == 0 && self.listen_address.is_none() {
            problems.add("dns.port", "must not be 0");
        }
        if self.listen_address.is_some_and(|address| address.is_unspecified()) {
            let fix = "must be a single address, which pods' questions are led to; leave it out for the first of nodeLocalCidr";
            problems.add("dns.listenAddress", fix);
        }
        let domain = self.cluster_domain.trim_matches('.').to_ascii_lowercase();
        if domain.is_empty() {
            problems.add("dns.clusterDomain", "must be set, for example cluster.local");
        }
        if self.upstreams.len() > MAX_UPSTREAMS {
            problems.add("dns.upstreams", format!("must be at most {MAX_UPSTREAMS} servers"));
        }
        check_upstreams("dns.upstreams", &self.upstreams, problems);
        if self.zones.len() > MAX_ZONES {
            problems.add("dns.zones", format!("must be at most {MAX_ZONES} domains"));
        }
        for (zone, upstreams) in &self.zones {
            let setting = format!("dns.zones.{zone}");
            let name = zone.trim_end_matches('.').to_ascii_lowercase();
            if name.is_empty() {
                problems.add(&setting, "must be a domain; the servers for all names are dns.upstreams");
            } else if name == domain || name.ends_with(&format!(".{domain}")) {
                problems.add(&setting, "must not be in dns.clusterDomain, whose names are answered here");
            } else if name.len() > 253 || name.split('.').any(|label| label.is_empty() || label.len() > 63) {
                problems.add(&setting, "must be a DNS name, for example corp.example");
            }
            if upstreams.is_empty() || upstreams.len() > MAX_UPSTREAMS {
                problems.add(&setting, format!("must name 1 to {MAX_UPSTREAMS} servers"));
            }
            check_upstreams(&setting, upstreams, problems);
        }
        if !self.tls_ca.is_absolute() {
            problems.add("dns.tlsCa", "must be an absolute path");
        }
        if self.cache_entries > 1_000_000 {
            problems.add("dns.cacheEntries", "must be at most 1000000");
        }
        if !(1..=100_000).contains(&self.max_queries) {
            problems.add("dns.maxQueries", "must be between 1 and 100000");
        }
        if self.max_queries_per_client > 100_000 {
            problems.add("dns.maxQueriesPerClient", "must be at most 100000; 0 for no limit");
        }
        if self.ttl > 3600 {
            problems.add("dns.ttl", "must be at most 3600 seconds: endpoints change");
        }
    }
}

fn check_upstreams(setting: &str, upstreams: &[String], problems: &mut Problems) {
    for error in upstreams.iter().filter_map(|text| text.parse::<UpstreamAddress>().err()) {
        problems.add(setting, error);
    }
}

fn host_name() -> String {
    nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_default().to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(overrides: &[&str]) -> Result<Config, Vec<String>> {
        let overrides: Vec<_> = overrides.iter().map(|&text| text.to_owned()).collect();
        edgemesh_telemetry::config::load_from(None, "EDGEMESH_AGENT", std::iter::empty(), &overrides)
            .map_err(|error| error.0)
    }

    #[test]
    fn defaults_are_valid_and_dns_listens_on_the_first_node_local_address() {
        let config = load(&["nodeName=n1"]).unwrap();
        assert_eq!(config.dns_listen(), "169.254.64.1:53".parse().unwrap());
        assert_eq!(config.api_url(), "http://127.0.0.1:10550");
    }

    #[test]
    fn every_problem_is_reported_at_once() {
        let errors =
            load(&["nodeName=n1", "dataDir=x", "cgroup=/a/../b", "network=''", "tunnel.listen=[]"]).unwrap_err();
        assert_eq!(errors.len(), 4, "{errors:?}");
    }

    #[test]
    fn upstreams_over_tls_and_of_single_domains_are_read_and_checked() {
        let upstreams = "dns.upstreams=['10.0.0.53', 'tls://1.1.1.1#cloudflare-dns.com']";
        let config = load(&["nodeName=n1", upstreams, "dns.zones={corp.example: ['10.0.0.53:53']}"]).unwrap();
        assert_eq!(config.dns.upstreams, ["10.0.0.53", "tls://1.1.1.1#cloudflare-dns.com"]);
        assert_eq!(config.dns.zones["corp.example"], ["10.0.0.53:53"]);
        for (setting, field) in [
            ("dns.upstreams=['dns.example']", "dns.upstreams"),
            ("dns.upstreams=['https://1.1.1.1']", "dns.upstreams"),
            ("dns.zones={corp.example: ['tls://1.1.1.1#']}", "dns.zones.corp.example"),
            ("dns.zones={corp.example: []}", "dns.zones.corp.example"),
            ("dns.zones={'.': ['10.0.0.53']}", "dns.zones.."),
            ("dns.zones={a..example: ['10.0.0.53']}", "dns.zones.a..example"),
            ("dns.zones={Sub.Cluster.local.: ['10.0.0.53']}", "dns.zones.Sub.Cluster.local."),
            ("dns.tlsCa=ca.crt", "dns.tlsCa"),
            ("proxied.keepaliveSeconds=7201", "proxied.keepaliveSeconds"),
            ("dns.ttl=3601", "dns.ttl"),
            ("dns.listenAddress=0.0.0.0", "dns.listenAddress"),
            ("dns.listenAddress='::'", "dns.listenAddress"),
            ("dns.maxQueriesPerClient=1000000", "dns.maxQueriesPerClient"),
        ] {
            let errors = load(&["nodeName=n1", setting]).unwrap_err();
            assert!(errors.len() == 1 && errors[0].contains(field), "{setting}: {errors:?}");
        }
    }

    #[test]
    fn an_ipv6_node_local_range_that_is_no_range_is_refused() {
        assert!(load(&["nodeName=n1", "nodeLocalCidr6='fd00:7::/112'"]).is_ok());
        assert!(load(&["nodeName=n1", "nodeLocalCidr6='fd00:7::/64'"]).is_err());
    }

    #[test]
    fn a_node_local_range_that_is_no_range_is_refused() {
        for range in ["169.254.64.0/8", "169.254.64.7/18", "169.254.64.0/30", "x", "::1/64"] {
            assert!(load(&["nodeName=n1", &format!("nodeLocalCidr='{range}'")]).is_err(), "{range}");
        }
    }
}
