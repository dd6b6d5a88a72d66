#![no_std]
//! What the eBPF programs and the agent agree on: the maps' keys and values. Each is packed into 64-bit words without
//! padding, so that a value is read and written as a whole, and addresses and ports stay in network byte order, as
//! sockets have them.

mod affinity;
mod capture;
mod v6;

pub use affinity::{Affinity, AffinityKey};
pub use capture::{CAPTURED, CAPTURED6, CaptureSocket, LISTENERS, MAX_CAPTURED};
pub use v6::{Backend6, FrontendKey6, Peer6, PeerKey6, SocketAddress6};

/// Version of what is in the maps: it is raised with every change of a key, a value, a name or a size, so that an agent never
/// takes over maps that it would misread.
pub const LAYOUT: u32 = 3;

/// Name of the map `FrontendKey -> Frontend` (hash).
pub const FRONTENDS: &str = "FRONTENDS";
/// Name of the map `slot -> Backend` (array).
pub const BACKENDS: &str = "BACKENDS";
/// Name of the map `cookie -> Peer` (LRU hash) of connected sockets, by the kernel's cookie of the socket.
pub const PEERS: &str = "PEERS";
/// Name of the map `PeerKey -> SocketAddress` (LRU hash) of unconnected sockets.
pub const UNCONNECTED_PEERS: &str = "UNCONN_PEERS";
/// Name of the map `FrontendKey6 -> Frontend` (hash).
pub const FRONTENDS6: &str = "FRONTENDS6";
/// Name of the map `slot -> Backend6` (array).
pub const BACKENDS6: &str = "BACKENDS6";
/// Name of the map `cookie -> Peer6` (LRU hash) of connected sockets.
pub const PEERS6: &str = "PEERS6";
/// Name of the map `PeerKey6 -> SocketAddress6` (LRU hash) of unconnected sockets.
pub const UNCONNECTED_PEERS6: &str = "UNCONN_PEERS6";
/// Name of the map `AffinityKey -> Affinity` (LRU hash).
pub const AFFINITIES: &str = "AFFINITIES";
/// Name of the map `Counter -> u64` (per-CPU array).
pub const COUNTERS: &str = "COUNTERS";
/// Name of the map `FrontendKey -> Calls` (per-CPU hash).
pub const CALLS: &str = "CALLS";
/// Name of the map `FrontendKey6 -> Calls` (per-CPU hash).
pub const CALLS6: &str = "CALLS6";

/// Name of the ring buffer of `SocketAddress6`: backends that left a SYN unanswered.
pub const UNANSWERED: &str = "UNANSWERED";
/// Bytes of that ring buffer: what it has no room for is not told, since more of the same follows.
pub const UNANSWERED_BYTES: u32 = 1 << 14;

/// How many peers of connected sockets are remembered: as many sockets as can be open at once, since each has one, which is
/// forgotten when it is closed. Of more, the least used is forgotten first.
pub const MAX_PEERS: u32 = 65_536;
/// How many peers of unconnected sockets are remembered. Nothing tells when they are no longer needed, and a name server's
/// clients leave one with each question: the least used is forgotten first.
pub const MAX_UNCONNECTED_PEERS: u32 = 16_384;
/// As [`MAX_PEERS`], for IPv6.
pub const MAX_PEERS6: u32 = 16_384;
/// As [`MAX_UNCONNECTED_PEERS`], for IPv6.
pub const MAX_UNCONNECTED_PEERS6: u32 = 8_192;
/// Name of the constant that holds the cookie of the network namespace for whose processes loopback addresses have node ports.
pub const HOST_NETNS: &str = "HOST_NETNS";
/// Name of the constant [`SocketAddress`] at which nobody listens, to which pods' UDP sockets are connected that name a port
/// which a Service lacks.
pub const NOWHERE: &str = "NOWHERE";
/// As [`NOWHERE`], the words of a [`SocketAddress6`].
pub const NOWHERE6: &str = "NOWHERE6";
/// How many clients are remembered with the backends that they keep; the least used is forgotten first.
pub const MAX_AFFINITIES: u32 = 8_192;
/// How many backends a frontend with affinity can have: programs look through all of them.
pub const MAX_AFFINITY_BACKENDS: u16 = 64;

/// IANA protocol number of TCP.
pub const TCP: u8 = 6;
/// IANA protocol number of UDP.
pub const UDP: u8 = 17;

/// An IPv4 address and port, both in network byte order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(transparent)]
pub struct SocketAddress(u64);

impl SocketAddress {
    /// From an address and a port whose bytes are in network order, as `struct sockaddr_in` has them.
    #[inline(always)]
    pub const fn from_network(address: u32, port: u16) -> Self {
        Self(address as u64 | (port as u64) << 32)
    }

    /// From the octets of an address and a port number.
    #[inline(always)]
    pub const fn new(octets: [u8; 4], port: u16) -> Self {
        Self::from_network(u32::from_ne_bytes(octets), port.to_be())
    }

    /// The address, bytes in network order.
    #[inline(always)]
    pub const fn network_address(self) -> u32 {
        self.0 as u32
    }

    /// The port, bytes in network order.
    #[inline(always)]
    pub const fn network_port(self) -> u16 {
        (self.0 >> 32) as u16
    }

    /// The address' octets.
    pub const fn octets(self) -> [u8; 4] {
        self.network_address().to_ne_bytes()
    }

    /// The port number.
    pub const fn port(self) -> u16 {
        u16::from_be(self.network_port())
    }

    /// The word in the map.
    #[inline(always)]
    pub const fn to_bits(self) -> u64 {
        self.0
    }

    /// From the word in the map.
    #[inline(always)]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }
}

/// A Service's address, port and protocol: bits 0–47 [`SocketAddress`], 48–55 protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct FrontendKey(u64);

impl FrontendKey {
    /// The key of an address with the protocol [`TCP`] or [`UDP`].
    #[inline(always)]
    pub const fn new(address: SocketAddress, protocol: u8) -> Self {
        Self(address.0 | (protocol as u64) << 48)
    }

    /// The key that stands for all ports of the address that have no frontend of their own: the one with port 0.
    #[inline(always)]
    pub const fn any_port(self) -> Self {
        Self(self.0 & !(0xffff << 32))
    }

    /// The word in the map.
    #[inline(always)]
    pub const fn to_bits(self) -> u64 {
        self.0
    }

    /// The address and port.
    #[inline(always)]
    pub const fn address(self) -> SocketAddress {
        SocketAddress(self.0 & 0xffff_ffff_ffff)
    }

    /// The protocol number.
    pub const fn protocol(self) -> u8 {
        (self.0 >> 48) as u8
    }

    /// From the word in the map.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }
}

/// Where a frontend leads: bits 0–23 first slot, 24–31 flags, 32–47 number of backends, 48–63 generation.
///
/// Two flags. Bit 24: clients keep their backend. One more slot follows those of the backends, with the timeout in seconds
/// in place of an address. Bit 25: the backend is a listener of the agent, which counts what it is sent itself.
///
/// The generation is also in each of the slots. A program that finds another one there has an old frontend in hand, whose
/// slots were given to another one meanwhile, and looks the frontend up again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct Frontend(u64);

impl Frontend {
    /// The highest slot that can be named.
    pub const MAX_SLOT: u32 = (1 << 24) - 1;
    const AFFINITY: u64 = 1 << 24;
    const LISTENER: u64 = 1 << 25;

    /// A frontend with `count` backends from slot `first` on. With none, connections are refused.
    #[inline(always)]
    pub const fn new(first: u32, count: u16, generation: u16) -> Self {
        Self((first & Self::MAX_SLOT) as u64 | (count as u64) << 32 | (generation as u64) << 48)
    }

    /// The same, with clients that keep their backend.
    #[inline(always)]
    pub const fn with_affinity(self) -> Self {
        Self(self.0 | Self::AFFINITY)
    }

    /// Whether clients keep their backend.
    #[inline(always)]
    pub const fn has_affinity(self) -> bool {
        self.0 & Self::AFFINITY != 0
    }

    /// The same, with a listener of the agent for a backend.
    #[inline(always)]
    pub const fn with_listener(self) -> Self {
        Self(self.0 | Self::LISTENER)
    }

    /// Whether the backend is a listener of the agent.
    #[inline(always)]
    pub const fn is_listener(self) -> bool {
        self.0 & Self::LISTENER != 0
    }

    /// The first slot.
    #[inline(always)]
    pub const fn first(self) -> u32 {
        self.0 as u32 & Self::MAX_SLOT
    }

    /// How many backends follow one another; zero refuses.
    #[inline(always)]
    pub const fn count(self) -> u16 {
        (self.0 >> 32) as u16
    }

    /// The generation that its slots carry.
    #[inline(always)]
    pub const fn generation(self) -> u16 {
        (self.0 >> 48) as u16
    }

    /// The word in the map.
    #[inline(always)]
    pub const fn to_bits(self) -> u64 {
        self.0
    }

    /// From the word in the map.
    #[inline(always)]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }
}

/// One slot: bits 0–47 [`SocketAddress`] of the backend, 48–63 generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct Backend(u64);

impl Backend {
    /// A backend in a slot of the generation.
    #[inline(always)]
    pub const fn new(address: SocketAddress, generation: u16) -> Self {
        Self(address.0 | (generation as u64) << 48)
    }

    /// The slot behind the backends of a frontend with affinity: the timeout in seconds.
    #[inline(always)]
    pub const fn timeout(seconds: u32, generation: u16) -> Self {
        Self(seconds as u64 | (generation as u64) << 48)
    }

    /// The timeout in seconds in such a slot.
    #[inline(always)]
    pub const fn seconds(self) -> u32 {
        self.0 as u32
    }

    /// Where it is.
    #[inline(always)]
    pub const fn address(self) -> SocketAddress {
        SocketAddress(self.0 & 0xffff_ffff_ffff)
    }

    /// The generation of the frontend to which the slot belongs.
    #[inline(always)]
    pub const fn generation(self) -> u16 {
        (self.0 >> 48) as u16
    }

    /// The word in the map.
    #[inline(always)]
    pub const fn to_bits(self) -> u64 {
        self.0
    }

    /// From the word in the map.
    #[inline(always)]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }
}

/// To whom a socket was connected last by a Service. It may have no peer any more, or another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Peer {
    /// The backend's address.
    pub backend: SocketAddress,
    /// The Service address that it named, and its protocol.
    pub service: FrontendKey,
}

/// An unconnected socket, by its cookie, and a backend to which it sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct PeerKey {
    /// The kernel's cookie of the socket: never used twice while the host is up.
    pub cookie: u64,
    /// The backend's address.
    pub backend: SocketAddress,
}

/// What the programs count, by index in the counters' map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Counter {
    /// TCP connections that were sent to a backend.
    TcpConnects = 0,
    /// UDP sockets that were connected to a backend.
    UdpConnects = 1,
    /// Datagrams of unconnected UDP sockets that were sent to a backend.
    UdpDatagrams = 2,
    /// Connections and datagrams refused because the Service port has no backend, or the Service no such port.
    Refused = 3,
    /// Connections and datagrams to addresses that are not a Service's.
    Misses = 4,
    /// Lookups that met slots of another generation even when repeated, and were refused.
    Inconsistent = 5,
}

impl Counter {
    /// All of them, in the order of their indexes.
    pub const ALL: [Self; 6] =
        [Self::TcpConnects, Self::UdpConnects, Self::UdpDatagrams, Self::Refused, Self::Misses, Self::Inconsistent];
}

/// What became of the calls of one frontend. An entry is made with the first one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Calls {
    /// Flows that were sent to an endpoint: connects, and the first datagrams of unconnected UDP sockets.
    pub sent: u64,
    /// Connects and datagrams that were refused: for want of an endpoint, or at port 0 because the Service lacks the port.
    pub refused: u64,
}

impl Calls {
    /// One flow that was sent.
    pub const SENT: Self = Self { sent: 1, refused: 0 };
    /// One refusal.
    pub const REFUSED: Self = Self { sent: 0, refused: 1 };

    /// The words in a map, in order.
    pub const fn from_words([sent, refused]: [u64; 2]) -> Self {
        Self { sent, refused }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_words_give_back_what_was_put_in() {
        let address = SocketAddress::new([10, 96, 0, 10], 53);
        assert_eq!((address.octets(), address.port()), ([10, 96, 0, 10], 53));
        let key = FrontendKey::new(address, UDP);
        assert_eq!((key.address(), key.protocol()), (address, UDP));
        assert_eq!(key.any_port(), FrontendKey::new(SocketAddress::new([10, 96, 0, 10], 0), UDP));
        let frontend = Frontend::new(Frontend::MAX_SLOT, u16::MAX, 0xabcd);
        assert_eq!((frontend.first(), frontend.count(), frontend.generation()), (Frontend::MAX_SLOT, u16::MAX, 0xabcd));
        assert!(!frontend.has_affinity());
        let sticky = frontend.with_affinity();
        assert!(sticky.has_affinity());
        assert_eq!((sticky.first(), sticky.count(), sticky.generation()), (Frontend::MAX_SLOT, u16::MAX, 0xabcd));
        let proxied = Frontend::new(7, 1, 0xabcd).with_listener();
        assert!(proxied.is_listener() && !proxied.has_affinity() && !sticky.is_listener());
        assert_eq!((proxied.first(), proxied.count(), proxied.generation()), (7, 1, 0xabcd));
        let backend = Backend::new(address, u16::MAX);
        assert_eq!((backend.address(), backend.generation()), (address, u16::MAX));
        let timeout = Backend::timeout(86_400, 7);
        assert_eq!((timeout.seconds(), timeout.generation()), (86_400, 7));
    }
}
