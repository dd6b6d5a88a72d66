//! Routes to pods of other nodes and of the node-local range, in the kernel's tables.

use std::{
    net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket},
    process::Command,
    time::Duration,
};

use edgemesh_agent::{
    node_local::Ipv4Range,
    routes::{HostRoutes, PodRoutes},
};
use edgemesh_mesh::cidr::Cidr;
use edgemesh_telemetry::Shutdown;

use crate::sandbox::{Sandbox, in_pod, ip, udp_server};

fn shown(table: &str) -> String {
    let output = Command::new("ip").args(["-4", "route", "show", "table", table]).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

fn shown6() -> String {
    let output = Command::new("ip").args(["-6", "route", "show"]).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

fn routes(entries: &[(&str, &str)]) -> PodRoutes {
    entries.iter().map(|(range, via)| (Cidr::parse(range).unwrap(), via.parse().unwrap())).collect()
}

#[test]
fn only_our_own_routes_are_added_changed_and_removed() {
    let _sandbox = Sandbox::new(&[]);
    ip("link add lan type veth peer name other");
    ip("address add 192.168.1.11/24 dev lan");
    ip("address add fd00:a::11/64 dev lan nodad");
    ip("link set lan up");
    ip("link set other up");
    ip("route add 10.244.9.0/24 via 192.168.1.99");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let shutdown = Shutdown::default();
        let host = HostRoutes::open(&shutdown).unwrap();
        let wanted = routes(&[
            ("10.244.2.0/24", "192.168.1.12"),
            ("10.244.3.0/24", "192.168.1.13"),
            ("fd00:2::/64", "fd00:a::12"),
            ("fd00:3::/64", "fd00:a::13"),
        ]);
        let outcome = host.sync(&wanted).await.unwrap();
        assert_eq!((outcome.present, outcome.failed.len()), (4, 0), "{outcome:?}");
        let table = shown6();
        assert!(table.contains("fd00:2::/64 via fd00:a::12 dev lan proto 176"), "{table}");
        assert!(shown("main").contains("10.244.2.0/24 via 192.168.1.12 dev lan proto 176"), "{}", shown("main"));

        // One moves, one goes, and one leads to where no link does.
        let wanted = routes(&[
            ("10.244.2.0/24", "192.168.1.22"),
            ("10.244.4.0/24", "172.16.0.1"),
            ("fd00:2::/64", "fd00:a::22"),
        ]);
        let outcome = host.sync(&wanted).await.unwrap();
        assert_eq!((outcome.present, outcome.failed.len()), (2, 1), "{outcome:?}");
        let table = shown6();
        assert!(table.contains("fd00:2::/64 via fd00:a::22") && !table.contains("fd00:a::1"), "{table}");
        let table = shown("main");
        assert!(table.contains("10.244.2.0/24 via 192.168.1.22"), "{table}");
        assert!(!table.contains("192.168.1.12") && !table.contains("10.244.3.0"), "{table}");
        assert!(table.contains("10.244.9.0/24 via 192.168.1.99"), "not ours: {table}");
        assert_eq!(host.sync(&wanted).await.unwrap().present, 2, "a second round changes nothing");

        host.sync(&PodRoutes::new()).await.unwrap();
        assert!(!shown("main").contains("proto 176") && !shown6().contains("proto 176"));

        // A CNI leads there already, whatever its metric; or comes later.
        ip("route add 10.244.2.0/24 via 192.168.1.99 metric 50");
        ip("route add fd00:2::/64 via fd00:a::99");
        let wanted = routes(&[
            ("10.244.2.0/24", "192.168.1.12"),
            ("10.244.3.0/24", "192.168.1.13"),
            ("fd00:2::/64", "fd00:a::12"),
        ]);
        let outcome = host.sync(&wanted).await.unwrap();
        assert_eq!((outcome.present, outcome.foreign.len(), outcome.failed.len()), (1, 2, 0), "{outcome:?}");
        ip("route add 10.244.3.0/24 via 192.168.1.99 metric 50");
        let outcome = host.sync(&wanted).await.unwrap();
        assert_eq!((outcome.present, outcome.foreign.len()), (0, 3), "{outcome:?}");
        host.remove_all().await.unwrap();
        let (table, table6) = (shown("main"), shown6());
        assert!(!table.contains("proto 176") && !table6.contains("proto 176"), "{table}{table6}");
        for left in ["10.244.2.0/24 via 192.168.1.99", "10.244.3.0/24 via 192.168.1.99"] {
            assert!(table.contains(left), "{left}: {table}");
        }
        assert!(table6.contains("fd00:2::/64 via fd00:a::99"), "{table6}");
        drop(host);
        shutdown.drain(Duration::from_secs(1)).await;
    });
}

#[test]
fn node_local_addresses_are_served_by_one_listener_that_sees_which_was_called() {
    let _sandbox = Sandbox::new(&[]);
    let range = Ipv4Range::default();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let shutdown = Shutdown::default();
        let host = HostRoutes::open(&shutdown).unwrap();
        host.deliver_locally(range).await.unwrap();
        host.deliver_locally(range).await.unwrap();
        drop(host);
        shutdown.drain(Duration::from_secs(1)).await;
    });
    assert!(shown("local").contains("local 169.254.64.0/18 dev lo proto 176"), "{}", shown("local"));
    let listener = TcpListener::bind("0.0.0.0:15001").unwrap();
    for address in [Ipv4Addr::new(169, 254, 64, 2), Ipv4Addr::new(169, 254, 127, 254)] {
        let _client = TcpStream::connect((address, 15001)).unwrap();
        assert_eq!(listener.accept().unwrap().0.local_addr().unwrap().ip(), address);
    }
    UdpSocket::bind((range.dns_address(), 53)).unwrap();
}

#[test]
fn pods_behind_a_bridge_reach_node_local_addresses_with_strict_reverse_path_filtering() {
    let _sandbox = Sandbox::new(&[]);
    for interface in ["all", "default"] {
        std::fs::write(format!("/proc/sys/net/ipv4/conf/{interface}/rp_filter"), "1").unwrap();
    }
    let range = Ipv4Range::default();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let shutdown = Shutdown::default();
        let host = HostRoutes::open(&shutdown).unwrap();
        host.deliver_locally(range).await.unwrap();
        drop(host);
        shutdown.drain(Duration::from_secs(1)).await;
    });
    let listener = TcpListener::bind("0.0.0.0:15001").unwrap();
    let dns = udp_server(&format!("{}:53", range.dns_address()));
    let address = Ipv4Addr::new(169, 254, 77, 12);
    let (connection, answered_by) = in_pod(|| {
        let connection = TcpStream::connect_timeout(&(address, 15001).into(), Duration::from_secs(5)).unwrap();
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        socket.send_to(b"?", dns).unwrap();
        let mut buffer = [0; 64];
        (connection, socket.recv_from(&mut buffer).unwrap().1)
    });
    assert_eq!(answered_by, dns);
    let (accepted, client) = listener.accept().unwrap();
    assert_eq!(accepted.local_addr().unwrap().ip(), address, "the listener sees which address was called");
    assert_eq!(client.ip(), Ipv4Addr::new(10, 244, 1, 5), "and which pod called");
    drop(connection);
}
