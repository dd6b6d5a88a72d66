//! The listener for Service ports that go through the agent: one TCP and one UDP socket for all of them. The local address
//! of a connection, which is in the node-local range, tells which Service port it is for.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use edgemesh_mesh::l4::copy::{CopyLimits, copy_both};
use edgemesh_telemetry::Shutdown;
use socket2::{Domain, SockFilter, Socket, Type};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::sleep,
};

use super::{
    accept::reset,
    access::Accounts,
    metrics::ProxiedMetrics,
    proxied_udp::ProxiedUdp,
    upstream::{Dialer, Upstream},
};
use crate::node_local::{Allocator, Ipv4Range};

/// Connections at a time; further ones wait in the backlog.
const MAX_CONNECTIONS: usize = 16 * 1024;
const BACKLOG: i32 = 1024;
/// Pause after `accept` failed, which it does when file descriptors run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the listener works with.
pub(super) struct Parts {
    pub(super) dialer: Dialer,
    pub(super) allocator: Arc<Allocator>,
    pub(super) metrics: ProxiedMetrics,
    pub(super) accounts: Accounts,
    /// A UDP flow without datagrams ends after this time.
    pub(super) udp_idle: Duration,
    pub(super) shutdown: Shutdown,
}

/// The bound sockets.
pub(super) struct Proxied {
    tcp: TcpListener,
    udp: ProxiedUdp,
    address: SocketAddr,
    parts: Arc<Parts>,
}

impl Proxied {
    /// Binds both sockets. Port 0 picks a free one, the same for both.
    pub(super) fn bind(address: SocketAddr, parts: Arc<Parts>) -> io::Result<Self> {
        let mut attempts = 0;
        loop {
            match Self::bind_once(address, parts.clone()) {
                // The port that is free for TCP may be taken for UDP.
                Err(error) if address.port() == 0 && error.kind() == io::ErrorKind::AddrInUse && attempts < 32 => {
                    attempts += 1;
                }
                result => return result,
            }
        }
    }

    fn bind_once(address: SocketAddr, parts: Arc<Parts>) -> io::Result<Self> {
        let tcp = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        tcp.set_reuse_address(true)?;
        tcp.set_nonblocking(true)?;
        admit_only(&tcp, parts.allocator.range())?;
        tcp.bind(&address.into())?;
        tcp.listen(BACKLOG)?;
        let tcp = TcpListener::from_std(tcp.into())?;
        let address = tcp.local_addr()?;
        let udp = ProxiedUdp::bind(address, parts.clone())?;
        Ok(Self { tcp, udp, address, parts })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until the agent stops.
    pub(super) fn start(self) {
        let stopping = self.parts.shutdown.stopping().clone();
        let parts = self.parts.clone();
        super::spawn_until_stopping(&parts.shutdown, self.udp.run());
        parts.shutdown.clone().spawn(async move {
            tokio::select! {
                () = accept_all(self.tcp, parts) => {}
                () = stopping.cancelled() => {}
            }
        });
    }
}

/// Makes the kernel drop everything that is not sent to an address of the range, so that the port is closed to the outside
/// though the socket is bound to all addresses (a range can't be bound to).
pub(super) fn admit_only(socket: &Socket, range: Ipv4Range) -> io::Result<()> {
    // Classic BPF; the destination address is at offset 16 of the IPv4 header.
    const LOAD_WORD: u16 = 0x20;
    const AND: u16 = 0x54;
    const JUMP_IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    const FROM_NETWORK_HEADER: u32 = 0xfff0_0000;
    let step = SockFilter::new;
    let mask = u32::MAX.checked_shl(32 - u32::from(range.prefix())).unwrap_or(0);
    socket.attach_filter(&[
        step(LOAD_WORD, 0, 0, FROM_NETWORK_HEADER + 16),
        step(AND, 0, 0, mask),
        step(JUMP_IF_EQUAL, 0, 1, range.base().to_bits()),
        step(RETURN, 0, 0, u32::MAX),
        step(RETURN, 0, 0, 0),
    ])
}

/// The IPv4 form of an address.
pub(super) fn v4(address: IpAddr) -> Option<Ipv4Addr> {
    match address {
        IpAddr::V4(address) => Some(address),
        IpAddr::V6(address) => address.to_ipv4_mapped(),
    }
}

async fn accept_all(listener: TcpListener, parts: Arc<Parts>) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((connection, client)) => {
                let work = serve(connection, client, parts.clone());
                parts.shutdown.spawn(async move {
                    work.await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "can't accept a proxied connection");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn serve(mut connection: TcpStream, client: SocketAddr, parts: Arc<Parts>) {
    let port = connection
        .local_addr()
        .ok()
        .and_then(|address| v4(address.ip()))
        .and_then(|address| parts.allocator.service_of(address));
    let Some(port) = port else {
        parts.metrics.connection("tcp", "none", "no_service");
        return reset(&connection);
    };
    let mut account = parts.accounts.begin(port.clone(), client);
    let upstream = match parts.dialer.tcp(&port, client).await {
        Ok((upstream, route)) => {
            parts.metrics.connection("tcp", route.path, "ok");
            account.connected(route);
            upstream
        }
        Err(error) => {
            tracing::debug!(%port, %client, %error, "no connection");
            parts.metrics.connection("tcp", "none", error.label());
            account.failed(error.label());
            return reset(&connection);
        }
    };
    let _active = parts.metrics.active("tcp");
    let limits = CopyLimits { idle: None, stop: parts.shutdown.forced().clone() };
    let copied = &account.copied;
    let end = async {
        connection.set_nodelay(true)?;
        match upstream {
            Upstream::Direct(mut endpoint) => {
                let end = copy_both(&mut connection, &mut endpoint, copied, &limits).await;
                if end.is_err() {
                    reset(&endpoint);
                }
                end
            }
            Upstream::Tunnel(mut stream) => copy_both(&mut connection, &mut stream, copied, &limits).await,
        }
    }
    .await;
    parts.metrics.tcp_bytes(copied.forward(), copied.backward());
    match end {
        Ok(end) => account.ended(end),
        Err(error) => {
            tracing::debug!(%port, %client, %error, "a connection broke");
            account.failed("broken");
            reset(&connection);
        }
    }
}
