//! A watched copy of one resource, with the controller's own writes applied at once.
//!
//! A controller that acts on a stale copy creates things twice. So what it wrote itself is put into the copy from the
//! API's answer, before the watch brings it: an answer that is newer than the last event seen is kept, an older one was
//! already delivered (and perhaps deleted since). Objects that the controller deleted stay marked as terminating
//! until the watch says so.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fmt,
    pin::pin,
    sync::Arc,
};

use edgemesh_telemetry::Shutdown;
use futures::StreamExt;
use kube::{
    Api, Resource, ResourceExt,
    runtime::{WatchStreamExt, watcher},
};
use parking_lot::RwLock;
use serde::de::DeserializeOwned;
use tokio::{sync::watch, task::JoinHandle};

/// Namespace (empty for cluster-scoped objects) and name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Name {
    pub(crate) namespace: String,
    pub(crate) name: String,
}

impl Name {
    pub(crate) fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }

    pub(crate) fn of<K: Resource>(object: &K) -> Self {
        let meta = object.meta();
        Self::new(meta.namespace.clone().unwrap_or_default(), meta.name.clone().unwrap_or_default())
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() { f.write_str(&self.name) } else { write!(f, "{}/{}", self.namespace, self.name) }
    }
}

/// What a cache can hold.
pub(crate) trait Cached:
    Resource<DynamicType = ()> + Clone + DeserializeOwned + fmt::Debug + Send + Sync + 'static
{
}
impl<K> Cached for K where K: Resource<DynamicType = ()> + Clone + DeserializeOwned + fmt::Debug + Send + Sync + 'static {}

/// Called with the object before and after a change.
type Listener<K> = Box<dyn Fn(Option<&Arc<K>>, Option<&Arc<K>>) + Send + Sync>;

/// The watched copy.
pub(crate) struct Cache<K> {
    resource: &'static str,
    contents: RwLock<Contents<K>>,
    listeners: RwLock<Vec<Listener<K>>>,
    synced: watch::Sender<bool>,
}

struct Contents<K> {
    objects: BTreeMap<Name, Arc<K>>,
    /// Names by the uid of their controlling owner.
    controlled: HashMap<String, BTreeSet<Name>>,
    /// The newest resourceVersion that the watch delivered, or that is older than the listing which is being received.
    seen: u64,
    /// uids that this process deleted, of which the watch doesn't know yet.
    deleting: HashSet<String>,
    /// The listing that is being received.
    filling: Option<BTreeMap<Name, Arc<K>>>,
}

/// The uid of the owner that controls an object, if it has one.
pub(crate) fn controller_uid<K: Resource>(object: &K) -> Option<&str> {
    let owners = object.meta().owner_references.as_deref()?;
    owners.iter().find(|owner| owner.controller == Some(true)).map(|owner| owner.uid.as_str())
}

/// A resourceVersion as a number. etcd's and the embedded store's are ordered integers; Kubernetes guarantees it since 1.35.
fn version<K: Resource>(object: &K) -> u64 {
    object.meta().resource_version.as_deref().and_then(|text| text.parse().ok()).unwrap_or(0)
}

impl<K: Cached> Cache<K> {
    pub(crate) fn new(resource: &'static str) -> Arc<Self> {
        Arc::new(Self {
            resource,
            contents: RwLock::new(Contents {
                objects: BTreeMap::new(),
                controlled: HashMap::new(),
                seen: 0,
                deleting: HashSet::new(),
                filling: None,
            }),
            listeners: RwLock::default(),
            synced: watch::Sender::new(false),
        })
    }

    /// Has `listener` called at every change, also at those by [`Cache::wrote`]. It must only queue work.
    pub(crate) fn on_change(&self, listener: impl Fn(Option<&Arc<K>>, Option<&Arc<K>>) + Send + Sync + 'static) {
        self.listeners.write().push(Box::new(listener));
    }

    /// Keeps the cache filled from `api` until the shutdown.
    pub(crate) fn fill(self: &Arc<Self>, api: Api<K>, shutdown: &Shutdown) -> JoinHandle<()> {
        let cache = Arc::clone(self);
        let stopping = shutdown.stopping().clone();
        shutdown.spawn(async move {
            let mut events = pin!(watcher(api, watcher::Config::default()).default_backoff());
            loop {
                let event = tokio::select! {
                    event = events.next() => event,
                    () = stopping.cancelled() => return,
                };
                match event {
                    Some(Ok(event)) => cache.apply(event),
                    Some(Err(error)) => tracing::warn!(resource = cache.resource, %error, "watch failed; trying again"),
                    None => return,
                }
            }
        })
    }

    /// Waits for the first complete listing.
    pub(crate) async fn synced(&self) {
        let mut synced = self.synced.subscribe();
        // The sender lives as long as the cache, so this can't fail.
        let _ = synced.wait_for(|synced| *synced).await;
    }

    pub(crate) fn get(&self, name: &Name) -> Option<Arc<K>> {
        self.contents.read().objects.get(name).cloned()
    }

    pub(crate) fn all(&self) -> Vec<Arc<K>> {
        self.contents.read().objects.values().cloned().collect()
    }

    pub(crate) fn in_namespace(&self, namespace: &str) -> Vec<Arc<K>> {
        let contents = self.contents.read();
        contents
            .objects
            .range(Name::new(namespace, "")..)
            .take_while(|(name, _)| name.namespace == namespace)
            .map(|(_, object)| Arc::clone(object))
            .collect()
    }

    /// The objects whose controlling owner has this uid.
    pub(crate) fn controlled_by(&self, uid: &str) -> Vec<Arc<K>> {
        let contents = self.contents.read();
        let Some(names) = contents.controlled.get(uid) else { return Vec::new() };
        names.iter().filter_map(|name| contents.objects.get(name).cloned()).collect()
    }

    /// Takes the API's answer to a write of this process.
    pub(crate) fn wrote(&self, mut object: K) {
        object.managed_fields_mut().clear();
        let object = Arc::new(object);
        let name = Name::of(&*object);
        let old = {
            let mut contents = self.contents.write();
            if version(&*object) <= contents.seen {
                return;
            }
            if contents.objects.get(&name).is_some_and(|known| version(&**known) >= version(&*object)) {
                return;
            }
            contents.put(name, Arc::clone(&object))
        };
        self.notify(old.as_ref(), Some(&object));
    }

    /// Marks an object as terminating because this process deleted it.
    pub(crate) fn deleted(&self, object: &K) {
        let Some(uid) = object.uid() else { return };
        let name = Name::of(object);
        let mut contents = self.contents.write();
        let Some(known) = contents.objects.get(&name) else { return };
        if known.uid().as_deref() == Some(&uid) {
            let marked = mark_terminating(known);
            contents.objects.insert(name, marked);
            contents.deleting.insert(uid);
        }
    }

    /// Drops an object of which the API says that it doesn't exist; the watch brings back what does.
    pub(crate) fn gone(&self, object: &K) {
        let name = Name::of(object);
        let old = {
            let mut contents = self.contents.write();
            if contents.objects.get(&name).is_none_or(|known| known.uid() != object.uid()) {
                return;
            }
            contents.take(&name)
        };
        self.notify(old.as_ref(), None);
    }

    fn notify(&self, old: Option<&Arc<K>>, new: Option<&Arc<K>>) {
        for listener in self.listeners.read().iter() {
            listener(old, new);
        }
    }

    fn apply(&self, event: watcher::Event<K>) {
        match event {
            watcher::Event::Init => self.contents.write().begin_listing(),
            watcher::Event::InitApply(mut object) => {
                object.managed_fields_mut().clear();
                let name = Name::of(&object);
                self.contents.write().filling.get_or_insert_default().insert(name, Arc::new(object));
            }
            watcher::Event::InitDone => {
                let changes = self.contents.write().replace_all();
                for (old, new) in &changes {
                    self.notify(old.as_ref(), new.as_ref());
                }
                tracing::debug!(resource = self.resource, changes = changes.len(), "listed");
                self.synced.send_replace(true);
            }
            watcher::Event::Apply(mut object) => {
                object.managed_fields_mut().clear();
                let mut object = Arc::new(object);
                let old = {
                    let mut contents = self.contents.write();
                    let name = Name::of(&*object);
                    contents.seen = contents.seen.max(version(&*object));
                    let uid = object.uid().unwrap_or_default();
                    if object.meta().deletion_timestamp.is_some() {
                        contents.deleting.remove(&uid);
                    } else if contents.deleting.contains(&uid) {
                        object = mark_terminating(&object);
                    }
                    if contents.objects.get(&name).is_some_and(|known| version(&**known) >= version(&*object)) {
                        return;
                    }
                    contents.put(name, Arc::clone(&object))
                };
                self.notify(old.as_ref(), Some(&object));
            }
            watcher::Event::Delete(object) => {
                let old = {
                    let mut contents = self.contents.write();
                    let name = Name::of(&object);
                    contents.seen = contents.seen.max(version(&object));
                    contents.deleting.remove(&object.uid().unwrap_or_default());
                    // A newer object of the same name may already be here from a write of ours.
                    if contents.objects.get(&name).is_none_or(|known| known.uid() != object.uid()) {
                        return;
                    }
                    contents.take(&name)
                };
                self.notify(old.as_ref(), None);
            }
        }
    }
}

fn mark_terminating<K: Cached>(object: &Arc<K>) -> Arc<K> {
    let mut marked = (**object).clone();
    marked.meta_mut().deletion_timestamp.get_or_insert_with(super::now);
    Arc::new(marked)
}

/// What a change notification is made of.
type Change<K> = (Option<Arc<K>>, Option<Arc<K>>);

impl<K: Cached> Contents<K> {
    fn put(&mut self, name: Name, object: Arc<K>) -> Option<Arc<K>> {
        let old = self.take(&name);
        if let Some(uid) = controller_uid(&*object) {
            self.controlled.entry(uid.to_owned()).or_default().insert(name.clone());
        }
        self.objects.insert(name, object);
        old
    }

    fn take(&mut self, name: &Name) -> Option<Arc<K>> {
        let old = self.objects.remove(name)?;
        if let Some(uid) = controller_uid(&*old)
            && let Some(names) = self.controlled.get_mut(uid)
        {
            names.remove(name);
            if names.is_empty() {
                self.controlled.remove(uid);
            }
        }
        Some(old)
    }

    /// A listing is asked for: what is known by now is in it, or deleted.
    fn begin_listing(&mut self) {
        self.seen = self.objects.values().map(|object| version(&**object)).fold(self.seen, u64::max);
        self.filling = Some(BTreeMap::new());
    }

    fn replace_all(&mut self) -> Vec<Change<K>> {
        let mut listing = self.filling.take().unwrap_or_default();
        self.seen = listing.values().map(|object| version(&**object)).fold(self.seen, u64::max);
        self.deleting.clear();
        let mut changes = Vec::new();
        for name in self.objects.keys().cloned().collect::<Vec<_>>() {
            let Some(known) = self.objects.get(&name) else { continue };
            match listing.remove(&name) {
                Some(listed) if version(&*listed) == version(&**known) => {}
                // Written by this process after the listing was made.
                Some(listed) if version(&*listed) < version(&**known) => {}
                None if version(&**known) > self.seen => {}
                Some(listed) => {
                    let old = self.put(name, Arc::clone(&listed));
                    changes.push((old, Some(listed)));
                }
                None => {
                    let old = self.take(&name);
                    changes.push((old, None));
                }
            }
        }
        for (name, listed) in listing {
            self.put(name, Arc::clone(&listed));
            changes.push((None, Some(listed)));
        }
        changes
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::{
        api::core::v1::Pod,
        apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference},
    };

    use super::*;

    fn pod(name: &str, uid: &str, version: u64) -> Pod {
        let owner = OwnerReference { uid: "owner".into(), controller: Some(true), ..Default::default() };
        Pod {
            metadata: ObjectMeta {
                name: Some(name.into()),
                namespace: Some("ns".into()),
                uid: Some(uid.into()),
                resource_version: Some(version.to_string()),
                owner_references: Some(vec![owner]),
                ..Default::default()
            },
            ..Default::default()
        }
    }

    #[test]
    fn an_own_write_is_seen_before_the_watch_brings_it() {
        let cache = Cache::<Pod>::new("pods");
        cache.apply(watcher::Event::Apply(pod("a", "1", 5)));
        cache.wrote(pod("b", "2", 6));
        assert_eq!(cache.controlled_by("owner").len(), 2);
    }

    #[test]
    fn an_answer_that_comes_after_the_watch_deleted_its_object_does_not_bring_it_back() {
        let cache = Cache::<Pod>::new("pods");
        cache.apply(watcher::Event::Apply(pod("a", "1", 5)));
        cache.apply(watcher::Event::Delete(pod("a", "1", 6)));
        cache.wrote(pod("a", "1", 5));
        assert!(cache.all().is_empty());
        assert!(cache.controlled_by("owner").is_empty());
    }

    #[test]
    fn a_deleted_object_stays_terminating_through_older_events() {
        let cache = Cache::<Pod>::new("pods");
        cache.apply(watcher::Event::Apply(pod("a", "1", 5)));
        cache.deleted(&pod("a", "1", 5));
        cache.apply(watcher::Event::Apply(pod("a", "1", 6)));
        assert!(cache.all()[0].metadata.deletion_timestamp.is_some());
    }

    #[test]
    fn what_was_deleted_while_the_watch_was_away_goes_with_the_next_listing() {
        let cache = Cache::<Pod>::new("pods");
        cache.apply(watcher::Event::Apply(pod("a", "1", 5)));
        cache.apply(watcher::Event::Apply(pod("b", "2", 9)));
        // A listing begins after this answer, so it would show the object if it still existed.
        cache.wrote(pod("own", "3", 10));
        cache.apply(watcher::Event::Init);
        cache.apply(watcher::Event::InitDone);
        assert!(cache.all().is_empty(), "{:?}", cache.all());
        assert!(cache.controlled_by("owner").is_empty());
    }

    #[test]
    fn a_new_listing_replaces_what_is_gone_and_keeps_newer_own_writes() {
        let cache = Cache::<Pod>::new("pods");
        cache.apply(watcher::Event::Apply(pod("old", "1", 5)));
        cache.apply(watcher::Event::Init);
        cache.wrote(pod("own", "2", 9));
        cache.apply(watcher::Event::InitApply(pod("listed", "3", 7)));
        cache.apply(watcher::Event::InitDone);
        let names: Vec<_> = cache.all().iter().map(|pod| pod.name_any()).collect();
        assert_eq!(names, ["listed", "own"]);
    }
}
