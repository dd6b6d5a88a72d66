//! Plans again after a change of the catalog: only the frontends of what changed, where nothing else matters to them.

use std::{
    collections::{BTreeSet, HashSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use edgemesh_mesh::{
    Catalog, Viewpoint,
    model::{Protocol, Service, ServicePort},
};

use super::plan::{self, ClusterDns, Frontend, Plan, Surroundings, Target};

/// What must be in force.
#[derive(Debug)]
pub enum Wanted {
    /// Exactly this.
    All(Plan),
    /// This, and the rest as it is. What is to be set comes before what is to be removed.
    Some(Vec<(Frontend, Option<Target>)>),
}

/// Remembers from what was planned last.
#[derive(Debug, Default)]
pub struct Planner {
    last: Option<Last>,
}

#[derive(Debug)]
struct Last {
    catalog: Arc<Catalog>,
    viewpoint: Viewpoint,
    host_addresses: HashSet<IpAddr>,
    dns: Vec<ClusterDns>,
    /// Frontends at external addresses, which no index of the catalog leads to.
    external: HashSet<Frontend>,
}

impl Planner {
    /// Plans for a catalog: in full the first time, when nodes moved or surroundings changed, where external addresses are
    /// concerned, and while node-local addresses are short, which a plan in full takes back; else what the Services that changed have to do with.
    pub fn plan(&mut self, catalog: &Arc<Catalog>, surroundings: Surroundings<'_>) -> Wanted {
        if let Some(some) = self.last.as_ref().and_then(|last| last.changed(catalog, surroundings)) {
            if let Some(last) = &mut self.last {
                last.catalog = Arc::clone(catalog);
            }
            return Wanted::Some(some);
        }
        let all = plan::plan(catalog, surroundings);
        self.last = Some(Last {
            catalog: Arc::clone(catalog),
            viewpoint: surroundings.viewpoint.clone(),
            host_addresses: surroundings.host_addresses.clone(),
            dns: surroundings.dns.to_vec(),
            external: catalog.services().flat_map(|service| external(service).map(|(at, _)| at)).collect(),
        });
        Wanted::All(all)
    }

    /// Has the next plan made in full: something that was planned is not in force.
    pub fn forget(&mut self) {
        self.last = None;
    }
}

impl Last {
    /// The frontends of Services that changed since; nothing if the rest may be concerned too.
    fn changed(&self, catalog: &Catalog, surroundings: Surroundings<'_>) -> Option<Vec<(Frontend, Option<Target>)>> {
        let Surroundings { viewpoint, host_addresses, dns, allocator } = surroundings;
        if self.viewpoint != *viewpoint
            || self.host_addresses != *host_addresses
            || self.dns != dns
            || allocator.is_short()
            || catalog.places_changed(&self.catalog)
        {
            return None;
        }
        let own_addresses = plan::own_addresses(catalog, &viewpoint.node);
        let mut concerned = BTreeSet::new();
        for name in catalog.changed_services(&self.catalog) {
            for service in [self.catalog.service_named(&name), catalog.service_named(&name)].into_iter().flatten() {
                if external(service).next().is_some() {
                    return None;
                }
                concerned.extend(frontends(service, &own_addresses));
            }
        }
        if concerned.iter().any(|frontend| self.external.contains(frontend)) {
            return None;
        }
        let mut wanted = Vec::with_capacity(concerned.len());
        for frontend in concerned {
            wanted.push((frontend, plan::target_at(catalog, surroundings, &own_addresses, frontend)));
        }
        wanted.sort_by_key(|(_, target)| target.is_none());
        Some(wanted)
    }
}

/// The frontends that a Service has at cluster addresses and node ports.
pub(super) fn frontends(service: &Service, own_addresses: &[IpAddr]) -> Vec<Frontend> {
    let mut frontends = Vec::new();
    for &ip in &service.cluster_ips {
        let at = |port, protocol| Frontend { address: SocketAddr::new(ip, port), protocol };
        frontends.extend(service.ports.iter().map(|port| at(port.port, port.protocol)));
        frontends.extend([Protocol::Tcp, Protocol::Udp].map(|protocol| at(0, protocol)));
    }
    for port in &service.ports {
        let Some(node_port) = port.node_port else { continue };
        let at = |&ip: &IpAddr| Frontend { address: SocketAddr::new(ip, node_port), protocol: port.protocol };
        frontends.extend(own_addresses.iter().map(at));
    }
    frontends
}

/// The frontends that a Service may have at external addresses, with the port behind each.
pub(super) fn external(service: &Service) -> impl Iterator<Item = (Frontend, &Arc<ServicePort>)> {
    service.external_ips.iter().chain(&service.load_balancer_ips).flat_map(|&ip| {
        let at = move |address, protocol| Frontend { address: SocketAddr::new(ip, address), protocol };
        service.ports.iter().map(move |port| (at(port.port, port.protocol), port))
    })
}

#[cfg(test)]
mod tests {
    use edgemesh_mesh::{CatalogStore, model::ServiceName};
    use serde_json::{Value, json};

    use super::*;
    use crate::node_local::{Allocator, Ipv4Range, ServicePortName};

    fn apply(store: &CatalogStore, kind: &str, object: Value) {
        match kind {
            "Service" => store.apply_service(&serde_json::from_value(object).unwrap()),
            "Node" => store.apply_node(&serde_json::from_value(object).unwrap()),
            "MeshNode" => store.apply_mesh_node(&serde_json::from_value(object).unwrap()),
            _ => store.apply_endpoint_slice(&serde_json::from_value(object).unwrap()),
        }
    }

    fn node(name: &str, network: &str, address: &str) -> Value {
        json!({"metadata": {"name": name, "labels": {"edgemesh.dev/network": network}},
               "status": {"addresses": [{"type": "InternalIP", "address": address}],
                          "conditions": [{"type": "Ready", "status": "True"}]}})
    }

    fn service(name: &str, ip: &str, ports: Value) -> Value {
        json!({"metadata": {"name": name, "namespace": "d"}, "spec": {"clusterIP": ip, "ports": ports}})
    }

    fn slice(service: &str, endpoints: &[(&str, &str)]) -> Value {
        let endpoints: Vec<Value> =
            endpoints.iter().map(|(address, node)| json!({"addresses": [address], "nodeName": node})).collect();
        json!({"metadata": {"name": service, "namespace": "d", "labels": {"kubernetes.io/service-name": service}},
               "addressType": "IPv4", "ports": [{"port": 8080, "name": ""}], "endpoints": endpoints})
    }

    #[test]
    fn what_changes_leads_to_the_same_as_a_plan_in_full() {
        let store = CatalogStore::new();
        store.mark_synced();
        apply(&store, "Node", node("a1", "site-a", "192.168.1.11"));
        apply(&store, "Node", node("b1", "site-b", "192.168.2.11"));
        let allocator = Allocator::in_memory(Ipv4Range::default());
        let (mut planner, mut plan) = (Planner::default(), Plan::new());
        let host_addresses = HashSet::from(["192.168.1.11".parse().unwrap()]);
        let dns =
            &[("10.96.0.10:53", "169.254.64.1:53"), ("[fd00:96::a]:53", "[fd65::1]:53")].map(|(address, listener)| {
                ClusterDns { address: address.parse().unwrap(), listener: listener.parse().unwrap() }
            });
        // Each change, and whether it is planned by itself.
        let changes: Vec<(&str, Value, bool)> = vec![
            ("Service", service("web", "10.96.0.1", json!([{"port": 80, "nodePort": 30080}])), false),
            ("Slice", slice("web", &[("10.244.1.5", "a1"), ("10.244.2.5", "b1")]), true),
            ("Slice", slice("web", &[("10.244.2.5", "b1")]), true),
            ("Service", service("other", "10.96.0.2", json!([{"port": 80}])), true),
            ("Slice", slice("other", &[("10.244.1.6", "a1")]), true),
            ("Service", service("web", "10.96.0.1", json!([{"port": 81, "nodePort": 30081}])), true),
            ("Service", service("other", "10.96.0.1", json!([{"port": 80, "nodePort": 30081}])), true),
            (
                "Service",
                service("dns", "10.96.0.10", json!([{"port": 53, "protocol": "UDP"}, {"name": "m", "port": 9153}])),
                true,
            ),
            ("Service", service("dns", "fd00:96::a", json!([{"port": 53, "protocol": "UDP"}])), true),
            ("Service", service("dns", "10.96.0.11", json!([{"port": 53, "protocol": "UDP"}])), true),
            ("Service", service("dns", "None", json!([{"port": 53, "protocol": "UDP"}])), true),
            (
                "Service",
                json!({"metadata": {"name": "web", "namespace": "d", "labels": {"noproxy": "edgemesh"}},
                "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 81, "nodePort": 30081}]}}),
                true,
            ),
            (
                "Service",
                json!({"metadata": {"name": "out", "namespace": "d"}, "spec": {"clusterIP": "10.96.0.5",
                "externalIPs": ["192.168.1.11"], "ports": [{"port": 30090}]}}),
                false,
            ),
            ("Slice", slice("other", &[("10.244.1.7", "a1")]), true),
            ("Service", service("clash", "10.96.0.6", json!([{"port": 1, "nodePort": 30090}])), false),
            ("Service", service("clash", "10.96.0.6", json!([{"port": 1}])), false),
            ("Node", node("b1", "site-a", "192.168.2.11"), false),
            (
                "MeshNode",
                json!({"metadata": {"name": "b1"},
                "spec": {"peers": {"agent": {"peerId": "12D3b1", "addresses": ["/ip4/203.0.113.7/tcp/4001"]}}}}),
                true,
            ),
            ("Slice", slice("web", &[("10.244.2.6", "b1")]), true),
        ];
        for (kind, object, alone) in changes {
            apply(&store, kind, object.clone());
            store.publish();
            let catalog = store.snapshot();
            let viewpoint = Viewpoint::of(&catalog, "a1");
            let surroundings =
                Surroundings { viewpoint: &viewpoint, allocator: &allocator, host_addresses: &host_addresses, dns };
            match planner.plan(&catalog, surroundings) {
                Wanted::All(all) => {
                    assert!(!alone, "{object}");
                    plan = all;
                }
                Wanted::Some(some) => {
                    assert!(alone, "{object}");
                    for (frontend, target) in some {
                        match target {
                            Some(target) => drop(plan.insert(frontend, target)),
                            None => drop(plan.remove(&frontend)),
                        }
                    }
                }
            }
            assert_eq!(plan, plan::plan(&catalog, surroundings), "{object}");
        }
        planner.forget();
        let catalog = store.snapshot();
        let viewpoint = Viewpoint::of(&catalog, "a1");
        let surroundings =
            Surroundings { viewpoint: &viewpoint, allocator: &allocator, host_addresses: &host_addresses, dns };
        assert!(matches!(planner.plan(&catalog, surroundings), Wanted::All(_)));
        assert!(matches!(planner.plan(&catalog, surroundings), Wanted::Some(nothing) if nothing.is_empty()));
        let full = Allocator::in_memory("169.254.64.0/28".parse().unwrap());
        for i in 0..12 {
            full.listener(&ServicePortName {
                service: ServiceName { namespace: "d".into(), name: format!("gone{i}").into() },
                port: "".into(),
                protocol: Protocol::Tcp,
            })
            .unwrap();
        }
        let surroundings = Surroundings { allocator: &full, ..surroundings };
        assert!(matches!(planner.plan(&catalog, surroundings), Wanted::All(_)), "takes addresses back");
        assert!(matches!(planner.plan(&catalog, surroundings), Wanted::Some(_)));
    }
}
