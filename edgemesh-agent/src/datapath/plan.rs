//! From the catalog to what the datapath must do: every Service address with where it leads, as seen from one node.

use std::{
    collections::{BTreeMap, HashSet},
    net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4},
};

use edgemesh_mesh::{
    catalog::Catalog,
    choice::{Tier, Viewpoint},
    model::{Protocol, ServicePort},
};

use crate::node_local::{Allocator, ServicePortName};

/// Port of cluster DNS at its cluster address, UDP and TCP.
pub const DNS_PORT: u16 = 53;

/// An address at which a Service port is called on this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Frontend {
    /// Address and port.
    pub address: SocketAddrV4,
    /// Protocol.
    pub protocol: Protocol,
}

/// Where a frontend leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// To endpoints that are reached by their own addresses.
    Direct(Vec<SocketAddrV4>),
    /// To a listener of the agent.
    Listener(SocketAddrV4),
    /// Nowhere: there is no endpoint, and connections are refused.
    Refuse,
}

impl Target {
    /// The addresses to which sockets are sent; none to refuse them.
    pub fn backends(&self) -> &[SocketAddrV4] {
        match self {
            Self::Direct(backends) => backends,
            Self::Listener(listener) => std::slice::from_ref(listener),
            Self::Refuse => &[],
        }
    }
}

/// All frontends of a node.
pub type Plan = BTreeMap<Frontend, Target>;

/// What a plan is made from, beside the catalog.
#[derive(Debug, Clone, Copy)]
pub struct Surroundings<'a> {
    /// From where endpoints are chosen.
    pub viewpoint: &'a Viewpoint,
    /// Addresses of Service ports that go through the agent.
    pub allocator: &'a Allocator,
    /// The cluster DNS address, and the listener that answers for it.
    pub dns: Option<(SocketAddrV4, SocketAddrV4)>,
}

/// One difference between two plans.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change<'a> {
    /// The frontend.
    pub frontend: Frontend,
    /// Where it leads now; `None` when it is gone.
    pub target: Option<&'a Target>,
}

/// The plan for a catalog. The only thing that it changes is the allocator, which gives addresses to new Service ports.
pub fn plan(catalog: &Catalog, surroundings: Surroundings<'_>) -> Plan {
    let Surroundings { viewpoint, allocator, dns } = surroundings;
    let mut plan = Plan::new();
    for (&(ip, port, protocol), service_port) in catalog.vips() {
        if let IpAddr::V4(ip) = ip {
            let target = target(catalog, surroundings, service_port);
            plan.insert(Frontend { address: SocketAddrV4::new(ip, port), protocol }, target);
        }
    }
    let node_addresses: Vec<Ipv4Addr> = own_addresses(catalog, &viewpoint.node);
    for (&(port, protocol), service_port) in catalog.node_ports() {
        let target = target(catalog, surroundings, service_port);
        for &ip in &node_addresses {
            plan.insert(Frontend { address: SocketAddrV4::new(ip, port), protocol }, target.clone());
        }
    }
    if let Some((address, listener)) = dns {
        // Also when the cluster runs a DNS Service at that address: pods must find names without it.
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            plan.insert(Frontend { address, protocol }, Target::Listener(listener));
        }
    }
    let live: HashSet<ServicePortName> =
        catalog.services().flat_map(|service| service.ports.iter()).map(|port| (&**port).into()).collect();
    allocator.retire(&live);
    plan
}

/// What must be done to come from one plan to another.
pub fn changes<'a>(from: &Plan, to: &'a Plan) -> Vec<Change<'a>> {
    // What is new comes first: for a moment a renamed Service has both addresses, and never none.
    let set = to.iter().filter(|(frontend, target)| from.get(frontend) != Some(target));
    let gone = from.keys().filter(|frontend| !to.contains_key(frontend));
    set.map(|(&frontend, target)| Change { frontend, target: Some(target) })
        .chain(gone.map(|&frontend| Change { frontend, target: None }))
        .collect()
}

fn target(catalog: &Catalog, surroundings: Surroundings<'_>, port: &ServicePort) -> Target {
    let candidates = surroundings.viewpoint.candidates(catalog, port);
    if candidates.endpoints.is_empty() {
        return Target::Refuse;
    }
    if candidates.tier == Tier::Remote {
        return match surroundings.allocator.listener(&port.into()) {
            Ok(listener) => Target::Listener(listener),
            Err(error) => {
                tracing::warn!(service = %ServicePortName::from(port), %error, "the Service port can't be reached");
                Target::Refuse
            }
        };
    }
    let backends: Vec<SocketAddrV4> = candidates
        .endpoints
        .iter()
        .filter_map(|endpoint| match SocketAddr::new(endpoint.address, endpoint.port) {
            SocketAddr::V4(address) => Some(address),
            SocketAddr::V6(_) => None,
        })
        .collect();
    if backends.is_empty() { Target::Refuse } else { Target::Direct(backends) }
}

/// The addresses of this node at which its NodePorts are called from the node itself.
fn own_addresses(catalog: &Catalog, node: &str) -> Vec<Ipv4Addr> {
    let of_node = catalog.node(node).into_iter().flat_map(|node| node.addresses.iter());
    let v4 = of_node.filter_map(|address| match address {
        IpAddr::V4(address) => Some(*address),
        IpAddr::V6(_) => None,
    });
    [Ipv4Addr::LOCALHOST].into_iter().chain(v4).collect()
}
