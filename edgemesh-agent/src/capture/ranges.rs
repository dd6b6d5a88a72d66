//! Which pod ranges are captured: those of the nodes of other networks, unless that would take addresses that lead elsewhere.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    net::IpAddr,
};

use edgemesh_mesh::{Catalog, Viewpoint, cidr::Cidr};

/// Wider ranges are a mistake: the shortest prefixes that are captured, of each family.
const MIN_PREFIX4: u8 = 8;
const MIN_PREFIX6: u8 = 32;
/// Addresses that are never pods': this host, loopback, link-local with the node-local ones, multicast and broadcast.
const NEVER_PODS: [&str; 7] =
    ["0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3", "::/16", "fe80::/10", "ff00::/8"];

/// What is to be captured.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ranges {
    /// The ranges.
    pub captured: BTreeSet<Cidr>,
    /// Ranges of other networks that are left alone, each with the reason.
    pub refused: BTreeMap<Cidr, &'static str>,
}

/// The ranges to capture on a node. `host_addresses` are those of its interfaces, `reserved` ranges that are used on it otherwise.
pub fn ranges(catalog: &Catalog, viewpoint: &Viewpoint, host_addresses: &HashSet<IpAddr>, reserved: &[Cidr]) -> Ranges {
    let never: Vec<Cidr> = NEVER_PODS.iter().filter_map(|range| Cidr::parse(range)).collect();
    let mut hosts: BTreeSet<IpAddr> = host_addresses.clone().into_iter().collect();
    let mut near = Vec::new();
    let mut far = Vec::new();
    for node in catalog.nodes() {
        hosts.extend(&node.addresses);
        // The tunnel itself must not lead into the tunnel.
        let peers = node.peers.values().flat_map(|peer| &peer.addresses);
        hosts.extend(peers.filter_map(|address| ip_of(address)));
        let is_near = node.name == viewpoint.node || node.network == viewpoint.network;
        let ranges = node.pod_cidrs.iter().filter_map(|range| Cidr::parse(range));
        if is_near { near.extend(ranges) } else { far.extend(ranges) }
    }
    let mut found = Ranges::default();
    for range in far {
        let min = if range.network().is_ipv4() { MIN_PREFIX4 } else { MIN_PREFIX6 };
        let overlaps = |ranges: &[Cidr]| ranges.iter().any(|other| other.overlaps(&range));
        let refusal = if range.prefix() < min {
            Some("it is too wide for the pods of one node")
        } else if overlaps(&never) {
            Some("it holds addresses that are never pods'")
        } else if overlaps(&near) {
            Some("it overlaps the pods of this network")
        } else if overlaps(reserved) {
            Some("it overlaps node-local addresses")
        } else if hosts.range(range.network()..=range.last()).next().is_some() {
            Some("it holds the address of a node or of this host")
        } else {
            None
        };
        match refusal {
            Some(reason) => drop(found.refused.insert(range, reason)),
            None => drop(found.captured.insert(range)),
        }
    }
    found
}

/// The IP address at the beginning of a multiaddr.
fn ip_of(multiaddr: &str) -> Option<IpAddr> {
    let mut parts = multiaddr.split('/').skip(1);
    match parts.next()? {
        "ip4" | "ip6" => parts.next()?.parse().ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use edgemesh_api::{MeshNode, MeshNodeSpec, MeshPeer};
    use edgemesh_mesh::CatalogStore;
    use serde_json::json;

    use super::*;

    fn node(store: &CatalogStore, name: &str, network: &str, address: &str, ranges: &[&str]) {
        let node = json!({
            "metadata": {"name": name, "labels": {"edgemesh.dev/network": network}},
            "spec": {"podCIDRs": ranges},
            "status": {"addresses": [{"type": "InternalIP", "address": address}]},
        });
        store.apply_node(&serde_json::from_value(node).unwrap());
    }

    fn seen(store: &CatalogStore) -> Ranges {
        store.publish();
        let catalog = store.snapshot();
        let host = ["127.0.0.1", "172.20.0.9"].map(|ip| ip.parse().unwrap()).into();
        let reserved = ["fd65:6467:656d:6573:6800::/112"].map(|range| Cidr::parse(range).unwrap());
        ranges(&catalog, &Viewpoint::of(&catalog, "a1"), &host, &reserved)
    }

    fn all(ranges: &[&str]) -> BTreeSet<Cidr> {
        ranges.iter().map(|range| Cidr::parse(range).unwrap()).collect()
    }

    #[test]
    fn pods_of_other_networks_are_captured_and_follow_the_nodes() {
        let store = CatalogStore::new();
        node(&store, "a1", "site-a", "192.168.1.11", &["10.244.1.0/24", "fd00:1::/64"]);
        node(&store, "a2", "site-a", "192.168.1.12", &["10.244.2.0/24"]);
        node(&store, "b1", "site-b", "192.168.2.11", &["10.244.3.0/24", "fd00:3::/64"]);
        assert_eq!(seen(&store), Ranges { captured: all(&["10.244.3.0/24", "fd00:3::/64"]), ..Ranges::default() });
        node(&store, "b1", "site-a", "192.168.1.13", &["10.244.3.0/24", "fd00:3::/64"]);
        assert_eq!(seen(&store), Ranges::default(), "it moved into this network");
        node(&store, "a2", "site-c", "192.168.3.12", &["10.244.2.0/24"]);
        assert_eq!(seen(&store).captured, all(&["10.244.2.0/24"]));
    }

    #[test]
    fn ranges_that_would_take_other_addresses_are_refused() {
        for (range, reason) in [
            ("0.0.0.0/0", "too wide"),
            ("10.0.0.0/7", "too wide"),
            ("fd00::/16", "too wide"),
            ("10.0.0.0/8", "pods of this network"),
            ("10.244.1.128/25", "pods of this network"),
            ("127.0.0.0/24", "never pods'"),
            ("169.254.64.0/18", "never pods'"),
            ("fe80::/64", "never pods'"),
            ("fd65:6467:656d:6573::/64", "node-local"),
            ("192.168.0.0/16", "address of a node"),
            ("172.20.0.0/24", "address of a node"),
            ("203.0.113.0/24", "address of a node"),
        ] {
            let store = CatalogStore::new();
            node(&store, "a1", "site-a", "192.168.1.11", &["10.244.1.0/24"]);
            node(&store, "b1", "site-b", "192.168.2.11", &[range]);
            let peer = MeshPeer {
                peer_id: "x".into(),
                addresses: vec!["/ip4/203.0.113.7/udp/4001/quic-v1".into()],
                relay: false,
            };
            store.apply_mesh_node(&MeshNode::new("b1", MeshNodeSpec { peers: [("agent".into(), peer)].into() }));
            let found = seen(&store);
            assert!(found.captured.is_empty(), "{range}");
            let told = found.refused.get(&Cidr::parse(range).unwrap()).unwrap();
            assert!(told.contains(reason), "{range}: {told}");
        }
    }
}
