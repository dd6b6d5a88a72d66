//! The socket addresses of a call, as the kernel shows them to cgroup programs.

use aya_ebpf::{
    EbpfContext,
    bindings::bpf_sock_addr,
    helpers::{bpf_get_netns_cookie, bpf_get_socket_cookie},
    programs::SockAddrContext,
};
use edgemesh_ebpf_abi::{SocketAddress, SocketAddress6};

use crate::families::{Family, Socket, V4, V6};

/// Address family of IPv4 sockets.
pub const AF_INET: u32 = 2;
/// Address family of IPv6 sockets, which IPv4 addresses in mapped form have too.
pub const AF_INET6: u32 = 10;

/// A call with a socket address that a program may read and change.
pub trait SocketCall {
    /// The family of the address.
    type Family: Family;

    /// The call's context.
    fn context(&self) -> &SockAddrContext;
    /// The address of the call.
    fn address(&self) -> <Self::Family as Family>::Address;
    /// Puts another address into the call.
    fn set_address(&self, address: <Self::Family as Family>::Address);

    /// The socket's protocol number.
    #[inline(always)]
    fn protocol(&self) -> u32 {
        read(&raw const raw(self.context()).protocol)
    }

    /// The socket's cookie.
    #[inline(always)]
    fn cookie(&self) -> u64 {
        // SAFETY: the helper takes the context of these program types.
        unsafe { bpf_get_socket_cookie(self.context().as_ptr()) }
    }

    /// The socket with its peer, if it has one at this moment.
    #[inline(always)]
    fn socket(&self) -> Socket {
        // SAFETY: the union has one field that is used in programs.
        let raw = read(unsafe { &raw const raw(self.context()).__bindgen_anon_1.sk });
        // SAFETY: the kernel gives a valid socket for the length of the program.
        let port = read(unsafe { &raw const (*raw).dst_port });
        Socket { cookie: self.cookie(), connected: port != 0 }
    }

    /// The cookie of the socket's network namespace.
    #[inline(always)]
    fn netns(&self) -> u64 {
        // SAFETY: the helper takes the context of these program types.
        unsafe { bpf_get_netns_cookie(self.context().as_ptr()) }
    }
}

/// A call of an IPv4 socket.
pub struct Ipv4(pub SockAddrContext);

impl SocketCall for Ipv4 {
    type Family = V4;

    #[inline(always)]
    fn context(&self) -> &SockAddrContext {
        &self.0
    }

    #[inline(always)]
    fn address(&self) -> SocketAddress {
        let address = raw(&self.0);
        SocketAddress::from_network(read(&raw const address.user_ip4), read(&raw const address.user_port) as u16)
    }

    #[inline(always)]
    fn set_address(&self, address: SocketAddress) {
        let raw = self.0.sock_addr;
        // SAFETY: the kernel lets programs of these types write the two fields.
        unsafe {
            (&raw mut (*raw).user_ip4).write_volatile(address.network_address());
            (&raw mut (*raw).user_port).write_volatile(u32::from(address.network_port()));
        }
    }
}

/// A call of an IPv6 socket with an IPv4-mapped address (RFC 4291, section 2.5.5.2).
pub struct MappedIpv6(SockAddrContext);

impl SocketCall for MappedIpv6 {
    type Family = V4;

    #[inline(always)]
    fn context(&self) -> &SockAddrContext {
        &self.0
    }

    #[inline(always)]
    fn address(&self) -> SocketAddress {
        let address = raw(&self.0);
        SocketAddress::from_network(read(&raw const address.user_ip6[3]), read(&raw const address.user_port) as u16)
    }

    #[inline(always)]
    fn set_address(&self, address: SocketAddress) {
        let raw = self.0.sock_addr;
        // SAFETY: the kernel lets programs of these types write the two fields.
        unsafe {
            (&raw mut (*raw).user_ip6[3]).write_volatile(address.network_address());
            (&raw mut (*raw).user_port).write_volatile(u32::from(address.network_port()));
        }
    }
}

/// A call of an IPv6 socket with an IPv6 address.
pub struct Ipv6(SockAddrContext);

impl SocketCall for Ipv6 {
    type Family = V6;

    #[inline(always)]
    fn context(&self) -> &SockAddrContext {
        &self.0
    }

    #[inline(always)]
    fn address(&self) -> SocketAddress6 {
        let address = raw(&self.0);
        let word = |at: usize| read(&raw const address.user_ip6[at]);
        let words = [word(0), word(1), word(2), word(3)];
        SocketAddress6::from_network(words, read(&raw const address.user_port) as u16)
    }

    #[inline(always)]
    fn set_address(&self, address: SocketAddress6) {
        let raw = self.0.sock_addr;
        let [first, second, third, fourth] = address.network_address();
        // SAFETY: the kernel lets programs of these types write the fields.
        unsafe {
            (&raw mut (*raw).user_ip6[0]).write_volatile(first);
            (&raw mut (*raw).user_ip6[1]).write_volatile(second);
            (&raw mut (*raw).user_ip6[2]).write_volatile(third);
            (&raw mut (*raw).user_ip6[3]).write_volatile(fourth);
            (&raw mut (*raw).user_port).write_volatile(u32::from(address.network_port()));
        }
    }
}

/// A call of an IPv6 socket, by the kind of its address.
pub enum OfIpv6Socket {
    /// An IPv4 address.
    Mapped(MappedIpv6),
    /// An IPv6 address.
    Ipv6(Ipv6),
}

impl OfIpv6Socket {
    /// Looks at the address.
    #[inline(always)]
    pub fn new(context: SockAddrContext) -> Self {
        let address = raw(&context);
        let word = |at: usize| read(&raw const address.user_ip6[at]);
        let mapped = is_mapped([word(0), word(1), word(2)]);
        if mapped { Self::Mapped(MappedIpv6(context)) } else { Self::Ipv6(Ipv6(context)) }
    }
}

/// Whether an IPv6 address, by its first three words, is an IPv4 one in mapped form.
#[inline(always)]
pub fn is_mapped(words: [u32; 3]) -> bool {
    words == [0, 0, 0xffff_u32.to_be()]
}

#[inline(always)]
fn raw(context: &SockAddrContext) -> &bpf_sock_addr {
    // SAFETY: the kernel gives a valid context for the length of the program.
    unsafe { &*context.sock_addr }
}

/// Reads one field of a context by itself. The verifier refuses the wider loads into which the compiler could merge
/// neighbouring fields.
#[inline(always)]
pub fn read<T: Copy>(field: *const T) -> T {
    // SAFETY: the pointer is to a field of a valid context.
    unsafe { field.read_volatile() }
}
