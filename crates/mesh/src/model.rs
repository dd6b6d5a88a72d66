//! The catalog's entries. They are immutable and shared by `Arc`; a change makes a new entry.

use std::{net::IpAddr, sync::Arc, time::Duration};

use crate::cidr::Cidr;

/// Transport protocol of a Service port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// Namespace and name of a Service.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
pub struct ServiceName {
    /// Namespace.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
}

/// How a Service is addressed (Kubernetes, "Service").
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub enum ServiceKind {
    /// It has cluster addresses (ClusterIP, NodePort and LoadBalancer types).
    ClusterIp,
    /// `clusterIP: None`: names resolve to the endpoints.
    Headless,
    /// An alias of another DNS name.
    ExternalName(Arc<str>),
}

/// A Service with the endpoints of each of its ports.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Service {
    /// Namespace and name.
    pub name: ServiceName,
    /// How it is addressed.
    pub kind: ServiceKind,
    /// Cluster addresses, the primary family first; empty unless [`ServiceKind::ClusterIp`].
    pub cluster_ips: Vec<IpAddr>,
    /// `externalIPs`: addresses of nodes at which it is called too.
    pub external_ips: Vec<IpAddr>,
    /// Addresses of its load balancer (`status.loadBalancer.ingress`) that are served on the nodes: not those with
    /// `ipMode: Proxy`.
    pub load_balancer_ips: Vec<IpAddr>,
    /// `loadBalancerSourceRanges`: from where these addresses may be called, if not from everywhere. None holds another.
    pub load_balancer_sources: Option<Vec<Cidr>>,
    /// Ports, in the object's order.
    pub ports: Vec<Arc<ServicePort>>,
    /// Of a headless Service: every endpoint once by address and host name, whatever its port (0 where the slice lists none).
    pub hosts: Vec<Arc<Endpoint>>,
    /// `sessionAffinity: ClientIP` with its timeout.
    pub client_ip_affinity: Option<Duration>,
    /// `internalTrafficPolicy: Local`.
    pub internal_traffic_local: bool,
    /// `externalTrafficPolicy: Local`: callers from outside of the cluster get endpoints of the node that they called.
    pub external_traffic_local: bool,
    /// `healthCheckNodePort`, where it has a meaning: type LoadBalancer with `externalTrafficPolicy: Local`.
    pub health_check_node_port: Option<u16>,
    /// `publishNotReadyAddresses`.
    pub publish_not_ready: bool,
    /// Its servers want the client's address in a header of the PROXY protocol, version 2
    /// ([`crate::from_kubernetes::PROXY_PROTOCOL_ANNOTATION`]).
    pub proxy_protocol: bool,
    /// `trafficDistribution`.
    pub traffic_distribution: TrafficDistribution,
    /// Annotation `edgemesh.dev/endpoint-choice: kubernetes`: no endpoint is preferred for being near.
    pub strict_spreading: bool,
    /// Something else carries its addresses: a label names another service proxy, or takes it out of the mesh. Its names
    /// are still answered.
    pub proxied_elsewhere: bool,
}

/// `spec.trafficDistribution` of a Service (Kubernetes, "Virtual IPs and Service Proxies": traffic distribution control).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub enum TrafficDistribution {
    /// Not set.
    #[default]
    Unset,
    /// `PreferSameZone`, and `PreferClose`, its older name.
    PreferSameZone,
    /// `PreferSameNode`.
    PreferSameNode,
}

/// One port of a Service.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct ServicePort {
    /// The Service that it belongs to.
    pub service: ServiceName,
    /// Port name; empty for the only port of a Service.
    pub name: Arc<str>,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Port on the cluster addresses.
    pub port: u16,
    /// Port on every node, if any.
    pub node_port: Option<u16>,
    /// `appProtocol`, if any.
    pub app_protocol: Option<Arc<str>>,
    /// All endpoints, ready or not, in a stable order (by address, then port, then node). Nodes of two networks may have the
    /// same address, and so endpoints at it.
    pub endpoints: Vec<Arc<Endpoint>>,
}

/// One endpoint of a Service port (Kubernetes, "EndpointSlices": conditions).
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Endpoint {
    /// Address of the pod (or of what an EndpointSlice without a Pod names).
    pub address: IpAddr,
    /// Port on that address.
    pub port: u16,
    /// Node on which it runs, if known.
    pub node: Option<Arc<str>>,
    /// Zone, if known.
    pub zone: Option<Arc<str>>,
    /// Zones whose clients should use it (topology hints), if the slice says so.
    pub zone_hints: Option<Arc<[Arc<str>]>>,
    /// Hostname, for the records of headless Services.
    pub hostname: Option<Arc<str>>,
    /// Namespace and name of the pod behind it, if any.
    pub pod: Option<(Arc<str>, Arc<str>)>,
    /// May get new connections.
    pub ready: bool,
    /// Answers, though it may be terminating.
    pub serving: bool,
    /// Is being deleted.
    pub terminating: bool,
    /// Takes no connections from this node, whatever the API says: used when there are no others.
    pub silent: bool,
}

/// A node as the mesh sees it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Node {
    /// Name.
    pub name: Arc<str>,
    /// Network (label `edgemesh.dev/network`): nodes of the same network reach one another's pods directly.
    pub network: Arc<str>,
    /// Zone (label `topology.kubernetes.io/zone`), if any.
    pub zone: Option<Arc<str>>,
    /// `InternalIP` addresses.
    pub addresses: Vec<IpAddr>,
    /// Ranges of its pods' addresses, in CIDR notation.
    pub pod_cidrs: Vec<Arc<str>>,
    /// Its `Ready` condition.
    pub ready: bool,
    /// Whether it is to run a gateway (label `edgemesh.dev/gateway`).
    pub gateway: bool,
    /// Tunnel endpoints by component (`agent`, `gateway`), from its MeshNode.
    pub peers: std::collections::BTreeMap<Arc<str>, Peer>,
}

/// A tunnel endpoint of a node.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Peer {
    /// libp2p PeerId in base58.
    pub peer_id: Arc<str>,
    /// Multiaddrs.
    pub addresses: Vec<Arc<str>>,
    /// Whether it relays for others.
    pub relay: bool,
}
