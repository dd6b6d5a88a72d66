//! A cluster in one process: the embedded API, the controllers, and nodes that answer as edgecore does but run nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    path::Path,
    pin::pin,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use edgemesh_apiserver::{
    Identity, Mode, ServiceRanges, Store, StoreOptions,
    auth::{Authenticator, Authorizer},
    server::{Server, ServerOptions},
};
use edgemesh_telemetry::Shutdown;
use futures::StreamExt;
use hub::controllers::{self, ControllerConfig};
use k8s_openapi::api::{
    coordination::v1::Lease,
    core::v1::{Node, Pod},
};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{DeleteParams, Patch, PatchParams, PostParams},
    runtime::{WatchStreamExt, watcher},
};
use parking_lot::RwLock;
use prometheus_client::registry::Registry;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

/// Longest wait for anything; far above what is needed, as the machine may be busy.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);
/// How long a silent node is waited for in tests.
pub(crate) const NODE_GRACE: Duration = Duration::from_secs(2);

pub(crate) struct Cluster {
    pub(crate) client: Client,
    pub(crate) observed: Arc<Mutex<Observed>>,
    pub(crate) registry: Arc<RwLock<Registry>>,
    shutdown: Shutdown,
    controllers: Shutdown,
    server: Shutdown,
    address: SocketAddr,
    folder: tempfile::TempDir,
}

/// What the pods' watch saw.
#[derive(Default)]
pub(crate) struct Observed {
    /// Every pod there ever was.
    pub(crate) created: BTreeSet<String>,
    /// Present pods by name: active (not terminating), and ready.
    pub(crate) present: BTreeMap<String, (bool, bool)>,
    /// The most active and the fewest ready pods since the last reset.
    pub(crate) most: usize,
    pub(crate) fewest_ready: usize,
}

impl Observed {
    fn ready(&self) -> usize {
        self.present.values().filter(|(active, ready)| *active && *ready).count()
    }

    pub(crate) fn reset(&mut self) {
        self.most = self.present.values().filter(|(active, _)| *active).count();
        self.fewest_ready = self.ready();
        self.created.clear();
    }

    fn note(&mut self) {
        self.most = self.most.max(self.present.values().filter(|(active, _)| *active).count());
        self.fewest_ready = self.fewest_ready.min(self.ready());
    }
}

impl Cluster {
    pub(crate) async fn start() -> Self {
        // The second test of a process finds it installed.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let folder = tempfile::tempdir().unwrap();
        let server = Shutdown::default();
        let address = serve(folder.path(), "127.0.0.1:0".parse().unwrap(), &server).await;
        let url = format!("http://{address}").parse().unwrap();
        let client = Client::try_from(kube::Config::new(url)).unwrap();
        let cluster = Self {
            client,
            observed: Arc::default(),
            registry: Arc::default(),
            shutdown: Shutdown::default(),
            controllers: Shutdown::default(),
            server,
            address,
            folder,
        };
        cluster.run_controllers();
        cluster.observe();
        cluster
    }

    fn run_controllers(&self) {
        let config = ControllerConfig {
            node_grace: NODE_GRACE,
            orphan_grace: Duration::from_millis(100),
            registry: Arc::clone(&self.registry),
            ..ControllerConfig::default()
        };
        self.controllers.spawn(controllers::run(self.client.clone(), config, self.controllers.clone()));
    }

    /// Restarts what the hub's process holds: the controllers are cut off in what they do, the API starts again from its file.
    pub(crate) async fn restart(&mut self) {
        self.controllers.drain(Duration::ZERO).await;
        self.server.drain(Duration::from_secs(20)).await;
        self.controllers = Shutdown::default();
        self.server = Shutdown::default();
        serve(self.folder.path(), self.address, &self.server).await;
        self.registry = Arc::default();
        self.run_controllers();
    }

    pub(crate) async fn stop(self) {
        assert!(self.controllers.drain(Duration::from_secs(20)).await, "a controller didn't end by itself");
        self.shutdown.drain(Duration::ZERO).await;
        assert!(self.server.drain(Duration::from_secs(20)).await, "the API didn't end by itself");
    }

    pub(crate) fn api<K>(&self) -> Api<K>
    where
        K: Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client.clone(), "default")
    }

    fn observe(&self) {
        let observed = Arc::clone(&self.observed);
        let api: Api<Pod> = Api::all(self.client.clone());
        let stopping = self.shutdown.stopping().clone();
        self.shutdown.spawn(async move {
            let mut events = pin!(watcher(api, watcher::Config::default()).default_backoff());
            while let Some(Some(event)) = stopping.run_until_cancelled(events.next()).await {
                let (pod, deleted) = match event {
                    Ok(watcher::Event::Apply(pod) | watcher::Event::InitApply(pod)) => (pod, false),
                    Ok(watcher::Event::Delete(pod)) => (pod, true),
                    _ => continue,
                };
                let mut observed = observed.lock().unwrap();
                if deleted {
                    observed.present.remove(&pod.name_any());
                } else {
                    observed.created.insert(pod.name_any());
                    let active = pod.metadata.deletion_timestamp.is_none();
                    observed.present.insert(pod.name_any(), (active, is_ready(&pod)));
                }
                observed.note();
            }
        });
    }

    /// Adds a node that renews its Lease and brings its pods up after `starting`, until the returned token is cancelled.
    pub(crate) async fn node(&self, name: &str, labels: Value, starting: Duration) -> CancellationToken {
        let mut all = json!({"kubernetes.io/hostname": name});
        for (key, value) in labels.as_object().unwrap() {
            all[key] = value.clone();
        }
        let node = json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": all},
            "status": {
                "allocatable": {"cpu": "8", "memory": "8Gi", "pods": "300"},
                "conditions": [{"type": "Ready", "status": "True", "reason": "EdgecoreReady", "message": "ready"}]
            }
        });
        let nodes: Api<Node> = Api::all(self.client.clone());
        // Nodes register with their status.
        create(&nodes, node).await;
        self.run_node(name, starting)
    }

    /// Has the node `name` work (again).
    pub(crate) fn run_node(&self, name: &str, starting: Duration) -> CancellationToken {
        let stop = self.shutdown.stopping().child_token();
        let stopped = stop.clone();
        let (client, name) = (self.client.clone(), name.to_owned());
        self.shutdown.spawn(async move {
            tokio::select! {
                () = stopped.cancelled() => {}
                () = run_pods(client.clone(), name.clone(), starting) => {}
                () = renew(client, name) => {}
            }
        });
        stop
    }
}

/// Opens the store and serves the API; returns where.
async fn serve(folder: &Path, address: SocketAddr, shutdown: &Shutdown) -> SocketAddr {
    let ranges = ServiceRanges { addresses: vec!["10.96.0.0/16".parse().unwrap()], node_ports: 30_000..=32_767 };
    let options = StoreOptions { services: Some(ranges), ..StoreOptions::default() };
    let store = Store::open(&folder.join("state.db"), Mode::Authoritative, options).await.unwrap();
    let admin = Identity { name: "admin".to_owned(), groups: vec!["system:masters".to_owned()] };
    let options = ServerOptions {
        authenticator: Authenticator::everyone_is(admin),
        authorizer: Authorizer::Cluster,
        ..ServerOptions::default()
    };
    let server = Server::bind(address, None, store, options).await.unwrap();
    let address = server.address;
    shutdown.spawn(server.serve(shutdown.stopping().clone()));
    address
}

async fn renew(client: Client, node: String) {
    let leases: Api<Lease> = Api::namespaced(client, "kube-node-lease");
    let mut ticks = tokio::time::interval(NODE_GRACE / 8);
    loop {
        ticks.tick().await;
        let now = format!("{:.6}", jiff::Timestamp::now());
        let lease = json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": node},
            "spec": {"holderIdentity": node, "leaseDurationSeconds": 40, "renewTime": now}});
        let patch = Patch::Merge(&lease);
        if leases.patch(&node, &PatchParams::default(), &patch).await.is_err() {
            let lease: Lease = serde_json::from_value(lease.clone()).unwrap();
            let _ = leases.create(&PostParams::default(), &lease).await;
        }
    }
}

/// Answers for the pods of a node: running and ready after a while, gone when asked to end.
async fn run_pods(client: Client, node: String, starting: Duration) {
    let filter = watcher::Config::default().fields(&format!("spec.nodeName={node}"));
    let mut events = pin!(watcher(Api::<Pod>::all(client.clone()), filter).default_backoff().applied_objects());
    let mut next_address = 1;
    while let Some(event) = events.next().await {
        let Ok(pod) = event else { continue };
        let api: Api<Pod> = Api::namespaced(client.clone(), &pod.namespace().unwrap());
        let name = pod.name_any();
        if pod.metadata.deletion_timestamp.is_some() {
            let now = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
            let _ = api.delete(&name, &now).await;
        } else if !is_ready(&pod) {
            let number = node.bytes().map(u32::from).sum::<u32>() % 200;
            let address = format!("10.244.{number}.{next_address}");
            next_address += 1;
            tokio::spawn(async move {
                tokio::time::sleep(starting).await;
                set_ready(&api, &name, &address).await;
            });
        }
    }
}

/// Writes the status of a pod that runs.
pub(crate) async fn set_ready(api: &Api<Pod>, name: &str, address: &str) {
    let now = jiff::Timestamp::from_second(jiff::Timestamp::now().as_second()).unwrap();
    let patch = json!({"status": {
        "phase": "Running", "podIP": address, "podIPs": [{"ip": address}],
        "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": now}]
    }});
    // The API may be away for a moment; a pod that is gone is no failure.
    loop {
        match api.patch_status(name, &PatchParams::default(), &Patch::Strategic(&patch)).await {
            Ok(_) | Err(kube::Error::Api(_)) => return,
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

pub(crate) fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    conditions.iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// Creates an object written as JSON.
pub(crate) async fn create<K>(api: &Api<K>, object: Value) -> K
where
    K: Clone + DeserializeOwned + std::fmt::Debug + Serialize,
{
    api.create(&PostParams::default(), &serde_json::from_value(object).unwrap()).await.unwrap()
}

/// Asks again and again until there is an answer; fails after [`DEADLINE`] with what was waited for.
pub(crate) async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, mut ask: impl FnMut() -> F) -> T {
    let start = Instant::now();
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(start.elapsed() < DEADLINE, "not within {DEADLINE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
