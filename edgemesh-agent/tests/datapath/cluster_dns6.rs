//! Cluster DNS at an IPv6 address, as pods of a cluster with IPv6 Services have it.

use std::{
    io::{Read, Write},
    net::{TcpStream, UdpSocket},
};

use edgemesh_agent::config::DatapathMode;
use hickory_proto::{
    op::{Message, Query},
    rr::RecordType,
};
use serde_json::json;

use crate::{
    sandbox::{Mode, in_both_modes},
    sites::{DEADLINE, Host, Sites, to},
};

const CLUSTER_DNS: &str = "fd00:96::a";

in_both_modes!(pods_and_the_host_ask_by_ipv6);

/// The addresses of a name, asked for over UDP or TCP.
fn lookup(from: &Host, over_tcp: bool, name: &'static str, kind: RecordType) -> Vec<String> {
    let answer = from.run(move || {
        let mut query = Message::query();
        query.add_query(Query::query(name.parse().unwrap(), kind));
        let query = query.to_vec().unwrap();
        let server = to(CLUSTER_DNS, 53);
        let mut answer = vec![0; 1500];
        if over_tcp {
            let mut stream = TcpStream::connect(server).unwrap();
            stream.set_read_timeout(Some(DEADLINE)).unwrap();
            stream.write_all(&[&(query.len() as u16).to_be_bytes(), &query[..]].concat()).unwrap();
            stream.read_exact(&mut answer[..2]).unwrap();
            let length = usize::from(u16::from_be_bytes([answer[0], answer[1]]));
            answer.resize(length, 0);
            stream.read_exact(&mut answer).unwrap();
        } else {
            let socket = UdpSocket::bind("[::]:0").unwrap();
            socket.set_read_timeout(Some(DEADLINE)).unwrap();
            socket.send_to(&query, server).unwrap();
            let (length, from) = socket.recv_from(&mut answer).unwrap();
            assert_eq!(from, server, "who was asked answers");
            answer.truncate(length);
        }
        Message::from_vec(&answer).unwrap()
    });
    answer.answers.iter().map(|record| record.data.to_string()).collect()
}

fn pods_and_the_host_ask_by_ipv6(mode: Mode) {
    let web = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "default"},
        "spec": {"clusterIP": "fd00:96::20", "clusterIPs": ["fd00:96::20"], "ipFamilies": ["IPv6"], "ports": [{"port": 80}]},
    });
    // A Service of the cluster's own that has the address.
    let dns = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "kube-dns", "namespace": "kube-system"},
        "spec": {"clusterIP": CLUSTER_DNS, "clusterIPs": [CLUSTER_DNS], "ipFamilies": ["IPv6"],
                 "ports": [{"port": 53, "protocol": "UDP"}]},
    });
    let sites = Sites::start(&[web, dns], |config| {
        config.dns.cluster_address6 = Some(CLUSTER_DNS.parse().unwrap());
        config.datapath = match mode {
            Mode::Ebpf => DatapathMode::Ebpf,
            Mode::Nftables => DatapathMode::Nftables,
        };
    });
    for from in [&sites.a.pod, &sites.a.host] {
        for over_tcp in [false, true] {
            let address = lookup(from, over_tcp, "web.default.svc.cluster.local.", RecordType::AAAA);
            assert_eq!(address, ["fd00:96::20"]);
        }
        let server = |kind| lookup(from, false, "ns.dns.cluster.local.", kind);
        assert_eq!(server(RecordType::AAAA), ["fd65:6467:656d:6573:6800::1"]);
        assert_eq!(server(RecordType::A), ["169.254.64.1"]);
    }
}
