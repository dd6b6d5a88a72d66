//! Sockets whose endpoint is gone: which are ended, in every network namespace, and which are left alone.

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd,
    sync::mpsc,
    thread,
    time::Duration,
};

use edgemesh_agent::datapath::{ebpf::Programs, stale::Swept};
use edgemesh_mesh::model::Protocol::{self, Tcp, Udp};
use nix::sched::{CloneFlags, unshare};

use crate::sandbox::{Sandbox, at, ip, set, udp_server};

const VIP: &str = "10.96.0.20:80";
const A: &str = "10.244.1.5:8080";
const X: &str = "10.244.1.6:8080";
const ADDRESSES: [&str; 4] = ["10.244.1.5", "10.244.1.6", "fd00:1::5", "fd00:1::6"];

fn udp_client(bind: &str) -> UdpSocket {
    let socket = UdpSocket::bind(bind).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    socket
}

fn disconnect(socket: &UdpSocket) {
    let address = libc::sockaddr { sa_family: libc::AF_UNSPEC as u16, sa_data: [0; 14] };
    let length = size_of::<libc::sockaddr>() as libc::socklen_t;
    // SAFETY: the address is valid for the call.
    assert_eq!(unsafe { libc::connect(socket.as_raw_fd(), &raw const address, length) }, 0);
}

/// Ends what was sent to the backends, in a thread of its own, as the agent does.
fn sweep(programs: &mut Programs, gone: &[&str]) -> Swept {
    let mut sweeper = programs.take_sweeper().unwrap();
    let gone: Vec<SocketAddr> = gone.iter().map(|backend| at(backend)).collect();
    thread::scope(|scope| scope.spawn(|| sweeper.sweep(&|_, backend, _| gone.contains(&backend))).join().unwrap())
}

fn is_ended(socket: &UdpSocket) -> bool {
    matches!(socket.recv(&mut [0; 64]), Err(error) if error.kind() == ErrorKind::ConnectionAborted)
}

/// Works when the socket still talks to who sends its own address back.
fn answers(socket: &UdpSocket, from: &str) {
    socket.send(b"?").unwrap();
    let mut buffer = [0; 64];
    let length = socket.recv(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], from.as_bytes());
}

#[test]
fn a_connected_udp_socket_is_ended_with_its_endpoint_and_one_that_called_the_pod_itself_is_not() {
    let sandbox = Sandbox::new(&ADDRESSES);
    let (mut programs, counters) = sandbox.programs();
    udp_server(A);
    udp_server(X);
    set(&mut programs, Udp, VIP, Some(&[A]));
    let through_service = udp_client("0.0.0.0:0");
    through_service.connect(VIP).unwrap();
    let direct = udp_client("0.0.0.0:0");
    direct.connect(A).unwrap();
    // A, then nobody, then X by its own address; and the same with A itself.
    let moved = udp_client("0.0.0.0:0");
    moved.connect(VIP).unwrap();
    disconnect(&moved);
    moved.connect(X).unwrap();
    let back = udp_client("0.0.0.0:0");
    back.connect(VIP).unwrap();
    disconnect(&back);
    back.connect(A).unwrap();
    let other = udp_client("0.0.0.0:0");
    set(&mut programs, Udp, VIP, Some(&[X]));
    other.connect(VIP).unwrap();

    let swept = sweep(&mut programs, &[A]);
    assert_eq!((swept.udp, swept.tcp, swept.failed), (1, 0, 0), "{swept:?}");
    assert!(is_ended(&through_service));
    for (socket, pod) in [(&direct, A), (&moved, X), (&back, A), (&other, X)] {
        answers(socket, pod);
    }
    // The socket itself can be used again: it finds the endpoint that is there now.
    through_service.connect(VIP).unwrap();
    answers(&through_service, X);
    drop((through_service, other));
    assert_eq!(counters.remembered_peers().unwrap(), 0, "nothing is left of what was ended or moved");
}

/// Ends what an endpoint is gone for, with one protocol.
fn sweep_of(programs: &mut Programs, sweeps: usize, gone: Protocol) -> Vec<Swept> {
    let mut sweeper = programs.take_sweeper().unwrap();
    let mut sweep = || sweeper.sweep(&|_, _, protocol| protocol == gone);
    thread::scope(|scope| scope.spawn(|| (0..sweeps).map(|_| sweep()).collect()).join().unwrap())
}

#[test]
fn sockets_are_looked_for_only_as_long_as_they_can_have_the_endpoint_that_is_gone() {
    let sandbox = Sandbox::new(&ADDRESSES);
    let (mut programs, counters) = sandbox.programs();
    let listener = TcpListener::bind(A).unwrap();
    for protocol in [Tcp, Udp] {
        set(&mut programs, protocol, VIP, Some(&[A]));
    }
    let mut tcp = TcpStream::connect(VIP).unwrap();
    let moved = udp_client("0.0.0.0:0");
    moved.connect(VIP).unwrap();
    disconnect(&moved);
    let suspects: Vec<usize> = sweep_of(&mut programs, 2, Udp).iter().map(|swept| swept.suspects).collect();
    assert_eq!(suspects, [1, 0], "first the UDP socket, then it is known to be elsewhere");
    assert_eq!(counters.remembered_peers().unwrap(), 1);
    let (mut held, _) = listener.accept().unwrap();
    tcp.write_all(b"?").unwrap();
    held.read_exact(&mut [0]).unwrap();
}

#[test]
fn an_unconnected_udp_socket_goes_on_with_another_endpoint() {
    let sandbox = Sandbox::new(&ADDRESSES);
    let (mut programs, _counters) = sandbox.programs();
    udp_server(A);
    udp_server(X);
    set(&mut programs, Udp, VIP, Some(&[A]));
    let socket = udp_client("0.0.0.0:0");
    let call = |expected: &str| {
        socket.send_to(b"?", VIP).unwrap();
        let mut buffer = [0; 64];
        let (length, from) = socket.recv_from(&mut buffer).unwrap();
        assert_eq!((&buffer[..length], from), (expected.as_bytes(), at(VIP)));
    };
    call(A);
    set(&mut programs, Udp, VIP, Some(&[X]));
    let swept = sweep(&mut programs, &[A]);
    assert_eq!(swept, Swept::default(), "it has no peer that could be gone");
    call(X);
}

#[test]
fn tcp_connections_and_sockets_of_both_families_are_ended() {
    let sandbox = Sandbox::new(&ADDRESSES);
    let (mut programs, _) = sandbox.programs();
    let (vip6, a6) = ("[fd00:96::20]:80", "[fd00:1::5]:8080");
    let (listener, listener6) = (TcpListener::bind(A).unwrap(), TcpListener::bind(a6).unwrap());
    udp_server(a6);
    for protocol in [Tcp, Udp] {
        set(&mut programs, protocol, VIP, Some(&[A]));
        set(&mut programs, protocol, vip6, Some(&[a6]));
    }
    let mut through: Vec<TcpStream> = [VIP, vip6].iter().map(|vip| TcpStream::connect(vip).unwrap()).collect();
    let mapped = socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::STREAM, None).unwrap();
    mapped.set_only_v6(false).unwrap();
    mapped.connect(&"[::ffff:10.96.0.20]:80".parse::<SocketAddr>().unwrap().into()).unwrap();
    through.push(mapped.into());
    let udp = udp_client("[::]:0");
    udp.connect(vip6).unwrap();
    let mut direct = TcpStream::connect(A).unwrap();
    let held: Vec<TcpStream> = (0..3).map(|_| listener.accept().unwrap().0).collect();
    let held6 = listener6.accept().unwrap();

    let swept = sweep(&mut programs, &[A, a6]);
    assert_eq!((swept.tcp, swept.udp, swept.failed), (3, 1, 0), "{swept:?}");
    for stream in &mut through {
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        assert_eq!(stream.read(&mut [0; 1]).unwrap_err().kind(), ErrorKind::ConnectionAborted);
    }
    assert!(is_ended(&udp));
    direct.write_all(b"still here").unwrap();
    drop((held, held6));
}

#[test]
fn a_thousand_sockets_in_twenty_network_namespaces_are_ended_at_once() {
    const PODS: usize = 20;
    const OPEN: usize = 25;
    let sandbox = Sandbox::new(&ADDRESSES);
    let (mut programs, _) = sandbox.programs();
    set(&mut programs, Tcp, VIP, Some(&[A]));
    set(&mut programs, Udp, VIP, Some(&[A]));
    thread::scope(|scope| {
        let (ready, all_ready) = mpsc::channel();
        let pods: Vec<_> = (0..PODS)
            .map(|_| {
                let ready = ready.clone();
                let (swept, wait) = mpsc::channel::<()>();
                let pod = scope.spawn(move || {
                    unshare(CloneFlags::CLONE_NEWNET).unwrap();
                    ip("link set lo up");
                    ip("address add 10.244.1.5/32 dev lo");
                    let listener = TcpListener::bind(A).unwrap();
                    let tcp: Vec<TcpStream> = (0..OPEN).map(|_| TcpStream::connect(VIP).unwrap()).collect();
                    let udp: Vec<UdpSocket> = (0..OPEN).map(|_| udp_client("0.0.0.0:0")).collect();
                    udp.iter().for_each(|socket| socket.connect(VIP).unwrap());
                    let direct = udp_client("0.0.0.0:0");
                    direct.connect(A).unwrap();
                    ready.send(()).unwrap();
                    wait.recv().unwrap();
                    let aborted = |mut stream: &TcpStream| {
                        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
                        let read = stream.read(&mut [0; 1]);
                        matches!(read, Err(error) if error.kind() == ErrorKind::ConnectionAborted)
                    };
                    let ended = tcp.iter().filter(|stream| aborted(stream)).count();
                    drop(listener);
                    assert!(direct.peer_addr().is_ok(), "it called the pod itself");
                    ended + udp.iter().filter(|socket| is_ended(socket)).count()
                });
                (pod, swept)
            })
            .collect();
        (0..PODS).for_each(|_| all_ready.recv_timeout(Duration::from_secs(60)).unwrap());
        let started = std::time::Instant::now();
        let swept = sweep(&mut programs, &[A]);
        println!("{swept:?} in {:?}", started.elapsed());
        pods.iter().for_each(|(_, done)| done.send(()).unwrap());
        let ended: usize = pods.into_iter().map(|(pod, _)| pod.join().unwrap()).sum();
        assert_eq!((swept.tcp, swept.udp, swept.failed), (PODS * OPEN, PODS * OPEN, 0), "{swept:?}");
        assert_eq!(ended, 2 * PODS * OPEN);
    });
}
