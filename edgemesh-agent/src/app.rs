//! Builds the agent's parts in order, and ends them in order.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context as _;
use edgemesh_discovery::{Discovery, DiscoveryConfig, api_client};
use edgemesh_mesh::CatalogStore;
use edgemesh_telemetry::{Admin, AdminRoutes, Readiness, Shutdown};
use parking_lot::RwLock;
use prometheus_client::registry::Registry;
use tokio::task::JoinHandle;

use crate::{
    capture::Capture,
    config::{Config, DnsConfig},
    datapath::{
        Datapath,
        mode::{self, DatapathError},
        plan::{ClusterDns, DNS_PORT},
    },
    dns,
    explain::Explainer,
    health_check,
    island::Island,
    metrics::{CaptureMetrics, DatapathMetrics, IslandMetrics, ProgramMetrics, RouteMetrics},
    node_local::Allocator,
    overlay::Overlay,
    routes::{HostRoutes, RouteError, enable_forwarding},
};

/// A running agent.
#[derive(Debug)]
pub struct Bound {
    /// Where the admin endpoint listens.
    pub admin: SocketAddr,
    /// What must happen before it is ready.
    pub readiness: Readiness,
    /// The catalog.
    pub catalog: Arc<CatalogStore>,
    shutdown: Shutdown,
    drain: Duration,
    /// The tunnel, and the listeners for what goes through it.
    pub overlay: Overlay,
    datapath: Datapath,
    capture: Capture,
    admin_task: JoinHandle<()>,
    config: Arc<Config>,
}

/// Starts the agent: everything is bound and attached when this returns, though not yet ready.
///
/// # Errors
/// When a part can't start; the message says which and why.
pub async fn build(config: Config) -> anyhow::Result<Bound> {
    let config = Arc::new(config);
    let shutdown = Shutdown::default();
    match assemble(config, &shutdown).await {
        Ok(bound) => Ok(bound),
        Err(error) => {
            // What has begun must not outlive the failure.
            shutdown.drain(Duration::ZERO).await;
            Err(error)
        }
    }
}

async fn assemble(config: Arc<Config>, shutdown: &Shutdown) -> anyhow::Result<Bound> {
    let registry: Arc<RwLock<Registry>> = Arc::default();
    let readiness = Readiness::default();
    let admin = Admin::bind(config.admin.listen).await?;
    tokio::fs::create_dir_all(&config.data_dir)
        .await
        .with_context(|| format!("dataDir {}", config.data_dir.display()))?;

    let api_url = config.kubeconfig.is_none().then(|| config.api_url());
    let client = api_client(config.kubeconfig.as_deref(), api_url.as_deref()).await?;
    let island = Island::new(&config, IslandMetrics::new(&mut registry.write()));
    let discovery = DiscoveryConfig { copy: Some(config.data_dir.join("catalog.json")), services: config.services };
    let catalog = Discovery::start(client.clone(), discovery, shutdown, readiness.task("catalog"));
    island.show_kept(&catalog);

    let mut dns_addresses = vec![config.dns_listen()];
    let mut allocator = Allocator::open(config.node_local_cidr, &config.data_dir.join("node-local.json"))?;
    let routes = HostRoutes::open(shutdown)?;
    routes.deliver_locally(config.node_local_cidr).await?;
    match routes.deliver_locally6(config.node_local_cidr6).await {
        Ok(()) => {
            allocator = allocator.with_ipv6(config.node_local_cidr6);
            dns_addresses.extend(config.dns_listen6());
        }
        Err(error) => {
            tracing::warn!(%error, "no IPv6 on this host: Services are reached through the tunnel, and cluster DNS answers, by IPv4 only")
        }
    }
    let allocator = Arc::new(allocator);
    let dns = dns::Server::bind(&dns_addresses, Arc::clone(&catalog), &config.dns, &registry)?;
    let cluster_dns = dns.addresses().filter_map(|listener| cluster_dns(&config.dns, listener)).collect();
    let asker = dns.serve(shutdown).context("DNS threads")?;
    if config.routes {
        enable_forwarding();
        let metrics = RouteMetrics::new(&mut registry.write());
        shutdown.spawn(routes.keep(Arc::clone(&config), Arc::clone(&catalog), metrics, shutdown.clone()));
    } else {
        shutdown.spawn(routes.leave());
    }

    let pods = client.clone();
    let overlay = Overlay::start(
        &config,
        Arc::clone(&catalog),
        client.clone(),
        Arc::clone(&allocator),
        island.reports(),
        &registry,
        shutdown,
    )?;
    island.start(&config, &catalog, client, overlay.tunnel().clone(), shutdown);
    tracing::info!(peer = %overlay.tunnel().peer_id(), proxied = %overlay.proxied_address(), "overlay started");

    let metrics = DatapathMetrics::new(&mut registry.write());
    let datapath = Datapath::start(
        Arc::clone(&config),
        Arc::clone(&catalog),
        Arc::clone(&allocator),
        cluster_dns,
        metrics,
        shutdown,
        readiness.task("datapath"),
    )?;
    overlay.count_frontends(datapath.rule_counts());
    if let Some(counters) = datapath.counters() {
        overlay.count_frontends(counters.clone());
        registry.write().register_collector(Box::new(ProgramMetrics(counters)));
    }

    shutdown.spawn(health_check::keep(config.node_name.clone(), Arc::clone(&catalog), shutdown.clone()));

    let metrics = CaptureMetrics::new(&mut registry.write());
    let capture =
        Capture::start(Arc::clone(&config), Arc::clone(&catalog), overlay.take_pod_sockets(), metrics, shutdown)?;

    let debug_catalog = Arc::clone(&catalog);
    let pages = AdminRoutes::default()
        .page("/debug/catalog", move || edgemesh_mesh::debug::view(&debug_catalog.snapshot()))
        .page("/debug/datapath", datapath.debug_page())
        .page("/debug/proxied", overlay.debug_page())
        .page("/debug/capture", capture.debug_page())
        .page("/debug/island", island.debug_page());
    let explainer = Explainer {
        config: Arc::clone(&config),
        catalog: Arc::clone(&catalog),
        overlay: overlay.clone(),
        dns: asker,
        client: pods,
        datapath: Box::new(datapath.debug_page()),
    };
    let pages = Arc::new(explainer).pages(pages);
    let address = admin.address();
    let admin_task = tokio::spawn(admin.serve(registry, readiness.clone(), pages, shutdown.clone()));
    Ok(Bound {
        admin: address,
        readiness,
        catalog,
        shutdown: shutdown.clone(),
        drain: Duration::from_secs(config.drain_seconds),
        overlay,
        datapath,
        capture,
        admin_task,
        config,
    })
}

/// The cluster DNS address for which a listener answers, if there is one of its family.
fn cluster_dns(config: &DnsConfig, listener: SocketAddr) -> Option<ClusterDns> {
    let address = match listener {
        SocketAddr::V4(_) => config.cluster_address.into(),
        SocketAddr::V6(_) => config.cluster_address6?.into(),
    };
    Some(ClusterDns { address: SocketAddr::new(address, DNS_PORT), listener })
}

/// Removes what the agent of this configuration leaves in the kernel when it ends: programs with their maps, rules, all routes, and
/// what captures calls of pods. Not to be called in a Tokio runtime.
///
/// # Errors
/// When something can't be removed.
pub fn uninstall(config: &Config) -> Result<(), UninstallError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(RouteError::from)?;
    let routes = runtime.block_on(async {
        let routes = HostRoutes::open_beyond_drain()?;
        Capture::uninstall(&routes, config).await;
        routes.remove_all().await
    });
    // What serves goes in any case.
    mode::uninstall(config)?;
    Ok(routes?)
}

/// What an uninstallation leaves.
#[derive(Debug, thiserror::Error)]
pub enum UninstallError {
    /// Programs or rules.
    #[error(transparent)]
    Datapath(#[from] DatapathError),
    /// Routes.
    #[error(transparent)]
    Routes(#[from] RouteError),
}

impl Bound {
    /// Stops: nothing new is accepted, and what is in flight may end within `drainSeconds`. Programs and rules serve on, unless
    /// `detachOnStop` is set.
    pub async fn stop(self) {
        self.shutdown.drain(self.drain).await;
        self.datapath.ended().await;
        self.capture.ended().await;
        if self.config.detach_on_stop
            && let Err(error) = mode::uninstall(&self.config)
        {
            tracing::error!(%error, "programs or rules are still there");
        }
        if let Err(error) = self.admin_task.await {
            tracing::error!(%error, "the admin endpoint failed");
        }
    }
}
