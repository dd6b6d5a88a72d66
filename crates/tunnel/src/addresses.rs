//! Which of this endpoint's addresses are published.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv6Addr},
};

use libp2p::{Multiaddr, PeerId, multiaddr::Protocol};

use crate::{config::TunnelConfig, connections::Route};

/// The addresses at which the endpoint listens now, and the rules for publishing them.
#[derive(Debug)]
pub(crate) struct OwnAddresses {
    own: PeerId,
    advertise: Vec<Multiaddr>,
    exclude: Vec<(IpAddr, u8)>,
    /// Addresses that the configuration names; they are published even where the rules say no.
    configured: Vec<IpAddr>,
    listening: BTreeSet<Multiaddr>,
}

impl OwnAddresses {
    pub(crate) fn new(config: &TunnelConfig, own: PeerId) -> Self {
        Self {
            own,
            advertise: config.advertise.clone(),
            exclude: config.exclude.clone(),
            configured: config.listen.iter().filter_map(ip_of).filter(|ip| !ip.is_unspecified()).collect(),
            listening: BTreeSet::new(),
        }
    }

    pub(crate) fn add(&mut self, address: Multiaddr) {
        self.listening.insert(self.bare(address));
    }

    pub(crate) fn remove(&mut self, address: &Multiaddr) {
        self.listening.remove(&self.bare(address.clone()));
    }

    /// Direct addresses for others to dial.
    pub(crate) fn direct(&self) -> Vec<Multiaddr> {
        let found = self
            .listening
            .iter()
            .filter(|address| !Route::of_address(address).is_relayed())
            .filter(|address| ip_of(address).is_some_and(|ip| self.is_publishable(ip)))
            .filter(|address| !self.advertise.contains(address));
        self.advertise.iter().chain(found).cloned().collect()
    }

    /// Everything to publish: direct addresses, then circuits.
    pub(crate) fn published(&self) -> Vec<String> {
        let circuits = self.listening.iter().filter(|address| Route::of_address(address).is_relayed());
        self.direct().iter().chain(circuits).map(ToString::to_string).collect()
    }

    fn bare(&self, mut address: Multiaddr) -> Multiaddr {
        if address.iter().last() == Some(Protocol::P2p(self.own)) {
            address.pop();
        }
        address
    }

    fn is_publishable(&self, ip: IpAddr) -> bool {
        if self.configured.contains(&ip) {
            return true;
        }
        let link_local = match ip {
            IpAddr::V4(ip) => ip.is_link_local(),
            IpAddr::V6(ip) => ip.is_unicast_link_local(),
        };
        !(link_local
            || ip.is_loopback()
            || ip.is_unspecified()
            || self.exclude.iter().any(|(network, length)| contains(*network, *length, ip)))
    }
}

fn ip_of(address: &Multiaddr) -> Option<IpAddr> {
    match address.iter().next()? {
        Protocol::Ip4(ip) => Some(ip.into()),
        Protocol::Ip6(ip) => Some(ip.into()),
        _ => None,
    }
}

fn contains(network: IpAddr, length: u8, ip: IpAddr) -> bool {
    let (network, ip, width) = match (network, ip) {
        (IpAddr::V4(network), IpAddr::V4(ip)) => (u128::from(u32::from(network)), u128::from(u32::from(ip)), 32),
        (IpAddr::V6(network), IpAddr::V6(ip)) => (bits(network), bits(ip), 128),
        _ => return false,
    };
    let host_bits = width - u32::from(length).min(width);
    // A shift by the full width is undefined; everything is in a network of length zero.
    network.checked_shr(host_bits).unwrap_or(0) == ip.checked_shr(host_bits).unwrap_or(0)
}

fn bits(ip: Ipv6Addr) -> u128 {
    u128::from(ip)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(config: &TunnelConfig) -> OwnAddresses {
        let mut addresses = OwnAddresses::new(config, PeerId::random());
        for text in [
            "/ip4/127.0.0.1/tcp/4001",
            "/ip4/169.254.64.1/tcp/4001",
            "/ip4/10.244.1.1/tcp/4001",
            "/ip4/192.168.1.5/tcp/4001",
            "/ip6/fe80::1/tcp/4001",
        ] {
            addresses.add(text.parse().unwrap());
        }
        addresses
    }

    #[test]
    fn addresses_that_others_cannot_use_are_not_published() {
        let config = TunnelConfig {
            exclude: vec![("10.244.0.0".parse().unwrap(), 16)],
            ..TunnelConfig::new("/unused", "a", "agent", 4001)
        };
        assert_eq!(addresses(&config).published(), ["/ip4/192.168.1.5/tcp/4001"]);
    }

    #[test]
    fn configured_addresses_come_first_and_circuits_last() {
        let config = TunnelConfig {
            advertise: vec!["/ip4/203.0.113.9/tcp/4001".parse().unwrap()],
            ..TunnelConfig::new("/unused", "a", "agent", 4001)
        };
        let mut own = addresses(&config);
        let circuit = format!("/ip4/203.0.113.11/tcp/4001/p2p/{}/p2p-circuit", PeerId::random());
        own.add(format!("{circuit}/p2p/{}", own.own).parse().unwrap());
        let found = own.published();
        assert_eq!(found.first().unwrap(), "/ip4/203.0.113.9/tcp/4001");
        assert!(found.contains(&"/ip4/192.168.1.5/tcp/4001".to_owned()));
        assert_eq!(*found.last().unwrap(), circuit);
    }

    #[test]
    fn an_address_that_was_asked_for_is_published_even_on_loopback() {
        let config = TunnelConfig {
            listen: vec!["/ip4/127.0.0.1/tcp/4001".parse().unwrap()],
            ..TunnelConfig::new("/unused", "a", "agent", 4001)
        };
        assert!(addresses(&config).published().contains(&"/ip4/127.0.0.1/tcp/4001".to_owned()));
    }

    #[test]
    fn the_whole_address_space_contains_every_address() {
        assert!(contains("0.0.0.0".parse().unwrap(), 0, "10.1.2.3".parse().unwrap()));
        assert!(!contains("10.0.0.0".parse().unwrap(), 8, "11.0.0.1".parse().unwrap()));
    }
}
