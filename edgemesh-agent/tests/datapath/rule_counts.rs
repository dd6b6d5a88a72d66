//! What the rules count by frontend: for all callers where they serve all, else for those from outside.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket},
    time::{Duration, Instant},
};

use edgemesh_agent::datapath::{
    frontend_counts::{CountsFrontends as _, FrontendCounts},
    nftables::{Changes, RuleCounts, Rules, TABLE},
    outside::OutsideTarget,
    plan::{Frontend, Target},
};
use edgemesh_mesh::model::Protocol::{self, Tcp, Udp};

use crate::{
    hosts::{Host, client, node, pod, who_calls},
    outside::{call, call_udp, direct, is_local, nft, rules},
    sandbox::{Mode, at, in_both_modes, ip, set, tcp_server},
};

const VIP: &str = "10.96.0.20:80";
const VIP6: &str = "[fd00:96::20]:80";
const POD: &str = "10.244.1.5:8080";
const POD6: &str = "[fd00:1::5]:8080";

in_both_modes! {
    callers_from_outside_are_counted_at_node_ports_and_load_balancer_addresses,
    without_a_table_nothing_is_counted,
}

fn frontend(address: &str, protocol: Protocol) -> Frontend {
    Frontend { address: at(address), protocol }
}

fn counted(protocol: Protocol, address: &str) -> FrontendCounts {
    RuleCounts::default().read().unwrap().get(&frontend(address, protocol)).copied().unwrap_or_default()
}

fn all() -> HashMap<Frontend, FrontendCounts> {
    RuleCounts::default().read().unwrap()
}

fn flows(flows: u64) -> FrontendCounts {
    FrontendCounts { flows, ..FrontendCounts::default() }
}

/// Has TCP and UDP at an address lead to backends for callers from outside, or nowhere any more.
fn serve(rules: &mut Rules, address: &str, backends: Option<&[&str]>) {
    let target = |backends| OutsideTarget::Target(direct(backends));
    let outside = [Tcp, Udp].map(|protocol| (frontend(address, protocol), backends.map(target))).into();
    rules.apply(Changes { outside, ..Changes::default() }, &is_local).unwrap();
}

fn pod5() -> Host {
    let pod5 = pod(5);
    pod5.run(|| [POD, POD6].map(who_calls));
    pod5
}

fn callers_from_outside_are_counted_at_node_ports_and_load_balancer_addresses(mode: Mode) {
    let _node = node();
    let (_pod5, client) = (pod5(), client());
    let mut rules = rules(mode);
    for (address, called, backend) in [
        ("0.0.0.0:30080", "192.168.1.11:30080", POD),
        ("203.0.113.7:80", "203.0.113.7:80", POD),
        ("[::]:30080", "[fd00:a::11]:30080", POD6),
    ] {
        serve(&mut rules, address, Some(&[backend]));
        assert_eq!(all(), HashMap::new(), "nobody called");
        client.run(move || (0..3).for_each(|_| drop(call(called).unwrap())));
        client.run(move || {
            let socket = UdpSocket::bind(if at(called).is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).unwrap();
            (0..10).for_each(|_| assert_eq!(socket.send_to(b"?", called).unwrap(), 1));
            call_udp(called).unwrap();
        });
        assert_eq!((counted(Tcp, address), counted(Udp, address)), (flows(3), flows(2)), "{address}");
        serve(&mut rules, address, Some(&[]));
        client.run(move || call(called).unwrap_err());
        client.run(move || call_udp(called).unwrap_err());
        serve(&mut rules, address, Some(&[backend]));
        client.run(move || call(called).unwrap());
        for (protocol, flows) in [(Tcp, 4), (Udp, 2)] {
            let counts = counted(protocol, address);
            assert_eq!(counts.flows, flows, "{address}: counts go on with other endpoints");
            // A client that misses the refusal of its first packet sends another.
            assert!((1..=2).contains(&counts.no_endpoint), "{address}: {counts:?}");
        }
        serve(&mut rules, address, None);
    }
    assert_eq!(all(), HashMap::new(), "counts end with the frontend");
}

#[test]
fn pods_and_host_processes_are_counted_at_cluster_addresses_and_ports_that_are_not_there() {
    let _node = node();
    let (_pod5, pod6) = (pod5(), pod(6));
    let mut rules = rules(Mode::Nftables);
    for (vip, closed, backend) in [(VIP, "10.96.0.20:0", POD), (VIP6, "[fd00:96::20]:0", POD6)] {
        for protocol in [Tcp, Udp] {
            set(&mut rules, protocol, vip, Some(&[backend]));
            set(&mut rules, protocol, closed, Some(&[]));
        }
        // The first packets between two IPv6 hosts can be lost, and one that is sent again counts again.
        pod6.run(move || call(vip).unwrap());
        rules.forget_counts(&[frontend(vip, Tcp)]).unwrap();
        pod6.run(move || (call(vip).unwrap(), call_udp(vip).unwrap()));
        call(vip).unwrap();
        call_udp(vip).unwrap();
        assert_eq!((counted(Tcp, vip), counted(Udp, vip)), (flows(2), flows(2)));
        pod6.run(move || TcpStream::connect((at(vip).ip(), 81)).unwrap_err());
        TcpStream::connect((at(vip).ip(), 82)).unwrap_err();
        assert_eq!(counted(Tcp, closed), FrontendCounts { no_such_port: 2, ..flows(0) });
        assert_eq!(counted(Udp, closed), flows(0));
        set(&mut rules, Udp, vip, Some(&[]));
        pod6.run(move || call_udp(vip).unwrap_err());
        assert_eq!(counted(Udp, vip), FrontendCounts { no_endpoint: 1, ..flows(2) });
    }
}

#[test]
fn a_node_port_of_the_same_number_as_a_cluster_port_is_counted_by_itself() {
    let _node = node();
    let (_pod5, pod6, client) = (pod5(), pod(6), client());
    let mut rules = rules(Mode::Nftables);
    for backends in [&[POD][..], &[]] {
        set(&mut rules, Tcp, "10.96.0.20:30080", Some(backends));
        serve(&mut rules, "0.0.0.0:30080", Some(backends));
        pod6.run(|| drop(call("10.96.0.20:30080")));
        client.run(|| (0..2).for_each(|_| drop(call("192.168.1.11:30080"))));
    }
    let counts = |flows| FrontendCounts { flows, no_endpoint: flows, no_such_port: 0 };
    assert_eq!((counted(Tcp, "10.96.0.20:30080"), counted(Tcp, "0.0.0.0:30080")), (counts(1), counts(2)));
}

#[test]
fn with_affinity_each_connection_counts_and_what_is_sent_to_the_agent_does_not() {
    let _node = node();
    let (_pod5, pod6) = (pod5(), pod(6));
    ip("route add local 169.254.64.0/18 dev lo");
    tcp_server("169.254.77.12:15001");
    let mut rules = rules(Mode::Nftables);
    let mut lead = |target| {
        let inside = vec![(frontend(VIP, Tcp), Some(target))];
        rules.apply(Changes { inside, ..Changes::default() }, &is_local).unwrap();
        pod6.run(|| (0..3).for_each(|_| drop(call(VIP).unwrap())));
    };
    lead(Target::Listener(at("169.254.77.12:15001")));
    assert_eq!(all(), HashMap::new());
    lead(Target::Sticky(vec![at(POD)], Duration::from_secs(60)));
    assert_eq!(counted(Tcp, VIP), flows(3));
}

#[test]
fn the_next_agent_counts_on_and_forgets_frontends_that_are_gone_and_a_new_service_begins_anew() {
    let _node = node();
    let _pod5 = pod5();
    let others = "10.96.0.21:80";
    let mut before = rules(Mode::Nftables);
    for address in [VIP, others] {
        set(&mut before, Tcp, address, Some(&[POD]));
        call(address).unwrap();
    }
    let plan = [(frontend(VIP, Tcp), direct(&[POD]))].into_iter().collect();
    let mut next = rules(Mode::Nftables);
    next.replace(&plan, &Default::default(), &is_local).unwrap();
    call(VIP).unwrap();
    assert_eq!(all(), HashMap::from([(frontend(VIP, Tcp), flows(2))]));
    next.forget_counts(&[frontend(VIP, Tcp), frontend(others, Tcp)]).unwrap();
    assert_eq!(all(), HashMap::new());
    call(VIP).unwrap();
    assert_eq!(counted(Tcp, VIP), flows(1));
}

fn without_a_table_nothing_is_counted(mode: Mode) {
    let _node = node();
    assert_eq!(all(), HashMap::new());
    drop(rules(mode));
    assert_eq!(all(), HashMap::new());
}

/// So many that the kernel gives them out in many pieces; among changes by others each is found once.
#[test]
fn ten_thousand_frontends_that_were_called_are_read_in_a_moment_and_whole_while_others_change() {
    let _node = node();
    let mut rules = rules(Mode::Nftables);
    let frontends: Vec<Frontend> = (0..10_000_u32)
        .map(|i| Frontend { address: SocketAddr::new(IpAddr::V4((0x0a60_0000 + i).into()), 80), protocol: Udp })
        .collect();
    ip("route add 10.244.1.5 dev lo");
    let plan = frontends.iter().map(|at| (*at, direct(&[POD]))).collect();
    rules.replace(&plan, &Default::default(), &is_local).unwrap();
    for Frontend { address, .. } in &frontends {
        // Each is a flow of its own.
        UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap().send_to(b"?", address).unwrap();
    }
    let counts = RuleCounts::default();
    let read = || {
        let started = Instant::now();
        let read = counts.read().unwrap();
        let took = started.elapsed();
        let missing: Vec<_> = frontends.iter().filter(|at| read.get(at) != Some(&flows(1))).take(3).collect();
        assert!(read.len() == frontends.len() && missing.is_empty(), "{}: {missing:?}", read.len());
        took
    };
    let mut times: Vec<Duration> = (0..11).map(|_| read()).collect();
    times.sort();
    println!("10,000 frontends: read in {:?}", times[5]);
    assert!(times[5] < Duration::from_secs(1), "{times:?}");
    for i in 0..5_u16 {
        let many = (0..500).map(|j| format!("10.97.{i}.{} . udp . {}", j % 250, 1 + j / 250)).collect::<Vec<_>>();
        let change = format!("add element inet {TABLE} services4_sent {{ {} }}", many.join(", "));
        let writer = std::thread::spawn(move || nft(&change));
        while !writer.is_finished() {
            read();
        }
        writer.join().unwrap();
    }
}
