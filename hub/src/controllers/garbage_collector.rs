//! The garbage collector: deletes what has lost all its owners, and serves foreground deletion and orphaning.
//!
//! Follows <https://kubernetes.io/docs/concepts/architecture/garbage-collection/>. It watches the metadata of every served
//! resource; before it deletes anything it asks the API about the object and its owners, by uid.

use std::{
    collections::{HashMap, HashSet},
    pin::pin,
    sync::Arc,
};

use futures::StreamExt;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, Patch, PatchParams, Preconditions},
    core::{DynamicObject, PartialObjectMeta, params::PropagationPolicy},
    runtime::{WatchStreamExt, watcher},
};
use parking_lot::Mutex;
use serde_json::json;
use tokio::{sync::watch, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use super::{
    Context,
    owner_graph::{FOREGROUND, Graph, Item, ORPHAN, Owner},
    queue::WorkQueue,
    served::{Served, ServedResource},
    worker::{self, Failure, Next, ignore_not_found},
};

const CONTROLLER: &str = "garbage-collector";
const WORKERS: usize = 8;
/// Resources that own nothing and that nothing owns, in numbers.
const IGNORED: [&str; 1] = ["events"];

type Meta = PartialObjectMeta<DynamicObject>;

struct Collector {
    client: Client,
    graph: Mutex<Graph>,
    queue: Arc<WorkQueue<String>>,
    served: Served,
    stopping: CancellationToken,
}

pub(crate) fn start(context: &Arc<Context>, served: Served) -> Vec<JoinHandle<()>> {
    let queue: Arc<WorkQueue<String>> = worker::queue(context, CONTROLLER);
    let collector = Arc::new(Collector {
        client: context.client.clone(),
        graph: Mutex::default(),
        queue: Arc::clone(&queue),
        served: served.clone(),
        stopping: context.shutdown.stopping().clone(),
    });
    let (listed, all_listed) = watch::channel(false);
    let watches = context.shutdown.spawn(Arc::clone(&collector).follow(served, listed));
    let synced = async move {
        let mut all_listed = all_listed;
        let _ = all_listed.wait_for(|listed| *listed).await;
    };
    let reconcile = move |uid: String| {
        let collector = Arc::clone(&collector);
        async move { collector.look_at(&uid).await }
    };
    vec![watches, worker::run(context, CONTROLLER, queue, WORKERS, synced, reconcile)]
}

impl Collector {
    /// Keeps one metadata watch for each served resource. `listed` turns true after the first full set of listings.
    async fn follow(self: Arc<Self>, mut served: Served, listed: watch::Sender<bool>) {
        let mut running: HashMap<String, (CancellationToken, Arc<ServedResource>)> = HashMap::new();
        let mut tasks = tokio::task::JoinSet::new();
        loop {
            let list = served.borrow_and_update().clone();
            if let Some(list) = list {
                let wanted: HashMap<String, &ServedResource> = list
                    .iter()
                    .filter(|one| !IGNORED.contains(&one.resource.plural.as_str()))
                    .map(|one| (format!("{}/{}", one.resource.api_version, one.resource.plural), one))
                    .collect();
                running.retain(|key, (stop, resource)| {
                    let keep = wanted.contains_key(key);
                    if !keep {
                        stop.cancel();
                        let mut graph = self.graph.lock();
                        for uid in graph.of_resource(resource) {
                            graph.remove(&uid);
                        }
                    }
                    keep
                });
                let mut first = Vec::new();
                for (key, resource) in wanted {
                    if running.contains_key(&key) {
                        continue;
                    }
                    let stop = self.stopping.child_token();
                    let resource = Arc::new(resource.clone());
                    let (sender, receiver) = watch::channel(false);
                    tasks.spawn(Arc::clone(&self).watch(Arc::clone(&resource), stop.clone(), sender));
                    first.push(receiver);
                    running.insert(key, (stop, resource));
                }
                for mut receiver in first {
                    tokio::select! {
                        () = self.stopping.cancelled() => {}
                        _ = receiver.wait_for(|listed| *listed) => {}
                    }
                }
                if !*listed.borrow() {
                    tracing::debug!(objects = self.graph.lock().len(), "owners and dependents are known");
                    listed.send_replace(true);
                }
            }
            tokio::select! {
                () = self.stopping.cancelled() => break,
                changed = served.changed() => if changed.is_err() { break },
            }
        }
        while tasks.join_next().await.is_some() {}
    }

    async fn watch(
        self: Arc<Self>,
        resource: Arc<ServedResource>,
        stop: CancellationToken,
        listed: watch::Sender<bool>,
    ) {
        let api: Api<Meta> = Api::all_with(self.client.clone(), &resource.resource);
        let mut events = pin!(watcher(api, watcher::Config::default()).default_backoff());
        let mut listing: HashSet<String> = HashSet::new();
        loop {
            let event = tokio::select! {
                event = events.next() => event,
                () = stop.cancelled() => return,
            };
            let look = match event {
                Some(Ok(watcher::Event::Init)) => {
                    listing.clear();
                    Vec::new()
                }
                Some(Ok(watcher::Event::InitApply(object))) => {
                    listing.extend(object.uid());
                    self.put(&resource, &object)
                }
                Some(Ok(watcher::Event::Apply(object))) => self.put(&resource, &object),
                Some(Ok(watcher::Event::Delete(object))) => {
                    object.uid().map(|uid| self.graph.lock().remove(&uid)).unwrap_or_default()
                }
                Some(Ok(watcher::Event::InitDone)) => {
                    let mut graph = self.graph.lock();
                    let gone = graph.of_resource(&resource).into_iter().filter(|uid| !listing.contains(uid));
                    let look = gone.collect::<Vec<_>>().iter().flat_map(|uid| graph.remove(uid)).collect();
                    drop(graph);
                    listing = HashSet::new();
                    listed.send_replace(true);
                    look
                }
                Some(Err(error)) => {
                    tracing::debug!(resource = resource.resource.plural, %error, "metadata watch failed; trying again");
                    Vec::new()
                }
                None => return,
            };
            for uid in look {
                self.queue.add(uid);
            }
        }
    }

    fn put(&self, resource: &Arc<ServedResource>, object: &Meta) -> Vec<String> {
        let Some(uid) = object.uid() else { return Vec::new() };
        self.graph.lock().put(&uid, Item::new(resource, &object.metadata))
    }

    fn api(&self, resource: &ServedResource, namespace: &str) -> Api<Meta> {
        if resource.namespaced {
            Api::namespaced_with(self.client.clone(), namespace, &resource.resource)
        } else {
            Api::all_with(self.client.clone(), &resource.resource)
        }
    }

    async fn look_at(&self, uid: &str) -> Result<Next, Failure> {
        let Some(item) = self.graph.lock().get(uid).cloned() else { return Ok(Next::OnChange) };
        if item.deleting {
            if item.orphan {
                return self.orphan_dependents(uid, &item).await;
            }
            if item.foreground {
                return self.wait_for_dependents(uid, &item).await;
            }
            return Ok(Next::OnChange);
        }
        if item.owners.is_empty() {
            return Ok(Next::OnChange);
        }
        let api = self.api(&item.resource, &item.name.namespace);
        let Some(live) = self.live(&api, uid, &item).await? else { return Ok(Next::OnChange) };
        let owners = live.owner_references().to_vec();
        if owners.is_empty() || live.metadata.deletion_timestamp.is_some() {
            return Ok(Next::OnChange);
        }
        let (mut solid, mut waiting) = (Vec::new(), false);
        for owner in &owners {
            match self.standing(owner, &item).await? {
                Owner::Solid => solid.push(owner.clone()),
                Owner::Waiting => waiting = true,
                Owner::Absent => {}
            }
        }
        if !solid.is_empty() {
            if solid.len() < owners.len() {
                self.set_owners(&api, &live, &solid).await?;
            }
            return Ok(Next::OnChange);
        }
        let policy = if item.orphan {
            PropagationPolicy::Orphan
        } else if item.foreground || (waiting && !self.graph.lock().dependents(uid).is_empty()) {
            PropagationPolicy::Foreground
        } else {
            PropagationPolicy::Background
        };
        let params = DeleteParams {
            propagation_policy: Some(policy),
            preconditions: Some(Preconditions { uid: Some(uid.to_owned()), resource_version: live.resource_version() }),
            ..Default::default()
        };
        ignore_not_found(api.delete(&item.name.name, &params).await)
            .map_err(Failure::api("delete an object without owners"))?;
        tracing::debug!(resource = item.resource.resource.plural, name = %item.name, "deleted: its owners are gone");
        Ok(Next::OnChange)
    }

    /// The object as it is now, if it is still the same one.
    async fn live(&self, api: &Api<Meta>, uid: &str, item: &Item) -> Result<Option<Meta>, Failure> {
        let live = ignore_not_found(api.get(&item.name.name).await).map_err(Failure::api("look at an object"))?;
        Ok(live.filter(|live| live.uid().as_deref() == Some(uid)))
    }

    async fn standing(&self, owner: &OwnerReference, item: &Item) -> Result<Owner, Failure> {
        if let Some(known) = self.graph.lock().owner(owner, &item.name.namespace) {
            return Ok(known);
        }
        let served = self.served.borrow().clone().unwrap_or_default();
        let group = owner.api_version.split_once('/').map_or("", |(group, _)| group);
        let resource = served.iter().find(|one| one.resource.kind == owner.kind && one.resource.group == group);
        let Some(resource) = resource else {
            // Its kind may be served again: never delete on a guess.
            let (version, kind) = (&owner.api_version, &owner.kind);
            return Err(Failure::Rejected(format!("{version} {kind}, an owner of {}, is not served", item.name)));
        };
        if resource.namespaced && item.name.namespace.is_empty() {
            tracing::warn!(name = %item.name, owner = owner.name, "a cluster-scoped object can't have an owner in a namespace");
            return Ok(Owner::Solid);
        }
        let api = self.api(resource, &item.name.namespace);
        let live = ignore_not_found(api.get(&owner.name).await).map_err(Failure::api("look at an owner"))?;
        let Some(live) = live.filter(|live| live.uid().as_deref() == Some(&owner.uid)) else {
            return Ok(Owner::Absent);
        };
        let live = Item::new(&Arc::new(resource.clone()), &live.metadata);
        Ok(if live.waits_for_dependents() { Owner::Waiting } else { Owner::Solid })
    }

    /// Foreground: the finalizer goes when no dependent that blocks is left.
    async fn wait_for_dependents(&self, uid: &str, item: &Item) -> Result<Next, Failure> {
        let blocking = self.graph.lock().blocking(uid);
        if blocking.is_empty() {
            return self.remove_finalizer(uid, item, FOREGROUND).await;
        }
        for dependent in blocking {
            self.queue.add(dependent);
        }
        Ok(Next::OnChange)
    }

    async fn orphan_dependents(&self, uid: &str, item: &Item) -> Result<Next, Failure> {
        let dependents = self.graph.lock().dependents(uid);
        for dependent in dependents {
            let Some(child) = self.graph.lock().get(&dependent).cloned() else { continue };
            let api = self.api(&child.resource, &child.name.namespace);
            let Some(live) = self.live(&api, &dependent, &child).await? else { continue };
            let mut owners = live.owner_references().to_vec();
            owners.retain(|owner| owner.uid != uid);
            if owners.len() < live.owner_references().len() {
                self.set_owners(&api, &live, &owners).await?;
            }
        }
        self.remove_finalizer(uid, item, ORPHAN).await
    }

    async fn set_owners(&self, api: &Api<Meta>, live: &Meta, owners: &[OwnerReference]) -> Result<(), Failure> {
        let patch = json!({"metadata": {
            "uid": live.uid(),
            "resourceVersion": live.resource_version(),
            "ownerReferences": owners,
        }});
        let patched = api.patch_metadata(&live.name_any(), &PatchParams::default(), &Patch::Merge(&patch)).await;
        ignore_not_found(patched).map_err(Failure::api("remove an owner"))?;
        Ok(())
    }

    async fn remove_finalizer(&self, uid: &str, item: &Item, finalizer: &str) -> Result<Next, Failure> {
        let api = self.api(&item.resource, &item.name.namespace);
        let Some(live) = self.live(&api, uid, item).await? else { return Ok(Next::OnChange) };
        let mut finalizers = live.finalizers().to_vec();
        finalizers.retain(|known| known != finalizer);
        if finalizers.len() == live.finalizers().len() {
            return Ok(Next::OnChange);
        }
        let patch = json!({"metadata": {
            "uid": uid,
            "resourceVersion": live.resource_version(),
            "finalizers": finalizers,
        }});
        let patched = api.patch_metadata(&item.name.name, &PatchParams::default(), &Patch::Merge(&patch)).await;
        ignore_not_found(patched).map_err(Failure::api("remove a finalizer"))?;
        Ok(Next::OnChange)
    }
}
