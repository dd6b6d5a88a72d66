//! Endpoints with an acceptor that really connects, and the servers that they connect to.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use edgemesh_telemetry::Shutdown;
use edgemesh_tunnel::{
    Accept, Carried, PeerName, Refusal, RefusalReason, Session, StreamHeader, StreamTarget, Tunnel, TunnelConfig,
    TunnelPeer,
};
use futures::future::BoxFuture;
use parking_lot::RwLock;
use prometheus_client::registry::Registry;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
};

/// Everything here happens on loopback; what takes longer than this doesn't work.
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);

/// Connects to whatever the header says, unless the Service is named `forbidden`.
struct Dialer;

impl Accept for Dialer {
    fn accept<'a>(&'a self, _: &'a PeerName, header: &'a StreamHeader) -> BoxFuture<'a, Result<Session, Refusal>> {
        Box::pin(async move {
            if matches!(&header.target, StreamTarget::Service { service, .. } if service == "forbidden") {
                return Err(Refusal::new(RefusalReason::NotHere, "no such endpoint here"));
            }
            match header.protocol {
                Carried::Tcp => {
                    let mut upstream = TcpStream::connect(header.endpoint)
                        .await
                        .map_err(|error| Refusal::new(RefusalReason::DialFailed, error.to_string()))?;
                    Ok(Session::new(move |mut stream| async move {
                        let _ = tokio::io::copy_bidirectional(&mut stream, &mut upstream).await;
                    }))
                }
                Carried::Udp => {
                    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
                    socket.connect(header.endpoint).await.unwrap();
                    Ok(Session::new(move |stream| async move {
                        let (mut sender, mut receiver) = stream.into_datagrams();
                        let mut buffer = vec![0; 65536];
                        loop {
                            tokio::select! {
                                datagram = receiver.recv() => match datagram {
                                    Ok(Some(datagram)) => { let _ = socket.send(&datagram).await; }
                                    _ => break,
                                },
                                Ok(length) = socket.recv(&mut buffer) => {
                                    if sender.send(&buffer[..length]).await.is_err() { break; }
                                }
                            }
                        }
                    }))
                }
            }
        })
    }
}

/// One endpoint.
pub(crate) struct Endpoint {
    pub(crate) tunnel: Tunnel,
    pub(crate) shutdown: Shutdown,
    pub(crate) registry: Arc<RwLock<Registry>>,
    pub(crate) config: TunnelConfig,
    _folder: Option<TempDir>,
}

impl Endpoint {
    /// Starts an endpoint that listens at the given transports of loopback.
    pub(crate) fn start(node: &str, change: impl FnOnce(&mut TunnelConfig)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut config = TunnelConfig::new(folder.path().join("identity.key"), node, "agent", 0);
        config.listen = vec!["/ip4/127.0.0.1/udp/0/quic-v1".parse().unwrap(), "/ip4/127.0.0.1/tcp/0".parse().unwrap()];
        change(&mut config);
        Self::start_with(config, Some(folder))
    }

    fn start_with(config: TunnelConfig, folder: Option<TempDir>) -> Self {
        let shutdown = Shutdown::default();
        let registry = Arc::new(RwLock::new(Registry::default()));
        let tunnel = Tunnel::start(&config, Arc::new(Dialer), &registry, &shutdown).unwrap();
        Self { tunnel, shutdown, registry, config, _folder: folder }
    }

    /// Stops the endpoint and starts it again with the same identity at the same addresses.
    pub(crate) async fn restart(mut self) -> Self {
        self.config.listen = self.direct_addresses(2).await.iter().map(|address| address.parse().unwrap()).collect();
        let folder = self._folder.take();
        self.stop().await;
        // The sockets are free once the last QUIC connection has said its goodbye.
        let free = async {
            for address in &self.config.listen {
                let port: u16 = address.to_string().split('/').nth(4).unwrap().parse().unwrap();
                while UdpSocket::bind(("127.0.0.1", port)).await.is_err() {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        };
        within("the sockets to be free", free).await;
        Self::start_with(self.config, folder)
    }

    pub(crate) async fn stop(&self) {
        self.shutdown.drain(Duration::from_millis(100)).await;
    }

    /// What the node would publish, once it listens at `count` direct addresses.
    pub(crate) async fn peer(&self, count: usize) -> TunnelPeer {
        TunnelPeer {
            node: self.config.node.clone(),
            component: self.config.component.clone(),
            peer_id: self.tunnel.peer_id().to_string(),
            addresses: self.direct_addresses(count).await,
            relay: self.config.relay_server,
        }
    }

    async fn direct_addresses(&self, count: usize) -> Vec<String> {
        let direct = |all: &[String]| -> Vec<String> {
            all.iter().filter(|address| !address.contains("p2p-circuit")).cloned().collect()
        };
        let mut addresses = self.tunnel.addresses();
        let all = within("listening", addresses.wait_for(|all| direct(all).len() >= count)).await.unwrap();
        direct(&all)
    }

    /// Waits until a relay holds a place, and gives the circuit addresses.
    pub(crate) async fn circuits(&self) -> Vec<String> {
        let mut addresses = self.tunnel.addresses();
        let all =
            within("a place with a relay", addresses.wait_for(|all| all.iter().any(|a| a.contains("p2p-circuit"))))
                .await
                .unwrap();
        all.iter().filter(|address| address.contains("p2p-circuit")).cloned().collect()
    }

    /// The value of a metric line, 0 if it isn't there.
    pub(crate) fn metric(&self, line: &str) -> u64 {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry.read()).unwrap();
        text.lines().find_map(|found| found.strip_prefix(line)?.trim().parse().ok()).unwrap_or(0)
    }
}

/// The only port of a Service.
pub(crate) fn service(name: &str) -> StreamTarget {
    StreamTarget::Service { namespace: "default".into(), service: name.into(), port_name: String::new() }
}

/// A header for an endpoint.
pub(crate) fn header(protocol: Carried, endpoint: SocketAddr) -> StreamHeader {
    StreamHeader { target: service("web"), protocol, endpoint, source: "test".into() }
}

/// Fails the test when `what` takes too long.
pub(crate) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(DEADLINE, future).await {
        Ok(value) => value,
        Err(_) => panic!("{what}: not within {DEADLINE:?}"),
    }
}

/// A TCP server that sends back what it gets.
pub(crate) async fn echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut connection, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut reader, mut writer) = connection.split();
                let _ = tokio::io::copy(&mut reader, &mut writer).await;
            });
        }
    });
    address
}

/// A TCP server that reads all, and then answers with the number of bytes and closes.
pub(crate) async fn counter() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut connection, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut total = 0u64;
                let mut buffer = vec![0; 64 * 1024];
                while let Ok(read @ 1..) = connection.read(&mut buffer).await {
                    total += read as u64;
                }
                let _ = connection.write_all(total.to_string().as_bytes()).await;
            });
        }
    });
    address
}

/// A TCP server that sends without an end.
pub(crate) async fn flood() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut connection, _)) = listener.accept().await {
            tokio::spawn(async move { while connection.write_all(&[7; 64 * 1024]).await.is_ok() {} });
        }
    });
    address
}

/// A UDP server that sends back what it gets.
pub(crate) async fn udp_echo() -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    tokio::spawn(async move {
        let mut buffer = vec![0; 65536];
        while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
            let _ = socket.send_to(&buffer[..length], from).await;
        }
    });
    address
}

/// Sends `text` through a new stream to an echo server and checks the answer; returns the path's label.
pub(crate) async fn round_trip(from: &Tunnel, node: &str, endpoint: SocketAddr, text: &str) -> &'static str {
    let mut stream = within("open", from.open(node, &header(Carried::Tcp, endpoint))).await.unwrap();
    let label = stream.path().label();
    stream.write_all(text.as_bytes()).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = String::new();
    within("the answer", stream.read_to_string(&mut answer)).await.unwrap();
    assert_eq!(answer, text);
    label
}
