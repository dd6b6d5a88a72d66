//! The catalog: an immutable snapshot of Services, their endpoints and the nodes, under several indexes.
//!
//! Snapshots share what they have in common, so a change costs its own size and not the cluster's. Readers hold an
//! `Arc<Catalog>` and never lock; [`crate::store::CatalogStore`] makes and publishes them.

use std::{
    borrow::Borrow,
    hash::{Hash, Hasher},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use crate::{
    cidr::Cidr,
    model::{Endpoint, Node, Protocol, Service, ServiceKind, ServiceName, ServicePort},
    shards::Shards,
};

/// Address, port and protocol at which a Service port is called.
pub type Vip = (IpAddr, u16, Protocol);

/// One consistent view of the cluster. Cloning is cheap.
#[derive(Debug, Clone, Default)]
pub struct Catalog {
    pub(crate) generation: u64,
    pub(crate) synced: bool,
    services: Shards<ServiceName, Arc<Service>>,
    vips: Shards<Vip, Arc<ServicePort>>,
    node_ports: Shards<(u16, Protocol), Arc<ServicePort>>,
    cluster_ips: Shards<IpAddr, Arc<Service>>,
    /// Which Services have an endpoint at an address.
    endpoints: Shards<IpAddr, Arc<[ServiceName]>>,
    /// How many Services each namespace has.
    namespaces: Shards<Arc<str>, u32>,
    nodes: Shards<Arc<str>, Arc<Node>>,
    node_addresses: Shards<IpAddr, Arc<Node>>,
    /// Pod ranges of the nodes, the longest prefixes first.
    pod_ranges: Arc<[(Cidr, Arc<Node>)]>,
}

impl Catalog {
    /// Number of the publication; grows by one with each.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Whether it is complete: everything was listed once, now or before the copy on disk was made.
    pub fn is_synced(&self) -> bool {
        self.synced
    }

    /// The Service of that name.
    pub fn service(&self, namespace: &str, name: &str) -> Option<&Arc<Service>> {
        self.services.get(&(namespace, name) as &dyn NamePair)
    }

    /// The Service of that name.
    pub fn service_named(&self, name: &ServiceName) -> Option<&Arc<Service>> {
        self.services.get(name)
    }

    /// All Services, in no order.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.iter().map(|(_, service)| service)
    }

    /// How many Services there are.
    pub fn service_count(&self) -> usize {
        self.services.len()
    }

    /// The Service port that is called at a cluster address.
    pub fn port_at(&self, ip: IpAddr, port: u16, protocol: Protocol) -> Option<&Arc<ServicePort>> {
        self.vips.get(&(ip, port, protocol))
    }

    /// All cluster addresses with the ports behind them, in no order; without Services that are proxied elsewhere.
    pub fn vips(&self) -> impl Iterator<Item = (&Vip, &Arc<ServicePort>)> {
        self.vips.iter()
    }

    /// The Service port that every node offers at that port number.
    pub fn node_port(&self, port: u16, protocol: Protocol) -> Option<&Arc<ServicePort>> {
        self.node_ports.get(&(port, protocol))
    }

    /// All node ports, in no order.
    pub fn node_ports(&self) -> impl Iterator<Item = (&(u16, Protocol), &Arc<ServicePort>)> {
        self.node_ports.iter()
    }

    /// The Service that owns a cluster address.
    pub fn service_at(&self, ip: IpAddr) -> Option<&Arc<Service>> {
        self.cluster_ips.get(&ip)
    }

    /// The Services that have an endpoint at an address.
    pub fn services_of_endpoint(&self, ip: IpAddr) -> impl Iterator<Item = &Arc<Service>> {
        self.endpoints.get(&ip).into_iter().flat_map(|names| names.iter()).filter_map(|name| self.services.get(name))
    }

    /// The endpoint of any Service at an address and port, if the catalog knows one.
    pub fn endpoint_at(&self, address: SocketAddr, protocol: Protocol) -> Option<&Arc<Endpoint>> {
        self.endpoints_at(address, protocol).next()
    }

    /// Whether there is an endpoint at an address and port on a node.
    pub fn is_endpoint_on(&self, address: SocketAddr, protocol: Protocol, node: &str) -> bool {
        self.endpoints_at(address, protocol).any(|endpoint| self.node_of_endpoint(endpoint).as_deref() == Some(node))
    }

    fn endpoints_at(&self, address: SocketAddr, protocol: Protocol) -> impl Iterator<Item = &Arc<Endpoint>> {
        let ports = self.services_of_endpoint(address.ip()).flat_map(|service| &service.ports);
        ports.filter(move |port| port.protocol == protocol).flat_map(move |port| port.endpoints_at(address))
    }

    /// Whether a namespace has at least one Service.
    pub fn has_namespace(&self, namespace: &str) -> bool {
        self.namespaces.get(namespace).is_some()
    }

    /// The node of that name.
    pub fn node(&self, name: &str) -> Option<&Arc<Node>> {
        self.nodes.get(name)
    }

    /// All nodes, in no order.
    pub fn nodes(&self) -> impl Iterator<Item = &Arc<Node>> {
        self.nodes.iter().map(|(_, node)| node)
    }

    /// The node that has an address, itself or in one of its pod ranges.
    pub fn node_of_address(&self, ip: IpAddr) -> Option<&Arc<Node>> {
        self.node_addresses
            .get(&ip)
            .or_else(|| self.pod_ranges.iter().find(|(cidr, _)| cidr.contains(ip)).map(|(_, node)| node))
    }

    /// The node on which an endpoint runs: the one it names, or the one whose address or pod range it is in.
    pub fn node_of_endpoint(&self, endpoint: &Endpoint) -> Option<Arc<str>> {
        endpoint.node.clone().or_else(|| self.node_of_address(endpoint.address).map(|node| Arc::clone(&node.name)))
    }

    /// Services that differ from an older snapshot of the same store: added, changed or gone. Costs what changed.
    pub fn changed_services(&self, older: &Self) -> Vec<ServiceName> {
        self.services.changed_since(&older.services, Arc::ptr_eq)
    }

    /// Whether any node differs from an older snapshot of the same store.
    pub fn nodes_changed(&self, older: &Self) -> bool {
        !self.nodes.changed_since(&older.nodes, Arc::ptr_eq).is_empty()
    }

    /// The same in what endpoint choice reads: not where a node's tunnel is reached, which its agent publishes anew at times,
    /// nor whether it runs a gateway.
    pub fn places_changed(&self, older: &Self) -> bool {
        !self.nodes.changed_since(&older.nodes, |new, old| Arc::ptr_eq(new, old) || is_same_place(new, old)).is_empty()
    }

    /// Puts a Service in, or takes it out with `None`; every index follows.
    pub(crate) fn set_service(&mut self, name: &ServiceName, new: Option<Arc<Service>>) {
        let old = self.services.get(name).cloned();
        if let Some(old) = &old {
            self.unlink(old, new.as_deref());
        }
        match new {
            Some(service) => {
                if old.is_none() {
                    let count = self.namespaces.get(&name.namespace).copied().unwrap_or(0);
                    self.namespaces.insert(Arc::clone(&name.namespace), count + 1);
                }
                self.link(&service, old.as_deref());
                self.services.insert(name.clone(), service);
            }
            None => {
                if self.services.remove(name).is_some() {
                    match self.namespaces.get(&name.namespace).copied() {
                        Some(count) if count > 1 => self.namespaces.insert(Arc::clone(&name.namespace), count - 1),
                        _ => drop(self.namespaces.remove(&name.namespace)),
                    }
                }
            }
        }
    }

    fn link(&mut self, service: &Arc<Service>, old: Option<&Service>) {
        for ip in &service.cluster_ips {
            self.cluster_ips.insert(*ip, Arc::clone(service));
            for port in service.carried_ports() {
                self.vips.insert((*ip, port.port, port.protocol), Arc::clone(port));
            }
        }
        for port in service.carried_ports() {
            if let Some(node_port) = port.node_port {
                self.node_ports.insert((node_port, port.protocol), Arc::clone(port));
            }
        }
        let before = old.map(endpoint_addresses).unwrap_or_default();
        for ip in endpoint_addresses(service) {
            if before.binary_search(&ip).is_ok() {
                continue;
            }
            let names = match self.endpoints.get(&ip) {
                Some(names) if names.contains(&service.name) => continue,
                Some(names) => names.iter().cloned().chain([service.name.clone()]).collect(),
                None => Arc::from([service.name.clone()]),
            };
            self.endpoints.insert(ip, names);
        }
    }

    /// Takes out what `old` had and `new` doesn't. An entry that another Service has taken over meanwhile stays.
    fn unlink(&mut self, old: &Service, new: Option<&Service>) {
        for ip in &old.cluster_ips {
            let keeps_ip = new.is_some_and(|new| new.cluster_ips.contains(ip));
            if !keeps_ip && self.cluster_ips.get(ip).is_some_and(|owner| owner.name == old.name) {
                self.cluster_ips.remove(ip);
            }
            for port in &old.ports {
                let key = (*ip, port.port, port.protocol);
                let keeps = keeps_ip && new.is_some_and(|new| new.has_port(port.port, port.protocol));
                if !keeps && self.vips.get(&key).is_some_and(|owner| owner.service == old.name) {
                    self.vips.remove(&key);
                }
            }
        }
        for port in &old.ports {
            let Some(node_port) = port.node_port else { continue };
            let key = (node_port, port.protocol);
            let keeps = new.is_some_and(|new| {
                new.carried_ports().iter().any(|p| p.node_port == port.node_port && p.protocol == port.protocol)
            });
            if !keeps && self.node_ports.get(&key).is_some_and(|owner| owner.service == old.name) {
                self.node_ports.remove(&key);
            }
        }
        let after = new.map(endpoint_addresses).unwrap_or_default();
        for ip in endpoint_addresses(old) {
            if after.binary_search(&ip).is_ok() {
                continue;
            }
            let Some(names) = self.endpoints.get(&ip) else { continue };
            let left: Arc<[ServiceName]> = names.iter().filter(|name| **name != old.name).cloned().collect();
            if left.is_empty() {
                self.endpoints.remove(&ip);
            } else {
                self.endpoints.insert(ip, left);
            }
        }
    }

    /// Puts a node in, or takes it out with `None`.
    pub(crate) fn set_node(&mut self, name: &str, new: Option<Arc<Node>>) {
        let old = self.nodes.remove(name);
        if let Some(old) = &old {
            for ip in &old.addresses {
                if self.node_addresses.get(ip).is_none_or(|owner| owner.name != old.name) {
                    continue;
                }
                self.node_addresses.remove(ip);
                // Another node that has it, in another network, is found by it from now on.
                if new.as_ref().is_none_or(|new| !new.addresses.contains(ip)) {
                    let others = self.nodes().filter(|node| node.addresses.contains(ip));
                    if let Some(node) = others.min_by_key(|node| &node.name).cloned() {
                        self.node_addresses.insert(*ip, node);
                    }
                }
            }
        }
        let had_ranges = old.is_some_and(|old| !old.pod_cidrs.is_empty());
        let has_ranges = new.as_ref().is_some_and(|new| !new.pod_cidrs.is_empty());
        if let Some(node) = &new {
            for ip in &node.addresses {
                // Of several, the same one whoever changed last.
                if self.node_addresses.get(ip).is_none_or(|owner| owner.name >= node.name) {
                    self.node_addresses.insert(*ip, Arc::clone(node));
                }
            }
            self.nodes.insert(Arc::clone(&node.name), Arc::clone(node));
        }
        if had_ranges || has_ranges {
            let mut ranges: Vec<_> = self.pod_ranges.iter().filter(|(_, node)| &*node.name != name).cloned().collect();
            for node in new.iter() {
                ranges.extend(node.pod_cidrs.iter().filter_map(|c| Cidr::parse(c)).map(|c| (c, Arc::clone(node))));
            }
            ranges.sort_by_key(|(cidr, _)| std::cmp::Reverse(cidr.prefix()));
            self.pod_ranges = ranges.into();
        }
    }
}

fn is_same_place(one: &Node, other: &Node) -> bool {
    let Node { name, network, zone, addresses, pod_cidrs, ready, gateway: _, peers: _ } = one;
    *name == other.name
        && *network == other.network
        && *zone == other.zone
        && *addresses == other.addresses
        && *pod_cidrs == other.pod_cidrs
        && *ready == other.ready
}

/// The distinct addresses of a Service's endpoints, sorted.
fn endpoint_addresses(service: &Service) -> Vec<IpAddr> {
    let of_ports = service.ports.iter().flat_map(|port| port.endpoints.iter());
    let mut addresses: Vec<IpAddr> = of_ports.chain(service.hosts.iter()).map(|endpoint| endpoint.address).collect();
    addresses.sort_unstable();
    addresses.dedup();
    addresses
}

impl Service {
    /// One of its ports, by name and protocol.
    pub fn port_named(&self, name: &str, protocol: Protocol) -> Option<&Arc<ServicePort>> {
        self.ports.iter().find(|port| *port.name == *name && port.protocol == protocol)
    }

    /// Whether names resolve to the endpoints and not to a cluster address.
    pub fn is_headless(&self) -> bool {
        self.kind == ServiceKind::Headless
    }

    /// The ports that the mesh carries: all, or none of a Service that is proxied elsewhere.
    pub fn carried_ports(&self) -> &[Arc<ServicePort>] {
        if self.proxied_elsewhere { &[] } else { &self.ports }
    }

    fn has_port(&self, port: u16, protocol: Protocol) -> bool {
        self.carried_ports().iter().any(|p| p.port == port && p.protocol == protocol)
    }
}

impl ServicePort {
    /// The endpoint at an address; of several, one that is ready, or at least serves.
    pub fn endpoint(&self, address: SocketAddr) -> Option<&Arc<Endpoint>> {
        self.endpoints_at(address).iter().max_by_key(|endpoint| (endpoint.ready, endpoint.serving))
    }

    /// The endpoints at an address: one, or one for each of several nodes.
    pub fn endpoints_at(&self, address: SocketAddr) -> &[Arc<Endpoint>] {
        let key = (address.ip(), address.port());
        let start = self.endpoints.partition_point(|endpoint| (endpoint.address, endpoint.port) < key);
        let here = &self.endpoints[start..];
        &here[..here.partition_point(|endpoint| (endpoint.address, endpoint.port) == key)]
    }
}

/// A namespace and a name in any form, so that lookups by `&str` need no allocation.
trait NamePair {
    fn pair(&self) -> (&str, &str);
}

impl NamePair for ServiceName {
    fn pair(&self) -> (&str, &str) {
        (&self.namespace, &self.name)
    }
}

impl NamePair for (&str, &str) {
    fn pair(&self) -> (&str, &str) {
        *self
    }
}

impl<'a> Borrow<dyn NamePair + 'a> for ServiceName {
    fn borrow(&self) -> &(dyn NamePair + 'a) {
        self
    }
}

impl Hash for dyn NamePair + '_ {
    fn hash<H: Hasher>(&self, state: &mut H) {
        // The same sequence as the derived `Hash` of `ServiceName`: namespace, then name.
        self.pair().hash(state);
    }
}

impl PartialEq for dyn NamePair + '_ {
    fn eq(&self, other: &Self) -> bool {
        self.pair() == other.pair()
    }
}

impl Eq for dyn NamePair + '_ {}
