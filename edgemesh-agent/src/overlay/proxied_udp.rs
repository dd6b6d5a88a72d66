//! The UDP half of a listener: one socket for everything that it is for. Each datagram tells the address that it was sent to
//! (IP_RECVORIGDSTADDR, IPV6_RECVORIGDSTADDR), and replies are sent from that same address: with a node-local one by the
//! listener's own socket, with a pod's by a socket that is bound to the pod's address and port.

use std::{
    collections::HashMap,
    io::{self, IoSlice, IoSliceMut},
    net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6},
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    sync::{Arc, Weak},
    time::Instant,
};

use bytes::Bytes;
use edgemesh_mesh::{
    l4::udp::{DatagramSink, Delivery, FlowEnded, FlowLimits, FlowTable, Traffic, socket::receive_whole},
    model::Protocol,
};
use edgemesh_tunnel::MAX_FLOWS;
use futures::future::BoxFuture;
use nix::{
    cmsg_space,
    sys::socket::{
        ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn, SockaddrIn6, SockaddrStorage, recvmsg, sendmsg,
        setsockopt,
        sockopt::{Ipv4OrigDstAddr, Ipv6OrigDstAddr},
    },
};
use parking_lot::Mutex;
use socket2::{Domain, Socket, Type};
use tokio::{io::Interest, net::UdpSocket};

use super::{
    called::Listening,
    leads::{FlowKey, Leads, Opened, PAUSE},
    proxied::{Parts, prepare},
    upstream::{Standing, UpstreamError},
};

/// Socket buffers; the kernel may grant less.
const BUFFER: usize = 4 << 20;
/// The bound socket.
pub(super) struct ProxiedUdp {
    socket: Arc<UdpSocket>,
    /// Sockets from which replies for pods are sent, by the pods' addresses.
    pods: Arc<Mutex<HashMap<SocketAddr, Weak<UdpSocket>>>>,
    leads: Leads,
    parts: Arc<Parts>,
}

impl ProxiedUdp {
    pub(super) fn bind(address: SocketAddr, parts: Arc<Parts>) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(address), Type::DGRAM, None)?;
        socket.set_nonblocking(true)?;
        // Best effort: the limits belong to the operator.
        let _ = socket.set_recv_buffer_size(BUFFER);
        let _ = socket.set_send_buffer_size(BUFFER);
        if address.is_ipv4() {
            setsockopt(&socket, Ipv4OrigDstAddr, &true)?;
        } else {
            setsockopt(&socket, Ipv6OrigDstAddr, &true)?;
        }
        prepare(&socket, address, &parts.listening)?;
        socket.bind(&address.into())?;
        Ok(Self {
            socket: Arc::new(UdpSocket::from_std(socket.into())?),
            pods: Arc::default(),
            leads: Leads::default(),
            parts,
        })
    }

    /// Another descriptor of the socket.
    pub(super) fn descriptor(&self) -> io::Result<OwnedFd> {
        self.socket.as_fd().try_clone_to_owned()
    }

    /// Serves until it is dropped; the flows end with it.
    pub(super) async fn run(self) {
        // No more than the tunnel carries to one node: as long as another listener has few flows there, idle ones make room before
        // it refuses any.
        let limits = FlowLimits { flows: MAX_FLOWS, idle: self.parts.udp_idle, ..FlowLimits::default() };
        let table = FlowTable::new(limits);
        let mut changes = self.parts.dialer.changes();
        loop {
            let received = tokio::select! {
                received = self.socket.async_io(Interest::READABLE, || receive(&self.socket)) => received,
                Ok(()) = changes.changed() => {
                    self.leads.gone(&self.parts.dialer).iter().for_each(|flow| table.end(flow));
                    continue;
                }
            };
            match received {
                Ok((datagram, Some((client, local)))) => self.deliver(&table, client, local, datagram),
                Ok((_, None)) => {}
                // An ICMP error of an earlier reply, for example; the socket itself is well.
                Err(error) => tracing::debug!(%error, "receiving a proxied datagram failed"),
            }
        }
    }

    fn deliver(&self, table: &FlowTable<FlowKey>, client: SocketAddr, local: SocketAddr, datagram: Bytes) {
        let Some(called) = self.parts.listening.called(local, Protocol::Udp) else {
            self.parts.metrics.connection("udp", "none", "no_service");
            return;
        };
        let key = (client, local);
        if table.idle(&key).is_some_and(|idle| idle >= PAUSE)
            && self.leads.standing(&self.parts.dialer, &key).is_some_and(|standing| standing != Standing::Ready)
        {
            table.end(&key);
        }
        // Strangers' datagrams take no places of flows, and no lines in the log.
        if table.idle(&key).is_none() && !self.parts.dialer.admits(&called, client) {
            self.parts.metrics.connection("udp", "none", UpstreamError::Stranger.label());
            return;
        }
        let opened = Opened::default();
        let (parts, begin) = (self.parts.clone(), Instant::now());
        let opening = {
            let (called, opened, parts, leads) = (called.clone(), opened.clone(), parts.clone(), &self.leads);
            move || {
                leads.begin(key, called.clone(), opened.clone());
                async move {
                    match parts.dialer.udp(&called, client).await {
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
            }
        };
        let replies = || {
            let from = match &self.parts.listening {
                Listening::Services(_) => Ok((self.socket.clone(), Some(local.ip()))),
                Listening::Pods => self.socket_of_pod(local).map(|socket| (socket, None)),
            };
            Box::new(Replies { from, client, _active: self.parts.metrics.active(Protocol::Udp) })
                as Box<dyn DatagramSink>
        };
        let leads = self.leads.clone();
        let ended = move |end: FlowEnded, traffic: &Traffic| {
            leads.end(&key, &opened);
            tracing::trace!(%called, %client, ?end, "a flow ended");
            let opened = opened.get().cloned();
            if let Some(Ok(route)) = &opened {
                parts.dialer.flow_ended(&called, route, begin, &end, traffic.to_near() > 0);
            }
            parts.accounts.flow((called, client), begin, opened, &end, traffic);
        };
        match table.deliver(key, datagram, replies, opening, ended) {
            Delivery::Queued | Delivery::Began => {}
            Delivery::BeganInPlaceOf(evicted) => self.parts.metrics.evicted(evicted),
            Delivery::QueueFull | Delivery::TableFull => self.parts.metrics.dropped(),
        }
    }

    /// The socket for replies from a pod's address, which is this host's as long as it is captured. It gets no datagrams: those for
    /// the pod go to the listener, whatever else is bound to its address.
    fn socket_of_pod(&self, pod: SocketAddr) -> io::Result<Arc<UdpSocket>> {
        let mut sockets = self.pods.lock();
        if let Some(socket) = sockets.get(&pod).and_then(Weak::upgrade) {
            return Ok(socket);
        }
        let socket = Socket::new(Domain::for_address(pod), Type::DGRAM, None)?;
        socket.set_nonblocking(true)?;
        // Beside sockets for all addresses that allow it too.
        socket.set_reuse_address(true)?;
        if pod.is_ipv6() {
            socket.set_only_v6(true)?;
            socket.set_freebind_v6(true)?;
        }
        let _ = socket.set_send_buffer_size(BUFFER);
        socket.bind(&pod.into())?;
        let socket = Arc::new(UdpSocket::from_std(socket.into())?);
        if sockets.len() >= 2 * MAX_FLOWS {
            sockets.retain(|_, socket| socket.strong_count() > 0);
        }
        sockets.insert(pod, Arc::downgrade(&socket));
        Ok(socket)
    }
}

/// One datagram, with the client's address and the address that it was sent to.
fn receive(socket: &UdpSocket) -> io::Result<(Bytes, Option<FlowKey>)> {
    receive_whole(|buffer| {
        let mut space = cmsg_space!(libc::sockaddr_in6);
        let mut parts = [IoSliceMut::new(buffer)];
        let message = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::empty())?;
        let local = message.cmsgs()?.find_map(|control| match control {
            ControlMessageOwned::Ipv4OrigDstAddr(address) => {
                Some(SocketAddr::V4(SocketAddrV4::from(SockaddrIn::from(address))))
            }
            ControlMessageOwned::Ipv6OrigDstAddr(address) => {
                let address = SocketAddrV6::from(SockaddrIn6::from(address));
                // Without the interface, which is that of the packet and says nothing about the address.
                Some(SocketAddr::from((*address.ip(), address.port())))
            }
            _ => None,
        });
        let client = message.address.and_then(|address| {
            let v4 = address.as_sockaddr_in().map(|v4| SocketAddr::V4(SocketAddrV4::from(*v4)));
            v4.or_else(|| address.as_sockaddr_in6().map(|v6| SocketAddr::V6(SocketAddrV6::from(*v6))))
        });
        Ok((message.bytes, client.zip(local)))
    })
}

/// Sends a flow's replies from the address that the client talks to.
struct Replies {
    /// The socket, and the address to send from if it is not bound to it.
    from: io::Result<(Arc<UdpSocket>, Option<IpAddr>)>,
    client: SocketAddr,
    _active: super::metrics::Active,
}

impl DatagramSink for Replies {
    fn send<'a>(&'a mut self, datagram: &'a [u8]) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(async move {
            let (socket, local) = match &self.from {
                Ok(from) => from,
                // Another process has the port at all addresses, for example.
                Err(error) => return Err(io::Error::new(error.kind(), format!("no socket for replies: {error}"))),
            };
            let Some(local) = local else { return socket.send_to(datagram, self.client).await.map(|_| ()) };
            let to = SockaddrStorage::from(self.client);
            let parts = [IoSlice::new(datagram)];
            let send = || {
                let sent = match local {
                    IpAddr::V4(local) => {
                        let info = libc::in_pktinfo {
                            ipi_ifindex: 0,
                            ipi_spec_dst: libc::in_addr { s_addr: u32::from_ne_bytes(local.octets()) },
                            ipi_addr: libc::in_addr { s_addr: 0 },
                        };
                        let control = [ControlMessage::Ipv4PacketInfo(&info)];
                        sendmsg(socket.as_raw_fd(), &parts, &control, MsgFlags::empty(), Some(&to))
                    }
                    IpAddr::V6(local) => {
                        let info = libc::in6_pktinfo {
                            ipi6_addr: libc::in6_addr { s6_addr: local.octets() },
                            ipi6_ifindex: 0,
                        };
                        let control = [ControlMessage::Ipv6PacketInfo(&info)];
                        sendmsg(socket.as_raw_fd(), &parts, &control, MsgFlags::empty(), Some(&to))
                    }
                };
                sent.map_err(io::Error::from)
            };
            socket.async_io(Interest::WRITABLE, send).await.map(|_| ())
        })
    }
}
