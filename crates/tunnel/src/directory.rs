//! What is known of the other endpoints, indexed by node and by PeerId. A new list replaces the directory as a whole.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use libp2p::{Multiaddr, PeerId, multiaddr::Protocol};
use parking_lot::RwLock;

use crate::{
    connections::Route,
    peer::{PeerName, TunnelPeer},
};

/// More addresses of one peer than this are ignored.
const MAX_ADDRESSES: usize = 32;

/// One known endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct KnownPeer {
    pub(crate) id: PeerId,
    pub(crate) name: PeerName,
    pub(crate) quic: Vec<Multiaddr>,
    pub(crate) tcp: Vec<Multiaddr>,
    /// Circuit addresses as it published them, complete with its own PeerId.
    pub(crate) circuits: Vec<Multiaddr>,
    pub(crate) relay: bool,
}

/// An immutable directory.
#[derive(Debug, Default)]
pub(crate) struct Directory {
    by_id: HashMap<PeerId, Arc<KnownPeer>>,
    agents: HashMap<String, PeerId>,
}

impl Directory {
    /// Builds a directory; entries that make no sense are left out and logged.
    pub(crate) fn new(peers: &[TunnelPeer], own: &PeerId) -> Self {
        let mut directory = Self::default();
        for peer in peers {
            let id = match peer.peer_id.parse::<PeerId>() {
                Ok(id) if id == *own => continue,
                Ok(id) => id,
                Err(error) => {
                    tracing::warn!(node = %peer.node, component = %peer.component, %error, "unusable PeerId");
                    continue;
                }
            };
            let known = Arc::new(KnownPeer::new(peer, id));
            if let Some(other) = directory.by_id.insert(id, known) {
                tracing::warn!(peer = %id, first = %other.name, second = %peer.node, "two endpoints claim one PeerId");
                directory.agents.retain(|_, agent| *agent != id);
            }
            if peer.component == "agent" {
                directory.agents.insert(peer.node.clone(), id);
            }
        }
        directory
    }

    pub(crate) fn agent_of(&self, node: &str) -> Option<PeerId> {
        self.agents.get(node).copied()
    }

    pub(crate) fn get(&self, id: &PeerId) -> Option<&Arc<KnownPeer>> {
        self.by_id.get(id)
    }

    pub(crate) fn ids(&self) -> impl Iterator<Item = &PeerId> {
        self.by_id.keys()
    }

    pub(crate) fn relays(&self) -> impl Iterator<Item = &Arc<KnownPeer>> {
        self.by_id.values().filter(|peer| peer.relay)
    }

    /// Addresses at which `peer` may be reached through others: what it published, and every relay, because nodes that are
    /// not relays keep a place with each of them.
    pub(crate) fn circuits_to(&self, peer: &KnownPeer) -> Vec<Multiaddr> {
        if peer.relay {
            return Vec::new();
        }
        let mut circuits: BTreeSet<Multiaddr> = peer.circuits.iter().cloned().collect();
        for relay in self.relays().filter(|relay| relay.id != peer.id) {
            // One address is enough: the relay client uses the connection that it has to the relay.
            if let Some(address) = relay.quic.first().or(relay.tcp.first()) {
                circuits.insert(
                    address
                        .clone()
                        .with(Protocol::P2p(relay.id))
                        .with(Protocol::P2pCircuit)
                        .with(Protocol::P2p(peer.id)),
                );
            }
        }
        circuits.into_iter().collect()
    }

    /// The node name of a PeerId, for logs and paths.
    pub(crate) fn node_of(&self, id: &PeerId) -> Option<String> {
        self.by_id.get(id).map(|peer| peer.name.node.clone())
    }
}

impl KnownPeer {
    fn new(peer: &TunnelPeer, id: PeerId) -> Self {
        let mut known = Self {
            id,
            name: PeerName { node: peer.node.clone(), component: peer.component.clone() },
            quic: Vec::new(),
            tcp: Vec::new(),
            circuits: Vec::new(),
            relay: peer.relay,
        };
        for text in peer.addresses.iter().take(MAX_ADDRESSES) {
            let Ok(mut address) = text.parse::<Multiaddr>() else {
                tracing::debug!(node = %peer.node, address = %text, "unusable address");
                continue;
            };
            if address.iter().last() == Some(Protocol::P2p(id)) {
                address.pop();
            }
            match Route::of_address(&address) {
                Route::Quic => known.quic.push(address),
                Route::Tcp => known.tcp.push(address),
                Route::Relayed(Some(_)) => known.circuits.push(address.with(Protocol::P2p(id))),
                Route::Relayed(None) => {}
            }
        }
        known
    }

    /// Direct addresses, the preferred first.
    pub(crate) fn direct(&self) -> impl Iterator<Item = &Multiaddr> {
        self.quic.iter().chain(&self.tcp)
    }
}

/// The current directory, shared.
#[derive(Debug, Clone, Default)]
pub(crate) struct CurrentDirectory(Arc<RwLock<Arc<Directory>>>);

impl CurrentDirectory {
    pub(crate) fn load(&self) -> Arc<Directory> {
        self.0.read().clone()
    }

    pub(crate) fn store(&self, directory: Directory) -> Arc<Directory> {
        let directory = Arc::new(directory);
        *self.0.write() = directory.clone();
        directory
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(node: &str, id: PeerId, addresses: &[&str], relay: bool) -> TunnelPeer {
        TunnelPeer {
            node: node.into(),
            component: "agent".into(),
            peer_id: id.to_string(),
            addresses: addresses.iter().map(ToString::to_string).collect(),
            relay,
        }
    }

    #[test]
    fn a_peer_behind_nat_is_reached_through_every_relay() {
        let (own, relay, edge) = (PeerId::random(), PeerId::random(), PeerId::random());
        let directory = Directory::new(
            &[
                peer("cloud", relay, &["/ip4/192.0.2.1/udp/4001/quic-v1", "/ip4/192.0.2.1/tcp/4001"], true),
                peer("edge", edge, &["/ip4/10.0.0.7/udp/4001/quic-v1", "nonsense"], false),
                peer("self", own, &[], false),
            ],
            &own,
        );
        let known = directory.get(&directory.agent_of("edge").unwrap()).unwrap();
        assert_eq!(known.quic.len(), 1);
        assert_eq!(
            directory.circuits_to(known),
            [format!("/ip4/192.0.2.1/udp/4001/quic-v1/p2p/{relay}/p2p-circuit/p2p/{edge}").parse().unwrap()]
        );
        assert!(directory.agent_of("self").is_none());
    }

    #[test]
    fn published_circuits_are_completed_and_not_repeated() {
        let (relay, edge) = (PeerId::random(), PeerId::random());
        let circuit = format!("/ip4/192.0.2.1/udp/4001/quic-v1/p2p/{relay}/p2p-circuit");
        let directory = Directory::new(
            &[peer("cloud", relay, &["/ip4/192.0.2.1/udp/4001/quic-v1"], true), peer("edge", edge, &[&circuit], false)],
            &PeerId::random(),
        );
        assert_eq!(directory.circuits_to(directory.get(&edge).unwrap()).len(), 1);
    }
}
