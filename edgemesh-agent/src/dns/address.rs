//! How an upstream server is written in the settings: `10.0.0.53:53`, or `tls://1.1.1.1:853#cloudflare-dns.com`.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
};

use rustls::pki_types::ServerName;

/// Port of DNS (RFC 1035).
const PORT: u16 = 53;
/// Port of DNS over TLS (RFC 7858).
const TLS_PORT: u16 = 853;

/// An upstream server and how it is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpstreamAddress {
    /// Its address and port.
    pub address: SocketAddr,
    /// Over TLS: the name that its certificate must be for, or an IP address. None means UDP and TCP.
    pub tls: Option<String>,
}

/// Why a text is no upstream server.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no upstream: {problem}")]
pub struct NoUpstream {
    text: String,
    problem: &'static str,
}

impl From<SocketAddr> for UpstreamAddress {
    fn from(address: SocketAddr) -> Self {
        Self { address, tls: None }
    }
}

impl FromStr for UpstreamAddress {
    type Err = NoUpstream;

    fn from_str(text: &str) -> Result<Self, NoUpstream> {
        let wrong = |problem| NoUpstream { text: text.to_owned(), problem };
        let (over_tls, rest) = match text.split_once("://") {
            Some(("tls", rest)) => (true, rest),
            Some(_) => return Err(wrong("the only scheme is tls://")),
            None => (false, text),
        };
        let (place, name) = match rest.split_once('#') {
            Some((place, name)) => (place, Some(name)),
            None => (rest, None),
        };
        let port = if over_tls { TLS_PORT } else { PORT };
        let bare = place.strip_prefix('[').and_then(|p| p.strip_suffix(']')).unwrap_or(place);
        let address = match (place.parse::<SocketAddr>(), bare.parse::<IpAddr>()) {
            (Ok(address), _) => address,
            (Err(_), Ok(ip)) => SocketAddr::new(ip, port),
            (Err(_), Err(_)) => return Err(wrong("must be an IP address, with or without a port")),
        };
        if address.port() == 0 {
            return Err(wrong("the port must not be 0"));
        }
        let tls = match (over_tls, name) {
            (false, None) => None,
            (false, Some(_)) => return Err(wrong("a name after # is for tls:// only")),
            (true, name) => {
                let name = name.map_or_else(|| address.ip().to_string(), str::to_owned);
                if ServerName::try_from(name.as_str()).is_err() {
                    return Err(wrong("what follows # must be the name in the server's certificate"));
                }
                Some(name)
            }
        };
        Ok(Self { address, tls })
    }
}

impl fmt::Display for UpstreamAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.tls {
            None => write!(f, "{}", self.address),
            Some(name) => write!(f, "tls://{}#{name}", self.address),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn upstreams_are_written_with_or_without_port_and_name() {
        for (text, means) in [
            ("10.0.0.53:5353", "10.0.0.53:5353"),
            ("10.0.0.53", "10.0.0.53:53"),
            ("fd00::53", "[fd00::53]:53"),
            ("[fd00::53]", "[fd00::53]:53"),
            ("tls://1.1.1.1", "tls://1.1.1.1:853#1.1.1.1"),
            ("tls://1.1.1.1:8853#cloudflare-dns.com", "tls://1.1.1.1:8853#cloudflare-dns.com"),
            ("tls://[2606:4700::1111]#one.one.one.one", "tls://[2606:4700::1111]:853#one.one.one.one"),
        ] {
            let read: UpstreamAddress = text.parse().unwrap();
            assert_eq!(read.to_string(), means);
            assert_eq!(means.parse(), Ok(read));
        }
        for text in [
            "",
            "dns.example:53",
            "1.1.1.1:0",
            "https://1.1.1.1",
            "1.1.1.1#name",
            "tls://1.1.1.1#",
            "tls://1.1.1.1#a b",
        ] {
            assert!(text.parse::<UpstreamAddress>().is_err(), "{text}");
        }
    }
}
