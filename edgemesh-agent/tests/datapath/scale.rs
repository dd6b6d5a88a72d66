//! What many Services cost: all of them at once, and one change among them.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use edgemesh_agent::{
    datapath::{
        nftables::Changes,
        plan::{Change, Surroundings},
        planner::{Planner, Wanted},
    },
    node_local::{Allocator, Ipv4Range},
};
use edgemesh_mesh::{CatalogStore, Viewpoint};
use serde_json::{Value, json};

use crate::sandbox::{Datapath, Mode, Sandbox, in_both_modes, tcp_server};

const SERVICES: usize = 10_000;
const ENDPOINTS: usize = 10;

fn address(service: usize) -> String {
    format!("10.96.{}.{}", service / 250, service % 250 + 1)
}

/// A Service's slice: endpoints on this node, of which the first may be gone. Those of the first Service are real.
fn slice(service: usize, from: usize) -> Value {
    let endpoint = |i: usize| match service {
        0 => json!({"addresses": [format!("10.244.1.{}", i + 1)], "nodeName": "here"}),
        _ => {
            let address = format!("10.{}.{}.{}", 100 + i, service / 250, service % 250);
            json!({"addresses": [address], "nodeName": "here", "zone": "z1"})
        }
    };
    json!({
        "metadata": {"name": format!("s{service}"), "namespace": "default",
                     "labels": {"kubernetes.io/service-name": format!("s{service}")}},
        "addressType": "IPv4", "ports": [{"name": "http", "port": 8080}],
        "endpoints": (from..ENDPOINTS).map(endpoint).collect::<Vec<_>>(),
    })
}

fn cluster() -> Arc<CatalogStore> {
    let store = CatalogStore::new();
    store.apply_node(&serde_json::from_value(json!({"metadata": {"name": "here"}})).unwrap());
    for service in 0..SERVICES {
        let object = json!({
            "metadata": {"name": format!("s{service}"), "namespace": "default"},
            "spec": {"clusterIP": address(service), "ports": [{"name": "http", "port": 80}]},
        });
        store.apply_service(&serde_json::from_value(object).unwrap());
        store.apply_endpoint_slice(&serde_json::from_value(slice(service, 0)).unwrap());
    }
    store.mark_synced();
    store.publish();
    store
}

/// The same Services with two ports, a node port for each, and addresses of both families.
fn large_cluster() -> Arc<CatalogStore> {
    let store = CatalogStore::new();
    let node = json!({"metadata": {"name": "here"},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.168.1.11"}]}});
    store.apply_node(&serde_json::from_value(node).unwrap());
    let ports = json!([{"name": "http", "port": 8080}, {"name": "admin", "port": 8081}]);
    for service in 0..SERVICES {
        let (name, ip) = (format!("s{service}"), address(service));
        let ip6 = format!("fd00:96::{service:x}");
        let object = json!({
            "metadata": {"name": name, "namespace": "default"},
            "spec": {"clusterIP": ip, "clusterIPs": [ip, ip6], "type": "NodePort", "ports": [
                {"name": "http", "port": 80, "nodePort": 30_000 + service},
                {"name": "admin", "port": 81, "nodePort": 40_000 + service}]},
        });
        store.apply_service(&serde_json::from_value(object).unwrap());
        let mut slice = slice(service, 0);
        slice["ports"] = ports.clone();
        store.apply_endpoint_slice(&serde_json::from_value(slice.clone()).unwrap());
        slice["metadata"]["name"] = format!("{name}-6").into();
        slice["addressType"] = "IPv6".into();
        slice["ports"] = json!([ports[0]]);
        for (i, endpoint) in slice["endpoints"].as_array_mut().unwrap().iter_mut().enumerate() {
            endpoint["addresses"] = json!([format!("fd00:1:{i}::{service:x}")]);
        }
        store.apply_endpoint_slice(&serde_json::from_value(slice).unwrap());
    }
    store.mark_synced();
    store.publish();
    store
}

/// All of it fits into the maps that a machine with 2 GiB of memory or more has.
#[test]
fn ten_thousand_services_with_two_ports_node_ports_and_both_families_have_room() {
    let sandbox = Sandbox::new(&[]);
    let (mut programs, _counters) = sandbox.sized_programs(524_288);
    let catalog = large_cluster().snapshot();
    let viewpoint = Viewpoint::of(&catalog, "here");
    let (allocator, host_addresses) = (Allocator::in_memory(Ipv4Range::default()), Default::default());
    let surroundings =
        Surroundings { viewpoint: &viewpoint, allocator: &allocator, host_addresses: &host_addresses, dns: &[] };
    let Wanted::All(plan) = Planner::default().plan(&catalog, surroundings) else { panic!("a first plan") };
    let started = Instant::now();
    for (frontend, target) in &plan {
        programs.apply(&Change { frontend: *frontend, target: Some(target) }).unwrap();
    }
    let [(used, all), (used6, all6)] = programs.slots();
    println!("{} frontends in {:?}: slots {used}/{all}, {used6}/{all6}", plan.len(), started.elapsed());
    // A port's cluster address and node ports lead to the same slots: ten, rounded up to 16.
    assert_eq!((used, used6), (2 * 16 * SERVICES as u32, 16 * SERVICES as u32));
}

/// How long all Services may take, and one change: in a build without optimization, beside other work.
fn limits(mode: Mode) -> (Duration, Duration) {
    match mode {
        Mode::Ebpf => (Duration::from_secs(2), Duration::from_millis(10)),
        Mode::Nftables => (Duration::from_secs(5), Duration::from_millis(20)),
    }
}

in_both_modes! { ten_thousand_services_with_ten_endpoints_are_programmed_at_once_and_a_change_among_them_too }

fn ten_thousand_services_with_ten_endpoints_are_programmed_at_once_and_a_change_among_them_too(mode: Mode) {
    let sandbox = Sandbox::new(&["10.244.1.1", "10.244.1.10"]);
    let mut datapath = sandbox.datapath(mode);
    let (all_within, change_within) = limits(mode);
    tcp_server("10.244.1.10:8080");
    let store = cluster();
    let allocator = Allocator::in_memory(Ipv4Range::default());
    let host_addresses = Default::default();
    let mut planner = Planner::default();
    let mut round = || {
        let catalog = store.snapshot();
        let viewpoint = Viewpoint::of(&catalog, "here");
        let surroundings =
            Surroundings { viewpoint: &viewpoint, allocator: &allocator, host_addresses: &host_addresses, dns: &[] };
        let started = Instant::now();
        let wanted = planner.plan(&catalog, surroundings);
        let planned = started.elapsed();
        let is_local = |backend: std::net::SocketAddr, _| backend.to_string().starts_with("10.244.1.");
        let count = match (&mut datapath, wanted) {
            (Datapath::Ebpf(programs, _), wanted) => {
                let changes: Vec<_> = match wanted {
                    Wanted::All(all) => all.into_iter().map(|(frontend, target)| (frontend, Some(target))).collect(),
                    Wanted::Some(some) => some,
                };
                for (frontend, target) in &changes {
                    programs.apply(&Change { frontend: *frontend, target: target.as_ref() }).unwrap();
                }
                changes.len()
            }
            (Datapath::Nftables(rules), Wanted::All(all)) => {
                rules.replace(&all, &Default::default(), &is_local).unwrap()
            }
            (Datapath::Nftables(rules), Wanted::Some(inside)) => {
                let count = inside.len();
                rules.apply(Changes { inside, ..Changes::default() }, &is_local).unwrap();
                count
            }
        };
        (count, planned, started.elapsed())
    };
    let (changes, planned, all) = round();
    println!("{changes} frontends: planned in {planned:?}, programmed in {all:?}");
    assert!(all < all_within, "{all:?}");

    let mut times: Vec<Duration> = (0..50)
        .map(|i| {
            store.apply_endpoint_slice(&serde_json::from_value(slice(i * 37, 9)).unwrap());
            store.publish();
            let (changes, _, took) = round();
            assert_eq!(changes, 3, "its port, and what closes the others");
            took
        })
        .collect();
    times.sort();
    println!("one change: median {:?}, worst {:?}", times[25], times[49]);
    assert!(times[25] < change_within, "{times:?}");
    let answer = std::io::read_to_string(std::net::TcpStream::connect((address(0).as_str(), 80)).unwrap()).unwrap();
    assert_eq!(answer, "10.244.1.10:8080", "the first change took the other endpoints of the first Service away");
}
