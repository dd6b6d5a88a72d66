//! From the catalog to what the datapath must do: every Service address with where it leads, as seen from one node.

use std::{
    collections::{BTreeMap, HashSet},
    hash::{Hash, Hasher},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use edgemesh_ebpf_abi::MAX_AFFINITY_BACKENDS;
use edgemesh_mesh::{
    catalog::Catalog,
    choice::{Call, IpFamily, Tier, Viewpoint},
    model::{Endpoint, Protocol, ServicePort},
};

use crate::node_local::{Allocator, AllocatorError, ServicePortName};

/// Port of cluster DNS at its cluster address, UDP and TCP.
pub const DNS_PORT: u16 = 53;

/// An address at which a Service port is called on this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Frontend {
    /// Address and port. Port 0 stands for all ports without a frontend of their own.
    pub address: SocketAddr,
    /// Protocol.
    pub protocol: Protocol,
}

/// Where a frontend leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// To endpoints that are reached by their own addresses.
    Direct(Vec<SocketAddr>),
    /// As `Direct`, and a client keeps its endpoint until it has not called for the timeout.
    Sticky(Vec<SocketAddr>, Duration),
    /// To a listener of the agent.
    Listener(SocketAddr),
    /// Nowhere: there is no endpoint, and connections are refused.
    Refuse,
}

impl Target {
    /// The addresses to which sockets are sent; none to refuse them.
    pub fn backends(&self) -> &[SocketAddr] {
        match self {
            Self::Direct(backends) | Self::Sticky(backends, _) => backends,
            Self::Listener(listener) => std::slice::from_ref(listener),
            Self::Refuse => &[],
        }
    }

    /// How long a client that does not call keeps its endpoint, if it does at all.
    pub fn affinity(&self) -> Option<Duration> {
        match self {
            Self::Sticky(_, timeout) => Some(*timeout),
            _ => None,
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
    /// Addresses of this host's interfaces.
    pub host_addresses: &'a HashSet<IpAddr>,
    /// The cluster DNS addresses, each with the listener that answers for it.
    pub dns: &'a [ClusterDns],
}

/// A cluster DNS address, and the listener that answers for it. Both are of one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClusterDns {
    /// What pods have in resolv.conf, with the port.
    pub address: SocketAddr,
    /// Where the agent answers.
    pub listener: SocketAddr,
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
    let Surroundings { viewpoint, allocator, host_addresses, dns } = surroundings;
    let mut plan = Plan::new();
    // First, so that nothing that a Service claims takes a cluster address or a node port from another one.
    for service in catalog.services() {
        // An address that the host doesn't have would let whoever may write Services take traffic to it (CVE-2020-8554).
        // Those of load balancers are written by whom the cluster trusts with it.
        let owned = service.external_ips.iter().filter(|ip| host_addresses.contains(ip));
        for &ip in owned.chain(&service.load_balancer_ips) {
            for port in service.carried_ports() {
                let target = target(catalog, surroundings, port, ip, true);
                plan.insert(Frontend { address: SocketAddr::new(ip, port.port), protocol: port.protocol }, target);
            }
        }
    }
    for (&(ip, port, protocol), service_port) in catalog.vips() {
        let target = target(catalog, surroundings, service_port, ip, false);
        plan.insert(Frontend { address: SocketAddr::new(ip, port), protocol }, target);
        if is_ours(catalog, ip) {
            close_other_ports(&mut plan, ip);
        }
    }
    let node_addresses: Vec<IpAddr> = own_addresses(catalog, &viewpoint.node);
    for (&(port, protocol), service_port) in catalog.node_ports() {
        for &ip in &node_addresses {
            let target = target(catalog, surroundings, service_port, ip, true);
            plan.insert(Frontend { address: SocketAddr::new(ip, port), protocol }, target);
        }
    }
    for &ClusterDns { address, listener } in dns {
        // Also when the cluster runs a DNS Service at that address: pods must find names without it.
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            plan.insert(Frontend { address, protocol }, Target::Listener(listener));
        }
        close_other_ports(&mut plan, address.ip());
    }
    // Which Service ports there are is not known from half a catalog.
    if catalog.is_synced() && allocator.is_short() {
        allocator.retire(&live(catalog));
    }
    plan
}

/// All Service ports.
fn live(catalog: &Catalog) -> HashSet<ServicePortName> {
    catalog.services().flat_map(|service| service.ports.iter()).map(|port| (&**port).into()).collect()
}

/// Allots a node-local address. If none is left, those of Service ports that are gone are taken back first.
fn allot<A>(
    catalog: &Catalog,
    allocator: &Allocator,
    address: impl Fn() -> Result<A, AllocatorError>,
) -> Result<A, AllocatorError> {
    address().or_else(|full| {
        let freed = catalog.is_synced() && allocator.retire_once(catalog.generation(), || live(catalog));
        if freed { address() } else { Err(full) }
    })
}

/// Where one frontend leads, as [`plan`] says, at addresses that are not external; nothing if there is no such frontend.
pub(super) fn target_at(
    catalog: &Catalog,
    surroundings: Surroundings<'_>,
    own_addresses: &[IpAddr],
    frontend: Frontend,
) -> Option<Target> {
    let Frontend { address, protocol } = frontend;
    let (ip, port) = (address.ip(), address.port());
    for dns in surroundings.dns {
        if dns.address == address {
            return Some(Target::Listener(dns.listener));
        }
        if dns.address.ip() == ip && port == 0 {
            return Some(Target::Refuse);
        }
    }
    if port == 0 {
        return is_ours(catalog, ip).then_some(Target::Refuse);
    }
    if own_addresses.contains(&ip)
        && let Some(service_port) = catalog.node_port(port, protocol)
    {
        return Some(target(catalog, surroundings, service_port, ip, true));
    }
    catalog.port_at(ip, port, protocol).map(|service_port| target(catalog, surroundings, service_port, ip, false))
}

/// Whether a cluster address is one of a Service that the mesh carries.
fn is_ours(catalog: &Catalog, ip: IpAddr) -> bool {
    catalog.service_at(ip).is_some_and(|service| !service.carried_ports().is_empty())
}

/// What is sent to a port that a Service doesn't have would leave the node and wait for an answer that never comes.
fn close_other_ports(plan: &mut Plan, ip: IpAddr) {
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        plan.insert(Frontend { address: SocketAddr::new(ip, 0), protocol }, Target::Refuse);
    }
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

/// Where a Service port leads that is called at an address: to endpoints of that address' family.
fn target(
    catalog: &Catalog,
    surroundings: Surroundings<'_>,
    port: &ServicePort,
    called: IpAddr,
    external: bool,
) -> Target {
    target_of(catalog, surroundings, port, Call { family: Some(called.into()), external, from_outside: false })
}

/// Where a Service port leads that is called in a certain way.
pub(super) fn target_of(catalog: &Catalog, surroundings: Surroundings<'_>, port: &ServicePort, call: Call) -> Target {
    let candidates = surroundings.viewpoint.candidates_for(catalog, port, call);
    if candidates.endpoints.is_empty() {
        return Target::Refuse;
    }
    if candidates.tier <= Tier::Network {
        let address = |endpoint: &Arc<Endpoint>| SocketAddr::new(endpoint.address, endpoint.port);
        let mut backends: Vec<SocketAddr> = candidates.endpoints.iter().map(address).collect();
        // Two Node objects can stand for one machine.
        backends.dedup();
        let affinity = catalog.service_named(&port.service).and_then(|service| service.client_ip_affinity);
        return match affinity {
            Some(timeout) => Target::Sticky(few(backends, &surroundings.viewpoint.node), timeout),
            None => Target::Direct(backends),
        };
    }
    let name = port.into();
    let allocator = surroundings.allocator;
    let listener = allot(catalog, allocator, || {
        if call.family != Some(IpFamily::V6) {
            allocator.listener(&name).map(|listener| Some(SocketAddr::V4(listener)))
        } else {
            allocator.listener6(&name).map(|listener| listener.map(SocketAddr::V6))
        }
    });
    match listener {
        // A host without IPv6 has no sockets that could call there.
        Ok(listener) => listener.map_or(Target::Refuse, Target::Listener),
        Err(error) => {
            tracing::warn!(service = %ServicePortName::from(port), %error, "the Service port can't be reached");
            Target::Refuse
        }
    }
}

/// As many of the backends as clients with affinity can be kept at, in their order. Each node takes others, by rendezvous hashing:
/// together they use all, and a node keeps most of its own when some come or go.
fn few(backends: Vec<SocketAddr>, node: &str) -> Vec<SocketAddr> {
    let most = usize::from(MAX_AFFINITY_BACKENDS);
    if backends.len() <= most {
        return backends;
    }
    let weight = |backend: &SocketAddr| {
        // Fixed keys, so that the next agent keeps the clients of this one.
        #[allow(deprecated)]
        let mut hasher = std::hash::SipHasher::new();
        (node, backend).hash(&mut hasher);
        hasher.finish()
    };
    let mut weights: Vec<u64> = backends.iter().map(weight).collect();
    let (_, least, _) = weights.select_nth_unstable_by(most - 1, |one, other| other.cmp(one));
    let least = *least;
    backends.into_iter().filter(|backend| weight(backend) >= least).take(most).collect()
}

/// The addresses of this node at which its NodePorts are called from the node itself. As with kube-proxy, `::1` is not.
pub(super) fn own_addresses(catalog: &Catalog, node: &str) -> Vec<IpAddr> {
    let of_node = catalog.node(node).into_iter().flat_map(|node| node.addresses.iter().copied());
    [IpAddr::V4(Ipv4Addr::LOCALHOST)].into_iter().chain(of_node).collect()
}

#[cfg(test)]
mod tests {
    use edgemesh_mesh::{CatalogStore, model::ServiceName};
    use k8s_openapi::api::{
        core::v1::{Node, Service},
        discovery::v1::EndpointSlice,
    };
    use serde_json::{Value, json};

    use super::*;
    use crate::node_local::Ipv4Range;

    const VIP: &str = "10.96.0.20:80";

    /// Two nodes of site-a, one of site-b, and a Service with a NodePort.
    fn cluster() -> Arc<CatalogStore> {
        let store = CatalogStore::new();
        for (name, network, address) in
            [("a1", "site-a", "192.168.1.11"), ("a2", "site-a", "192.168.1.12"), ("b1", "site-b", "192.168.2.11")]
        {
            store.apply_node(&object::<Node>(json!({
                "metadata": {"name": name, "labels": {"edgemesh.dev/network": network}},
                "status": {"addresses": [{"type": "InternalIP", "address": address}],
                           "conditions": [{"type": "Ready", "status": "True"}]},
            })));
        }
        store.apply_service(&object::<Service>(json!({
            "metadata": {"name": "web", "namespace": "default"},
            "spec": {"clusterIP": "10.96.0.20", "clusterIPs": ["10.96.0.20"], "type": "NodePort",
                     "ports": [{"port": 80, "nodePort": 30080, "protocol": "TCP"}]},
        })));
        store
    }

    fn object<T: serde::de::DeserializeOwned>(value: Value) -> T {
        serde_json::from_value(value).unwrap()
    }

    /// Gives the Service endpoints: address, node, ready.
    fn endpoints(store: &CatalogStore, endpoints: &[(&str, &str, bool)]) {
        let endpoints: Vec<Value> = endpoints
            .iter()
            .map(|(address, node, ready)| {
                json!({"addresses": [address], "nodeName": node, "conditions": {"ready": ready}})
            })
            .collect();
        store.apply_endpoint_slice(&object::<EndpointSlice>(json!({
            "metadata": {"name": "web-1", "namespace": "default", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4", "ports": [{"port": 8080, "protocol": "TCP", "name": ""}], "endpoints": endpoints,
        })));
        store.publish();
    }

    fn plan_at(store: &CatalogStore, node: &str, allocator: &Allocator) -> Plan {
        let catalog = store.snapshot();
        let viewpoint = Viewpoint::of(&catalog, node);
        let host_addresses = HashSet::from(["192.168.1.11".parse().unwrap()]);
        plan(&catalog, Surroundings { viewpoint: &viewpoint, allocator, host_addresses: &host_addresses, dns: &[] })
    }

    fn service_of(allocator: &Allocator, listener: SocketAddr) -> Arc<ServicePortName> {
        let IpAddr::V4(ip) = listener.ip() else { panic!("{listener}") };
        allocator.service_of(ip).unwrap()
    }

    fn tcp(address: &str) -> Frontend {
        Frontend { address: address.parse().unwrap(), protocol: Protocol::Tcp }
    }

    fn direct(backends: &[&str]) -> Target {
        Target::Direct(backends.iter().map(|backend| backend.parse().unwrap()).collect())
    }

    #[test]
    fn near_endpoints_are_reached_directly_and_far_ones_through_the_agent() {
        let (store, allocator) = (cluster(), Allocator::in_memory(Ipv4Range::default()));
        let all = [("10.244.1.5", "a1", true), ("10.244.2.5", "a2", true), ("10.244.3.5", "b1", true)];
        endpoints(&store, &all);
        assert_eq!(plan_at(&store, "a1", &allocator)[&tcp(VIP)], direct(&["10.244.1.5:8080"]), "own node first");
        assert_eq!(plan_at(&store, "b1", &allocator)[&tcp(VIP)], direct(&["10.244.3.5:8080"]));
        endpoints(&store, &all[1..]);
        assert_eq!(plan_at(&store, "a1", &allocator)[&tcp(VIP)], direct(&["10.244.2.5:8080"]), "then own network");
        endpoints(&store, &all[2..]);
        let plan = plan_at(&store, "a1", &allocator);
        let Target::Listener(listener) = plan[&tcp(VIP)] else { panic!("{plan:?}") };
        assert_eq!(&*service_of(&allocator, listener).service.name, "web");
        endpoints(&store, &[("10.244.1.5", "a1", false)]);
        assert_eq!(plan_at(&store, "a1", &allocator)[&tcp(VIP)], Target::Refuse, "nothing is ready");
    }

    fn gone(number: usize) -> ServicePortName {
        ServicePortName {
            service: ServiceName { namespace: "default".into(), name: format!("gone{number}").into() },
            port: "".into(),
            protocol: Protocol::Tcp,
        }
    }

    #[test]
    fn addresses_are_taken_back_only_by_a_complete_catalog() {
        let (store, allocator) = (cluster(), Allocator::in_memory("169.254.64.0/28".parse().unwrap()));
        let held: Vec<_> = (0..12).map(|number| *allocator.listener(&gone(number)).unwrap().ip()).collect();
        let are_held = || held.iter().all(|ip| allocator.service_of(*ip).is_some());
        store.publish();
        plan_at(&store, "a1", &allocator);
        assert!(are_held(), "nobody knows yet which Services there are");
        store.mark_synced();
        store.publish();
        plan_at(&store, "a1", &allocator);
        assert!(!are_held());
    }

    #[test]
    fn service_ports_get_addresses_that_those_of_gone_ones_make_free() {
        let (store, allocator) = (cluster(), Allocator::in_memory("169.254.64.0/28".parse().unwrap()));
        for number in 0..8 {
            allocator.listener(&gone(number)).unwrap();
        }
        let ports: Vec<Value> = (0..8).map(|at| json!({"name": format!("p{at}"), "port": 80 + at})).collect();
        store.apply_service(&object::<Service>(json!({
            "metadata": {"name": "web", "namespace": "default"}, "spec": {"clusterIP": "10.96.0.20", "ports": ports},
        })));
        store.apply_endpoint_slice(&object::<EndpointSlice>(json!({
            "metadata": {"name": "web-1", "namespace": "default", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4", "ports": ports, "endpoints": [{"addresses": ["10.244.3.5"], "nodeName": "b1"}],
        })));
        store.mark_synced();
        store.publish();
        let plan = plan_at(&store, "a1", &allocator);
        let targets: Vec<&Target> = plan.iter().filter(|(at, _)| at.address.port() != 0).map(|(_, to)| to).collect();
        assert!(targets.len() == 8 && targets.iter().all(|to| matches!(to, Target::Listener(_))), "{targets:?}");
    }

    #[test]
    fn of_more_backends_than_clients_can_be_kept_at_each_node_takes_others_and_keeps_most_of_its_own() {
        let backend = |number: u8| SocketAddr::from(([10, 244, 1, number], 8080));
        let all: Vec<SocketAddr> = (0..200).map(backend).collect();
        assert_eq!(few(all[..64].to_vec(), "a1"), all[..64]);
        let (a1, a2) = (few(all.clone(), "a1"), few(all.clone(), "a2"));
        assert_eq!((a1.len(), a2.len()), (64, 64));
        assert!(a1.is_sorted() && a1 == few(all.clone(), "a1"));
        let common = |one: &[SocketAddr], other: &[SocketAddr]| one.iter().filter(|at| other.contains(at)).count();
        assert!(common(&a1, &a2) < 50, "chance gives 20: {a1:?} {a2:?}");
        let gone: Vec<SocketAddr> = all.iter().copied().filter(|at| *at != a1[7]).collect();
        assert_eq!(common(&a1, &few(gone, "a1")), 63);
        let together: HashSet<SocketAddr> = (0..30).flat_map(|node| few(all.clone(), &format!("n{node}"))).collect();
        assert_eq!(together.len(), all.len());
    }

    #[test]
    fn external_addresses_are_served_where_the_host_has_them_and_those_of_load_balancers_everywhere() {
        let (store, allocator) = (cluster(), Allocator::in_memory(Ipv4Range::default()));
        store.apply_service(&object::<Service>(json!({
            "metadata": {"name": "web", "namespace": "default"},
            "spec": {"clusterIP": "10.96.0.20", "type": "LoadBalancer", "internalTrafficPolicy": "Local",
                     "externalTrafficPolicy": "Local", "externalIPs": ["192.168.1.11", "203.0.113.99", "10.96.0.21"],
                     "ports": [{"port": 80, "protocol": "TCP"}]},
            "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.7"}, {"ip": "10.96.0.21"}]}},
        })));
        store.apply_service(&object::<Service>(json!({
            "metadata": {"name": "victim", "namespace": "default"},
            "spec": {"clusterIP": "10.96.0.21", "ports": [{"port": 80}]},
        })));
        endpoints(&store, &[("10.244.2.5", "a2", true)]);
        let plan = plan_at(&store, "a1", &allocator);
        let target = direct(&["10.244.2.5:8080"]);
        assert_eq!((&plan[&tcp("192.168.1.11:80")], &plan[&tcp("203.0.113.7:80")]), (&target, &target));
        assert!(!plan.contains_key(&tcp("203.0.113.99:80")), "not the host's");
        assert_eq!(plan[&tcp("10.96.0.21:80")], Target::Refuse, "another Service's cluster address");
        assert_eq!(plan[&tcp(VIP)], Target::Refuse, "internalTrafficPolicy holds for the cluster address");
        assert!(!plan.contains_key(&tcp("192.168.1.11:0")), "the host's other ports stay open");
    }

    #[test]
    fn session_affinity_is_part_of_where_a_frontend_leads() {
        let (store, allocator) = (cluster(), Allocator::in_memory(Ipv4Range::default()));
        endpoints(&store, &[("10.244.1.5", "a1", true)]);
        let before = plan_at(&store, "a1", &allocator);
        store.apply_service(&object::<Service>(json!({
            "metadata": {"name": "web", "namespace": "default"},
            "spec": {"clusterIP": "10.96.0.20", "type": "NodePort", "sessionAffinity": "ClientIP",
                     "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 7}},
                     "ports": [{"port": 80, "nodePort": 30080, "protocol": "TCP"}]},
        })));
        store.publish();
        let after = plan_at(&store, "a1", &allocator);
        let sticky = Target::Sticky(vec!["10.244.1.5:8080".parse().unwrap()], Duration::from_secs(7));
        assert_eq!((&after[&tcp(VIP)], &after[&tcp("192.168.1.11:30080")]), (&sticky, &sticky));
        assert_eq!(changes(&before, &after).len(), 3, "written anew");
    }

    #[test]
    fn node_ports_are_called_at_the_nodes_own_addresses() {
        let (store, allocator) = (cluster(), Allocator::in_memory(Ipv4Range::default()));
        endpoints(&store, &[("10.244.1.5", "a1", true)]);
        let plan = plan_at(&store, "a1", &allocator);
        let frontends: Vec<String> = plan.keys().map(Frontend::to_string).collect();
        let closed = ["10.96.0.20:0/tcp", "10.96.0.20:0/udp"];
        let called = ["10.96.0.20:80/tcp", "127.0.0.1:30080/tcp", "192.168.1.11:30080/tcp"];
        assert_eq!(frontends, [closed.as_slice(), called.as_slice()].concat());
        for (frontend, target) in &plan {
            let expected = if frontend.address.port() == 0 { Target::Refuse } else { direct(&["10.244.1.5:8080"]) };
            assert_eq!(*target, expected, "{frontend}");
        }
    }

    #[test]
    fn an_address_leads_to_endpoints_of_its_own_family() {
        let (store, allocator) = (cluster(), Allocator::in_memory(Ipv4Range::default()));
        store.apply_service(&object::<Service>(json!({
            "metadata": {"name": "web", "namespace": "default"},
            "spec": {"clusterIP": "10.96.0.20", "clusterIPs": ["10.96.0.20", "fd00:96::20"],
                     "ipFamilies": ["IPv4", "IPv6"], "ports": [{"port": 80}]},
        })));
        endpoints(&store, &[("10.244.2.5", "a2", true), ("10.244.1.5", "a1", true)]);
        let six = |endpoints: &[(&str, &str)]| {
            let endpoints: Vec<Value> = endpoints
                .iter()
                .map(|(address, node)| json!({"addresses": [address], "nodeName": node, "conditions": {"ready": true}}))
                .collect();
            store.apply_endpoint_slice(&object::<EndpointSlice>(json!({
                "metadata": {"name": "web-6", "namespace": "default", "labels": {"kubernetes.io/service-name": "web"}},
                "addressType": "IPv6", "ports": [{"port": 8080, "name": ""}], "endpoints": endpoints,
            })));
            store.publish();
        };
        let (four, sixth) = (tcp(VIP), tcp("[fd00:96::20]:80"));
        six(&[("fd00:2::5", "a2")]);
        let plan = plan_at(&store, "a1", &allocator);
        assert_eq!(plan[&four], direct(&["10.244.1.5:8080"]));
        assert_eq!(plan[&sixth], direct(&["[fd00:2::5]:8080"]), "the nearest IPv6 one, though an IPv4 one is nearer");
        assert_eq!(plan[&tcp("[fd00:96::20]:0")], Target::Refuse);
        six(&[("fd00:3::5", "b1")]);
        assert_eq!(plan_at(&store, "a1", &allocator)[&sixth], Target::Refuse, "a host without IPv6");
        let allocator = allocator.with_ipv6(crate::node_local::Ipv6Range::default());
        let plan = plan_at(&store, "a1", &allocator);
        let Target::Listener(listener) = plan[&sixth] else { panic!("{plan:?}") };
        assert!(listener.is_ipv6());
        assert_eq!(&*allocator.service_of(listener.ip()).unwrap().service.name, "web");
        six(&[]);
        assert_eq!(plan_at(&store, "a1", &allocator)[&sixth], Target::Refuse);
    }

    #[test]
    fn the_cluster_dns_address_leads_to_this_node_whatever_service_has_it() {
        let (store, allocator) = (cluster(), Allocator::in_memory(Ipv4Range::default()));
        store.apply_service(&object::<Service>(json!({
            "metadata": {"name": "kube-dns", "namespace": "kube-system"},
            "spec": {"clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10"],
                     "ports": [{"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "metrics", "port": 9153}]},
        })));
        store.publish();
        let (address, listener) = ("10.96.0.10:53".parse().unwrap(), "169.254.64.1:53".parse().unwrap());
        let catalog = store.snapshot();
        let viewpoint = Viewpoint::of(&catalog, "a1");
        let plan = plan(
            &catalog,
            Surroundings {
                viewpoint: &viewpoint,
                allocator: &allocator,
                host_addresses: &HashSet::new(),
                dns: &[ClusterDns { address, listener }],
            },
        );
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            assert_eq!(plan[&Frontend { address, protocol }], Target::Listener(listener));
        }
        assert_eq!(plan[&tcp("10.96.0.10:9153")], Target::Refuse, "the Service's other ports are its own");
    }

    #[test]
    fn only_what_differs_is_changed_and_what_is_new_comes_first() {
        let (store, allocator) = (cluster(), Allocator::in_memory(Ipv4Range::default()));
        endpoints(&store, &[("10.244.1.5", "a1", true)]);
        let before = plan_at(&store, "a1", &allocator);
        assert!(changes(&before, &before).is_empty());
        store.apply_service(&object::<Service>(json!({
            "metadata": {"name": "web", "namespace": "default"},
            "spec": {"clusterIP": "10.96.0.20", "clusterIPs": ["10.96.0.20"], "type": "NodePort",
                     "ports": [{"port": 81, "nodePort": 30080, "protocol": "TCP"}]},
        })));
        store.publish();
        let after = plan_at(&store, "a1", &allocator);
        let target = direct(&["10.244.1.5:8080"]);
        let expected = [
            Change { frontend: tcp("10.96.0.20:81"), target: Some(&target) },
            Change { frontend: tcp(VIP), target: None },
        ];
        assert_eq!(changes(&before, &after), expected);
    }
}
