//! The admin endpoint of every daemon: `/metrics` (OpenMetrics), `/readyz`, `/livez` and the daemon's own debug pages.

use std::{collections::BTreeMap, future::Future, net::SocketAddr, pin::Pin, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header::CONTENT_TYPE, request::Parts};
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

/// How long a page may take.
const PAGE_TIMEOUT: Duration = Duration::from_secs(10);
/// Bounds of what comes behind the `?`.
const MAX_QUERY: usize = 1024;
const MAX_PARAMETERS: usize = 8;

type Answer = Pin<Box<dyn Future<Output = Result<serde_json::Value, PageError>> + Send>>;
type Page = Box<dyn Fn(Parameters) -> Answer + Send + Sync>;

/// Why a page isn't shown; the text names the parameter and says what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PageError {
    /// A parameter is missing or can't be used: 400.
    #[error("{0}")]
    Parameter(String),
    /// What it names doesn't exist: 404.
    #[error("{0}")]
    NotFound(String),
    /// It can't be said now: 503.
    #[error("{0}")]
    Unavailable(String),
}

/// The parameters of a page: `?name=value&...`, at most 8 in 1024 bytes, of characters that need no escapes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Parameters(BTreeMap<String, String>);

impl Parameters {
    fn read(query: Option<&str>) -> Result<Self, PageError> {
        let query = query.unwrap_or_default();
        let bad = |reason: String| Err(PageError::Parameter(reason));
        if query.len() > MAX_QUERY {
            return bad(format!("the query has {} bytes; at most {MAX_QUERY} are read", query.len()));
        }
        let mut all = BTreeMap::new();
        for part in query.split('&').filter(|part| !part.is_empty()) {
            let Some((name, value)) = part.split_once('=') else {
                return bad(format!("parameter {part:?}: write NAME=VALUE"));
            };
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:".contains(c);
            if !value.chars().all(plain) {
                return bad(format!("parameter {name:?}: only letters, digits and - _ . / : are taken, as they are"));
            }
            all.insert(name.to_owned(), value.to_owned());
        }
        if all.len() > MAX_PARAMETERS {
            return bad(format!("at most {MAX_PARAMETERS} parameters are taken"));
        }
        Ok(Self(all))
    }

    /// A parameter's value, if it is given and not empty.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// A parameter that must be given.
    ///
    /// # Errors
    /// When it isn't.
    pub fn required(&self, name: &str) -> Result<&str, PageError> {
        self.get(name).ok_or_else(|| PageError::Parameter(format!("parameter {name:?} is missing: add ?{name}=...")))
    }

    /// Refuses parameters that a page doesn't know: a mistyped one would change its meaning in silence.
    ///
    /// # Errors
    /// When there is one.
    pub fn only(&self, known: &[&str]) -> Result<(), PageError> {
        match self.0.keys().find(|name| !known.contains(&name.as_str())) {
            Some(name) => {
                Err(PageError::Parameter(format!("parameter {name:?} is not known; there are: {}", known.join(", "))))
            }
            None => Ok(()),
        }
    }
}

/// The daemon's own pages: a path to what builds its JSON.
#[derive(Default)]
pub struct AdminRoutes(BTreeMap<&'static str, Page>);

impl AdminRoutes {
    /// Adds a page, for example `/debug/catalog`.
    #[must_use]
    pub fn page(mut self, path: &'static str, build: impl Fn() -> serde_json::Value + Send + Sync + 'static) -> Self {
        let build = Arc::new(build);
        self.0.insert(
            path,
            Box::new(move |_| {
                let build = Arc::clone(&build);
                Box::pin(async move { Ok(build()) })
            }),
        );
        self
    }

    /// Adds a page that takes parameters.
    #[must_use]
    pub fn page_of<Answering>(
        mut self,
        path: &'static str,
        build: impl Fn(Parameters) -> Answering + Send + Sync + 'static,
    ) -> Self
    where
        Answering: Future<Output = Result<serde_json::Value, PageError>> + Send + 'static,
    {
        self.0.insert(path, Box::new(move |parameters| Box::pin(build(parameters))));
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
        tracing::info!(%address, "the admin endpoint listens");
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
                let service = hyper::service::service_fn(move |request: Request<Incoming>| {
                    let (state, (head, _)) = (Arc::clone(&state), request.into_parts());
                    async move { Ok::<_, std::convert::Infallible>(state.answer(&head).await) }
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
    async fn answer(&self, request: &Parts) -> Response<Full<Bytes>> {
        if request.method != Method::GET {
            return text(StatusCode::METHOD_NOT_ALLOWED, "only GET is served here\n".to_owned());
        }
        match request.uri.path() {
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
                Some(page) => shown(page, request.uri.query()).await,
                None => {
                    let own: Vec<_> = self.routes.0.keys().copied().collect();
                    text(StatusCode::NOT_FOUND, format!("try /metrics, /readyz, /livez {}\n", own.join(", ")))
                }
            },
        }
    }
}

async fn shown(page: &Page, query: Option<&str>) -> Response<Full<Bytes>> {
    let built = match Parameters::read(query) {
        Ok(parameters) => tokio::time::timeout(PAGE_TIMEOUT, page(parameters))
            .await
            .unwrap_or_else(|_| Err(PageError::Unavailable(format!("not ready after {} s", PAGE_TIMEOUT.as_secs())))),
        Err(error) => Err(error),
    };
    match built {
        Ok(page) => answer(StatusCode::OK, "application/json", format!("{page:#}\n")),
        Err(error) => {
            let status = match error {
                PageError::Parameter(_) => StatusCode::BAD_REQUEST,
                PageError::NotFound(_) => StatusCode::NOT_FOUND,
                PageError::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
            };
            text(status, format!("{error}\n"))
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
    async fn a_page_gets_its_parameters_and_says_which_one_is_wrong() {
        let admin = Admin::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = admin.address();
        let shutdown = Shutdown::default();
        let routes = AdminRoutes::default().page_of("/debug/trace", |parameters| async move {
            parameters.only(&["pod"])?;
            match parameters.required("pod")? {
                "none" => Err(PageError::NotFound("there is no such pod".to_owned())),
                pod => Ok(serde_json::json!({ "pod": pod })),
            }
        });
        let server = tokio::spawn(admin.serve(Arc::default(), Readiness::default(), routes, shutdown.clone()));
        let answer = get(address, "/debug/trace?pod=default/web-1").await;
        assert!(answer.contains("\"pod\": \"default/web-1\""), "{answer}");
        let long = format!("/debug/trace?pod={}", "x".repeat(MAX_QUERY));
        let many: String = (0..=MAX_PARAMETERS).map(|n| format!("p{n}=1&")).collect();
        let many = format!("/debug/trace?{many}");
        for (path, status, word) in [
            ("/debug/trace", "400", "pod"),
            ("/debug/trace?pot=x", "400", "pot"),
            ("/debug/trace?pod", "400", "NAME=VALUE"),
            ("/debug/trace?pod=a%20b", "400", "letters"),
            ("/debug/trace?pod=none", "404", "no such pod"),
            (long.as_str(), "400", "1024"),
            (many.as_str(), "400", "at most 8"),
        ] {
            let answer = get(address, path).await;
            assert!(answer.starts_with(&format!("HTTP/1.1 {status}")) && answer.contains(word), "{path}: {answer}");
        }
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
