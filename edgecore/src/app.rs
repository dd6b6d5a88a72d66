//! Puts edgecore together: binds everything first, then starts it, and stops it in order. Nothing here waits for the cloud.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context, ensure};
use edgemesh_apiserver::{
    Identity, Mode, StoreOptions,
    auth::{Authenticator, Authorizer},
    server::{Server, ServerOptions},
    store::Store,
};
use edgemesh_link::transport;
use edgemesh_telemetry::{Admin, AdminRoutes, Readiness, Shutdown};
use parking_lot::RwLock;
use prometheus_client::registry::Registry;
use tokio::sync::watch;

use crate::{
    config::Config,
    join::Membership,
    link::{self, LinkConfig, LinkStatus},
    metrics::Metrics,
    node::{self, NodeConfig},
    pods::{PodRunner, PodRunnerConfig},
};

/// Requests, watches and connections that the metaserver serves at once: a handful of daemons use it.
const METASERVER_LIMITS: (usize, usize, usize) = (32, 256, 256);

/// An edgecore that runs.
#[derive(Debug)]
pub struct Bound {
    /// The node's Kubernetes API.
    pub metaserver: SocketAddr,
    /// The admin endpoint.
    pub admin: SocketAddr,
    /// The store.
    pub store: Store,
    /// The link.
    pub link: LinkStatus,
    /// Tells when everything is up. The cloud is not needed for that.
    pub readiness: Readiness,
    shutdown: Shutdown,
    drain: Duration,
}

impl Bound {
    /// Stops: no new requests, what is under way finishes, the link says goodbye. Containers keep running.
    pub async fn stop(self) {
        self.shutdown.drain(self.drain).await;
    }
}

/// Binds and starts everything.
///
/// # Errors
/// When the node has not joined, or a folder, port, or the store can't be used.
pub async fn build(config: Config) -> anyhow::Result<Bound> {
    let membership = Membership::load(&config.data_dir)?;
    if let Some(name) = &config.node_name {
        ensure!(
            *name == membership.node,
            "nodeName is {name:?}, but this node joined as {:?}: correct the setting, or join again with another dataDir",
            membership.node
        );
    }
    let name = membership.node.clone();
    let hub = transport::hub_address(&membership.hub).map_err(|error| anyhow::anyhow!("join.json: {error}"))?;
    let shutdown = Shutdown::default();
    let readiness = Readiness::default();
    let registry: Arc<RwLock<Registry>> = Arc::default();

    let admin = Admin::bind(config.admin.listen).await?;
    let database = config.data_dir.join("store.db");
    let store = Store::open(&database, Mode::Replica { node: name.clone() }, StoreOptions::small())
        .await
        .with_context(|| format!("the store {} can't be opened", database.display()))?;
    let (cloud_sender, cloud) = watch::channel(false);
    let (max_requests, max_watches, max_connections) = METASERVER_LIMITS;
    let options = ServerOptions {
        // Whoever can connect to loopback acts as the node.
        authenticator: Authenticator::everyone_is(Identity::node(&name)),
        authorizer: Authorizer::Copy,
        max_requests,
        max_watches,
        max_connections,
        cloud: Some(cloud),
        ..ServerOptions::default()
    };
    let metaserver = Server::bind(config.metaserver.listen, None, store.clone(), options).await?;
    let metaserver_address = metaserver.address;
    shutdown.spawn(metaserver.serve(shutdown.stopping().clone()));

    let metrics = Metrics::register(&registry);
    let runner = if config.cri_socket.as_os_str().is_empty() {
        None
    } else {
        let task = readiness.task("pods");
        let runner = PodRunner::start(pods(&config, &name), store.clone(), &shutdown, &registry)?;
        task.ready();
        Some(runner)
    };
    let link_config = LinkConfig {
        node: name.clone(),
        hub: membership.hub,
        pki_dir: config.data_dir.join("pki"),
        cloud: cloud_sender,
    };
    let link = link::start(link_config, store.clone(), metrics, &shutdown)?;
    let node_config = NodeConfig {
        name: name.clone(),
        address: config.node_ip,
        address6: config.node_ip6,
        hub,
        network: config.network.clone(),
        role: config.role,
        labels: config.labels.clone(),
        data_dir: config.data_dir.clone(),
    };
    let conditions = runner.as_ref().map(PodRunner::watch_conditions);
    node::start(node_config, store.clone(), conditions, link.synced(), &shutdown);

    let admin_address = admin.address();
    let routes = AdminRoutes::default().page("/debug/link", {
        let link = link.clone();
        move || link.describe()
    });
    tokio::spawn(admin.serve(registry, readiness.clone(), routes, shutdown.clone()));
    tracing::info!(node = name, metaserver = %metaserver_address, "edgecore started");
    Ok(Bound {
        metaserver: metaserver_address,
        admin: admin_address,
        store,
        link,
        readiness,
        shutdown,
        drain: Duration::from_secs(config.drain_seconds),
    })
}

fn pods(config: &Config, node: &str) -> PodRunnerConfig {
    PodRunnerConfig {
        node_name: node.to_owned(),
        cri_socket: config.cri_socket.clone(),
        cgroup_root: config.cgroup_root.clone(),
        pods_dir: config.pods_dir(),
        cluster_dns: config.cluster_dns.clone(),
        cluster_domain: config.cluster_domain.clone(),
        resolv_conf: config.resolv_conf.clone(),
        cni_conf_dir: config.cni_conf_dir.clone(),
        cni_bin_dir: config.cni_bin_dir.clone(),
        cluster_ranges: config.cluster_ranges.clone(),
    }
}
