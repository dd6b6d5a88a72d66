//! Discovery against the real API: it follows every change, and knows what it knew when the API is away.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, reason = "a test ends where something fails")]

use std::{
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use edgemesh_api::MeshNode;
use edgemesh_apiserver::{
    Identity, Mode, Store, StoreOptions,
    auth::{Authenticator, Authorizer},
    server::{Server, ServerOptions},
};
use edgemesh_discovery::{Discovery, DiscoveryConfig, api_client};
use edgemesh_mesh::{Catalog, CatalogStore};
use edgemesh_telemetry::{Readiness, Shutdown};
use kube::{
    Api, Client, CustomResourceExt,
    api::{DeleteParams, DynamicObject, Patch, PatchParams, PostParams},
    core::{ApiResource, GroupVersionKind},
};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

const DEADLINE: Duration = Duration::from_secs(30);

/// The Kubernetes API on a port of its own, over a store that outlives it.
struct Cluster {
    address: SocketAddr,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl Cluster {
    async fn start(folder: &Path, address: &str) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let store = Store::open(&folder.join("state.db"), Mode::Authoritative, StoreOptions::default()).await.unwrap();
        let options = ServerOptions {
            authenticator: Authenticator::everyone_is(Identity::new("admin", ["system:masters"])),
            authorizer: Authorizer::Cluster,
            ..ServerOptions::default()
        };
        let server = Server::bind(address.parse().unwrap(), None, store, options).await.unwrap();
        let stop = CancellationToken::new();
        Self { address: server.address, stop: stop.clone(), task: tokio::spawn(server.serve(stop)) }
    }

    async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap();
    }

    async fn client(&self) -> Client {
        api_client(None, Some(&format!("http://{}", self.address))).await.unwrap()
    }

    async fn create(&self, object: Value) {
        let (api, object) = self.api(object).await;
        api.create(&PostParams::default(), &object).await.unwrap();
    }

    async fn merge(&self, object: Value) {
        let (api, object) = self.api(object).await;
        let name = object.metadata.name.clone().unwrap();
        api.patch(&name, &PatchParams::default(), &Patch::Merge(&object)).await.unwrap();
    }

    async fn delete(&self, object: Value) {
        let (api, object) = self.api(object).await;
        api.delete(object.metadata.name.as_deref().unwrap(), &DeleteParams::default()).await.unwrap();
    }

    async fn api(&self, object: Value) -> (Api<DynamicObject>, DynamicObject) {
        let object: DynamicObject = serde_json::from_value(object).unwrap();
        let types = object.types.as_ref().unwrap();
        let resource = ApiResource::from_gvk(&GroupVersionKind::try_from(types).unwrap());
        let client = self.client().await;
        let api = match &object.metadata.namespace {
            Some(namespace) => Api::namespaced_with(client, namespace, &resource),
            None => Api::all_with(client, &resource),
        };
        (api, object)
    }
}

/// A running discovery.
struct Running {
    catalog: Arc<CatalogStore>,
    readiness: Readiness,
    shutdown: Shutdown,
}

impl Running {
    async fn start(api: SocketAddr, copy: &Path) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let (readiness, shutdown) = (Readiness::default(), Shutdown::default());
        let client = api_client(None, Some(&format!("http://{api}"))).await.unwrap();
        let config = DiscoveryConfig { copy: Some(copy.to_owned()), ..DiscoveryConfig::default() };
        let catalog = Discovery::start(client, config, &shutdown, readiness.task("catalog"));
        Self { catalog, readiness, shutdown }
    }

    async fn ready(&self) {
        tokio::time::timeout(DEADLINE, self.readiness.wait()).await.expect("never ready");
    }

    async fn until(&self, what: &str, condition: impl Fn(&Catalog) -> bool) {
        let mut generations = self.catalog.subscribe();
        let started = Instant::now();
        while !condition(&self.catalog.snapshot()) {
            let left = DEADLINE.saturating_sub(started.elapsed());
            if tokio::time::timeout(left, generations.changed()).await.is_err() {
                panic!("never happened: {what}: {:#}", edgemesh_mesh::debug::view(&self.catalog.snapshot()));
            }
        }
    }

    async fn stop(self) {
        assert!(self.shutdown.drain(DEADLINE).await, "something didn't end by itself");
    }
}

fn service(name: &str, ip: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default"},
        "spec": {"clusterIP": ip, "clusterIPs": [ip], "ports": [{"name": "http", "port": 80, "targetPort": 8080}],
            "selector": {"app": name}}})
}

fn slice(service: &str, ip: &str) -> Value {
    json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": format!("{service}-1"), "namespace": "default",
            "labels": {"kubernetes.io/service-name": service}},
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        "endpoints": [{"addresses": [ip], "nodeName": "edge-a1", "conditions": {"ready": true}}]})
}

fn node(name: &str, network: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": {"edgemesh.dev/network": network}}})
}

fn names(catalog: &Catalog) -> Vec<String> {
    let mut names: Vec<String> = catalog.services().map(|service| service.name.name.to_string()).collect();
    names.retain(|name| name != "kubernetes");
    names.sort();
    names
}

fn endpoints(catalog: &Catalog, service: &str) -> Vec<String> {
    let Some(service) = catalog.service("default", service) else { return Vec::new() };
    service.ports.iter().flat_map(|port| port.endpoints.iter()).map(|e| format!("{}:{}", e.address, e.port)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_catalog_follows_the_api_and_survives_its_absence() {
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("agent/catalog.json");
    let cluster = Cluster::start(folder.path(), "127.0.0.1:0").await;
    let address = cluster.address;
    cluster.create(service("web", "10.96.0.21")).await;
    cluster.create(service("old", "10.96.0.22")).await;
    cluster.create(slice("web", "10.244.1.1")).await;
    cluster.create(node("edge-a1", "site-a")).await;

    let running = Running::start(address, &copy).await;
    // MeshNodes are not installed in this cluster, and that keeps nobody waiting.
    running.ready().await;
    let catalog = running.catalog.snapshot();
    assert!(catalog.is_synced());
    assert_eq!(names(&catalog), ["old", "web"]);
    assert_eq!(endpoints(&catalog, "web"), ["10.244.1.1:8080"]);
    assert_eq!(&*catalog.node("edge-a1").unwrap().network, "site-a");

    // A change is in the catalog soon.
    let started = Instant::now();
    cluster.merge(slice("web", "10.244.1.2")).await;
    running.until("the new endpoint", |catalog| endpoints(catalog, "web") == ["10.244.1.2:8080"]).await;
    println!("API write to catalog: {:?}", started.elapsed());
    cluster.create(service("new", "10.96.0.23")).await;
    cluster.delete(service("old", "10.96.0.22")).await;
    running.until("a new Service and one gone", |catalog| names(catalog) == ["new", "web"]).await;
    running.stop().await;
    cluster.stop().await;

    // With the API away everything is known from disk.
    let text = std::fs::read_to_string(&copy).unwrap();
    assert!(
        !text.contains("managedFields") && !text.contains("resourceVersion") && !text.contains("selector"),
        "{text}"
    );
    let running = Running::start(address, &copy).await;
    running.ready().await;
    assert_eq!(names(&running.catalog.snapshot()), ["new", "web"]);
    assert_eq!(endpoints(&running.catalog.snapshot(), "web"), ["10.244.1.2:8080"]);

    // While it was away things changed and went; back again, the catalog converges.
    let elsewhere = Cluster::start(folder.path(), "127.0.0.1:0").await;
    elsewhere.delete(service("new", "10.96.0.23")).await;
    elsewhere.delete(slice("web", "10.244.1.2")).await;
    elsewhere.delete(node("edge-a1", "site-a")).await;
    elsewhere.create(service("later", "10.96.0.24")).await;
    elsewhere.stop().await;
    let cluster = Cluster::start(folder.path(), &address.to_string()).await;
    running
        .until("what changed meanwhile", |catalog| {
            names(catalog) == ["later", "web"]
                && endpoints(catalog, "web").is_empty()
                && catalog.node("edge-a1").is_none()
        })
        .await;
    running.stop().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn mesh_nodes_are_known_soon_after_their_kind_is_installed() {
    let folder = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(folder.path(), "127.0.0.1:0").await;
    let running = Running::start(cluster.address, &folder.path().join("catalog.json")).await;
    running.ready().await;
    cluster.create(node("cloud-1", "cloud")).await;
    cluster.create(serde_json::to_value(MeshNode::crd()).unwrap()).await;
    let peer =
        json!({"peerId": "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp", "addresses": [], "relay": true});
    cluster
        .create(json!({"apiVersion": "edgemesh.dev/v1alpha1", "kind": "MeshNode", "metadata": {"name": "cloud-1"},
            "spec": {"peers": {"agent": peer}}}))
        .await;
    let installed = Instant::now();
    running.until("the MeshNode", |catalog| catalog.node("cloud-1").is_some_and(|node| !node.peers.is_empty())).await;
    assert!(installed.elapsed() < Duration::from_secs(3), "it took {:?}", installed.elapsed());
    running.stop().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_copy_is_left_and_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("catalog.json");
    // The first object is whole, the second is cut: half a truth is none.
    let first = service("half", "10.96.0.30").to_string();
    std::fs::write(&copy, format!("{{\"items\":[{first},\n{}", &first[..40])).unwrap();
    let cluster = Cluster::start(folder.path(), "127.0.0.1:0").await;
    let address = cluster.address;
    cluster.create(service("web", "10.96.0.31")).await;
    cluster.stop().await;
    let running = Running::start(address, &copy).await;
    assert!(!running.catalog.is_synced());
    assert_eq!(running.catalog.snapshot().service_count(), 0);
    assert_eq!(running.readiness.pending(), ["catalog"]);
    let cluster = Cluster::start(folder.path(), &address.to_string()).await;
    running.ready().await;
    assert_eq!(names(&running.catalog.snapshot()), ["web"]);
    running.stop().await;
    let text = std::fs::read_to_string(&copy).unwrap();
    let list: Value = serde_json::from_str(&text).unwrap();
    assert!(list["items"].as_array().unwrap().iter().any(|object| object["metadata"]["name"] == "web"), "{text}");
    cluster.stop().await;
}

#[tokio::test]
async fn a_client_needs_something_to_connect_to() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let missing = api_client(Some(Path::new("/nonexistent/kubeconfig")), None).await.err().unwrap();
    assert!(missing.to_string().contains("/nonexistent/kubeconfig"), "{missing}");
    assert!(api_client(None, Some("http://bad url")).await.err().unwrap().to_string().contains("bad url"));
    assert!(api_client(None, None).await.is_err());
}
