//! The gateway's own tunnel endpoint. It only opens streams; the peers come from the catalog.

use std::sync::Arc;

use anyhow::Result;
use edgemesh_discovery::{peers, publish::Publisher};
use edgemesh_mesh::CatalogStore;
use edgemesh_telemetry::Shutdown;
use edgemesh_tunnel::{RefuseAll, Tunnel, TunnelConfig};
use parking_lot::RwLock;
use prometheus_client::registry::Registry;

use crate::config::Config;

/// The gateway's entry in a MeshNode.
const COMPONENT: &str = "gateway";

/// Starts the endpoint, keeps its peers equal to the catalog's, and publishes it in this node's MeshNode.
///
/// # Errors
/// When the tunnel can't listen or its identity can't be read.
pub fn start(
    config: &Config,
    client: kube::Client,
    catalog: Arc<CatalogStore>,
    registry: &Arc<RwLock<Registry>>,
    shutdown: &Shutdown,
) -> Result<Tunnel> {
    let mut settings =
        TunnelConfig::new(config.data_dir.join("identity.key"), &config.node_name, COMPONENT, config.tunnel.port);
    settings.advertise = config.tunnel.advertise.iter().map(|address| address.parse()).collect::<Result<_, _>>()?;
    let tunnel = Tunnel::start(&settings, Arc::new(RefuseAll), registry, shutdown)?;
    let node: Arc<str> = config.node_name.as_str().into();
    shutdown.spawn(peers::follow(COMPONENT, Arc::clone(&node), Arc::clone(&catalog), tunnel.clone()));
    shutdown.spawn(Publisher::new(COMPONENT, node, false, catalog, client, &tunnel).run());
    Ok(tunnel)
}
