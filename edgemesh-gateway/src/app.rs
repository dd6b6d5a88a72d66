//! Builds the daemon: binds what it serves, loads what is on disk, then starts its tasks.

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use anyhow::Result;
use edgemesh_discovery::{Discovery, DiscoveryConfig, api_client};
use edgemesh_telemetry::{Admin, AdminRoutes, Readiness, Shutdown};
use parking_lot::RwLock;
use prometheus_client::registry::Registry;

use crate::{
    config::Config, listeners::Listeners, metrics::Metrics, objects, overlay, proxy::Proxy, resolve, status,
    upstream::Upstreams,
};

/// A running gateway.
#[derive(Debug)]
pub struct Bound {
    /// Where the admin endpoint listens.
    pub admin: SocketAddr,
    /// Ports of Gateway listeners that are open.
    pub listeners: tokio::sync::watch::Receiver<Vec<SocketAddr>>,
    /// Stops it.
    pub shutdown: Shutdown,
    drain: Duration,
}

impl Bound {
    /// Stops it: requests in flight get the configured time.
    pub async fn stop(self) {
        self.shutdown.drain(self.drain).await;
    }
}

/// Starts a gateway.
///
/// # Errors
/// When the admin endpoint or the tunnel can't listen, or the API's credentials can't be used.
pub async fn build(config: Config) -> Result<Bound> {
    let shutdown = Shutdown::default();
    let drain = Duration::from_secs(config.drain_seconds);
    let readiness = Readiness::default();
    let registry = Arc::new(RwLock::new(Registry::default()));
    let metrics = Arc::new(Metrics::register(&mut registry.write()));
    let admin = Admin::bind(config.admin.listen).await?;
    let admin_address = admin.address();

    let api_url = config.api_url();
    let client = match &config.kubeconfig {
        Some(path) => api_client(Some(path), None).await?,
        None => api_client(None, Some(&api_url)).await?,
    };
    let copy = |name: &str| Some(Path::new(&config.data_dir).join(name));
    let catalog = Discovery::start(
        client.clone(),
        DiscoveryConfig { copy: copy("catalog.json"), ..DiscoveryConfig::default() },
        &shutdown,
        readiness.task("catalog"),
    );
    let objects = objects::start(client.clone(), copy("gateway.json"), &shutdown, readiness.task("gateways"));
    let tunnel = overlay::start(&config, client.clone(), Arc::clone(&catalog), &registry, &shutdown)?;

    let resolved = resolve::start(objects, Arc::clone(&catalog), &shutdown);
    shutdown.spawn(status::write_back(client, resolved.clone(), shutdown.clone()));
    let upstreams =
        Arc::new(Upstreams::new(Arc::clone(&catalog), tunnel, config.node_name.clone(), Arc::clone(&metrics)));
    let proxy = Arc::new(Proxy::new(Arc::clone(&upstreams), &config, Arc::clone(&metrics)));
    let (listeners, opened) = Listeners::new(&config, proxy, metrics, shutdown.clone());
    let task = readiness.task("listeners");
    let table = resolved.clone();
    shutdown.spawn(listeners.run(table, task));

    let page = resolved.clone();
    let routes = AdminRoutes::default()
        .page("/debug/routes", move || resolve::debug_view(&page.borrow()))
        .page("/debug/catalog", {
            let catalog = Arc::clone(&catalog);
            move || edgemesh_mesh::debug::view(&catalog.snapshot())
        })
        .page("/debug/upstreams", move || upstreams.debug_view());
    tokio::spawn(admin.serve(registry, readiness, routes, shutdown.clone()));
    Ok(Bound { admin: admin_address, listeners: opened, shutdown, drain })
}
