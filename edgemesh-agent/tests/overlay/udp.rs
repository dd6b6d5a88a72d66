//! Proxied UDP flows.

use edgemesh_mesh::model::Protocol;
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
