//! Proxied Service ports.

use std::{net::SocketAddr, time::Duration};

use edgemesh_mesh::model::Protocol;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
};

use crate::rig::{Node, service, two_sites, within};

/// A TCP server that reads all, then answers with its name and the number of bytes.
async fn server(name: &'static str) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut connection, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut all = Vec::new();
                let _ = connection.read_to_end(&mut all).await;
                let _ = connection.write_all(format!("{name} {}", all.len()).as_bytes()).await;
            });
        }
    });
    address
}

/// A UDP server that sends back what it gets.
async fn udp_server() -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    tokio::spawn(async move {
        let mut buffer = vec![0; 65_536];
        while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
            let _ = socket.send_to(&buffer[..length], from).await;
        }
    });
    address
}

async fn call(node: &Node, name: &str, body: &[u8]) -> std::io::Result<String> {
    let mut connection = TcpStream::connect(node.listener(name, Protocol::Tcp)).await?;
    connection.write_all(body).await?;
    connection.shutdown().await?;
    let mut answer = String::new();
    within("the answer", connection.read_to_string(&mut answer)).await?;
    Ok(answer)
}

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
async fn one_endpoint_that_swallows_connections_does_not_hold_up_other_services() {
    let (a, b) = two_sites().await;
    // A full backlog: further connections hang, as with a black hole.
    let hole = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    hole.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    hole.listen(0).unwrap();
    let swallowing = hole.local_addr().unwrap().as_socket().unwrap();
    let _filling: Vec<_> = (0..4)
        .map(|_| {
            let filler = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
            filler.set_nonblocking(true).unwrap();
            let _ = filler.connect(&swallowing.into());
            filler
        })
        .collect();
    service(&[&a, &b], "hole", "TCP", &[(swallowing, "b")]);
    service(&[&a, &b], "web", "TCP", &[(server("b").await, "b")]);
    let hanging: Vec<_> =
        futures::future::join_all((0..50).map(|_| TcpStream::connect(a.listener("hole", Protocol::Tcp)))).await;
    let begin = std::time::Instant::now();
    assert_eq!(call(&a, "web", b"x").await.unwrap(), "b 1");
    assert!(begin.elapsed() < Duration::from_secs(4), "{:?}", begin.elapsed());
    drop(hanging);
}

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

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_udp_clients_leave_tcp_working() {
    let (a, b) = two_sites().await;
    service(&[&a, &b], "dns", "UDP", &[(udp_server().await, "b")]);
    service(&[&a, &b], "web", "TCP", &[(server("b").await, "b")]);
    let listener = a.listener("dns", Protocol::Udp);
    let mut buffer = [0; 16];
    for client in 0..1000u32 {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        socket.send_to(&client.to_be_bytes(), listener).await.unwrap();
        let length = within("the reply", socket.recv(&mut buffer)).await.unwrap();
        assert_eq!(buffer[..length], client.to_be_bytes());
    }
    assert_eq!(call(&a, "web", b"x").await.unwrap(), "b 1");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_port_is_closed_outside_of_the_node_local_range() {
    let (a, _b) = two_sites().await;
    let outside = SocketAddr::from(([127, 0, 0, 1], a.overlay.proxied_address().port()));
    let attempt = tokio::time::timeout(Duration::from_millis(300), TcpStream::connect(outside)).await;
    assert!(!matches!(attempt, Ok(Ok(_))), "the listener answered at {outside}");
}
