//! From Kubernetes objects to the catalog's entries. What can't be read is refused with a reason, never a panic.

use std::{
    collections::{BTreeMap, HashSet},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use edgemesh_api::{
    MeshNodeSpec,
    names::{DEFAULT_NETWORK, GATEWAY_NODE_LABEL, NETWORK_LABEL},
};
use k8s_openapi::{
    api::{core::v1 as core, discovery::v1 as discovery},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};

use crate::{
    cidr::Cidr,
    model::{Endpoint, Node, Peer, Protocol, Service, ServiceKind, ServiceName, ServicePort, TrafficDistribution},
};

/// Label of an EndpointSlice that names its Service (Kubernetes, "Well-Known Labels").
pub const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";
/// Label of a Node that names its zone (Kubernetes, "Well-Known Labels").
pub const ZONE_LABEL: &str = "topology.kubernetes.io/zone";
/// Annotation of a Service whose servers want the client's address in a header before the bytes of a connection that the agent
/// carries; its value is `v2`, the version of the PROXY protocol.
pub const PROXY_PROTOCOL_ANNOTATION: &str = "edgemesh.dev/proxy-protocol";
/// Annotation of a Service that asks for Kubernetes' own choice of endpoints, with the value `kubernetes`.
pub const ENDPOINT_CHOICE_ANNOTATION: &str = "edgemesh.dev/endpoint-choice";
/// Labels of Services that kube-proxy leaves to others, whatever their value (Kubernetes, "Well-Known Labels").
pub const ELSEWHERE_LABELS: [&str; 2] = ["service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"];
/// Label of a Service that the mesh is to carry (`true`), or not (`false`).
pub const PROXY_LABEL: &str = "edgemesh.dev/proxy";
/// The label, whatever its value, by which EdgeMesh leaves a Service out, or takes it in where it carries none without
/// (EdgeMesh, "Service filter").
pub const EDGEMESH_LABEL: &str = "service.edgemesh.kubeedge.io/service-proxy-name";
/// The label with which earlier versions of EdgeMesh left a Service out, and its value.
pub const NO_PROXY_LABEL: (&str, &str) = ("noproxy", "edgemesh");
/// Default of `sessionAffinityConfig.clientIP.timeoutSeconds`.
const DEFAULT_AFFINITY: Duration = Duration::from_secs(10_800);
/// The API allows 1000 endpoints in a slice and 100 ports; these bounds only stop objects that bypassed it.
const MAX_SLICE_ENDPOINTS: usize = 10_000;
const MAX_PORTS: usize = 1_000;
/// A Service has a handful of external addresses, an endpoint a handful of hints.
const MAX_ADDRESSES: usize = 64;
/// Ranges of `loadBalancerSourceRanges`; none of the rest is admitted.
const MAX_SOURCES: usize = 1024;

/// Which Services the mesh carries. All have names.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ServiceSelection {
    /// Those that no label leaves to others.
    #[default]
    All,
    /// Those only that a label takes in.
    Labelled,
}

impl ServiceSelection {
    fn takes(self, metadata: &ObjectMeta) -> bool {
        let label = |name: &str| metadata.labels.as_ref().and_then(|labels| labels.get(name)).map(String::as_str);
        if ELSEWHERE_LABELS.iter().any(|name| label(name).is_some())
            || label(NO_PROXY_LABEL.0) == Some(NO_PROXY_LABEL.1)
        {
            return false;
        }
        match label(PROXY_LABEL) {
            Some("true") => return true,
            Some("false") => return false,
            Some(other) => {
                tracing::warn!(namespace = ?metadata.namespace, service = ?metadata.name, value = other,
                    "{PROXY_LABEL} must be `true` or `false`; it is ignored");
            }
            None => {}
        }
        label(EDGEMESH_LABEL).is_some() == (self == Self::Labelled)
    }
}

/// Why an object was skipped.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Problem {
    /// No `spec`.
    #[error("it has no spec")]
    NoSpec,
    /// A field has a value that can't be used.
    #[error("{field} {value:?} can't be used")]
    Field {
        /// Path of the field.
        field: &'static str,
        /// What it holds.
        value: String,
    },
    /// More entries than any API server would accept.
    #[error("{field} has {count} entries")]
    TooMany {
        /// Path of the field.
        field: &'static str,
        /// How many.
        count: usize,
    },
}

/// One string for all its uses: node names, zones and namespaces repeat in every endpoint.
#[derive(Debug, Default)]
pub(crate) struct Interner {
    known: HashSet<Arc<str>>,
    prune_at: usize,
}

impl Interner {
    pub(crate) fn get(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.known.get(text) {
            return Arc::clone(known);
        }
        let new: Arc<str> = text.into();
        self.known.insert(Arc::clone(&new));
        new
    }

    /// Forgets strings that nobody uses, once the set has doubled since the last time.
    pub(crate) fn prune(&mut self) {
        if self.known.len() > self.prune_at {
            self.known.retain(|text| Arc::strong_count(text) > 1);
            self.prune_at = (self.known.len() * 2).max(1024);
        }
    }
}

/// The endpoints of one EndpointSlice, ready to be merged.
#[derive(Debug, Default)]
pub(crate) struct SliceEntry {
    /// By port name and protocol.
    pub(crate) ports: Vec<(Arc<str>, Protocol, Vec<Arc<Endpoint>>)>,
    /// Endpoints of a slice that lists no port: they have names, but can't be called by the Service.
    pub(crate) portless: Vec<Arc<Endpoint>>,
}

/// Namespace and name of an object, or nothing (with a warning) where they can't be DNS labels.
pub(crate) fn object_name(metadata: &ObjectMeta, interner: &mut Interner) -> Option<ServiceName> {
    let (namespace, name) = (metadata.namespace.as_deref().unwrap_or(""), metadata.name.as_deref().unwrap_or(""));
    if name.is_empty() || namespace.is_empty() || name.len() > 253 || namespace.len() > 63 {
        tracing::warn!(namespace, name, "an object without a usable name was skipped");
        return None;
    }
    Some(ServiceName { namespace: interner.get(namespace), name: interner.get(name) })
}

/// A Service without endpoints.
pub(crate) fn service(
    object: &core::Service,
    name: &ServiceName,
    selection: ServiceSelection,
    interner: &mut Interner,
) -> Result<Service, Problem> {
    let spec = object.spec.as_ref().ok_or(Problem::NoSpec)?;
    let kind = match (spec.type_.as_deref(), spec.cluster_ip.as_deref()) {
        (Some("ExternalName"), _) => {
            let target = spec.external_name.as_deref().unwrap_or("").trim_end_matches('.');
            if target.is_empty() || target.len() > 253 || target.split('.').any(|l| l.is_empty() || l.len() > 63) {
                return Err(field("spec.externalName", target));
            }
            ServiceKind::ExternalName(target.into())
        }
        (_, Some("None")) => ServiceKind::Headless,
        _ => ServiceKind::ClusterIp,
    };
    let mut cluster_ips = Vec::new();
    if kind == ServiceKind::ClusterIp {
        // `clusterIPs` repeats `clusterIP` as its first entry; objects of old API servers have only the latter.
        let listed = spec.cluster_ips.iter().flatten().chain(&spec.cluster_ip).filter(|ip| !ip.is_empty());
        for text in listed {
            let ip: IpAddr = text.parse().map_err(|_| field("spec.clusterIPs", text))?;
            if !cluster_ips.contains(&ip) {
                cluster_ips.push(ip);
            }
        }
    }
    let listed = spec.ports.as_deref().unwrap_or_default();
    if listed.len() > MAX_PORTS {
        return Err(Problem::TooMany { field: "spec.ports", count: listed.len() });
    }
    let mut ports = Vec::with_capacity(listed.len());
    for port in listed {
        let Some(protocol) = protocol(port.protocol.as_deref()) else { continue };
        ports.push(Arc::new(ServicePort {
            service: name.clone(),
            name: interner.get(port.name.as_deref().unwrap_or("")),
            protocol,
            port: port_number(port.port).ok_or_else(|| field("spec.ports.port", &port.port.to_string()))?,
            node_port: port.node_port.and_then(port_number),
            app_protocol: port.app_protocol.as_deref().map(|text| interner.get(text)),
            endpoints: Vec::new(),
        }));
    }
    let affinity = (spec.session_affinity.as_deref() == Some("ClientIP")).then(|| {
        let config = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
        let seconds = config.and_then(|config| config.timeout_seconds).and_then(|s| u64::try_from(s).ok());
        seconds.map_or(DEFAULT_AFFINITY, Duration::from_secs)
    });
    let has_cluster_address = kind == ServiceKind::ClusterIp;
    let addresses = |listed: &mut dyn Iterator<Item = &String>| -> Vec<IpAddr> {
        if has_cluster_address {
            listed.filter_map(|ip| ip.parse().ok()).filter(may_be_external).take(MAX_ADDRESSES).collect()
        } else {
            Vec::new()
        }
    };
    let balancer = object.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let ingress = balancer.and_then(|balancer| balancer.ingress.as_deref()).unwrap_or_default();
    let on_nodes = ingress.iter().filter(|entry| entry.ip_mode.as_deref() != Some("Proxy"));
    let sources = spec.load_balancer_source_ranges.as_ref().filter(|ranges| !ranges.is_empty());
    let external_traffic_local = spec.external_traffic_policy.as_deref() == Some("Local");
    let annotations = object.metadata.annotations.as_ref();
    let choice = annotations.and_then(|annotations| annotations.get(ENDPOINT_CHOICE_ANNOTATION));
    Ok(Service {
        name: name.clone(),
        kind,
        cluster_ips,
        external_ips: addresses(&mut spec.external_ips.iter().flatten()),
        load_balancer_ips: addresses(&mut on_nodes.filter_map(|entry| entry.ip.as_ref())),
        load_balancer_sources: sources.map(|texts| outermost(texts)),
        ports,
        hosts: Vec::new(),
        client_ip_affinity: affinity,
        internal_traffic_local: spec.internal_traffic_policy.as_deref() == Some("Local"),
        external_traffic_local,
        health_check_node_port: spec
            .health_check_node_port
            .and_then(port_number)
            .filter(|_| external_traffic_local && spec.type_.as_deref() == Some("LoadBalancer")),
        publish_not_ready: spec.publish_not_ready_addresses.unwrap_or(false),
        proxy_protocol: wants_proxy_protocol(&object.metadata),
        traffic_distribution: match spec.traffic_distribution.as_deref() {
            Some("PreferClose" | "PreferSameZone") => TrafficDistribution::PreferSameZone,
            Some("PreferSameNode") => TrafficDistribution::PreferSameNode,
            // Other values ask for what this version doesn't know; Kubernetes takes them for a hint, too.
            _ => TrafficDistribution::Unset,
        },
        strict_spreading: choice.is_some_and(|choice| choice == "kubernetes"),
        proxied_elsewhere: !selection.takes(&object.metadata),
    })
}

/// Ranges that no other one holds. What is no range admits nobody.
fn outermost(texts: &[String]) -> Vec<Cidr> {
    let mut ranges: Vec<Cidr> = texts.iter().filter_map(|text| Cidr::parse(text)).take(MAX_SOURCES).collect();
    ranges.sort_unstable_by_key(|range| (range.prefix(), range.network()));
    let mut outermost: Vec<Cidr> = Vec::new();
    for range in ranges {
        if !outermost.iter().any(|outer| outer.overlaps(&range)) {
            outermost.push(range);
        }
    }
    outermost
}

/// Whether callers from outside can mean a Service by an address: one that each host or link has for itself is taken from nobody
/// (the API refuses such `externalIPs`, and says nothing of what a load balancer's controller writes).
fn may_be_external(ip: &IpAddr) -> bool {
    let of_each_link = match ip.to_canonical() {
        IpAddr::V4(ip) => ip.is_link_local() || ip.is_broadcast(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    let ip = ip.to_canonical();
    !(of_each_link || ip.is_loopback() || ip.is_unspecified() || ip.is_multicast())
}

fn wants_proxy_protocol(metadata: &ObjectMeta) -> bool {
    let value = metadata.annotations.as_ref().and_then(|all| all.get(PROXY_PROTOCOL_ANNOTATION));
    match value.map(String::as_str) {
        None => false,
        Some("v2") => true,
        Some(other) => {
            let other: String = other.chars().take(64).collect();
            tracing::warn!(namespace = ?metadata.namespace, service = ?metadata.name, value = other,
                "{PROXY_PROTOCOL_ANNOTATION} must be `v2`; it is ignored");
            false
        }
    }
}

/// The Service and the endpoints of a slice. Nothing for slices of no Service, and for those of type FQDN, which
/// Kubernetes leaves without a meaning.
pub(crate) fn endpoint_slice(
    object: &discovery::EndpointSlice,
    name: &ServiceName,
    interner: &mut Interner,
) -> Result<Option<(ServiceName, SliceEntry)>, Problem> {
    let labels = object.metadata.labels.as_ref();
    let Some(service) = labels.and_then(|l| l.get(SERVICE_NAME_LABEL)).filter(|s| !s.is_empty()) else {
        return Ok(None);
    };
    if !matches!(object.address_type.as_str(), "IPv4" | "IPv6") {
        return Ok(None);
    }
    let ports = object.ports.as_deref().unwrap_or_default();
    if object.endpoints.len() > MAX_SLICE_ENDPOINTS {
        return Err(Problem::TooMany { field: "endpoints", count: object.endpoints.len() });
    }
    if ports.len() > MAX_PORTS {
        return Err(Problem::TooMany { field: "ports", count: ports.len() });
    }
    let endpoints: Vec<Endpoint> = object
        .endpoints
        .iter()
        .filter_map(|listed| {
            let found = endpoint(listed, &name.namespace, interner);
            if found.is_none() {
                tracing::warn!(namespace = %name.namespace, slice = %name.name, addresses = ?listed.addresses.first(),
                    "an endpoint without a usable address was skipped");
            }
            found
        })
        .collect();
    let mut entry = SliceEntry::default();
    for port in ports {
        let Some(protocol) = protocol(port.protocol.as_deref()) else { continue };
        // A port without a number means "any port", which a Service port can't use.
        let Some(number) = port.port.and_then(port_number) else { continue };
        let of_port = endpoints.iter().map(|endpoint| Arc::new(Endpoint { port: number, ..endpoint.clone() }));
        entry.ports.push((interner.get(port.name.as_deref().unwrap_or("")), protocol, of_port.collect()));
    }
    if entry.ports.is_empty() {
        entry.portless = endpoints.into_iter().map(Arc::new).collect();
    }
    let owner = ServiceName { namespace: Arc::clone(&name.namespace), name: interner.get(service) };
    Ok(Some((owner, entry)))
}

fn endpoint(listed: &discovery::Endpoint, namespace: &Arc<str>, interner: &mut Interner) -> Option<Endpoint> {
    // All addresses of an endpoint are interchangeable; kube-proxy too uses the first only.
    let address: IpAddr = listed.addresses.first()?.parse().ok()?;
    let conditions = listed.conditions.as_ref();
    let ready = conditions.and_then(|c| c.ready).unwrap_or(true);
    let terminating = conditions.and_then(|c| c.terminating).unwrap_or(false);
    Some(Endpoint {
        address,
        port: 0,
        node: listed.node_name.as_deref().filter(|n| !n.is_empty()).map(|n| interner.get(n)),
        zone: listed.zone.as_deref().filter(|z| !z.is_empty()).map(|z| interner.get(z)),
        zone_hints: listed
            .hints
            .as_ref()
            .and_then(|hints| hints.for_zones.as_ref())
            .map(|zones| zones.iter().take(MAX_ADDRESSES).map(|zone| interner.get(&zone.name)).collect()),
        hostname: listed.hostname.as_deref().filter(|h| is_label(h)).map(Into::into),
        pod: listed.target_ref.as_ref().filter(|r| r.kind.as_deref() == Some("Pod")).and_then(|r| {
            let namespace = r.namespace.as_deref().map_or_else(|| Arc::clone(namespace), |n| interner.get(n));
            Some((namespace, r.name.as_deref()?.into()))
        }),
        ready,
        // "serving" is "ready" without regard to termination; slices of old controllers lack it.
        serving: conditions.and_then(|c| c.serving).unwrap_or(ready),
        terminating,
        silent: false,
    })
}

/// A node without its tunnel endpoints.
pub(crate) fn node(object: &core::Node, interner: &mut Interner) -> Option<Node> {
    let name = object.metadata.name.as_deref().filter(|name| !name.is_empty() && name.len() <= 253)?;
    let label = |key: &str| object.metadata.labels.as_ref().and_then(|l| l.get(key)).filter(|v| !v.is_empty());
    let spec = object.spec.as_ref();
    let listed = spec.and_then(|s| s.pod_cidrs.as_ref()).filter(|cidrs| !cidrs.is_empty());
    let single = spec.and_then(|s| s.pod_cidr.as_ref()).filter(|cidr| !cidr.is_empty());
    let pod_cidrs = match (listed, single) {
        (Some(listed), _) => listed.iter().map(|cidr| cidr.as_str().into()).collect(),
        (None, Some(cidr)) => vec![cidr.as_str().into()],
        (None, None) => Vec::new(),
    };
    let status = object.status.as_ref();
    let addresses = status.and_then(|s| s.addresses.as_ref()).into_iter().flatten();
    let conditions = status.and_then(|s| s.conditions.as_ref()).into_iter().flatten();
    Some(Node {
        name: interner.get(name),
        network: interner.get(label(NETWORK_LABEL).map_or(DEFAULT_NETWORK, String::as_str)),
        zone: label(ZONE_LABEL).map(|zone| interner.get(zone)),
        addresses: addresses.filter(|a| a.type_ == "InternalIP").filter_map(|a| a.address.parse().ok()).collect(),
        pod_cidrs,
        ready: conditions.filter(|c| c.type_ == "Ready").any(|c| c.status == "True"),
        gateway: object.metadata.labels.as_ref().is_some_and(|labels| labels.contains_key(GATEWAY_NODE_LABEL)),
        peers: BTreeMap::new(),
    })
}

/// Tunnel endpoints from a MeshNode.
pub(crate) fn peers(spec: &MeshNodeSpec) -> BTreeMap<Arc<str>, Peer> {
    let peer = |peer: &edgemesh_api::MeshPeer| Peer {
        peer_id: peer.peer_id.as_str().into(),
        addresses: peer.addresses.iter().map(|address| address.as_str().into()).collect(),
        relay: peer.relay,
    };
    spec.peers.iter().map(|(component, found)| (component.as_str().into(), peer(found))).collect()
}

fn protocol(text: Option<&str>) -> Option<Protocol> {
    match text {
        None | Some("" | "TCP") => Some(Protocol::Tcp),
        Some("UDP") => Some(Protocol::Udp),
        // SCTP and what may come: the mesh doesn't carry it.
        Some(_) => None,
    }
}

fn port_number(port: i32) -> Option<u16> {
    u16::try_from(port).ok().filter(|port| *port != 0)
}

fn is_label(text: &str) -> bool {
    !text.is_empty() && text.len() <= 63 && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

fn field(field: &'static str, value: &str) -> Problem {
    Problem::Field { field, value: value.chars().take(64).collect() }
}
