//! The UDP half of the proxied listener: one socket for all Service ports. Each datagram tells the local address that it was
//! sent to (IP_PKTINFO), and replies are sent from that same address.

use std::{
    io::{self, IoSlice, IoSliceMut},
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    os::fd::AsRawFd as _,
    sync::{Arc, OnceLock},
    time::Instant,
};

use bytes::Bytes;
use edgemesh_mesh::l4::udp::{
    DatagramSink, Delivery, FlowEnded, FlowLimits, FlowTable, Traffic, socket::receive_whole,
};
use futures::future::BoxFuture;
use nix::{
    cmsg_space,
    sys::socket::{
        ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn, recvmsg, sendmsg, setsockopt,
        sockopt::Ipv4PacketInfo,
    },
};
use socket2::{Domain, Socket, Type};
use tokio::{io::Interest, net::UdpSocket};

use super::proxied::{Parts, admit_only};

/// Socket buffers; the kernel may grant less.
const BUFFER: usize = 4 << 20;
/// Flows at a time. Below the tunnel's limit of streams, so that flows to one node leave room for connections.
const MAX_FLOWS: usize = 2048;

/// A client's address, and the node-local address that it talks to.
type FlowKey = (SocketAddrV4, Ipv4Addr);

/// The bound socket.
pub(super) struct ProxiedUdp {
    socket: Arc<UdpSocket>,
    parts: Arc<Parts>,
}

impl ProxiedUdp {
    pub(super) fn bind(address: SocketAddr, parts: Arc<Parts>) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(address), Type::DGRAM, None)?;
        socket.set_nonblocking(true)?;
        // Best effort: the limits belong to the operator.
        let _ = socket.set_recv_buffer_size(BUFFER);
        let _ = socket.set_send_buffer_size(BUFFER);
        setsockopt(&socket, Ipv4PacketInfo, &true)?;
        admit_only(&socket, parts.allocator.range())?;
        socket.bind(&address.into())?;
        Ok(Self { socket: Arc::new(UdpSocket::from_std(socket.into())?), parts })
    }

    /// Serves until it is dropped; the flows end with it.
    pub(super) async fn run(self) {
        let limits = FlowLimits { flows: MAX_FLOWS, idle: self.parts.udp_idle, ..FlowLimits::default() };
        let table = FlowTable::new(limits);
        loop {
            match self.socket.async_io(Interest::READABLE, || receive(&self.socket)).await {
                Ok((datagram, Some((client, local)))) => self.deliver(&table, client, local, datagram),
                Ok((_, None)) => {}
                // An ICMP error of an earlier reply, for example; the socket itself is well.
                Err(error) => tracing::debug!(%error, "receiving a proxied datagram failed"),
            }
        }
    }

    fn deliver(&self, table: &FlowTable<FlowKey>, client: SocketAddrV4, local: Ipv4Addr, datagram: Bytes) {
        let Some(port) = self.parts.allocator.service_of(local) else {
            self.parts.metrics.connection("udp", "none", "no_service");
            return;
        };
        // What opening has led to, for the account at the end.
        let opened = Arc::new(OnceLock::new());
        let (parts, begin) = (self.parts.clone(), Instant::now());
        let opening = {
            let (port, opened, parts) = (port.clone(), opened.clone(), parts.clone());
            move || async move {
                match parts.dialer.udp(&port, client.into()).await {
                    Ok((remote, route)) => {
                        parts.metrics.connection("udp", route.path, "ok");
                        let _ = opened.set(Ok(route));
                        Ok(remote)
                    }
                    Err(error) => {
                        parts.metrics.connection("udp", "none", error.label());
                        let _ = opened.set(Err(error.label()));
                        Err(io::Error::other(error.to_string()))
                    }
                }
            }
        };
        let replies = || {
            let sink =
                Replies { socket: self.socket.clone(), client, local, _active: self.parts.metrics.active("udp") };
            Box::new(sink) as Box<dyn DatagramSink>
        };
        let ended = move |end: FlowEnded, traffic: &Traffic| {
            tracing::trace!(%port, %client, ?end, "a flow ended");
            let opened = opened.get().cloned();
            if let Some(Ok(route)) = &opened {
                parts.dialer.flow_ended(&port, route, begin, &end, traffic.to_near() > 0);
            }
            parts.accounts.flow((port, client.into()), begin, opened, &end, traffic);
        };
        match table.deliver((client, local), datagram, replies, opening, ended) {
            Delivery::Queued | Delivery::Began => {}
            Delivery::BeganInPlaceOf(evicted) => self.parts.metrics.evicted(evicted),
            Delivery::QueueFull | Delivery::TableFull => self.parts.metrics.dropped(),
        }
    }
}

/// One datagram, with the client's address and the address that it was sent to.
fn receive(socket: &UdpSocket) -> io::Result<(Bytes, Option<FlowKey>)> {
    receive_whole(|buffer| {
        let mut space = cmsg_space!(libc::in_pktinfo);
        let mut parts = [IoSliceMut::new(buffer)];
        let message = recvmsg::<SockaddrIn>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::empty())?;
        let local = message.cmsgs()?.find_map(|control| match control {
            // Network byte order, as the kernel gives it.
            ControlMessageOwned::Ipv4PacketInfo(info) => Some(Ipv4Addr::from(info.ipi_addr.s_addr.to_ne_bytes())),
            _ => None,
        });
        let client = message.address.map(|address| SocketAddrV4::new(address.ip(), address.port()));
        Ok((message.bytes, client.zip(local)))
    })
}

/// Sends a flow's replies from the address that the client talks to.
struct Replies {
    socket: Arc<UdpSocket>,
    client: SocketAddrV4,
    local: Ipv4Addr,
    _active: super::metrics::Active,
}

impl DatagramSink for Replies {
    fn send<'a>(&'a mut self, datagram: &'a [u8]) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(async move {
            let info = libc::in_pktinfo {
                ipi_ifindex: 0,
                ipi_spec_dst: libc::in_addr { s_addr: u32::from_ne_bytes(self.local.octets()) },
                ipi_addr: libc::in_addr { s_addr: 0 },
            };
            let to = SockaddrIn::from(self.client);
            let send = || {
                let control = [ControlMessage::Ipv4PacketInfo(&info)];
                let parts = [IoSlice::new(datagram)];
                sendmsg(self.socket.as_raw_fd(), &parts, &control, MsgFlags::empty(), Some(&to))
                    .map_err(io::Error::from)
            };
            self.socket.async_io(Interest::WRITABLE, send).await.map(|_| ())
        })
    }
}
