//! The admin endpoint of every daemon: `/metrics` (OpenMetrics), `/readyz`, `/livez` and the daemon's own debug pages.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header::CONTENT_TYPE};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::RwLock;
use prometheus_client::registry::Registry;
use tokio::{net::TcpListener, sync::Semaphore};

use crate::{drain::Shutdown, readiness::Readiness};

/// How many admin connections are served at once; further ones wait.
const MAX_CONNECTIONS: usize = 32;
/// How long a client may take to send its request head.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);

type Page = Box<dyn Fn() -> serde_json::Value + Send + Sync>;

/// The daemon's own pages: a path to what builds its JSON.
#[derive(Default)]
pub struct AdminRoutes(BTreeMap<&'static str, Page>);

impl AdminRoutes {
    /// Adds a page, for example `/debug/catalog`.
    #[must_use]
    pub fn page(mut self, path: &'static str, build: impl Fn() -> serde_json::Value + Send + Sync + 'static) -> Self {
        self.0.insert(path, Box::new(build));
        self
    }
}

/// A bound admin endpoint.
#[derive(Debug)]
pub struct Admin {
    listener: TcpListener,
    address: SocketAddr,
}

struct State {
    registry: Arc<RwLock<Registry>>,
    readiness: Readiness,
    routes: AdminRoutes,
}

impl Admin {
    /// Binds the endpoint; port 0 picks a free one.
    ///
    /// # Errors
    /// When the address is in use or not of this host; the message names it.
    pub async fn bind(address: SocketAddr) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(address)
            .await
            .map_err(|error| anyhow::anyhow!("the admin endpoint can't listen on {address}: {error}"))?;
        let address = listener.local_addr()?;
        Ok(Self { listener, address })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until the shutdown is forced, so that metrics can be read while the daemon drains.
    pub async fn serve(
        self,
        registry: Arc<RwLock<Registry>>,
        readiness: Readiness,
        routes: AdminRoutes,
        shutdown: Shutdown,
    ) {
        let state = Arc::new(State { registry, readiness, routes });
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
            let stream = tokio::select! {
                accepted = self.listener.accept() => match accepted {
                    Ok((stream, _)) => stream,
                    Err(error) => {
                        tracing::warn!(%error, "admin accept failed");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        continue;
                    }
                },
                () = shutdown.forced().cancelled() => return,
            };
            let state = Arc::clone(&state);
            let forced = shutdown.forced().clone();
            tokio::spawn(async move {
                let service = hyper::service::service_fn(move |request| {
                    let response = state.answer(&request);
                    async move { Ok::<_, std::convert::Infallible>(response) }
                });
                let connection = hyper::server::conn::http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEADER_TIMEOUT)
                    .serve_connection(TokioIo::new(stream), service);
                tokio::select! {
                    result = connection => if let Err(error) = result {
                        tracing::debug!(%error, "admin connection ended");
                    },
                    () = forced.cancelled() => {}
                }
                drop(slot);
            });
        }
    }
}

impl State {
    fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        if request.method() != Method::GET {
            return text(StatusCode::METHOD_NOT_ALLOWED, "only GET is served here\n".to_owned());
        }
        match request.uri().path() {
            "/livez" => text(StatusCode::OK, "ok\n".to_owned()),
            "/readyz" => {
                let pending = self.readiness.pending();
                if pending.is_empty() {
                    text(StatusCode::OK, "ok\n".to_owned())
                } else {
                    text(StatusCode::SERVICE_UNAVAILABLE, format!("waiting for: {}\n", pending.join(", ")))
                }
            }
            "/metrics" => {
                let mut out = String::new();
                match prometheus_client::encoding::text::encode(&mut out, &self.registry.read()) {
                    Ok(()) => answer(StatusCode::OK, "application/openmetrics-text; version=1.0.0; charset=utf-8", out),
                    Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
                }
            }
            path => match self.routes.0.get(path) {
                Some(page) => answer(StatusCode::OK, "application/json", format!("{:#}\n", page())),
                None => {
                    let own: Vec<_> = self.routes.0.keys().copied().collect();
                    text(StatusCode::NOT_FOUND, format!("try /metrics, /readyz, /livez {}\n", own.join(", ")))
                }
            },
        }
    }
}

fn text(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    answer(status, "text/plain; charset=utf-8", body)
}

fn answer(status: StatusCode, content_type: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static(content_type));
    response
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    async fn get(address: SocketAddr, path: &str) -> String {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut out = String::new();
        stream.read_to_string(&mut out).await.unwrap();
        out
    }

    #[tokio::test]
    async fn readyz_names_what_is_missing_and_then_says_ok() {
        let admin = Admin::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = admin.address();
        let readiness = Readiness::default();
        let task = readiness.task("catalog");
        let shutdown = Shutdown::default();
        let routes = AdminRoutes::default().page("/debug/x", || serde_json::json!({"x": 1}));
        let server = tokio::spawn(admin.serve(Arc::default(), readiness, routes, shutdown.clone()));
        let before = get(address, "/readyz").await;
        assert!(before.starts_with("HTTP/1.1 503") && before.contains("catalog"), "{before}");
        task.ready();
        assert!(get(address, "/readyz").await.starts_with("HTTP/1.1 200"));
        assert!(get(address, "/debug/x").await.contains("\"x\": 1"));
        assert!(get(address, "/nothing").await.starts_with("HTTP/1.1 404"));
        assert!(get(address, "/metrics").await.contains("# EOF"));
        shutdown.drain(Duration::from_secs(1)).await;
        server.await.unwrap();
    }

    #[tokio::test]
    async fn a_port_in_use_is_an_error_that_names_it() {
        let first = Admin::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let error = Admin::bind(first.address()).await.unwrap_err().to_string();
        assert!(error.contains(&first.address().to_string()), "{error}");
    }
}
