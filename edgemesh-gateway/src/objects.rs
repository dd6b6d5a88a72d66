//! The Gateway API objects and TLS Secrets that the gateway serves: watched, and kept on disk for a start with no API.

use std::{collections::BTreeMap, collections::BTreeSet, path::PathBuf, sync::Arc, time::Duration};

use edgemesh_discovery::{
    disk_copy::{DiskCopy, Key},
    follow::follow,
};
use edgemesh_telemetry::{ReadinessTask, Shutdown};
use gateway_api::apis::standard::{
    gatewayclasses::GatewayClass, gateways::Gateway, httproutes::HttpRoute, referencegrants::ReferenceGrant,
};
use k8s_openapi::api::core::v1::Secret;
use kube::{Api, Client, Resource, runtime::watcher::Event};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};

/// Changes are written to disk this long after the first one.
const WRITE_DELAY: Duration = Duration::from_millis(500);
const QUEUE: usize = 256;
const KINDS: [&str; 5] = ["GatewayClass", "Gateway", "HTTPRoute", "ReferenceGrant", "Secret"];

/// Namespace (empty for cluster-scoped kinds) and name.
pub type Name = (String, String);

/// All objects at one moment.
#[derive(Debug, Clone, Default)]
pub struct Objects {
    /// By name, with an empty namespace.
    pub classes: BTreeMap<Name, Arc<GatewayClass>>,
    /// Gateways of any class.
    pub gateways: BTreeMap<Name, Arc<Gateway>>,
    /// Routes of any parent.
    pub routes: BTreeMap<Name, Arc<HttpRoute>>,
    /// Grants for references across namespaces.
    pub grants: BTreeMap<Name, Arc<ReferenceGrant>>,
    /// Secrets of type `kubernetes.io/tls`.
    pub secrets: BTreeMap<Name, Arc<Secret>>,
}

// Changes live for a moment in one short queue: boxing each would cost more than the room that small ones waste.
#[allow(clippy::large_enum_variant)]
enum Change {
    Class(Event<GatewayClass>),
    Gateway(Event<Gateway>),
    Route(Event<HttpRoute>),
    Grant(Event<ReferenceGrant>),
    Secret(Event<Secret>),
}

/// Loads the copy on disk, then follows the API until shutdown.
pub fn start(
    client: Client,
    copy: Option<PathBuf>,
    shutdown: &Shutdown,
    readiness: ReadinessTask,
) -> watch::Receiver<Arc<Objects>> {
    let (sender, receiver) = watch::channel(Arc::default());
    let mut owner = Owner {
        objects: Objects::default(),
        sender,
        writes: copy.is_some(),
        copy: DiskCopy::new(copy.clone().unwrap_or_default()),
        listing: BTreeMap::new(),
        listed: BTreeSet::new(),
        dirty_since: None,
        readiness: Some(readiness),
    };
    if let Some(path) = copy {
        owner.load(&path);
    }
    let (changes, received) = mpsc::channel(QUEUE);
    shutdown.spawn(follow(Api::all(client.clone()), true, slim, Change::Class, changes.clone()));
    shutdown.spawn(follow(Api::all(client.clone()), true, slim, Change::Gateway, changes.clone()));
    shutdown.spawn(follow(Api::all(client.clone()), true, slim, Change::Route, changes.clone()));
    shutdown.spawn(follow(Api::all(client.clone()), true, slim, Change::Grant, changes.clone()));
    shutdown.spawn(follow(Api::all(client), false, slim, Change::Secret, changes));
    let stop = shutdown.clone();
    shutdown.spawn(async move { owner.run(received, &stop).await });
    receiver
}

/// Drops what nobody here reads.
fn slim<K: Resource>(object: &mut K) {
    let metadata = object.meta_mut();
    metadata.managed_fields = None;
    metadata.annotations = None;
}

struct Owner {
    objects: Objects,
    sender: watch::Sender<Arc<Objects>>,
    writes: bool,
    copy: DiskCopy,
    /// Of each kind that is being listed: what was listed so far.
    listing: BTreeMap<&'static str, BTreeSet<Name>>,
    listed: BTreeSet<&'static str>,
    dirty_since: Option<Instant>,
    readiness: Option<ReadinessTask>,
}

/// Where the objects of a kind are kept.
trait Kept: Resource<DynamicType = ()> + Serialize + DeserializeOwned + Sized {
    const KIND: &'static str;
    fn place(objects: &mut Objects) -> &mut BTreeMap<Name, Arc<Self>>;
    /// Whether the gateway has a use for it.
    fn wanted(&self) -> bool {
        true
    }
}

macro_rules! kept {
    ($type:ty, $kind:literal, $field:ident) => {
        impl Kept for $type {
            const KIND: &'static str = $kind;
            fn place(objects: &mut Objects) -> &mut BTreeMap<Name, Arc<Self>> {
                &mut objects.$field
            }
        }
    };
}
kept!(GatewayClass, "GatewayClass", classes);
kept!(Gateway, "Gateway", gateways);
kept!(HttpRoute, "HTTPRoute", routes);
kept!(ReferenceGrant, "ReferenceGrant", grants);

impl Kept for Secret {
    const KIND: &'static str = "Secret";
    fn place(objects: &mut Objects) -> &mut BTreeMap<Name, Arc<Self>> {
        &mut objects.secrets
    }
    fn wanted(&self) -> bool {
        self.type_.as_deref() == Some("kubernetes.io/tls")
    }
}

fn name_of<K: Kept>(object: &K) -> Name {
    let metadata = object.meta();
    (metadata.namespace.clone().unwrap_or_default(), metadata.name.clone().unwrap_or_default())
}

impl Owner {
    fn load(&mut self, path: &std::path::Path) {
        let mut found = 0_usize;
        let result = DiskCopy::read(path, |object| {
            let kind = object.get("kind").and_then(Value::as_str).unwrap_or_default().to_owned();
            let read = match kind.as_str() {
                "GatewayClass" => self.load_one::<GatewayClass>(object),
                "Gateway" => self.load_one::<Gateway>(object),
                "HTTPRoute" => self.load_one::<HttpRoute>(object),
                "ReferenceGrant" => self.load_one::<ReferenceGrant>(object),
                "Secret" => self.load_one::<Secret>(object),
                _ => Ok(()),
            };
            match read {
                Ok(()) => found += 1,
                Err(error) => tracing::warn!(kind, %error, "an object of the copy on disk was skipped"),
            }
        });
        match result {
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "the copy on disk can't be used; starting empty");
                self.objects = Objects::default();
            }
            Ok(()) if found > 0 => {
                tracing::info!(path = %path.display(), objects = found, "gateways loaded from disk");
                self.complete();
            }
            Ok(()) => {}
        }
        self.dirty_since = None;
    }

    fn load_one<K: Kept>(&mut self, object: Value) -> Result<(), serde_json::Error> {
        let object: K = serde_json::from_value(object)?;
        self.put(object);
        Ok(())
    }

    async fn run(mut self, mut received: mpsc::Receiver<Change>, shutdown: &Shutdown) {
        let mut batch = Vec::with_capacity(QUEUE);
        loop {
            let write_at = self.dirty_since.map(|since| since + WRITE_DELAY);
            tokio::select! {
                count = received.recv_many(&mut batch, QUEUE) => {
                    if count == 0 {
                        break;
                    }
                    for change in batch.drain(..) {
                        match change {
                            Change::Class(event) => self.event(event),
                            Change::Gateway(event) => self.event(event),
                            Change::Route(event) => self.event(event),
                            Change::Grant(event) => self.event(event),
                            Change::Secret(event) => self.event(event),
                        }
                    }
                    self.publish();
                }
                () = tokio::time::sleep_until(write_at.unwrap_or_else(Instant::now)), if write_at.is_some() => self.write().await,
                () = shutdown.stopping().cancelled() => break,
            }
        }
        if self.dirty_since.is_some() {
            self.write().await;
        }
    }

    async fn write(&mut self) {
        self.dirty_since = None;
        if !self.writes {
            return;
        }
        let written = tokio::task::spawn_blocking(self.copy.writing()).await;
        if let Err(error) = written.unwrap_or_else(|error| Err(std::io::Error::other(error))) {
            tracing::warn!(%error, "the copy on disk can't be written; trying again with the next change");
        }
    }

    fn event<K: Kept>(&mut self, event: Event<K>) {
        match event {
            Event::Apply(object) => self.put(object),
            Event::Delete(object) => self.remove::<K>(&name_of(&object)),
            Event::Init => {
                self.listing.insert(K::KIND, BTreeSet::new());
            }
            Event::InitApply(object) => {
                if let Some(listing) = self.listing.get_mut(K::KIND) {
                    listing.insert(name_of(&object));
                }
                self.put(object);
            }
            Event::InitDone => {
                let Some(listed) = self.listing.remove(K::KIND) else { return };
                let known: Vec<_> = K::place(&mut self.objects).keys().cloned().collect();
                for name in known.iter().filter(|name| !listed.contains(*name)) {
                    self.remove::<K>(name);
                }
                self.listed.insert(K::KIND);
                if self.listed.len() == KINDS.len() {
                    self.complete();
                }
            }
        }
    }

    fn put<K: Kept>(&mut self, object: K) {
        let name = name_of(&object);
        if !object.wanted() {
            return self.remove::<K>(&name);
        }
        match serde_json::to_string(&object) {
            Ok(text) => {
                if self.copy.put(key::<K>(&name), text) {
                    self.dirty_since.get_or_insert_with(Instant::now);
                    K::place(&mut self.objects).insert(name, Arc::new(object));
                }
            }
            Err(error) => tracing::warn!(kind = K::KIND, %error, "an object has no JSON form and was skipped"),
        }
    }

    fn remove<K: Kept>(&mut self, name: &Name) {
        K::place(&mut self.objects).remove(name);
        if self.copy.remove(&key::<K>(name)) {
            self.dirty_since.get_or_insert_with(Instant::now);
        }
    }

    fn complete(&mut self) {
        if let Some(readiness) = self.readiness.take() {
            readiness.ready();
        }
        self.publish();
    }

    /// Shows the objects to the rest of the gateway, once all are known: before that, a missing one may just not be listed yet.
    fn publish(&mut self) {
        if self.readiness.is_none() {
            self.sender.send_replace(Arc::new(self.objects.clone()));
        }
    }
}

fn key<K: Kept>(name: &Name) -> Key {
    (K::KIND, name.0.as_str().into(), name.1.as_str().into())
}
