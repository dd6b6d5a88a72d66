//! Keeps a component's entry in its node's MeshNode true. Only that entry is written: the node's other component has its own.

use std::{sync::Arc, time::Duration};

use edgemesh_api::{MeshNode, MeshNodeSpec, MeshPeer};
use edgemesh_mesh::{CatalogStore, cidr::Cidr};
use edgemesh_tunnel::{Multiaddr, Tunnel};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

/// Changes that come together are written once.
const SETTLE: Duration = Duration::from_millis(300);
/// Time for one write.
const WRITE_DEADLINE: Duration = Duration::from_secs(10);
/// Pauses between failed writes.
const SHORTEST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);
/// How often the catalog is compared with what was written, in case that somebody else changed it or it was lost.
const CHECK: Duration = Duration::from_secs(30);

/// Writes the entry whenever it changes, for as long as the daemon runs, with or without an API.
pub struct Publisher {
    component: &'static str,
    node: Arc<str>,
    relay: bool,
    peer_id: String,
    addresses: watch::Receiver<Vec<String>>,
    catalog: Arc<CatalogStore>,
    api: Api<MeshNode>,
}

impl Publisher {
    /// For the tunnel endpoint of `component` (`agent` or `gateway`) on `node`.
    pub fn new(
        component: &'static str,
        node: Arc<str>,
        relay: bool,
        catalog: Arc<CatalogStore>,
        client: Client,
        tunnel: &Tunnel,
    ) -> Self {
        let peer_id = tunnel.peer_id().to_string();
        Self { component, node, relay, peer_id, addresses: tunnel.addresses(), catalog, api: Api::all(client) }
    }

    /// Runs until the tunnel stops.
    pub async fn run(mut self) {
        if self.addresses.wait_for(|addresses| !addresses.is_empty()).await.is_err() {
            return;
        }
        let mut failures = 0u32;
        loop {
            sleep(SETTLE).await;
            self.addresses.mark_unchanged();
            let entry = self.entry();
            match timeout(WRITE_DEADLINE, self.write(&entry)).await {
                Ok(Ok(())) => {
                    tracing::info!(addresses = ?entry.addresses, "published this node's tunnel addresses");
                    failures = 0;
                    if self.until_it_differs(&entry).await.is_err() {
                        return;
                    }
                    continue;
                }
                Ok(Err(error)) => tracing::warn!(%error, "can't publish this node's tunnel addresses; trying again"),
                Err(_) => tracing::warn!("publishing this node's tunnel addresses took too long; trying again"),
            }
            failures += 1;
            sleep(pause(failures)).await;
        }
    }

    /// Returns when the addresses changed, or the catalog shows something else than was written.
    async fn until_it_differs(&mut self, written: &MeshPeer) -> Result<(), watch::error::RecvError> {
        loop {
            match timeout(CHECK, self.addresses.changed()).await {
                Ok(Err(ended)) => return Err(ended),
                Ok(Ok(())) if self.entry() != *written => return Ok(()),
                Err(_) if self.is_different_in_catalog(written) => return Ok(()),
                _ => {}
            }
        }
    }

    fn is_different_in_catalog(&self, written: &MeshPeer) -> bool {
        let catalog = self.catalog.snapshot();
        let Some(node) = catalog.node(&self.node) else { return false };
        node.peers.get(self.component).is_none_or(|peer| {
            *peer.peer_id != *written.peer_id
                || peer.relay != written.relay
                || !peer.addresses.iter().map(|address| &**address).eq(written.addresses.iter().map(String::as_str))
        })
    }

    fn entry(&self) -> MeshPeer {
        let pods = pod_ranges(&self.catalog, &self.node);
        let addresses = self.addresses.borrow().iter().filter(|address| !is_in(&pods, address)).cloned().collect();
        MeshPeer { peer_id: self.peer_id.clone(), addresses, relay: self.relay }
    }

    async fn write(&self, entry: &MeshPeer) -> Result<(), kube::Error> {
        let patch = serde_json::json!({"spec": {"peers": {self.component: entry}}});
        match self.api.patch(&self.node, &PatchParams::default(), &Patch::Merge(&patch)).await {
            Err(kube::Error::Api(status)) if status.code == 404 => {
                let spec = MeshNodeSpec { peers: [(self.component.to_owned(), entry.clone())].into() };
                // If the gateway creates it at the same moment, this fails and the next attempt patches.
                self.api.create(&PostParams::default(), &MeshNode::new(&self.node, spec)).await.map(|_| ())
            }
            result => result.map(|_| ()),
        }
    }
}

/// The ranges of this node's pods: an address in them is that of the bridge.
fn pod_ranges(catalog: &CatalogStore, node: &str) -> Vec<Cidr> {
    let catalog = catalog.snapshot();
    catalog.node(node).into_iter().flat_map(|node| node.pod_cidrs.iter()).filter_map(|cidr| Cidr::parse(cidr)).collect()
}

fn is_in(ranges: &[Cidr], address: &str) -> bool {
    let parsed = address.parse::<Multiaddr>().ok();
    let ip = parsed.and_then(|address| address.to_string().split('/').nth(2)?.parse().ok());
    ip.is_some_and(|ip| ranges.iter().any(|range| range.contains(ip)))
}

fn pause(failures: u32) -> Duration {
    let longest = SHORTEST_PAUSE.saturating_mul(1 << failures.saturating_sub(1).min(6)).min(LONGEST_PAUSE);
    longest.mul_f64(0.5 + rand::random::<f64>() / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_of_the_pod_bridge_is_recognised() {
        let pods = [Cidr::parse("10.9.3.0/24").unwrap()];
        assert!(is_in(&pods, "/ip4/10.9.3.1/udp/4001/quic-v1"));
        assert!(!is_in(&pods, "/ip4/192.168.1.5/udp/4001/quic-v1"));
    }
}
