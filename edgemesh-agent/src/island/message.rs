//! What nodes of one network tell one another while the cloud is away: a version, a count, and the endpoints of the sender with
//! what it holds of them. `docs/tunnel.md` has the format.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

/// The only version so far.
const VERSION: u8 = 1;
/// Endpoints in one message.
pub(super) const MAX_ENDPOINTS: usize = 2048;
/// Longest message, in bytes: the version, the count, and IPv6 endpoints only.
pub(super) const MAX_LENGTH: usize = 3 + MAX_ENDPOINTS * 20;

/// What a node holds of an endpoint of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Held {
    /// It doesn't answer.
    Dead,
    /// It was dead, and answers again.
    Back,
    /// It answers, and was never dead: what the API said last still holds, also that it isn't ready.
    AsKnown,
}

impl Held {
    /// What takes the place of the API's word, if anything.
    pub(super) fn answers(self) -> Option<bool> {
        match self {
            Self::Dead => Some(false),
            Self::Back => Some(true),
            Self::AsKnown => None,
        }
    }
}

/// Endpoints of one node.
pub(crate) type Report = BTreeMap<SocketAddr, Held>;

/// Why a message can't be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum MessageError {
    #[error("its version {0} is not known")]
    Version(u8),
    #[error("it has {0} endpoints, more than the limit")]
    TooMany(usize),
    #[error("it ends too early")]
    Short,
    #[error("it goes on after its end")]
    Long,
    #[error("an address is neither IPv4 nor IPv6")]
    Address,
    #[error("it says something unknown of an endpoint")]
    Held,
    #[error("an endpoint has port 0, or is there twice")]
    Endpoint,
}

/// The message for a report; endpoints above the limit are left out, so that receivers look at these themselves.
pub(super) fn encode(report: &Report) -> Vec<u8> {
    let count = report.len().min(MAX_ENDPOINTS);
    let mut bytes = vec![VERSION];
    bytes.extend_from_slice(&u16::try_from(count).unwrap_or(u16::MAX).to_be_bytes());
    for (endpoint, held) in report.iter().take(count) {
        match endpoint.ip() {
            IpAddr::V4(ip) => {
                bytes.push(4);
                bytes.extend_from_slice(&ip.octets());
            }
            IpAddr::V6(ip) => {
                bytes.push(16);
                bytes.extend_from_slice(&ip.octets());
            }
        }
        bytes.extend_from_slice(&endpoint.port().to_be_bytes());
        bytes.push(match held {
            Held::Dead => 0,
            Held::Back => 1,
            Held::AsKnown => 2,
        });
    }
    bytes
}

/// Reads a whole message.
pub(super) fn decode(bytes: &[u8]) -> Result<Report, MessageError> {
    let mut rest = bytes;
    let [version] = take(&mut rest)?;
    if version != VERSION {
        return Err(MessageError::Version(version));
    }
    let count = usize::from(u16::from_be_bytes(take(&mut rest)?));
    if count > MAX_ENDPOINTS {
        return Err(MessageError::TooMany(count));
    }
    let mut report = Report::new();
    for _ in 0..count {
        let ip = match take(&mut rest)? {
            [4] => IpAddr::from(take::<4>(&mut rest)?),
            [16] => IpAddr::from(take::<16>(&mut rest)?),
            _ => return Err(MessageError::Address),
        };
        let port = u16::from_be_bytes(take(&mut rest)?);
        let held = match take(&mut rest)? {
            [0] => Held::Dead,
            [1] => Held::Back,
            [2] => Held::AsKnown,
            _ => return Err(MessageError::Held),
        };
        if port == 0 || report.insert(SocketAddr::new(ip, port), held).is_some() {
            return Err(MessageError::Endpoint);
        }
    }
    if rest.is_empty() { Ok(report) } else { Err(MessageError::Long) }
}

fn take<const LENGTH: usize>(rest: &mut &[u8]) -> Result<[u8; LENGTH], MessageError> {
    let (taken, after) = rest.split_first_chunk::<LENGTH>().ok_or(MessageError::Short)?;
    *rest = after;
    Ok(*taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        [("10.244.1.5:80", Held::Dead), ("[fd00:1::5]:81", Held::Back), ("10.244.1.6:82", Held::AsKnown)]
            .into_iter()
            .map(|(endpoint, held)| (endpoint.parse().unwrap(), held))
            .collect()
    }

    #[test]
    fn a_report_arrives_as_it_was_sent_and_nothing_shorter_or_longer_does() {
        let bytes = encode(&report());
        assert_eq!(decode(&bytes), Ok(report()));
        for end in 0..bytes.len() {
            assert_eq!(decode(&bytes[..end]), Err(MessageError::Short));
        }
        assert_eq!(decode(&[&bytes[..], &[0]].concat()), Err(MessageError::Long));
    }

    #[test]
    fn garbage_unknown_versions_and_too_many_endpoints_are_errors() {
        assert_eq!(decode(&[2, 0, 0]), Err(MessageError::Version(2)));
        assert_eq!(decode(b"GET / HTTP/1.1\r\n\r\n"), Err(MessageError::Version(b'G')));
        assert_eq!(decode(&[1, 0x08, 0x01]), Err(MessageError::TooMany(2049)));
        assert_eq!(decode(&[1, 0, 1, 5, 1, 2, 3, 4, 0, 80, 0]), Err(MessageError::Address));
        assert_eq!(decode(&[1, 0, 1, 4, 1, 2, 3, 4, 0, 80, 3]), Err(MessageError::Held));
        assert_eq!(decode(&[1, 0, 1, 4, 1, 2, 3, 4, 0, 0, 0]), Err(MessageError::Endpoint));
        let twice = [1, 0, 2, 4, 1, 2, 3, 4, 0, 80, 0, 4, 1, 2, 3, 4, 0, 80, 1];
        assert_eq!(decode(&twice), Err(MessageError::Endpoint));
    }

    #[test]
    fn endpoints_above_the_limit_are_left_out() {
        let all: Report =
            (1..=3000).map(|port| (SocketAddr::new("fd00::1".parse().unwrap(), port), Held::Dead)).collect();
        let bytes = encode(&all);
        assert_eq!(bytes.len(), MAX_LENGTH);
        assert_eq!(decode(&bytes).unwrap().len(), MAX_ENDPOINTS);
    }
}
