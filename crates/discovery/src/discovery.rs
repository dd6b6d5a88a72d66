//! Keeps the catalog equal to the API's Services, EndpointSlices, Nodes and MeshNodes, and a copy of them on disk.

use std::{collections::HashSet, path::PathBuf, pin::pin, sync::Arc, time::Duration};

use edgemesh_api::MeshNode;
use edgemesh_mesh::{CatalogStore, from_kubernetes::ServiceSelection};
use edgemesh_telemetry::{ReadinessTask, Shutdown};
use k8s_openapi::api::{
    core::v1::{Node, Service},
    discovery::v1::EndpointSlice,
};
use kube::{Api, Client, Resource, runtime::watcher::Event};
use serde::Serialize;
use serde_json::Value;
use tokio::{sync::mpsc, task::JoinHandle, time::Instant};

use crate::{
    disk_copy::{DiskCopy, Key},
    follow::follow,
    slim,
};

/// Changes are written to disk this long after the first one.
const WRITE_DELAY: Duration = Duration::from_secs(1);
/// Events that wait for the catalog; the watches are slowed down beyond.
const QUEUE: usize = 256;
/// Kinds that must have been listed before the catalog is complete.
const KINDS: [&str; 4] = ["Service", "EndpointSlice", "Node", "MeshNode"];

/// Where the copy on disk is, and what is carried.
#[derive(Debug, Clone, Default)]
pub struct DiscoveryConfig {
    /// The copy's file, for example `/var/lib/edgemesh/agent/catalog.json`. Without one nothing outlives the process.
    pub copy: Option<PathBuf>,
    /// Which Services the mesh carries.
    pub services: ServiceSelection,
}

/// Starts discovery.
#[derive(Debug)]
pub struct Discovery;

/// Namespaces and names of what was listed so far.
type Listing = HashSet<(Arc<str>, Arc<str>)>;

enum Change {
    Service(Box<Event<Service>>),
    EndpointSlice(Box<Event<EndpointSlice>>),
    Node(Box<Event<Node>>),
    MeshNode(Box<Event<MeshNode>>),
}

impl Discovery {
    /// Fills a catalog from the copy on disk, then keeps it equal to the API until shutdown. `readiness` is released
    /// when the catalog is complete: from disk, or once everything was listed.
    ///
    /// Reads the file before it returns. Must be called in a tokio runtime.
    pub fn start(
        client: Client,
        config: DiscoveryConfig,
        shutdown: &Shutdown,
        readiness: ReadinessTask,
    ) -> Arc<CatalogStore> {
        let store = CatalogStore::selecting(config.services);
        let mut owner = Owner {
            store: Arc::clone(&store),
            writes: config.copy.is_some(),
            copy: DiskCopy::new(config.copy.clone().unwrap_or_default()),
            listing: Default::default(),
            listed: HashSet::new(),
            dirty_since: None,
            readiness: Some(readiness),
        };
        if let Some(path) = &config.copy {
            owner.load(path);
        }
        let (changes, received) = mpsc::channel(QUEUE);
        let all = Api::all(client.clone());
        shutdown.spawn(follow(all, false, slim::service, |event| Change::Service(Box::new(event)), changes.clone()));
        let all = Api::all(client.clone());
        let wrap = |event| Change::EndpointSlice(Box::new(event));
        shutdown.spawn(follow(all, false, slim::endpoint_slice, wrap, changes.clone()));
        let all = Api::all(client.clone());
        shutdown.spawn(follow(all, false, slim::node, |event| Change::Node(Box::new(event)), changes.clone()));
        let all = Api::all(client);
        shutdown.spawn(follow(all, true, slim::mesh_node, |event| Change::MeshNode(Box::new(event)), changes));
        let stop = shutdown.clone();
        shutdown.spawn(async move { owner.run(received, &stop).await });
        store
    }
}

/// The one task that writes the catalog and the copy.
struct Owner {
    store: Arc<CatalogStore>,
    writes: bool,
    copy: DiskCopy,
    /// Of each kind that is being listed: what was listed so far.
    listing: [Option<Listing>; KINDS.len()],
    /// Kinds that were listed completely since the start.
    listed: HashSet<&'static str>,
    dirty_since: Option<Instant>,
    readiness: Option<ReadinessTask>,
}

impl Owner {
    fn load(&mut self, path: &std::path::Path) {
        let mut count = 0_usize;
        let result = DiskCopy::read(path, |object| {
            if self.load_object(object) {
                count += 1;
            }
        });
        match result {
            Err(error) => {
                // What was read before the fault may be half of the truth: better to know nothing.
                tracing::warn!(path = %path.display(), %error, "the catalog's copy can't be used; starting empty");
                let keys: Vec<Key> = self.copy.keys().cloned().collect();
                for key in keys {
                    self.delete(&key);
                }
                self.store.publish();
            }
            Ok(()) if count > 0 => {
                tracing::info!(path = %path.display(), objects = count, "catalog loaded from disk");
                self.complete();
            }
            Ok(()) => {}
        }
        self.dirty_since = None;
    }

    fn load_object(&mut self, object: Value) -> bool {
        let kind = object.get("kind").and_then(Value::as_str).unwrap_or("").to_owned();
        let result = match kind.as_str() {
            "Service" => serde_json::from_value(object).map(|object| self.put_service(&object)),
            "EndpointSlice" => serde_json::from_value(object).map(|object| self.put_endpoint_slice(&object)),
            "Node" => serde_json::from_value(object).map(|object| self.put_node(&object)),
            "MeshNode" => serde_json::from_value(object).map(|object| self.put_mesh_node(&object)),
            _ => return false,
        };
        if let Err(error) = &result {
            tracing::warn!(kind, %error, "an object of the catalog's copy was skipped");
        }
        result.is_ok()
    }

    async fn run(mut self, mut received: mpsc::Receiver<Change>, shutdown: &Shutdown) {
        let mut batch = Vec::with_capacity(QUEUE);
        let mut writing: Option<JoinHandle<std::io::Result<()>>> = None;
        let stopping = shutdown.stopping().cancelled();
        let mut stopping = pin!(stopping);
        loop {
            let write_at = self.dirty_since.filter(|_| self.writes && writing.is_none()).map(|t| t + WRITE_DELAY);
            tokio::select! {
                count = received.recv_many(&mut batch, QUEUE) => {
                    if count == 0 {
                        break;
                    }
                    for change in batch.drain(..) {
                        self.apply(change);
                    }
                    self.store.publish();
                }
                () = tokio::time::sleep_until(write_at.unwrap_or_else(Instant::now)), if write_at.is_some() => {
                    self.dirty_since = None;
                    writing = Some(tokio::task::spawn_blocking(self.copy.writing()));
                }
                result = finished(&mut writing) => {
                    writing = None;
                    self.written(result);
                }
                () = &mut stopping => break,
            }
        }
        if writing.is_some() {
            let result = finished(&mut writing).await;
            self.written(result);
        }
        if self.writes && self.dirty_since.is_some() {
            let result = tokio::task::spawn_blocking(self.copy.writing()).await;
            self.written(result.unwrap_or_else(|error| Err(std::io::Error::other(error))));
        }
    }

    fn written(&mut self, result: std::io::Result<()>) {
        if let Err(error) = result {
            tracing::warn!(%error, "the catalog's copy can't be written; trying again with the next change");
        }
    }

    fn apply(&mut self, change: Change) {
        match change {
            Change::Service(event) => self.event(*event, Self::put_service),
            Change::EndpointSlice(event) => self.event(*event, Self::put_endpoint_slice),
            Change::Node(event) => self.event(*event, Self::put_node),
            Change::MeshNode(event) => self.event(*event, Self::put_mesh_node),
        }
    }

    fn event<K: Resource<DynamicType = ()>>(&mut self, event: Event<K>, put: fn(&mut Self, &K)) {
        let kind = K::kind(&());
        let Some(at) = KINDS.iter().position(|known| *known == kind) else { return };
        match event {
            Event::Apply(object) => put(self, &object),
            Event::Delete(object) => self.delete(&key(KINDS[at], &object)),
            Event::Init => self.listing[at] = Some(HashSet::new()),
            Event::InitApply(object) => {
                if let Some(listing) = &mut self.listing[at] {
                    let (_, namespace, name) = key(KINDS[at], &object);
                    listing.insert((namespace, name));
                }
                put(self, &object);
            }
            Event::InitDone => {
                let Some(listed) = self.listing[at].take() else { return };
                let gone = |key: &&Key| key.0 == KINDS[at] && !listed.contains(&(key.1.clone(), key.2.clone()));
                let gone: Vec<Key> = self.copy.keys().filter(gone).cloned().collect();
                for key in &gone {
                    self.delete(key);
                }
                tracing::info!(kind = KINDS[at], listed = listed.len(), gone = gone.len(), "listed");
                self.listed.insert(KINDS[at]);
                if self.listed.len() == KINDS.len() {
                    self.complete();
                }
            }
        }
    }

    /// Everything is known: what depends on it may start.
    fn complete(&mut self) {
        self.store.mark_synced();
        self.store.publish();
        if let Some(readiness) = self.readiness.take() {
            readiness.ready();
        }
    }

    fn put_service(&mut self, object: &Service) {
        if self.keep(object) {
            self.store.apply_service(object);
        }
    }

    fn put_endpoint_slice(&mut self, object: &EndpointSlice) {
        if self.keep(object) {
            self.store.apply_endpoint_slice(object);
        }
    }

    fn put_node(&mut self, object: &Node) {
        if self.keep(object) {
            self.store.apply_node(object);
        }
    }

    fn put_mesh_node(&mut self, object: &MeshNode) {
        if self.keep(object) {
            self.store.apply_mesh_node(object);
        }
    }

    /// Keeps an object for the copy. False if nothing changed that anyone reads: most updates are heartbeats.
    fn keep<K: Resource<DynamicType = ()> + Serialize>(&mut self, object: &K) -> bool {
        let kind = K::kind(&());
        let Some(kind) = KINDS.iter().find(|known| **known == kind) else { return false };
        let text = match serde_json::to_string(object) {
            Ok(text) => text,
            Err(error) => {
                tracing::warn!(kind, %error, "an object has no JSON form and was skipped");
                return false;
            }
        };
        let changed = self.copy.put(key(kind, object), text);
        if changed {
            self.dirty_since.get_or_insert_with(Instant::now);
        }
        changed
    }

    fn delete(&mut self, key: &Key) {
        let (kind, namespace, name) = key;
        if self.copy.remove(key) {
            self.dirty_since.get_or_insert_with(Instant::now);
        }
        match *kind {
            "Service" => self.store.delete_service(namespace, name),
            "EndpointSlice" => self.store.delete_endpoint_slice(namespace, name),
            "Node" => self.store.delete_node(name),
            _ => self.store.delete_mesh_node(name),
        }
    }
}

/// Waits for the write that is under way; for ever if none is.
async fn finished(writing: &mut Option<JoinHandle<std::io::Result<()>>>) -> std::io::Result<()> {
    match writing {
        Some(task) => task.await.unwrap_or_else(|error| Err(std::io::Error::other(error))),
        None => std::future::pending().await,
    }
}

fn key<K: Resource<DynamicType = ()>>(kind: &'static str, object: &K) -> Key {
    let metadata = object.meta();
    (
        kind,
        metadata.namespace.as_deref().unwrap_or_default().into(),
        metadata.name.as_deref().unwrap_or_default().into(),
    )
}
