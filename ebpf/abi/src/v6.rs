//! The IPv6 forms of the maps' keys and values: whole 64-bit words, as the IPv4 ones.

/// An IPv6 address and port, both in network byte order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct SocketAddress6 {
    address: [u64; 2],
    /// Bits 0–15 port, the rest zero.
    port: u64,
}

impl SocketAddress6 {
    /// From the four words of an address and a port whose bytes are in network order, as `struct sockaddr_in6` has them.
    #[inline(always)]
    pub const fn from_network(address: [u32; 4], port: u16) -> Self {
        Self { address: [join(address[0], address[1]), join(address[2], address[3])], port: port as u64 }
    }

    /// From the octets of an address and a port number.
    pub fn new(octets: [u8; 16], port: u16) -> Self {
        let word = |at: usize| u32::from_ne_bytes([octets[at], octets[at + 1], octets[at + 2], octets[at + 3]]);
        Self::from_network([word(0), word(4), word(8), word(12)], port.to_be())
    }

    /// The four words of the address, bytes in network order.
    #[inline(always)]
    pub const fn network_address(self) -> [u32; 4] {
        let [high, low] = self.address;
        [high as u32, (high >> 32) as u32, low as u32, (low >> 32) as u32]
    }

    /// The port, bytes in network order.
    #[inline(always)]
    pub const fn network_port(self) -> u16 {
        self.port as u16
    }

    /// The address' octets.
    pub fn octets(self) -> [u8; 16] {
        let mut octets = [0; 16];
        for (four, word) in octets.chunks_exact_mut(4).zip(self.network_address()) {
            four.copy_from_slice(&word.to_ne_bytes());
        }
        octets
    }

    /// The port number.
    pub const fn port(self) -> u16 {
        u16::from_be(self.network_port())
    }

    /// The words in a map.
    pub const fn to_words(self) -> [u64; 3] {
        [self.address[0], self.address[1], self.port]
    }

    /// From the words in a map.
    #[inline(always)]
    pub const fn from_words([high, low, port]: [u64; 3]) -> Self {
        Self { address: [high, low], port }
    }
}

#[inline(always)]
const fn join(low: u32, high: u32) -> u64 {
    low as u64 | (high as u64) << 32
}

/// A Service's IPv6 address, port and protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct FrontendKey6 {
    address: [u64; 2],
    /// Bits 0–15 port, 16–23 protocol, the rest zero.
    port_and_protocol: u64,
}

impl FrontendKey6 {
    /// The key of an address with the protocol [`crate::TCP`] or [`crate::UDP`].
    #[inline(always)]
    pub const fn new(address: SocketAddress6, protocol: u8) -> Self {
        Self { address: address.address, port_and_protocol: address.port | (protocol as u64) << 16 }
    }

    /// The key that stands for all ports of the address that have no frontend of their own: the one with port 0.
    #[inline(always)]
    pub const fn any_port(self) -> Self {
        Self { address: self.address, port_and_protocol: self.port_and_protocol & !0xffff }
    }

    /// The address and port.
    #[inline(always)]
    pub const fn address(self) -> SocketAddress6 {
        SocketAddress6 { address: self.address, port: self.port_and_protocol & 0xffff }
    }

    /// The protocol number.
    pub const fn protocol(self) -> u8 {
        (self.port_and_protocol >> 16) as u8
    }

    /// The words in a map.
    pub const fn to_words(self) -> [u64; 3] {
        [self.address[0], self.address[1], self.port_and_protocol]
    }

    /// From the words in a map.
    pub const fn from_words([high, low, port_and_protocol]: [u64; 3]) -> Self {
        Self { address: [high, low], port_and_protocol }
    }
}

/// One slot. Three words can't be read at once, so the last holds a check of the others: a slot that is being rewritten is
/// told by it, whatever order the processor's writes have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Backend6 {
    address: [u64; 2],
    /// Bits 0–15 port, 16–31 generation, 32–63 check.
    word: u64,
}

impl Backend6 {
    /// A backend in a slot of the generation.
    pub const fn new(address: SocketAddress6, generation: u16) -> Self {
        let low = address.port & 0xffff | (generation as u64) << 16;
        Self { address: address.address, word: low | check(address.address, low) << 32 }
    }

    /// The slot behind the backends of a frontend with affinity: the timeout in seconds.
    pub const fn timeout(seconds: u32, generation: u16) -> Self {
        Self::new(SocketAddress6 { address: [seconds as u64, 0], port: 0 }, generation)
    }

    /// The timeout in seconds in such a slot; nothing as for [`Backend6::address`].
    #[inline(always)]
    pub const fn seconds(self, generation: u16) -> Option<u32> {
        match self.address(generation) {
            Some(found) => Some(found.address[0] as u32),
            None => None,
        }
    }

    /// Where it is; nothing if the slot belongs to another generation or is half written.
    #[inline(always)]
    pub const fn address(self, generation: u16) -> Option<SocketAddress6> {
        let low = self.word & 0xffff_ffff;
        if (low >> 16) as u16 != generation || self.word >> 32 != check(self.address, low) {
            return None;
        }
        Some(SocketAddress6 { address: self.address, port: low & 0xffff })
    }

    /// The words in a map.
    pub const fn to_words(self) -> [u64; 3] {
        [self.address[0], self.address[1], self.word]
    }

    /// From the words in a map.
    #[inline(always)]
    pub const fn from_words([high, low, word]: [u64; 3]) -> Self {
        Self { address: [high, low], word }
    }
}

/// 32 bits that depend on every bit (multiplicative hashing, as for cookies).
#[inline(always)]
const fn check(address: [u64; 2], low: u64) -> u64 {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
    let mixed = address[0].wrapping_mul(ODD) ^ (address[1] ^ low).rotate_left(32);
    (mixed ^ mixed >> 29).wrapping_mul(ODD) >> 32
}

/// To whom a socket was connected last by a Service, as [`crate::Peer`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Peer6 {
    /// The backend's address.
    pub backend: SocketAddress6,
    /// The Service address that it named, and its protocol.
    pub service: FrontendKey6,
}

/// An unconnected socket, by its cookie, and a backend to which it sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct PeerKey6 {
    /// The kernel's cookie of the socket: never used twice while the host is up.
    pub cookie: u64,
    /// The backend's address.
    pub backend: SocketAddress6,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> SocketAddress6 {
        SocketAddress6::new([0xfd, 0, 0, 0x96, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, last], 8080)
    }

    #[test]
    fn packed_words_give_back_what_was_put_in() {
        let there = address(12);
        assert_eq!((there.octets()[0], there.octets()[15], there.port()), (0xfd, 12, 8080));
        assert_eq!(SocketAddress6::from_words(there.to_words()), there);
        let key = FrontendKey6::new(there, crate::UDP);
        assert_eq!((key.address(), key.protocol()), (there, crate::UDP));
        assert_eq!(FrontendKey6::from_words(key.to_words()), key);
        assert_eq!(key.any_port().address().port(), 0);
        assert_eq!(key.any_port().protocol(), crate::UDP);
        let backend = Backend6::new(there, u16::MAX);
        assert_eq!(Backend6::from_words(backend.to_words()).address(u16::MAX), Some(there));
        assert_eq!(backend.address(7), None);
        let timeout = Backend6::timeout(86_400, 7);
        assert_eq!((timeout.seconds(7), timeout.seconds(8)), (Some(86_400), None));
    }

    #[test]
    fn a_slot_that_is_half_rewritten_is_told() {
        for last in 0..=255 {
            let (old, new) = (Backend6::new(address(1), 5).to_words(), Backend6::new(address(last), 6).to_words());
            for mixture in [[new[0], new[1], old[2]], [old[0], new[1], old[2]]] {
                let read = Backend6::from_words(mixture).address(5);
                assert!(read.is_none() || read == Some(address(1)), "{last}: {read:?}");
            }
        }
    }
}
