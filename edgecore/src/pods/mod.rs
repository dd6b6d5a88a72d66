//! Pods of this node: run over the container runtime, restored from the store, with no need of the cloud.
//!
//! `runner` follows the store and gives every pod an owner task (`worker`). A worker compares what the pod should be with what
//! the runtime has (`actual`), decides the next steps (`plan`), takes them (`starting`, `ending`) and writes the status (`status`).

mod actual;
mod api;
mod backoff;
mod cgroup;
mod container;
mod dns;
mod ending;
mod env;
mod events;
mod expansion;
mod folders;
mod images;
mod inputs;
mod logs;
mod metrics;
mod plan;
mod quantity;
mod relist;
mod resources;
mod runner;
mod sandbox;
mod starting;
mod status;
mod volumes;
mod worker;

use std::{net::IpAddr, path::PathBuf, sync::Arc};

use edgemesh_apiserver::store::Store;
use edgemesh_telemetry::drain::Shutdown;
use parking_lot::RwLock;
use prometheus_client::registry::Registry;
use tokio::sync::{Semaphore, watch};

use crate::{
    network::{self, NetworkConfig, addresses::Addresses},
    runtime::{Runtime, RuntimeCondition, RuntimeError, RuntimeMetrics, RuntimeVersion},
};

/// Sandboxes that are made at the same time: each pod's address is prepared for the one run of the network plugin.
const SANDBOXES_AT_ONCE: usize = 1;
/// Images that are pulled at the same time.
const PULLS_AT_ONCE: usize = 2;

/// Where and how the pods of a node run.
#[derive(Debug, Clone)]
pub struct PodRunnerConfig {
    /// This node's name; pods with this `spec.nodeName` are run.
    pub node_name: String,
    /// The runtime's socket.
    pub cri_socket: PathBuf,
    /// The cgroup below which all pods are, in the runtime's hierarchy (cgroupfs driver).
    pub cgroup_root: String,
    /// The folder of the pods' volumes and logs.
    pub pods_dir: PathBuf,
    /// The addresses of the cluster's DNS; empty: pods use the node's resolver.
    pub cluster_dns: Vec<IpAddr>,
    /// The cluster's domain.
    pub cluster_domain: String,
    /// The node's resolver settings.
    pub resolv_conf: PathBuf,
    /// Where the runtime looks for CNI configuration; one is written when there is none.
    pub cni_conf_dir: PathBuf,
    /// Where the CNI plugins are.
    pub cni_bin_dir: PathBuf,
    /// Ranges inside of the cluster, to which pods keep their address: the pod ranges of all nodes.
    pub cluster_ranges: Vec<String>,
}

/// What the Node's status says about the runtime.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeConditions {
    /// Whether containers can be run.
    pub runtime: RuntimeCondition,
    /// Whether pods get a network.
    pub network: RuntimeCondition,
    /// The runtime's name and version, once it answered.
    pub version: Option<RuntimeVersion>,
}

impl NodeConditions {
    /// Whether pods can run.
    pub fn ready(&self) -> bool {
        self.runtime.ready && self.network.ready
    }
}

/// Why the pods can't be run at all.
#[derive(Debug, thiserror::Error)]
pub enum PodRunnerError {
    /// The runtime's socket can't be used.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The folder for pods can't be made.
    #[error("the folder for pods {path}: {source}")]
    Folder {
        /// Which folder.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
}

/// Runs the pods of this node until the shutdown; containers keep running then, and are taken over by the next start.
#[derive(Debug, Clone)]
pub struct PodRunner {
    conditions: watch::Receiver<NodeConditions>,
    runtime: Runtime,
}

impl PodRunner {
    /// Starts everything that runs pods. The runtime need not answer yet.
    ///
    /// # Errors
    /// When the configuration can't work.
    pub fn start(
        config: PodRunnerConfig,
        store: Store,
        shutdown: &Shutdown,
        registry: &Arc<RwLock<Registry>>,
    ) -> Result<Self, PodRunnerError> {
        let folder = |source| PodRunnerError::Folder { path: config.pods_dir.clone(), source };
        std::fs::create_dir_all(&config.pods_dir).map_err(folder)?;
        let private = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        // Secrets are in here.
        std::fs::set_permissions(&config.pods_dir, private).map_err(folder)?;

        let runtime_metrics = RuntimeMetrics::default();
        let metrics = metrics::PodMetrics::default();
        {
            let mut registry = registry.write();
            runtime_metrics.register(&mut registry);
            metrics.register(&mut registry);
        }
        let runtime = Runtime::new(&config.cri_socket, runtime_metrics)?;
        let api = api::NodeApi::new(store.clone(), &config.node_name);
        let events = events::Events::start(api.clone(), &config.node_name, metrics.clone(), shutdown);
        let ipam_dir = config.pods_dir.with_file_name("ipam");
        let addresses = Addresses::new(&ipam_dir, &config.pods_dir);
        let pod_ranges = network::start(
            NetworkConfig {
                node_name: config.node_name.clone(),
                cni_conf_dir: config.cni_conf_dir.clone(),
                cni_bin_dir: config.cni_bin_dir.clone(),
                ipam_dir,
                cluster_ranges: config.cluster_ranges.clone(),
                mtu: None,
            },
            store,
            shutdown,
        );
        let (relists, conditions) = relist::start(runtime.clone(), shutdown);
        let shared = Arc::new(worker::Shared {
            machine: resources::Machine::read(),
            addresses,
            pod_ranges,
            sandbox_slots: Semaphore::new(SANDBOXES_AT_ONCE),
            pull_slots: Semaphore::new(PULLS_AT_ONCE),
            runtime: runtime.clone(),
            api,
            events,
            metrics,
            conditions: conditions.clone(),
            config,
        });
        runner::start(shared, relists, shutdown);
        Ok(Self { conditions, runtime })
    }

    /// The runtime's state now.
    pub fn conditions(&self) -> NodeConditions {
        self.conditions.borrow().clone()
    }

    /// The runtime's state, whenever it changes.
    pub fn watch_conditions(&self) -> watch::Receiver<NodeConditions> {
        self.conditions.clone()
    }

    /// A client of the runtime, for what else the node does with containers.
    pub fn runtime(&self) -> &Runtime {
        &self.runtime
    }
}
