//! The addresses of this host.

use std::{collections::HashSet, net::IpAddr};

use nix::ifaddrs::getifaddrs;

/// The addresses of the interfaces in this network namespace. None when they can't be read.
pub(crate) fn addresses() -> HashSet<IpAddr> {
    let interfaces = match getifaddrs() {
        Ok(interfaces) => interfaces,
        Err(error) => {
            tracing::warn!(%error, "the host's addresses can't be read: externalIPs are not served, nor calls of pods from other networks");
            return HashSet::new();
        }
    };
    let address = |storage: nix::sys::socket::SockaddrStorage| -> Option<IpAddr> {
        let v4 = storage.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
        v4.or_else(|| storage.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
    };
    interfaces.filter_map(|interface| interface.address.and_then(address)).collect()
}
