//! Connections to endpoints: chosen by the mesh's rules, dialled directly or through the tunnel, kept and used again.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use edgemesh_mesh::{
    Call, CatalogStore,
    choice::{PassedOver, Reach, Viewpoint},
    health::{EndpointKey, Health, HealthSettings},
    model::{Endpoint, Protocol, ServiceName, ServicePort},
};
use edgemesh_tunnel::{Carried, StreamHeader, StreamTarget, Tunnel};
use http::{Request, Response};
use http_body_util::combinators::BoxBody;
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};

use crate::metrics::{ConnectLabels, Metrics};

/// Time for a direct connection to an endpoint.
const CONNECT_DEADLINE: Duration = Duration::from_secs(3);
/// Endpoints that are tried for one request.
const MAX_ATTEMPTS: usize = 3;
/// Unused connections that are kept for an endpoint.
const MAX_IDLE: usize = 64;
/// How long an unused connection is kept.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// The body of a request or an answer.
pub type Body = BoxBody<Bytes, hyper::Error>;

/// Why a request got no answer from a backend. Each has its own status code.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// The Service or its port doesn't exist.
    #[error("Service {namespace}/{name} has no port {port}", namespace = .0.namespace, name = .0.name, port = .1)]
    NoService(ServiceName, u16),
    /// No endpoint may be used.
    #[error("Service {namespace}/{name} has no endpoint", namespace = .0.namespace, name = .0.name)]
    NoEndpoint(ServiceName),
    /// No endpoint could be reached.
    #[error("no endpoint of {namespace}/{name} could be reached, the last: {cause}", namespace = .service.namespace, name = .service.name)]
    Unreachable {
        /// The Service.
        service: ServiceName,
        /// The last failure.
        cause: String,
    },
    /// The endpoint broke off.
    #[error("the endpoint broke off: {0}")]
    Broken(#[from] hyper::Error),
}

/// A kept connection.
#[derive(Debug)]
pub struct Connection {
    sender: http1::SendRequest<Body>,
    endpoint: SocketAddr,
    since: Instant,
}

/// All upstream connections.
#[derive(Debug)]
pub struct Upstreams {
    catalog: Arc<CatalogStore>,
    tunnel: Tunnel,
    node: String,
    idle: Mutex<HashMap<SocketAddr, Vec<Connection>>>,
    metrics: Arc<Metrics>,
    health: Health,
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl Upstreams {
    /// No connections yet.
    pub fn new(catalog: Arc<CatalogStore>, tunnel: Tunnel, node: String, metrics: Arc<Metrics>) -> Self {
        let health = Health::new(HealthSettings::default(), rand::random());
        Self { catalog, tunnel, node, idle: Mutex::default(), metrics, health }
    }

    /// Sends a request to an endpoint of a Service port and gives the head of its answer, and the connection, to be
    /// given back with [`Upstreams::keep`] when the answer's body was read.
    ///
    /// Another endpoint is tried while nothing of the request was sent.
    ///
    /// # Errors
    /// When there is no endpoint, none can be reached, or the one reached breaks off.
    pub async fn send(
        &self,
        service: &ServiceName,
        port: u16,
        mut request: Request<Body>,
        client: SocketAddr,
    ) -> Result<(Response<Incoming>, Connection), UpstreamError> {
        let catalog = self.catalog.snapshot();
        let found = catalog
            .service_named(service)
            .and_then(|s| s.ports.iter().find(|p| p.port == port && p.protocol == Protocol::Tcp).map(Arc::clone));
        let service_port = found.ok_or_else(|| UpstreamError::NoService(service.clone(), port))?;
        let viewpoint = Viewpoint::of(&catalog, &self.node);
        let (mut tried, mut cause) = (PassedOver::new(), String::new());
        while tried.len() < MAX_ATTEMPTS {
            let now = Instant::now();
            let candidates = self.health.candidates(&viewpoint, &catalog, &service_port, Call::default(), &tried, now);
            let Some(endpoint) = candidates.pick(rand::random()) else { break };
            let key = EndpointKey::of(endpoint, Protocol::Tcp);
            let address = key.address;
            tried.insert(address);
            if candidates.spilled {
                self.metrics.spilled.inc();
            }
            // A kept connection may have been closed by the other side in this moment: then nothing was sent yet.
            while let Some(mut connection) = self.take_idle(address) {
                match connection.sender.try_send_request(request).await {
                    Ok(response) => return Ok((response, connection)),
                    Err(mut error) => match error.take_message() {
                        Some(unsent) => request = unsent,
                        None => return Err(error.into_error().into()),
                    },
                }
            }
            let began = Instant::now();
            self.health.trying(key, began);
            let connected = self.connect(&viewpoint.reach(&catalog, endpoint), &service_port, endpoint, client).await;
            if connected.is_ok() {
                self.health.reached(key);
            } else if let Some(time) = self.health.failed(key, began, Instant::now()) {
                self.metrics.ejections.inc();
                tracing::info!(%address, seconds = time.as_secs_f32(), "an endpoint is passed over");
            }
            match connected {
                Err(error) => cause = format!("{address}: {error}"),
                Ok(mut connection) => match connection.sender.try_send_request(request).await {
                    Ok(response) => return Ok((response, connection)),
                    Err(mut error) => match error.take_message() {
                        Some(unsent) => {
                            request = unsent;
                            cause = format!("{address}: {}", error.into_error());
                        }
                        None => return Err(error.into_error().into()),
                    },
                },
            }
        }
        match tried.is_empty() {
            true => Err(UpstreamError::NoEndpoint(service.clone())),
            false => Err(UpstreamError::Unreachable { service: service.clone(), cause }),
        }
    }

    /// The endpoints that are passed over, and until when.
    pub fn debug_view(&self) -> serde_json::Value {
        self.health.debug_view(Instant::now())
    }

    /// Keeps a connection whose answer was read to the end.
    pub fn keep(&self, mut connection: Connection) {
        connection.since = Instant::now();
        let mut idle = self.idle.lock();
        let kept = idle.entry(connection.endpoint).or_default();
        if kept.len() < MAX_IDLE {
            kept.push(connection);
        }
    }

    /// Closes connections that were not used for long. To be called from time to time.
    pub fn close_unused(&self) {
        self.idle.lock().retain(|_, kept| {
            kept.retain(|connection| connection.since.elapsed() < IDLE_TIMEOUT && !connection.sender.is_closed());
            !kept.is_empty()
        });
    }

    fn take_idle(&self, endpoint: SocketAddr) -> Option<Connection> {
        let mut idle = self.idle.lock();
        let kept = idle.get_mut(&endpoint)?;
        while let Some(connection) = kept.pop() {
            if connection.sender.is_ready() {
                return Some(connection);
            }
        }
        None
    }

    async fn connect(
        &self,
        reach: &Reach,
        port: &ServicePort,
        endpoint: &Endpoint,
        client: SocketAddr,
    ) -> Result<Connection, String> {
        let address = SocketAddr::new(endpoint.address, endpoint.port);
        let (path, opened) = match reach {
            Reach::Local | Reach::Direct => ("direct", dial(address).await),
            Reach::Tunnel { node } => {
                let header = StreamHeader {
                    target: StreamTarget::Service {
                        namespace: port.service.namespace.to_string(),
                        service: port.service.name.to_string(),
                        port_name: port.name.to_string(),
                    },
                    protocol: Carried::Tcp,
                    endpoint: address,
                    source: client.to_string(),
                };
                let opened = self.tunnel.open(node, &header).await;
                let opened = opened.map(|stream| Box::new(stream) as Box<dyn Stream>);
                ("tunnel", opened.map_err(|error| (error.label(), error.to_string())))
            }
        };
        let result = opened.as_ref().map_or_else(|(label, _)| *label, |_| "ok");
        self.metrics.connects.get_or_create(&ConnectLabels { path, result }).inc();
        let stream = opened.map_err(|(_, error)| error)?;
        let handshake = http1::Builder::new().handshake(TokioIo::new(stream)).await;
        let (sender, connection) = handshake.map_err(|error| error.to_string())?;
        // It ends when the sender is dropped or the endpoint closes.
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%address, %error, "upstream connection ended");
            }
        });
        Ok(Connection { sender, endpoint: address, since: Instant::now() })
    }
}

async fn dial(address: SocketAddr) -> Result<Box<dyn Stream>, (&'static str, String)> {
    match tokio::time::timeout(CONNECT_DEADLINE, TcpStream::connect(address)).await {
        Err(_) => Err(("timeout", format!("no connection within {} s", CONNECT_DEADLINE.as_secs()))),
        Ok(Err(error)) => Err(("refused", error.to_string())),
        Ok(Ok(stream)) => {
            if let Err(error) = stream.set_nodelay(true) {
                tracing::debug!(%error, "TCP_NODELAY");
            }
            Ok(Box::new(stream))
        }
    }
}
