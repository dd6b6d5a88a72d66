//! The host's resolv.conf (resolv.conf(5)): which servers the node itself asks, and which domains it searches.

use std::{
    net::{IpAddr, SocketAddr},
    path::Path,
    time::Duration,
};

/// How often the file is looked at.
pub(super) const RELOAD_EVERY: Duration = Duration::from_secs(5);
/// More text than any resolv.conf has.
const MAX_BYTES: u64 = 64 << 10;
/// glibc uses three; the rest would only delay failures.
const MAX_SERVERS: usize = 3;

/// What a file says.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct HostResolver {
    /// The servers, at most three.
    pub(super) servers: Vec<SocketAddr>,
    /// The domains that names are searched in, in order.
    pub(super) searches: Vec<String>,
}

/// Reads a file.
///
/// # Errors
/// A file that can't be read or is too large.
pub(super) fn read(path: &Path) -> std::io::Result<HostResolver> {
    let size = std::fs::metadata(path)?.len();
    if size > MAX_BYTES {
        return Err(std::io::Error::other(format!("{size} bytes, the limit is {MAX_BYTES}")));
    }
    Ok(parse(&std::fs::read_to_string(path)?))
}

fn parse(text: &str) -> HostResolver {
    let (mut servers, mut searches) = (Vec::new(), Vec::new());
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        match words.next() {
            Some("nameserver") => {
                // A scope (`fe80::1%eth0`) needs an interface, which a forwarded query doesn't have.
                let Some(ip) = words.next().and_then(|word| word.parse::<IpAddr>().ok()) else { continue };
                let server = SocketAddr::new(ip, 53);
                if !servers.contains(&server) && servers.len() < MAX_SERVERS {
                    servers.push(server);
                }
            }
            // The last one counts.
            Some("search" | "domain") => searches = words.filter(|word| *word != ".").map(str::to_owned).collect(),
            _ => {}
        }
    }
    HostResolver { servers, searches }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_usable_nameserver_lines_count() {
        let text = "# nameserver 9.9.9.9\nsearch lan\nnameserver 192.168.1.1\n nameserver\t192.168.1.2 # second\n\
                    nameserver fe80::1%eth0\nnameserver ::1\nnameserver 192.168.1.1\nnameserver\noptions ndots:1\n\
                    nameserver 8.8.8.8";
        let found: Vec<String> = parse(text).servers.iter().map(ToString::to_string).collect();
        assert_eq!(found, ["192.168.1.1:53", "192.168.1.2:53", "[::1]:53"]);
    }

    #[test]
    fn the_last_search_list_counts() {
        assert_eq!(
            parse("domain old.example\nsearch lan.example . corp.example\n").searches,
            ["lan.example", "corp.example"]
        );
        assert!(parse("nameserver ::1\n").searches.is_empty());
    }
}
