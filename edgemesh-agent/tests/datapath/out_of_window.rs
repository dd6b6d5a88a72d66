//! Segments out of their connection's window (kubernetes/kubernetes#74839): connection tracking doesn't translate them, and
//! the client's reset would end the connection.

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
};

use edgemesh_agent::datapath::{nftables::Changes, outside::OutsideTarget, plan::Frontend};
use edgemesh_mesh::model::Protocol::Tcp;
use socket2::{Domain, Socket, Type};

use crate::{
    hosts::{Host, client, node, pod},
    outside::{direct, is_local, rules},
    sandbox::{Mode, at, in_both_modes, ip, set},
};

const POD: &str = "10.244.1.5:8080";
const POD6: &str = "[fd00:1::5]:8080";
const ACK: u8 = 0x10;
/// Length of a TCP header without options.
const HEADER: usize = 20;

in_both_modes! { an_endpoint_that_sends_out_of_window_keeps_its_callers_from_outside }

#[test]
fn an_endpoint_that_sends_out_of_window_keeps_its_callers_in_pods() {
    let _node = node();
    let (pod5, pod7) = (pod(5), pod(7));
    let mut rules = rules(Mode::Nftables);
    for (vip, server) in [("10.96.0.20:80", POD), ("[fd00:96::20]:80", POD6)] {
        set(&mut rules, Tcp, vip, Some(&[server]));
        assert_kept(&pod7, vip, &pod5, server);
    }
}

fn an_endpoint_that_sends_out_of_window_keeps_its_callers_from_outside(mode: Mode) {
    let _node = node();
    let (pod5, client) = (pod(5), client());
    // So that a reset would find its way.
    client.run(|| {
        ip("route add 10.244.1.0/24 via 192.168.1.11");
        ip("route add fd00:1::/64 via fd00:a::11");
    });
    let mut rules = rules(mode);
    for (node_port, called, server) in
        [("0.0.0.0:30080", "192.168.1.11:30080", POD), ("[::]:30080", "[fd00:a::11]:30080", POD6)]
    {
        let frontend = Frontend { address: at(node_port), protocol: Tcp };
        let outside = vec![(frontend, Some(OutsideTarget::Target(direct(&[server]))))];
        rules.apply(Changes { outside, ..Changes::default() }, &is_local).unwrap();
        assert_kept(&client, called, &pod5, server);
    }
}

/// Has a caller connect, its endpoint send a segment that is far ahead of its own TCP, and both go on.
fn assert_kept(caller: &Host, called: &'static str, endpoint: &Host, server: &'static str) {
    let (listener, raw) = endpoint.run(move || (TcpListener::bind(server).unwrap(), raw_socket(at(server))));
    let mut stream = caller.run(move || TcpStream::connect(called).unwrap());
    let (mut accepted, from) = listener.accept().unwrap();
    stream.write_all(b"call").unwrap();
    accepted.read_exact(&mut [0; 4]).unwrap();
    let (sent, acknowledged) = last_segment(&raw, from, b"call");
    let ahead = segment(at(server), from, acknowledged.wrapping_add(1 << 24), sent.wrapping_add(4));
    let to = SocketAddr::new(from.ip(), 0);
    assert_eq!(raw.send_to(&ahead, &to.into()).unwrap(), ahead.len());
    accepted.write_all(b"answer").unwrap();
    let mut answer = [0; 6];
    stream.read_exact(&mut answer).unwrap();
    stream.write_all(b"more").unwrap();
    accepted.read_exact(&mut [0; 4]).expect("no reset came");
}

/// Gets all TCP segments of the namespace.
fn raw_socket(server: SocketAddr) -> Socket {
    let raw = Socket::new(Domain::for_address(server), Type::RAW, Some(socket2::Protocol::TCP)).unwrap();
    raw.set_read_timeout(Some(std::time::Duration::from_secs(5))).unwrap();
    raw
}

/// Sequence and acknowledgement numbers of the segment that carried data from an address.
fn last_segment(mut raw: &Socket, from: SocketAddr, data: &[u8]) -> (u32, u32) {
    let mut buffer = [0; 4096];
    loop {
        let length = raw.read(&mut buffer).unwrap();
        let packet = &buffer[..length];
        // Only IPv4 sockets get the IP header too.
        let segment = if from.is_ipv4() { &packet[usize::from(packet[0] & 15) * 4..] } else { packet };
        if segment[..2] == from.port().to_be_bytes() && segment.ends_with(data) {
            let number = |at: usize| u32::from_be_bytes(segment[at..at + 4].try_into().unwrap());
            return (number(4), number(8));
        }
    }
}

/// A segment with a byte of data.
fn segment(from: SocketAddr, to: SocketAddr, sequence: u32, acknowledgement: u32) -> Vec<u8> {
    let octets = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let mut segment = [from.port().to_be_bytes(), to.port().to_be_bytes()].concat();
    segment.extend([sequence, acknowledgement].map(u32::to_be_bytes).concat());
    segment.extend([(HEADER as u8 / 4) << 4, ACK, 1, 0, 0, 0, 0, 0, b'!']);
    let pseudo = [octets(from.ip()), octets(to.ip()), vec![0, 6, 0, segment.len() as u8]].concat();
    let all = [&pseudo, &segment, &[0][..]].concat();
    let sum: u32 = all.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    let checksum = !(((sum & 0xffff) + (sum >> 16)) as u16);
    segment[16..18].copy_from_slice(&checksum.to_be_bytes());
    segment
}
