//! Services with IPv6 addresses, beside IPv4 ones and on the same sockets.

use std::{
    collections::HashSet,
    io::{ErrorKind, Read},
    net::{SocketAddr, TcpStream, UdpSocket},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use edgemesh_ebpf_abi::Counter;
use edgemesh_mesh::model::Protocol::{Tcp, Udp};

use crate::sandbox::{Datapath, Mode, Sandbox, close_other_ports, in_both_modes, set, tcp_server, udp_server};

in_both_modes! {
    a_tcp_connection_to_an_ipv6_service_reaches_every_pod_and_its_peer_is_the_service,
    udp_answers_come_from_the_ipv6_service_address,
    one_socket_talks_to_a_service_at_its_addresses_of_both_families,
    ipv6_endpoints_change_under_traffic_without_a_failed_connection,
}

const VIP: &str = "[fd00:96::20]:80";
const PODS: [&str; 3] = ["[fd00:1::5]:8080", "[fd00:1::6]:8080", "[fd00:2::7]:8081"];
const ADDRESSES: [&str; 4] = ["fd00:1::5", "fd00:1::6", "fd00:2::7", "10.244.1.5"];
const VIP4: &str = "10.96.0.20:80";
const POD4: &str = "10.244.1.5:8080";

fn call_tcp(address: &str) -> std::io::Result<String> {
    let mut answer = String::new();
    TcpStream::connect(address)?.read_to_string(&mut answer)?;
    Ok(answer)
}

fn udp_client() -> UdpSocket {
    let socket = UdpSocket::bind("[::]:0").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    socket
}

fn receive(socket: &UdpSocket) -> (String, SocketAddr) {
    let mut buffer = [0; 64];
    let (length, from) = socket.recv_from(&mut buffer).unwrap();
    (String::from_utf8_lossy(&buffer[..length]).into_owned(), from)
}

fn a_tcp_connection_to_an_ipv6_service_reaches_every_pod_and_its_peer_is_the_service(mode: Mode) {
    let sandbox = Sandbox::new(&ADDRESSES);
    let mut datapath = sandbox.datapath(mode);
    for pod in PODS {
        tcp_server(pod);
    }
    set(&mut datapath, Tcp, VIP, Some(&PODS));
    set(&mut datapath, Tcp, "[fd00:96::20]:0", Some(&[]));
    let open: Vec<TcpStream> = (0..60).map(|_| TcpStream::connect(VIP).unwrap()).collect();
    let answers: HashSet<String> = open
        .iter()
        .map(|mut stream| {
            assert_eq!(stream.peer_addr().unwrap(), VIP.parse().unwrap());
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            answer
        })
        .collect();
    assert_eq!(answers.len(), 3, "{answers:?}");
    datapath.assert_counted(Counter::TcpConnects, 60);
    let remembered = |datapath: &Datapath| match datapath {
        Datapath::Ebpf(_, counters) => counters.remembered_peers().unwrap(),
        Datapath::Nftables(_) => 0,
    };
    assert!(mode == Mode::Nftables || remembered(&datapath) == 60);
    drop(open);
    assert_eq!(remembered(&datapath), 0, "closed sockets leave nothing behind");
    assert_eq!(call_tcp("[fd00:96::20]:81").unwrap_err().kind(), ErrorKind::ConnectionRefused, "no such port");
    set(&mut datapath, Tcp, VIP, Some(&[]));
    assert_eq!(call_tcp(VIP).unwrap_err().kind(), ErrorKind::HostUnreachable, "no endpoint");
    set(&mut datapath, Tcp, VIP, None);
    set(&mut datapath, Tcp, "[fd00:96::20]:0", None);
    assert_eq!(call_tcp(VIP).unwrap_err().kind(), ErrorKind::NetworkUnreachable, "no longer a Service address");
    assert_eq!(call_tcp(PODS[0]).unwrap(), PODS[0], "pods are reached by their own addresses");
}

fn udp_answers_come_from_the_ipv6_service_address(mode: Mode) {
    let sandbox = Sandbox::new(&ADDRESSES);
    let mut datapath = sandbox.datapath(mode);
    for pod in PODS {
        udp_server(pod);
    }
    set(&mut datapath, Udp, VIP, Some(&PODS));
    let service: SocketAddr = VIP.parse().unwrap();
    let socket = udp_client();
    let answers: HashSet<String> = (0..10)
        .map(|_| {
            socket.send_to(b"?", VIP).unwrap();
            let (answer, from) = receive(&socket);
            assert_eq!(from, service);
            answer
        })
        .collect();
    assert_eq!(answers.len(), 1, "one socket talks to one pod");
    let connected = udp_client();
    connected.connect(VIP).unwrap();
    connected.send(b"?").unwrap();
    assert_eq!(receive(&connected).1, service);
    assert_eq!(connected.peer_addr().unwrap(), service);
    datapath.assert_counted(Counter::UdpDatagrams, 10);
    datapath.assert_counted(Counter::UdpConnects, 1);
    close_other_ports(&mut datapath, VIP);
    set(&mut datapath, Udp, VIP, Some(&[]));
    assert_eq!(socket.send_to(b"?", VIP).unwrap_err().kind(), ErrorKind::HostUnreachable);
}

fn one_socket_talks_to_a_service_at_its_addresses_of_both_families(mode: Mode) {
    let sandbox = Sandbox::new(&ADDRESSES);
    let mut datapath = sandbox.datapath(mode);
    udp_server(PODS[0]);
    udp_server(POD4);
    tcp_server(PODS[0]);
    tcp_server(POD4);
    for protocol in [Tcp, Udp] {
        set(&mut datapath, protocol, VIP, Some(&PODS[..1]));
        set(&mut datapath, protocol, VIP4, Some(&[POD4]));
    }
    assert_eq!(call_tcp(VIP).unwrap(), PODS[0]);
    assert_eq!(call_tcp(VIP4).unwrap(), POD4);
    let socket = socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::DGRAM, None).unwrap();
    socket.set_only_v6(false).unwrap();
    let socket = UdpSocket::from(socket);
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mapped: SocketAddr = "[::ffff:10.96.0.20]:80".parse().unwrap();
    socket.send_to(b"?", mapped).unwrap();
    assert_eq!(receive(&socket), (POD4.to_owned(), mapped));
    socket.send_to(b"?", VIP).unwrap();
    assert_eq!(receive(&socket), (PODS[0].to_owned(), VIP.parse().unwrap()));
}

fn ipv6_endpoints_change_under_traffic_without_a_failed_connection(mode: Mode) {
    let sandbox = Sandbox::new(&ADDRESSES);
    let mut datapath = sandbox.datapath(mode);
    for pod in PODS {
        tcp_server(pod);
    }
    set(&mut datapath, Tcp, VIP, Some(&PODS[..1]));
    let (stop, connections) = (AtomicBool::new(false), AtomicUsize::new(0));
    let netns = std::fs::File::open("/proc/thread-self/ns/net").unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            nix::sched::setns(&netns, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            while !stop.load(Ordering::Relaxed) {
                let answer = call_tcp(VIP).unwrap();
                assert!(PODS.contains(&answer.as_str()), "{answer}");
                connections.fetch_add(1, Ordering::Relaxed);
            }
        });
        let until = Instant::now() + Duration::from_secs(1);
        let mut round = 0_usize;
        while Instant::now() < until {
            round += 1;
            let first = round % 3;
            set(&mut datapath, Tcp, VIP, Some(&PODS[first..=first + round % (3 - first)]));
            let other = format!("[fd00:96::{:x}]:80", 0x100 + round % 200);
            set(&mut datapath, Tcp, &other, (!round.is_multiple_of(3)).then_some(&["[fd00:9::9]:9"]));
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(connections.load(Ordering::Relaxed) > 100);
    datapath.assert_counted(Counter::Inconsistent, 0);
}
