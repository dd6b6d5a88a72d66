//! Pods of another network, called by their own addresses.

use std::{
    io::ErrorKind,
    net::{TcpStream, UdpSocket},
};

use edgemesh_agent::config::DatapathMode;
use edgemesh_tunnel::{Carried, RefusalReason, StreamHeader, StreamTarget, TunnelError};
use hickory_proto::rr::RecordType;
use serde_json::{Value, json};

use crate::{
    access_log::{AccessLog, says},
    outside::nft,
    sites::{
        CLUSTER_DNS, POD_A, POD_B, Sites, addresses_of, ask, ask_and_keep, call, counting_server, echo_server, to,
        until,
    },
};

const CALLS: &str = "edgemesh_agent_pod_calls_connections_total{protocol=\"tcp\",path=\"tunnel\",result=\"ok\"}";
const FLOWS: &str = "edgemesh_agent_pod_calls_connections_total{protocol=\"udp\",path=\"tunnel\",result=\"ok\"}";

/// A headless Service with the pod of site b, as a StatefulSet would have it.
fn headless() -> [Value; 2] {
    [
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "db", "namespace": "default"},
            "spec": {"clusterIP": "None", "clusterIPs": ["None"], "ports": [{"name": "sql", "port": 5432, "protocol": "TCP"}]},
        }),
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": "db-1", "namespace": "default", "labels": {"kubernetes.io/service-name": "db"}},
            "ports": [{"name": "sql", "port": 5432, "protocol": "TCP"}],
            "endpoints": [{"addresses": [POD_B[0]], "hostname": "db-0", "nodeName": "b", "conditions": {"ready": true},
                           "targetRef": {"kind": "Pod", "namespace": "default", "name": "db-0"}}],
        }),
    ]
}

fn serve(sites: &Sites) {
    counting_server(&sites.b.pod, 8080, "pod b");
    for pod in POD_B {
        echo_server(&sites.b.pod, to(pod, 5353));
    }
    // What listens on the hosts must not answer for pods.
    counting_server(&sites.a.host, 8080, "host a");
    counting_server(&sites.b.host, 8080, "host b");
}

fn reach_everything(sites: &Sites, by: &str) {
    serve(sites);
    let captured = || sites.a.admin("/debug/capture");
    until("the capture", || captured().contains("10.244.7.0/24") && captured().contains("fd00:7::/64"));
    assert!(captured().contains(by), "{}", captured());
    until("the other site", || call(&sites.a.pod, to(POD_B[0], 8080), 1).is_ok_and(|answer| answer == "pod b 1"));
    let mut open = Vec::new();
    for caller in [&sites.a.pod, &sites.a.host] {
        for pod in POD_B {
            assert_eq!(call(caller, to(pod, 8080), 3_000_000).unwrap(), "pod b 3000000", "{pod}");
            for size in [65_507, 0, 1] {
                let size = if pod.contains(':') { size.min(65_000) } else { size };
                let (answer, socket) = ask_and_keep(caller, to(pod, 5353), size).unwrap();
                assert_eq!(answer, (size, to(pod, 5353)), "{pod}");
                open.push(socket);
            }
            // A port on which nothing listens there, though something does here and on the other host.
            let closed = call(caller, to(pod, 8081), 1);
            assert!(closed.is_err(), "{closed:?}");
        }
    }
    // Many flows at once, from one caller.
    let flows = sites.a.pod.run(|| {
        let sockets: Vec<UdpSocket> = (0..300).map(|_| UdpSocket::bind("0.0.0.0:0").unwrap()).collect();
        for (at, socket) in (0u32..).zip(&sockets) {
            socket.set_read_timeout(Some(crate::sites::DEADLINE)).unwrap();
            socket.send_to(&at.to_be_bytes(), to(POD_B[0], 5353)).unwrap();
        }
        let mut buffer = [0; 16];
        (0u32..)
            .zip(&sockets)
            .filter(|(at, socket)| {
                let (length, from) = socket.recv_from(&mut buffer).unwrap();
                buffer[..length] == at.to_be_bytes() && from == to(POD_B[0], 5353)
            })
            .count()
    });
    assert_eq!(flows, 300);
    assert!(sites.a.metric(CALLS) >= 5, "{}", sites.a.admin("/metrics"));
    assert!(sites.a.metric(FLOWS) >= 312, "{}", sites.a.admin("/metrics"));
    assert_eq!(sites.a.metric("edgemesh_agent_capture_ranges"), 2);
}

#[test]
fn pods_of_another_network_answer_by_their_own_addresses_to_pods_and_to_the_host() {
    reach_everything(&Sites::start(&[], |_| {}), "ebpf");
}

#[test]
fn nftables_captures_where_ebpf_is_not_wanted() {
    nftables_captures("0");
}

#[test]
fn nftables_captures_what_comes_out_of_a_bridge_whose_packets_pass_the_hooks_already() {
    nftables_captures("1");
}

fn nftables_captures(bridge_calls: &'static str) {
    let sites = Sites::start(&[], |config| config.datapath = DatapathMode::Nftables);
    sites.a.host.run(move || {
        for switch in ["bridge-nf-call-iptables", "bridge-nf-call-ip6tables"] {
            std::fs::write(format!("/proc/sys/net/bridge/{switch}"), bridge_calls).unwrap();
        }
    });
    reach_everything(&sites, "nftables");
}

#[test]
fn a_name_of_a_headless_service_leads_to_its_pod_in_another_network() {
    let log = AccessLog::start();
    let sites = Sites::start(&headless(), |_| {});
    counting_server(&sites.b.pod, 5432, "db-0");
    let found = addresses_of(&sites.a.pod, CLUSTER_DNS, "db-0.db.default.svc.cluster.local.", RecordType::A).remove(0);
    assert_eq!(found, POD_B[0]);
    until("the pod", || call(&sites.a.pod, to(&found, 5432), 5).is_ok_and(|answer| answer == "db-0 5"));
    // It is named as the pod that it is, and no Service is said to have been called.
    until("its line in the access log", || {
        log.with("pod", "default/db-0").iter().any(|line| line["result"] == "closed")
    });
    let lines = log.with("pod", "default/db-0");
    let line = lines.iter().find(|line| line["result"] == "closed").unwrap();
    says(
        line,
        &[("port", "5432"), ("protocol", "tcp"), ("endpoint", "10.244.7.5:5432"), ("node", "b"), ("path", "tunnel")],
    );
    says(line, &[("to_endpoint", "5"), ("to_client", "6")]);
    assert!(line["client"].starts_with("10.244.1.5:") && !line.contains_key("service"), "{line:?}");
    let metrics = sites.a.admin("/metrics");
    assert!(!metrics.contains("service=\"db\""), "{metrics}");
}

#[test]
fn the_capture_ends_when_the_node_moves_into_this_network() {
    let sites = Sites::start(&[], |_| {});
    serve(&sites);
    until("the other site", || call(&sites.a.pod, to(POD_B[0], 8080), 1).is_ok_and(|answer| answer == "pod b 1"));
    let calls = sites.a.metric(CALLS);
    sites.move_node("b", "site-a");
    until("the routes", || {
        let (local, main) = (sites.a.shown("route show table local"), sites.a.shown("route show table main"));
        !local.contains("10.244.7.0/24") && main.contains("10.244.7.0/24 via 192.0.2.2")
    });
    assert!(sites.a.shown("route show table local").contains("169.254.64.0/18"), "node-local addresses stay");
    // The way back is the other agent's route.
    until("the direct way", || call(&sites.a.pod, to(POD_B[0], 8080), 9).is_ok_and(|answer| answer == "pod b 9"));
    assert_eq!(sites.a.metric(CALLS), calls, "not through the tunnel");
    sites.move_node("b", "site-c");
    until("the capture", || {
        sites.a.metric(CALLS) > calls || {
            drop(call(&sites.a.pod, to(POD_B[0], 8080), 1));
            false
        }
    });
}

#[test]
fn a_stream_for_an_address_that_is_not_of_its_pods_is_refused_by_the_receiver() {
    let sites = Sites::start(&[], |_| {});
    serve(&sites);
    until("the other site", || call(&sites.a.pod, to(POD_B[0], 8080), 1).is_ok_and(|answer| answer == "pod b 1"));
    let open = |endpoint: &str| {
        let header = StreamHeader {
            target: StreamTarget::Pod,
            protocol: Carried::Tcp,
            endpoint: endpoint.parse().unwrap(),
            source: "test".into(),
        };
        sites.a.runtime().block_on(sites.a.agent().overlay.tunnel().open("b", &header)).map(drop)
    };
    open("10.244.7.5:8080").unwrap();
    // Pods elsewhere, the host itself in each of its guises, and what it can reach.
    for endpoint in
        ["10.244.1.5:8080", "10.244.7.1:8080", "[fd00:7::1]:8080", "192.0.2.2:8080", "127.0.0.1:8080", "192.0.2.1:8080"]
    {
        match open(endpoint) {
            Err(TunnelError::Refused { refusal, .. }) => {
                assert_eq!(refusal.reason, RefusalReason::NotHere, "{endpoint}")
            }
            other => panic!("{endpoint}: {other:?}"),
        }
    }
}

#[test]
fn a_machine_beside_the_node_does_not_get_into_other_networks_through_it() {
    let log = AccessLog::start();
    let sites = Sites::start(&[], |_| {});
    serve(&sites);
    until("the other site", || call(&sites.a.pod, to(POD_B[0], 8080), 1).is_ok_and(|answer| answer == "pod b 1"));
    // Neither of the pod range nor the host's own.
    sites.a.host.run(|| crate::sandbox::ip("route add 172.31.0.9/32 dev edgemesh0"));
    let outcome = sites.a.pod.run(|| {
        crate::sandbox::ip("address add 172.31.0.9/32 dev eth0");
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket.bind(&to("172.31.0.9", 0).into()).unwrap();
        socket.set_read_timeout(Some(crate::sites::DEADLINE)).unwrap();
        socket.connect(&to(POD_B[0], 8080).into())?;
        std::io::Read::read(&mut &socket, &mut [0; 1])
    });
    assert_eq!(outcome.unwrap_err().kind(), ErrorKind::ConnectionReset);
    let refused = |protocol| {
        let labels = format!("{{protocol=\"{protocol}\",path=\"none\",result=\"stranger\"}}");
        sites.a.metric(&format!("edgemesh_agent_pod_calls_connections_total{labels}"))
    };
    assert_eq!(refused("tcp"), 1);
    sites.a.pod.run(|| {
        let socket = UdpSocket::bind("172.31.0.9:0").unwrap();
        for _ in 0..20 {
            socket.send_to(b"?", to(POD_B[0], 5353)).unwrap();
        }
    });
    until("the datagrams", || refused("udp") == 20);
    // They have taken no flow.
    let lines = log.with("result", "stranger");
    assert!(!lines.is_empty() && lines.iter().all(|line| line["protocol"] == "tcp"), "{lines:?}");
}

#[test]
fn while_the_agent_is_away_calls_are_refused_at_once_and_never_answered_by_the_host() {
    let mut sites = Sites::start(&[], |config| config.detach_on_stop = false);
    serve(&sites);
    until("the other site", || call(&sites.a.pod, to(POD_B[0], 8080), 1).is_ok_and(|answer| answer == "pod b 1"));
    sites.a.stop();
    for pod in POD_B {
        let refused = sites.a.host.run(move || TcpStream::connect(to(pod, 8080)).unwrap_err());
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{pod}");
    }
    sites.a.configure(|config| config.detach_on_stop = true);
    sites.b.configure(|config| config.detach_on_stop = true);
    sites.a.start();
    sites.introduce();
    until("the other site", || call(&sites.a.pod, to(POD_B[0], 8080), 1).is_ok_and(|answer| answer == "pod b 1"));
    sites.a.stop();
    let routes = sites.a.shown("route show table all");
    assert!(!routes.contains("10.244.7.0/24") && !routes.contains("fd00:7::/64"), "{routes}");
}

#[test]
fn host_processes_call_pods_of_another_network_though_their_own_address_changes() {
    let sites = Sites::start(&[], |_| {});
    serve(&sites);
    let host = &sites.a.host;
    let calls_from = || {
        let stream = host.run(|| TcpStream::connect_timeout(&to(POD_B[0], 8080), crate::sites::DEADLINE));
        stream.map(|stream| stream.local_addr().unwrap().ip().to_string())
    };
    until("the node's address", || calls_from().is_ok_and(|ip| ip == "192.0.2.1"));
    host.run(|| crate::sandbox::ip("address del 192.0.2.1/24 dev wan-a"));
    until("another one", || calls_from().is_ok_and(|ip| ip == "169.254.64.1"));
    host.run(|| crate::sandbox::ip("address add 192.0.2.1/24 dev wan-a"));
    until("the node's address once more", || calls_from().is_ok_and(|ip| ip == "192.0.2.1"));
}

#[test]
fn a_capture_that_somebody_else_removed_is_there_again() {
    let sites = Sites::start(&[], |config| config.datapath = DatapathMode::Nftables);
    serve(&sites);
    let reaches = || call(&sites.a.pod, to(POD_B[0], 8080), 1).is_ok_and(|answer| answer == "pod b 1");
    until("the other site", reaches);
    sites.a.host.run(|| {
        // Where bridges don't call, nothing else has the table written again.
        for switch in ["iptables", "ip6tables"] {
            std::fs::write(format!("/proc/sys/net/bridge/bridge-nf-call-{switch}"), "0").unwrap();
        }
    });
    // The agent may look just between the two.
    until("the capture is gone", || {
        sites.a.host.run(|| nft("flush ruleset"));
        !reaches()
    });
    until("the other site once more", reaches);
}

#[test]
fn an_ipv6_service_is_reached_through_the_tunnel() {
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "six", "namespace": "default"},
        "spec": {"clusterIP": "fd00:96::20", "clusterIPs": ["fd00:96::20"], "ipFamilies": ["IPv6"],
                 "ports": [{"name": "tcp", "port": 80, "protocol": "TCP"}, {"name": "udp", "port": 53, "protocol": "UDP"}]},
    });
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv6",
        "metadata": {"name": "six-1", "namespace": "default", "labels": {"kubernetes.io/service-name": "six"}},
        "ports": [{"name": "tcp", "port": 8080, "protocol": "TCP"}, {"name": "udp", "port": 5353, "protocol": "UDP"}],
        "endpoints": [{"addresses": [POD_B[1]], "nodeName": "b", "conditions": {"ready": true}}],
    });
    // Pods are not captured here, so that nothing else can carry it.
    let sites = Sites::start(&[service, slice], |config| config.capture_pods = false);
    serve(&sites);
    let vip = to("fd00:96::20", 80);
    until("the other site", || call(&sites.a.pod, vip, 1).is_ok_and(|answer| answer == "pod b 1"));
    for caller in [&sites.a.pod, &sites.a.host] {
        assert_eq!(call(caller, vip, 2_000_000).unwrap(), "pod b 2000000");
        for size in [60_000, 1] {
            assert_eq!(ask(caller, to("fd00:96::20", 53), size).unwrap(), (size, to("fd00:96::20", 53)));
        }
    }
    let proxied = "edgemesh_agent_proxied_connections_total{protocol=\"tcp\",path=\"tunnel\",result=\"ok\"}";
    assert!(sites.a.metric(proxied) >= 3);
    assert_eq!(sites.a.metric(CALLS), 0);
    // The port is closed for all other addresses.
    let own = to(POD_A[1].replace("::5", "::1").as_str(), 15001);
    let attempt = sites.a.pod.run(move || TcpStream::connect_timeout(&own, std::time::Duration::from_millis(500)));
    assert!(attempt.is_err(), "{attempt:?}");
}

#[test]
fn without_ipv6_the_agent_serves_ipv4() {
    let mut sites = Sites::start(&[], |_| {});
    serve(&sites);
    sites.a.stop();
    sites.a.host.run(|| {
        for interface in ["all", "lo"] {
            std::fs::write(format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6"), "1").unwrap();
        }
    });
    sites.a.start();
    sites.introduce();
    until("the other site", || call(&sites.a.pod, to(POD_B[0], 8080), 1).is_ok_and(|answer| answer == "pod b 1"));
}
