//! Puts the hub together: binds everything first, then starts it, and stops it in order.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use anyhow::Context;
use edgemesh_api::names;
use edgemesh_link::{
    Limits,
    tls::{self, KeyPair},
};
use edgemesh_telemetry::{Admin, AdminRoutes, Readiness, Shutdown};
use kube::Client;
use parking_lot::RwLock;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;

use crate::{
    config::Config,
    controllers::{self, ControllerConfig},
    endpoint::Endpoint,
    identity,
    join::Joining,
    metrics::Metrics,
    nodes::Nodes,
    session::Sessions,
    standalone::{self, Standalone},
    watch,
    writes::Writer,
};

/// A hub that runs.
#[derive(Debug)]
pub struct Bound {
    /// Where the Kubernetes API listens, with `standalone`.
    pub api: Option<SocketAddr>,
    /// Where nodes join and connect.
    pub link: SocketAddr,
    /// The admin endpoint.
    pub admin: SocketAddr,
    /// The administrator's kubeconfig, with `standalone`.
    pub admin_kubeconfig: Option<PathBuf>,
    /// Tells when everything is up.
    pub readiness: Readiness,
    shutdown: Shutdown,
    drain: Duration,
}

impl Bound {
    /// Stops: sessions say goodbye, requests finish, the API last.
    pub async fn stop(self) {
        self.shutdown.drain(self.drain).await;
    }
}

/// Binds and starts everything.
///
/// # Errors
/// When a folder, a port, the store or the cluster's API can't be used.
pub async fn build(config: Config) -> anyhow::Result<Bound> {
    std::fs::create_dir_all(&config.data_dir)
        .with_context(|| format!("the folder {} can't be made", config.data_dir.display()))?;
    let shutdown = Shutdown::default();
    let readiness = Readiness::default();
    let registry: Arc<RwLock<Registry>> = Arc::default();
    let admin = Admin::bind(config.admin.listen).await?;
    let link = TcpListener::bind(config.link.listen)
        .await
        .with_context(|| format!("the nodes' port can't listen on {}", config.link.listen))?;

    let mut api = None;
    let mut api_server = None;
    let (client, authority) = if config.standalone {
        let authority = identity::local_authority(&config.data_dir)?;
        let Standalone { server, client, public_url } = standalone::bind(&config, &authority).await?;
        let address = server.address;
        api = Some(address);
        api_server = Some(public_url);
        let stopping = shutdown.stopping().clone();
        shutdown.spawn(server.serve(stopping));
        let task = readiness.task("bootstrap");
        standalone::bootstrap(&client, &config, address.port()).await?;
        task.ready();
        (client, authority)
    } else {
        let client = match &config.kubeconfig {
            Some(path) => standalone::client_from(path).await?,
            None => Client::try_default().await.context("no kubeconfig is set, and this is no pod of a cluster")?,
        };
        let authority = identity::cluster_authority(&client, &config.data_dir).await?;
        (client, authority)
    };
    identity::publish(&client, &authority).await.context("the authority's certificate can't be published")?;

    let nodes = Arc::new(Nodes::new(Limits::default()));
    let metrics = Metrics::register(&registry, &nodes);
    let complete = watch::start(&client, &nodes, readiness.task("watches"), &shutdown);
    if config.standalone {
        let settings = ControllerConfig {
            pod_ranges: config.pod_ranges()?,
            registry: Arc::clone(&registry),
            ..ControllerConfig::default()
        };
        shutdown.spawn(controllers::run(client.clone(), settings, shutdown.clone()));
    }

    let (subject_names, addresses) = config.link.subject_names();
    let subject_names: Vec<_> = subject_names.iter().map(String::as_str).collect();
    let server = authority.issue_server(&subject_names, &addresses)?;
    // Nodes check the whole chain: they pin the authority by the hash in their token.
    let chain = format!("{}{}", server.certificate, authority.certificate_pem());
    let tls = tls::server_config(
        KeyPair { certificate: chain.as_bytes(), key: server.key.as_bytes() },
        authority.certificate_pem().as_bytes(),
    )?;
    let authority = Arc::new(authority);
    let joining = Joining { client: client.clone(), authority, api_server, metrics: metrics.clone() };
    let sessions = Sessions {
        nodes: Arc::clone(&nodes),
        writer: Writer::new(client, Arc::clone(&nodes), metrics.clone(), shutdown.clone()),
        metrics,
        stopping: shutdown.stopping().clone(),
    };
    let link_address = link.local_addr()?;
    let endpoint = Endpoint::new(link, tls, joining, sessions, complete, shutdown.clone())?;
    shutdown.spawn(endpoint.serve());

    let admin_address = admin.address();
    let routes = AdminRoutes::default().page("/debug/sessions", {
        let nodes = Arc::clone(&nodes);
        move || nodes.describe()
    });
    tokio::spawn(admin.serve(registry, readiness.clone(), routes, shutdown.clone()));
    let admin_kubeconfig = config.standalone.then(|| config.data_dir.join("admin.kubeconfig"));
    tracing::info!(
        link = %link_address,
        api = api.map(tracing::field::display),
        namespace = names::SYSTEM_NAMESPACE,
        "hub started"
    );
    Ok(Bound {
        api,
        link: link_address,
        admin: admin_address,
        admin_kubeconfig,
        readiness,
        shutdown,
        drain: Duration::from_secs(config.drain_seconds),
    })
}

/// Makes a join token for a node, which may run a `gateway`, with the cluster's API by `kubeconfig`, else by the configuration.
///
/// # Errors
/// When there is no kubeconfig, or the API refuses.
pub async fn create_token(
    config: &Config,
    kubeconfig: Option<PathBuf>,
    node: &str,
    gateway: bool,
    ttl_seconds: u64,
) -> anyhow::Result<String> {
    let path = kubeconfig.or_else(|| config.kubeconfig.clone());
    let path = path.unwrap_or_else(|| config.data_dir.join("admin.kubeconfig"));
    let client = standalone::client_from(&path).await?;
    crate::tokens::create(&client, node, gateway, ttl_seconds).await
}
