//! The addresses of this host, and its network namespace.

use std::{
    collections::HashSet,
    io,
    net::{IpAddr, UdpSocket},
    os::fd::AsRawFd as _,
    time::{Duration, Instant},
};

use nix::ifaddrs::getifaddrs;

/// The addresses of the interfaces in this network namespace.
///
/// # Errors
/// When they can't be read, which needs a socket.
pub(crate) fn addresses() -> io::Result<HashSet<IpAddr>> {
    let interfaces = getifaddrs()?;
    let address = |storage: nix::sys::socket::SockaddrStorage| -> Option<IpAddr> {
        let v4 = storage.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
        v4.or_else(|| storage.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
    };
    Ok(interfaces.filter_map(|interface| interface.address.and_then(address)).collect())
}

/// The addresses of the interfaces as they were read last.
#[derive(Debug, Default)]
pub(crate) struct KnownAddresses {
    last: HashSet<IpAddr>,
    /// When that was.
    at: Option<Instant>,
    /// Whether they could not be read the last time, which is said once.
    is_old: bool,
}

impl KnownAddresses {
    /// Takes what [`addresses`] gave. Where that failed, what was known before holds: the host has hardly lost its addresses.
    pub(crate) fn update(&mut self, read: io::Result<HashSet<IpAddr>>) -> &HashSet<IpAddr> {
        match read {
            Ok(addresses) => *self = Self { last: addresses, at: Some(Instant::now()), is_old: false },
            Err(error) => {
                if !std::mem::replace(&mut self.is_old, true) {
                    tracing::warn!(%error, "the host's addresses can't be read: those that it had before are taken for its own");
                }
            }
        }
        &self.last
    }

    /// The addresses as they are now, or were within this time.
    pub(crate) fn within(&mut self, time: Duration) -> &HashSet<IpAddr> {
        if self.at.is_none_or(|at| at.elapsed() >= time) { self.update(addresses()) } else { &self.last }
    }
}

/// The cookie of the network namespace in which the calling thread is, by which programs know it.
///
/// # Errors
/// `ENOPROTOOPT` when the kernel, before Linux 5.14, has none; else when no socket can be opened.
pub(crate) fn netns_cookie() -> io::Result<u64> {
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `cookie`, for which any are valid.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_can_not_be_read_are_those_of_before() {
        let [one, other] = ["192.168.1.11", "192.168.1.12"].map(|ip| HashSet::from([ip.parse().unwrap()]));
        let no_descriptors = || Err(io::Error::from_raw_os_error(libc::EMFILE));
        let mut known = KnownAddresses::default();
        assert!(known.update(no_descriptors()).is_empty());
        assert_eq!(known.update(Ok(one.clone())), &one);
        assert_eq!(known.update(no_descriptors()), &one);
        assert_eq!(known.update(Ok(other.clone())), &other);
        assert_eq!(known.update(Ok(HashSet::new())), &HashSet::new(), "it has lost them");
    }
}
