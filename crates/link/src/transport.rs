//! The link over a WebSocket: one frame in one binary message, on a TLS 1.3 stream.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use futures::{Sink, Stream};
use http::{HeaderMap, StatusCode, Uri, header};
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_tungstenite::{
    WebSocketStream, client_async_with_config,
    tungstenite::{
        self, Message,
        client::IntoClientRequest,
        handshake::derive_accept_key,
        protocol::{Role, WebSocketConfig},
    },
};

use crate::{
    Fault,
    frames::{self, MAX_FRAME_BYTES},
};

/// Path of the link on the hub's port.
pub const LINK_PATH: &str = "/v1/link";
/// The WebSocket subprotocol of the link; its number is the framing's, not the messages'.
pub const SUBPROTOCOL: &str = "edgemesh-link.1";

/// How long one address may take to accept a TCP connection. Short: after a link's return a new attempt beats an old SYN.
const CONNECT_DEADLINE: Duration = Duration::from_secs(2);
/// How long name resolution may take.
const RESOLVE_DEADLINE: Duration = Duration::from_secs(2);
/// How long TLS and the WebSocket handshake may take.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(8);
/// How long sent bytes may stay unacknowledged before the kernel gives the connection up. Without it, the kernel's own
/// retransmissions are spaced so widely after a cut that a link's return goes unnoticed for longer than a reconnect takes.
const UNACKNOWLEDGED_DEADLINE: Duration = Duration::from_secs(6);
/// Buffers of a connection; most of a session's time it is idle.
const BUFFER_BYTES: usize = 8 << 10;

/// Sets a connection's socket options: no delay of small frames, and the deadline for unacknowledged bytes.
///
/// # Errors
/// When the kernel refuses an option.
pub fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    socket2::SockRef::from(stream).set_tcp_user_timeout(Some(UNACKNOWLEDGED_DEADLINE))
}

/// What [`Connection::next`] waited for.
#[derive(Debug)]
pub enum Event {
    /// A frame came.
    Frame(Bytes),
    /// Everything sent so far has left, and a frame can be sent now.
    Writable,
}

/// An open link connection.
#[derive(Debug)]
pub struct Connection<S> {
    socket: WebSocketStream<S>,
    unflushed: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    /// The hub's end, on the stream of an upgraded HTTP request.
    pub async fn accept(stream: S) -> Self {
        let socket = WebSocketStream::from_raw_socket(stream, Role::Server, Some(socket_config())).await;
        Self { socket, unflushed: false }
    }

    /// Waits for a frame or, when `want_send` is set, for room to send one. Cancel-safe.
    ///
    /// # Errors
    /// When the connection is broken or closed, or carries something that is no frame.
    pub async fn next(&mut self, want_send: bool) -> Result<Event, Fault> {
        std::future::poll_fn(|context| {
            if self.unflushed {
                match Pin::new(&mut self.socket).poll_flush(context) {
                    Poll::Ready(Ok(())) => self.unflushed = false,
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(broken(&error))),
                    Poll::Pending => {}
                }
            }
            if want_send && !self.unflushed && Pin::new(&mut self.socket).poll_ready(context).is_ready() {
                return Poll::Ready(Ok(Event::Writable));
            }
            loop {
                match ready!(Pin::new(&mut self.socket).poll_next(context)) {
                    Some(Ok(Message::Binary(bytes))) => return Poll::Ready(Ok(Event::Frame(bytes))),
                    Some(Ok(Message::Text(_))) => {
                        return Poll::Ready(Err(Fault::protocol("a text message; frames are binary")));
                    }
                    // The library answers pings itself; frames are the sign of life here.
                    Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => {}
                    Some(Ok(Message::Close(_))) | None => {
                        return Poll::Ready(Err(Fault::Transport("the peer closed the connection".to_owned())));
                    }
                    Some(Err(error)) => return Poll::Ready(Err(broken(&error))),
                }
            }
        })
        .await
    }

    /// Sends a frame; to be called after [`Event::Writable`]. It leaves with the following calls of [`Self::next`].
    ///
    /// # Errors
    /// When the connection is broken or the frame too large.
    pub fn send(&mut self, frame: &impl prost::Message) -> Result<(), Fault> {
        debug_assert!(frame.encoded_len() <= MAX_FRAME_BYTES);
        let bytes = frames::encode(frame)?;
        Pin::new(&mut self.socket).start_send(Message::Binary(bytes)).map_err(|error| broken(&error))?;
        self.unflushed = true;
        Ok(())
    }

    /// Sends a last frame, if any, and closes; gives up after `deadline`.
    pub async fn close(mut self, last: Option<&impl prost::Message>, deadline: Duration) {
        if let Some(frame) = last
            && self.send(frame).is_err()
        {
            return;
        }
        if timeout(deadline, self.socket.close(None)).await.is_err() {
            // The peer does not listen: dropping the socket is all that is left to do.
        }
    }
}

/// Connects to the hub at `host` and `port`, over `tls`, which holds what the node trusts and shows.
///
/// # Errors
/// When no address answers in time, or the hub's answer is no WebSocket; the message says which and why.
pub async fn connect(host: &str, port: u16, tls: Arc<ClientConfig>) -> Result<Connection<TlsStream<TcpStream>>, Fault> {
    let stream = dial(host, port).await?;
    let handshake = async {
        let stream = secure(stream, host, tls).await?;
        let authority = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
        let mut request = format!("wss://{authority}{LINK_PATH}")
            .into_client_request()
            .map_err(|error| Fault::Transport(format!("{authority} is no valid address: {error}")))?;
        request.headers_mut().insert(header::SEC_WEBSOCKET_PROTOCOL, header::HeaderValue::from_static(SUBPROTOCOL));
        let (socket, _) = Box::pin(client_async_with_config(request, stream, Some(socket_config())))
            .await
            .map_err(|error| refused(&error))?;
        Ok(Connection { socket, unflushed: false })
    };
    timeout(HANDSHAKE_DEADLINE, handshake).await.map_err(|_| {
        Fault::Transport(format!("{host}:{port} took longer than {HANDSHAKE_DEADLINE:?} to shake hands"))
    })?
}

/// A TCP connection to the first address of `host` that accepts one.
///
/// # Errors
/// When none does in time; the message names the last address and its error.
pub async fn dial(host: &str, port: u16) -> Result<TcpStream, Fault> {
    let addresses: Vec<SocketAddr> = timeout(RESOLVE_DEADLINE, tokio::net::lookup_host((host, port)))
        .await
        .map_err(|_| Fault::Transport(format!("{host} could not be resolved within {RESOLVE_DEADLINE:?}")))?
        .map_err(|error| Fault::Transport(format!("{host} could not be resolved: {error}")))?
        .take(8)
        .collect();
    let mut last = Fault::Transport(format!("{host} has no address"));
    for address in addresses {
        match timeout(CONNECT_DEADLINE, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => {
                tune(&stream).map_err(|error| Fault::Transport(format!("{address}: {error}")))?;
                return Ok(stream);
            }
            Ok(Err(error)) => last = Fault::Transport(format!("{address}: {error}")),
            Err(_) => last = Fault::Transport(format!("{address} did not answer within {CONNECT_DEADLINE:?}")),
        }
    }
    Err(last)
}

/// TLS to `host` over a connected stream.
///
/// # Errors
/// When the handshake fails, for example because the hub's certificate is of another CA.
pub async fn secure(stream: TcpStream, host: &str, tls: Arc<ClientConfig>) -> Result<TlsStream<TcpStream>, Fault> {
    let name = ServerName::try_from(host.to_owned())
        .map_err(|error| Fault::Transport(format!("{host} is no host name: {error}")))?;
    TlsConnector::from(tls)
        .connect(name, stream)
        .await
        .map_err(|error| Fault::Transport(format!("TLS with {host}: {error}")))
}

/// The headers of the hub's answer to a request that asks for the link.
///
/// # Errors
/// What is wrong with the request.
pub fn upgrade_headers(request: &HeaderMap) -> Result<HeaderMap, &'static str> {
    let has = |name: header::HeaderName, token: &str| {
        request
            .get_all(name)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .any(|value| value.split(',').any(|part| part.trim().eq_ignore_ascii_case(token)))
    };
    if !has(header::UPGRADE, "websocket") || !has(header::CONNECTION, "upgrade") {
        return Err("the link is a WebSocket: the request must ask for that upgrade");
    }
    if !has(header::SEC_WEBSOCKET_VERSION, "13") {
        return Err("Sec-WebSocket-Version must be 13");
    }
    if !has(header::SEC_WEBSOCKET_PROTOCOL, SUBPROTOCOL) {
        return Err("Sec-WebSocket-Protocol must offer edgemesh-link.1");
    }
    let Some(key) = request.get(header::SEC_WEBSOCKET_KEY) else { return Err("Sec-WebSocket-Key is missing") };
    let accept = header::HeaderValue::from_str(&derive_accept_key(key.as_bytes()))
        .map_err(|_| "Sec-WebSocket-Key is not valid")?;
    let mut headers = HeaderMap::new();
    headers.insert(header::UPGRADE, header::HeaderValue::from_static("websocket"));
    headers.insert(header::CONNECTION, header::HeaderValue::from_static("Upgrade"));
    headers.insert(header::SEC_WEBSOCKET_PROTOCOL, header::HeaderValue::from_static(SUBPROTOCOL));
    headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
    Ok(headers)
}

/// Host and port of a hub address such as `https://hub.example:10443`; the port is 443 where none is given.
///
/// # Errors
/// What is wrong with the address.
pub fn hub_address(address: &str) -> Result<(String, u16), String> {
    let uri: Uri = address.parse().map_err(|error| format!("{address:?} is no address: {error}"))?;
    if uri.scheme_str() != Some("https") {
        return Err(format!("{address:?} must begin with https://"));
    }
    if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
        return Err(format!("{address:?} must have no path"));
    }
    let host = uri.host().filter(|host| !host.is_empty()).ok_or_else(|| format!("{address:?} has no host"))?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    Ok((host.to_owned(), uri.port_u16().unwrap_or(443)))
}

fn socket_config() -> WebSocketConfig {
    WebSocketConfig::default()
        .read_buffer_size(BUFFER_BYTES)
        .write_buffer_size(BUFFER_BYTES)
        .max_write_buffer_size(2 * MAX_FRAME_BYTES)
        .max_message_size(Some(MAX_FRAME_BYTES))
        .max_frame_size(Some(MAX_FRAME_BYTES))
}

fn broken(error: &tungstenite::Error) -> Fault {
    match error {
        tungstenite::Error::Capacity(_) | tungstenite::Error::Protocol(_) | tungstenite::Error::Utf8(_) => {
            Fault::protocol(error.to_string())
        }
        tungstenite::Error::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            Fault::Transport("the peer went away without a word".to_owned())
        }
        _ => Fault::Transport(error.to_string()),
    }
}

/// The hub answered the upgrade with an HTTP error; its body says why.
fn refused(error: &tungstenite::Error) -> Fault {
    let tungstenite::Error::Http(response) = error else { return broken(error) };
    // The hub answers with a Kubernetes Status; whatever stands in between may answer with anything.
    let body = response.body().as_deref().map(|body| &body[..body.len().min(4_096)]).unwrap_or_default();
    let status = serde_json::from_slice::<serde_json::Value>(body).ok();
    let text = match status.as_ref().and_then(|status| status["message"].as_str()) {
        Some(message) => message.to_owned(),
        None => String::from_utf8_lossy(&body[..body.len().min(256)]).trim().to_owned(),
    };
    let code = match response.status() {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => edgemesh_api::link::RefuseCode::Identity,
        _ => edgemesh_api::link::RefuseCode::Unavailable,
    };
    Fault::Refused { code, message: format!("{}: {text}", response.status()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hub_addresses_are_checked_before_they_are_used() {
        assert_eq!(hub_address("https://203.0.113.10:10443").unwrap(), ("203.0.113.10".to_owned(), 10443));
        assert_eq!(hub_address("https://[::1]:10443/").unwrap(), ("::1".to_owned(), 10443));
        for wrong in ["http://x:1", "x", "https://x/path", "https://"] {
            assert!(hub_address(wrong).is_err(), "{wrong}");
        }
    }

    #[tokio::test]
    async fn frames_pass_in_both_directions_while_neither_side_waits_for_the_other() {
        use edgemesh_api::link::{Change, EdgeFrame, ToEdge};
        let (near, far) = tokio::io::duplex(1 << 10);
        let mut hub = Connection::accept(near).await;
        let mut edge = Connection {
            socket: WebSocketStream::from_raw_socket(far, Role::Client, Some(socket_config())).await,
            unflushed: false,
        };
        let big = Change { object: Some(Bytes::from(vec![b'x'; 1 << 20])), ..Change::default() };
        let frame =
            ToEdge::from(EdgeFrame::Batch(edgemesh_api::link::Batch { seq: 1, changes: vec![big.clone(), big] }));
        hub.send(&frame).unwrap();
        edge.send(&frame).unwrap();
        let (mut at_hub, mut at_edge) = (false, false);
        while !at_hub || !at_edge {
            tokio::select! {
                event = hub.next(false) => if let Event::Frame(bytes) = event.unwrap() {
                    at_hub = frames::decode::<ToEdge>(bytes).unwrap() == frame;
                },
                event = edge.next(false) => if let Event::Frame(bytes) = event.unwrap() {
                    at_edge = frames::decode::<ToEdge>(bytes).unwrap() == frame;
                },
            }
        }
    }
}
