//! What callers outside of the node reach at its NodePorts, and at external and load-balancer addresses: packets that come
//! from elsewhere, for which no socket here connects (Kubernetes, "Virtual IPs and Service Proxies": traffic policies).

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use edgemesh_mesh::{
    Catalog,
    choice::Call,
    cidr::Cidr,
    model::{Service, ServicePort},
};

use super::plan::{self, Frontend, Surroundings, Target};

/// Where a frontend leads for callers from outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OutsideTarget {
    /// As for callers on the node.
    Target(Target),
    /// Packets vanish: with `externalTrafficPolicy: Local` and no endpoint here, load balancers must try another node.
    Drop,
    /// From these ranges alone, on this node as well as outside (`loadBalancerSourceRanges`): elsewhere packets vanish, and all
    /// of them without a target.
    Within(Vec<Cidr>, Option<Target>),
}

impl OutsideTarget {
    /// Where packets go that don't vanish.
    pub(super) fn target(&self) -> Option<&Target> {
        match self {
            Self::Target(target) | Self::Within(_, Some(target)) => Some(target),
            Self::Drop | Self::Within(_, None) => None,
        }
    }
}

/// All frontends for callers from outside. The unspecified address stands for all of the host's own: those of NodePorts.
pub type OutsidePlan = BTreeMap<Frontend, OutsideTarget>;

/// The addresses that stand for all of the host's own.
pub(super) const OWN: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)];

/// What is served to callers from outside.
pub fn plan(catalog: &Catalog, surroundings: Surroundings<'_>) -> OutsidePlan {
    let mut plan = OutsidePlan::new();
    for service in catalog.services() {
        let owned = service.external_ips.iter().filter(|ip| surroundings.host_addresses.contains(ip));
        let balanced = service.load_balancer_ips.iter().map(|ip| (ip, service.load_balancer_sources.as_ref()));
        for (&ip, sources) in owned.map(|ip| (ip, None)).chain(balanced) {
            // A cluster address is its Service's, whatever another one claims.
            if catalog.service_at(ip).is_some() {
                continue;
            }
            for port in service.carried_ports() {
                let frontend = Frontend { address: SocketAddr::new(ip, port.port), protocol: port.protocol };
                let target = match (target(catalog, surroundings, port, ip), sources) {
                    (target, None) => target,
                    (target, Some(sources)) => OutsideTarget::Within(sources.clone(), target.target().cloned()),
                };
                plan.insert(frontend, target);
            }
        }
    }
    for (&(port, protocol), service_port) in catalog.node_ports() {
        for ip in OWN {
            let frontend = Frontend { address: SocketAddr::new(ip, port), protocol };
            if let Some(target) = node_port_target(catalog, surroundings, service_port, ip) {
                plan.insert(frontend, target);
            }
        }
    }
    plan
}

/// The node ports of the Services that changed, each with where it leads now. External addresses are left out: where
/// they are concerned, a plan in full is made.
pub(super) fn changed(
    catalog: &Catalog,
    older: &Catalog,
    surroundings: Surroundings<'_>,
) -> Vec<(Frontend, Option<OutsideTarget>)> {
    let mut concerned = BTreeSet::new();
    for name in catalog.changed_services(older) {
        for service in [older.service_named(&name), catalog.service_named(&name)].into_iter().flatten() {
            concerned.extend(service.ports.iter().filter_map(|port| Some((port.node_port?, port.protocol))));
        }
    }
    let mut wanted = Vec::with_capacity(2 * concerned.len());
    for (port, protocol) in concerned {
        let service_port = catalog.node_port(port, protocol);
        for ip in OWN {
            let target = service_port.and_then(|found| node_port_target(catalog, surroundings, found, ip));
            wanted.push((Frontend { address: SocketAddr::new(ip, port), protocol }, target));
        }
    }
    wanted
}

/// A NodePort is there in the families that its Service has.
fn node_port_target(
    catalog: &Catalog,
    surroundings: Surroundings<'_>,
    port: &ServicePort,
    own: IpAddr,
) -> Option<OutsideTarget> {
    let of_family = |service: &Service| service.cluster_ips.iter().any(|ip| ip.is_ipv4() == own.is_ipv4());
    let service = catalog.service_named(&port.service)?;
    of_family(service).then(|| target(catalog, surroundings, port, own))
}

fn target(catalog: &Catalog, surroundings: Surroundings<'_>, port: &ServicePort, called: IpAddr) -> OutsideTarget {
    let call = Call { family: Some(called.into()), external: true, from_outside: true };
    let target = plan::target_of(catalog, surroundings, port, call);
    let local = catalog.service_named(&port.service).is_some_and(|service| service.external_traffic_local);
    if local && target == Target::Refuse { OutsideTarget::Drop } else { OutsideTarget::Target(target) }
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, sync::Arc};

    use edgemesh_mesh::{CatalogStore, Viewpoint, model::Protocol};
    use serde_json::{Value, json};

    use super::*;
    use crate::node_local::{Allocator, Ipv4Range};

    fn cluster(service: &Value) -> Arc<CatalogStore> {
        let store = CatalogStore::new();
        for (name, network) in [("a1", "site-a"), ("a2", "site-a"), ("b1", "site-b")] {
            let node = json!({"metadata": {"name": name, "labels": {"edgemesh.dev/network": network}},
                "status": {"conditions": [{"type": "Ready", "status": "True"}]}});
            store.apply_node(&serde_json::from_value(node).unwrap());
        }
        store.apply_service(&serde_json::from_value(service.clone()).unwrap());
        store
    }

    fn endpoints(store: &CatalogStore, endpoints: &Value) {
        let slice = json!({"metadata": {"name": "web", "namespace": "d", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4", "ports": [{"port": 8080}], "endpoints": endpoints});
        store.apply_endpoint_slice(&serde_json::from_value(slice).unwrap());
        store.publish();
    }

    fn at(address: &str) -> Frontend {
        Frontend { address: address.parse().unwrap(), protocol: Protocol::Tcp }
    }

    fn direct(backend: &str) -> OutsideTarget {
        OutsideTarget::Target(Target::Direct(vec![backend.parse().unwrap()]))
    }

    fn service(policy: &str) -> Value {
        json!({"metadata": {"name": "web", "namespace": "d"},
            "spec": {"clusterIP": "10.96.0.20", "type": "LoadBalancer", "externalTrafficPolicy": policy,
                     "externalIPs": ["192.168.1.11", "203.0.113.9"], "ports": [{"port": 80, "nodePort": 30080}]},
            "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.7"}]}}})
    }

    fn plan_at(store: &CatalogStore) -> OutsidePlan {
        let catalog = store.snapshot();
        let viewpoint = Viewpoint::of(&catalog, "a1");
        let host_addresses = HashSet::from(["192.168.1.11".parse().unwrap()]);
        let allocator = Allocator::in_memory(Ipv4Range::default());
        let surroundings =
            Surroundings { viewpoint: &viewpoint, allocator: &allocator, host_addresses: &host_addresses, dns: &[] };
        plan(&catalog, surroundings)
    }

    #[test]
    fn the_cluster_policy_leads_to_endpoints_elsewhere_and_the_local_one_drops() {
        let remote = json!([{"addresses": ["10.244.2.5"], "nodeName": "a2"}]);
        let all = ["0.0.0.0:30080", "192.168.1.11:80", "203.0.113.7:80"];
        let store = cluster(&service("Cluster"));
        endpoints(&store, &remote);
        let plan = plan_at(&store);
        assert_eq!(plan.len(), 3, "{plan:?}");
        assert!(all.iter().all(|frontend| plan[&at(frontend)] == direct("10.244.2.5:8080")), "{plan:?}");
        endpoints(&store, &json!([]));
        assert_eq!(plan_at(&store)[&at(all[0])], OutsideTarget::Target(Target::Refuse));
        endpoints(&store, &json!([{"addresses": ["10.244.3.5"], "nodeName": "b1"}]));
        let plan = plan_at(&store);
        assert!(matches!(plan[&at(all[0])], OutsideTarget::Target(Target::Listener(_))), "{plan:?}");

        let store = cluster(&service("Local"));
        endpoints(&store, &remote);
        let plan = plan_at(&store);
        assert!(all.iter().all(|frontend| plan[&at(frontend)] == OutsideTarget::Drop), "{plan:?}");
    }

    #[test]
    fn source_ranges_hold_for_addresses_of_the_load_balancer_alone() {
        let ranges = vec![Cidr::parse("198.51.100.0/24").unwrap()];
        for (policy, target) in
            [("Cluster", Some(Target::Direct(vec!["10.244.2.5:8080".parse().unwrap()]))), ("Local", None)]
        {
            let mut service = service(policy);
            service["spec"]["loadBalancerSourceRanges"] = json!(["198.51.100.0/24"]);
            let store = cluster(&service);
            endpoints(&store, &json!([{"addresses": ["10.244.2.5"], "nodeName": "a2"}]));
            let plan = plan_at(&store);
            assert_eq!(plan[&at("203.0.113.7:80")], OutsideTarget::Within(ranges.clone(), target));
            for others in ["0.0.0.0:30080", "192.168.1.11:80"] {
                assert!(!matches!(plan[&at(others)], OutsideTarget::Within(..)), "{others}");
            }
        }
    }

    #[test]
    fn the_local_policy_takes_endpoints_of_this_node_and_terminating_ones_when_there_are_no_others() {
        let store = cluster(&service("Local"));
        let remote = json!({"addresses": ["10.244.2.5"], "nodeName": "a2"});
        let terminating = json!({"addresses": ["10.244.1.6"], "nodeName": "a1",
            "conditions": {"ready": false, "serving": true, "terminating": true}});
        endpoints(&store, &json!([remote, terminating, {"addresses": ["10.244.1.5"], "nodeName": "a1"}]));
        assert_eq!(plan_at(&store)[&at("0.0.0.0:30080")], direct("10.244.1.5:8080"));
        endpoints(&store, &json!([remote, terminating]));
        assert_eq!(plan_at(&store)[&at("0.0.0.0:30080")], direct("10.244.1.6:8080"));
    }

    #[test]
    fn what_changes_at_node_ports_is_planned_alone() {
        let store = cluster(&service("Cluster"));
        endpoints(&store, &json!([{"addresses": ["10.244.1.5"], "nodeName": "a1"}]));
        let older = store.snapshot();
        store.apply_service(
            &serde_json::from_value(
                json!({"metadata": {"name": "web", "namespace": "d"}, "spec": {"clusterIP": "10.96.0.20",
            "type": "NodePort", "ports": [{"port": 80, "nodePort": 30081}]}}),
            )
            .unwrap(),
        );
        store.publish();
        let catalog = store.snapshot();
        let viewpoint = Viewpoint::of(&catalog, "a1");
        let allocator = Allocator::in_memory(Ipv4Range::default());
        let none = HashSet::new();
        let surroundings =
            Surroundings { viewpoint: &viewpoint, allocator: &allocator, host_addresses: &none, dns: &[] };
        let changed: BTreeMap<_, _> = changed(&catalog, &older, surroundings).into_iter().collect();
        assert_eq!(changed[&at("0.0.0.0:30080")], None);
        assert_eq!(changed[&at("0.0.0.0:30081")], Some(direct("10.244.1.5:8080")));
        assert_eq!(changed[&at("[::]:30081")], None, "the Service has no IPv6 address");
    }
}
