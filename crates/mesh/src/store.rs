//! The catalog's store: takes Kubernetes objects in any order and publishes snapshots.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use arc_swap::ArcSwap;
use edgemesh_api::MeshNode;
use k8s_openapi::api::{core::v1 as core, discovery::v1::EndpointSlice};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::{
    catalog::Catalog,
    from_kubernetes::{self, Interner, ServiceSelection, SliceEntry},
    model::{Endpoint, Node, Peer, Protocol, Service, ServiceName, ServicePort},
};

/// Holds the current [`Catalog`]; many read, one writes.
///
/// Changes are collected by `apply_…` and `delete_…`, and become visible together with [`CatalogStore::publish`].
#[derive(Debug)]
pub struct CatalogStore {
    selection: ServiceSelection,
    current: ArcSwap<Catalog>,
    writer: Mutex<Writer>,
    generation: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Writer {
    next: Catalog,
    changed: bool,
    interner: Interner,
    /// Services without their endpoints.
    services: HashMap<ServiceName, Service>,
    /// Slices by their Service and own name; they may come before their Service.
    slices: HashMap<ServiceName, BTreeMap<Arc<str>, SliceEntry>>,
    /// The Service that each slice, by namespace and name, was last seen for.
    slice_owner: HashMap<ServiceName, ServiceName>,
    nodes: HashMap<Arc<str>, Node>,
    peers: HashMap<Arc<str>, BTreeMap<Arc<str>, Peer>>,
    /// What was observed of endpoints while nobody else could tell.
    observed: Observed,
    /// TCP endpoints that take no connections from this node.
    silent: HashSet<SocketAddr>,
    dirty_services: HashSet<ServiceName>,
    dirty_nodes: BTreeSet<Arc<str>>,
}

/// What a node has seen of endpoints itself: whether they answer. It takes the place of what EndpointSlices say about them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    /// Of single endpoints; it counts for TCP endpoints.
    pub endpoints: HashMap<SocketAddr, bool>,
    /// Of addresses, for their UDP endpoints and names: whether anything there answers.
    pub addresses: HashMap<IpAddr, bool>,
}

impl Observed {
    fn of(&self, endpoint: &Endpoint, protocol: Option<Protocol>) -> Option<bool> {
        let known = match protocol {
            Some(Protocol::Tcp) => self.endpoints.get(&SocketAddr::new(endpoint.address, endpoint.port)),
            _ => self.addresses.get(&endpoint.address),
        };
        known.copied()
    }

    /// The endpoint as it was observed to be.
    fn applied(&self, endpoint: &Arc<Endpoint>, protocol: Option<Protocol>) -> Arc<Endpoint> {
        let Some(answers) = self.of(endpoint, protocol) else { return Arc::clone(endpoint) };
        let ready = answers && !endpoint.terminating;
        if (endpoint.ready, endpoint.serving) == (ready, answers) {
            return Arc::clone(endpoint);
        }
        Arc::new(Endpoint { ready, serving: answers, ..Endpoint::clone(endpoint) })
    }

    /// Addresses about which the two don't say the same.
    fn differing(&self, other: &Self) -> HashSet<IpAddr> {
        let one_way = |one: &Self, other: &Self| -> Vec<IpAddr> {
            let endpoints = one.endpoints.iter().filter(|(key, value)| other.endpoints.get(key) != Some(value));
            let addresses = one.addresses.iter().filter(|(key, value)| other.addresses.get(key) != Some(value));
            endpoints.map(|(key, _)| key.ip()).chain(addresses.map(|(key, _)| *key)).collect()
        };
        one_way(self, other).into_iter().chain(one_way(other, self)).collect()
    }
}

impl Default for CatalogStore {
    fn default() -> Self {
        Self {
            selection: ServiceSelection::default(),
            current: ArcSwap::default(),
            writer: Mutex::default(),
            generation: watch::Sender::new(0),
        }
    }
}

impl CatalogStore {
    /// An empty store, not synced.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// An empty store of a mesh that carries certain Services.
    pub fn selecting(selection: ServiceSelection) -> Arc<Self> {
        Arc::new(Self { selection, ..Self::default() })
    }

    /// The current catalog, without locking.
    pub fn snapshot(&self) -> Arc<Catalog> {
        self.current.load_full()
    }

    /// The current catalog for a short look; cheaper than [`CatalogStore::snapshot`]. Don't hold it across `.await`.
    pub fn peek(&self) -> arc_swap::Guard<Arc<Catalog>> {
        self.current.load()
    }

    /// Wakes with the generation of each publication.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }

    /// Whether the current catalog is complete ([`Catalog::is_synced`]).
    pub fn is_synced(&self) -> bool {
        self.current.load().is_synced()
    }

    /// Adds or changes a Service. One that can't be read is skipped with a warning and its older form is dropped.
    pub fn apply_service(&self, object: &core::Service) {
        let mut writer = self.writer.lock();
        let Some(name) = from_kubernetes::object_name(&object.metadata, &mut writer.interner) else { return };
        match from_kubernetes::service(object, &name, self.selection, &mut writer.interner) {
            Ok(service) => drop(writer.services.insert(name.clone(), service)),
            Err(problem) => {
                tracing::warn!(namespace = %name.namespace, service = %name.name, %problem, "Service skipped");
                writer.services.remove(&name);
            }
        }
        writer.dirty_services.insert(name);
    }

    /// Removes a Service; its slices stay staged.
    pub fn delete_service(&self, namespace: &str, name: &str) {
        let mut writer = self.writer.lock();
        let name = ServiceName { namespace: namespace.into(), name: name.into() };
        if writer.services.remove(&name).is_some() {
            writer.dirty_services.insert(name);
        }
    }

    /// Adds or changes an EndpointSlice; it waits for its Service if that isn't there yet.
    pub fn apply_endpoint_slice(&self, object: &EndpointSlice) {
        let mut writer = self.writer.lock();
        let writer = &mut *writer;
        let Some(name) = from_kubernetes::object_name(&object.metadata, &mut writer.interner) else { return };
        writer.remove_slice(&name);
        match from_kubernetes::endpoint_slice(object, &name, &mut writer.interner) {
            Ok(Some((owner, entry))) => {
                writer.slice_owner.insert(name.clone(), owner.clone());
                writer.slices.entry(owner.clone()).or_default().insert(name.name, entry);
                writer.dirty_services.insert(owner);
            }
            Ok(None) => {}
            Err(problem) => {
                tracing::warn!(namespace = %name.namespace, slice = %name.name, %problem, "EndpointSlice skipped");
            }
        }
    }

    /// Removes an EndpointSlice.
    pub fn delete_endpoint_slice(&self, namespace: &str, name: &str) {
        self.writer.lock().remove_slice(&ServiceName { namespace: namespace.into(), name: name.into() });
    }

    /// Adds or changes a Node.
    pub fn apply_node(&self, object: &core::Node) {
        let mut writer = self.writer.lock();
        let Some(node) = from_kubernetes::node(object, &mut writer.interner) else {
            tracing::warn!("a Node without a name was skipped");
            return;
        };
        writer.dirty_nodes.insert(Arc::clone(&node.name));
        writer.nodes.insert(Arc::clone(&node.name), node);
    }

    /// Removes a Node.
    pub fn delete_node(&self, name: &str) {
        let mut writer = self.writer.lock();
        if writer.nodes.remove(name).is_some() {
            writer.dirty_nodes.insert(name.into());
        }
    }

    /// Adds or changes a MeshNode; it waits for its Node if that isn't there yet.
    pub fn apply_mesh_node(&self, object: &MeshNode) {
        let mut writer = self.writer.lock();
        let Some(name) = object.metadata.name.as_deref().map(|name| writer.interner.get(name)) else { return };
        writer.peers.insert(Arc::clone(&name), from_kubernetes::peers(&object.spec));
        writer.dirty_nodes.insert(name);
    }

    /// Removes a MeshNode.
    pub fn delete_mesh_node(&self, name: &str) {
        let mut writer = self.writer.lock();
        if writer.peers.remove(name).is_some() {
            writer.dirty_nodes.insert(name.into());
        }
    }

    /// Has endpoints be as they were observed, from the next publication on; with nothing observed, as EndpointSlices say.
    pub fn set_observed(&self, observed: Observed) {
        let mut writer = self.writer.lock();
        let differing = writer.observed.differing(&observed);
        writer.endpoints_changed(differing);
        writer.observed = observed;
    }

    /// Names the TCP endpoints that take no connections from this node, from the next publication on.
    pub fn set_silent(&self, silent: HashSet<SocketAddr>) {
        let mut writer = self.writer.lock();
        let differing: Vec<IpAddr> = writer.silent.symmetric_difference(&silent).map(SocketAddr::ip).collect();
        writer.endpoints_changed(differing);
        writer.silent = silent;
    }

    /// Marks the catalog complete, from the next publication on.
    pub fn mark_synced(&self) {
        let mut writer = self.writer.lock();
        writer.changed |= !writer.next.synced;
        writer.next.synced = true;
    }

    /// Makes the collected changes visible. Returns whether there were any.
    pub fn publish(&self) -> bool {
        let mut writer = self.writer.lock();
        writer.rebuild();
        if !std::mem::take(&mut writer.changed) {
            return false;
        }
        writer.next.generation += 1;
        let generation = writer.next.generation;
        self.current.store(Arc::new(writer.next.clone()));
        // Under the lock, so that watchers see generations in order.
        self.generation.send_replace(generation);
        true
    }
}

impl Writer {
    fn remove_slice(&mut self, name: &ServiceName) {
        let Some(owner) = self.slice_owner.remove(name) else { return };
        if let Some(slices) = self.slices.get_mut(&owner) {
            slices.remove(&name.name);
            if slices.is_empty() {
                self.slices.remove(&owner);
            }
        }
        self.dirty_services.insert(owner);
    }

    /// What is known of the endpoints at some addresses is another now.
    fn endpoints_changed(&mut self, addresses: impl IntoIterator<Item = IpAddr>) {
        for ip in addresses {
            self.dirty_services.extend(self.next.services_of_endpoint(ip).map(|service| service.name.clone()));
        }
    }

    fn rebuild(&mut self) {
        for name in std::mem::take(&mut self.dirty_services) {
            let new = self.services.get(&name).map(|service| self.with_endpoints(service));
            let old = self.next.service_named(&name);
            if old.map(|old| &**old) != new.as_ref() {
                self.next.set_service(&name, new.map(Arc::new));
                self.changed = true;
            }
        }
        for name in std::mem::take(&mut self.dirty_nodes) {
            let new = self
                .nodes
                .get(&name)
                .map(|node| Node { peers: self.peers.get(&name).cloned().unwrap_or_default(), ..node.clone() });
            if self.next.node(&name).map(|old| &**old) != new.as_ref() {
                self.next.set_node(&name, new.map(Arc::new));
                self.changed = true;
            }
        }
        self.interner.prune();
    }

    /// A Service with the endpoints of its slices, merged: each address and port of a node once, the ready one if slices
    /// disagree.
    fn with_endpoints(&self, service: &Service) -> Service {
        let slices = || self.slices.get(&service.name).into_iter().flat_map(|slices| slices.values());
        let with_ports = |port: &Arc<ServicePort>| {
            let of_port = slices()
                .flat_map(|slice| slice.ports.iter())
                .filter(|(name, protocol, _)| *name == port.name && *protocol == port.protocol)
                .flat_map(|(_, protocol, endpoints)| endpoints.iter().map(|e| self.as_seen(e, Some(*protocol))));
            Arc::new(ServicePort { endpoints: merged(of_port, true), ..ServicePort::clone(port) })
        };
        let hosts = if service.is_headless() {
            let of_ports = slices().flat_map(|slice| {
                let ports = slice.ports.iter();
                ports.flat_map(|(_, protocol, endpoints)| endpoints.iter().map(|e| self.as_seen(e, Some(*protocol))))
            });
            let portless = slices().flat_map(|slice| slice.portless.iter().map(|e| self.as_seen(e, None)));
            // Pods in their node's network share its address, each with a host name of its own.
            let mut by_host_name: BTreeMap<Option<Arc<str>>, Vec<Arc<Endpoint>>> = BTreeMap::new();
            for endpoint in of_ports.chain(portless) {
                by_host_name.entry(endpoint.hostname.clone()).or_default().push(endpoint);
            }
            by_host_name.into_values().flat_map(|endpoints| merged(endpoints.into_iter(), false)).collect()
        } else {
            Vec::new()
        };
        Service { ports: service.ports.iter().map(with_ports).collect(), hosts, ..service.clone() }
    }

    /// An endpoint with what this node knows of it itself.
    fn as_seen(&self, endpoint: &Arc<Endpoint>, protocol: Option<Protocol>) -> Arc<Endpoint> {
        let mut endpoint = self.observed.applied(endpoint, protocol);
        if protocol == Some(Protocol::Tcp) && self.silent.contains(&SocketAddr::new(endpoint.address, endpoint.port)) {
            Arc::make_mut(&mut endpoint).silent = true;
        }
        endpoint
    }
}

fn merged(endpoints: impl Iterator<Item = Arc<Endpoint>>, by_port: bool) -> Vec<Arc<Endpoint>> {
    let mut all: Vec<Arc<Endpoint>> = endpoints.collect();
    let place = |e: &Endpoint| (e.address, if by_port { e.port } else { 0 });
    // Nodes of two networks may have the same address: what listens there on the one is not what does on the other.
    let same_node = |one: &Endpoint, other: &Endpoint| !by_port || one.node == other.node;
    all.sort_by(|one, other| {
        let by_place = place(one).cmp(&place(other));
        let by_node = || if by_port { one.node.cmp(&other.node) } else { Ordering::Equal };
        by_place.then_with(by_node).then_with(|| (!one.ready, !one.serving).cmp(&(!other.ready, !other.serving)))
    });
    all.dedup_by(|one, other| place(one) == place(other) && same_node(one, other));
    all
}
