//! What sockets see: connections, datagrams, peers' names, errors, and changes while all of that goes on.

use std::{
    collections::HashMap,
    io::{ErrorKind, Read},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    os::fd::AsRawFd,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use edgemesh_agent::datapath::{
    ebpf::{Nowhere, Programs},
    map_sizes::MapSizes,
    plan::{Change, Frontend, Target},
};
use edgemesh_ebpf_abi::Counter;
use edgemesh_mesh::model::Protocol::{Tcp, Udp};

use crate::sandbox::{Mode, Sandbox, at, close_other_ports, in_both_modes, in_pod, ip, set, tcp_server, udp_server};

in_both_modes! {
    a_tcp_connection_to_a_service_reaches_a_pod_and_its_peer_is_the_service,
    ports_that_a_service_does_not_have_are_refused_at_once,
    connections_spread_over_all_pods_of_a_service,
    udp_answers_come_from_the_service_address,
    a_service_without_endpoints_is_unreachable_at_once,
    tcp_and_udp_of_one_address_and_port_are_apart,
    a_reconnected_udp_socket_is_not_translated_any_more,
    ipv6_sockets_reach_services_by_mapped_addresses,
    endpoints_change_under_traffic_without_a_failed_connection,
}

const VIP: &str = "10.96.0.20:80";
const PODS: [&str; 3] = ["10.244.1.5:8080", "10.244.1.6:8080", "10.244.2.7:8081"];
const POD_ADDRESSES: [&str; 3] = ["10.244.1.5", "10.244.1.6", "10.244.2.7"];
const PATIENCE: Duration = Duration::from_secs(5);

/// Connects and reads which backend answers.
fn call_tcp(address: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn udp_client() -> UdpSocket {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// Receives one datagram: which backend sent it, and from which address it seems to come.
fn receive(socket: &UdpSocket) -> (String, SocketAddr) {
    let mut buffer = [0; 64];
    let (length, from) = socket.recv_from(&mut buffer).unwrap();
    (String::from_utf8_lossy(&buffer[..length]).into_owned(), from)
}

/// `connect` with `AF_UNSPEC`: the socket has no peer any more.
fn disconnect(socket: &impl AsRawFd) {
    let address = libc::sockaddr { sa_family: libc::AF_UNSPEC as u16, sa_data: [0; 14] };
    let length = size_of::<libc::sockaddr>() as libc::socklen_t;
    // SAFETY: the address is valid for the call.
    assert_eq!(unsafe { libc::connect(socket.as_raw_fd(), &raw const address, length) }, 0);
}

fn a_tcp_connection_to_a_service_reaches_a_pod_and_its_peer_is_the_service(mode: Mode) {
    let sandbox = Sandbox::new(&POD_ADDRESSES);
    let mut datapath = sandbox.datapath(mode);
    tcp_server(PODS[0]);
    set(&mut datapath, Tcp, VIP, Some(&PODS[..1]));
    let mut stream = TcpStream::connect(VIP).unwrap();
    assert_eq!(stream.peer_addr().unwrap(), VIP.parse().unwrap());
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, PODS[0]);
    datapath.assert_counted(Counter::TcpConnects, 1);
    // The Service may go; the connection keeps its name.
    set(&mut datapath, Tcp, VIP, None);
    assert_eq!(stream.peer_addr().unwrap(), VIP.parse().unwrap());
    assert_eq!(call_tcp(VIP).unwrap_err().kind(), ErrorKind::NetworkUnreachable, "no longer a Service address");
    assert_eq!(call_tcp(PODS[0]).unwrap(), PODS[0], "pods are reached by their own addresses");
    assert_eq!(TcpStream::connect(PODS[0]).unwrap().peer_addr().unwrap(), PODS[0].parse().unwrap());
}

fn ports_that_a_service_does_not_have_are_refused_at_once(mode: Mode) {
    let sandbox = Sandbox::new(&POD_ADDRESSES);
    let mut datapath = sandbox.datapath(mode);
    tcp_server(PODS[0]);
    set(&mut datapath, Tcp, VIP, Some(&PODS[..1]));
    set(&mut datapath, Tcp, "10.96.0.20:0", Some(&[]));
    assert_eq!(call_tcp("10.96.0.20:81").unwrap_err().kind(), ErrorKind::ConnectionRefused);
    assert_eq!(call_tcp(VIP).unwrap(), PODS[0]);
    assert_eq!(call_tcp("10.96.0.21:81").unwrap_err().kind(), ErrorKind::NetworkUnreachable, "no Service's address");
    datapath.assert_counted(Counter::Refused, 1);
}

fn connections_spread_over_all_pods_of_a_service(mode: Mode) {
    let sandbox = Sandbox::new(&POD_ADDRESSES);
    let mut datapath = sandbox.datapath(mode);
    for pod in PODS {
        tcp_server(pod);
    }
    set(&mut datapath, Tcp, VIP, Some(&PODS));
    let mut answers: HashMap<String, usize> = HashMap::new();
    for _ in 0..600 {
        *answers.entry(call_tcp(VIP).unwrap()).or_default() += 1;
    }
    // Three standard deviations are 35.
    assert!(PODS.iter().all(|&pod| (150..250).contains(&answers[pod])), "{answers:?}");
}

fn udp_answers_come_from_the_service_address(mode: Mode) {
    let sandbox = Sandbox::new(&POD_ADDRESSES);
    let mut datapath = sandbox.datapath(mode);
    for pod in PODS {
        udp_server(pod);
    }
    set(&mut datapath, Udp, VIP, Some(&PODS));
    let service: SocketAddr = VIP.parse().unwrap();

    let unconnected = udp_client();
    let mut answers = Vec::new();
    for _ in 0..20 {
        unconnected.send_to(b"?", VIP).unwrap();
        let (answer, from) = receive(&unconnected);
        assert_eq!(from, service);
        answers.push(answer);
    }
    answers.dedup();
    assert_eq!(answers.len(), 1, "one socket talks to one pod");

    let connected = udp_client();
    connected.connect(VIP).unwrap();
    connected.send(b"?").unwrap();
    assert_eq!(receive(&connected).1, service);
    assert_eq!(connected.peer_addr().unwrap(), service);

    let mut pods: Vec<String> = (0..60)
        .map(|_| {
            let socket = udp_client();
            socket.send_to(b"?", VIP).unwrap();
            receive(&socket).0
        })
        .collect();
    pods.sort();
    pods.dedup();
    assert_eq!(pods.len(), 3, "sockets spread over the pods");
    datapath.assert_counted(Counter::UdpDatagrams, 80);
    datapath.assert_counted(Counter::UdpConnects, 1);
}

fn a_service_without_endpoints_is_unreachable_at_once(mode: Mode) {
    let sandbox = Sandbox::new(&[]);
    let mut datapath = sandbox.datapath(mode);
    close_other_ports(&mut datapath, VIP);
    set(&mut datapath, Tcp, VIP, Some(&[]));
    set(&mut datapath, Udp, VIP, Some(&[]));
    let started = Instant::now();
    assert_eq!(call_tcp(VIP).unwrap_err().kind(), ErrorKind::HostUnreachable);
    assert_eq!(udp_client().connect(VIP).unwrap_err().kind(), ErrorKind::HostUnreachable);
    assert_eq!(udp_client().send_to(b"?", VIP).unwrap_err().kind(), ErrorKind::HostUnreachable);
    assert!(started.elapsed() < Duration::from_millis(500), "{:?}", started.elapsed());
    datapath.assert_counted(Counter::Refused, 3);
}

fn tcp_and_udp_of_one_address_and_port_are_apart(mode: Mode) {
    let sandbox = Sandbox::new(&POD_ADDRESSES);
    let mut datapath = sandbox.datapath(mode);
    tcp_server(PODS[0]);
    udp_server(PODS[1]);
    set(&mut datapath, Tcp, VIP, Some(&PODS[..1]));
    set(&mut datapath, Udp, VIP, Some(&PODS[1..2]));
    assert_eq!(call_tcp(VIP).unwrap(), PODS[0]);
    let socket = udp_client();
    socket.send_to(b"?", VIP).unwrap();
    assert_eq!(receive(&socket).0, PODS[1]);
}

fn a_reconnected_udp_socket_is_not_translated_any_more(mode: Mode) {
    let sandbox = Sandbox::new(&POD_ADDRESSES);
    let mut datapath = sandbox.datapath(mode);
    let pod = udp_server(PODS[0]);
    set(&mut datapath, Udp, VIP, Some(&PODS[..1]));
    let socket = udp_client();
    socket.connect(VIP).unwrap();
    assert_eq!(socket.peer_addr().unwrap(), VIP.parse().unwrap());
    disconnect(&socket);
    socket.connect(pod).unwrap();
    assert_eq!(socket.peer_addr().unwrap(), pod, "it connected to the pod itself");
    socket.send(b"?").unwrap();
    assert_eq!(receive(&socket).1, pod);

    let unconnected = udp_client();
    unconnected.send_to(b"?", VIP).unwrap();
    assert_eq!(receive(&unconnected).1, VIP.parse().unwrap());
    unconnected.send_to(b"?", pod).unwrap();
    assert_eq!(receive(&unconnected).1, pod, "it sent to the pod itself");
}

fn ipv6_sockets_reach_services_by_mapped_addresses(mode: Mode) {
    let sandbox = Sandbox::new(&POD_ADDRESSES);
    let mut datapath = sandbox.datapath(mode);
    tcp_server(PODS[0]);
    udp_server(PODS[1]);
    set(&mut datapath, Tcp, VIP, Some(&PODS[..1]));
    set(&mut datapath, Udp, VIP, Some(&PODS[1..2]));
    let mapped: SocketAddr = "[::ffff:10.96.0.20]:80".parse().unwrap();
    let socket = socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::STREAM, None).unwrap();
    socket.set_only_v6(false).unwrap();
    socket.connect(&mapped.into()).unwrap();
    let mut stream = TcpStream::from(socket);
    assert_eq!(stream.peer_addr().unwrap(), mapped);
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, PODS[0]);

    let socket = socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::DGRAM, None).unwrap();
    socket.set_only_v6(false).unwrap();
    let socket = UdpSocket::from(socket);
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.send_to(b"?", mapped).unwrap();
    assert_eq!(receive(&socket), (PODS[1].to_owned(), mapped));
    socket.connect(mapped).unwrap();
    assert_eq!(socket.peer_addr().unwrap(), mapped);
}

#[test]
fn closed_sockets_leave_nothing_behind() {
    let sandbox = Sandbox::new(&POD_ADDRESSES);
    let (mut programs, counters) = sandbox.programs();
    tcp_server(PODS[0]);
    set(&mut programs, Tcp, VIP, Some(&PODS[..1]));
    set(&mut programs, Udp, VIP, Some(&PODS[..1]));
    let open: Vec<TcpStream> = (0..50).map(|_| TcpStream::connect(VIP).unwrap()).collect();
    let connected = udp_client();
    connected.connect(VIP).unwrap();
    assert_eq!(counters.remembered_peers().unwrap(), 51);
    drop((open, connected));
    assert_eq!(counters.remembered_peers().unwrap(), 0);
}

/// When a socket that failed to connect is closed the kernel no longer knows whom it called.
#[test]
fn connects_that_fail_leave_nothing_behind() {
    let sandbox = Sandbox::new(&POD_ADDRESSES);
    let (mut programs, counters) = sandbox.programs();
    // Nobody listens there.
    set(&mut programs, Tcp, VIP, Some(&PODS[..1]));
    for address in [VIP, "[::ffff:10.96.0.20]:80"] {
        for _ in 0..50 {
            assert_eq!(TcpStream::connect(address).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        }
    }
    assert_eq!(counters.get(Counter::TcpConnects).unwrap(), 100);
    assert_eq!(counters.remembered_peers().unwrap(), 0);
}

/// Nor does it when the connect failed before anything was sent, or the socket let its peer go.
#[test]
fn sockets_that_have_no_peer_when_they_are_closed_leave_nothing_behind() {
    let sandbox = Sandbox::new(&["10.244.1.5", "fd00:1::5"]);
    let (mut programs, counters) = sandbox.programs();
    for (vip, here, nowhere, any) in [
        ("10.96.0.20", "10.244.1.5:8080", "203.0.113.9:8080", "0.0.0.0:0"),
        ("[fd00:96::20]", "[fd00:1::5]:8080", "[2001:db8::9]:8080", "[::]:0"),
    ] {
        tcp_server(here);
        let (near, far) = (format!("{vip}:80"), format!("{vip}:81"));
        for protocol in [Tcp, Udp] {
            set(&mut programs, protocol, &near, Some(&[here]));
            set(&mut programs, protocol, &far, Some(&[nowhere]));
        }
        let udp = || UdpSocket::bind(any).unwrap();
        for _ in 0..50 {
            assert_eq!(TcpStream::connect(&far).unwrap_err().kind(), ErrorKind::NetworkUnreachable);
            assert_eq!(udp().connect(&far).unwrap_err().kind(), ErrorKind::NetworkUnreachable);
        }
        let (tcp, udp) = (TcpStream::connect(&near).unwrap(), udp());
        udp.connect(&near).unwrap();
        assert_eq!(counters.remembered_peers().unwrap(), 2);
        disconnect(&tcp);
        disconnect(&udp);
        drop((tcp, udp));
        assert_eq!(counters.remembered_peers().unwrap(), 0, "{vip}");
    }
    assert_eq!(counters.get(Counter::TcpConnects).unwrap(), 102);
    assert_eq!(counters.get(Counter::UdpConnects).unwrap(), 102);
}

/// Programs that name the name server with each question leave one remembered peer a question.
#[test]
fn a_crowd_of_unconnected_sockets_takes_nothing_from_connected_ones() {
    let sandbox = Sandbox::new(&POD_ADDRESSES);
    let (mut programs, counters) = sandbox.programs();
    tcp_server(PODS[0]);
    for protocol in [Tcp, Udp] {
        set(&mut programs, protocol, VIP, Some(&PODS[..1]));
    }
    let tcp = TcpStream::connect(VIP).unwrap();
    let udp = udp_client();
    udp.connect(VIP).unwrap();
    for _ in 0..70_000 {
        udp_client().send_to(b"?", VIP).unwrap();
    }
    let service: SocketAddr = VIP.parse().unwrap();
    assert_eq!((tcp.peer_addr().unwrap(), udp.peer_addr().unwrap()), (service, service));
    assert_eq!(counters.remembered_peers().unwrap(), 2);
    let mut sweeper = programs.take_sweeper().unwrap();
    let swept = std::thread::scope(|scope| scope.spawn(|| sweeper.sweep(&|_, _, _| true)).join().unwrap());
    assert_eq!((swept.tcp, swept.udp, swept.failed), (1, 1, 0), "{swept:?}");
}

/// Each network namespace has its own loopback addresses: those of pods are theirs.
#[test]
fn node_ports_at_the_loopback_address_are_the_hosts_only() {
    let sandbox = Sandbox::new(&POD_ADDRESSES);
    let (mut programs, _counters) = sandbox.programs();
    tcp_server(PODS[2]);
    let called = "127.0.0.1:30080";
    set(&mut programs, Tcp, called, Some(&PODS[2..]));
    assert_eq!(call_tcp(called).unwrap(), PODS[2]);
    in_pod(|| {
        assert_eq!(call_tcp(called).unwrap_err().kind(), ErrorKind::ConnectionRefused, "nobody listens in the pod");
        tcp_server(called);
        assert_eq!(call_tcp(called).unwrap(), called);
    });
    assert_eq!(call_tcp(called).unwrap(), PODS[2]);
}

/// By this `getaddrinfo` tells which addresses to name first (RFC 6724, section 6, rule 1): glibc with the port that it was
/// asked for, or 0, musl with 65535, Go with 9.
#[test]
fn a_udp_socket_of_a_pod_is_connected_to_a_port_that_a_service_lacks_if_the_family_works_and_refused_what_it_sends() {
    let sandbox = Sandbox::new(&[]);
    let (mut programs, counters) = sandbox.programs();
    ip("route add local 169.254.64.0/18 dev lo");
    let vips: [IpAddr; 2] = ["10.96.0.20", "fd00:96::20"].map(|vip| vip.parse().unwrap());
    for vip in vips {
        let pod = if vip.is_ipv4() { PODS[0] } else { "[fd00:1::5]:8080" };
        set(&mut programs, Tcp, &SocketAddr::new(vip, 80).to_string(), Some(&[pod]));
        for protocol in [Tcp, Udp] {
            set(&mut programs, protocol, &SocketAddr::new(vip, 0).to_string(), Some(&[]));
        }
    }
    let ports = [0, 80, 9, 65535];
    let connect = |called: SocketAddr| {
        let socket = UdpSocket::bind(if called.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.connect(called).map(|()| socket)
    };
    in_pod(|| {
        for called in ports.map(|port| SocketAddr::new(vips[0], port)) {
            let socket = connect(called).unwrap();
            assert_eq!(socket.peer_addr().unwrap(), called);
            assert_eq!(socket.local_addr().unwrap().ip(), POD_ADDRESSES[0].parse::<IpAddr>().unwrap());
            socket.send(b"?").unwrap();
            assert_eq!(socket.recv(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionRefused, "{called}");
        }
        for called in ports.map(|port| SocketAddr::new(vips[1], port)) {
            assert_eq!(connect(called).unwrap_err().kind(), ErrorKind::NetworkUnreachable, "{called}");
        }
        let unconnected = udp_client().send_to(b"?", "10.96.0.20:81");
        assert_eq!(unconnected.unwrap_err().kind(), ErrorKind::ConnectionRefused);
    });
    assert_eq!(counters.remembered_peers().unwrap(), 0);
    // On the host itself, too, it fails only without a route.
    ip("route add default dev edgemesh0");
    for port in ports {
        assert!(connect(SocketAddr::new(vips[0], port)).is_ok());
        assert_eq!(connect(SocketAddr::new(vips[1], port)).unwrap_err().kind(), ErrorKind::NetworkUnreachable);
    }
}

fn endpoints_change_under_traffic_without_a_failed_connection(mode: Mode) {
    let sandbox = Sandbox::new(&POD_ADDRESSES);
    let mut datapath = sandbox.datapath(mode);
    for pod in PODS {
        tcp_server(pod);
    }
    set(&mut datapath, Tcp, VIP, Some(&PODS[..1]));
    let stop = AtomicBool::new(false);
    let connections = AtomicUsize::new(0);
    let own_netns = std::fs::File::open("/proc/thread-self/ns/net").unwrap();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                nix::sched::setns(&own_netns, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
                while !stop.load(Ordering::Relaxed) {
                    let answer = call_tcp(VIP).unwrap();
                    assert!(PODS.contains(&answer.as_str()), "{answer}");
                    connections.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let until = Instant::now() + Duration::from_secs(2);
        let mut round = 0_usize;
        while Instant::now() < until {
            round += 1;
            let first = round % 3;
            let pods = &PODS[first..=first + round % (3 - first)];
            set(&mut datapath, Tcp, VIP, Some(pods));
            // Other Services come and go, and take the slots that became free.
            let other = format!("10.96.1.{}:80", round % 200);
            set(&mut datapath, Tcp, &other, (!round.is_multiple_of(3)).then_some(&["10.244.9.9:9"]));
            if round.is_multiple_of(if mode == Mode::Ebpf { 100 } else { 5 }) {
                let answer = call_tcp(VIP).unwrap();
                assert!(pods.contains(&answer.as_str()), "an update holds from the moment it is written");
            }
        }
        stop.store(true, Ordering::Relaxed);
        // Each change is a process of its own where `nft` makes it.
        let expected = if mode == Mode::Ebpf { 1000 } else { 20 };
        assert!(round > expected, "only {round} updates");
    });
    assert!(connections.load(Ordering::Relaxed) > 100);
    datapath.assert_counted(Counter::Inconsistent, 0);
}

#[test]
fn ten_thousand_services_are_programmed_within_two_seconds_and_all_work() {
    let sandbox = Sandbox::new(&POD_ADDRESSES);
    let (mut programs, _) = sandbox.programs();
    for pod in PODS {
        tcp_server(pod);
    }
    let target = Target::Direct(PODS.map(at).to_vec());
    let address = |i: u32| format!("10.96.{}.{}:80", i / 250, i % 250 + 1);
    let started = Instant::now();
    for i in 0..10_000 {
        let frontend = Frontend { address: at(&address(i)), protocol: Tcp };
        programs.apply(&Change { frontend, target: Some(&target) }).unwrap();
    }
    let took = started.elapsed();
    assert!(took < Duration::from_secs(2), "{took:?}");
    println!("10,000 Services with 3 endpoints each: {took:?}");
    for i in [0, 1, 4999, 9999] {
        assert!(PODS.contains(&call_tcp(&address(i)).unwrap().as_str()));
    }
    assert_eq!(programs.len(), 10_000);
    let started = Instant::now();
    for i in 0..10_000 {
        set(&mut programs, Tcp, &address(i), None);
    }
    assert!(programs.is_empty());
    println!("removed in {:?}", started.elapsed());
    assert_eq!(call_tcp(&address(17)).unwrap_err().kind(), ErrorKind::NetworkUnreachable);
}

#[test]
fn detached_programs_leave_sockets_alone() {
    let sandbox = Sandbox::new(&POD_ADDRESSES);
    let (mut programs, _) = sandbox.programs();
    tcp_server(PODS[0]);
    set(&mut programs, Tcp, VIP, Some(&PODS[..1]));
    assert_eq!(call_tcp(VIP).unwrap(), PODS[0]);
    drop(programs);
    assert_eq!(call_tcp(VIP).unwrap_err().kind(), ErrorKind::NetworkUnreachable);
}

#[test]
fn sockets_outside_of_the_cgroup_are_not_touched() {
    let sandbox = Sandbox::new(&POD_ADDRESSES);
    tcp_server(PODS[0]);
    let (mut programs, counters) =
        Programs::start(&sandbox.child_cgroup(), MapSizes::new(0), Nowhere::default()).unwrap();
    set(&mut programs, Tcp, VIP, Some(&PODS[..1]));
    assert_eq!(call_tcp(VIP).unwrap_err().kind(), ErrorKind::NetworkUnreachable);
    assert_eq!(counters.get(Counter::Misses).unwrap(), 0);
}

#[test]
fn a_missing_cgroup_is_an_error_that_names_it() {
    let missing = std::path::Path::new("/datapath-is-not-there");
    let error = Programs::start(missing, MapSizes::new(0), Nowhere::default()).err().unwrap().to_string();
    assert!(error.contains("datapath-is-not-there"), "{error}");
}
