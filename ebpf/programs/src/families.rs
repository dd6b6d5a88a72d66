//! IPv4 and IPv6: each with its own maps, so that IPv4 keeps its one-word keys and values.

use edgemesh_ebpf_abi::{
    Backend, Backend6, Calls, Frontend, FrontendKey, FrontendKey6, Peer, Peer6, PeerKey, PeerKey6, SocketAddress,
    SocketAddress6,
};

use crate::maps::{
    BACKENDS, BACKENDS6, CALLS, CALLS6, FRONTENDS, FRONTENDS6, NOWHERE, NOWHERE6, PEERS, PEERS6, UNCONN_PEERS,
    UNCONN_PEERS6, count_call,
};

/// A socket by its cookie.
#[derive(Clone, Copy)]
pub struct Socket {
    pub cookie: u64,
    /// Whether it has a peer, or names one with each datagram.
    pub connected: bool,
}

/// An address family's addresses and maps.
pub trait Family {
    /// Address and port.
    type Address: Copy + PartialEq + Into<SocketAddress6>;

    /// The frontend at an address.
    fn frontend(service: Self::Address, protocol: u8) -> Option<Frontend>;
    /// Counts a call of a frontend.
    fn count(service: Self::Address, protocol: u8, call: Calls);
    /// Counts a call of a port that the Service lacks.
    fn count_closed(service: Self::Address, protocol: u8);
    /// Whether the address, on some port, is a Service's.
    fn is_service(service: Self::Address, protocol: u8) -> bool;
    /// Whether the address has port 0, which no Service port has: it stands for those that a Service lacks.
    fn is_any_port(service: Self::Address) -> bool;
    /// Where nobody listens.
    fn nowhere() -> Self::Address;
    /// The backend in a slot; nothing if the slot is of another generation.
    fn backend(slot: u32, generation: u16) -> Option<Self::Address>;
    /// The timeout in seconds in the slot behind the backends; nothing if the slot is of another generation.
    fn timeout(slot: u32, generation: u16) -> Option<u32>;
    /// The Service address that a socket named when it was sent to a backend.
    fn service(socket: Socket, backend: Self::Address) -> Option<Self::Address>;
    /// Remembers it.
    fn remember(socket: Socket, backend: Self::Address, service: Self::Address, protocol: u8);
    /// Forgets it.
    fn forget(socket: Socket, backend: Self::Address);
    /// Forgets whatever is remembered of a connected socket, by its cookie.
    fn forget_closed(cookie: u64);
    /// Whether only processes in the host's own network may be led elsewhere from the address: it is another one in each
    /// network namespace.
    fn is_loopback(service: Self::Address) -> bool;
}

/// IPv4, also in mapped form.
pub struct V4;

impl Family for V4 {
    type Address = SocketAddress;

    #[inline(always)]
    fn frontend(service: SocketAddress, protocol: u8) -> Option<Frontend> {
        // SAFETY: the value is one word, read at once. An element that is given to another frontend between the lookup and the
        // read shows that one, with slots of its generation: for that a program must be interrupted just there, while its
        // frontend is written and another one after it. What it can come to then is another Service's backend, for one call.
        unsafe { FRONTENDS.get(&FrontendKey::new(service, protocol)) }.copied()
    }

    #[inline(always)]
    fn count(service: SocketAddress, protocol: u8, call: Calls) {
        count_call(&CALLS, &FrontendKey::new(service, protocol), call);
    }

    #[inline(always)]
    fn count_closed(service: SocketAddress, protocol: u8) {
        count_call(&CALLS, &FrontendKey::new(service, protocol).any_port(), Calls::REFUSED);
    }

    #[inline(always)]
    fn is_service(service: SocketAddress, protocol: u8) -> bool {
        FRONTENDS.get_ptr(FrontendKey::new(service, protocol).any_port()).is_some()
    }

    #[inline(always)]
    fn is_any_port(service: SocketAddress) -> bool {
        service.network_port() == 0
    }

    #[inline(always)]
    fn nowhere() -> SocketAddress {
        SocketAddress::from_bits(NOWHERE.load())
    }

    #[inline(always)]
    fn backend(slot: u32, generation: u16) -> Option<SocketAddress> {
        slot4(slot, generation).map(Backend::address)
    }

    #[inline(always)]
    fn timeout(slot: u32, generation: u16) -> Option<u32> {
        slot4(slot, generation).map(Backend::seconds)
    }

    #[inline(always)]
    fn service(socket: Socket, backend: SocketAddress) -> Option<SocketAddress> {
        // SAFETY: an element of a map is memory that lives as long as the program runs, and any words are a value. An entry
        // that is evicted at this moment can at worst show the peer of another socket to a program that asks for its name.
        unsafe {
            if socket.connected {
                PEERS.get(&socket.cookie).filter(|peer| peer.backend == backend).map(|peer| peer.service.address())
            } else {
                UNCONN_PEERS.get(&PeerKey { cookie: socket.cookie, backend }).copied()
            }
        }
    }

    #[inline(always)]
    fn remember(socket: Socket, backend: SocketAddress, service: SocketAddress, protocol: u8) {
        // Only a full map without anything to evict fails, and then the backend's own address is shown.
        let _ = if socket.connected {
            PEERS.insert(&socket.cookie, &Peer { backend, service: FrontendKey::new(service, protocol) }, 0)
        } else {
            UNCONN_PEERS.insert(&PeerKey { cookie: socket.cookie, backend }, &service, 0)
        };
    }

    #[inline(always)]
    fn forget(socket: Socket, backend: SocketAddress) {
        // A lookup takes no lock, and nearly always finds nothing.
        if Self::service(socket, backend).is_some() {
            let _ = if socket.connected {
                PEERS.remove(&socket.cookie)
            } else {
                UNCONN_PEERS.remove(&PeerKey { cookie: socket.cookie, backend })
            };
        }
    }

    #[inline(always)]
    fn forget_closed(cookie: u64) {
        if PEERS.get_ptr(&cookie).is_some() {
            let _ = PEERS.remove(&cookie);
        }
    }

    #[inline(always)]
    fn is_loopback(service: SocketAddress) -> bool {
        service.octets()[0] == 127
    }
}

#[inline(always)]
fn slot4(slot: u32, generation: u16) -> Option<Backend> {
    // SAFETY: array elements live as long as the map; the word is read at once.
    let backend = Backend::from_bits(BACKENDS.get_ptr(slot).map(|word| unsafe { word.read_volatile() })?);
    (backend.generation() == generation).then_some(backend)
}

/// IPv6.
pub struct V6;

impl Family for V6 {
    type Address = SocketAddress6;

    #[inline(always)]
    fn frontend(service: SocketAddress6, protocol: u8) -> Option<Frontend> {
        // SAFETY: as for IPv4.
        unsafe { FRONTENDS6.get(&FrontendKey6::new(service, protocol)) }.copied()
    }

    #[inline(always)]
    fn count(service: SocketAddress6, protocol: u8, call: Calls) {
        count_call(&CALLS6, &FrontendKey6::new(service, protocol), call);
    }

    #[inline(always)]
    fn count_closed(service: SocketAddress6, protocol: u8) {
        count_call(&CALLS6, &FrontendKey6::new(service, protocol).any_port(), Calls::REFUSED);
    }

    #[inline(always)]
    fn is_service(service: SocketAddress6, protocol: u8) -> bool {
        FRONTENDS6.get_ptr(FrontendKey6::new(service, protocol).any_port()).is_some()
    }

    #[inline(always)]
    fn is_any_port(service: SocketAddress6) -> bool {
        service.network_port() == 0
    }

    #[inline(always)]
    fn nowhere() -> SocketAddress6 {
        SocketAddress6::from_words(NOWHERE6.load())
    }

    #[inline(always)]
    fn backend(slot: u32, generation: u16) -> Option<SocketAddress6> {
        slot6(slot)?.address(generation)
    }

    #[inline(always)]
    fn timeout(slot: u32, generation: u16) -> Option<u32> {
        slot6(slot)?.seconds(generation)
    }

    #[inline(always)]
    fn service(socket: Socket, backend: SocketAddress6) -> Option<SocketAddress6> {
        // SAFETY: as for IPv4; an entry that is evicted at this moment can show words of two peers.
        unsafe {
            if socket.connected {
                PEERS6.get(&socket.cookie).filter(|peer| peer.backend == backend).map(|peer| peer.service.address())
            } else {
                UNCONN_PEERS6.get(&PeerKey6 { cookie: socket.cookie, backend }).copied()
            }
        }
    }

    #[inline(always)]
    fn remember(socket: Socket, backend: SocketAddress6, service: SocketAddress6, protocol: u8) {
        let _ = if socket.connected {
            PEERS6.insert(&socket.cookie, &Peer6 { backend, service: FrontendKey6::new(service, protocol) }, 0)
        } else {
            UNCONN_PEERS6.insert(&PeerKey6 { cookie: socket.cookie, backend }, &service, 0)
        };
    }

    #[inline(always)]
    fn forget(socket: Socket, backend: SocketAddress6) {
        if Self::service(socket, backend).is_some() {
            let _ = if socket.connected {
                PEERS6.remove(&socket.cookie)
            } else {
                UNCONN_PEERS6.remove(&PeerKey6 { cookie: socket.cookie, backend })
            };
        }
    }

    #[inline(always)]
    fn forget_closed(cookie: u64) {
        if PEERS6.get_ptr(&cookie).is_some() {
            let _ = PEERS6.remove(&cookie);
        }
    }

    #[inline(always)]
    fn is_loopback(_: SocketAddress6) -> bool {
        // Node ports are not served at `::1`.
        false
    }
}

#[inline(always)]
fn slot6(slot: u32) -> Option<Backend6> {
    let slot = BACKENDS6.get_ptr(slot)?;
    let word = |at: usize| {
        // SAFETY: array elements live as long as the map, and have three words; the check in the last one tells if they
        // do not belong together.
        unsafe { slot.cast::<u64>().add(at).read_volatile() }
    };
    Some(Backend6::from_words([word(0), word(1), word(2)]))
}
