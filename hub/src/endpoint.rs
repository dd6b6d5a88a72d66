//! The nodes' port: `POST /v1/join`, and the link at `/v1/link` for those that show a node's certificate.

use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use edgemesh_link::transport::{self, Connection, LINK_PATH};
use edgemesh_telemetry::Shutdown;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::ServerConfig;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::timeout,
};
use tokio_rustls::TlsAcceptor;

use crate::{
    identity,
    join::{Joining, MAX_JOIN_BYTES},
    session::Sessions,
    watch::Complete,
};

/// Path of joining.
pub(crate) const JOIN_PATH: &str = "/v1/join";
/// How many connections may shake hands or talk HTTP at once; links that are up don't count.
const MAX_GREETINGS: usize = 512;
/// How long TLS may take.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);
/// How long a request's head may take.
const HEADER_DEADLINE: Duration = Duration::from_secs(10);
/// How long a request may take, head to answer.
const REQUEST_DEADLINE: Duration = Duration::from_secs(30);

/// The bound port.
pub(crate) struct Endpoint {
    listener: TcpListener,
    address: SocketAddr,
    tls: TlsAcceptor,
    context: Arc<Context>,
}

struct Context {
    joining: Joining,
    sessions: Sessions,
    complete: Complete,
    shutdown: Shutdown,
}

impl Endpoint {
    /// Takes over a bound listener.
    ///
    /// # Errors
    /// When the listener has no address.
    pub(crate) fn new(
        listener: TcpListener,
        tls: Arc<ServerConfig>,
        joining: Joining,
        sessions: Sessions,
        complete: Complete,
        shutdown: Shutdown,
    ) -> std::io::Result<Self> {
        let address = listener.local_addr()?;
        let context = Arc::new(Context { joining, sessions, complete, shutdown });
        Ok(Self { listener, address, tls: TlsAcceptor::from(tls), context })
    }

    /// Serves until the hub stops; sessions say goodbye by themselves.
    pub(crate) async fn serve(self) {
        tracing::info!(address = %self.address, "nodes may join and connect");
        let slots = Arc::new(Semaphore::new(MAX_GREETINGS));
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                () = self.context.shutdown.stopping().cancelled() => return,
            };
            let (stream, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "accept failed");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            // Over the limit, a newcomer is turned away rather than kept waiting: it will come again.
            let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else {
                tracing::warn!(%peer, "too many connections greet at once; one is turned away");
                continue;
            };
            let context = Arc::clone(&self.context);
            let tls = self.tls.clone();
            self.context.shutdown.spawn(async move {
                if let Err(error) = context.greet(stream, peer, tls).await {
                    tracing::debug!(%peer, error, "a connection to the nodes' port ended");
                }
                drop(slot);
            });
        }
    }
}

impl Context {
    async fn greet(self: Arc<Self>, stream: TcpStream, peer: SocketAddr, tls: TlsAcceptor) -> Result<(), String> {
        transport::tune(&stream).map_err(|error| error.to_string())?;
        let stream = timeout(HANDSHAKE_DEADLINE, tls.accept(stream))
            .await
            .map_err(|_| "TLS took too long".to_owned())?
            .map_err(|error| format!("TLS: {error}"))?;
        let certificates = stream.get_ref().1.peer_certificates();
        let node = certificates.and_then(<[_]>::first).map(identity::node_of).transpose();
        let node = node.map_err(str::to_owned);
        let service = hyper::service::service_fn(move |request| {
            let context = Arc::clone(&self);
            let node = node.clone();
            async move {
                let answer = timeout(REQUEST_DEADLINE, Box::pin(context.answer(request, node, peer))).await;
                Ok::<_, Infallible>(
                    answer
                        .unwrap_or_else(|_| error(StatusCode::GATEWAY_TIMEOUT, "Timeout", "the request took too long")),
                )
            }
        });
        hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_DEADLINE)
            .max_buf_size(MAX_JOIN_BYTES)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades()
            .await
            .map_err(|error| error.to_string())
    }

    async fn answer(
        self: Arc<Self>,
        request: Request<Incoming>,
        node: Result<Option<String>, String>,
        peer: SocketAddr,
    ) -> Response<Full<Bytes>> {
        match (request.method(), request.uri().path()) {
            (&Method::POST, JOIN_PATH) => self.join(request).await,
            (&Method::GET, LINK_PATH) => match node {
                Ok(Some(node)) => self.link(request, node),
                Ok(None) => {
                    error(StatusCode::UNAUTHORIZED, "Unauthorized", "the link needs the client certificate of a node")
                }
                Err(problem) => {
                    tracing::warn!(%peer, problem, "a link was refused");
                    error(StatusCode::FORBIDDEN, "Forbidden", &problem)
                }
            },
            (_, JOIN_PATH | LINK_PATH) => {
                error(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed", "POST to join, GET for the link")
            }
            _ => error(StatusCode::NOT_FOUND, "NotFound", "this port serves /v1/join and /v1/link"),
        }
    }

    async fn join(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let body = match Limited::new(request.into_body(), MAX_JOIN_BYTES).collect().await {
            Ok(body) => body.to_bytes(),
            Err(problem) if problem.downcast_ref::<LengthLimitError>().is_some() => {
                let message = format!("a request to join may have {MAX_JOIN_BYTES} bytes");
                return error(StatusCode::PAYLOAD_TOO_LARGE, "RequestEntityTooLarge", &message);
            }
            Err(problem) => return error(StatusCode::BAD_REQUEST, "BadRequest", &problem.to_string()),
        };
        match self.joining.answer(&body).await {
            Ok(body) => json(StatusCode::OK, body),
            Err((code, reason, message)) => error(code, reason, &message),
        }
    }

    fn link(self: Arc<Self>, mut request: Request<Incoming>, node: String) -> Response<Full<Bytes>> {
        if !self.complete.is() {
            // A session now would delete at the node what the hub has just not read yet.
            return error(
                StatusCode::SERVICE_UNAVAILABLE,
                "ServiceUnavailable",
                "the hub is still reading the cluster",
            );
        }
        let headers = match transport::upgrade_headers(request.headers()) {
            Ok(headers) => headers,
            Err(problem) => return error(StatusCode::BAD_REQUEST, "BadRequest", problem),
        };
        let upgrade = hyper::upgrade::on(&mut request);
        let context = Arc::clone(&self);
        self.shutdown.spawn(async move {
            match timeout(HANDSHAKE_DEADLINE, upgrade).await {
                Ok(Ok(upgraded)) => {
                    let connection = Connection::accept(TokioIo::new(upgraded)).await;
                    context.sessions.serve(&node, connection).await;
                }
                Ok(Err(error)) => tracing::debug!(node, %error, "a link was not established"),
                Err(_) => tracing::debug!(node, "a link was not established in time"),
            }
        });
        let mut response = Response::new(Full::default());
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        *response.headers_mut() = headers;
        response
    }
}

fn json(code: StatusCode, body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = code;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    response
}

fn error(code: StatusCode, reason: &str, message: &str) -> Response<Full<Bytes>> {
    json(code, Bytes::from(identity::status(code.as_u16(), reason, message).to_string()))
}
