//! Pods and processes of a node where rules of nftables translate: what passes a bridge, what is refused, routes, and the
//! end of flows whose endpoint is gone.

use std::{
    io::{ErrorKind, Read},
    net::{SocketAddr, TcpStream, UdpSocket},
    process::Command,
    time::{Duration, Instant},
};

use edgemesh_agent::datapath::{
    nftables::{Changes, NftError, Rules, TABLE},
    outside::OutsideTarget,
    plan::{Frontend, Target},
};
use edgemesh_mesh::model::Protocol::{self, Tcp, Udp};

use crate::{
    hosts::{Host, node, other_node, pod, who_calls},
    outside::{call, call_udp, direct, is_local, nft, rules, shown, sweep, while_calling},
    sandbox::{Mode, at, ip, tcp_server},
};

const VIP: &str = "10.96.0.20:80";
const VIP6: &str = "[fd00:96::20]:80";

/// Has frontends lead to backends, for this node and its pods.
fn serve(rules: &mut Rules, protocol: Protocol, frontend: &str, backends: Option<&[&str]>) {
    let frontend = Frontend { address: at(frontend), protocol };
    let inside = vec![(frontend, backends.map(direct))];
    rules.apply(Changes { inside, ..Changes::default() }, &is_local).unwrap();
}

fn pods<const N: usize>(numbers: [u8; N]) -> [Host; N] {
    numbers.map(|number| {
        let host = pod(number);
        host.run(move || {
            who_calls(&format!("10.244.1.{number}:8080"));
            who_calls(&format!("[fd00:1::{number}]:8080"));
        });
        host
    })
}

#[test]
fn pods_behind_one_bridge_call_one_another_and_themselves_through_a_service() {
    let _node = node();
    let [pod5, pod6] = pods([5, 6]);
    let mut rules = rules(Mode::Nftables);
    for protocol in [Tcp, Udp] {
        serve(&mut rules, protocol, VIP, Some(&["10.244.1.5:8080"]));
        serve(&mut rules, protocol, VIP6, Some(&["[fd00:1::5]:8080"]));
    }
    for (address, server, caller, itself) in
        [(VIP, "10.244.1.5:8080", "10.244.1.6", "10.244.1.1"), (VIP6, "[fd00:1::5]:8080", "fd00:1::6", "fd00:1::1")]
    {
        assert_eq!(pod6.run(move || call(address)).unwrap(), format!("{server} {caller}"), "its address is kept");
        assert_eq!(pod6.run(move || call_udp(address)).unwrap(), format!("{server} {caller}"));
        assert_eq!(pod5.run(move || call(address)).unwrap(), format!("{server} {itself}"), "a pod that calls itself");
        assert_eq!(pod5.run(move || call_udp(address)).unwrap(), format!("{server} {itself}"));
        assert_eq!(call(address).unwrap(), format!("{server} {itself}"), "a process of the host");
        assert_eq!(call_udp(address).unwrap(), format!("{server} {itself}"));
    }
    pod6.run(|| assert_eq!(TcpStream::connect(VIP).unwrap().peer_addr().unwrap(), at(VIP)));
}

#[test]
fn pods_and_the_host_reach_endpoints_on_another_node() {
    let _node = node();
    let (pod6, other) = (pod(6), other_node());
    other.run(|| who_calls("10.244.2.5:8080"));
    let mut rules = rules(Mode::Nftables);
    serve(&mut rules, Tcp, VIP, Some(&["10.244.2.5:8080"]));
    assert_eq!(pod6.run(|| call(VIP)).unwrap(), "10.244.2.5:8080 10.244.1.6");
    // The first address that the host has is another interface's: the endpoint sees the one of the way to it.
    assert_eq!(call(VIP).unwrap(), "10.244.2.5:8080 192.168.1.11");
}

#[test]
fn cluster_addresses_are_served_beside_kube_proxy_whoever_came_first() {
    // What kube-proxy does, in short: its chain at the same hook sends the same cluster address elsewhere.
    let mut kube_proxy = "table ip kube-proxy {
        chain nat-prerouting { type nat hook prerouting priority dstnat; jump services; }
        chain nat-output { type nat hook output priority -100; jump services; }
        chain nat-postrouting { type nat hook postrouting priority srcnat; meta mark & 0x4000 != 0 masquerade; }
        chain services {"
        .to_owned();
    for protocol in ["tcp", "udp"] {
        let to = "meta mark set meta mark | 0x4000 dnat to 10.244.1.6:8080";
        kube_proxy.push_str(&format!("\nip daddr {{ 10.96.0.20, 10.96.0.21 }} {protocol} dport 80 {to}"));
    }
    kube_proxy.push_str("\n}\n}");
    for kube_proxy_first in [true, false] {
        let _node = node();
        let [_pod5, _pod6, pod7] = pods([5, 6, 7]);
        if kube_proxy_first {
            nft(&kube_proxy);
        }
        let mut rules = rules(Mode::Nftables);
        let both = |rules: &mut Rules, backends: Option<&[&str]>| {
            for protocol in [Tcp, Udp] {
                serve(rules, protocol, VIP, backends);
            }
        };
        both(&mut rules, Some(&["10.244.1.5:8080"]));
        if !kube_proxy_first {
            nft(&kube_proxy);
        }
        let ours =
            || [pod7.run(|| [call(VIP), call_udp(VIP)]), [call(VIP), call_udp(VIP)]].map(|of| of.map(Result::unwrap));
        let [of_pod, of_host] = ours();
        assert_eq!(of_pod, ["10.244.1.5:8080 10.244.1.7"; 2], "it is not masqueraded as kube-proxy would");
        assert_eq!(of_host, ["10.244.1.5:8080 10.244.1.1"; 2]);
        let its_own = "10.96.0.21:80";
        let answers = pod7.run(|| [call(its_own), call_udp(its_own)]).map(Result::unwrap);
        assert_eq!(answers, ["10.244.1.6:8080 10.244.1.1"; 2], "its own works on");
        both(&mut rules, Some(&[]));
        assert_eq!(pod7.run(|| call(VIP)).unwrap_err().kind(), ErrorKind::HostUnreachable, "not left to it");
        both(&mut rules, None);
        assert_eq!(pod7.run(|| call(VIP)).unwrap(), "10.244.1.6:8080 10.244.1.1", "its turn");
    }
}

#[test]
fn a_pod_is_told_that_a_service_has_no_endpoint_or_no_such_port() {
    let _node = node();
    let pod6 = pod(6);
    let mut rules = rules(Mode::Nftables);
    for vip in [VIP, VIP6] {
        serve(&mut rules, Tcp, vip, Some(&[]));
        serve(&mut rules, Udp, vip, Some(&[]));
        serve(&mut rules, Tcp, &vip.replace(":80", ":0"), Some(&[]));
    }
    for (vip, closed) in [(VIP, "10.96.0.20:81"), (VIP6, "[fd00:96::20]:81")] {
        assert_eq!(pod6.run(move || call(vip)).unwrap_err().kind(), ErrorKind::HostUnreachable, "{vip}");
        assert_eq!(pod6.run(move || call_udp(vip)).unwrap_err().kind(), ErrorKind::ConnectionRefused, "{vip}");
        assert_eq!(pod6.run(move || call(closed)).unwrap_err().kind(), ErrorKind::ConnectionRefused, "{closed}");
    }
}

#[test]
fn pods_of_the_node_are_not_outside_of_it() {
    let _node = node();
    let [pod5, pod6] = pods([5, 6]);
    let mut rules = rules(Mode::Nftables);
    serve(&mut rules, Tcp, "192.168.1.11:30080", Some(&["10.244.1.5:8080"]));
    let frontend = Frontend { address: at("0.0.0.0:30080"), protocol: Tcp };
    let outside = vec![(frontend, Some(OutsideTarget::Drop))];
    rules.apply(Changes { outside, ..Changes::default() }, &is_local).unwrap();
    assert_eq!(pod6.run(|| call("192.168.1.11:30080")).unwrap(), "10.244.1.5:8080 10.244.1.6");
    assert!(call("192.168.1.11:30080").unwrap().starts_with("10.244.1.5:8080"), "nor is the host");
    drop(pod5);
}

#[test]
fn a_listener_of_the_agent_serves_pods_and_the_host() {
    let _node = node();
    let pod6 = pod(6);
    ip("route add local 169.254.64.0/18 dev lo");
    tcp_server("169.254.77.12:15001");
    let mut rules = rules(Mode::Nftables);
    for address in [VIP, "127.0.0.1:30080"] {
        let target = Target::Listener(at("169.254.77.12:15001"));
        let inside = vec![(Frontend { address: at(address), protocol: Tcp }, Some(target))];
        rules.apply(Changes { inside, ..Changes::default() }, &is_local).unwrap();
        assert_eq!(call(address).unwrap(), "169.254.77.12:15001", "{address}");
    }
    assert_eq!(pod6.run(|| call(VIP)).unwrap(), "169.254.77.12:15001");
}

#[test]
fn udp_that_was_sent_before_a_service_was_there_reaches_it_once_it_is() {
    let _node = node();
    let [pod5, pod6] = pods([5, 6]);
    // Its packets leave the node, untranslated, and the kernel remembers their flow as such.
    ip("route add 10.96.0.0/16 via 192.168.1.12");
    let mut rules = rules(Mode::Nftables);
    // The chains that follow flows come with the first frontend.
    serve(&mut rules, Udp, "10.96.0.99:80", Some(&["10.244.1.9:8080"]));
    let socket = pod6.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        socket.send_to(b"?", VIP).unwrap();
        socket
    });
    serve(&mut rules, Udp, VIP, Some(&["10.244.1.5:8080"]));
    let from = pod6.run(move || {
        socket.send_to(b"?", VIP).unwrap();
        socket.recv_from(&mut [0; 64]).unwrap().1
    });
    assert_eq!(from, at(VIP));
    drop(pod5);
}

#[test]
fn udp_that_was_sent_while_somebody_had_removed_the_table_reaches_its_service_once_it_is_back() {
    let _node = node();
    let [pod5, pod6] = pods([5, 6]);
    ip("route add 10.96.0.0/16 via 192.168.1.12");
    let mut rules = rules(Mode::Nftables);
    serve(&mut rules, Udp, VIP, Some(&["10.244.1.5:8080"]));
    nft("flush ruleset");
    // A firewall that begins anew has connections tracked.
    nft("table inet firewall { chain input { type filter hook forward priority filter; ct state invalid drop; }; }");
    let socket = pod6.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        socket.send_to(b"?", VIP).unwrap();
        socket
    });
    rules.look();
    rules.apply(Changes::default(), &is_local).unwrap();
    let from = pod6.run(move || {
        socket.send_to(b"?", VIP).unwrap();
        socket.recv_from(&mut [0; 64]).unwrap().1
    });
    assert_eq!(from, at(VIP));
    drop(pod5);
}

#[test]
fn udp_flows_move_on_from_an_endpoint_that_is_gone_and_direct_ones_stay() {
    let sandbox = node();
    let [pod5, pod6, pod7] = pods([5, 6, 7]);
    let mut rules = rules(Mode::Nftables);
    serve(&mut rules, Udp, VIP, Some(&["10.244.1.5:8080"]));
    let ask = |socket: &UdpSocket, to: &str| {
        socket.send_to(b"?", to).unwrap();
        let mut buffer = [0; 64];
        let (length, from) = socket.recv_from(&mut buffer).unwrap();
        assert_eq!(from, at(to));
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    };
    let socket = pod7.run(move || {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        assert_eq!(ask(&socket, VIP), "10.244.1.5:8080 10.244.1.7");
        assert_eq!(ask(&socket, "10.244.1.5:8080"), "10.244.1.5:8080 10.244.1.7");
        socket
    });
    serve(&mut rules, Udp, VIP, Some(&["10.244.1.6:8080"]));
    let swept = sweep(&rules, &sandbox, &["10.244.1.5:8080"]);
    assert_eq!((swept.suspects, swept.udp, swept.failed), (1, 1, 0), "{swept:?}");
    pod7.run(move || {
        assert_eq!(ask(&socket, VIP), "10.244.1.6:8080 10.244.1.7");
        assert_eq!(ask(&socket, "10.244.1.5:8080"), "10.244.1.5:8080 10.244.1.7");
    });
    drop((pod5, pod6));
}

#[test]
fn udp_flows_of_a_service_that_was_removed_while_no_agent_was_there_are_ended() {
    let sandbox = node();
    let [pod5, pod7] = pods([5, 7]);
    for stays in [None, Some("10.96.0.30:80")] {
        let mut before = rules(Mode::Nftables);
        serve(&mut before, Udp, VIP, Some(&["10.244.1.5:8080"]));
        pod7.run(|| call_udp(VIP)).unwrap();
        drop(before);
        let mut next = rules(Mode::Nftables);
        let plan =
            stays.map(|address| (Frontend { address: at(address), protocol: Udp }, direct(&["10.244.1.5:8080"])));
        next.replace(&plan.into_iter().collect(), &Default::default(), &is_local).unwrap();
        let swept = sweep(&next, &sandbox, &["10.244.1.5:8080"]);
        assert_eq!((swept.udp, swept.failed), (1, 0), "{stays:?}: {swept:?}");
    }
    drop(pod5);
}

#[test]
fn tcp_connections_to_an_endpoint_that_is_gone_are_ended_in_the_pod_that_holds_them() {
    let sandbox = node();
    let (pod5, pod7) = (pod(5), pod(7));
    // It accepts and says nothing.
    let (listener, listener6) = pod5.run(|| {
        let bind = |address: &str| std::net::TcpListener::bind(address).unwrap();
        (bind("10.244.1.5:8080"), bind("[fd00:1::5]:8080"))
    });
    let mut rules = rules(Mode::Nftables);
    serve(&mut rules, Tcp, VIP, Some(&["10.244.1.5:8080"]));
    serve(&mut rules, Tcp, VIP6, Some(&["[fd00:1::5]:8080"]));
    let (through, direct) = pod7.run(|| {
        let through = [VIP, VIP6].map(|vip| TcpStream::connect(vip).unwrap());
        (through, TcpStream::connect("10.244.1.5:8080").unwrap())
    });
    let of_host = TcpStream::connect(VIP).unwrap();
    let swept = sweep(&rules, &sandbox, &["10.244.1.5:8080", "[fd00:1::5]:8080"]);
    assert_eq!((swept.tcp, swept.udp, swept.failed), (3, 0, 0), "{swept:?}");
    for mut stream in through.into_iter().chain([of_host]) {
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        assert_eq!(stream.read(&mut [0; 1]).unwrap_err().kind(), ErrorKind::ConnectionAborted);
    }
    direct.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    assert_eq!((&direct).read(&mut [0; 1]).unwrap_err().kind(), ErrorKind::WouldBlock, "it called the pod itself");
    drop((listener, listener6));
}

#[test]
fn the_next_agent_takes_over_the_table_with_the_clients_that_it_remembers() {
    let _node = node();
    let [pod5, pod6, pod7, client] = pods([5, 6, 7, 9]);
    let target =
        Target::Sticky(["5", "6", "7"].map(|n| at(&format!("10.244.1.{n}:8080"))).to_vec(), Duration::from_secs(60));
    let frontend = Frontend { address: at(VIP), protocol: Tcp };
    let plan = || [(frontend, target.clone())].into_iter().collect();
    assert!(!Rules::is_present());
    rules(Mode::Nftables).replace(&plan(), &Default::default(), &is_local).unwrap();
    assert!(Rules::is_present());
    let kept = client.run(|| call(VIP)).unwrap();
    let held = client.run(|| TcpStream::connect("10.244.1.5:8080").unwrap());
    for _ in 0..5 {
        let mut next = rules(Mode::Nftables);
        next.replace(&plan(), &Default::default(), &is_local).unwrap();
        assert_eq!(next.len(), 1);
        for _ in 0..5 {
            assert_eq!(client.run(|| call(VIP)).unwrap(), kept);
        }
    }
    // What is no longer planned goes with it.
    rules(Mode::Nftables).replace(&Default::default(), &Default::default(), &is_local).unwrap();
    assert!(client.run(|| TcpStream::connect_timeout(&at(VIP), Duration::from_millis(300))).is_err());
    drop((held, pod5, pod6, pod7));
}

#[test]
fn nft_shows_the_elements_as_they_were_meant() {
    let _node = node();
    let mut rules = rules(Mode::Nftables);
    for (protocol, vip, backend) in [(Tcp, VIP, "10.244.1.5:8080"), (Udp, VIP6, "[fd00:1::5]:8080")] {
        serve(&mut rules, protocol, vip, Some(&[backend]));
        serve(&mut rules, protocol, &vip.replace(":80", ":0"), Some(&[]));
    }
    let frontend = Frontend { address: at("0.0.0.0:30080"), protocol: Tcp };
    let target = OutsideTarget::Target(Target::Sticky(vec![at("10.244.2.5:8080")], Duration::from_secs(60)));
    let outside = vec![(frontend, Some(target))];
    rules.apply(Changes { outside, ..Changes::default() }, &is_local).unwrap();
    let table = shown("nft", &["list", "table", "inet", TABLE]);
    for elements in [
        "elements = { 10.96.0.20 . tcp . 80 : goto services4_of_1 }",
        "elements = { 10.96.0.20 . tcp . 80 . none : 10.244.1.5 . 8080 }",
        "elements = { fd00:96::20 . udp . 80 : goto services6_of_1 }",
        "elements = { fd00:96::20 . udp . 80 . none : fd00:1::5 . 8080 }",
        "elements = { 10.96.0.20 . tcp }",
        "elements = { 10.244.1.5 . 10.244.1.5 }",
        "elements = { fd00:1::5 }",
        "elements = { tcp . 30080 : goto nodeports4_of_1_for_60s }",
    ] {
        assert!(table.contains(elements), "{elements}: {table}");
    }
    let number = table.split_once("{ tcp . 30080 . none : ").unwrap().1.split(' ').next().unwrap();
    for elements in
        [format!("{{ tcp . 30080 . {number} : 10.244.2.5 . 8080 }}"), format!("{{ tcp . 30080 . {number} }}")]
    {
        assert!(table.contains(&elements), "{elements}: {table}");
    }
}

#[test]
fn a_table_of_another_layout_serves_until_its_successor_does() {
    let _node = node();
    let [pod5, pod6] = pods([5, 6]);
    let mut before = rules(Mode::Nftables);
    serve(&mut before, Tcp, VIP, Some(&["10.244.1.5:8080"]));
    let others = shown("nft", &["list", "table", "inet", TABLE]).replace(TABLE, &format!("{TABLE}_of_others"));
    let calls = while_calling(&pod6, VIP, || {
        for _ in 0..10 {
            nft(&others);
            nft(&format!("delete table inet {TABLE}"));
            let plan = [(Frontend { address: at(VIP), protocol: Tcp }, direct(&["10.244.1.5:8080"]))];
            rules(Mode::Nftables).replace(&plan.into_iter().collect(), &Default::default(), &is_local).unwrap();
            assert_eq!(shown("nft", &["list", "tables", "inet"]), format!("table inet {TABLE}\n"));
        }
    });
    assert!(calls > 20, "{calls} calls");
    drop(pod5);
}

#[test]
fn what_the_kernel_refuses_is_named_among_many_elements() {
    let _node = node();
    let mut rules = rules(Mode::Nftables);
    serve(&mut rules, Tcp, VIP, Some(&["10.244.1.5:8080"]));
    nft(&format!("delete table inet {TABLE}"));
    let frontend = |number: u16| Frontend { address: SocketAddr::new(at(VIP).ip(), number), protocol: Tcp };
    let inside = (1..20_000).map(|number| (frontend(number), Some(direct(&["10.244.1.5:8080"])))).collect();
    let error = rules.apply(Changes { inside, ..Changes::default() }, &is_local).unwrap_err();
    let NftError::Kernel { what, error } = error else { panic!("{error}") };
    assert_eq!((what.as_str(), error.kind()), ("services4", ErrorKind::NotFound), "{error}");
}

#[test]
fn a_table_that_can_not_be_taken_over_is_replaced() {
    let _node = node();
    let [pod5] = pods([5]);
    nft(&format!("table inet {TABLE} {{ map services4 {{ type ipv4_addr : verdict; }}; }}"));
    serve(&mut rules(Mode::Nftables), Tcp, VIP, Some(&["10.244.1.5:8080"]));
    assert!(call(VIP).is_ok());
    drop(pod5);
}

#[test]
fn a_table_that_somebody_else_removed_is_written_again() {
    let _node = node();
    let [pod5] = pods([5]);
    let mut rules = rules(Mode::Nftables);
    serve(&mut rules, Tcp, VIP, Some(&["10.244.1.5:8080"]));
    assert!(Command::new("nft").args(["flush", "ruleset"]).status().unwrap().success());
    let change = || Changes {
        inside: vec![(Frontend { address: at("10.96.0.21:80"), protocol: Tcp }, Some(direct(&["10.244.1.5:8080"])))],
        ..Changes::default()
    };
    let error = rules.apply(change(), &is_local).unwrap_err();
    println!("{error}");
    rules.apply(change(), &is_local).unwrap();
    for address in [VIP, "10.96.0.21:80"] {
        assert!(call(address).is_ok());
    }
    drop(pod5);
}

#[test]
fn host_processes_reach_services_without_a_default_route_and_lose_them_with_the_service() {
    let _node = node();
    let [pod5] = pods([5]);
    let routes = || {
        let output = Command::new("ip").args(["route", "show", "table", "all", "proto", "176"]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let mut rules = rules(Mode::Nftables);
    let other_ports = "10.96.0.20:0";
    serve(&mut rules, Tcp, VIP, Some(&["10.244.1.5:8080"]));
    serve(&mut rules, Tcp, other_ports, Some(&[]));
    assert!(call(VIP).is_ok());
    serve(&mut rules, Udp, VIP, Some(&[]));
    assert!(call(VIP).is_ok(), "another port is refused");
    serve(&mut rules, Tcp, VIP, Some(&[]));
    let started = Instant::now();
    assert_eq!(call(VIP).unwrap_err().kind(), ErrorKind::HostUnreachable);
    assert!(started.elapsed() < Duration::from_millis(500));
    assert!(routes().contains("unreachable 10.96.0.20"), "{}", routes());
    serve(&mut rules, Tcp, VIP, None);
    serve(&mut rules, Udp, VIP, None);
    assert_eq!(routes(), "");
    serve(&mut rules, Tcp, other_ports, None);
    assert_eq!(call(VIP).unwrap_err().kind(), ErrorKind::NetworkUnreachable);
    drop(pod5);
}

#[test]
fn a_load_balancer_without_endpoints_takes_no_other_port_of_its_address_away() {
    let _node = node();
    let (pod6, other) = (pod(6), other_node());
    other.run(|| who_calls("192.168.1.12:22"));
    let mut rules = rules(Mode::Nftables);
    // Load balancers of small clusters name the nodes' own addresses.
    serve(&mut rules, Tcp, "192.168.1.12:80", Some(&[]));
    assert_eq!(call("192.168.1.12:80").unwrap_err().kind(), ErrorKind::ConnectionRefused);
    assert_eq!(pod6.run(|| call("192.168.1.12:80")).unwrap_err().kind(), ErrorKind::HostUnreachable);
    assert_eq!(call("192.168.1.12:22").unwrap(), "192.168.1.12:22 192.168.1.11");
    assert_eq!(pod6.run(|| call("192.168.1.12:22")).unwrap(), "192.168.1.12:22 10.244.1.6");
}
