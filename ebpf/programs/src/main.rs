#![no_std]
#![no_main]
//! Socket load balancing: Service addresses become backend addresses when a socket connects or sends, and turn back
//! into Service addresses where a program asks who its peer is. Packets are never touched.

mod affinity;
mod families;
mod maps;
mod sockets;
mod tcp_events;
mod translate;

use aya_ebpf::{
    macros::{cgroup_sock, cgroup_sock_addr, sock_ops},
    programs::{SockAddrContext, SockContext, SockOpsContext},
};
use sockets::{Ipv4, OfIpv6Socket};

/// The kernel goes on with the call.
const PROCEED: i32 = 1;

/// TCP connects and UDP sockets that fix their peer.
#[cgroup_sock_addr(connect4)]
fn connect4(ctx: SockAddrContext) -> i32 {
    translate::to_backend(&Ipv4(ctx), true)
}

/// As `connect4`, on IPv6 sockets.
#[cgroup_sock_addr(connect6)]
fn connect6(ctx: SockAddrContext) -> i32 {
    match OfIpv6Socket::new(ctx) {
        OfIpv6Socket::Mapped(call) => translate::to_backend(&call, true),
        OfIpv6Socket::Ipv6(call) => translate::to_backend(&call, true),
    }
}

/// Datagrams that carry their destination. The kernel comes here for mapped addresses on IPv6 sockets too.
#[cgroup_sock_addr(sendmsg4)]
fn sendmsg4(ctx: SockAddrContext) -> i32 {
    translate::to_backend(&Ipv4(ctx), false)
}

/// As `sendmsg4`, for IPv6 addresses.
#[cgroup_sock_addr(sendmsg6)]
fn sendmsg6(ctx: SockAddrContext) -> i32 {
    match OfIpv6Socket::new(ctx) {
        OfIpv6Socket::Mapped(_) => PROCEED,
        OfIpv6Socket::Ipv6(call) => translate::to_backend(&call, false),
    }
}

/// The source of a received datagram.
#[cgroup_sock_addr(recvmsg4)]
fn recvmsg4(ctx: SockAddrContext) -> i32 {
    translate::to_service(&Ipv4(ctx));
    PROCEED
}

/// As `recvmsg4`, on IPv6 sockets.
#[cgroup_sock_addr(recvmsg6)]
fn recvmsg6(ctx: SockAddrContext) -> i32 {
    name_service_on_ipv6_socket(ctx)
}

/// The peer of a connected socket.
#[cgroup_sock_addr(getpeername4)]
fn getpeername4(ctx: SockAddrContext) -> i32 {
    translate::to_service(&Ipv4(ctx));
    PROCEED
}

/// As `getpeername4`, on IPv6 sockets.
#[cgroup_sock_addr(getpeername6)]
fn getpeername6(ctx: SockAddrContext) -> i32 {
    name_service_on_ipv6_socket(ctx)
}

#[inline(always)]
fn name_service_on_ipv6_socket(ctx: SockAddrContext) -> i32 {
    match OfIpv6Socket::new(ctx) {
        OfIpv6Socket::Mapped(call) => translate::to_service(&call),
        OfIpv6Socket::Ipv6(call) => translate::to_service(&call),
    }
    PROCEED
}

/// A closed socket needs no translation any more.
#[cgroup_sock(sock_release)]
fn sock_release(ctx: SockContext) -> i32 {
    translate::forget(&ctx);
    PROCEED
}

/// What befalls TCP sockets.
#[sock_ops]
fn tcp_events(ctx: SockOpsContext) -> u32 {
    tcp_events::note(&ctx);
    PROCEED as u32
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The helpers that the programs call are for programs under a licence that is compatible with the GPL.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";
