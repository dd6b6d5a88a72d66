//! A node port that passes from one Service to another.

use std::{net::UdpSocket, time::Duration};

use edgemesh_agent::config::DatapathMode;
use serde_json::{Value, json};

use crate::{
    hosts::who_calls,
    sandbox::{Mode, in_both_modes},
    sites::{Sites, to, until},
};

in_both_modes!(udp_from_outside_follows_a_node_port_to_its_next_service);

/// A UDP Service with a server of its own in the pod of site a.
fn service(name: &str, ip: &str, node_port: Option<u16>, server: u16) -> [Value; 2] {
    let mut port = json!({"port": 53, "protocol": "UDP"});
    if let Some(node_port) = node_port {
        port["nodePort"] = node_port.into();
    }
    [
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default"},
            "spec": {"clusterIP": ip, "clusterIPs": [ip], "ports": [port]},
        }),
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": format!("{name}-1"), "namespace": "default", "labels": {"kubernetes.io/service-name": name}},
            "ports": [{"name": "", "port": server, "protocol": "UDP"}],
            "endpoints": [{"addresses": ["10.244.1.5"], "nodeName": "a", "conditions": {"ready": true}}],
        }),
    ]
}

fn udp_from_outside_follows_a_node_port_to_its_next_service(mode: Mode) {
    let before = [service("first", "10.96.0.31", Some(30090), 7001), service("second", "10.96.0.32", None, 7002)];
    let sites = Sites::start(before.as_flattened(), |config| match config.node_name.as_str() {
        // All threads of this process are in the cgroup of site a: its programs must not see the caller of site b.
        "a" => (config.datapath, config.cgroup) = (mode.into(), config.cgroup.join("child")),
        _ => config.datapath = DatapathMode::Nftables,
    });
    sites.a.pod.run(|| ["10.244.1.5:7001", "10.244.1.5:7002"].into_iter().for_each(who_calls));
    // It keeps its port, so that its datagrams are of one flow, and never pauses long enough for that to end.
    let socket = sites.b.host.run(|| {
        let socket = UdpSocket::bind("192.0.2.2:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        socket.connect(to("192.0.2.1", 30090)).unwrap();
        socket
    });
    let answers = |server: &str| {
        let mut buffer = [0; 64];
        socket.send(b"?").is_ok()
            && socket.recv(&mut buffer).is_ok_and(|length| buffer[..length].starts_with(server.as_bytes()))
    };
    until("the first", || answers("10.244.1.5:7001 "));
    let catalog = &sites.a.agent().catalog;
    for [service, _] in [service("first", "10.96.0.31", None, 7001), service("second", "10.96.0.32", Some(30090), 7002)]
    {
        catalog.apply_service(&serde_json::from_value(service).unwrap());
    }
    catalog.publish();
    until("the second", || answers("10.244.1.5:7002 "));
}
