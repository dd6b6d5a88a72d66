//! The controllers of `hub --standalone`: what makes `kubectl apply` of a Deployment and a Service work without a cluster.
//!
//! Each is level-triggered: a watch only says *which* object to look at, the decision is made from the caches and
//! repeated until nothing is left to do. `docs/controllers.md` says what each one does and what not.

mod cache;
mod deployment_status;
mod deployments;
mod endpoint_slices;
mod events;
mod fit;
mod garbage_collector;
mod metrics;
mod namespaces;
mod node_ipam;
mod node_lifecycle;
mod owner_graph;
mod ownership;
mod placement;
mod pod_gc;
mod pod_state;
mod pod_template;
mod queue;
mod replica_sets;
mod rollout;
mod scheduler;
mod served;
mod slice_plan;
mod worker;

use std::{sync::Arc, time::Duration};

use edgemesh_api::names::DEFAULT_POD_CIDR;
use edgemesh_telemetry::Shutdown;
use k8s_openapi::api::{
    apps::v1::{Deployment, ReplicaSet},
    coordination::v1::Lease,
    core::v1::{Namespace, Node, Pod, Service, ServiceAccount},
    discovery::v1::EndpointSlice,
};
use kube::{Api, Client};
use parking_lot::RwLock;
use prometheus_client::registry::Registry;
use tokio::task::JoinHandle;

use cache::Cache;
use events::Recorder;
use metrics::ControllerMetrics;
pub use node_ipam::{BadPodRange, PodRange};

/// What the controllers need to know beyond the API.
#[derive(Debug, Clone)]
pub struct ControllerConfig {
    /// The ranges of which each Node gets a block for its pods: a /24, of IPv6 a /64.
    pub pod_ranges: Vec<PodRange>,
    /// How long a Node's Lease may go without renewal before its conditions become Unknown. Kubernetes' default is 40 s.
    pub node_grace: Duration,
    /// How long a pod of a Node that doesn't exist is kept before it is removed.
    pub orphan_grace: Duration,
    /// Where the controllers' metrics go, with the prefix `edgemesh_hub_controller_`.
    pub registry: Arc<RwLock<Registry>>,
}

impl Default for ControllerConfig {
    fn default() -> Self {
        Self {
            pod_ranges: DEFAULT_POD_CIDR.parse().into_iter().collect(),
            node_grace: Duration::from_secs(40),
            orphan_grace: Duration::from_secs(20),
            registry: Arc::default(),
        }
    }
}

/// What all controllers share: the client, one cache for each kind, and where events and metrics go.
pub(crate) struct Context {
    client: Client,
    config: ControllerConfig,
    metrics: ControllerMetrics,
    recorder: Recorder,
    shutdown: Shutdown,
    pods: Arc<Cache<Pod>>,
    services: Arc<Cache<Service>>,
    slices: Arc<Cache<EndpointSlice>>,
    deployments: Arc<Cache<Deployment>>,
    replica_sets: Arc<Cache<ReplicaSet>>,
    nodes: Arc<Cache<Node>>,
    leases: Arc<Cache<Lease>>,
    namespaces: Arc<Cache<Namespace>>,
    service_accounts: Arc<Cache<ServiceAccount>>,
}

/// Runs every controller until the shutdown stops them. `client` may point at any Kubernetes API; on a real cluster
/// they would fight with the cluster's own, so only `--standalone` calls this.
pub async fn run(client: Client, config: ControllerConfig, shutdown: Shutdown) {
    let metrics = ControllerMetrics::register(&config.registry);
    let (recorder, event_task) = events::recorder(client.clone());
    let context = Arc::new(Context {
        metrics,
        recorder,
        pods: Cache::new("pods"),
        services: Cache::new("services"),
        slices: Cache::new("endpointslices"),
        deployments: Cache::new("deployments"),
        replica_sets: Cache::new("replicasets"),
        nodes: Cache::new("nodes"),
        leases: Cache::new("leases"),
        namespaces: Cache::new("namespaces"),
        service_accounts: Cache::new("serviceaccounts"),
        client: client.clone(),
        config,
        shutdown: shutdown.clone(),
    });
    let mut tasks: Vec<JoinHandle<()>> = Vec::new();
    tasks.push(shutdown.spawn(event_task.run(shutdown.clone())));
    let served = served::watch(&context, &mut tasks);

    // Controllers first: they register for changes before the caches begin to fill.
    tasks.extend(endpoint_slices::start(&context));
    tasks.extend(deployments::start(&context));
    tasks.extend(replica_sets::start(&context));
    tasks.extend(scheduler::start(&context));
    tasks.extend(node_lifecycle::start(&context));
    tasks.extend(node_ipam::start(&context));
    tasks.extend(pod_gc::start(&context));
    tasks.extend(namespaces::start(&context, served.clone()));
    tasks.extend(garbage_collector::start(&context, served));

    tasks.push(context.pods.fill(Api::all(client.clone()), &shutdown));
    tasks.push(context.services.fill(Api::all(client.clone()), &shutdown));
    tasks.push(context.slices.fill(Api::all(client.clone()), &shutdown));
    tasks.push(context.deployments.fill(Api::all(client.clone()), &shutdown));
    tasks.push(context.replica_sets.fill(Api::all(client.clone()), &shutdown));
    tasks.push(context.nodes.fill(Api::all(client.clone()), &shutdown));
    let leases = Api::namespaced(client.clone(), edgemesh_api::names::NODE_LEASE_NAMESPACE);
    tasks.push(context.leases.fill(leases, &shutdown));
    tasks.push(context.namespaces.fill(Api::all(client.clone()), &shutdown));
    tasks.push(context.service_accounts.fill(Api::all(client), &shutdown));

    for task in tasks {
        if let Err(error) = task.await {
            tracing::error!(%error, "a controller task ended by a defect; restart the hub");
        }
    }
}

/// Now, in whole seconds, as Kubernetes writes times.
pub(crate) fn now() -> k8s_openapi::apimachinery::pkg::apis::meta::v1::Time {
    let now = jiff::Timestamp::now();
    let seconds = jiff::Timestamp::from_second(now.as_second()).unwrap_or(now);
    k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(seconds)
}
