//! Address ranges in CIDR notation (RFC 4632, RFC 4291).

use std::{fmt, net::IpAddr};

/// A range of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cidr {
    network: IpAddr,
    prefix: u8,
}

impl Cidr {
    /// Reads `10.244.1.0/24` or `fd00::/64`; host bits are cleared.
    pub fn parse(text: &str) -> Option<Self> {
        let (address, prefix) = text.trim().split_once('/')?;
        Self::new(address.parse().ok()?, prefix.parse().ok()?)
    }

    /// Reads a range and refuses one whose host bits aren't clear, which is likely to be a mistake in a setting.
    pub fn parse_network(text: &str) -> Option<Self> {
        let (address, _) = text.split_once('/')?;
        Self::parse(text).filter(|range| address.parse() == Ok(range.network))
    }

    /// The range of a length in which an address is; nothing if addresses are shorter than that.
    pub fn new(address: IpAddr, prefix: u8) -> Option<Self> {
        let bits = if address.is_ipv4() { 32 } else { 128 };
        (prefix <= bits).then(|| Self { network: masked(address, prefix), prefix })
    }

    /// Whether an address is in the range.
    pub fn contains(&self, ip: IpAddr) -> bool {
        ip.is_ipv4() == self.network.is_ipv4() && masked(ip, self.prefix) == self.network
    }

    /// Whether the ranges have an address in common: one of them then holds the other.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.contains(other.network) || other.contains(self.network)
    }

    /// Last address of the range.
    pub fn last(&self) -> IpAddr {
        match self.network {
            IpAddr::V4(v4) => {
                IpAddr::V4((u32::from(v4) | u32::MAX.checked_shr(u32::from(self.prefix)).unwrap_or(0)).into())
            }
            IpAddr::V6(v6) => {
                IpAddr::V6((u128::from(v6) | u128::MAX.checked_shr(u32::from(self.prefix)).unwrap_or(0)).into())
            }
        }
    }

    /// How many bits of an address the range leaves open.
    pub fn host_bits(&self) -> u8 {
        let bits = if self.network.is_ipv4() { 32 } else { 128 };
        bits - self.prefix
    }

    /// The address so far behind the first one, which has the number 0; none beyond the range.
    pub fn nth(&self, offset: u128) -> Option<IpAddr> {
        let address = match self.network {
            IpAddr::V4(v4) => IpAddr::V4(u32::from(v4).checked_add(u32::try_from(offset).ok()?)?.into()),
            IpAddr::V6(v6) => IpAddr::V6(u128::from(v6).checked_add(offset)?.into()),
        };
        Some(address).filter(|address| self.contains(*address))
    }

    /// First address of the range.
    pub fn network(&self) -> IpAddr {
        self.network
    }

    /// Length of the prefix, in bits.
    pub fn prefix(&self) -> u8 {
        self.prefix
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix)
    }
}

impl serde::Serialize for Cidr {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

fn masked(ip: IpAddr, prefix: u8) -> IpAddr {
    match ip {
        IpAddr::V4(v4) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
            IpAddr::V4((u32::from(v4) & mask).into())
        }
        IpAddr::V6(v6) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0);
            IpAddr::V6((u128::from(v6) & mask).into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_overlap_when_one_holds_the_other_and_know_their_last_address() {
        let range = |text| Cidr::parse(text).unwrap();
        for (one, other, overlap) in [
            ("10.244.0.0/16", "10.244.7.0/24", true),
            ("10.244.7.0/24", "10.244.8.0/24", false),
            ("0.0.0.0/0", "10.244.8.0/24", true),
            ("::/0", "10.244.8.0/24", false),
            ("fd00::/64", "fd00::5/128", true),
        ] {
            assert_eq!(range(one).overlaps(&range(other)), overlap, "{one} {other}");
            assert_eq!(range(other).overlaps(&range(one)), overlap, "{other} {one}");
        }
        for (text, last) in [
            ("10.244.7.0/24", "10.244.7.255"),
            ("10.244.7.9/32", "10.244.7.9"),
            ("0.0.0.0/0", "255.255.255.255"),
            ("fd00::/112", "fd00::ffff"),
        ] {
            assert_eq!(range(text).last(), last.parse::<IpAddr>().unwrap());
        }
        assert_eq!(range("10.244.7.9/24").to_string(), "10.244.7.0/24");
        assert_eq!(range("10.244.7.0/24").nth(255), "10.244.7.255".parse().ok());
        assert_eq!((range("10.244.7.0/24").nth(256), range("10.244.7.0/24").nth(1 << 40)), (None, None));
        assert_eq!(range("fd00:0:0:1::/64").nth(1 << 63), "fd00:0:0:1:8000::".parse().ok());
    }

    #[test]
    fn ranges_hold_their_addresses_and_refuse_bad_text() {
        let table = [
            ("10.244.1.7/24", "10.244.1.255", true),
            ("10.244.1.0/24", "10.244.2.0", false),
            ("0.0.0.0/0", "1.2.3.4", true),
            ("10.0.0.1/32", "10.0.0.1", true),
            ("fd00::/64", "fd00::1", true),
            ("fd00::/64", "10.0.0.1", false),
            ("::/0", "fd00::1", true),
        ];
        for (range, address, inside) in table {
            assert_eq!(Cidr::parse(range).unwrap().contains(address.parse().unwrap()), inside, "{range} {address}");
        }
        assert_eq!(Cidr::parse_network("fd00:0::/64"), Cidr::parse("fd00::/64"));
        assert_eq!((Cidr::parse_network("10.0.0.1/24"), Cidr::parse_network(" 10.0.0.0/24")), (None, None));
        for bad in ["", "10.0.0.0", "10.0.0.0/33", "10.0.0.0/-1", "x/8", "fd00::/129"] {
            assert_eq!(Cidr::parse(bad), None, "{bad}");
        }
    }
}
