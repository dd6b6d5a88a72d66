//! Direct paths, and what a stream must keep.

use edgemesh_tunnel::{Carried, Path, RefusalReason, StreamHeader, TunnelError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::rig::{DEADLINE, Endpoint, counter, echo, flood, header, round_trip, service, udp_echo, within};

async fn pair() -> (Endpoint, Endpoint) {
    let (a, b) = (Endpoint::start("a", |_| {}), Endpoint::start("b", |_| {}));
    a.tunnel.set_peers(&[b.peer(2).await]);
    b.tunnel.set_peers(&[a.peer(2).await]);
    (a, b)
}

#[tokio::test(flavor = "multi_thread")]
async fn quic_is_preferred_and_the_counters_say_so() {
    let (a, b) = pair().await;
    let server = echo().await;
    assert_eq!(a.tunnel.path("b"), Path::None);
    assert_eq!(round_trip(&a.tunnel, "b", server, "hello").await, "quic");
    assert_eq!(a.tunnel.path("b").label(), "quic");
    assert_eq!(a.metric("edgemesh_tunnel_streams_opened_total{path=\"quic\"}"), 1);
    assert_eq!(b.metric("edgemesh_tunnel_streams_accepted_total{path=\"quic\"}"), 1);
    assert!(a.metric("edgemesh_tunnel_bytes_total{path=\"quic\",direction=\"received\"}") >= 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn tcp_is_used_when_quic_is_not_offered() {
    let a = Endpoint::start("a", |_| {});
    let b = Endpoint::start("b", |config| config.listen = vec!["/ip4/127.0.0.1/tcp/0".parse().unwrap()]);
    a.tunnel.set_peers(&[b.peer(1).await]);
    b.tunnel.set_peers(&[a.peer(2).await]);
    assert_eq!(round_trip(&a.tunnel, "b", echo().await, "hello").await, "tcp");
}

#[tokio::test(flavor = "multi_thread")]
async fn tcp_is_used_when_quic_does_not_answer() {
    let (a, b) = (Endpoint::start("a", |_| {}), Endpoint::start("b", |_| {}));
    let silent = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let mut peer = b.peer(2).await;
    peer.addresses.retain(|address| address.contains("/tcp/"));
    peer.addresses.push(format!("/ip4/127.0.0.1/udp/{}/quic-v1", silent.local_addr().unwrap().port()));
    a.tunnel.set_peers(&[peer]);
    b.tunnel.set_peers(&[a.peer(2).await]);
    assert_eq!(round_trip(&a.tunnel, "b", echo().await, "hello").await, "tcp");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_is_not_known_is_refused() {
    let (a, b) = (Endpoint::start("a", |_| {}), Endpoint::start("b", |_| {}));
    a.tunnel.set_peers(&[b.peer(2).await]);
    let error = within("open", a.tunnel.open("b", &header(Carried::Tcp, echo().await))).await.unwrap_err();
    // The dialer of a QUIC connection is through before the other side has decided: it learns of the refusal by a close, and
    // where that packet is lost, by silence. What counts is that the other side took nothing.
    let refused =
        matches!(error, TunnelError::Unreachable { .. } | TunnelError::Lost { .. } | TunnelError::Timeout { .. });
    assert!(refused, "{error}");
    assert!(b.metric("edgemesh_tunnel_strangers_refused_total") >= 1);
    assert_eq!(b.metric("edgemesh_tunnel_streams_accepted_total{path=\"quic\"}"), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_is_no_longer_known_loses_its_connection() {
    let (a, b) = pair().await;
    let server = echo().await;
    let mut stream = a.tunnel.open("b", &header(Carried::Tcp, server)).await.unwrap();
    b.tunnel.set_peers(&[]);
    let mut buffer = [0; 1];
    let ended = within("the end of the stream", stream.read(&mut buffer)).await;
    assert!(matches!(ended, Ok(0) | Err(_)));
    assert!(within("open", a.tunnel.open("b", &header(Carried::Tcp, server))).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn each_failure_says_what_it_was() {
    let (a, _b) = pair().await;
    let server = echo().await;
    let error = a.tunnel.open("nowhere", &header(Carried::Tcp, server)).await.unwrap_err();
    assert!(matches!(error, TunnelError::UnknownNode { .. }), "{error}");

    let forbidden = StreamHeader { target: service("forbidden"), ..header(Carried::Tcp, server) };
    let error = a.tunnel.open("b", &forbidden).await.unwrap_err();
    let TunnelError::Refused { refusal, .. } = error else { panic!("{error}") };
    assert_eq!((refusal.reason, refusal.detail.as_str()), (RefusalReason::NotHere, "no such endpoint here"));

    let error = a.tunnel.open("b", &header(Carried::Tcp, "127.0.0.1:1".parse().unwrap())).await.unwrap_err();
    let TunnelError::Refused { refusal, .. } = error else { panic!("{error}") };
    assert_eq!(refusal.reason, RefusalReason::DialFailed);

    let long = StreamHeader { source: "x".repeat(5000), ..header(Carried::Tcp, server) };
    let error = a.tunnel.open("b", &long).await.unwrap_err();
    assert!(matches!(error, TunnelError::HeaderTooLong(_)), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_gone_is_unreachable_soon() {
    let (a, b) = pair().await;
    b.stop().await;
    let begin = std::time::Instant::now();
    let error = a.tunnel.open("b", &header(Carried::Tcp, echo().await)).await.unwrap_err();
    assert!(matches!(error, TunnelError::Unreachable { .. }), "{error}");
    assert!(begin.elapsed() < std::time::Duration::from_secs(8), "{:?}", begin.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_answer_arrives_after_the_client_closed_its_side() {
    for transport in ["quic", "tcp"] {
        let (a, b) = (Endpoint::start("a", |_| {}), Endpoint::start("b", |_| {}));
        let mut peer = b.peer(2).await;
        peer.addresses.retain(|address| address.contains(transport));
        a.tunnel.set_peers(&[peer]);
        b.tunnel.set_peers(&[a.peer(2).await]);
        let mut stream = a.tunnel.open("b", &header(Carried::Tcp, counter().await)).await.unwrap();
        assert_eq!(stream.path().label(), transport);
        stream.write_all(&vec![7; 300_000]).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = String::new();
        within("the answer", stream.read_to_string(&mut answer)).await.unwrap();
        assert_eq!(answer, "300000");
    }
}

/// While the client's node is slow, most of the answer waits for its acknowledgements.
#[test]
fn the_answer_arrives_whole_though_its_node_stops_as_soon_as_it_is_sent() {
    const ANSWER: usize = 256 << 10;
    let slow = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let fast = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let a = slow.block_on(async { Endpoint::start("a", |_| {}) });
    let b = fast.block_on(async { Endpoint::start("b", |_| {}) });
    a.tunnel.set_peers(&[fast.block_on(b.peer(2))]);
    b.tunnel.set_peers(&[slow.block_on(a.peer(2))]);
    let listener = fast.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let endpoint = listener.local_addr().unwrap();
    let asked = fast.spawn(async move {
        let (mut server, _) = listener.accept().await.unwrap();
        assert_eq!(server.read(&mut [0; 1]).await.unwrap(), 0);
        server
    });
    let (mut stream, mut server) = slow.block_on(async {
        let mut stream = a.tunnel.open("b", &header(Carried::Tcp, endpoint)).await.unwrap();
        stream.shutdown().await.unwrap();
        (stream, within("the question", asked).await.unwrap())
    });
    let shutdown = b.shutdown.clone();
    let stopping = fast.spawn(async move { shutdown.drain(DEADLINE).await });
    fast.block_on(async {
        server.write_all(&[7; ANSWER]).await.unwrap();
        drop(server);
        within("the stream to end", async {
            while b.metric("edgemesh_tunnel_streams") > 0 {
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        })
        .await;
        // Longer than it takes a node without streams to stop.
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    });
    let mut answer = Vec::new();
    slow.block_on(async { within("the answer", stream.read_to_end(&mut answer)).await }).unwrap();
    assert_eq!(answer.len(), ANSWER);
    assert!(fast.block_on(stopping).unwrap(), "it stops by itself");
}

#[tokio::test(flavor = "multi_thread")]
async fn datagrams_of_every_size_arrive_whole() {
    let (a, _b) = pair().await;
    let stream = a.tunnel.open("b", &header(Carried::Udp, udp_echo().await)).await.unwrap();
    let (mut sender, mut receiver) = stream.into_datagrams();
    for size in [0, 1, 1200, 4097, 20_000, 65_507] {
        let datagram: Vec<u8> = (0..size).map(|at| u8::try_from(at % 251).unwrap()).collect();
        sender.send(&datagram).await.unwrap();
        let answer = within("the datagram", receiver.recv()).await.unwrap().unwrap();
        assert!(answer == datagram, "{size}");
    }
    assert!(sender.send(&vec![0; 65_536]).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_udp_flows_leave_room_for_a_tcp_stream() {
    let (a, b) = pair().await;
    let server = udp_echo().await;
    for flow in 0..1000u32 {
        let stream = within("open", a.tunnel.open("b", &header(Carried::Udp, server))).await.unwrap();
        let (mut sender, mut receiver) = stream.into_datagrams();
        sender.send(&flow.to_be_bytes()).await.unwrap();
        assert_eq!(within("the answer", receiver.recv()).await.unwrap().unwrap(), flow.to_be_bytes()[..]);
    }
    assert_eq!(round_trip(&a.tunnel, "b", echo().await, "still there").await, "quic");
    within("the flows to end", async {
        while a.metric("edgemesh_tunnel_streams") + b.metric("edgemesh_tunnel_streams") > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_streams_at_once_share_one_connection() {
    let (a, _b) = pair().await;
    let server = echo().await;
    let trips = (0..500).map(|trip| {
        let tunnel = a.tunnel.clone();
        async move { round_trip(&tunnel, "b", server, &format!("trip {trip}")).await }
    });
    within("all", futures::future::join_all(trips)).await;
    assert_eq!(a.metric("edgemesh_tunnel_connections{path=\"quic\"}"), 1);
}

/// What a QUIC stream holds unread counts against its whole connection.
#[tokio::test(flavor = "multi_thread")]
async fn clients_that_stop_reading_hold_up_nobody_else() {
    const STUCK: u64 = 32;
    let (a, b) = pair().await;
    let server = flood().await;
    let mut stuck = Vec::new();
    for _ in 0..STUCK {
        let stream = within("open", a.tunnel.open("b", &header(Carried::Tcp, server))).await.unwrap();
        assert_eq!(stream.path().label(), "quic");
        stuck.push(stream);
    }
    let sent = || b.metric("edgemesh_tunnel_bytes_total{path=\"quic\",direction=\"sent\"}");
    within("each to be sent what it may hold", async {
        while sent() < STUCK * (3 << 19) {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await;
    for _ in 0..3 {
        assert_eq!(round_trip(&a.tunnel, "b", echo().await, "still there").await, "quic");
    }
    // They get on when they read again.
    let mut more = vec![0; 8 << 20];
    within("more", stuck[0].read_exact(&mut more)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_has_no_place_for_another_stream_says_so() {
    let a = Endpoint::start("a", |_| {});
    let b = Endpoint::start("b", |config| config.max_inbound_streams = 1);
    a.tunnel.set_peers(&[b.peer(2).await]);
    b.tunnel.set_peers(&[a.peer(2).await]);
    let server = echo().await;
    let first = within("open", a.tunnel.open("b", &header(Carried::Tcp, server))).await.unwrap();
    let error = within("open", a.tunnel.open("b", &header(Carried::Tcp, server))).await.unwrap_err();
    let TunnelError::Refused { refusal, .. } = &error else { panic!("{error}") };
    assert_eq!(refusal.reason, RefusalReason::Busy);
    assert_eq!(b.metric("edgemesh_tunnel_streams_refused_total{reason=\"busy\"}"), 1, "it is asked once");
    drop(first);
    within("the place to be free", async {
        while a.tunnel.open("b", &header(Carried::Tcp, server)).await.is_err() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_on_the_listening_ports_changes_nothing() {
    let (a, b) = pair().await;
    for address in b.peer(2).await.addresses {
        let port: u16 = address.split('/').nth(4).unwrap().parse().unwrap();
        if address.contains("/tcp/") {
            let mut connection = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();
            let _ = connection.write_all(&[0xff; 100_000]).await;
        } else {
            let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
            socket.send_to(&[0xff; 1200], ("127.0.0.1", port)).await.unwrap();
        }
    }
    round_trip(&a.tunnel, "b", echo().await, "hello").await;
}
