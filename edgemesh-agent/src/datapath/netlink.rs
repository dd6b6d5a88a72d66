//! Netlink in small: requests that are acknowledged, batches, dumps, and attributes (netlink(7)). What is asked is answered
//! from the kernel's memory, so callers wait.

use std::{
    io::{self, Read, Write},
    time::Duration,
};

use nix::sys::socket::{setsockopt, sockopt};
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
/// Begin and end of a batch (linux/netfilter/nfnetlink.h).
const NFNL_MSG_BATCH_BEGIN: u16 = 16;
const NFNL_MSG_BATCH_END: u16 = 17;
/// Type bits of an attribute; the others say that it is nested, or in network byte order.
const ATTRIBUTE_TYPE: u16 = 0x3fff;
/// An attribute that holds attributes.
const NESTED: u16 = 0x8000;
/// Requests that are sent together: their acknowledgements must fit into the socket's buffer.
const BATCH: usize = 64;
const PATIENCE: Duration = Duration::from_secs(2);
/// Bytes that can be sent and received without larger buffers in the kernel than sockets have.
const SMALL: usize = 64 << 10;

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

/// Why a batch is not done.
#[derive(Debug)]
pub(super) struct Refused {
    /// Index of the request that was refused first, unless it is the batch that was.
    pub(super) request: Option<usize>,
    pub(super) error: io::Error,
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Self {
        Self { request: None, error }
    }
}

impl Netlink {
    /// Opens a socket of a netlink family (`NETLINK_ROUTE`, ...).
    pub(super) fn open(family: libc::c_int) -> io::Result<Self> {
        let socket = Socket::new(Domain::from(libc::AF_NETLINK), Type::RAW, Some(family.into()))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(Self { socket, buffer: vec![0; SMALL] })
    }

    /// Sends requests; the outcome of each in their order.
    pub(super) fn send(&mut self, requests: &[Request]) -> io::Result<Vec<io::Result<()>>> {
        let mut outcomes = Vec::with_capacity(requests.len());
        for batch in requests.chunks(BATCH) {
            let mut bytes = Vec::new();
            for request in batch {
                let flags = request.flags | NLM_F_REQUEST | NLM_F_ACK;
                message(&mut bytes, request.kind, flags, 0, &request.body);
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

    /// Sends requests of which one of netfilter's subsystems does all or none. None may be larger than half of [`SMALL`]: a
    /// refusal repeats it.
    pub(super) fn send_batch(&mut self, subsystem: u16, requests: &[Request]) -> Result<(), Refused> {
        let Ok(last) = u32::try_from(requests.len()) else { return Err(Refused::from(io::Error::other("too many"))) };
        if last == 0 {
            return Ok(());
        }
        let mut bytes = Vec::new();
        message(&mut bytes, NFNL_MSG_BATCH_BEGIN, NLM_F_REQUEST, 0, &nfgenmsg(0, subsystem));
        for (request, number) in requests.iter().zip(1..) {
            // The acknowledgement of the last is that of all: refusals of others come before it.
            let flags = request.flags | NLM_F_REQUEST | if number == last { NLM_F_ACK } else { 0 };
            message(&mut bytes, request.kind, flags, number, &request.body);
        }
        message(&mut bytes, NFNL_MSG_BATCH_END, NLM_F_REQUEST, 0, &nfgenmsg(0, subsystem));
        if bytes.len() > SMALL {
            setsockopt(&self.socket, sockopt::SndBufForce, &bytes.len()).map_err(io::Error::from)?;
            setsockopt(&self.socket, sockopt::RcvBufForce, &bytes.len()).map_err(io::Error::from)?;
        }
        self.socket.write_all(&bytes)?;
        loop {
            let length = self.socket.read(&mut self.buffer)?;
            for (kind, body) in messages(&self.buffer[..length]) {
                if kind != NLMSG_ERROR {
                    continue;
                }
                // Behind the outcome stands the header of what it is about.
                let number = body.get(12..16).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_ne_bytes);
                match acknowledged(body) {
                    Ok(()) if number == last => return Ok(()),
                    Ok(()) => {}
                    Err(error) => return Err(Refused { request: (number as usize).checked_sub(1), error }),
                }
            }
        }
    }

    /// Has objects listed, and calls `each` with the body of every message.
    pub(super) fn dump(&mut self, kind: u16, body: &[u8], mut each: impl FnMut(&[u8])) -> io::Result<()> {
        let mut bytes = Vec::new();
        message(&mut bytes, kind, NLM_F_REQUEST | NLM_F_DUMP, 0, body);
        self.socket.write_all(&bytes)?;
        loop {
            let length = self.socket.read(&mut self.buffer)?;
            for (kind, body) in messages(&self.buffer[..length]) {
                match kind {
                    // With the error that ended it, if one did.
                    NLMSG_DONE if body.len() >= 4 => return acknowledged(body),
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => return acknowledged(body),
                    _ => each(body),
                }
            }
        }
    }
}

/// `struct nfgenmsg`, with which bodies of netfilter's messages begin.
pub(super) fn nfgenmsg(family: u8, resource: u16) -> [u8; 4] {
    let [high, low] = resource.to_be_bytes();
    [family, 0, high, low]
}

fn message(bytes: &mut Vec<u8>, kind: u16, flags: u16, number: u32, body: &[u8]) {
    bytes.extend(((HEADER + body.len()) as u32).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend(number.to_ne_bytes());
    bytes.extend([0; 4]);
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

/// Appends an attribute that holds those that `write` appends.
pub(super) fn nested(bytes: &mut Vec<u8>, kind: u16, write: impl FnOnce(&mut Vec<u8>)) {
    let at = bytes.len();
    attribute(bytes, kind | NESTED, &[]);
    write(bytes);
    let length = (bytes.len() - at) as u16;
    bytes[at..at + 2].copy_from_slice(&length.to_ne_bytes());
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
        message(&mut datagram, 7, 0, 0, &[1, 2, 3]);
        message(&mut datagram, 8, 0, 0, &[]);
        assert_eq!(messages(&datagram).collect::<Vec<_>>(), [(7, &[1, 2, 3][..]), (8, &[])]);
        for length in [0_u32, 3, 15, 4096, u32::MAX] {
            datagram[..4].copy_from_slice(&length.to_ne_bytes());
            assert_eq!(messages(&datagram).count(), 0, "{length}");
        }
        let mut body = Vec::new();
        nested(&mut body, 1, |body| attribute(body, 3, &[9]));
        attribute(&mut body, 2, &[]);
        let [outer, (2, [])] = attributes(&body).collect::<Vec<_>>()[..] else { panic!("{body:?}") };
        assert_eq!((outer.0, attributes(outer.1).collect::<Vec<_>>()), (1, vec![(3, &[9][..])]));
        for length in [0_u16, 3, 64, u16::MAX] {
            body[..2].copy_from_slice(&length.to_ne_bytes());
            assert_eq!(attributes(&body).count(), 0, "{length}");
        }
        assert!(acknowledged(&[]).is_err());
        assert_eq!(acknowledged(&(-2_i32).to_ne_bytes()).unwrap_err().raw_os_error(), Some(2));
    }
}
