//! A listener for what goes through the agent: one TCP and one UDP socket for all Service ports, or for all pods of other
//! networks, of one address family. The local address of a connection tells what was called: a node-local address stands for a
//! Service port, and with captured connections it is the pod's own.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd as _, OwnedFd},
    sync::Arc,
    time::Duration,
};

use edgemesh_mesh::{
    cidr::Cidr,
    l4::copy::{CopyEnd, Side, copy_both},
    model::Protocol,
};
use edgemesh_telemetry::Shutdown;
use socket2::{Domain, SockFilter, Socket, Type};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::sleep,
};

use super::{
    accept::reset,
    access::Accounts,
    called::Listening,
    keepalive::Keepalive,
    metrics::ProxiedMetrics,
    open_connections::OpenConnections,
    proxied_udp::ProxiedUdp,
    upstream::{Dialer, Upstream},
};
/// Connections at a time; further ones wait in the backlog.
const MAX_CONNECTIONS: usize = 16 * 1024;
const BACKLOG: i32 = 1024;
/// Pause after `accept` failed, which it does when file descriptors run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the listener works with.
pub(super) struct Parts {
    pub(super) dialer: Arc<Dialer>,
    pub(super) listening: Listening,
    pub(super) metrics: ProxiedMetrics,
    pub(super) accounts: Accounts,
    /// When connections on which nothing is said are probed.
    pub(super) keepalive: Option<Keepalive>,
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
        let tcp = listener(address, parts.keepalive, |socket| prepare(socket, address, &parts.listening))?;
        let address = tcp.local_addr()?;
        let udp = ProxiedUdp::bind(address, parts.clone())?;
        Ok(Self { tcp, udp, address, parts })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Further descriptors of both sockets, TCP and UDP.
    pub(super) fn descriptors(&self) -> io::Result<(OwnedFd, OwnedFd)> {
        Ok((self.tcp.as_fd().try_clone_to_owned()?, self.udp.descriptor()?))
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

fn listener(
    address: SocketAddr,
    keepalive: Option<Keepalive>,
    prepare: impl FnOnce(&Socket) -> io::Result<()>,
) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    // Connections have both from their listener: some calls less for each.
    socket.set_tcp_nodelay(true)?;
    if let Some(keepalive) = keepalive {
        socket.set_tcp_keepalive(&keepalive.settings())?;
    }
    prepare(&socket)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// What both sockets of a listener need before they are bound.
pub(super) fn prepare(socket: &Socket, address: SocketAddr, listening: &Listening) -> io::Result<()> {
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
        // No interface has the addresses from which answers are sent: IPv6 would not allow that.
        socket.set_freebind_v6(true)?;
    }
    match listening {
        Listening::Services(allocator) => match allocator.range_of(address.ip()) {
            Some(range) => admit_only(socket, range),
            None => Err(io::Error::other("there is no node-local range of this family")),
        },
        Listening::Pods => {
            // Only the capture by nftables needs it, and what is missing for it shows there.
            let transparent =
                if address.is_ipv4() { socket.set_ip_transparent_v4(true) } else { socket.set_ip_transparent_v6(true) };
            drop(transparent);
            Ok(())
        }
    }
}

/// Makes the kernel drop everything that is not sent to an address of the range, so that the port is closed to the outside
/// though the socket is bound to all addresses (a range can't be bound to).
fn admit_only(socket: &Socket, range: Cidr) -> io::Result<()> {
    // Classic BPF; the destination address is at offset 16 of the IPv4 header, and at 24 of the IPv6 one.
    const LOAD_WORD: u16 = 0x20;
    const AND: u16 = 0x54;
    const JUMP_IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    const FROM_NETWORK_HEADER: u32 = 0xfff0_0000;
    let step = SockFilter::new;
    let (octets, offset) = match range.network() {
        IpAddr::V4(base) => (base.octets().to_vec(), 16),
        IpAddr::V6(base) => (base.octets().to_vec(), 24),
    };
    let mut filter = Vec::new();
    let words: Vec<u32> = octets
        .as_chunks()
        .0
        .iter()
        .map(|word| u32::from_be_bytes(*word))
        .take(usize::from(range.prefix().div_ceil(32)))
        .collect();
    for (at, word) in (0u8..).zip(&words) {
        let bits = (u32::from(range.prefix()) - 32 * u32::from(at)).min(32);
        let mask = u32::MAX.checked_shl(32 - bits).unwrap_or(0);
        // To the last step, which drops, if the word differs.
        let to_drop = 3 * (words.len() - 1 - usize::from(at)) + 1;
        filter.push(step(LOAD_WORD, 0, 0, FROM_NETWORK_HEADER + offset + 4 * u32::from(at)));
        filter.push(step(AND, 0, 0, mask));
        filter.push(step(JUMP_IF_EQUAL, 0, u8::try_from(to_drop).unwrap_or(u8::MAX), *word));
    }
    filter.push(step(RETURN, 0, 0, u32::MAX));
    filter.push(step(RETURN, 0, 0, 0));
    socket.attach_filter(&filter)
}

async fn accept_all(listener: TcpListener, parts: Arc<Parts>) {
    let connections = Arc::<OpenConnections>::default();
    tokio::select! {
        () = accept_each(listener, &parts, &connections) => {}
        // There are no more changes: connections end by themselves.
        () = async { connections.end_stale(&parts.dialer).await; std::future::pending().await } => {}
    }
}

async fn accept_each(listener: TcpListener, parts: &Arc<Parts>, connections: &Arc<OpenConnections>) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((connection, client)) => {
                parts.shutdown.spawn(serve(connection, client, parts.clone(), connections.clone(), place));
            }
            Err(error) => {
                tracing::warn!(%error, "can't accept a proxied connection");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn serve(
    mut connection: TcpStream,
    client: SocketAddr,
    parts: Arc<Parts>,
    connections: Arc<OpenConnections>,
    _place: OwnedSemaphorePermit,
) {
    let local = connection.local_addr().ok();
    let Some(called) = local.and_then(|local| parts.listening.called(local, Protocol::Tcp)) else {
        parts.metrics.connection("tcp", "none", "no_service");
        return reset(&connection);
    };
    let mut account = parts.accounts.begin(called.clone(), client);
    let forced = parts.shutdown.forced();
    let (upstream, _entry, stop) = match parts.dialer.tcp(&called, client).await {
        Ok((upstream, route)) => {
            parts.metrics.connection("tcp", route.path, "ok");
            let stop = forced.child_token();
            let entry = connections.add(called.clone(), route.endpoint, stop.clone());
            account.connected(route);
            (upstream, entry, stop)
        }
        Err(error) => {
            tracing::debug!(%called, %client, %error, "no connection");
            parts.metrics.connection("tcp", "none", error.label());
            account.failed(error.label());
            return reset(&connection);
        }
    };
    let _active = parts.metrics.active(Protocol::Tcp);
    let copied = &account.copied;
    let end = match upstream {
        Upstream::Direct(mut endpoint) => {
            let end = copy_both(&mut connection, &mut endpoint, copied, &stop).await;
            if end.cuts_off(Side::Second) {
                reset(&endpoint);
            }
            end
        }
        Upstream::Tunnel(mut stream) => copy_both(&mut connection, &mut stream, copied, &stop).await,
    };
    parts.metrics.tcp_bytes(copied.forward(), copied.backward());
    if end.cuts_off(Side::First) {
        reset(&connection);
    }
    if let CopyEnd::Broken { error, .. } = &end {
        tracing::debug!(%called, %client, %error, "a connection broke");
    }
    match end {
        CopyEnd::Stopped if !forced.is_cancelled() => account.failed("broken"),
        end => account.ended(&end),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn accepted_connections_send_small_segments_at_once_and_are_probed() {
        let keepalive = Keepalive::after(Duration::from_secs(60));
        let listener = listener("127.0.0.1:0".parse().unwrap(), keepalive, |_| Ok(())).unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap());
        let (client, accepted) = tokio::join!(client, listener.accept());
        let accepted = accepted.unwrap().0;
        assert!(accepted.nodelay().unwrap());
        let socket = socket2::SockRef::from(&accepted);
        assert!(socket.keepalive().unwrap());
        assert_eq!(socket.tcp_keepalive_time().unwrap(), Duration::from_secs(60));
        assert_eq!(socket.tcp_keepalive_interval().unwrap(), Duration::from_secs(15));
        drop(client);
    }
}
