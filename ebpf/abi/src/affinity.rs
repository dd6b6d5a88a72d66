//! `sessionAffinity: ClientIP`: which client keeps which backend. One map serves both families: addresses are in IPv6 form.

use crate::{FrontendKey6, SocketAddress, SocketAddress6};

/// A client and the Service port that it calls. A client is a network namespace: when a socket connects it has no source
/// address yet, and the sockets of a pod share one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct AffinityKey {
    /// The kernel's cookie of the network namespace: never used twice while the host is up.
    pub netns: u64,
    /// The Service's address, port and protocol.
    pub frontend: FrontendKey6,
}

/// The backend that a client keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Affinity {
    /// Where it is.
    pub backend: SocketAddress6,
    /// When the client last connected, in nanoseconds of the kernel's monotonic clock.
    pub used: u64,
}

impl From<SocketAddress> for SocketAddress6 {
    /// The IPv4-mapped form (RFC 4291, section 2.5.5.2).
    #[inline(always)]
    fn from(address: SocketAddress) -> Self {
        Self::from_network([0, 0, 0xffff_u32.to_be(), address.network_address()], address.network_port())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ipv4_addresses_take_their_mapped_form() {
        let mapped = SocketAddress6::from(SocketAddress::new([10, 96, 0, 20], 80));
        assert_eq!(mapped.octets(), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 96, 0, 20]);
        assert_eq!(mapped.port(), 80);
        assert_eq!((size_of::<AffinityKey>(), size_of::<Affinity>()), (32, 32), "no padding");
    }
}
