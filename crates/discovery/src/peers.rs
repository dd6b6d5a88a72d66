//! From the catalog's nodes to the tunnel's known peers.

use std::sync::Arc;

use edgemesh_mesh::{Catalog, CatalogStore};
use edgemesh_tunnel::{Tunnel, TunnelPeer};

/// Gives the tunnel of `component` on `node` the peers of every generation in which they changed.
pub async fn follow(component: &'static str, node: Arc<str>, catalog: Arc<CatalogStore>, tunnel: Tunnel) {
    let mut generations = catalog.subscribe();
    generations.mark_changed();
    let mut seen: Option<Arc<Catalog>> = None;
    let mut current = Vec::new();
    while generations.changed().await.is_ok() {
        let snapshot = catalog.snapshot();
        if seen.as_ref().is_some_and(|seen| !snapshot.nodes_changed(seen)) {
            seen = Some(snapshot);
            continue;
        }
        let peers = peers_of(&snapshot, component, &node);
        if peers != current {
            tracing::debug!(peers = peers.len(), "the tunnel's peers changed");
            tunnel.set_peers(&peers);
            current = peers;
        }
        seen = Some(snapshot);
    }
}

/// All tunnel endpoints but this one, sorted.
fn peers_of(catalog: &Catalog, own_component: &str, own: &str) -> Vec<TunnelPeer> {
    let mut peers: Vec<TunnelPeer> = catalog
        .nodes()
        .flat_map(|node| node.peers.iter().map(move |(component, peer)| (node, component, peer)))
        .filter(|(node, component, _)| !(*node.name == *own && ***component == *own_component))
        .map(|(node, component, peer)| TunnelPeer {
            node: node.name.to_string(),
            component: component.to_string(),
            peer_id: peer.peer_id.to_string(),
            addresses: peer.addresses.iter().map(ToString::to_string).collect(),
            relay: peer.relay,
        })
        .collect();
    peers.sort_by(|a, b| (&a.node, &a.component).cmp(&(&b.node, &b.component)));
    peers
}

#[cfg(test)]
mod tests {
    use edgemesh_api::{MeshNode, MeshNodeSpec, MeshPeer};

    use super::*;

    #[test]
    fn agents_and_gateways_of_all_nodes_are_peers_but_not_this_agent() {
        let store = CatalogStore::new();
        for name in ["a", "b"] {
            let node = serde_json::json!({"metadata": {"name": name}});
            store.apply_node(&serde_json::from_value(node).unwrap());
            let peer = |component: &str| {
                let peer = MeshPeer { peer_id: format!("{name}-{component}"), addresses: vec![], relay: name == "b" };
                (component.to_owned(), peer)
            };
            let spec = MeshNodeSpec { peers: [peer("agent"), peer("gateway")].into() };
            store.apply_mesh_node(&MeshNode::new(name, spec));
        }
        // A node that is gone is no peer, whatever its MeshNode says.
        store.apply_mesh_node(&MeshNode::new("gone", MeshNodeSpec::default()));
        store.publish();
        let peers = peers_of(&store.snapshot(), "agent", "a");
        let ids: Vec<(&str, bool)> = peers.iter().map(|peer| (peer.peer_id.as_str(), peer.relay)).collect();
        assert_eq!(ids, [("a-gateway", false), ("b-agent", true), ("b-gateway", true)]);
    }
}
