//! Translation of a call's address, there and back.

use aya_ebpf::{
    EbpfContext,
    helpers::{bpf_get_prandom_u32, bpf_get_socket_cookie, bpf_set_retval},
    programs::SockContext,
};
use edgemesh_ebpf_abi::{Backend, Counter, Frontend, FrontendKey, PeerKey, SocketAddress, TCP, UDP};

use crate::{
    PROCEED,
    maps::{BACKENDS, FRONTENDS, PEERS, count},
    sockets::{SocketCall, read},
};

/// The kernel ends the call with the error that was set.
const REJECT: i32 = 0;
/// What a host answers on a port that nothing listens on: here, on a port that the Service doesn't have.
const ECONNREFUSED: i32 = 111;
/// What a Service port without endpoints answers, so that clients tell it from a closed port.
const EHOSTUNREACH: i32 = 113;
/// How often a frontend is looked up when its slots change meanwhile. Twice in one run takes two updates within a
/// microsecond.
const LOOKUPS: u32 = 4;

enum Choice {
    /// The address is no Service's.
    None,
    /// The Service has no such port.
    Closed,
    /// The Service port has no backend.
    NoBackend,
    /// Slots and frontend did not fit together, each time.
    Inconsistent,
    Backend(SocketAddress),
}

/// Sends the call to a backend if its address is a Service's. `connect` fixes the peer; otherwise it is one datagram's.
#[inline(always)]
pub fn to_backend(call: &impl SocketCall, connect: bool) -> i32 {
    let protocol = call.protocol();
    if protocol != u32::from(TCP) && protocol != u32::from(UDP) {
        return PROCEED;
    }
    let Some(service) = call.address() else { return PROCEED };
    let tcp = protocol == u32::from(TCP);
    let cookie = call.cookie();
    match choose(FrontendKey::new(service, protocol as u8), tcp, cookie) {
        Choice::Backend(backend) => {
            remember(PeerKey { cookie, backend }, service);
            call.set_address(backend);
            count(match (connect, tcp) {
                (false, _) => Counter::UdpDatagrams,
                (true, true) => Counter::TcpConnects,
                (true, false) => Counter::UdpConnects,
            });
            PROCEED
        }
        Choice::None => {
            // The socket talks to this address itself from now on, though it may have come here through a Service before.
            forget_peer(&PeerKey { cookie, backend: service });
            count(Counter::Misses);
            PROCEED
        }
        Choice::Closed => {
            count(Counter::Refused);
            refuse(ECONNREFUSED)
        }
        Choice::NoBackend => {
            count(Counter::Refused);
            refuse(EHOSTUNREACH)
        }
        Choice::Inconsistent => {
            count(Counter::Inconsistent);
            refuse(EHOSTUNREACH)
        }
    }
}

/// Shows the Service's address in place of the backend's, if that is what the socket asked for.
#[inline(always)]
pub fn to_service(call: &impl SocketCall) {
    let Some(backend) = call.address() else { return };
    let key = PeerKey { cookie: call.cookie(), backend };
    // SAFETY: the value is one word, read at once; an entry that is evicted at this moment can at worst show the peer of
    // another socket to a program that asks for its name.
    if let Some(&service) = unsafe { PEERS.get(&key) } {
        call.set_address(service);
    }
}

/// Drops what was remembered for a socket that is closed. What unconnected sockets leave is evicted with time.
#[inline(always)]
pub fn forget(socket: &SockContext) {
    // SAFETY: the kernel gives a valid context for the length of the program.
    let raw = unsafe { &*socket.sock };
    let address = read(&raw const raw.dst_ip4);
    if address == 0 {
        return;
    }
    let backend = SocketAddress::from_network(address, read(&raw const raw.dst_port));
    // SAFETY: the helper takes the context of this program type.
    let cookie = unsafe { bpf_get_socket_cookie(socket.as_ptr()) };
    forget_peer(&PeerKey { cookie, backend });
}

#[inline(always)]
fn choose(key: FrontendKey, tcp: bool, cookie: u64) -> Choice {
    for _ in 0..LOOKUPS {
        // SAFETY: the value is one word, read at once; the generation tells if the element was reused meanwhile.
        let Some(&frontend) = (unsafe { FRONTENDS.get(&key) }) else {
            // A Service's address belongs to nobody else: what is not one of its ports is closed.
            return if FRONTENDS.get_ptr(key.any_port()).is_some() { Choice::Closed } else { Choice::None };
        };
        if frontend.count() == 0 {
            return Choice::NoBackend;
        }
        // A UDP socket keeps its backend while the set stays the same, for protocols that send more than one datagram.
        let random = if tcp { random() } else { spread(cookie) };
        if let Some(address) = backend(frontend, random) {
            return Choice::Backend(address);
        }
    }
    Choice::Inconsistent
}

#[inline(always)]
fn backend(frontend: Frontend, random: u32) -> Option<SocketAddress> {
    let offset = (u64::from(random) * u64::from(frontend.count())) >> 32;
    let word = slot_word(frontend.first() + offset as u32)?;
    let backend = Backend::from_bits(word);
    (backend.generation() == frontend.generation()).then(|| backend.address())
}

#[inline(always)]
fn slot_word(slot: u32) -> Option<u64> {
    // SAFETY: array elements live as long as the map; the word is read at once.
    BACKENDS.get_ptr(slot).map(|word| unsafe { word.read_volatile() })
}

#[inline(always)]
fn random() -> u32 {
    // SAFETY: the helper has no conditions.
    unsafe { bpf_get_prandom_u32() }
}

/// Spreads cookies, which count up, over 32 bits (Knuth, "The Art of Computer Programming", 6.4: multiplicative hashing).
#[inline(always)]
fn spread(cookie: u64) -> u32 {
    (cookie.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u32
}

#[inline(always)]
fn remember(key: PeerKey, service: SocketAddress) {
    // Most datagrams of a socket go where the one before went: a lookup is cheaper than an update.
    // SAFETY: as in `to_service`.
    let known = unsafe { PEERS.get(&key) }.is_some_and(|&known| known == service);
    if !known {
        // Only a full map without anything to evict fails, and then the backend's own address is shown.
        let _ = PEERS.insert(&key, &service, 0);
    }
}

#[inline(always)]
fn forget_peer(key: &PeerKey) {
    // A lookup takes no lock, and nearly always finds nothing.
    if PEERS.get_ptr(key).is_some() {
        let _ = PEERS.remove(key);
    }
}

#[inline(always)]
fn refuse(error: i32) -> i32 {
    // SAFETY: the helper takes any negative error number.
    unsafe { bpf_set_retval(-error) };
    REJECT
}
