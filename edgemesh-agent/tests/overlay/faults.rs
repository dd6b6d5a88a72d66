//! What breaks other proxies: endpoints that swallow connections, half-closed connections, relayed paths, Services that
//! change and go while they are in use.

use std::{io::ErrorKind, time::Duration};

use edgemesh_mesh::model::Protocol;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use crate::{
    rig::{Node, service, two_sites, two_sites_behind_a_relay, two_sites_with, until, within},
    servers::{black_hole, call, call_from, greeting_server, nobody, server, server_at, vanish},
};

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_swallows_connections_does_not_hold_up_other_services() {
    let (a, b) = two_sites().await;
    let hole = black_hole();
    service(&[&a, &b], "hole", "TCP", &[(hole.address, "b")]);
    service(&[&a, &b], "web", "TCP", &[(server("b").await, "b")]);
    let connecting = (0..50).map(|_| TcpStream::connect(a.listener("hole", Protocol::Tcp)));
    let mut hanging = futures::future::try_join_all(connecting).await.unwrap();
    for _ in 0..5 {
        assert_eq!(call(&a, "web", b"x").await.unwrap(), "b 1");
    }
    // None of those has got an answer meanwhile.
    for connection in &mut hanging {
        let mut byte = [0];
        assert!(connection.try_read(&mut byte).is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_with_an_endpoint_that_swallows_connections_answers_all() {
    let (a, b) = two_sites().await;
    let hole = black_hole();
    service(&[&a, &b], "far", "TCP", &[(hole.address, "b"), (server("b").await, "b")]);
    service(&[&a, &b], "near", "TCP", &[(hole.address, "a"), (server("a").await, "a")]);
    let calls = (0..8).map(|at| call(&a, if at % 2 == 0 { "far" } else { "near" }, b"x"));
    for (at, answer) in futures::future::join_all(calls).await.into_iter().enumerate() {
        assert_eq!(answer.unwrap(), if at % 2 == 0 { "b 1" } else { "a 1" });
    }
}

/// What the client still sends after the server has ended its own side must arrive.
async fn the_server_may_end_first(a: &Node, name: &str, told: &mut tokio::sync::mpsc::Receiver<usize>) {
    let mut connection = TcpStream::connect(a.listener(name, Protocol::Tcp)).await.unwrap();
    let mut greeting = String::new();
    within("the greeting and its end", connection.read_to_string(&mut greeting)).await.unwrap();
    assert_eq!(greeting, "hello");
    connection.write_all(&[7; 300_000]).await.unwrap();
    connection.shutdown().await.unwrap();
    assert_eq!(within("what the server got", told.recv()).await, Some(300_000));
}

#[tokio::test(flavor = "multi_thread")]
async fn either_side_may_end_its_sending_first_on_every_path() {
    let (a, b) = two_sites().await;
    for (name, node) in [("near", "a"), ("far", "b")] {
        let (address, mut told) = greeting_server("hello").await;
        service(&[&a, &b], name, "TCP", &[(address, node)]);
        the_server_may_end_first(&a, name, &mut told).await;
    }
    // The other order is that of every `call`.
    let (a, b, _relay) = two_sites_behind_a_relay().await;
    let (address, mut told) = greeting_server("hello").await;
    service(&[&a, &b], "far", "TCP", &[(address, "b")]);
    the_server_may_end_first(&a, "far", &mut told).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_that_reach_only_a_relay_reach_each_others_services() {
    let (a, b, _relay) = two_sites_behind_a_relay().await;
    service(&[&a, &b], "web", "TCP", &[(server("b").await, "b")]);
    assert_eq!(call(&a, "web", &[1; 2_000_000]).await.unwrap(), "b 2000000");
    let relayed = "edgemesh_agent_proxied_connections_total{protocol=\"tcp\",path=\"relay\",result=\"ok\"}";
    assert_eq!(a.metric(relayed), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_outlive_the_end_of_their_service() {
    let (a, b) = two_sites().await;
    service(&[&a, &b], "web", "TCP", &[(server("old").await, "b")]);
    let mut open = TcpStream::connect(a.listener("web", Protocol::Tcp)).await.unwrap();
    open.write_all(b"begun").await.unwrap();
    // The endpoint must have been chosen before the Service changes.
    let chosen = "edgemesh_agent_proxied_connections_total{protocol=\"tcp\",path=\"tunnel\",result=\"ok\"}";
    crate::rig::until("the connection", || a.metric(chosen) == 1).await;
    for node in [&a, &b] {
        node.catalog.delete_service("default", "web");
        node.catalog.publish();
    }
    assert!(call(&a, "web", b"x").await.is_err());
    open.shutdown().await.unwrap();
    let mut answer = String::new();
    within("the answer", open.read_to_string(&mut answer)).await.unwrap();
    assert_eq!(answer, "old 5");
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_end_with_their_endpoint_when_their_service_has_others() {
    let (a, b) = two_sites().await;
    let (old, kept) = (server("old").await, server("kept").await);
    service(&[&a, &b], "web", "TCP", &[(old, "b")]);
    service(&[&a, &b], "steady", "TCP", &[(kept, "b")]);
    let mut stale = TcpStream::connect(a.listener("web", Protocol::Tcp)).await.unwrap();
    let mut steady = TcpStream::connect(a.listener("steady", Protocol::Tcp)).await.unwrap();
    for connection in [&mut stale, &mut steady] {
        connection.write_all(b"begun").await.unwrap();
    }
    let chosen = "edgemesh_agent_proxied_connections_total{protocol=\"tcp\",path=\"tunnel\",result=\"ok\"}";
    crate::rig::until("the connections", || a.metric(chosen) == 2).await;
    service(&[&a, &b], "web", "TCP", &[(server("new").await, "b")]);
    service(&[&a, &b], "steady", "TCP", &[(kept, "b"), (server("more").await, "b")]);
    // It only reads, so nothing but the mesh could tell it.
    let ended = within("the end", stale.read(&mut [0; 1])).await;
    assert_eq!(ended.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    steady.shutdown().await.unwrap();
    let mut answer = String::new();
    within("the answer", steady.read_to_string(&mut answer)).await.unwrap();
    assert_eq!(answer, "kept 5");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_of_one_side_is_a_reset_at_the_other_and_never_an_orderly_end() {
    let (a, b) = two_sites().await;
    resets_pass(&a, &b).await;
    let (a, b, _relay) = two_sites_behind_a_relay().await;
    resets_pass(&a, &b).await;
}

/// Calls endpoints of both nodes from the first; each side resets a connection with either.
async fn resets_pass(a: &Node, b: &Node) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = listener.local_addr().unwrap();
    service(&[a, b], "near", "TCP", &[(endpoint, "a")]);
    service(&[a, b], "far", "TCP", &[(endpoint, "b")]);
    for (name, client_breaks) in [("near", true), ("near", false), ("far", true), ("far", false)] {
        let mut client = TcpStream::connect(a.listener(name, Protocol::Tcp)).await.unwrap();
        client.write_all(b"begun").await.unwrap();
        let (mut server, _) = within("the connection", listener.accept()).await.unwrap();
        within("the bytes", server.read_exact(&mut [0; 5])).await.unwrap();
        let (breaking, mut other) = if client_breaks { (client, server) } else { (server, client) };
        socket2::SockRef::from(&breaking).set_linger(Some(Duration::ZERO)).unwrap();
        drop(breaking);
        let ended = within("the end", other.read(&mut [0; 1])).await.map_err(|error| error.kind());
        assert_eq!(ended, Err(std::io::ErrorKind::ConnectionReset), "{name}, {client_breaks}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_end_of_an_agent_cuts_off_is_reset_at_both_sides() {
    let (a, b) = two_sites().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = listener.local_addr().unwrap();
    service(&[&a, &b], "near", "TCP", &[(endpoint, "a")]);
    service(&[&a, &b], "far", "TCP", &[(endpoint, "b")]);
    let mut ends = Vec::new();
    for name in ["near", "far"] {
        let mut client = TcpStream::connect(a.listener(name, Protocol::Tcp)).await.unwrap();
        client.write_all(b"begun").await.unwrap();
        let (mut server, _) = within("the connection", listener.accept()).await.unwrap();
        within("the bytes", server.read_exact(&mut [0; 5])).await.unwrap();
        ends.extend([(name, "client", client), (name, "server", server)]);
    }
    assert!(!a.shutdown.drain(Duration::ZERO).await, "connections are open");
    for (name, side, mut end) in ends {
        let ended = within("the end", end.read(&mut [0; 1])).await.map_err(|error| error.kind());
        assert_eq!(ended, Err(std::io::ErrorKind::ConnectionReset), "{name}, {side}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_ends_when_one_of_its_sides_has_vanished_without_a_word() {
    let (a, b) = two_sites_with(|config| config.proxied.keepalive_seconds = 1).await;
    let in_its_network = serde_json::json!({"metadata": {"name": "c", "labels": {"edgemesh.dev/network": "site-a"}}});
    a.catalog.apply_node(&serde_json::from_value(in_its_network).unwrap());
    for (name, on) in [("near", "a"), ("lan", "c"), ("far", "b")] {
        let endpoint = TcpListener::bind("127.0.0.1:0").await.unwrap();
        service(&[&a, &b], name, "TCP", &[(endpoint.local_addr().unwrap(), on)]);
        let connect = async || {
            let mut client = TcpStream::connect(a.listener(name, Protocol::Tcp)).await.unwrap();
            client.write_all(b"?").await.unwrap();
            let (mut accepted, _) = endpoint.accept().await.unwrap();
            assert_eq!(accepted.read_u8().await.unwrap(), b'?');
            (client, accepted)
        };
        let (client, mut accepted) = connect().await;
        vanish(client);
        let end = within("the endpoint to be told", accepted.read_u8()).await.unwrap_err();
        assert_eq!(end.kind(), ErrorKind::ConnectionReset, "{name}");
        // Of pods of the endpoint's own node its kernel tells.
        if on == "c" {
            let (mut client, accepted) = connect().await;
            vanish(accepted);
            let end = within("the client to be told", client.read_u8()).await.unwrap_err();
            assert_eq!(end.kind(), ErrorKind::ConnectionReset, "{name}");
        }
    }
    until("nothing to be left", || a.metric("edgemesh_agent_proxied_active{protocol=\"tcp\"}") == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_with_affinity_keeps_its_endpoint_whatever_port_it_calls_from() {
    let (a, b) = two_sites().await;
    let endpoints = [(server("1").await, "b"), (server("2").await, "b"), (server("3").await, "b")];
    service(&[&a, &b], "web", "TCP", &endpoints);
    let sticky = serde_json::json!({
        "metadata": {"namespace": "default", "name": "web"},
        "spec": {
            "clusterIP": "10.96.0.9", "sessionAffinity": "ClientIP",
            "ports": [{"name": "main", "port": 80, "protocol": "TCP"}],
        },
    });
    let stick = || {
        a.catalog.apply_service(&serde_json::from_value(sticky.clone()).unwrap());
        a.catalog.publish();
    };
    stick();
    let first = call(&a, "web", b"x").await.unwrap();
    for _ in 0..20 {
        assert_eq!(call(&a, "web", b"x").await.unwrap(), first);
    }
    // Nor does any client move to an endpoint that comes.
    let from = |client| call_from([127, 0, 1, client].into(), &a, "web", b"x");
    let clients = || futures::future::try_join_all((1..=40).map(from));
    let before = clients().await.unwrap();
    service(&[&a, &b], "web", "TCP", &[&endpoints[..], &[(server("4").await, "b")]].concat());
    stick();
    assert_eq!(clients().await.unwrap(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_swallows_connections_is_passed_over_and_used_again_when_it_answers() {
    let (a, b) = two_sites().await;
    let hole = black_hole();
    service(&[&a, &b], "web", "TCP", &[(hole.address, "b"), (server("good").await, "b")]);
    let ejections = || a.metric("edgemesh_agent_proxied_ejections_total");
    while ejections() == 0 {
        assert_eq!(call(&a, "web", b"x").await.unwrap(), "good 1");
    }
    let page = a.overlay.debug_page()();
    assert_eq!(page["ejected"].as_array().unwrap().len(), 1, "{page}");
    assert_eq!(page["ejected"][0]["endpoint"], hole.address.to_string(), "{page}");
    // Half of these would try the other one first, for five seconds each: more than a minute.
    let begin = std::time::Instant::now();
    for _ in 0..30 {
        assert_eq!(call(&a, "web", b"x").await.unwrap(), "good 1");
    }
    assert!(begin.elapsed() < std::time::Duration::from_secs(40), "{:?}", begin.elapsed());
    let address = hole.address;
    drop(hole);
    let _healed = server_at(address, "healed").await;
    within("the endpoint to be used again", async {
        while call(&a, "web", b"x").await.unwrap() != "healed 1" {
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
    })
    .await;
    let page = a.overlay.debug_page()();
    assert!(page["ejected"].as_array().unwrap().is_empty(), "{page}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_whose_only_endpoint_was_away_is_served_as_soon_as_it_is_back() {
    let (a, b) = two_sites().await;
    let gone = nobody().await;
    service(&[&a, &b], "web", "TCP", &[(gone, "b")]);
    for _ in 0..5 {
        assert!(call(&a, "web", b"x").await.is_err());
    }
    assert!(a.metric("edgemesh_agent_proxied_ejections_total") >= 1);
    let _server = server_at(gone, "back").await;
    assert_eq!(call(&a, "web", b"x").await.unwrap(), "back 1");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_gone_takes_all_its_endpoints_out_of_the_choice_at_once() {
    let (a, b) = two_sites().await;
    // Nobody knows how to reach the node `gone`.
    let away: Vec<_> = (1..=8).map(|port| (std::net::SocketAddr::from(([127, 0, 0, 1], port)), "gone")).collect();
    let endpoints: Vec<_> = away.iter().copied().chain([(server("good").await, "b")]).collect();
    service(&[&a, &b], "web", "TCP", &endpoints);
    while a.metric("edgemesh_agent_proxied_ejections_total") == 0 {
        assert_eq!(call(&a, "web", b"x").await.unwrap(), "good 1");
    }
    assert_eq!(a.metric("edgemesh_agent_proxied_ejections_total"), 8);
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_spill_to_farther_endpoints_while_all_nearer_ones_fail_and_return_with_these() {
    let (a, b) = two_sites().await;
    let gone = nobody().await;
    service(&[&a, &b], "web", "TCP", &[(gone, "a"), (server("far").await, "b")]);
    // The first finds out, and goes on itself; the others know.
    for _ in 0..10 {
        assert_eq!(call(&a, "web", b"x").await.unwrap(), "far 1");
    }
    assert!(a.metric("edgemesh_agent_proxied_ejections_total") >= 1);
    assert_eq!(a.metric("edgemesh_agent_proxied_spilled_total"), 10);
    let _healed = server_at(gone, "near").await;
    within("the nearer endpoint to be used again", async {
        while call(&a, "web", b"x").await.unwrap() != "near 1" {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    })
    .await;
    let spilled = a.metric("edgemesh_agent_proxied_spilled_total");
    for _ in 0..10 {
        assert_eq!(call(&a, "web", b"x").await.unwrap(), "near 1");
    }
    assert_eq!(a.metric("edgemesh_agent_proxied_spilled_total"), spilled);
}
