//! Cluster DNS at an IPv6 address, as pods of a cluster with IPv6 Services have it.

use std::{
    io::{Read, Write},
    net::TcpStream,
};

use hickory_proto::{
    op::{Message, Query},
    rr::RecordType,
};
use serde_json::json;

use crate::{
    sandbox::{Mode, in_both_modes},
    sites::{DEADLINE, Host, Sites, addresses_in, addresses_of, to},
};

const CLUSTER_DNS: &str = "fd00:96::a";

in_both_modes!(pods_and_the_host_ask_by_ipv6);

/// The addresses of a name, asked for over TCP.
pub(crate) fn over_tcp(from: &Host, server: &'static str, name: &'static str, kind: RecordType) -> Vec<String> {
    from.run(move || {
        let mut query = Message::query();
        query.add_query(Query::query(name.parse().unwrap(), kind));
        let query = query.to_vec().unwrap();
        let mut stream = TcpStream::connect(to(server, 53)).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.write_all(&[&(query.len() as u16).to_be_bytes(), &query[..]].concat()).unwrap();
        let mut length = [0; 2];
        stream.read_exact(&mut length).unwrap();
        let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
        stream.read_exact(&mut answer).unwrap();
        addresses_in(&answer, kind)
    })
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
        config.datapath = mode.into();
    });
    for from in [&sites.a.pod, &sites.a.host] {
        let web = "web.default.svc.cluster.local.";
        assert_eq!(addresses_of(from, CLUSTER_DNS, web, RecordType::AAAA), ["fd00:96::20"]);
        assert_eq!(over_tcp(from, CLUSTER_DNS, web, RecordType::AAAA), ["fd00:96::20"]);
        let server = |kind| addresses_of(from, CLUSTER_DNS, "ns.dns.cluster.local.", kind);
        assert_eq!(server(RecordType::AAAA), ["fd65:6467:656d:6573:6800::1"]);
        assert_eq!(server(RecordType::A), ["169.254.64.1"]);
    }
}
