//! Translation of a call's address, there and back.

use aya_ebpf::{
    EbpfContext,
    helpers::{bpf_get_prandom_u32, bpf_get_socket_cookie, bpf_set_retval},
    programs::SockContext,
};
use edgemesh_ebpf_abi::{Calls, Counter, Frontend, TCP, UDP};

use crate::{
    PROCEED, affinity,
    families::{Family, Socket, V4, V6},
    maps::{HOST_NETNS, count},
    sockets::{AF_INET6, SocketCall, read},
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

type AddressOf<C> = <<C as SocketCall>::Family as Family>::Address;

enum Choice<A> {
    /// The address is no Service's.
    None,
    /// The Service has no such port.
    Closed,
    /// The Service port has no backend.
    NoBackend,
    /// Slots and frontend did not fit together, each time.
    Inconsistent,
    /// An endpoint, or a listener of the agent.
    Backend { address: A, listener: bool },
}

/// Sends the call to a backend if its address is a Service's. `connect` fixes the peer; otherwise it is one datagram's.
#[inline(always)]
pub fn to_backend<C: SocketCall>(call: &C, connect: bool) -> i32 {
    let protocol = call.protocol();
    if protocol != u32::from(TCP) && protocol != u32::from(UDP) {
        return PROCEED;
    }
    let service = call.address();
    let tcp = protocol == u32::from(TCP);
    let socket = Socket { cookie: call.cookie(), connected: connect };
    match choose(call, service, protocol as u8, socket.cookie) {
        Choice::Backend { address: backend, listener } => {
            // Most datagrams of a socket go where the one before went: a lookup is cheaper than an update.
            let new = C::Family::service(socket, backend) != Some(service);
            if new {
                C::Family::remember(socket, backend, service, protocol as u8);
            }
            if (connect || new) && !listener {
                C::Family::count(service, protocol as u8, Calls::SENT);
            }
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
            C::Family::forget(socket, service);
            count(Counter::Misses);
            PROCEED
        }
        Choice::Closed if connect && !tcp => {
            to_nowhere(call, socket, service);
            PROCEED
        }
        Choice::Closed => {
            count(Counter::Refused);
            C::Family::count_closed(service, protocol as u8);
            refuse(ECONNREFUSED)
        }
        Choice::NoBackend => {
            count(Counter::Refused);
            C::Family::count(service, protocol as u8, Calls::REFUSED);
            refuse(EHOSTUNREACH)
        }
        Choice::Inconsistent => {
            count(Counter::Inconsistent);
            refuse(EHOSTUNREACH)
        }
    }
}

/// Connects a UDP socket to a port that the Service lacks. No host refuses that, and programs find out so which families
/// work (RFC 6724, section 6, rule 1), whether or not the Service has a UDP port: it must fail where the pod has no route,
/// and only there. Its datagrams are refused, by the host that nobody listens.
#[inline(always)]
fn to_nowhere<C: SocketCall>(call: &C, socket: Socket, service: AddressOf<C>) {
    // The host itself reaches its node-local addresses without a route.
    if call.netns() != HOST_NETNS.load() {
        let nowhere = C::Family::nowhere();
        C::Family::remember(socket, nowhere, service, UDP);
        call.set_address(nowhere);
    }
}

/// Shows the Service's address in place of the backend's, if that is what the socket asked for.
#[inline(always)]
pub fn to_service<C: SocketCall>(call: &C) {
    if let Some(service) = C::Family::service(call.socket(), call.address()) {
        call.set_address(service);
    }
}

/// Drops what was remembered for a socket that is closed, whether or not it has a peer at the end: its connect may have
/// failed. What unconnected sockets leave is evicted with time.
#[inline(always)]
pub fn forget(socket: &SockContext) {
    // SAFETY: the helper takes the context of this program type.
    let cookie = unsafe { bpf_get_socket_cookie(socket.as_ptr()) };
    V4::forget_closed(cookie);
    // SAFETY: the kernel gives a valid context for the length of the program.
    if read(unsafe { &raw const (*socket.sock).family }) == AF_INET6 {
        V6::forget_closed(cookie);
    }
}

#[inline(always)]
fn choose<C: SocketCall>(call: &C, service: AddressOf<C>, protocol: u8, cookie: u64) -> Choice<AddressOf<C>> {
    for _ in 0..LOOKUPS {
        let Some(frontend) = C::Family::frontend(service, protocol) else {
            // A Service's address belongs to nobody else: what is not one of its ports is closed.
            let closed = C::Family::is_service(service, protocol);
            return if closed { Choice::Closed } else { Choice::None };
        };
        // What listens at a pod's own loopback address is the pod's.
        if C::Family::is_loopback(service) && call.netns() != HOST_NETNS.load() {
            return Choice::None;
        }
        if frontend.count() == 0 {
            return if C::Family::is_any_port(service) { Choice::Closed } else { Choice::NoBackend };
        }
        // A UDP socket keeps its backend while the set stays the same, for protocols that send more than one datagram.
        let random = if protocol == TCP { random() } else { spread(cookie) };
        let chosen = if frontend.has_affinity() {
            affinity::keep::<C::Family>(call.netns(), service, protocol, frontend, random)
        } else {
            backend::<C::Family>(frontend, random)
        };
        if let Some(address) = chosen {
            return Choice::Backend { address, listener: frontend.is_listener() };
        }
    }
    Choice::Inconsistent
}

/// One of a frontend's backends by a number that is spread over 32 bits; nothing if the slots are of another generation.
#[inline(always)]
pub fn backend<F: Family>(frontend: Frontend, random: u32) -> Option<F::Address> {
    let offset = (u64::from(random) * u64::from(frontend.count())) >> 32;
    F::backend(frontend.first() + offset as u32, frontend.generation())
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
fn refuse(error: i32) -> i32 {
    // SAFETY: the helper takes any negative error number.
    unsafe { bpf_set_retval(-error) };
    REJECT
}
