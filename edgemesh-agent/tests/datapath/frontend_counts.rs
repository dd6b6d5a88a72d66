//! What is counted by frontend, and what the agent shows of it by Service.

use std::{
    collections::HashMap,
    net::{TcpStream, UdpSocket},
    path::Path,
    time::{Duration, Instant},
};

use aya::maps::{Map, MapData, PerCpuHashMap, PerCpuValues};
use edgemesh_agent::{
    app,
    datapath::{
        ebpf::{Counters, Programs},
        frontend_counts::{CountsFrontends as _, FrontendCounts},
        plan::{Change, Frontend, Target},
    },
};
use edgemesh_ebpf_abi as abi;
use edgemesh_mesh::model::Protocol::{self, Tcp, Udp};
use serde_json::{Value, json};

use crate::{
    sandbox::{Mode, Sandbox, at, in_both_modes, set, tcp_server},
    whole_agent::{POD, admin, catalog, config},
};

const VIP: &str = "10.96.0.20:80";
const VIP6: &str = "[fd00:96::20]:80";
const ADDRESSES: [&str; 2] = ["10.244.1.5", "fd00:1::5"];
const POD6: &str = "[fd00:1::5]:8080";

fn counted(counters: &Counters, protocol: Protocol, frontend: &str) -> FrontendCounts {
    let all = counters.read().unwrap();
    all.get(&Frontend { address: at(frontend), protocol }).copied().unwrap_or_default()
}

fn flows(flows: u64) -> FrontendCounts {
    FrontendCounts { flows, ..FrontendCounts::default() }
}

#[test]
fn each_connection_and_each_udp_flow_counts_once_and_datagrams_do_not() {
    let sandbox = Sandbox::new(&ADDRESSES);
    let (mut programs, counters) = sandbox.programs();
    tcp_server(POD);
    tcp_server(POD6);
    for protocol in [Tcp, Udp] {
        set(&mut programs, protocol, VIP, Some(&[POD]));
        set(&mut programs, protocol, VIP6, Some(&[POD6]));
    }
    assert_eq!(counters.read().unwrap(), HashMap::new(), "nobody called");
    for _ in 0..3 {
        TcpStream::connect(VIP).unwrap();
    }
    TcpStream::connect(VIP6).unwrap();
    let mapped = socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::STREAM, None).unwrap();
    mapped.connect(&at("[::ffff:10.96.0.20]:80").into()).unwrap();
    assert_eq!((counted(&counters, Tcp, VIP), counted(&counters, Tcp, VIP6)), (flows(4), flows(1)));

    let connected = UdpSocket::bind("0.0.0.0:0").unwrap();
    connected.connect(VIP).unwrap();
    let unconnected = UdpSocket::bind("0.0.0.0:0").unwrap();
    let unconnected6 = UdpSocket::bind("[::]:0").unwrap();
    for _ in 0..100 {
        // Nobody listens there: a socket may be told so.
        let _ = (connected.send(b"?"), unconnected.send_to(b"?", VIP), unconnected6.send_to(b"?", VIP6));
    }
    assert_eq!((counted(&counters, Udp, VIP), counted(&counters, Udp, VIP6)), (flows(2), flows(1)));
    assert_eq!(counters.read().unwrap().len(), 4);
}

#[test]
fn refusals_count_by_their_reason() {
    let sandbox = Sandbox::new(&ADDRESSES);
    let (mut programs, counters) = sandbox.programs();
    for (vip, closed) in [(VIP, "10.96.0.20:0"), (VIP6, "[fd00:96::20]:0")] {
        for protocol in [Tcp, Udp] {
            set(&mut programs, protocol, vip, Some(&[]));
            set(&mut programs, protocol, closed, Some(&[]));
        }
        TcpStream::connect(vip).unwrap_err();
        for port in [81, 82] {
            TcpStream::connect((at(vip).ip(), port)).unwrap_err();
        }
        let socket = UdpSocket::bind(if at(vip).is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).unwrap();
        socket.send_to(b"?", vip).unwrap_err();
        socket.send_to(b"?", (at(vip).ip(), 81)).unwrap_err();
        for (protocol, missing) in [(Tcp, 2), (Udp, 1)] {
            let of = |frontend| counted(&counters, protocol, frontend);
            assert_eq!(of(vip), FrontendCounts { no_endpoint: 1, ..flows(0) });
            assert_eq!(of(closed), FrontendCounts { no_such_port: missing, ..flows(0) });
        }
    }
}

#[test]
fn what_is_sent_to_the_agent_is_left_to_it_to_count() {
    let sandbox = Sandbox::new(&ADDRESSES);
    let (mut programs, counters) = sandbox.programs();
    tcp_server(POD);
    tcp_server(POD6);
    for (vip, listener) in [(VIP, POD), (VIP6, POD6)] {
        let frontend = Frontend { address: at(vip), protocol: Tcp };
        programs.apply(&Change { frontend, target: Some(&Target::Listener(at(listener))) }).unwrap();
        TcpStream::connect(vip).unwrap();
        assert_eq!(counters.read().unwrap(), HashMap::new());
        // The same address can be that of an endpoint.
        set(&mut programs, Tcp, vip, Some(&[listener]));
        TcpStream::connect(vip).unwrap();
        assert_eq!(counted(&counters, Tcp, vip), flows(1));
        set(&mut programs, Tcp, vip, None);
    }
}

#[test]
fn counts_go_on_with_other_endpoints_and_other_agents_and_end_with_the_frontend() {
    let sandbox = Sandbox::new(&ADDRESSES);
    let (mut programs, counters) = sandbox.pinned_programs();
    tcp_server(POD);
    tcp_server("10.244.1.5:8081");
    tcp_server(POD6);
    set(&mut programs, Tcp, VIP, Some(&[POD]));
    set(&mut programs, Tcp, VIP6, Some(&[POD6]));
    TcpStream::connect(VIP).unwrap();
    TcpStream::connect(VIP6).unwrap();
    set(&mut programs, Tcp, VIP, Some(&["10.244.1.5:8081"]));
    TcpStream::connect(VIP).unwrap();
    assert_eq!(counted(&counters, Tcp, VIP), flows(2));
    drop((programs, counters));
    TcpStream::connect(VIP).unwrap();
    let (mut programs, counters) = sandbox.pinned_programs();
    TcpStream::connect(VIP).unwrap();
    assert_eq!((counted(&counters, Tcp, VIP), counted(&counters, Tcp, VIP6)), (flows(4), flows(1)));
    for vip in [VIP, VIP6] {
        set(&mut programs, Tcp, vip, None);
    }
    assert_eq!(counters.read().unwrap(), HashMap::new());
}

/// Counts at a frontend that is gone, as a program does that had it in hand when it was removed.
fn count_too_late(pins: &Path, frontend: &str) {
    let std::net::IpAddr::V4(ip) = at(frontend).ip() else { panic!("an IPv4 frontend") };
    let key = abi::FrontendKey::new(abi::SocketAddress::new(ip.octets(), at(frontend).port()), abi::TCP).to_bits();
    let map = Map::PerCpuHashMap(MapData::from_pin(pins.join(abi::CALLS)).unwrap());
    let mut calls: PerCpuHashMap<_, u64, [u64; 2]> = map.try_into().unwrap();
    let values = vec![[1, 1]; aya::util::nr_cpus().unwrap()];
    calls.insert(key, PerCpuValues::try_from(values).unwrap(), 0).unwrap();
}

#[test]
fn what_was_counted_too_late_is_forgotten_by_a_new_frontend_and_by_a_new_agent() {
    let sandbox = Sandbox::new(&ADDRESSES);
    let (mut programs, counters) = sandbox.pinned_programs();
    let [pins] = &std::fs::read_dir(sandbox.bpffs.join("edgemesh")).unwrap().collect::<Vec<_>>()[..] else {
        panic!("one folder")
    };
    let pins = pins.as_ref().unwrap().path();
    count_too_late(&pins, VIP);
    assert_eq!(counters.read().unwrap().len(), 1);
    set(&mut programs, Tcp, VIP, Some(&[POD]));
    assert_eq!(counters.read().unwrap(), HashMap::new());
    count_too_late(&pins, VIP);
    count_too_late(&pins, "10.96.0.21:80");
    drop((programs, counters));
    let (_programs, counters) = sandbox.pinned_programs();
    let left: Vec<_> = counters.read().unwrap().into_keys().collect();
    assert_eq!(left, [Frontend { address: at(VIP), protocol: Tcp }], "the other one is not there any more");
    Programs::uninstall(&sandbox.cgroup, &sandbox.bpffs).unwrap();
}

#[test]
fn ten_thousand_frontends_that_were_called_are_read_in_a_moment() {
    let sandbox = Sandbox::new(&ADDRESSES);
    let (mut programs, counters) = sandbox.programs();
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    for i in 0..10_000 {
        let address = format!("10.96.{}.{}:53", i / 250, i % 250 + 1);
        set(&mut programs, Udp, &address, Some(&[POD]));
        socket.connect(address).unwrap();
    }
    let started = Instant::now();
    let read = counters.read().unwrap();
    let took = started.elapsed();
    assert_eq!(read.len(), 10_000);
    assert!(read.values().all(|counts| *counts == flows(1)));
    println!("10,000 frontends: read in {took:?}");
    assert!(took < Duration::from_millis(200), "{took:?}");
}

/// The lines of `/metrics` about a Service.
fn series(metrics: &str, service: &str) -> Vec<String> {
    let of_service = format!("{{namespace=\"default\",service=\"{service}\",");
    let mut lines: Vec<_> = metrics.lines().filter(|line| line.contains(&of_service)).map(str::to_owned).collect();
    lines.sort();
    lines
}

in_both_modes! { the_agent_shows_by_service_what_was_sent_directly_and_what_was_refused }

fn the_agent_shows_by_service_what_was_sent_directly_and_what_was_refused(mode: Mode) {
    let sandbox = Sandbox::new(&["10.244.1.5", "192.168.1.11"]);
    tcp_server(POD);
    let data = tempfile::tempdir().unwrap();
    std::fs::write(data.path().join("catalog.json"), catalog().to_string()).unwrap();
    let config = config(&sandbox, data.path(), mode.into());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let start = || {
        runtime.block_on(async {
            let agent = app::build(config.clone()).await.unwrap();
            tokio::time::timeout(Duration::from_secs(10), agent.readiness.wait()).await.unwrap();
            agent
        })
    };
    let agent = start();
    assert_eq!(series(&admin(agent.admin, "/metrics"), "here"), [""; 0], "nobody called it");
    // Its cluster address, a node port, an external address and one of a load balancer.
    for address in [VIP, VIP, "192.168.1.11:30080", "192.168.1.11:80", "203.0.113.7:80"] {
        TcpStream::connect(address).unwrap();
    }
    TcpStream::connect("10.96.0.20:81").unwrap_err();
    TcpStream::connect("10.96.0.22:80").unwrap_err();
    let talk = UdpSocket::bind("0.0.0.0:0").unwrap();
    talk.connect("10.96.0.23:53").unwrap();
    talk.send(b"?").unwrap();
    let of = |name: &str, service: &str, rest: &str, value: u64| {
        format!("edgemesh_agent_service_{name}_total{{namespace=\"default\",service=\"{service}\",{rest}}} {value}")
    };
    for _ in 0..2 {
        let metrics = admin(agent.admin, "/metrics");
        let here =
            [of("connections", "here", "path=\"direct\"", 5), of("failures", "here", "reason=\"no_such_port\"", 1)];
        assert_eq!(series(&metrics, "here"), here);
        // With nftables it is a route that refuses a host process.
        let nowhere = [of("failures", "nowhere", "reason=\"no_endpoint\"", 1)];
        assert_eq!(series(&metrics, "nowhere"), nowhere[usize::from(mode == Mode::Nftables)..]);
        assert_eq!(series(&metrics, "talk"), [of("connections", "talk", "path=\"direct\"", 1)]);
    }
    let page = admin(agent.admin, "/debug/trace?pod=shell&service=here");
    let page: Value = serde_json::from_str(page.split_once("\r\n\r\n").unwrap().1).unwrap();
    let connections = json!({"direct": 5, "proxied": 0, "relay": 0, "tunnel": 0});
    let failures = json!({"no_endpoint": 0, "no_such_port": 1, "unreachable": 0, "broken": 0});
    assert_eq!((&page["counters"]["connections"], &page["counters"]["failures"]), (&connections, &failures), "{page}");

    // Another Service has the address from one moment to the next, and begins at zero. The first one keeps its counts.
    for service in [service("talk", "10.96.0.24"), service("heir", "10.96.0.23")] {
        agent.catalog.apply_service(&serde_json::from_value(service).unwrap());
    }
    agent.catalog.publish();
    let until = Instant::now() + Duration::from_secs(10);
    while talk.connect("10.96.0.24:53").is_err() || talk.connect("10.96.0.23:53").is_ok() {
        assert!(Instant::now() < until, "the addresses are not programmed");
    }
    talk.connect("10.96.0.24:53").unwrap();
    // Nobody listens there: the socket may still be told so of its first datagram.
    let _ = (talk.send(b"?"), talk.send(b"?"));
    let sent = |metrics: &str, service| series(metrics, service).iter().any(|line| line.contains("path=\"direct\""));
    let metrics = admin(agent.admin, "/metrics");
    assert!(sent(&metrics, "talk") && !sent(&metrics, "heir"), "{metrics}");
    runtime.block_on(agent.stop());

    // The next agent goes on where this one was.
    let mut items = catalog();
    let list = items["items"].as_array_mut().unwrap();
    list.retain(|item| item["kind"] != "Service" || item["metadata"]["name"] != "talk");
    list.extend([service("talk", "10.96.0.24"), service("heir", "10.96.0.23")]);
    std::fs::write(data.path().join("catalog.json"), items.to_string()).unwrap();
    let agent = start();
    TcpStream::connect(VIP).unwrap();
    let metrics = admin(agent.admin, "/metrics");
    assert!(sent(&metrics, "talk") && !sent(&metrics, "heir"), "{metrics}");
    assert!(series(&metrics, "here").contains(&of("connections", "here", "path=\"direct\"", 6)), "{metrics}");
    agent.catalog.delete_service("default", "here");
    agent.catalog.publish();
    let until = Instant::now() + Duration::from_secs(10);
    while !series(&admin(agent.admin, "/metrics"), "here").is_empty() {
        assert!(Instant::now() < until, "it is deleted");
    }
    runtime.block_on(agent.stop());
}

/// A Service with one UDP port.
fn service(name: &str, ip: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default"},
           "spec": {"clusterIP": ip, "ports": [{"port": 53, "protocol": "UDP"}]}})
}
