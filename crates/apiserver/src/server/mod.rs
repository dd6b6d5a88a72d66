//! The API over HTTP/1.1 and HTTP/2, with TLS or plain.

mod accept;
mod api;
mod body;
mod connection;
mod discovery;
mod openapi;
mod read;
mod request;
mod respond;
mod subresource;
mod tls;
mod watch;
mod write;

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use edgemesh_api::names::MAX_OBJECT_BYTES;
use tokio::{net::TcpListener, sync::Semaphore};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use tls::{TlsError, TlsOptions};

use crate::{
    auth::{Authenticator, Authorizer},
    store::Store,
};
use api::Api;

/// How long connections may finish what they do when the server stops.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);
/// How long to wait before accepting again when the process is out of file descriptors.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// Who may use the server, and how much of it.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// Who users are.
    pub authenticator: Authenticator,
    /// What they may do.
    pub authorizer: Authorizer,
    /// The largest request body, in bytes.
    pub body_limit: usize,
    /// How many requests other than watches are worked on at once; further ones wait up to 10 s for their turn.
    pub max_requests: usize,
    /// How many watches there are at once; further ones get 429.
    pub max_watches: usize,
    /// How many connections there are at once; further ones wait.
    pub max_connections: usize,
    /// On a node: whether its copy is in step with the cloud, for [`edgemesh_api::names::CLOUD_STATUS_PATH`].
    pub cloud: Option<tokio::sync::watch::Receiver<bool>>,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            authenticator: Authenticator::default(),
            authorizer: Authorizer::Cluster,
            body_limit: MAX_OBJECT_BYTES,
            max_requests: 256,
            max_watches: 4096,
            max_connections: 4096,
            cloud: None,
        }
    }
}

/// A bound server.
pub struct Server {
    /// Where it listens; with the real port when 0 was asked for.
    pub address: SocketAddr,
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    connections: Arc<Semaphore>,
    api: Arc<Api>,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server")
            .field("address", &self.address)
            .field("tls", &self.tls.is_some())
            .finish_non_exhaustive()
    }
}

impl Server {
    /// Binds the address (port 0 picks a free one). Without TLS only addresses of loopback make sense.
    ///
    /// # Errors
    /// When the address can't be bound, or the certificates can't be used.
    pub async fn bind(
        address: SocketAddr,
        tls: Option<TlsOptions>,
        store: Store,
        options: ServerOptions,
    ) -> io::Result<Self> {
        let tls = tls.map(|t| t.acceptor()).transpose().map_err(io::Error::other)?;
        let listener = TcpListener::bind(address)
            .await
            .map_err(|error| io::Error::new(error.kind(), format!("API at {address}: {error}")))?;
        let api = Arc::new(Api {
            store,
            authenticator: options.authenticator,
            authorizer: options.authorizer,
            body_limit: options.body_limit,
            cloud: options.cloud,
            turns: Semaphore::new(options.max_requests),
            watches: Arc::new(Semaphore::new(options.max_watches)),
            stopping: CancellationToken::new(),
        });
        Ok(Self {
            address: listener.local_addr()?,
            listener,
            tls,
            connections: Arc::new(Semaphore::new(options.max_connections)),
            api,
        })
    }

    /// Serves until `stop` is cancelled: then watches end, requests finish, and after five seconds the rest is cut.
    pub async fn serve(self, stop: CancellationToken) {
        let tracker = TaskTracker::new();
        let force = CancellationToken::new();
        loop {
            let slot = tokio::select! {
                slot = self.connections.clone().acquire_owned() => slot,
                () = stop.cancelled() => break,
            };
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                () = stop.cancelled() => break,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_BACKOFF).await;
                    continue;
                }
            };
            let (api, tls, force) = (self.api.clone(), self.tls.clone(), force.clone());
            tracker.spawn(async move {
                tokio::select! {
                    () = connection::serve(stream, tls, api) => {}
                    () = force.cancelled() => {}
                }
                drop(slot);
            });
        }
        drop(self.listener);
        self.api.stopping.cancel();
        tracker.close();
        if tokio::time::timeout(DRAIN_TIMEOUT, tracker.wait()).await.is_err() {
            tracing::debug!(left = tracker.len(), "connections were cut");
            force.cancel();
            tracker.wait().await;
        }
    }
}
