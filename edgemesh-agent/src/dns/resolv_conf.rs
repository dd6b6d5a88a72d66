//! The host's resolv.conf (resolv.conf(5)): which servers the node itself asks.

use std::{
    net::{IpAddr, SocketAddr},
    path::Path,
};

/// More text than any resolv.conf has.
const MAX_BYTES: u64 = 64 << 10;
/// glibc uses three; the rest would only delay failures.
const MAX_SERVERS: usize = 3;

/// The servers that a file names.
///
/// # Errors
/// A file that can't be read or is too large.
pub(super) fn read(path: &Path) -> std::io::Result<Vec<SocketAddr>> {
    let size = std::fs::metadata(path)?.len();
    if size > MAX_BYTES {
        return Err(std::io::Error::other(format!("{size} bytes, the limit is {MAX_BYTES}")));
    }
    Ok(servers(&std::fs::read_to_string(path)?))
}

fn servers(text: &str) -> Vec<SocketAddr> {
    let mut found = Vec::new();
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        if words.next() != Some("nameserver") {
            continue;
        }
        // A scope (`fe80::1%eth0`) needs an interface, which a forwarded query doesn't have.
        let Some(ip) = words.next().and_then(|word| word.parse::<IpAddr>().ok()) else { continue };
        let server = SocketAddr::new(ip, 53);
        if !found.contains(&server) && found.len() < MAX_SERVERS {
            found.push(server);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_usable_nameserver_lines_count() {
        let text = "# nameserver 9.9.9.9\nsearch lan\nnameserver 192.168.1.1\n nameserver\t192.168.1.2 # second\n\
                    nameserver fe80::1%eth0\nnameserver ::1\nnameserver 192.168.1.1\nnameserver\noptions ndots:1\n\
                    nameserver 8.8.8.8";
        let found: Vec<String> = servers(text).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["192.168.1.1:53", "192.168.1.2:53", "[::1]:53"]);
    }
}
