//! Proxied TCP connections.

use std::{net::SocketAddr, time::Duration};

use edgemesh_mesh::model::Protocol;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
};

use crate::{
    rig::{service, two_sites, until, within},
    servers::{call, server},
};

const TUNNELLED: &str = "edgemesh_agent_proxied_connections_total{protocol=\"tcp\",path=\"tunnel\",result=\"ok\"}";

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_reaches_an_endpoint_of_the_other_site() {
    let (a, b) = two_sites().await;
    service(&[&a, &b], "web", "TCP", &[(server("b").await, "b")]);
    assert_eq!(call(&a, "web", &[1; 200_000]).await.unwrap(), "b 200000");
    assert_eq!(a.metric(TUNNELLED), 1);
    assert_eq!(b.metric("edgemesh_tunnel_streams_accepted_total{path=\"quic\"}"), 1);
    within("the bytes to be counted", async {
        while a.metric("edgemesh_agent_proxied_bytes_total{protocol=\"tcp\",direction=\"to_endpoint\"}") < 200_000 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_is_near_needs_no_tunnel() {
    let (a, b) = two_sites().await;
    service(&[&a, &b], "web", "TCP", &[(server("a").await, "a"), (server("b").await, "b")]);
    for _ in 0..10 {
        assert_eq!(call(&a, "web", b"x").await.unwrap(), "a 1");
    }
    assert_eq!(a.metric(TUNNELLED), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_endpoint_is_tried_when_one_does_not_answer() {
    let (a, b) = two_sites().await;
    let gone = {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        listener.local_addr().unwrap()
    };
    service(&[&a, &b], "web", "TCP", &[(gone, "b"), (server("b").await, "b")]);
    for _ in 0..8 {
        assert_eq!(call(&a, "web", b"x").await.unwrap(), "b 1");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_port_without_endpoints_is_reset() {
    let (a, b) = two_sites().await;
    service(&[&a, &b], "web", "TCP", &[]);
    let error = call(&a, "web", b"x").await.unwrap_err();
    assert!(matches!(error.kind(), std::io::ErrorKind::ConnectionReset | std::io::ErrorKind::BrokenPipe), "{error:?}");
    // An address that belongs to no Service port.
    let stray = SocketAddr::from(([127, 64, 63, 200], a.overlay.proxied_address().port()));
    // The reset may come as early as the connection is made.
    if let Ok(mut connection) = TcpStream::connect(stray).await {
        assert!(within("the reset", connection.read_u8()).await.is_err());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_to_the_address_of_a_udp_port_is_reset_even_if_something_listens_behind_it() {
    let (a, b) = two_sites().await;
    service(&[&a, &b], "dns", "UDP", &[(server("not for you").await, "a")]);
    // The reset may come as early as the connection is made.
    if let Ok(mut connection) = TcpStream::connect(a.listener("dns", Protocol::Udp)).await {
        let _ = connection.write_all(b"x").await;
        let _ = connection.shutdown().await;
        assert!(within("the reset", connection.read_u8()).await.is_err());
    }
    let refused = "edgemesh_agent_proxied_connections_total{protocol=\"tcp\",path=\"none\",result=\"no_service\"}";
    until("the account", || a.metric(refused) == 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_serves_only_endpoints_that_its_own_catalog_places_on_it() {
    let (a, b) = two_sites().await;
    let inside = server("not for you").await;
    // Only `a` believes that this is an endpoint of `b`.
    service(&[&a], "web", "TCP", &[(inside, "b")]);
    let refused = || b.metric("edgemesh_tunnel_streams_refused_total{reason=\"not_here\"}");
    let before = refused();
    assert!(call(&a, "web", b"x").await.is_err());
    assert_eq!(refused(), before + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_port_is_closed_outside_of_the_node_local_range() {
    let (a, _b) = two_sites().await;
    let outside = SocketAddr::from(([127, 0, 0, 1], a.overlay.proxied_address().port()));
    let attempt = tokio::time::timeout(Duration::from_millis(300), TcpStream::connect(outside)).await;
    assert!(!matches!(attempt, Ok(Ok(_))), "the listener answered at {outside}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_the_datapath_let_through_may_use_far_endpoints_of_a_local_service() {
    let (a, b) = two_sites().await;
    service(&[&a, &b], "web", "TCP", &[(server("b").await, "b")]);
    // Only calls to its node port come here: the datapath refuses those to its cluster address.
    let local = serde_json::json!({
        "metadata": {"namespace": "default", "name": "web"},
        "spec": {"clusterIP": "10.96.0.9", "type": "NodePort", "internalTrafficPolicy": "Local",
            "ports": [{"name": "main", "port": 80, "nodePort": 30080, "protocol": "TCP"}]},
    });
    a.catalog.apply_service(&serde_json::from_value(local).unwrap());
    a.catalog.publish();
    assert_eq!(call(&a, "web", b"x").await.unwrap(), "b 1");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_wants_it_is_told_whose_connection_it_gets() {
    let (a, b) = two_sites().await;
    for (name, node, own) in [("far", "b", None), ("near", "a", None), ("beside", "a", Some("192.0.2.77"))] {
        // Processes of the host call a node-local address from that address itself.
        if let Some(own) = own {
            let with_address = serde_json::json!({"metadata": {"name": "a", "labels": {"edgemesh.dev/network": "site-a"}},
                "status": {"addresses": [{"type": "InternalIP", "address": own}]}});
            a.catalog.apply_node(&serde_json::from_value(with_address).unwrap());
        }
        // A server that answers with all that it got.
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        service(&[&a, &b], name, "TCP", &[(listener.local_addr().unwrap(), node)]);
        let wanting = serde_json::json!({
            "metadata": {"namespace": "default", "name": name, "annotations": {"edgemesh.dev/proxy-protocol": "v2"}},
            "spec": {"clusterIP": "10.96.0.9", "ports": [{"name": "main", "port": 80, "protocol": "TCP"}]},
        });
        for node in [&a, &b] {
            node.catalog.apply_service(&serde_json::from_value(wanting.clone()).unwrap());
            node.catalog.publish();
        }
        let (address, socket) = (a.listener(name, Protocol::Tcp), TcpSocket::new_v4().unwrap());
        if own.is_some() {
            socket.bind((address.ip(), 0).into()).unwrap();
        }
        let mut client = socket.connect(address).await.unwrap();
        let mut told = client.local_addr().unwrap();
        if let Some(own) = own {
            told.set_ip(own.parse().unwrap());
        }
        let (mut server, _) = within("the connection", listener.accept()).await.unwrap();
        client.write_all(b"hello").await.unwrap();
        client.shutdown().await.unwrap();
        let mut received = Vec::new();
        within("what is sent", server.read_to_end(&mut received)).await.unwrap();
        let header = edgemesh_mesh::l4::proxy_protocol::proxied(told, "10.96.0.9:80".parse().unwrap());
        assert_eq!(received, [&header[..], b"hello"].concat(), "{name}");
    }
}
