//! The kernel's socket diagnostics: which sockets of a network namespace have a peer, and the end of one of them (netlink
//! family `NETLINK_SOCK_DIAG`, see sock_diag(7); `SOCK_DESTROY` needs `CONFIG_INET_DIAG_DESTROY` and CAP_NET_ADMIN).

use std::{
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use edgemesh_mesh::model::Protocol;
use socket2::{Domain, Socket, Type};

use super::netlink::{HEADER, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, acknowledged, messages};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
/// Length of `struct inet_diag_sockid`.
const ID: usize = 48;
/// Length of a request: `nlmsghdr` and `inet_diag_req_v2`.
const REQUEST: usize = HEADER + 8 + ID;
/// States of TCP sockets that have a peer and are not closed: all but TIME_WAIT, CLOSE, LISTEN and NEW_SYN_RECV.
const TCP_STATES: u32 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11;
/// A connected UDP socket is ESTABLISHED.
const UDP_STATES: u32 = 1 << 1;
/// The kernel answers from memory.
const PATIENCE: Duration = Duration::from_secs(2);

/// A socket that has a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Connected {
    /// Its cookie.
    pub(super) cookie: u64,
    /// Its own address and its peer's; IPv4 ones never in mapped form.
    pub(super) local: SocketAddr,
    pub(super) peer: SocketAddr,
    family: u8,
    protocol: Protocol,
    /// `struct inet_diag_sockid`.
    id: [u8; ID],
}

/// Diagnostics of one network namespace.
#[derive(Debug)]
pub(super) struct Diagnostics {
    socket: Socket,
    buffer: Vec<u8>,
}

impl Diagnostics {
    /// For the namespace in which the calling thread is now.
    pub(super) fn open() -> io::Result<Self> {
        let socket = Socket::new(Domain::from(libc::AF_NETLINK), Type::RAW, Some(libc::NETLINK_SOCK_DIAG.into()))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(Self { socket, buffer: vec![0; 32 << 10] })
    }

    /// Calls `each` for every socket of a protocol that has a peer.
    pub(super) fn connected(&mut self, protocol: Protocol, mut each: impl FnMut(Connected)) -> io::Result<()> {
        let states = match protocol {
            Protocol::Tcp => TCP_STATES,
            Protocol::Udp => UDP_STATES,
        };
        for family in [libc::AF_INET as u8, libc::AF_INET6 as u8] {
            let asked = request(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, family, protocol, states, &[0; ID]);
            self.socket.write_all(&asked)?;
            'answers: loop {
                let length = self.socket.read(&mut self.buffer)?;
                for (kind, body) in messages(&self.buffer[..length]) {
                    match kind {
                        NLMSG_DONE => break 'answers,
                        NLMSG_ERROR => {
                            acknowledged(body)?;
                            break 'answers;
                        }
                        _ => drop(connected(body, protocol).map(&mut each)),
                    }
                }
            }
        }
        Ok(())
    }

    /// Ends a socket: whoever waits for it gets `ECONNABORTED`.
    pub(super) fn destroy(&mut self, socket: &Connected) -> io::Result<()> {
        let asked = request(SOCK_DESTROY, NLM_F_ACK, socket.family, socket.protocol, 0, &socket.id);
        self.socket.write_all(&asked)?;
        let length = self.socket.read(&mut self.buffer)?;
        match messages(&self.buffer[..length]).next() {
            Some((NLMSG_ERROR, body)) => acknowledged(body),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

fn request(kind: u16, flags: u16, family: u8, protocol: Protocol, states: u32, id: &[u8; ID]) -> Vec<u8> {
    let protocol = match protocol {
        Protocol::Tcp => edgemesh_ebpf_abi::TCP,
        Protocol::Udp => edgemesh_ebpf_abi::UDP,
    };
    let mut bytes = Vec::with_capacity(REQUEST);
    bytes.extend((REQUEST as u32).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend((flags | NLM_F_REQUEST).to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend([family, protocol, 0, 0]);
    bytes.extend(states.to_ne_bytes());
    bytes.extend(id);
    bytes
}

/// Reads `struct inet_diag_msg`: family, state, timer, retrans, then the socket's id with ports, addresses, interface, cookie.
fn connected(body: &[u8], protocol: Protocol) -> Option<Connected> {
    let family = *body.first()?;
    let id: [u8; ID] = body.get(4..4 + ID)?.try_into().ok()?;
    let address = |port: usize, ip: usize| -> Option<SocketAddr> {
        let number = u16::from_be_bytes(id.get(port..port + 2)?.try_into().ok()?);
        let octets: [u8; 16] = id.get(ip..ip + 16)?.try_into().ok()?;
        let [a, b, c, d, ..] = octets;
        let address = match i32::from(family) {
            libc::AF_INET => IpAddr::from(Ipv4Addr::new(a, b, c, d)),
            _ => IpAddr::from(Ipv6Addr::from(octets)).to_canonical(),
        };
        Some(SocketAddr::new(address, number))
    };
    let half = |at: usize| Some(u64::from(u32::from_ne_bytes(id.get(at..at + 4)?.try_into().ok()?)));
    let cookie = half(40)? | half(44)? << 32;
    Some(Connected { cookie, local: address(0, 4)?, peer: address(2, 20)?, family, protocol, id })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_says_about_a_socket_is_read() {
        let mut body = vec![0; 72];
        body[0] = libc::AF_INET6 as u8;
        body[6..8].copy_from_slice(&8080_u16.to_be_bytes());
        body[24..40].copy_from_slice(&Ipv4Addr::new(10, 244, 1, 5).to_ipv6_mapped().octets());
        body[44..48].copy_from_slice(&7_u32.to_ne_bytes());
        body[48..52].copy_from_slice(&1_u32.to_ne_bytes());
        let found = connected(&body, Protocol::Udp).unwrap();
        assert_eq!((found.peer, found.cookie), ("10.244.1.5:8080".parse().unwrap(), 1 << 32 | 7));
        assert_eq!(connected(&body[..40], Protocol::Udp), None, "cut off");
        assert_eq!(request(SOCK_DESTROY, NLM_F_ACK, 2, Protocol::Tcp, 0, &found.id).len(), 72);
    }
}
