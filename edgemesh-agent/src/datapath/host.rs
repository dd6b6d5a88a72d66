//! The addresses of this host, and its network namespace.

use std::{
    collections::HashSet,
    io,
    net::{IpAddr, UdpSocket},
    os::fd::AsRawFd as _,
};

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
