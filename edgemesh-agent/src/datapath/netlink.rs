//! Netlink in small: requests that are acknowledged, dumps, and attributes (netlink(7)). What is asked is answered from the
//! kernel's memory, so callers wait.

use std::{
    io::{self, Read, Write},
    time::Duration,
};

use socket2::{Domain, Socket, Type};

pub(super) const NLM_F_REQUEST: u16 = 1;
pub(super) const NLM_F_ACK: u16 = 4;
pub(super) const NLM_F_DUMP: u16 = 0x300;
pub(super) const NLM_F_REPLACE: u16 = 0x100;
pub(super) const NLM_F_EXCL: u16 = 0x200;
pub(super) const NLM_F_CREATE: u16 = 0x400;
pub(super) const NLMSG_ERROR: u16 = 2;
pub(super) const NLMSG_DONE: u16 = 3;
/// Length of `struct nlmsghdr`.
pub(super) const HEADER: usize = 16;
/// Type bits of an attribute; the others say that it is nested, or in network byte order.
const ATTRIBUTE_TYPE: u16 = 0x3fff;
/// An attribute that holds attributes.
const NESTED: u16 = 0x8000;
/// Requests that are sent together: their acknowledgements must fit into the socket's buffer.
const BATCH: usize = 64;
const PATIENCE: Duration = Duration::from_secs(2);

/// A netlink socket of the network namespace in which the calling thread is when it is opened.
#[derive(Debug)]
pub(super) struct Netlink {
    socket: Socket,
    buffer: Vec<u8>,
}

/// A request: message type, flags beside those for requests and acknowledgements, and body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) kind: u16,
    pub(super) flags: u16,
    pub(super) body: Vec<u8>,
}

impl Netlink {
    /// Opens a socket of a netlink family (`NETLINK_ROUTE`, ...).
    pub(super) fn open(family: libc::c_int) -> io::Result<Self> {
        let socket = Socket::new(Domain::from(libc::AF_NETLINK), Type::RAW, Some(family.into()))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(Self { socket, buffer: vec![0; 64 << 10] })
    }

    /// Sends requests; the outcome of each in their order.
    pub(super) fn send(&mut self, requests: &[Request]) -> io::Result<Vec<io::Result<()>>> {
        let mut outcomes = Vec::with_capacity(requests.len());
        for batch in requests.chunks(BATCH) {
            let mut bytes = Vec::new();
            for request in batch {
                let flags = request.flags | NLM_F_REQUEST | NLM_F_ACK;
                message(&mut bytes, request.kind, flags, &request.body);
            }
            self.socket.write_all(&bytes)?;
            let until = outcomes.len() + batch.len();
            while outcomes.len() < until {
                let length = self.socket.read(&mut self.buffer)?;
                for (kind, body) in messages(&self.buffer[..length]) {
                    if kind == NLMSG_ERROR {
                        outcomes.push(acknowledged(body));
                    }
                }
            }
        }
        Ok(outcomes)
    }

    /// Has objects listed, and calls `each` with the body of every message.
    pub(super) fn dump(&mut self, kind: u16, body: &[u8], mut each: impl FnMut(&[u8])) -> io::Result<()> {
        let mut bytes = Vec::new();
        message(&mut bytes, kind, NLM_F_REQUEST | NLM_F_DUMP, body);
        self.socket.write_all(&bytes)?;
        loop {
            let length = self.socket.read(&mut self.buffer)?;
            for (kind, body) in messages(&self.buffer[..length]) {
                match kind {
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => return acknowledged(body),
                    _ => each(body),
                }
            }
        }
    }
}

fn message(bytes: &mut Vec<u8>, kind: u16, flags: u16, body: &[u8]) {
    bytes.extend(((HEADER + body.len()) as u32).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend(body);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// The messages in a datagram: type and body.
pub(super) fn messages(mut datagram: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(datagram.get(..4)?.try_into().ok()?) as usize;
        let kind = u16::from_ne_bytes(datagram.get(4..6)?.try_into().ok()?);
        let body = datagram.get(HEADER..length)?;
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, body))
    })
}

/// What an acknowledgement says.
pub(super) fn acknowledged(body: &[u8]) -> io::Result<()> {
    let number = body.get(..4).and_then(|bytes| bytes.try_into().ok()).map(i32::from_ne_bytes);
    match number {
        Some(0) => Ok(()),
        Some(number) => Err(io::Error::from_raw_os_error(number.saturating_neg())),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Appends an attribute.
pub(super) fn attribute(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    bytes.extend(((4 + value.len()) as u16).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// Appends an attribute that holds attributes.
pub(super) fn nested(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    attribute(bytes, kind | NESTED, value);
}

/// The attributes in a body, after its fixed part: type and value.
pub(super) fn attributes(mut body: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(body.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(body.get(2..4)?.try_into().ok()?);
        let value = body.get(4..length)?;
        body = body.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind & ATTRIBUTE_TYPE, value))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn malformed_datagrams_and_attributes_end_and_never_panic() {
        let mut datagram = Vec::new();
        message(&mut datagram, 7, 0, &[1, 2, 3]);
        message(&mut datagram, 8, 0, &[]);
        assert_eq!(messages(&datagram).collect::<Vec<_>>(), [(7, &[1, 2, 3][..]), (8, &[])]);
        for length in [0_u32, 3, 15, 4096, u32::MAX] {
            datagram[..4].copy_from_slice(&length.to_ne_bytes());
            assert_eq!(messages(&datagram).count(), 0, "{length}");
        }
        let mut body = Vec::new();
        nested(&mut body, 1, &[9]);
        attribute(&mut body, 2, &[]);
        assert_eq!(attributes(&body).collect::<Vec<_>>(), [(1, &[9][..]), (2, &[])]);
        for length in [0_u16, 3, 64, u16::MAX] {
            body[..2].copy_from_slice(&length.to_ne_bytes());
            assert_eq!(attributes(&body).count(), 0, "{length}");
        }
        assert!(acknowledged(&[]).is_err());
        assert_eq!(acknowledged(&(-2_i32).to_ne_bytes()).unwrap_err().raw_os_error(), Some(2));
    }
}
