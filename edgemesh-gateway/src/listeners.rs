//! The open ports: opened and closed as Gateways come and go; a change of routes touches no connection.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use edgemesh_telemetry::{ReadinessTask, Shutdown};
use hyper::service::service_fn;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    time::timeout,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::{
    config::Config,
    metrics::Metrics,
    proxy::{Client, Proxy},
    resolve::Resolved,
    routing::Port,
};

/// Time for a client to send a request's head, and for the TLS handshake.
const HEAD_DEADLINE: Duration = Duration::from_secs(10);
/// Longest head of a request, in bytes.
const MAX_HEAD: usize = 64 << 10;
/// Most requests of one HTTP/2 connection at a time.
const MAX_STREAMS: u32 = 256;
/// How often a port that could not be opened is tried again, and unused connections are closed.
const HOUSEKEEPING: Duration = Duration::from_secs(2);

/// The owner of the open ports.
#[derive(Debug)]
pub struct Listeners {
    address: IpAddr,
    proxy: Arc<Proxy>,
    slots: Arc<Semaphore>,
    metrics: Arc<Metrics>,
    shutdown: Shutdown,
    open: BTreeMap<u16, Open>,
    opened: watch::Sender<Vec<SocketAddr>>,
}

#[derive(Debug)]
struct Open {
    routes: watch::Sender<Arc<Port>>,
    close: CancellationToken,
    address: SocketAddr,
}

/// What a connection of a port needs.
struct Serving {
    proxy: Arc<Proxy>,
    slots: Arc<Semaphore>,
    metrics: Arc<Metrics>,
    routes: watch::Receiver<Arc<Port>>,
    shutdown: Shutdown,
}

impl Listeners {
    /// No port is open yet. The receiver shows the open ones.
    pub fn new(
        config: &Config,
        proxy: Arc<Proxy>,
        metrics: Arc<Metrics>,
        shutdown: Shutdown,
    ) -> (Self, watch::Receiver<Vec<SocketAddr>>) {
        let (opened, receiver) = watch::channel(Vec::new());
        let slots = Arc::new(Semaphore::new(config.max_connections));
        let listeners = Self { address: config.listen, proxy, slots, metrics, shutdown, open: BTreeMap::new(), opened };
        (listeners, receiver)
    }

    /// Follows the routing table until the daemon stops.
    pub async fn run(mut self, mut resolved: watch::Receiver<Arc<Resolved>>, ready: ReadinessTask) {
        let mut ready = Some(ready);
        let mut tick = tokio::time::interval(HOUSEKEEPING);
        let stopping = self.shutdown.stopping().clone();
        loop {
            let current = Arc::clone(&resolved.borrow_and_update());
            let complete = self.follow(&current).await;
            if current.known
                && complete
                && let Some(ready) = ready.take()
            {
                ready.ready();
            }
            tokio::select! {
                changed = resolved.changed() => if changed.is_err() { break },
                _ = tick.tick() => self.proxy.close_unused(),
                () = stopping.cancelled() => break,
            }
        }
        for open in self.open.values() {
            open.close.cancel();
        }
    }

    /// Opens, updates and closes ports; false if one can't be opened.
    async fn follow(&mut self, resolved: &Resolved) -> bool {
        let wanted = &resolved.table.ports;
        self.open.retain(|port, open| {
            let keep = wanted.contains_key(port);
            if !keep {
                tracing::info!(port, "listener closed");
                open.close.cancel();
            }
            keep
        });
        let mut complete = true;
        for (number, port) in wanted {
            if let Some(open) = self.open.get(number) {
                open.routes.send_if_modified(|current| {
                    let changed = !Arc::ptr_eq(current, port);
                    *current = Arc::clone(port);
                    changed
                });
                continue;
            }
            match TcpListener::bind(SocketAddr::new(self.address, *number)).await.and_then(|l| Ok((l.local_addr()?, l)))
            {
                Ok((address, listener)) => self.serve(*number, address, listener, port),
                Err(error) => {
                    complete = false;
                    tracing::warn!(port = number, %error, "a Gateway's port can't be opened; trying again");
                }
            }
        }
        self.metrics.listeners.set(self.open.len() as i64);
        self.opened.send_replace(self.open.values().map(|open| open.address).collect());
        complete
    }

    fn serve(&mut self, number: u16, address: SocketAddr, listener: TcpListener, port: &Arc<Port>) {
        tracing::info!(%address, "listener opened");
        let (sender, routes) = watch::channel(Arc::clone(port));
        let close = CancellationToken::new();
        self.open.insert(number, Open { routes: sender, close: close.clone(), address });
        let serving = Arc::new(Serving {
            proxy: Arc::clone(&self.proxy),
            slots: Arc::clone(&self.slots),
            metrics: Arc::clone(&self.metrics),
            routes,
            shutdown: self.shutdown.clone(),
        });
        self.shutdown.spawn(accept(listener, serving, close));
    }
}

async fn accept(listener: TcpListener, serving: Arc<Serving>, close: CancellationToken) {
    loop {
        let slot = tokio::select! {
            slot = Arc::clone(&serving.slots).acquire_owned() => slot,
            () = close.cancelled() => return,
        };
        let Ok(slot) = slot else { return };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = close.cancelled() => return,
        };
        match accepted {
            Ok((stream, client)) => {
                let serving_one = Arc::clone(&serving);
                let close = close.clone();
                serving.shutdown.spawn(async move {
                    serving_one.metrics.connections.inc();
                    serving_one.connection(stream, client, close).await;
                    serving_one.metrics.connections.dec();
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "accept failed");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

impl Serving {
    async fn connection(&self, stream: TcpStream, address: SocketAddr, close: CancellationToken) {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY");
        }
        let tls = self.routes.borrow().tls.clone();
        match tls {
            None => self.requests(TokioIo::new(stream), Client { address, tls: false }, close).await,
            Some(config) => match timeout(HEAD_DEADLINE, TlsAcceptor::from(config).accept(stream)).await {
                Ok(Ok(stream)) => self.requests(TokioIo::new(stream), Client { address, tls: true }, close).await,
                Ok(Err(error)) => tracing::debug!(client = %address, %error, "TLS handshake failed"),
                Err(_) => tracing::debug!(client = %address, "TLS handshake took too long"),
            },
        }
    }

    async fn requests<I>(&self, io: I, client: Client, close: CancellationToken)
    where
        I: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
    {
        let mut builder = auto::Builder::new(TokioExecutor::new());
        builder.http1().timer(TokioTimer::new()).header_read_timeout(HEAD_DEADLINE).max_buf_size(MAX_HEAD);
        builder
            .http2()
            .timer(TokioTimer::new())
            .max_concurrent_streams(MAX_STREAMS)
            .max_header_list_size(MAX_HEAD as u32)
            .keep_alive_interval(Some(HEAD_DEADLINE))
            .keep_alive_timeout(HEAD_DEADLINE);
        let service = service_fn(|request| {
            let port = Arc::clone(&self.routes.borrow());
            let proxy = Arc::clone(&self.proxy);
            async move { Ok::<_, std::convert::Infallible>(proxy.serve(&port, request, client).await) }
        });
        let mut connection = std::pin::pin!(builder.serve_connection(io, service));
        let result = tokio::select! {
            result = connection.as_mut() => result,
            () = close.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = result {
            tracing::debug!(client = %client.address, %error, "client connection ended");
        }
    }
}
