//! Paths through a relay: the peers know no direct address of each other.

use std::time::{Duration, Instant};

use edgemesh_tunnel::{Carried, Path, TunnelConfig, TunnelPeer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::rig::{Endpoint, echo, header, round_trip, udp_echo, within};

const RELAYED: &str = "edgemesh_tunnel_connections{path=\"relay\"}";

struct Site {
    relay: Endpoint,
    a: Endpoint,
    b: Endpoint,
}

/// What `endpoint` would publish if none of its own addresses could be reached.
async fn hidden(endpoint: &Endpoint) -> TunnelPeer {
    TunnelPeer { addresses: Vec::new(), ..endpoint.peer(2).await }
}

async fn site(hole_punching: bool) -> Site {
    site_with(|_, config| {
        config.hole_punching = hole_punching;
        config.upgrade_pause = Duration::from_millis(200);
    })
    .await
}

/// With settings that `change` makes for `a` and `b`.
async fn site_with(change: impl Fn(&str, &mut TunnelConfig)) -> Site {
    let relay = Endpoint::start("relay", |config| config.relay_server = true);
    let [a, b] = ["a", "b"].map(|name| Endpoint::start(name, |config| change(name, config)));
    let relay_peer = relay.peer(2).await;
    relay.tunnel.set_peers(&[hidden(&a).await, hidden(&b).await]);
    a.tunnel.set_peers(&[relay_peer.clone(), hidden(&b).await]);
    b.tunnel.set_peers(&[relay_peer, hidden(&a).await]);
    a.circuits().await;
    b.circuits().await;
    Site { relay, a, b }
}

#[tokio::test(flavor = "multi_thread")]
async fn peers_without_direct_addresses_meet_at_the_relay() {
    let site = site(false).await;
    assert_eq!(round_trip(&site.a.tunnel, "b", echo().await, "hello").await, "relay");
    assert_eq!(site.a.tunnel.path("b"), Path::Relayed { via: "relay".into() });
    assert_eq!(site.b.metric("edgemesh_tunnel_streams_accepted_total{path=\"relay\"}"), 1);
    assert_eq!(site.b.metric("edgemesh_tunnel_reservations"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn published_circuit_addresses_are_enough() {
    let site = site(false).await;
    let relay = site.relay.peer(2).await;
    let peer = TunnelPeer { addresses: site.b.circuits().await, ..site.b.peer(2).await };
    // The relay is allowed, but `a` isn't told that it relays.
    site.a.tunnel.set_peers(&[TunnelPeer { relay: false, ..relay }, peer]);
    assert_eq!(round_trip(&site.a.tunnel, "b", echo().await, "hello").await, "relay");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_relay_reaches_its_clients_over_the_connection_that_they_made() {
    let site = site(false).await;
    assert_eq!(round_trip(&site.relay.tunnel, "a", echo().await, "hello").await, "quic");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relayed_stream_has_no_data_cap() {
    const TOTAL: usize = 64 << 20;
    let site = site(false).await;
    let stream = site.a.tunnel.open("b", &header(Carried::Tcp, echo().await)).await.unwrap();
    assert_eq!(stream.path().label(), "relay");
    let (mut reader, mut writer) = tokio::io::split(stream);
    let sending = tokio::spawn(async move {
        let block = vec![42; 64 * 1024];
        for _ in 0..TOTAL / block.len() {
            writer.write_all(&block).await.unwrap();
        }
        writer.shutdown().await.unwrap();
    });
    let begin = Instant::now();
    let mut buffer = vec![0; 64 * 1024];
    let mut total = 0;
    while let read @ 1.. = within("data", reader.read(&mut buffer)).await.unwrap() {
        total += read;
    }
    sending.await.unwrap();
    assert_eq!(total, TOTAL);
    eprintln!("relayed there and back: {:.0} MB/s", 2.0 * TOTAL as f64 / 1e6 / begin.elapsed().as_secs_f64());
}

#[tokio::test(flavor = "multi_thread")]
async fn udp_goes_through_the_relay_too() {
    let site = site(false).await;
    let stream = site.a.tunnel.open("b", &header(Carried::Udp, udp_echo().await)).await.unwrap();
    let (mut sender, mut receiver) = stream.into_datagrams();
    sender.send(&[9; 65_507]).await.unwrap();
    assert_eq!(within("the answer", receiver.recv()).await.unwrap().unwrap().len(), 65_507);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_node_is_reached_soon_after_the_relay_learns_of_it() {
    let relay = Endpoint::start("relay", |config| config.relay_server = true);
    let a = Endpoint::start("a", |_| {});
    a.tunnel.set_peers(&[relay.peer(2).await]);
    within("refusals", async {
        while relay.metric("edgemesh_tunnel_strangers_refused_total") < 6 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    relay.tunnel.set_peers(&[hidden(&a).await]);
    let known = Instant::now();
    a.circuits().await;
    assert!(known.elapsed() < Duration::from_millis(1500), "it took {:?}", known.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_return_to_a_restarted_relay() {
    let mut site = site(false).await;
    let server = echo().await;
    round_trip(&site.a.tunnel, "b", server, "before").await;
    site.relay = site.relay.restart().await;
    site.relay.tunnel.set_peers(&[hidden(&site.a).await, hidden(&site.b).await]);
    within("the path to return", async {
        loop {
            match site.a.tunnel.open("b", &header(Carried::Tcp, server)).await {
                Ok(stream) if stream.path().label() == "relay" => break,
                _ => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    })
    .await;
    round_trip(&site.a.tunnel, "b", server, "after").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_was_reached_through_a_relay_is_reached_directly_as_soon_as_that_works() {
    let site = site(false).await;
    let server = echo().await;
    assert_eq!(round_trip(&site.a.tunnel, "b", server, "hello").await, "relay");
    // From now on there is a way.
    site.a.tunnel.set_peers(&[site.relay.peer(2).await, site.b.peer(2).await]);
    within("the direct path", async {
        while site.a.tunnel.path("b").label() != "quic" {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    assert_eq!(round_trip(&site.a.tunnel, "b", server, "hello").await, "quic");
    assert!(site.a.metric("edgemesh_tunnel_upgrade_retries_total") > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relayed_connection_is_upgraded_to_a_direct_one_and_closed() {
    let site = site(true).await;
    let server = echo().await;
    round_trip(&site.a.tunnel, "b", server, "hello").await;
    within("the upgrade", async {
        while matches!(site.a.tunnel.path("b"), Path::Relayed { .. } | Path::None) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    assert_ne!(round_trip(&site.a.tunnel, "b", server, "hello").await, "relay");
    within("the relayed connections to be closed", async {
        while site.a.metric(RELAYED) + site.b.metric(RELAYED) > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

/// No hole is ever punched, since one of the two doesn't know how, while the other goes on trying.
#[tokio::test(flavor = "multi_thread")]
async fn attempts_that_fail_leave_no_connections_behind_and_room_for_a_direct_one() {
    const STEP: Duration = Duration::from_millis(20);
    let site = site_with(|name, config| {
        config.hole_punching = name == "a";
        config.upgrade_pause = STEP;
        config.longest_upgrade_pause = STEP;
    })
    .await;
    let server = echo().await;
    let mut used = site.a.tunnel.open("b", &header(Carried::Tcp, server)).await.unwrap();
    assert_eq!(used.path().label(), "relay");
    within("attempts, more than there may be connections", async {
        while site.a.metric("edgemesh_tunnel_upgrade_retries_total") < 40 {
            tokio::time::sleep(STEP).await;
        }
    })
    .await;
    // The one that is used, the newest, and the next.
    within("the others to be closed", async {
        while site.a.metric(RELAYED).max(site.b.metric(RELAYED)) > 3 {
            tokio::time::sleep(STEP).await;
        }
    })
    .await;
    used.write_all(b"still").await.unwrap();
    within("the answer", used.read_exact(&mut [0; 5])).await.unwrap();
    site.a.tunnel.set_peers(&[site.relay.peer(2).await, site.b.peer(2).await]);
    within("the direct path", async {
        while site.a.tunnel.path("b").label() != "quic" {
            tokio::time::sleep(STEP).await;
        }
    })
    .await;
    used.write_all(b"there").await.unwrap();
    within("the answer", used.read_exact(&mut [0; 5])).await.unwrap();
    assert_eq!(site.b.metric("edgemesh_tunnel_strangers_refused_total"), 0);
}

/// Streams of clients that come and go without ever ending theirs, as those of UDP flows.
#[tokio::test(flavor = "multi_thread")]
async fn the_flow_that_is_one_too_many_is_refused_at_once_and_the_others_stay() {
    let site = site(false).await;
    let server = udp_echo().await;
    let mut flows = Vec::new();
    let (refused, time) = loop {
        assert!(flows.len() < 4096, "nothing was refused");
        let begin = Instant::now();
        match within("open", site.a.tunnel.open("b", &header(Carried::Udp, server))).await {
            Ok(stream) => flows.push(stream.into_datagrams()),
            Err(error) => break (error, begin.elapsed()),
        }
    };
    assert_eq!(refused.label(), "busy", "{refused} after {}", flows.len());
    assert!(time < site.a.config.open_deadline / 4, "{time:?}");
    let last = flows.len() - 1;
    for at in [0, last] {
        let (sender, receiver) = &mut flows[at];
        sender.send(b"still there").await.unwrap();
        assert_eq!(within("the answer", receiver.recv()).await.unwrap().unwrap(), b"still there"[..], "{at}");
    }
    assert_eq!(round_trip(&site.a.tunnel, "b", echo().await, "room for connections").await, "relay");
    flows.pop();
    assert!(within("open", site.a.tunnel.open("b", &header(Carried::Udp, server))).await.is_ok());
}
