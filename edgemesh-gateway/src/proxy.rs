//! One request: find its rule, choose a backend, send it there, pass the answer on.

use std::{
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, Uri, Version,
    header::{self, HOST},
    uri::PathAndQuery,
};
use http_body::{Body as _, Frame, SizeHint};
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::body::Incoming;
use tokio::time::timeout;

use crate::{
    config::Config,
    metrics::{Metrics, RequestLabels},
    routing::Port,
    upstream::{Body, Connection, UpstreamError, Upstreams},
};

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");

/// What requests are answered with.
#[derive(Debug)]
pub struct Proxy {
    upstreams: Arc<Upstreams>,
    response_timeout: Duration,
    metrics: Arc<Metrics>,
}

/// The client's side of a request.
#[derive(Debug, Clone, Copy)]
pub struct Client {
    /// Its address.
    pub address: SocketAddr,
    /// Whether it came over TLS.
    pub tls: bool,
}

/// What the gateway itself answers.
struct Own(StatusCode, String);

impl Proxy {
    /// A proxy over the given connections.
    pub fn new(upstreams: Arc<Upstreams>, config: &Config, metrics: Arc<Metrics>) -> Self {
        let response_timeout = Duration::from_secs(config.response_timeout_seconds);
        Self { upstreams, response_timeout, metrics }
    }

    /// Closes connections that were not used for long.
    pub fn close_unused(&self) {
        self.upstreams.close_unused();
    }

    /// Answers a request that came in on a port.
    pub async fn serve(&self, port: &Port, request: Request<Incoming>, client: Client) -> Response<Body> {
        let begin = Instant::now();
        let mut route = Arc::from("none");
        let (response, source) = match self.forward(port, request, client, &mut route).await {
            Ok(response) => (response, "backend"),
            Err(Own(status, reason)) => (own_answer(status, &reason), "gateway"),
        };
        let labels = RequestLabels { route: route.to_string(), code: response.status().as_u16(), source };
        self.metrics.requests.get_or_create(&labels).inc();
        self.metrics.seconds.observe(begin.elapsed().as_secs_f64());
        response
    }

    async fn forward(
        &self,
        port: &Port,
        request: Request<Incoming>,
        client: Client,
        route: &mut Arc<str>,
    ) -> Result<Response<Body>, Own> {
        let authority = authority(&request).ok_or_else(|| Own(StatusCode::BAD_REQUEST, "no usable Host".to_owned()))?;
        let host = host_of(&authority).to_ascii_lowercase();
        let rule = port
            .route(&host, request.method(), request.uri().path(), request.headers())
            .ok_or_else(|| Own(StatusCode::NOT_FOUND, format!("no route for {host}{}", request.uri().path())))?;
        *route = Arc::clone(&rule.route);
        let target = rule.backends.pick(rand::random()).and_then(|backend| backend.target.as_ref());
        let Some((service, service_port)) = target else {
            return Err(Own(StatusCode::INTERNAL_SERVER_ERROR, "the route's backend can't be used".to_owned()));
        };
        let request = outgoing(request, &authority, client)?;
        let sent = self.upstreams.send(service, *service_port, request, client.address);
        let (response, connection) = match timeout(self.response_timeout, sent).await {
            Err(_) => return Err(Own(StatusCode::GATEWAY_TIMEOUT, "the backend did not answer in time".to_owned())),
            Ok(Err(error)) => {
                tracing::debug!(route = %rule.route, %error, "request failed");
                return Err(Own(status_of(&error), error.to_string()));
            }
            Ok(Ok(answer)) => answer,
        };
        Ok(self.incoming(response, connection))
    }

    fn incoming(&self, response: Response<Incoming>, connection: Connection) -> Response<Body> {
        let (mut head, body) = response.into_parts();
        remove_hop_headers(&mut head.headers);
        head.version = Version::default();
        let body = Kept { body, kept: Some((connection, Arc::clone(&self.upstreams))) };
        Response::from_parts(head, BoxBody::new(body))
    }
}

fn status_of(error: &UpstreamError) -> StatusCode {
    match error {
        UpstreamError::NoService(..) => StatusCode::INTERNAL_SERVER_ERROR,
        UpstreamError::NoEndpoint(_) => StatusCode::SERVICE_UNAVAILABLE,
        UpstreamError::Unreachable { .. } | UpstreamError::Broken(_) => StatusCode::BAD_GATEWAY,
    }
}

/// The authority that the client named: `:authority` of HTTP/2, an absolute URI, or `Host` (RFC 9110, section 7.2).
fn authority<B>(request: &Request<B>) -> Option<HeaderValue> {
    match request.uri().authority() {
        Some(authority) => HeaderValue::from_str(authority.as_str()).ok(),
        None => request.headers().get(HOST).filter(|value| value.to_str().is_ok()).cloned(),
    }
}

/// A host without its port; an IPv6 address keeps its brackets.
fn host_of(authority: &HeaderValue) -> &str {
    let text = authority.to_str().unwrap_or_default();
    match text.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host,
        _ => text,
    }
}

/// The request as it goes to the endpoint, over HTTP/1.1.
fn outgoing(request: Request<Incoming>, authority: &HeaderValue, client: Client) -> Result<Request<Body>, Own> {
    let (mut head, body) = request.into_parts();
    remove_hop_headers(&mut head.headers);
    let path = head.uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
    head.uri = Uri::from(path);
    head.version = Version::HTTP_11;
    head.headers.insert(HOST, authority.clone());
    let own = canonical(client.address.ip()).to_string();
    let chain = match head.headers.get(FORWARDED_FOR).and_then(|value| value.to_str().ok()) {
        Some(before) => format!("{before}, {own}"),
        None => own,
    };
    let chain =
        HeaderValue::from_str(&chain).map_err(|_| Own(StatusCode::BAD_REQUEST, "bad X-Forwarded-For".to_owned()))?;
    head.headers.insert(FORWARDED_FOR, chain);
    head.headers.insert(FORWARDED_PROTO, HeaderValue::from_static(if client.tls { "https" } else { "http" }));
    Ok(Request::from_parts(head, body.boxed()))
}

fn canonical(address: IpAddr) -> IpAddr {
    address.to_canonical()
}

/// Removes what concerns one connection only (RFC 9110, section 7.6.1).
fn remove_hop_headers(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named {
        headers.remove(name);
    }
    for name in [
        header::CONNECTION,
        header::TE,
        header::TRAILER,
        header::TRANSFER_ENCODING,
        header::UPGRADE,
        header::PROXY_AUTHENTICATE,
        header::PROXY_AUTHORIZATION,
        KEEP_ALIVE,
        PROXY_CONNECTION,
    ] {
        headers.remove(name);
    }
}

fn own_answer(status: StatusCode, reason: &str) -> Response<Body> {
    let body = Full::new(Bytes::from(format!("{status}: {reason}\n"))).map_err(|never| match never {}).boxed();
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

/// An answer's body that gives its connection back when it was read to the end.
struct Kept {
    body: Incoming,
    kept: Option<(Connection, Arc<Upstreams>)>,
}

impl Kept {
    fn give_back(&mut self) {
        if let Some((connection, upstreams)) = self.kept.take() {
            upstreams.keep(connection);
        }
    }
}

impl http_body::Body for Kept {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        if matches!(polled, Poll::Ready(None)) {
            self.give_back();
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        // The server doesn't ask for the end of a body whose length it knows.
        if self.body.is_end_stream() {
            self.give_back();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connection_headers_and_those_that_they_name_are_removed() {
        let mut headers = HeaderMap::new();
        for (name, value) in
            [("connection", "x-private, close"), ("x-private", "1"), ("te", "trailers"), ("x-public", "2")]
        {
            headers.insert(name, HeaderValue::from_static(value));
        }
        remove_hop_headers(&mut headers);
        assert_eq!(headers.keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["x-public"]);
    }

    #[test]
    fn a_host_loses_its_port_and_nothing_else() {
        for (authority, host) in [("a.b:80", "a.b"), ("a.b", "a.b"), ("[::1]:80", "[::1]"), ("a.b:", "a.b")] {
            assert_eq!(host_of(&HeaderValue::from_static(authority)), host);
        }
    }
}
