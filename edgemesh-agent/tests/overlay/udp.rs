//! Proxied UDP flows.

use std::time::Duration;

use edgemesh_mesh::model::Protocol;
use edgemesh_tunnel::{Carried, MAX_FLOWS, StreamHeader, StreamTarget};
use serde_json::json;
use tokio::net::UdpSocket;

use crate::{
    rig::{service, two_sites, two_sites_behind_a_relay, two_sites_with, until, within},
    servers::{call, server, udp_server},
};

#[tokio::test(flavor = "multi_thread")]
async fn udp_replies_come_from_the_address_that_was_asked() {
    let (a, b) = two_sites().await;
    service(&[&a, &b], "dns", "UDP", &[(udp_server().await, "b")]);
    let listener = a.listener("dns", Protocol::Udp);
    let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let mut buffer = vec![0; 65_536];
    for size in [5, 0, 20_000, 65_507] {
        client.send_to(&vec![3; size], listener).await.unwrap();
        let (length, from) = within("the reply", client.recv_from(&mut buffer)).await.unwrap();
        assert_eq!((length, from), (size, listener));
    }
    let flows = "edgemesh_agent_proxied_connections_total{protocol=\"udp\",path=\"tunnel\",result=\"ok\"}";
    assert_eq!(a.metric(flows), 1);
}

/// More clients than there are places for flows: a new source port for each datagram, as resolvers do.
#[tokio::test(flavor = "multi_thread")]
async fn any_number_of_udp_clients_is_served_and_leaves_tcp_working_and_no_flow_behind() {
    let (a, b) = two_sites_with(|config| config.proxied.udp_idle_seconds = 10).await;
    service(&[&a, &b], "dns", "UDP", &[(udp_server().await, "b")]);
    service(&[&a, &b], "web", "TCP", &[(server("b").await, "b")]);
    let listener = a.listener("dns", Protocol::Udp);
    let mut buffer = [0; 16];
    for client in 0..2500u32 {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        socket.send_to(&client.to_be_bytes(), listener).await.unwrap();
        let length = within("the reply", socket.recv(&mut buffer)).await.unwrap();
        assert_eq!(buffer[..length], client.to_be_bytes());
    }
    assert_eq!(call(&a, "web", b"x").await.unwrap(), "b 1");
    until("the flows to end at both nodes", || {
        a.metric("edgemesh_agent_proxied_active{protocol=\"udp\"}") == 0
            && a.metric("edgemesh_tunnel_streams") == 0
            && b.metric("edgemesh_tunnel_streams") == 0
    })
    .await;
}

/// More flows than may go to the node of the endpoint: that says nothing about the endpoint.
#[tokio::test(flavor = "multi_thread")]
async fn a_flow_that_is_one_too_many_for_the_way_to_a_node_has_no_endpoint_passed_over() {
    let (a, b) = two_sites().await;
    let server = udp_server().await;
    service(&[&a, &b], "dns", "UDP", &[(server, "b")]);
    let header = StreamHeader {
        target: StreamTarget::Service { namespace: "default".into(), service: "dns".into(), port_name: "main".into() },
        protocol: Carried::Udp,
        endpoint: server,
        source: "test".into(),
    };
    let mut streams = Vec::new();
    let refused = loop {
        match within("open", a.overlay.tunnel().open("b", &header)).await {
            Ok(stream) => streams.push(stream),
            Err(error) => break error,
        }
    };
    assert!(refused.label() == "busy" && streams.len() >= MAX_FLOWS, "{refused} after {}", streams.len());
    let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    client.send_to(b"?", a.listener("dns", Protocol::Udp)).await.unwrap();
    let failed = "edgemesh_agent_proxied_connections_total{protocol=\"udp\",path=\"none\",result=\"unreachable\"}";
    until("the flow to fail", || a.metric(failed) == 1).await;
    assert_eq!(a.metric("edgemesh_agent_proxied_ejections_total"), 0);
    drop(streams);
    let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    client.send_to(b"?", a.listener("dns", Protocol::Udp)).await.unwrap();
    within("the reply", client.recv(&mut [0; 16])).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_longest_datagram_passes_a_relay_whole() {
    let (a, b, _relay) = two_sites_behind_a_relay().await;
    service(&[&a, &b], "dns", "UDP", &[(udp_server().await, "b")]);
    let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let sent: Vec<u8> = (0..65_507u32).map(|at| at.to_le_bytes()[0]).collect();
    client.send_to(&sent, a.listener("dns", Protocol::Udp)).await.unwrap();
    let mut buffer = vec![0; 65_536];
    let length = within("the reply", client.recv(&mut buffer)).await.unwrap();
    assert!(buffer[..length] == sent, "{length} bytes came back");
}

/// A UDP server that answers with a name.
async fn named_server(name: &'static str) -> std::net::SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    tokio::spawn(async move {
        let mut buffer = [0; 64];
        while let Ok((_, from)) = socket.recv_from(&mut buffer).await {
            drop(socket.send_to(name.as_bytes(), from).await);
        }
    });
    address
}

/// Clients use their ports again: what comes from one is a new question, and must not go to where the last one went.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_port_that_is_used_again_does_not_lead_to_an_endpoint_that_is_gone() {
    let (a, b) = two_sites().await;
    let (old, new) = (named_server("old").await, named_server("new").await);
    service(&[&a, &b], "dns", "UDP", &[(old, "b")]);
    let listener = a.listener("dns", Protocol::Udp);
    let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    // What is under way while its flow ends is lost, as datagrams may be: it is asked again.
    let ask = async || {
        let mut buffer = [0; 16];
        let answer = async {
            loop {
                client.send_to(b"?", listener).await.unwrap();
                if let Ok(length) = tokio::time::timeout(Duration::from_secs(2), client.recv(&mut buffer)).await {
                    return length.unwrap();
                }
            }
        };
        let length = within("an answer", answer).await;
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    };
    assert_eq!(ask().await, "old");

    // Both are there, the old one is going: who makes a pause is answered by the new one.
    service(&[&a, &b], "dns", "UDP", &[(old, "b"), (new, "b")]);
    condition(&[&a, &b], old, json!({"ready": false, "serving": true, "terminating": true}));
    within("the flow to move on after a pause", async {
        while ask().await == "old" {
            tokio::time::sleep(Duration::from_millis(1100)).await;
        }
    })
    .await;

    // The old one comes back and the new one is gone at once: without any pause.
    condition(&[&a, &b], old, json!({"ready": true, "serving": true}));
    service(&[&a, &b], "dns", "UDP", &[(old, "b")]);
    for node in [&a, &b] {
        node.catalog.delete_endpoint_slice("default", "dns-1");
        node.catalog.publish();
    }
    within("the flow to leave the endpoint that is gone", async { while ask().await == "new" {} }).await;
}

/// Changes what is said of the endpoint of the slice `dns-0`.
fn condition(nodes: &[&crate::rig::Node], endpoint: std::net::SocketAddr, conditions: serde_json::Value) {
    for node in nodes {
        let slice = json!({
            "metadata": {"namespace": "default", "name": "dns-0", "labels": {"kubernetes.io/service-name": "dns"}},
            "addressType": "IPv4",
            "ports": [{"name": "main", "port": endpoint.port(), "protocol": "UDP"}],
            "endpoints": [{"addresses": [endpoint.ip()], "nodeName": "b", "conditions": conditions}],
        });
        node.catalog.apply_endpoint_slice(&serde_json::from_value(slice).unwrap());
        node.catalog.publish();
    }
}
