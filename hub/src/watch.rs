//! One watch per kind for all nodes: it feeds the index, and what changed goes to the sessions that it concerns.

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use edgemesh_api::{ObjectKey, ResourceName};
use edgemesh_telemetry::{ReadinessTask, Shutdown};
use futures::StreamExt;
use kube::{
    Api, Client,
    api::{ApiResource, DynamicObject, TypeMeta},
    runtime::{WatchStreamExt, watcher},
};
use tokio::sync::watch;

use crate::nodes::Nodes;

/// How often a kind that the cluster does not serve is asked for again.
const ABSENT_KIND_DELAY: Duration = Duration::from_secs(10);

/// A kind that nodes hold: group, version, kind, plural.
type Kind = (&'static str, &'static str, &'static str, &'static str);

const KINDS: &[Kind] = &[
    ("", "v1", "Pod", "pods"),
    ("", "v1", "ConfigMap", "configmaps"),
    ("", "v1", "Secret", "secrets"),
    ("", "v1", "Service", "services"),
    ("", "v1", "Node", "nodes"),
    ("", "v1", "Namespace", "namespaces"),
    ("discovery.k8s.io", "v1", "EndpointSlice", "endpointslices"),
    ("apiextensions.k8s.io", "v1", "CustomResourceDefinition", "customresourcedefinitions"),
    ("edgemesh.dev", "v1alpha1", "MeshNode", "meshnodes"),
    ("gateway.networking.k8s.io", "v1", "GatewayClass", "gatewayclasses"),
    ("gateway.networking.k8s.io", "v1", "Gateway", "gateways"),
    ("gateway.networking.k8s.io", "v1", "HTTPRoute", "httproutes"),
    ("gateway.networking.k8s.io", "v1", "ReferenceGrant", "referencegrants"),
];

/// The resource of a kind that the hub handles, for requests.
pub(crate) fn api_resource(kind: &Kind) -> ApiResource {
    let (group, version, kind, plural) = *kind;
    let api_version = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
    ApiResource {
        group: group.to_owned(),
        version: version.to_owned(),
        api_version,
        kind: kind.to_owned(),
        plural: plural.to_owned(),
    }
}

/// Whether the index is complete, so that sessions may begin: what it lacks would be deleted at the nodes.
#[derive(Debug, Clone)]
pub(crate) struct Complete(watch::Receiver<bool>);

impl Complete {
    /// Waits until every kind was listed.
    pub(crate) async fn wait(&mut self) -> bool {
        self.0.wait_for(|complete| *complete).await.is_ok()
    }

    /// Whether every kind was listed.
    pub(crate) fn is(&self) -> bool {
        *self.0.borrow()
    }
}

/// Starts the watches. They end when the hub stops.
pub(crate) fn start(client: &Client, nodes: &Arc<Nodes>, readiness: ReadinessTask, shutdown: &Shutdown) -> Complete {
    let (sender, complete) = watch::channel(false);
    let left = Arc::new(AtomicUsize::new(KINDS.len()));
    let sender = Arc::new(sender);
    for kind in KINDS {
        let follow = Follow {
            resource: api_resource(kind),
            name: ResourceName::new(kind.0, kind.1, kind.3),
            nodes: Arc::clone(nodes),
            listed: Some((Arc::clone(&left), Arc::clone(&sender))),
        };
        let client = client.clone();
        let stopping = shutdown.stopping().clone();
        shutdown.spawn(async move {
            tokio::select! {
                () = follow.run(client) => {}
                () = stopping.cancelled() => {}
            }
        });
    }
    let complete = Complete(complete);
    let mut waiting = complete.clone();
    shutdown.spawn(async move {
        if waiting.wait().await {
            readiness.ready();
        }
    });
    complete
}

struct Follow {
    resource: ApiResource,
    name: ResourceName,
    nodes: Arc<Nodes>,
    listed: Option<(Arc<AtomicUsize>, Arc<watch::Sender<bool>>)>,
}

impl Follow {
    async fn run(mut self, client: Client) {
        let api: Api<DynamicObject> = Api::all_with(client, &self.resource);
        let mut events = watcher(api, watcher::Config::default()).default_backoff().boxed();
        let mut seen: HashSet<ObjectKey> = HashSet::new();
        while let Some(event) = events.next().await {
            match event {
                Ok(watcher::Event::Init) => seen.clear(),
                Ok(watcher::Event::InitApply(object)) => {
                    if let Some(key) = self.apply(object) {
                        seen.insert(key);
                    }
                }
                Ok(watcher::Event::InitDone) => {
                    for key in self.nodes.desired.keys(&self.name) {
                        if !seen.contains(&*key) {
                            self.remove(&key);
                        }
                    }
                    seen = HashSet::new();
                    self.listed();
                }
                Ok(watcher::Event::Apply(object)) => {
                    self.apply(object);
                }
                Ok(watcher::Event::Delete(object)) => {
                    if let Some(key) = self.key(&object) {
                        self.remove(&key);
                    }
                }
                Err(error) if is_absent(&error) => {
                    // The cluster doesn't serve this kind (yet): there is nothing of it to hold.
                    for key in self.nodes.desired.keys(&self.name) {
                        self.remove(&key);
                    }
                    self.listed();
                    tokio::time::sleep(ABSENT_KIND_DELAY).await;
                }
                Err(error) => tracing::warn!(resource = %self.name, %error, "watch failed; trying again"),
            }
        }
    }

    fn listed(&mut self) {
        if let Some((left, sender)) = self.listed.take()
            && left.fetch_sub(1, Ordering::AcqRel) == 1
        {
            tracing::info!(objects = self.nodes.desired.len(), "all kinds are listed");
            sender.send_replace(true);
        }
    }

    fn key(&self, object: &DynamicObject) -> Option<ObjectKey> {
        let namespace = object.metadata.namespace.clone().unwrap_or_default();
        Some(ObjectKey::new(self.name.clone(), namespace, object.metadata.name.clone()?))
    }

    fn apply(&self, mut object: DynamicObject) -> Option<ObjectKey> {
        let key = self.key(&object)?;
        // Items of a list carry no type of their own.
        object.types =
            Some(TypeMeta { api_version: self.resource.api_version.clone(), kind: self.resource.kind.clone() });
        let value = match serde_json::to_value(&object) {
            Ok(value) => value,
            Err(error) => {
                tracing::error!(%key, %error, "an object that can't be written as JSON is left out");
                return None;
            }
        };
        let json = Bytes::from(value.to_string());
        let affected = self.nodes.desired.apply(&key, &value, json);
        self.nodes.changed(&affected);
        Some(key)
    }

    fn remove(&self, key: &ObjectKey) {
        let affected = self.nodes.desired.remove(key);
        self.nodes.changed(&affected);
    }
}

fn is_absent(error: &watcher::Error) -> bool {
    let (watcher::Error::InitialListFailed(error) | watcher::Error::WatchStartFailed(error)) = error else {
        return false;
    };
    matches!(error, kube::Error::Api(status) if status.code == 404)
}
