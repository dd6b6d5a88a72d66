//! The listeners: UDP with one socket a thread, TCP with pipelining (RFC 7766).

use std::{
    io,
    net::{SocketAddr, TcpListener as StdTcpListener},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use edgemesh_mesh::CatalogStore;
use edgemesh_telemetry::Shutdown;
use parking_lot::RwLock;
use prometheus_client::registry::Registry;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc},
    time::timeout,
};

use super::{
    address::{NoUpstream, UpstreamAddress},
    asker::Asker,
    cache::Lifetimes,
    completion::Completion,
    dot,
    forward::{self, Forwarder},
    limits::Limits,
    metrics::Metrics,
    reply::Transport,
    resolver::{Client, Resolver, Step},
    udp::{self, MAX_QUERY},
    upstreams::{Origin, Upstreams, Wanted},
    wire::Name,
    zone::Zone,
};
use crate::config::DnsConfig;

/// TCP connections at one time, and of one client.
const MAX_CONNECTIONS: usize = 256;
const MAX_CONNECTIONS_EACH: usize = 64;
/// Queries of one TCP connection at one time.
const MAX_PIPELINED: usize = 32;
/// A TCP connection without a query for this long is closed; so is one that doesn't take its answers.
const IDLE: Duration = Duration::from_secs(10);
/// Cores for each thread that serves UDP at an address. One answers 100,000 queries a second, more than a small node's pods ask; shared
/// between several, which sleep and wake the more often for it, each costs more.
const CORES_EACH: usize = 4;
/// Longest wait for room in a UDP socket's queue.
const MAX_SEND: Duration = Duration::from_secs(1);
/// Longest that answers past their lifetime are used (RFC 8767 suggests one to three days).
const STALE: Duration = Duration::from_secs(24 * 3600);
/// Caps on what upstreams say.
const MAX_POSITIVE: Duration = Duration::from_secs(3600);
const MAX_NEGATIVE: Duration = Duration::from_secs(60);

/// Why DNS can't be served.
#[derive(Debug, thiserror::Error)]
pub enum DnsError {
    /// The address can't be listened on.
    #[error("DNS can't listen on {address}: {error}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The system's reason.
        error: io::Error,
    },
    /// The cluster domain is no DNS name.
    #[error("clusterDomain {0:?} is no DNS name")]
    ClusterDomain(String),
    /// An upstream can't be read.
    #[error(transparent)]
    Upstream(#[from] NoUpstream),
    /// A domain with upstreams of its own is no DNS name.
    #[error("{0:?} in zones is no DNS name")]
    Zone(String),
    /// The CA certificates for upstreams over TLS can't be used.
    #[error("tlsCa {path}: {error}")]
    TlsCa {
        /// The file.
        path: String,
        /// What is wrong with it.
        error: io::Error,
    },
}

/// A DNS server with its sockets bound, not yet serving.
pub struct Server {
    listeners: Vec<Listener>,
    zone: Name,
    catalog: Arc<CatalogStore>,
    upstreams: Wanted,
    config: DnsConfig,
    metrics: Arc<Metrics>,
}

/// The sockets of one address.
struct Listener {
    address: SocketAddr,
    udp: Vec<Socket>,
    tcp: TcpListener,
}

impl Server {
    /// Binds UDP and TCP to addresses; port 0 takes a free one. Must be called in a tokio runtime.
    ///
    /// # Errors
    /// When an address can't be listened on, a domain is no name, or the CA certificates can't be used.
    pub fn bind(
        addresses: &[SocketAddr],
        catalog: Arc<CatalogStore>,
        config: &DnsConfig,
        registry: &RwLock<Registry>,
    ) -> Result<Self, DnsError> {
        let zone = Name::from_text(&config.cluster_domain)
            .filter(|zone| zone.wire().len() > 1)
            .ok_or_else(|| DnsError::ClusterDomain(config.cluster_domain.clone()))?;
        let bind = |&address| listen(address).map_err(|error| DnsError::Listen { address, error });
        let listeners = addresses.iter().map(bind).collect::<Result<Vec<_>, DnsError>>()?;
        let upstreams = wanted(config, listeners.iter().map(|listener| listener.address).collect())?;
        let metrics = Arc::new(Metrics::new(&mut registry.write()));
        Ok(Self { listeners, zone, catalog, upstreams, config: config.clone(), metrics })
    }

    /// Where it listens, UDP and TCP, in the order in which it was asked for.
    pub fn addresses(&self) -> impl Iterator<Item = SocketAddr> {
        self.listeners.iter().map(|listener| listener.address)
    }

    /// Answers queries until shutdown. What is returned asks without a socket.
    ///
    /// # Errors
    /// When a thread can't be started.
    pub fn serve(self, shutdown: &Shutdown) -> io::Result<Asker> {
        let lifetimes = Lifetimes { positive: MAX_POSITIVE, negative: MAX_NEGATIVE, stale: STALE };
        let limits = forward::Limits {
            lifetimes,
            cache_entries: self.config.cache_entries,
            // Answers take 300 bytes on average with all that belongs to them.
            cache_bytes: self.config.cache_entries.saturating_mul(1024),
            flights: self.config.max_queries,
            prefetch: self.config.prefetch,
        };
        let metrics = self.metrics;
        let waiting = metrics.waiting.clone();
        let upstreams = Upstreams::start(self.upstreams, lifetimes, Arc::clone(&metrics), shutdown.clone());
        let forwarder = Forwarder::new(upstreams, limits, Arc::clone(&metrics), shutdown.clone());
        let own = self.listeners.iter().map(|listener| listener.address.ip()).collect();
        let zone = Zone::new(self.zone, own, self.config.ttl);
        let completion =
            self.config.search_path_completion.then(|| Completion::start(self.config.resolv_conf.clone(), shutdown));
        let resolver = Arc::new(Resolver { zone, catalog: self.catalog, completion, forwarder, metrics });
        let queries = Limits::new(self.config.max_queries, self.config.max_queries_per_client, waiting);
        let connections = Limits::new(MAX_CONNECTIONS, MAX_CONNECTIONS_EACH, resolver.metrics.connections.clone());
        for Listener { address, udp, tcp } in self.listeners {
            for socket in udp {
                udp::serve(socket, Arc::clone(&resolver), Arc::clone(&queries), shutdown)?;
            }
            let (resolver, queries, stop) = (Arc::clone(&resolver), Arc::clone(&queries), shutdown.clone());
            let connections = Arc::clone(&connections);
            shutdown.spawn(async move { serve_tcp(tcp, resolver, connections, queries, stop).await });
            tracing::info!(%address, "DNS is served");
        }
        Ok(Asker::new(resolver, self.config.resolv_conf))
    }
}

/// The upstreams that the settings ask for.
fn wanted(config: &DnsConfig, own: Vec<SocketAddr>) -> Result<Wanted, DnsError> {
    let read = |texts: &[String]| texts.iter().map(|text| text.parse()).collect::<Result<Vec<UpstreamAddress>, _>>();
    let listed = read(&config.upstreams)?;
    let domain = |(name, upstreams): (&String, &Vec<String>)| {
        let domain = Name::from_text(name).ok_or_else(|| DnsError::Zone(name.clone()))?;
        Ok((domain, read(upstreams)?))
    };
    let domains = config.zones.iter().map(domain).collect::<Result<Vec<_>, DnsError>>()?;
    let mut all = listed.iter().chain(domains.iter().flat_map(|(_, upstreams)| upstreams));
    let over_tls = all.any(|upstream| upstream.tls.is_some());
    let default =
        if listed.is_empty() { Origin::ResolvConf(config.resolv_conf.clone()) } else { Origin::Listed(listed) };
    let ca_problem = |error| DnsError::TlsCa { path: config.tls_ca.display().to_string(), error };
    let tls = over_tls.then(|| dot::connector(&config.tls_ca)).transpose().map_err(ca_problem)?;
    Ok(Wanted { default, domains, own, tls })
}

fn listen(address: SocketAddr) -> io::Result<Listener> {
    let threads = std::thread::available_parallelism().map_or(1, |cores| (cores.get() / CORES_EACH).clamp(1, 4));
    let mut tries = 0;
    loop {
        tries += 1;
        let first = udp_socket(address)?;
        let bound = first.local_addr()?.as_socket().ok_or(io::ErrorKind::AddrNotAvailable)?;
        let tcp = match tcp_socket(bound) {
            Ok(tcp) => tcp,
            // A free UDP port may be taken for TCP: try another.
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && address.port() == 0 && tries < 16 => continue,
            Err(error) => return Err(error),
        };
        let mut udp = vec![first];
        while udp.len() < threads {
            udp.push(udp_socket(bound)?);
        }
        return Ok(Listener { address: bound, udp, tcp: TcpListener::from_std(tcp)? });
    }
}

fn socket(address: SocketAddr, kind: Type, protocol: Protocol) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), kind, Some(protocol))?;
    if address.is_ipv6() {
        // No interface has a node-local address: it is a route's, which IPv6 doesn't count as one of the host's.
        socket.set_freebind_v6(true)?;
    }
    Ok(socket)
}

fn udp_socket(address: SocketAddr) -> io::Result<Socket> {
    let socket = socket(address, Type::DGRAM, Protocol::UDP)?;
    // The kernel spreads clients over the sockets, so that each thread has its own queue.
    socket.set_reuse_port(true)?;
    socket.set_recv_buffer_size(1 << 20)?;
    socket.set_write_timeout(Some(MAX_SEND))?;
    socket.bind(&address.into())?;
    Ok(socket)
}

fn tcp_socket(address: SocketAddr) -> io::Result<StdTcpListener> {
    let socket = socket(address, Type::STREAM, Protocol::TCP)?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(1024)?;
    Ok(socket.into())
}

async fn serve_tcp(
    listener: TcpListener,
    resolver: Arc<Resolver>,
    connections: Arc<Limits>,
    queries: Arc<Limits>,
    shutdown: Shutdown,
) {
    while let Some(accepted) = shutdown.stopping().run_until_cancelled(listener.accept()).await {
        match accepted {
            Ok((stream, peer)) => match connections.enter(peer.ip()) {
                Ok(place) => {
                    let (resolver, queries, stop) = (Arc::clone(&resolver), Arc::clone(&queries), shutdown.clone());
                    shutdown.spawn(async move {
                        let _place = place;
                        let client = Client { address: peer.ip(), transport: Transport::Tcp };
                        serve_connection(stream, client, resolver, queries, stop).await;
                    });
                }
                Err(_) => drop(resolver.metrics.limited.connections.inc()),
            },
            Err(error) => {
                tracing::warn!(%error, "DNS connection not accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve_connection(
    stream: TcpStream,
    client: Client,
    resolver: Arc<Resolver>,
    queries: Arc<Limits>,
    shutdown: Shutdown,
) {
    let (mut incoming, mut outgoing) = stream.into_split();
    let (answers, mut waiting) = mpsc::channel::<Vec<u8>>(MAX_PIPELINED);
    // It drops its end of the channel when it is done; the answers still under way are written.
    let reading = async move {
        let pipelined = Arc::new(Semaphore::new(MAX_PIPELINED));
        loop {
            let Ok(slot) = Arc::clone(&pipelined).acquire_owned().await else { return };
            let read = async {
                let length = usize::from(incoming.read_u16().await?);
                let mut message = vec![0; length.min(MAX_QUERY)];
                incoming.read_exact(&mut message).await?;
                // What is too long to be a query ends the connection: there is no way to go on.
                io::Result::Ok((length <= MAX_QUERY).then_some(message))
            };
            let message = match shutdown.stopping().run_until_cancelled(timeout(IDLE, read)).await {
                Some(Ok(Ok(Some(message)))) => message,
                _ => return,
            };
            let mut out = Vec::new();
            let answered = match resolver.at_once(&message, client, &mut out) {
                Step::Done => true,
                Step::Ignore => return,
                Step::Later => match queries.enter(client.address) {
                    Err(limit) => resolver.overloaded(&message, Transport::Tcp, limit, &mut out),
                    Ok(place) => {
                        let (resolver, answers) = (Arc::clone(&resolver), answers.clone());
                        shutdown.spawn(async move {
                            let _held = (place, slot);
                            let mut out = Vec::new();
                            if resolver.later(&message, client, &mut out).await {
                                drop(answers.send(out).await);
                            }
                        });
                        continue;
                    }
                },
            };
            if answered && answers.send(out).await.is_err() {
                return;
            }
        }
    };
    let mut writing = pin!(async move {
        while let Some(answer) = waiting.recv().await {
            let framed = [&(answer.len() as u16).to_be_bytes(), &answer[..]].concat();
            if !matches!(timeout(IDLE, outgoing.write_all(&framed)).await, Ok(Ok(()))) {
                return;
            }
        }
    });
    tokio::select! {
        // A client that takes no answers isn't read from any more, and what is under way for it has nowhere to go.
        () = &mut writing => return,
        () = reading => {}
    }
    writing.await;
}
