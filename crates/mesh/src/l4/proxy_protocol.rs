//! The header by which a proxy tells a server whose connection it carries: version 2 of the PROXY protocol, as specified in
//! HAProxy's `proxy-protocol.txt`, section 2.2.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2 in the upper half, the command in the lower one.
const LOCAL: u8 = 0x20;
const PROXY: u8 = 0x21;
/// The address family in the upper half; STREAM (TCP) in the lower one.
const UNSPECIFIED: u8 = 0x00;
const TCP_OVER_IPV4: u8 = 0x11;
const TCP_OVER_IPV6: u8 = 0x21;

/// The header of a TCP connection from `source` to `destination`.
pub fn proxied(source: SocketAddr, destination: SocketAddr) -> Vec<u8> {
    match (source.ip(), destination.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let addresses = [from.octets(), to.octets()].concat();
            header(PROXY, TCP_OVER_IPV4, &addresses, &[source.port(), destination.port()])
        }
        // A header has one family; IPv4 addresses have a form in the other.
        (from, to) => {
            let addresses = [in_ipv6(from).octets(), in_ipv6(to).octets()].concat();
            header(PROXY, TCP_OVER_IPV6, &addresses, &[source.port(), destination.port()])
        }
    }
}

/// The header of a connection that the proxy makes for itself, or whose client it can't name: the server goes by the
/// addresses of the connection.
pub fn local() -> Vec<u8> {
    header(LOCAL, UNSPECIFIED, &[], &[])
}

fn in_ipv6(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    }
}

fn header(command: u8, family: u8, addresses: &[u8], ports: &[u16]) -> Vec<u8> {
    let ports: Vec<u8> = ports.iter().flat_map(|port| port.to_be_bytes()).collect();
    // At most 36.
    let length = u16::try_from(addresses.len() + ports.len()).unwrap_or_default();
    [&SIGNATURE[..], &[command, family], &length.to_be_bytes(), addresses, &ports].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_those_of_the_specification() {
        let v4 = proxied("192.0.2.1:4660".parse().unwrap(), "198.51.100.2:80".parse().unwrap());
        let expected =
            [&b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c"[..], &[192, 0, 2, 1, 198, 51, 100, 2, 0x12, 0x34, 0, 80]]
                .concat();
        assert_eq!(v4, expected);

        let v6 = proxied("[2001:db8::1]:4660".parse().unwrap(), "[2001:db8::2]:80".parse().unwrap());
        assert_eq!(v6[12..16], [0x21, 0x21, 0, 36]);
        assert_eq!((v6[16..20].to_vec(), v6[31], v6[47]), (vec![0x20, 0x01, 0x0d, 0xb8], 1, 2));
        assert_eq!(v6[48..], [0x12, 0x34, 0, 80]);

        let mixed = proxied("192.0.2.1:4660".parse().unwrap(), "[2001:db8::2]:80".parse().unwrap());
        assert_eq!(mixed[16..32], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 192, 0, 2, 1]);

        assert_eq!(local(), b"\r\n\r\n\0\r\nQUIT\n\x20\x00\x00\x00");
    }
}
