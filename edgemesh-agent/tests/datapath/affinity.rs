//! `sessionAffinity: ClientIP`: clients are network namespaces, each keeps its pod.

use std::{
    collections::HashSet,
    io::Read,
    net::{TcpStream, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use edgemesh_agent::datapath::plan::{Change, Frontend, Target};
use edgemesh_mesh::model::Protocol::{self, Tcp, Udp};
use nix::sched::{CloneFlags, unshare};

use crate::sandbox::{Apply, Mode, Sandbox, at, in_both_modes, ip, set, tcp_server};

in_both_modes! {
    a_client_keeps_its_pod_while_it_is_there_and_chooses_again_when_it_is_gone,
    a_client_that_does_not_call_for_the_timeout_chooses_again,
    udp_clients_keep_their_pod_across_sockets,
}

const LONG: Duration = Duration::from_secs(10_800);

fn set_sticky(datapath: &mut impl Apply, protocol: Protocol, frontend: &str, backends: &[&str], timeout: Duration) {
    let target = Target::Sticky(backends.iter().map(|backend| at(backend)).collect(), timeout);
    let frontend = Frontend { address: at(frontend), protocol };
    datapath.apply_change(&Change { frontend, target: Some(&target) });
}

fn call(address: &str) -> String {
    let mut answer = String::new();
    TcpStream::connect(address).unwrap().read_to_string(&mut answer).unwrap();
    answer
}

/// Which pod an unconnected UDP socket is sent to: the one whose socket the datagram reaches.
fn call_udp(servers: &[UdpSocket], service: &str) -> usize {
    UdpSocket::bind("0.0.0.0:0").unwrap().send_to(b"?", service).unwrap();
    let until = Instant::now() + Duration::from_secs(5);
    let mut buffer = [0; 8];
    while Instant::now() < until {
        for (at, server) in servers.iter().enumerate() {
            if server.recv_from(&mut buffer).is_ok() {
                return at;
            }
        }
    }
    panic!("no pod got the datagram");
}

fn a_client_keeps_its_pod_while_it_is_there_and_chooses_again_when_it_is_gone(mode: Mode) {
    let pods: Vec<String> = (1..=8).map(|last| format!("10.244.1.{last}:8080")).collect();
    let pods: Vec<&str> = pods.iter().map(String::as_str).collect();
    let addresses: Vec<&str> = pods.iter().map(|pod| pod.split(':').next().unwrap()).collect();
    let sandbox = Sandbox::new(&addresses);
    let mut datapath = sandbox.datapath(mode);
    for pod in &pods {
        tcp_server(pod);
    }
    let (one, other) = ("10.96.0.20:80", "10.96.0.20:81");
    set_sticky(&mut datapath, Tcp, one, &pods, LONG);
    let kept = call(one);
    assert!((0..40).all(|_| call(one) == kept));
    // The others change: it stays.
    let mut fewer: Vec<&str> = pods.iter().copied().filter(|pod| *pod == kept || pod.ends_with(".1:8080")).collect();
    set_sticky(&mut datapath, Tcp, one, &fewer, LONG);
    assert!((0..20).all(|_| call(one) == kept));
    set_sticky(&mut datapath, Tcp, one, &pods, LONG);
    assert!((0..20).all(|_| call(one) == kept));
    // It goes: another one is kept.
    fewer = pods.iter().copied().filter(|pod| *pod != kept).collect();
    set_sticky(&mut datapath, Tcp, one, &fewer, LONG);
    let next = call(one);
    assert!(next != kept && (0..20).all(|_| call(one) == next));
    // Each port is kept by itself: of 20 ports, not all lead to the same pod.
    let ports: HashSet<String> = (0..20)
        .map(|port| {
            let frontend = format!("10.96.0.21:{}", 1000 + port);
            set_sticky(&mut datapath, Tcp, &frontend, &pods, LONG);
            call(&frontend)
        })
        .collect();
    assert!(ports.len() > 1, "{ports:?}");
    // Without affinity, connections spread.
    set(&mut datapath, Tcp, other, Some(&pods));
    assert!((0..60).map(|_| call(other)).collect::<HashSet<_>>().len() > 1);
}

#[test]
fn every_network_namespace_is_a_client_of_its_own() {
    let pods: Vec<String> = (1..=8).map(|last| format!("10.244.1.{last}:8080")).collect();
    let pods: Vec<&str> = pods.iter().map(String::as_str).collect();
    let addresses: Vec<&str> = pods.iter().map(|pod| pod.split(':').next().unwrap()).collect();
    let sandbox = Sandbox::new(&addresses);
    let (mut programs, _) = sandbox.programs();
    set_sticky(&mut programs, Tcp, "10.96.0.20:80", &pods, LONG);
    let kept: HashSet<String> = (0..12)
        .map(|_| {
            let client = thread::spawn({
                let addresses: Vec<String> = addresses.iter().map(|&address| address.to_owned()).collect();
                let pods: Vec<String> = pods.iter().map(|&pod| pod.to_owned()).collect();
                move || {
                    unshare(CloneFlags::CLONE_NEWNET).unwrap();
                    ip("link set lo up");
                    for address in addresses {
                        ip(&format!("address add {address}/32 dev lo"));
                    }
                    for pod in &pods {
                        tcp_server(pod);
                    }
                    let first = call("10.96.0.20:80");
                    assert!((0..10).all(|_| call("10.96.0.20:80") == first));
                    first
                }
            });
            client.join().unwrap()
        })
        .collect();
    assert!(kept.len() > 1, "12 clients, and all of them at {kept:?}");
}

fn a_client_that_does_not_call_for_the_timeout_chooses_again(mode: Mode) {
    let pods = ["[fd00:1::1]:8080", "[fd00:1::2]:8080", "[fd00:1::3]:8080", "[fd00:1::4]:8080"];
    let sandbox = Sandbox::new(&["fd00:1::1", "fd00:1::2", "fd00:1::3", "fd00:1::4"]);
    let mut datapath = sandbox.datapath(mode);
    for pod in pods {
        tcp_server(pod);
    }
    let service = "[fd00:96::20]:80";
    set_sticky(&mut datapath, Tcp, service, &pods, Duration::from_secs(1));
    let kept = call(service);
    // Longer than the timeout in all, but never between two calls.
    let until = Instant::now() + Duration::from_millis(1500);
    while Instant::now() < until {
        assert_eq!(call(service), kept);
        thread::sleep(Duration::from_millis(20));
    }
    // Each round after a pause chooses among four; the same one 20 times over would be a wonder.
    let moved = (0..20).any(|_| {
        thread::sleep(Duration::from_millis(1100));
        call(service) != kept
    });
    assert!(moved);
}

fn udp_clients_keep_their_pod_across_sockets(mode: Mode) {
    let pods: Vec<String> = (1..=8).map(|last| format!("10.244.1.{last}:8080")).collect();
    let addresses: Vec<&str> = pods.iter().map(|pod| pod.split(':').next().unwrap()).collect();
    let sandbox = Sandbox::new(&addresses);
    let mut datapath = sandbox.datapath(mode);
    let servers: Vec<UdpSocket> = pods
        .iter()
        .map(|pod| {
            let socket = UdpSocket::bind(pod).unwrap();
            socket.set_nonblocking(true).unwrap();
            socket
        })
        .collect();
    let pods: Vec<&str> = pods.iter().map(String::as_str).collect();
    let service = "10.96.0.20:53";
    set_sticky(&mut datapath, Udp, service, &pods, LONG);
    let kept = call_udp(&servers, service);
    assert!((0..30).all(|_| call_udp(&servers, service) == kept));
    set(&mut datapath, Udp, service, Some(&pods));
    assert!((0..60).map(|_| call_udp(&servers, service)).collect::<HashSet<_>>().len() > 1);
}
