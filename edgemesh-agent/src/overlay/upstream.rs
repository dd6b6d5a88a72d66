//! From a Service port to a connected endpoint: the choice, and what to do when the chosen one doesn't answer.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant as Moment},
};

use edgemesh_mesh::{
    Call, Catalog, CatalogStore, IpFamily, Reach,
    choice::PassedOver,
    cidr::Cidr,
    health::{EndpointKey, Health},
    l4::{
        proxy_protocol,
        udp::{DatagramSink, DatagramSource, FlowEnd, FlowEnded, socket},
    },
    model::{Endpoint, Protocol, Service, ServicePort},
};
use edgemesh_tunnel::{
    Carried, DatagramReceiver, DatagramSender, Path, RefusalReason, StreamHeader, StreamTarget, Tunnel, TunnelError,
    TunnelStream,
};
use futures::future::BoxFuture;
use parking_lot::Mutex;
use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpStream, UdpSocket},
    sync::watch,
    time::{Instant, timeout, timeout_at},
};

use super::{
    Standpoint, affinity::Affinity, called::Called, choices::Choices, keepalive::Keepalive, metrics::ProxiedMetrics,
};
use crate::{datapath::host, node_local::ServicePortName};

/// Time for one endpoint that is dialled directly; the tunnel has its own deadline.
const DIAL_DEADLINE: Duration = Duration::from_secs(5);
/// Time for all attempts of one connection together.
const OVERALL_DEADLINE: Duration = Duration::from_secs(15);
/// Endpoints that are tried for one connection.
const MAX_ATTEMPTS: usize = 4;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum UpstreamError {
    /// The Service or its port is gone.
    #[error("the Service port is gone")]
    NoService,
    /// It has no endpoint that may be used.
    #[error("it has no usable endpoint")]
    NoEndpoint,
    /// No node of another network has the address.
    #[error("no node of another network has a pod at that address")]
    NoNode,
    /// Neither a pod of this node nor a process of this host calls.
    #[error("the caller is not on this node")]
    Stranger,
    /// None of those tried answered.
    #[error("no endpoint answers: {0}")]
    Unreachable(String),
}

impl UpstreamError {
    pub(super) fn label(&self) -> &'static str {
        match self {
            Self::NoService => "no_service",
            Self::NoEndpoint => "no_endpoint",
            Self::NoNode => "no_node",
            Self::Stranger => "stranger",
            Self::Unreachable(_) => "unreachable",
        }
    }
}

/// A connected endpoint.
pub(super) enum Upstream<Direct> {
    Direct(Direct),
    Tunnel(Box<TunnelStream>),
}

/// Where a connection or flow goes.
#[derive(Debug, Clone)]
pub(super) struct Route {
    /// The endpoint.
    pub(super) endpoint: SocketAddr,
    /// Its node, if it is known.
    pub(super) node: Option<Arc<str>>,
    /// `direct`, `tunnel` or `relay`.
    pub(super) path: &'static str,
}

impl<Direct> Upstream<Direct> {
    /// The `path` label of metrics.
    fn path(&self) -> &'static str {
        match self {
            Self::Direct(_) => "direct",
            Self::Tunnel(stream) => path_of(stream),
        }
    }
}

fn path_of(stream: &TunnelStream) -> &'static str {
    match stream.path() {
        Path::Relayed { .. } => "relay",
        _ => "tunnel",
    }
}

/// How an endpoint of a Service port stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// It gets new clients.
    Ready,
    /// It serves those that it has.
    Draining,
    /// It serves nobody.
    Gone,
}

/// A failed attempt, and what it says about.
struct Failure {
    cause: String,
    blame: Blame,
}

/// Whether a connection failed for what this host lacks, whatever the endpoint does.
pub(crate) fn is_of_this_host(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::EMFILE
                | libc::ENFILE
                | libc::ENOMEM
                | libc::ENOBUFS
                | libc::EADDRNOTAVAIL
                | libc::EACCES
                | libc::EPERM
        )
    )
}

/// How soon a change of the host's addresses is seen: a stranger can ask for them with each datagram.
const HOST_ADDRESSES: Duration = Duration::from_secs(1);

/// What could not be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Blame {
    /// That endpoint.
    Endpoint,
    /// The whole node that it is on.
    Node,
    /// Nobody, but nothing more gets to the node: it is this process that may open no more streams to it.
    Way,
    /// Neither: this process lacks something, or the attempt was cut short.
    Nothing,
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self { cause: error.to_string(), blame: if is_of_this_host(&error) { Blame::Nothing } else { Blame::Endpoint } }
    }
}

impl From<TunnelError> for Failure {
    fn from(error: TunnelError) -> Self {
        let blame = match &error {
            TunnelError::Refused { refusal, .. } => match refusal.reason {
                RefusalReason::NotHere | RefusalReason::DialFailed => Blame::Endpoint,
                RefusalReason::Busy | RefusalReason::NotServing => Blame::Node,
                RefusalReason::Malformed => Blame::Nothing,
            },
            TunnelError::UnknownNode { .. }
            | TunnelError::Unreachable { .. }
            | TunnelError::Timeout { .. }
            | TunnelError::Lost { .. } => Blame::Node,
            TunnelError::Busy { .. } => Blame::Way,
            TunnelError::HeaderTooLong(_) | TunnelError::Stopped => Blame::Nothing,
        };
        Self { cause: error.to_string(), blame }
    }
}

/// What a connection tries next.
struct Chosen {
    endpoint: Arc<Endpoint>,
    reach: Reach,
    /// Those that come first for this node are all passed over.
    spilled: bool,
    /// What is to be said to it before the bytes of a TCP connection, if anything.
    announcement: Option<Vec<u8>>,
}

/// Chooses and connects.
#[derive(Debug)]
pub(super) struct Dialer {
    standpoint: Standpoint,
    /// Addresses that no interface has, but from which processes of this host may call.
    node_local: Option<Cidr>,
    catalog: Arc<CatalogStore>,
    tunnel: Tunnel,
    health: Arc<Health>,
    metrics: ProxiedMetrics,
    keepalive: Option<Keepalive>,
    affinity: Affinity,
    choices: Choices,
    host_addresses: Mutex<host::KnownAddresses>,
}

impl Dialer {
    pub(super) fn new(
        standpoint: Standpoint,
        node_local: Option<Cidr>,
        catalog: Arc<CatalogStore>,
        tunnel: Tunnel,
        health: Arc<Health>,
        metrics: ProxiedMetrics,
        keepalive: Option<Keepalive>,
    ) -> Self {
        Self {
            standpoint,
            node_local,
            catalog,
            tunnel,
            health,
            metrics,
            keepalive,
            affinity: Affinity::default(),
            choices: Choices::default(),
            host_addresses: Mutex::default(),
        }
    }

    /// A TCP connection to an endpoint of the Service port, or to the pod.
    pub(super) async fn tcp(
        &self,
        called: &Called,
        client: SocketAddr,
    ) -> Result<(Upstream<TcpStream>, Route), UpstreamError> {
        match called {
            Called::Service(port, family) => {
                let (upstream, route) = self.first_that_answers(port, *family, client, dial).await?;
                // Of its own pods' ends this host's kernel tells.
                let elsewhere = route.node.as_ref() != Some(&self.standpoint.node);
                if let (Upstream::Direct(connection), Some(keepalive), true) = (&upstream, self.keepalive, elsewhere) {
                    keepalive.probe(connection);
                }
                Ok((upstream, route))
            }
            Called::Pod(address, _) => {
                let (stream, route) = self.pod(*address, Carried::Tcp, client).await?;
                Ok((Upstream::Tunnel(stream), route))
            }
        }
    }

    /// Whether a client may call this at all.
    pub(super) fn admits(&self, called: &Called, client: SocketAddr) -> bool {
        // Whoever is beside this host could make it a gateway into other networks.
        matches!(called, Called::Service(..)) || self.is_on_node(&self.catalog.snapshot(), client.ip())
    }

    /// Whether an address belongs to a pod of this node or to this host, whose processes call from its addresses.
    fn is_on_node(&self, catalog: &Catalog, ip: IpAddr) -> bool {
        let ranges = catalog.node(&self.standpoint.node).into_iter().flat_map(|node| &node.pod_cidrs);
        let mut ranges = ranges.filter_map(|range| Cidr::parse(range)).chain(self.node_local);
        if ranges.any(|range| range.contains(ip)) {
            return true;
        }
        self.host_addresses.lock().within(HOST_ADDRESSES).contains(&ip)
    }

    /// A client as endpoints and other nodes are told of it. A process of this host calls a node-local address from that address
    /// itself, which is the same one on each node: it is told of by the node's own address.
    fn as_told(&self, client: SocketAddr) -> SocketAddr {
        if !self.node_local.is_some_and(|range| range.contains(client.ip())) {
            return client;
        }
        let catalog = self.catalog.snapshot();
        let mut own = catalog.node(&self.standpoint.node).into_iter().flat_map(|node| &node.addresses);
        let own = own.find(|own| own.is_ipv4() == client.is_ipv4());
        own.map_or(client, |own| SocketAddr::new(*own, client.port()))
    }

    /// A stream to a pod of another network.
    async fn pod(
        &self,
        address: SocketAddr,
        protocol: Carried,
        client: SocketAddr,
    ) -> Result<(Box<TunnelStream>, Route), UpstreamError> {
        let node = {
            let catalog = self.catalog.snapshot();
            let viewpoint = self.standpoint.viewpoint(&catalog);
            // Whoever is beside this host could make it a gateway into other networks.
            if !self.is_on_node(&catalog, client.ip()) {
                return Err(UpstreamError::Stranger);
            }
            let node = catalog.node_of_address(address.ip());
            node.filter(|node| node.network != viewpoint.network && node.name != viewpoint.node)
                .map(|node| node.name.clone())
                .ok_or(UpstreamError::NoNode)?
        };
        let source = self.as_told(client).to_string();
        let header = StreamHeader { target: StreamTarget::Pod, protocol, endpoint: address, source };
        let stream = self.tunnel.open(&node, &header).await;
        let stream = Box::new(stream.map_err(|error| UpstreamError::Unreachable(error.to_string()))?);
        let path = path_of(&stream);
        Ok((stream, Route { endpoint: address, node: Some(node), path }))
    }

    /// The remote end of a UDP flow.
    pub(super) async fn udp(&self, called: &Called, client: SocketAddr) -> Result<(FlowEnd, Route), UpstreamError> {
        let (port, family) = match called {
            Called::Service(port, family) => (port, *family),
            Called::Pod(address, _) => {
                let (stream, route) = self.pod(*address, Carried::Udp, client).await?;
                return Ok((tunnel_end(*stream), route));
            }
        };
        let (upstream, route) =
            self.first_that_answers(port, family, client, |address, _| connected_socket(address)).await?;
        Ok(match upstream {
            Upstream::Direct(socket) => (socket::flow_end(socket), route),
            Upstream::Tunnel(stream) => (tunnel_end(*stream), route),
        })
    }

    /// Hears how a UDP flow ended that went to its endpoint directly: opening it has said nothing about the endpoint.
    pub(super) fn flow_ended(&self, called: &Called, route: &Route, began: Moment, end: &FlowEnded, replied: bool) {
        let Called::Service(port, _) = called else { return };
        if route.path != "direct" {
            return;
        }
        let key = EndpointKey { address: route.endpoint, protocol: port.protocol };
        match end {
            _ if replied => drop(self.health.reached(key)),
            FlowEnded::Failed(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                self.eject(port, key, began, &error.to_string());
            }
            _ => {}
        }
    }

    async fn first_that_answers<Direct, Dialling: Future<Output = io::Result<Direct>>>(
        &self,
        port: &ServicePortName,
        family: IpFamily,
        client: SocketAddr,
        dial: impl Fn(SocketAddr, Option<Vec<u8>>) -> Dialling,
    ) -> Result<(Upstream<Direct>, Route), UpstreamError> {
        let deadline = Instant::now() + OVERALL_DEADLINE;
        let client = self.as_told(client);
        let mut failures = Vec::new();
        let mut tried = PassedOver::new();
        // With others that are no better than one that failed.
        let mut avoided = PassedOver::new();
        while failures.len() < MAX_ATTEMPTS {
            let choose = |passed_over| self.choose(port, family, client, passed_over);
            let Chosen { endpoint, reach, spilled, announcement } = match choose(&avoided).or_else(|_| choose(&tried)) {
                Ok(chosen) => chosen,
                Err(error) if failures.is_empty() => return Err(error),
                Err(_) => break,
            };
            let key = EndpointKey::of(&endpoint, port.protocol);
            let began = Moment::now();
            self.health.trying(key, began);
            let attempt = async {
                match &reach {
                    Reach::Local | Reach::Direct => Ok(dial(key.address, announcement).await.map(Upstream::Direct)?),
                    Reach::Tunnel { node } => {
                        let stream = self.tunnel.open(node, &header(port, key.address, client)).await?;
                        Ok(Upstream::Tunnel(Box::new(stream)))
                    }
                }
            };
            let failure: Failure = match timeout_at(deadline, attempt).await {
                Ok(Ok(upstream)) => {
                    // A UDP socket is connected without a word to the other side.
                    let answered = port.protocol == Protocol::Tcp || matches!(upstream, Upstream::Tunnel(_));
                    if answered && self.health.reached(key) {
                        tracing::info!(%port, endpoint = %key.address, "an endpoint is reached again");
                    }
                    if spilled {
                        self.metrics.spilled();
                    }
                    let node = match reach {
                        Reach::Tunnel { node } => Some(node),
                        Reach::Local => Some(self.standpoint.node.clone()),
                        Reach::Direct => endpoint.node.clone(),
                    };
                    let path = upstream.path();
                    return Ok((upstream, Route { endpoint: key.address, node, path }));
                }
                Ok(Err(failure)) => failure,
                Err(_) => {
                    failures.push(format!("{}: no time left", key.address));
                    break;
                }
            };
            tried.insert(key.address);
            avoided.insert(key.address);
            let blamed = matches!(failure.blame, Blame::Endpoint | Blame::Node);
            if blamed {
                self.eject(port, key, began, &failure.cause);
            }
            if matches!(failure.blame, Blame::Node | Blame::Way) {
                // The others there are no better: those of other nodes first.
                for address in self.reached_by(port, &reach) {
                    if blamed {
                        self.eject(port, EndpointKey { address, protocol: port.protocol }, began, &failure.cause);
                    }
                    avoided.insert(address);
                }
            }
            failures.push(format!("{}: {}", key.address, failure.cause));
        }
        Err(UpstreamError::Unreachable(failures.join("; ")))
    }

    fn eject(&self, port: &ServicePortName, endpoint: EndpointKey, began: Moment, cause: &str) {
        if let Some(time) = self.health.failed(endpoint, began, Moment::now()) {
            self.metrics.ejection();
            tracing::info!(%port, endpoint = %endpoint.address, seconds = time.as_secs_f32(), cause, "an endpoint is passed over");
        }
    }

    /// How an endpoint stands to which a flow leads.
    pub(super) fn standing(&self, called: &Called, endpoint: SocketAddr) -> Standing {
        let catalog = self.catalog.peek();
        let Called::Service(name, _) = called else { return Standing::Ready };
        let Some(service) = catalog.service_named(&name.service) else { return Standing::Gone };
        let port = service.port_named(&name.port, name.protocol);
        match port.and_then(|port| port.endpoint(endpoint)) {
            Some(endpoint) if endpoint.ready || service.publish_not_ready => Standing::Ready,
            Some(endpoint) if endpoint.serving => Standing::Draining,
            _ => Standing::Gone,
        }
    }

    /// Whether a Service port is there without an endpoint that it had.
    pub(super) fn is_deleted(&self, called: &Called, endpoint: SocketAddr) -> bool {
        let Called::Service(name, _) = called else { return false };
        let catalog = self.catalog.peek();
        let service = catalog.service_named(&name.service);
        let port = service.and_then(|service| service.port_named(&name.port, name.protocol));
        port.is_some_and(|port| port.endpoint(endpoint).is_none())
    }

    /// Changes of what the endpoints are.
    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.catalog.subscribe()
    }

    /// An endpoint for a connection that is to keep away from some.
    fn choose(
        &self,
        name: &ServicePortName,
        family: IpFamily,
        client: SocketAddr,
        passed_over: &PassedOver,
    ) -> Result<Chosen, UpstreamError> {
        let catalog = self.catalog.snapshot();
        let service = catalog.service_named(&name.service).ok_or(UpstreamError::NoService)?;
        let port = service.port_named(&name.port, name.protocol).ok_or(UpstreamError::NoService)?;
        let viewpoint = self.standpoint.viewpoint(&catalog);
        // The datapath has decided who comes here: it refuses calls to cluster addresses that must stay on the node. A node-local
        // address stands for Service addresses of its family.
        let call = Call { family: Some(family), external: true, ..Call::default() };
        let now = Moment::now();
        let all = || self.choices.of(&catalog, name, family, || viewpoint.candidates_for(&catalog, port, call));
        let candidates = if passed_over.is_empty() && self.health.is_clear() {
            all()
        } else {
            Arc::new(self.health.candidates(&viewpoint, &catalog, port, call, passed_over, now))
        };
        let chosen = match service.client_ip_affinity {
            Some(timeout) => self.affinity.endpoint(client.ip(), name, timeout, now, &all(), &candidates),
            None => candidates.pick(rand::random()).cloned(),
        };
        let endpoint = chosen.ok_or(UpstreamError::NoEndpoint)?;
        let reach = viewpoint.reach(&catalog, &endpoint);
        let announcement = service.proxy_protocol.then(|| announcement(service, port, Some(client)));
        Ok(Chosen { endpoint, reach, spilled: candidates.spilled, announcement })
    }

    /// The endpoints of a Service port on the node that is reached in this way.
    fn reached_by(&self, name: &ServicePortName, reach: &Reach) -> Vec<SocketAddr> {
        let catalog = self.catalog.snapshot();
        let viewpoint = self.standpoint.viewpoint(&catalog);
        let service = catalog.service_named(&name.service);
        let port = service.and_then(|service| service.port_named(&name.port, name.protocol));
        let endpoints = port.into_iter().flat_map(|port| &port.endpoints);
        let there = endpoints.filter(|endpoint| viewpoint.reach(&catalog, endpoint) == *reach);
        there.map(|endpoint| SocketAddr::new(endpoint.address, endpoint.port)).collect()
    }
}

fn header(port: &ServicePortName, endpoint: SocketAddr, client: SocketAddr) -> StreamHeader {
    StreamHeader {
        target: StreamTarget::Service {
            namespace: port.service.namespace.to_string(),
            service: port.service.name.to_string(),
            port_name: port.port.to_string(),
        },
        protocol: match port.protocol {
            Protocol::Tcp => Carried::Tcp,
            Protocol::Udp => Carried::Udp,
        },
        endpoint,
        source: client.to_string(),
    }
}

/// A TCP connection to an endpoint on this node or in its network, on which `first` has been sent.
pub(super) async fn dial(address: SocketAddr, first: Option<Vec<u8>>) -> io::Result<TcpStream> {
    let dialling = async {
        let mut connection = TcpStream::connect(address).await?;
        connection.set_nodelay(true)?;
        if let Some(first) = first {
            connection.write_all(&first).await?;
        }
        Ok(connection)
    };
    timeout(DIAL_DEADLINE, dialling).await?
}

/// The header of the PROXY protocol for a connection to a Service port; of no client in particular where it isn't known.
pub(super) fn announcement(service: &Service, port: &ServicePort, client: Option<SocketAddr>) -> Vec<u8> {
    let Some(client) = client else { return proxy_protocol::local() };
    // What the client called: the Service's address of its own family.
    let called = service.cluster_ips.iter().find(|ip| ip.is_ipv4() == client.is_ipv4());
    match called {
        Some(ip) => proxy_protocol::proxied(client, SocketAddr::new(*ip, port.port)),
        None => {
            let nothing: IpAddr =
                if client.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
            proxy_protocol::proxied(client, SocketAddr::new(nothing, port.port))
        }
    }
}

/// A UDP socket that speaks with one address only.
pub(super) async fn connected_socket(address: SocketAddr) -> io::Result<UdpSocket> {
    let any: IpAddr = if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(address).await?;
    Ok(socket)
}

/// A tunnel stream as one end of a UDP flow.
pub(super) fn tunnel_end(stream: TunnelStream) -> FlowEnd {
    let (sender, receiver) = stream.into_datagrams();
    FlowEnd { sink: Box::new(ToTunnel(sender)), source: Box::new(FromTunnel(receiver)) }
}

struct ToTunnel(DatagramSender);

impl DatagramSink for ToTunnel {
    fn send<'a>(&'a mut self, datagram: &'a [u8]) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(self.0.send(datagram))
    }
}

struct FromTunnel(DatagramReceiver);

impl DatagramSource for FromTunnel {
    fn recv(&mut self) -> BoxFuture<'_, io::Result<Option<bytes::Bytes>>> {
        Box::pin(self.0.recv())
    }
}
