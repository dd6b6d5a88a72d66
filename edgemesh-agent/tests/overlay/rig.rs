//! Nodes with a catalog each, the Services in it, and the metrics that they show.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use edgemesh_agent::{
    config::Config,
    node_local::{Allocator, ServicePortName},
    overlay::Overlay,
};
use edgemesh_api::{MeshNode, MeshNodeSpec, MeshPeer};
use edgemesh_mesh::{
    CatalogStore,
    model::{Protocol, ServiceName},
};
use edgemesh_telemetry::Shutdown;
use edgemesh_tunnel::{Carried, StreamHeader, StreamTarget, TunnelError};
use parking_lot::RwLock;
use prometheus_client::registry::Registry;
use serde_json::json;
use tempfile::TempDir;

/// Waits until a condition holds.
pub(crate) async fn until(what: &str, condition: impl Fn() -> bool) {
    within(what, async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}

/// Everything here happens on loopback; what takes longer than this doesn't work.
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);

/// Fails the test when `what` takes too long.
pub(crate) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(DEADLINE, future).await {
        Ok(value) => value,
        Err(_) => panic!("{what}: not within {DEADLINE:?}"),
    }
}

/// One agent's overlay.
pub(crate) struct Node {
    pub(crate) name: &'static str,
    pub(crate) overlay: Overlay,
    pub(crate) catalog: Arc<CatalogStore>,
    pub(crate) allocator: Arc<Allocator>,
    registry: Arc<RwLock<Registry>>,
    relay: bool,
    pub(crate) shutdown: Shutdown,
    _folder: TempDir,
}

impl Node {
    /// Starts it with the settings that `change` makes of the defaults.
    pub(crate) fn start(name: &'static str, change: impl FnOnce(&mut Config)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut config = Config { data_dir: folder.path().into(), node_name: name.into(), ..Config::default() };
        config.tunnel.listen = vec![Ipv4Addr::LOCALHOST.into()];
        config.tunnel.port = 0;
        change(&mut config);
        let catalog = CatalogStore::new();
        let allocator = Arc::new(Allocator::in_memory("127.64.0.0/18".parse().unwrap()));
        let registry = Arc::new(RwLock::new(Registry::default()));
        let shutdown = Shutdown::default();
        let _ = rustls::crypto::ring::default_provider().install_default();
        // Nothing answers there: the overlay must work without the API.
        let client = kube::Client::try_from(kube::Config::new("http://127.0.0.1:1".parse().unwrap())).unwrap();
        let overlay = Overlay::start_at(
            SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
            &config,
            catalog.clone(),
            client,
            allocator.clone(),
            Arc::default(),
            &registry,
            &shutdown,
        )
        .unwrap();
        let relay = config.tunnel.relay;
        Self { name, overlay, catalog, allocator, registry, relay, shutdown, _folder: folder }
    }

    /// What this node would publish.
    async fn mesh_node(&self) -> MeshNode {
        let mut addresses = self.overlay.tunnel().addresses();
        let addresses = within("listening", addresses.wait_for(|all| all.len() >= 2)).await.unwrap().clone();
        let peer_id = self.overlay.tunnel().peer_id().to_string();
        let peers = [("agent".to_owned(), MeshPeer { peer_id, addresses, relay: self.relay })].into();
        MeshNode::new(self.name, MeshNodeSpec { peers })
    }

    /// Waits until a relay holds a place for it.
    async fn has_a_place_with_a_relay(&self) {
        let mut addresses = self.overlay.tunnel().addresses();
        let circuit = addresses.wait_for(|all| all.iter().any(|address| address.contains("p2p-circuit")));
        drop(within("a place with a relay", circuit).await.unwrap());
    }

    /// The address at which the Service port is proxied on this node.
    pub(crate) fn listener(&self, service: &str, protocol: Protocol) -> SocketAddr {
        let name = ServicePortName {
            service: ServiceName { namespace: "default".into(), name: service.into() },
            port: "main".into(),
            protocol,
        };
        let address = *self.allocator.listener(&name).unwrap().ip();
        SocketAddr::from((address, self.overlay.proxied_address().port()))
    }

    /// What `/metrics` shows.
    pub(crate) fn metrics(&self) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry.read()).unwrap();
        text
    }

    /// The value of a metric line, 0 if it isn't there.
    pub(crate) fn metric(&self, line: &str) -> u64 {
        self.metrics().lines().find_map(|found| found.strip_prefix(line)?.trim().parse().ok()).unwrap_or(0)
    }
}

/// Two nodes of different networks that know each other.
pub(crate) async fn two_sites() -> (Node, Node) {
    two_sites_with(|_| {}).await
}

/// Two nodes of different networks that know each other, with changed settings.
pub(crate) async fn two_sites_with(change: impl Fn(&mut Config)) -> (Node, Node) {
    let nodes = (Node::start("a", &change), Node::start("b", &change));
    introduce(&[&nodes.0, &nodes.1], &[nodes.0.mesh_node().await, nodes.1.mesh_node().await]);
    within("the nodes to know each other", async {
        while !(answers(&nodes.0, "b").await && answers(&nodes.1, "a").await) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    nodes
}

/// Two nodes whose own addresses nobody knows, and the relay at which they meet.
pub(crate) async fn two_sites_behind_a_relay() -> (Node, Node, Node) {
    let (a, b) = (Node::start("a", |_| {}), Node::start("b", |_| {}));
    let relay = Node::start("relay", |config| config.tunnel.relay = true);
    let mut mesh_nodes = [a.mesh_node().await, b.mesh_node().await, relay.mesh_node().await];
    for hidden in &mut mesh_nodes[..2] {
        hidden.spec.peers.values_mut().for_each(|peer| peer.addresses.clear());
    }
    introduce(&[&a, &b, &relay], &mesh_nodes);
    a.has_a_place_with_a_relay().await;
    b.has_a_place_with_a_relay().await;
    (a, b, relay)
}

/// Puts nodes, each in a network of its own, into the catalogs of all of them.
fn introduce(nodes: &[&Node], mesh_nodes: &[MeshNode]) {
    for catalog in nodes.iter().map(|node| &node.catalog) {
        for mesh_node in mesh_nodes {
            let name = mesh_node.metadata.name.as_deref().unwrap();
            let node = json!({
                "metadata": {"name": name, "labels": {"edgemesh.dev/network": format!("site-{name}")}},
                "status": {"conditions": [{"type": "Ready", "status": "True"}]},
            });
            catalog.apply_node(&serde_json::from_value(node).unwrap());
            catalog.apply_mesh_node(mesh_node);
        }
        catalog.mark_synced();
        catalog.publish();
    }
}

/// Whether the other node lets this one in: it then answers, though only to refuse a Service that it doesn't have.
async fn answers(from: &Node, node: &str) -> bool {
    let header = StreamHeader {
        target: StreamTarget::Service { namespace: "none".into(), service: "none".into(), port_name: String::new() },
        protocol: Carried::Tcp,
        endpoint: ([127, 0, 0, 1], 1).into(),
        source: "test".into(),
    };
    matches!(from.overlay.tunnel().open(node, &header).await, Err(TunnelError::Refused { .. }))
}

/// Puts a Service with endpoints (address and node) into the catalogs of some nodes.
pub(crate) fn service(nodes: &[&Node], name: &str, protocol: &str, endpoints: &[(SocketAddr, &str)]) {
    for node in nodes {
        let service = json!({
            "metadata": {"namespace": "default", "name": name},
            "spec": {"clusterIP": "10.96.0.9", "ports": [{"name": "main", "port": 80, "protocol": protocol}]},
        });
        node.catalog.apply_service(&serde_json::from_value(service).unwrap());
        for (at, (address, on)) in endpoints.iter().enumerate() {
            let slice = json!({
                "metadata": {
                    "namespace": "default", "name": format!("{name}-{at}"),
                    "labels": {"kubernetes.io/service-name": name},
                },
                "addressType": "IPv4",
                "ports": [{"name": "main", "port": address.port(), "protocol": protocol}],
                "endpoints": [{"addresses": [address.ip()], "nodeName": on, "conditions": {"ready": true}}],
            });
            node.catalog.apply_endpoint_slice(&serde_json::from_value(slice).unwrap());
        }
        node.catalog.publish();
    }
}
