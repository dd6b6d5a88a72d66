//! The kernel's tracked flows of this network namespace: who called whom and who answers, and the end of what is known of
//! one (netlink family `NETLINK_NETFILTER`, subsystem ctnetlink; linux/netfilter/nfnetlink_conntrack.h).

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use edgemesh_mesh::model::Protocol;

use super::netlink::{Netlink, Request, attribute, attributes, nested, nfgenmsg};

const CTNETLINK: u16 = 1 << 8;
const GET: u16 = CTNETLINK | 1;
const DELETE: u16 = CTNETLINK | 2;
const TUPLE_ORIG: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const ID: u16 = 12;
const ZONE: u16 = 18;
const TUPLE_IP: u16 = 1;
const TUPLE_PROTO: u16 = 2;
const PROTO_NUM: u16 = 1;
const PROTO_SRC_PORT: u16 = 2;
const PROTO_DST_PORT: u16 = 3;

/// A tracked flow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Flow {
    pub(super) protocol: Protocol,
    /// Who began it.
    pub(super) client: SocketAddr,
    /// Whom the client named.
    pub(super) called: SocketAddr,
    /// Who answers: another than was called, if the destination was translated.
    pub(super) server: SocketAddr,
    family: u8,
    tuple: Vec<u8>,
    zone: Option<Vec<u8>>,
    id: Vec<u8>,
}

/// The flows of a network namespace.
#[derive(Debug)]
pub(super) struct Conntrack(Netlink);

impl Conntrack {
    /// Those of the namespace in which the calling thread is.
    pub(super) fn open() -> io::Result<Self> {
        Netlink::open(libc::NETLINK_NETFILTER).map(Self)
    }

    /// Calls `each` for every TCP and UDP flow.
    pub(super) fn flows(&mut self, mut each: impl FnMut(Flow)) -> io::Result<()> {
        for family in [libc::AF_INET as u8, libc::AF_INET6 as u8] {
            self.0.dump(GET, &nfgenmsg(family, 0), |body| {
                if let Some(flow) = flow(body) {
                    each(flow);
                }
            })?;
        }
        Ok(())
    }

    /// Forgets flows: their next packet begins anew. Those that ended by themselves are as good.
    pub(super) fn forget(&mut self, flows: &[Flow]) -> io::Result<()> {
        let requests: Vec<Request> = flows
            .iter()
            .map(|flow| {
                let mut body = nfgenmsg(flow.family, 0).to_vec();
                nested(&mut body, TUPLE_ORIG, |body| body.extend(&flow.tuple));
                attribute(&mut body, ID, &flow.id);
                if let Some(zone) = &flow.zone {
                    attribute(&mut body, ZONE, zone);
                }
                Request { kind: DELETE, flags: 0, body }
            })
            .collect();
        let mut outcome = Ok(());
        for result in self.0.send(&requests)? {
            match result {
                Err(error) if error.raw_os_error() != Some(libc::ENOENT) => outcome = Err(error),
                _ => {}
            }
        }
        outcome
    }
}

fn flow(body: &[u8]) -> Option<Flow> {
    let family = *body.first()?;
    let (mut original, mut reply, mut zone, mut id) = (None, None, None, None);
    for (kind, value) in attributes(body.get(4..)?) {
        match kind {
            TUPLE_ORIG => original = Some(value),
            TUPLE_REPLY => reply = Some(value),
            ZONE => zone = Some(value.to_vec()),
            ID => id = Some(value.to_vec()),
            _ => {}
        }
    }
    let original = original?;
    let (protocol, client, called) = tuple(original)?;
    let (_, server, _) = tuple(reply?)?;
    Some(Flow { protocol, client, called, server, family, tuple: original.to_vec(), zone, id: id? })
}

/// Protocol, source and destination.
fn tuple(value: &[u8]) -> Option<(Protocol, SocketAddr, SocketAddr)> {
    let (mut addresses, mut ports, mut protocol) = ([None; 2], [None; 2], None);
    for (kind, value) in attributes(value) {
        for (inner, value) in attributes(value) {
            match (kind, inner) {
                // Sources have odd numbers, destinations even ones: first IPv4, then IPv6.
                (TUPLE_IP, 1..=4) => addresses[usize::from(inner + 1) % 2] = address(value),
                (TUPLE_PROTO, PROTO_NUM) => protocol = value.first().copied(),
                (TUPLE_PROTO, PROTO_SRC_PORT) => ports[0] = port(value),
                (TUPLE_PROTO, PROTO_DST_PORT) => ports[1] = port(value),
                _ => {}
            }
        }
    }
    let protocol = match i32::from(protocol?) {
        libc::IPPROTO_TCP => Protocol::Tcp,
        libc::IPPROTO_UDP => Protocol::Udp,
        _ => return None,
    };
    Some((protocol, SocketAddr::new(addresses[0]?, ports[0]?), SocketAddr::new(addresses[1]?, ports[1]?)))
}

fn address(value: &[u8]) -> Option<IpAddr> {
    let four = || <[u8; 4]>::try_from(value).ok().map(|octets| Ipv4Addr::from(octets).into());
    four().or_else(|| <[u8; 16]>::try_from(value).ok().map(|octets| Ipv6Addr::from(octets).into()))
}

fn port(value: &[u8]) -> Option<u16> {
    value.try_into().ok().map(u16::from_be_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tuple_of(source: &[u8], destination: &[u8], ports: (u16, u16), first: u16) -> Vec<u8> {
        let mut tuple = Vec::new();
        nested(&mut tuple, TUPLE_IP, |ip| {
            attribute(ip, first, source);
            attribute(ip, first + 1, destination);
        });
        nested(&mut tuple, TUPLE_PROTO, |proto| {
            attribute(proto, PROTO_NUM, &[17]);
            attribute(proto, PROTO_SRC_PORT, &ports.0.to_be_bytes());
            attribute(proto, PROTO_DST_PORT, &ports.1.to_be_bytes());
        });
        tuple
    }

    #[test]
    fn a_translated_flow_is_read() {
        let mut body = nfgenmsg(2, 0).to_vec();
        let original = tuple_of(&[10, 244, 1, 7], &[10, 96, 0, 10], (4000, 53), 1);
        let reply = tuple_of(&[10, 244, 1, 5], &[10, 244, 1, 7], (5353, 4000), 1);
        nested(&mut body, TUPLE_ORIG, |body| body.extend(original));
        nested(&mut body, TUPLE_REPLY, |body| body.extend(reply));
        attribute(&mut body, ID, &[1, 2, 3, 4]);
        let found = flow(&body).unwrap();
        assert_eq!(found.protocol, Protocol::Udp);
        assert_eq!(found.client, "10.244.1.7:4000".parse().unwrap());
        assert_eq!(found.called, "10.96.0.10:53".parse().unwrap());
        assert_eq!(found.server, "10.244.1.5:5353".parse().unwrap());
        assert!((0..body.len()).all(|end| flow(&body[..end]).is_none()), "cut off");
        let six = tuple_of(&[1; 16], &[2; 16], (1, 2), 3);
        assert_eq!(tuple(&six).unwrap().2, "[202:202:202:202:202:202:202:202]:2".parse().unwrap());
    }
}
