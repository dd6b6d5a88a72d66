//! The catalog as its readers see it, built from Kubernetes objects in every order.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, reason = "a test ends where something fails")]

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use edgemesh_mesh::{
    Call, Catalog, CatalogStore, Observed, Tier, Viewpoint, debug,
    from_kubernetes::ServiceSelection,
    model::{Endpoint, Protocol, ServiceKind},
};
use serde_json::{Value, json};

fn apply(store: &CatalogStore, object: Value) {
    match object["kind"].as_str().unwrap() {
        "Service" => store.apply_service(&serde_json::from_value(object).unwrap()),
        "EndpointSlice" => store.apply_endpoint_slice(&serde_json::from_value(object).unwrap()),
        "Node" => store.apply_node(&serde_json::from_value(object).unwrap()),
        "MeshNode" => store.apply_mesh_node(&serde_json::from_value(object).unwrap()),
        kind => panic!("{kind}"),
    }
}

fn published(store: &CatalogStore) -> Arc<Catalog> {
    store.publish();
    store.snapshot()
}

fn service(name: &str, ip: &str, ports: Value) -> Value {
    json!({"kind": "Service", "metadata": {"namespace": "default", "name": name},
        "spec": {"clusterIP": ip, "clusterIPs": [ip], "ports": ports}})
}

fn slice(service: &str, number: usize, ports: Value, endpoints: Value) -> Value {
    json!({"kind": "EndpointSlice", "addressType": "IPv4", "ports": ports, "endpoints": endpoints,
        "metadata": {"namespace": "default", "name": format!("{service}-{number}"),
            "labels": {"kubernetes.io/service-name": service}}})
}

fn addresses(endpoints: &[Arc<Endpoint>]) -> Vec<String> {
    endpoints.iter().map(|e| SocketAddr::new(e.address, e.port).to_string()).collect()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn slices_wait_for_their_service_and_stay_when_it_is_made_anew() {
    let store = CatalogStore::new();
    apply(&store, slice("web", 1, json!([{"name": "http", "port": 8080}]), json!([{"addresses": ["10.244.1.1"]}])));
    let catalog = published(&store);
    assert_eq!(catalog.service_count(), 0);
    assert_eq!(catalog.services_of_endpoint(ip("10.244.1.1")).count(), 0);
    let web = service("web", "10.96.0.1", json!([{"name": "http", "port": 80}]));
    for _ in 0..2 {
        apply(&store, web.clone());
        let catalog = published(&store);
        let port = catalog.port_at(ip("10.96.0.1"), 80, Protocol::Tcp).unwrap();
        assert_eq!(addresses(&port.endpoints), ["10.244.1.1:8080"]);
        assert_eq!(catalog.services_of_endpoint(ip("10.244.1.1")).count(), 1);
        store.delete_service("default", "web");
        let catalog = published(&store);
        assert!(catalog.service("default", "web").is_none());
        assert!(catalog.port_at(ip("10.96.0.1"), 80, Protocol::Tcp).is_none());
        assert!(!catalog.has_namespace("default"));
    }
}

#[test]
fn slices_are_merged_per_named_port_and_each_endpoint_is_there_once() {
    let store = CatalogStore::new();
    apply(
        &store,
        service(
            "web",
            "10.96.0.1",
            json!([
                {"name": "http", "port": 80}, {"name": "metrics", "port": 9090}, {"name": "dns", "port": 53, "protocol": "UDP"},
                {"name": "sctp", "port": 7, "protocol": "SCTP"},
            ]),
        ),
    );
    // The pod's http port has another number in the second slice, as while a Deployment is rolled out.
    apply(
        &store,
        slice(
            "web",
            1,
            json!([{"name": "http", "port": 8080}, {"name": "metrics", "port": 9100}]),
            json!([
                {"addresses": ["10.244.1.2"]}, {"addresses": ["10.244.1.1"], "conditions": {"ready": false}},
            ]),
        ),
    );
    apply(&store, slice("web", 2, json!([{"name": "http", "port": 8081}]), json!([{"addresses": ["10.244.1.3"]}])));
    // A slice that repeats an endpoint: the one that says it is ready counts.
    apply(&store, slice("web", 3, json!([{"name": "http", "port": 8080}]), json!([{"addresses": ["10.244.1.1"]}])));
    let catalog = published(&store);
    let web = catalog.service("default", "web").unwrap();
    let ports: Vec<(&str, Vec<String>)> = web.ports.iter().map(|p| (&*p.name, addresses(&p.endpoints))).collect();
    let strings = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
    assert_eq!(
        ports,
        [
            ("http", strings(&["10.244.1.1:8080", "10.244.1.2:8080", "10.244.1.3:8081"])),
            ("metrics", strings(&["10.244.1.1:9100", "10.244.1.2:9100"])),
            ("dns", strings(&[])),
        ]
    );
    assert!(web.ports[0].endpoints[0].ready && !web.ports[1].endpoints[0].ready);
    let found = catalog.endpoint_at("10.244.1.3:8081".parse().unwrap(), Protocol::Tcp).unwrap();
    assert_eq!(found.address, ip("10.244.1.3"));
    assert!(catalog.endpoint_at("10.244.1.3:8080".parse().unwrap(), Protocol::Tcp).is_none());
    // The slice moves to another Service by its label, then goes.
    apply(&store, service("other", "10.96.0.2", json!([{"name": "http", "port": 80}])));
    let mut moved = slice("web", 2, json!([{"name": "http", "port": 8081}]), json!([{"addresses": ["10.244.1.3"]}]));
    moved["metadata"]["labels"]["kubernetes.io/service-name"] = json!("other");
    apply(&store, moved);
    let catalog = published(&store);
    assert_eq!(catalog.service("default", "web").unwrap().ports[0].endpoints.len(), 2);
    assert_eq!(catalog.service("default", "other").unwrap().ports[0].endpoints.len(), 1);
    store.delete_endpoint_slice("default", "web-2");
    assert!(published(&store).service("default", "other").unwrap().ports[0].endpoints.is_empty());
}

#[test]
fn every_index_follows_a_change_of_address_port_and_node_port() {
    let store = CatalogStore::new();
    apply(&store, service("web", "10.96.0.1", json!([{"port": 80, "nodePort": 30080}])));
    let old = published(&store);
    apply(&store, service("web", "10.96.0.9", json!([{"port": 81, "nodePort": 30081}])));
    let new = published(&store);
    assert!(old.port_at(ip("10.96.0.1"), 80, Protocol::Tcp).is_some(), "an older snapshot never changes");
    assert!(new.port_at(ip("10.96.0.1"), 80, Protocol::Tcp).is_none());
    assert!(new.service_at(ip("10.96.0.1")).is_none());
    assert!(new.node_port(30080, Protocol::Tcp).is_none());
    assert!(new.port_at(ip("10.96.0.9"), 81, Protocol::Tcp).is_some());
    assert!(new.node_port(30081, Protocol::Tcp).is_some());
    assert_eq!(new.changed_services(&old).len(), 1);
    assert!(new.changed_services(&new.clone()).is_empty());
    // An address that another Service took over isn't taken from it when the first owner goes.
    apply(&store, service("next", "10.96.0.9", json!([{"port": 81, "nodePort": 30081}])));
    store.publish();
    store.delete_service("default", "web");
    let catalog = published(&store);
    assert_eq!(&*catalog.port_at(ip("10.96.0.9"), 81, Protocol::Tcp).unwrap().service.name, "next");
    assert_eq!(&*catalog.node_port(30081, Protocol::Tcp).unwrap().service.name, "next");
}

#[test]
fn what_changes_nothing_publishes_nothing() {
    let store = CatalogStore::new();
    let generations = store.subscribe();
    let web = service("web", "10.96.0.1", json!([{"port": 80}]));
    apply(&store, web.clone());
    assert!(store.publish());
    apply(&store, web);
    assert!(!store.publish());
    assert_eq!(*generations.borrow(), 1);
    assert!(!store.is_synced());
    store.mark_synced();
    assert!(store.publish() && store.is_synced());
}

#[test]
fn kinds_of_services_are_told_apart_and_malformed_objects_are_skipped() {
    let table = [
        (json!({"clusterIP": "10.96.0.1", "ports": [{"port": 80}]}), Some(ServiceKind::ClusterIp)),
        (json!({"clusterIP": "", "ports": [{"port": 80}]}), Some(ServiceKind::ClusterIp)),
        (json!({"clusterIP": "None"}), Some(ServiceKind::Headless)),
        (
            json!({"type": "ExternalName", "externalName": "a.example."}),
            Some(ServiceKind::ExternalName("a.example".into())),
        ),
        (json!({"type": "ExternalName"}), None),
        (json!({"type": "ExternalName", "externalName": "a..b"}), None),
        (json!({"clusterIP": "10.96.0", "ports": [{"port": 80}]}), None),
        (json!({"clusterIP": "10.96.0.1", "ports": [{"port": 0}]}), None),
        (json!({"clusterIP": "10.96.0.1", "ports": [{"port": 70000}]}), None),
        (Value::Null, None),
    ];
    for (spec, expected) in table {
        let store = CatalogStore::new();
        apply(&store, service("web", "10.96.0.7", json!([{"port": 80}])));
        apply(&store, json!({"kind": "Service", "metadata": {"namespace": "default", "name": "web"}, "spec": spec}));
        let kind = published(&store).service("default", "web").map(|service| service.kind.clone());
        assert_eq!(kind, expected, "{spec}");
    }
    let store = CatalogStore::new();
    apply(&store, json!({"kind": "Service", "metadata": {"name": "web"}, "spec": {}}));
    apply(&store, json!({"kind": "Service", "metadata": {}, "spec": {}}));
    apply(&store, json!({"kind": "Node", "metadata": {}}));
    apply(&store, service("web", "10.96.0.1", json!([{"port": 80}])));
    apply(
        &store,
        slice(
            "web",
            1,
            json!([{"port": 80}, {"port": -1}, {"name": "x"}]),
            json!([
                {"addresses": []}, {"addresses": ["no address"]}, {"addresses": ["10.244.1.1"], "hostname": "not a.label"},
            ]),
        ),
    );
    let catalog = published(&store);
    let endpoints = &catalog.service("default", "web").unwrap().ports[0].endpoints;
    assert_eq!(addresses(endpoints), ["10.244.1.1:80"]);
    assert_eq!(endpoints[0].hostname, None);
}

#[test]
fn nodes_are_found_by_address_and_pod_range_and_carry_their_mesh_node() {
    let store = CatalogStore::new();
    apply(
        &store,
        json!({"kind": "MeshNode", "metadata": {"name": "edge-a1"}, "spec": {"peers": {
        "agent": {"peerId": "12D3", "addresses": ["/ip4/192.168.1.11/udp/4001/quic-v1"], "relay": true}}}}),
    );
    assert_eq!(published(&store).nodes().count(), 0, "a MeshNode alone is no node");
    apply(
        &store,
        json!({"kind": "Node",
        "metadata": {"name": "edge-a1", "labels": {"edgemesh.dev/network": "site-a", "topology.kubernetes.io/zone": "z1"}},
        "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd00:1::/64"]},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.168.1.11"}, {"type": "Hostname", "address": "edge-a1"}],
            "conditions": [{"type": "Ready", "status": "True"}]}}),
    );
    apply(&store, json!({"kind": "Node", "metadata": {"name": "cloud-1"}, "spec": {"podCIDR": "10.244.0.0/16"}}));
    let catalog = published(&store);
    for (address, node) in [
        ("192.168.1.11", Some("edge-a1")),
        ("10.244.1.200", Some("edge-a1")),
        ("10.244.2.1", Some("cloud-1")),
        ("fd00:1::5", Some("edge-a1")),
        ("10.245.0.1", None),
    ] {
        assert_eq!(catalog.node_of_address(ip(address)).map(|node| &*node.name), node, "{address}");
    }
    let node = catalog.node("edge-a1").unwrap();
    assert_eq!((&*node.network, node.zone.as_deref(), node.ready), ("site-a", Some("z1"), true));
    assert!(node.peers["agent"].relay);
    assert_eq!(&*catalog.node("cloud-1").unwrap().network, "default");
    store.delete_mesh_node("edge-a1");
    store.delete_node("cloud-1");
    let catalog = published(&store);
    assert!(catalog.node("edge-a1").unwrap().peers.is_empty());
    assert!(catalog.node_of_address(ip("10.244.2.1")).is_none());
}

#[test]
fn nodes_of_two_networks_with_the_same_address_have_endpoints_of_their_own() {
    let store = CatalogStore::new();
    let node = |name: &str, network: &str, address: &str| {
        json!({"kind": "Node", "metadata": {"name": name, "labels": {"edgemesh.dev/network": network}},
            "status": {"addresses": [{"type": "InternalIP", "address": address}]}})
    };
    for (name, network, address) in
        [("a1", "a", "192.168.1.10"), ("a2", "a", "192.168.1.11"), ("b1", "b", "192.168.1.10"), ("c1", "c", "10.0.0.1")]
    {
        apply(&store, node(name, network, address));
    }
    apply(&store, service("web", "10.96.0.1", json!([{"name": "http", "port": 80}])));
    for (number, ready) in [(1, [true, false]), (2, [true, true])] {
        let endpoints: Vec<Value> = std::iter::zip(["a1", "b1"], ready)
            .map(|(node, ready)| json!({"addresses": ["192.168.1.10"], "nodeName": node, "conditions": {"ready": ready}}))
            .collect();
        apply(&store, slice("web", number, json!([{"name": "http", "port": 8080}]), json!(endpoints)));
    }
    let catalog = published(&store);
    let port = &catalog.service("default", "web").unwrap().ports[0];
    for (node, tier, expected) in [
        ("a1", Tier::Node, &["a1"][..]),
        ("a2", Tier::Network, &["a1"]),
        ("b1", Tier::Node, &["b1"]),
        ("c1", Tier::Remote, &["a1", "b1"]),
    ] {
        let chosen = Viewpoint::of(&catalog, node).candidates_for(&catalog, port, Call::default());
        let nodes: Vec<&str> = chosen.endpoints.iter().map(|endpoint| endpoint.node.as_deref().unwrap()).collect();
        assert_eq!((chosen.tier, nodes.as_slice()), (tier, expected), "{node}");
    }
    let at = "192.168.1.10:8080".parse().unwrap();
    for (node, is_there) in [("a1", true), ("a2", false), ("b1", true)] {
        assert_eq!(catalog.is_endpoint_on(at, Protocol::Tcp, node), is_there, "{node}");
    }
    // Whichever of them is found by the address, the other one is when it is gone.
    let owner = || published(&store).node_of_address(ip("192.168.1.10")).map(|node| node.name.to_string());
    apply(&store, node("b1", "b", "192.168.1.10"));
    assert_eq!(owner().as_deref(), Some("a1"), "whoever has said so last");
    apply(&store, node("b1", "b", "192.168.1.12"));
    assert_eq!(owner().as_deref(), Some("a1"));
    apply(&store, node("b1", "b", "192.168.1.10"));
    store.delete_node("a1");
    assert_eq!(owner().as_deref(), Some("b1"));
    store.delete_node("b1");
    assert_eq!(owner(), None);
}

#[test]
fn the_debug_view_is_sorted_and_complete() {
    let store = CatalogStore::new();
    for name in ["b", "a"] {
        apply(&store, service(name, "10.96.0.1", json!([{"port": 80}])));
    }
    let view = debug::view(&published(&store));
    assert_eq!(view["services"][0]["name"]["name"], "a");
    assert_eq!((view["services"].as_array().unwrap().len(), &view["synced"]), (2, &json!(false)));
}

#[test]
fn one_change_among_ten_thousand_services_costs_little() {
    let store = CatalogStore::new();
    let endpoints = |service: usize, ready: bool| {
        let one = |i: usize| {
            json!({"addresses": [format!("10.{}.{}.{}", 100 + i, service / 256, service % 256)],
            "nodeName": format!("node-{}", service % 100), "conditions": {"ready": ready || i > 0}})
        };
        json!((0..10).map(one).collect::<Vec<_>>())
    };
    for i in 0..10_000 {
        let ip = format!("10.{}.{}.{}", 96 + i / 65_536, i / 256 % 256, i % 256);
        apply(&store, service(&format!("s{i}"), &ip, json!([{"name": "http", "port": 80}])));
        apply(&store, slice(&format!("s{i}"), 1, json!([{"name": "http", "port": 8080}]), endpoints(i, true)));
    }
    let first = published(&store);
    assert_eq!(first.service_count(), 10_000);
    let changes: Vec<_> = (0..200)
        .map(|i| {
            serde_json::from_value(slice(
                &format!("s{}", i * 37),
                1,
                json!([{"name": "http", "port": 8080}]),
                endpoints(i * 37, false),
            ))
        })
        .map(Result::unwrap)
        .collect();
    let mut times: Vec<Duration> = changes
        .iter()
        .map(|change| {
            let started = Instant::now();
            store.apply_endpoint_slice(change);
            assert!(store.publish());
            started.elapsed()
        })
        .collect();
    times.sort();
    let started = Instant::now();
    assert_eq!(store.snapshot().changed_services(&first).len(), 200);
    println!("one change: median {:?}, worst {:?}; difference of 200: {:?}", times[100], times[199], started.elapsed());
    assert!(times[100] < Duration::from_millis(10), "median {:?}", times[100]);
}

#[test]
fn the_proxy_protocol_is_spoken_only_where_the_annotation_says_v2() {
    for (value, wanted) in [("v2", true), ("v1", false), ("", false)] {
        let store = CatalogStore::new();
        let service = json!({
            "metadata": {"namespace": "default", "name": "web", "annotations": {"edgemesh.dev/proxy-protocol": value}},
            "spec": {"clusterIP": "10.96.0.9", "ports": [{"port": 80}]},
        });
        store.apply_service(&serde_json::from_value(service).unwrap());
        store.publish();
        assert_eq!(store.snapshot().service("default", "web").unwrap().proxy_protocol, wanted, "{value}");
    }
}

#[test]
fn services_that_others_proxy_keep_their_names_and_lose_their_addresses() {
    for (labels, ours) in [
        (json!({"app": "web", "noproxy": "other"}), true),
        (json!({"service.kubernetes.io/service-proxy-name": "other"}), false),
        (json!({"service.kubernetes.io/headless": ""}), false),
        (json!({"service.edgemesh.kubeedge.io/service-proxy-name": ""}), false),
        (json!({"noproxy": "edgemesh"}), false),
        (json!({"edgemesh.dev/proxy": "false"}), false),
        (json!({"edgemesh.dev/proxy": "no"}), true),
    ] {
        let store = CatalogStore::new();
        let mut web = service("web", "10.96.0.1", json!([{"port": 80, "nodePort": 30080}]));
        apply(&store, web.clone());
        assert!(published(&store).port_at(ip("10.96.0.1"), 80, Protocol::Tcp).is_some());
        web["metadata"]["labels"] = labels.clone();
        apply(&store, web.clone());
        let catalog = published(&store);
        assert_eq!(catalog.port_at(ip("10.96.0.1"), 80, Protocol::Tcp).is_some(), ours, "{labels}");
        assert_eq!(catalog.node_port(30080, Protocol::Tcp).is_some(), ours, "{labels}");
        assert!(catalog.service_at(ip("10.96.0.1")).is_some() && catalog.service("default", "web").is_some());
        web["metadata"]["labels"] = json!({});
        apply(&store, web);
        assert!(published(&store).port_at(ip("10.96.0.1"), 80, Protocol::Tcp).is_some(), "and back");
    }
}

#[test]
fn where_services_are_taken_in_by_label_the_others_keep_their_names_only() {
    for (labels, ours) in [
        (json!({}), false),
        (json!({"edgemesh.dev/proxy": "true"}), true),
        (json!({"edgemesh.dev/proxy": "false", "service.edgemesh.kubeedge.io/service-proxy-name": ""}), false),
        (json!({"edgemesh.dev/proxy": "yes"}), false),
        (json!({"service.edgemesh.kubeedge.io/service-proxy-name": ""}), true),
        (json!({"edgemesh.dev/proxy": "true", "service.kubernetes.io/service-proxy-name": "other"}), false),
        (json!({"edgemesh.dev/proxy": "true", "noproxy": "edgemesh"}), false),
    ] {
        let store = CatalogStore::selecting(ServiceSelection::Labelled);
        let mut web = service("web", "10.96.0.1", json!([{"port": 80}]));
        web["metadata"]["labels"] = labels.clone();
        apply(&store, web);
        let catalog = published(&store);
        assert_eq!(catalog.port_at(ip("10.96.0.1"), 80, Protocol::Tcp).is_some(), ours, "{labels}");
        assert!(catalog.service("default", "web").is_some());
    }
}

#[test]
fn addresses_of_load_balancers_count_where_the_nodes_serve_them() {
    let table = [
        (json!({}), json!([{"ip": "203.0.113.7"}, {"hostname": "lb.example"}]), vec!["203.0.113.7"]),
        (
            json!({}),
            json!([{"ip": "203.0.113.7", "ipMode": "Proxy"}, {"ip": "2001:db8::7", "ipMode": "VIP"}]),
            vec!["2001:db8::7"],
        ),
        (
            json!({}),
            json!([{"ip": "127.0.0.1"}, {"ip": "169.254.64.1"}, {"ip": "0.0.0.0"}, {"ip": "224.0.0.1"}, {"ip": "fe80::1"},
                {"ip": "::ffff:127.0.0.1"}, {"ip": "ff02::1"}, {"ip": "::"}, {"ip": "203.0.113.8"}]),
            vec!["203.0.113.8"],
        ),
    ];
    for (spec, ingress, expected) in table {
        let store = CatalogStore::new();
        let mut web = service("web", "10.96.0.1", json!([{"port": 80}]));
        web["spec"].as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
        web["spec"]["externalIPs"] = json!(["192.168.1.11", "not an address", "127.0.0.1"]);
        web["status"] = json!({"loadBalancer": {"ingress": ingress}});
        apply(&store, web);
        let catalog = published(&store);
        let found = catalog.service("default", "web").unwrap();
        let balancer: Vec<String> = found.load_balancer_ips.iter().map(ToString::to_string).collect();
        assert_eq!(balancer, expected);
        assert_eq!(found.external_ips, [ip("192.168.1.11")]);
        assert_eq!(found.load_balancer_sources, None);
    }
}

#[test]
fn source_ranges_of_load_balancers_are_those_that_no_other_holds() {
    let table = [
        (json!([]), None),
        (
            json!(["10.1.0.0/16", " 10.0.0.0/8 ", "10.0.0.0/8", "2001:db8::/32"]),
            Some(vec!["10.0.0.0/8", "2001:db8::/32"]),
        ),
        (json!(["not a range"]), Some(vec![])),
    ];
    for (ranges, expected) in table {
        let store = CatalogStore::new();
        let mut web = service("web", "10.96.0.1", json!([{"port": 80}]));
        web["spec"]["loadBalancerSourceRanges"] = ranges;
        web["status"] = json!({"loadBalancer": {"ingress": [{"ip": "203.0.113.7"}]}});
        apply(&store, web);
        let catalog = published(&store);
        let found = catalog.service("default", "web").unwrap();
        let texts = found.load_balancer_sources.as_ref().map(|all| all.iter().map(ToString::to_string).collect());
        assert_eq!(texts, expected.map(|all| all.into_iter().map(str::to_owned).collect::<Vec<_>>()));
        assert_eq!(found.load_balancer_ips, [ip("203.0.113.7")]);
    }
}

#[test]
fn what_was_observed_takes_the_place_of_what_slices_say_until_it_is_dropped() {
    let store = CatalogStore::new();
    apply(
        &store,
        service(
            "web",
            "10.96.0.1",
            json!([{"name": "http", "port": 80}, {"name": "dns", "port": 53, "protocol": "UDP"}]),
        ),
    );
    let ports = json!([{"name": "http", "port": 8080}, {"name": "dns", "port": 5353, "protocol": "UDP"}]);
    let endpoints = json!([
        {"addresses": ["10.244.1.1"], "conditions": {"ready": true}},
        {"addresses": ["10.244.1.2"], "conditions": {"ready": false, "serving": false}},
        {"addresses": ["10.244.1.3"], "conditions": {"ready": false, "serving": true, "terminating": true}},
    ]);
    apply(&store, slice("web", 1, ports, endpoints));
    let ready = |catalog: &Catalog, number, protocol| -> Vec<bool> {
        let port = catalog.port_at(ip("10.96.0.1"), number, protocol).unwrap();
        port.endpoints.iter().map(|endpoint| endpoint.ready).collect()
    };
    let before = published(&store);
    assert_eq!(ready(&before, 80, Protocol::Tcp), [true, false, false]);
    let observed = Observed {
        endpoints: [("10.244.1.1:8080", false), ("10.244.1.2:8080", true), ("10.244.1.3:8080", true)]
            .map(|(address, answers)| (address.parse().unwrap(), answers))
            .into(),
        addresses: [(ip("10.244.1.1"), false)].into(),
    };
    store.set_observed(observed.clone());
    let catalog = published(&store);
    assert_eq!(ready(&catalog, 80, Protocol::Tcp), [false, true, false], "one that terminates gets nothing new");
    assert_eq!(ready(&catalog, 53, Protocol::Udp), [false, false, false], "UDP follows the address");
    store.set_observed(observed);
    assert!(!store.publish(), "nothing new");
    store.set_observed(Observed::default());
    assert_eq!(ready(&published(&store), 80, Protocol::Tcp), [true, false, false]);
}
