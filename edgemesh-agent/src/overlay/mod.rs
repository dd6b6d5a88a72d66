//! The way to nodes of other networks: the tunnel, who its peers are, what this node publishes about itself, the streams
//! that it accepts, and the listener for the Service ports that go through it.

mod accept;
mod access;
mod affinity;
mod called;
mod choices;
mod keepalive;
mod leads;
mod metrics;
mod open_connections;
mod proxied;
mod proxied_udp;
mod service_metrics;
mod upstream;

pub(crate) use upstream::is_of_this_host;

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use edgemesh_api::names;
use edgemesh_discovery::{peers, publish::Publisher};
use edgemesh_mesh::{
    Catalog, CatalogStore, Viewpoint,
    cidr::Cidr,
    health::{Health, HealthSettings},
    model::ServiceName,
};
use edgemesh_telemetry::Shutdown;
use edgemesh_tunnel::{Multiaddr, Tunnel, TunnelConfig};
use parking_lot::{Mutex, RwLock};
use prometheus_client::registry::Registry;

use self::keepalive::Keepalive;
use crate::{
    config::Config,
    datapath::frontend_counts::CountsFrontends,
    island::Reports,
    node_local::{Allocator, PROXIED_PORT},
};

/// The name of this component in MeshNodes.
pub(crate) const COMPONENT: &str = "agent";

/// From where the agent sees the mesh.
#[derive(Debug, Clone)]
struct Standpoint {
    node: Arc<str>,
    config: Arc<Config>,
}

impl Standpoint {
    fn viewpoint(&self, catalog: &Catalog) -> Viewpoint {
        self.config.viewpoint(catalog)
    }
}

/// The running overlay.
#[derive(Debug, Clone)]
pub struct Overlay {
    tunnel: Tunnel,
    proxied: SocketAddr,
    pods: Arc<Vec<SocketAddr>>,
    pod_sockets: Arc<Mutex<Vec<PodSockets>>>,
    health: Arc<Health>,
    services: service_metrics::ServiceMetrics,
}

/// The sockets of one family to which calls of pods are to be handed.
#[derive(Debug)]
pub struct PodSockets {
    /// Where both listen, on the loopback interface.
    pub address: SocketAddr,
    /// A listening TCP socket.
    pub tcp: OwnedFd,
    /// A UDP socket.
    pub udp: OwnedFd,
}

impl Overlay {
    /// Starts the tunnel, which gives `reports` what other agents say, and the proxied listener; everything is bound when this returns. Needs a Tokio runtime.
    ///
    /// # Errors
    /// When an address or the identity can't be used.
    pub fn start(
        config: &Config,
        catalog: Arc<CatalogStore>,
        client: kube::Client,
        allocator: Arc<Allocator>,
        reports: Arc<Reports>,
        registry: &RwLock<Registry>,
        shutdown: &Shutdown,
    ) -> anyhow::Result<Self> {
        let proxied = SocketAddr::from((Ipv4Addr::UNSPECIFIED, PROXIED_PORT));
        Self::start_at(proxied, config, catalog, client, allocator, reports, registry, shutdown)
    }

    /// Like [`Overlay::start`], with another address for the proxied listener.
    ///
    /// # Errors
    /// When an address or the identity can't be used.
    #[expect(clippy::too_many_arguments, reason = "each is another part of the agent")]
    pub fn start_at(
        proxied: SocketAddr,
        config: &Config,
        catalog: Arc<CatalogStore>,
        client: kube::Client,
        allocator: Arc<Allocator>,
        reports: Arc<Reports>,
        registry: &RwLock<Registry>,
        shutdown: &Shutdown,
    ) -> anyhow::Result<Self> {
        let standpoint = Standpoint { node: config.node_name.as_str().into(), config: Arc::new(config.clone()) };
        let acceptor = Arc::new(accept::Acceptor::new(standpoint.clone(), catalog.clone(), reports, shutdown.clone()));
        let tunnel_config = tunnel_config(config)?;
        let tunnel = Tunnel::start(&tunnel_config, acceptor, registry, shutdown).context("starting the tunnel")?;

        let metrics = metrics::ProxiedMetrics::register(&mut registry.write());
        let max = Duration::from_secs(config.proxied.max_ejection_seconds);
        let health = Arc::new(Health::new(HealthSettings { max, ..HealthSettings::default() }, rand::random()));
        let keepalive = Keepalive::after(Duration::from_secs(config.proxied.keepalive_seconds));
        let node_local = allocator.range_of(Ipv4Addr::UNSPECIFIED.into());
        let dialer = upstream::Dialer::new(
            standpoint.clone(),
            node_local,
            catalog.clone(),
            tunnel.clone(),
            health.clone(),
            metrics.clone(),
            keepalive,
        );
        let dialer = Arc::new(dialer);
        let services = service_metrics::ServiceMetrics::register(&mut registry.write(), catalog.clone());
        spawn_until_stopping(shutdown, services.clone().follow());
        let accounts = access::Accounts { services: services.clone(), catalog: catalog.clone() };
        let parts = |listening, metrics| {
            Arc::new(proxied::Parts {
                dialer: dialer.clone(),
                listening,
                metrics,
                accounts: accounts.clone(),
                keepalive,
                udp_idle: Duration::from_secs(config.proxied.udp_idle_seconds),
                shutdown: shutdown.clone(),
            })
        };
        let listening = called::Listening::Services(allocator.clone());
        let listener = proxied::Proxied::bind(proxied, parts(listening.clone(), metrics.clone()))
            .with_context(|| format!("listening on {proxied} for proxied Service ports"))?;
        let proxied = listener.address();
        listener.start();
        let any6 = SocketAddr::from((Ipv6Addr::UNSPECIFIED, proxied.port()));
        if allocator.range_of(any6.ip()).is_some() {
            let listener = proxied::Proxied::bind(any6, parts(listening, metrics))
                .with_context(|| format!("listening on {any6} for proxied Service ports"))?;
            listener.start();
        }
        let metrics = metrics::ProxiedMetrics::register_for_pods(&mut registry.write());
        let mut pods = Vec::new();
        for loopback in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
            let address = SocketAddr::new(loopback, 0);
            match proxied::Proxied::bind(address, parts(called::Listening::Pods, metrics.clone())) {
                Ok(listener) => {
                    let (tcp, udp) = listener.descriptors().context("the listener for calls of pods")?;
                    pods.push(PodSockets { address: listener.address(), tcp, udp });
                    listener.start();
                }
                // A host without IPv6.
                Err(error) if loopback.is_ipv6() => tracing::debug!(%error, "calls of pods by IPv6 are not taken"),
                Err(error) => return Err(error).context("listening for calls of pods"),
            }
        }

        let node = standpoint.node;
        spawn_until_stopping(shutdown, peers::follow(COMPONENT, node.clone(), catalog.clone(), tunnel.clone()));
        let publisher = Publisher::new(COMPONENT, node, config.tunnel.relay, catalog, client, &tunnel);
        spawn_until_stopping(shutdown, publisher.run());
        let addresses = pods.iter().map(|sockets| sockets.address).collect();
        Ok(Self {
            tunnel,
            proxied,
            pods: Arc::new(addresses),
            pod_sockets: Arc::new(Mutex::new(pods)),
            health,
            services,
        })
    }

    /// The sockets for calls of pods, by family; they can be taken once.
    pub fn take_pod_sockets(&self) -> Vec<PodSockets> {
        std::mem::take(&mut self.pod_sockets.lock())
    }

    /// Where calls of pods are listened for, TCP and UDP.
    pub fn pod_addresses(&self) -> &[SocketAddr] {
        &self.pods
    }

    /// The tunnel.
    pub fn tunnel(&self) -> &Tunnel {
        &self.tunnel
    }

    /// Where proxied Service ports are listened for, TCP and UDP.
    pub fn proxied_address(&self) -> SocketAddr {
        self.proxied
    }

    /// Which endpoints could not be reached lately.
    pub fn health(&self) -> &Health {
        &self.health
    }

    /// Has the counters by Service show what a datapath counts, too.
    pub fn count_frontends(&self, datapath: Arc<dyn CountsFrontends>) {
        self.services.add(datapath);
    }

    /// What became of the calls of a Service, for pages.
    pub fn counters_of(&self, service: &ServiceName) -> serde_json::Value {
        self.services.view(service)
    }

    /// `/debug/proxied`: the endpoints that are passed over, and for how long.
    pub fn debug_page(&self) -> impl Fn() -> serde_json::Value + Send + Sync + 'static {
        let health = self.health.clone();
        move || health.debug_view(Instant::now())
    }
}

/// Runs work that ends when the agent begins to stop.
fn spawn_until_stopping(shutdown: &Shutdown, work: impl Future<Output = ()> + Send + 'static) {
    let stopping = shutdown.stopping().clone();
    shutdown.spawn(async move {
        tokio::select! {
            () = work => {}
            () = stopping.cancelled() => {}
        }
    });
}

fn tunnel_config(config: &Config) -> anyhow::Result<TunnelConfig> {
    let settings = &config.tunnel;
    let mut tunnel =
        TunnelConfig::new(config.data_dir.join("identity.key"), config.node_name.as_str(), COMPONENT, settings.port);
    tunnel.listen = settings.listen.iter().flat_map(|ip| listen_addresses(*ip, settings.port)).collect();
    tunnel.advertise = settings
        .advertise
        .iter()
        .map(|text| text.parse().with_context(|| format!("tunnel.advertise: `{text}` is not a multiaddr")))
        .collect::<anyhow::Result<_>>()?;
    tunnel.relay_server = settings.relay;
    // Addresses of bridges to this node's pods lead nowhere elsewhere.
    let pods = [names::DEFAULT_POD_CIDR, names::DEFAULT_POD_CIDR6].into_iter().filter_map(Cidr::parse);
    tunnel.exclude = pods.map(|cidr| (cidr.network(), cidr.prefix())).collect();
    Ok(tunnel)
}

/// QUIC and TCP at one address.
fn listen_addresses(ip: IpAddr, port: u16) -> [Multiaddr; 2] {
    let base = match ip {
        IpAddr::V4(ip) => format!("/ip4/{ip}"),
        IpAddr::V6(ip) => format!("/ip6/{ip}"),
    };
    [format!("{base}/udp/{port}/quic-v1"), format!("{base}/tcp/{port}")]
        .map(|text| text.parse().unwrap_or_else(|_| Multiaddr::empty()))
}
