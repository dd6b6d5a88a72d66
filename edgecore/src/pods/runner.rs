//! Follows the store's pods, and gives each pod of this node one owner task.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use edgemesh_apiserver::{ApiError, EventKind, WatchEvent, store::WatchStream};
use edgemesh_telemetry::drain::Shutdown;
use futures::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use serde::Deserialize;
use serde_json::Value;
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use super::{
    ending::{end_leftover, end_orphan},
    folders::is_plain_name,
    inputs::{InputName, references},
    relist::{Relist, Seen},
    sandbox::PodIdentity,
    worker::{Desired, Poke, Shared, Worker},
};

/// A watch that ended is started again after this time.
const WATCH_RETRY: Duration = Duration::from_secs(1);

/// Starts the runner.
pub(crate) fn start(shared: Arc<Shared>, relists: mpsc::Receiver<Relist>, shutdown: &Shutdown) {
    let stopping = shutdown.stopping().clone();
    let runner = Runner {
        shared,
        stopping: stopping.clone(),
        pods: BTreeMap::new(),
        workers: JoinSet::new(),
        orphans: JoinSet::new(),
        orphan_pods: BTreeMap::new(),
        listed: false,
        relisted: false,
        present: BTreeSet::new(),
        node_addresses: Vec::new(),
    };
    shutdown.spawn(runner.run(relists));
}

/// What the runner knows of a pod.
struct Handle {
    identity: PodIdentity,
    desired: watch::Sender<Desired>,
    poke: Arc<Poke>,
    references: BTreeSet<InputName>,
    /// Waits for an older pod of the same name to be gone.
    held: bool,
}

struct Runner {
    shared: Arc<Shared>,
    stopping: CancellationToken,
    /// By uid.
    pods: BTreeMap<String, Handle>,
    /// Each gives the uid of its pod, and whether it is gone.
    workers: JoinSet<(String, bool)>,
    orphans: JoinSet<String>,
    /// Namespace and name of the pods that are being removed, by uid.
    orphan_pods: BTreeMap<String, (String, String)>,
    /// The store's present pods were all seen: what's unknown now is an orphan.
    listed: bool,
    /// The uids that the current watch has shown.
    present: BTreeSet<String>,
    /// The runtime was listed after the store: its orphans are known.
    relisted: bool,
    /// The node's addresses that the workers were told to look at.
    node_addresses: Vec<IpAddr>,
}

/// The watches that the runner lives on.
struct Watches {
    own_node: WatchStream,
    pods: WatchStream,
    config_maps: WatchStream,
    secrets: WatchStream,
}

impl Runner {
    async fn run(mut self, mut relists: mpsc::Receiver<Relist>) {
        while !self.stopping.is_cancelled() {
            if let Err(error) = self.follow(&mut relists).await {
                tracing::warn!(%error, "the watches of the pods start again");
            }
            tokio::select! {
                () = tokio::time::sleep(WATCH_RETRY) => {}
                () = self.stopping.cancelled() => {}
            }
        }
        // Workers end by themselves at the same signal.
        while self.workers.join_next().await.is_some() {}
        self.orphans.shutdown().await;
    }

    fn watches(&self) -> Result<Watches, ApiError> {
        let api = &self.shared.api;
        Ok(Watches {
            own_node: api.watch_own_node()?,
            pods: api.watch("pods")?,
            config_maps: api.watch("configmaps")?,
            secrets: api.watch("secrets")?,
        })
    }

    async fn follow(&mut self, relists: &mut mpsc::Receiver<Relist>) -> Result<(), ApiError> {
        let mut watches = self.watches()?;
        self.present.clear();
        loop {
            tokio::select! {
                event = watches.own_node.next() => match event {
                    Some(event) => self.node_event(&event?),
                    None => return Ok(()),
                },
                event = watches.pods.next() => match event {
                    Some(event) => self.pod_event(&event?),
                    None => return Ok(()),
                },
                event = watches.config_maps.next() => match event {
                    Some(event) => self.input_event(&event?, InputName::ConfigMap),
                    None => return Ok(()),
                },
                event = watches.secrets.next() => match event {
                    Some(event) => self.input_event(&event?, InputName::Secret),
                    None => return Ok(()),
                },
                Some(relist) = relists.recv() => self.relisted(relist),
                Some(ended) = self.workers.join_next() => self.worker_ended(ended),
                Some(ended) = self.orphans.join_next() => {
                    if let Ok(uid) = ended {
                        self.orphan_pods.remove(&uid);
                    } else {
                        self.orphan_pods.clear();
                    }
                    self.release_held();
                }
                () = self.stopping.cancelled() => return Ok(()),
            }
        }
    }

    /// Pods say the addresses of their node.
    fn node_event(&mut self, event: &WatchEvent) {
        let addresses = super::api::node_addresses(&event.object);
        if event.kind == EventKind::Deleted || addresses == self.node_addresses {
            return;
        }
        self.node_addresses = addresses;
        for handle in self.pods.values() {
            handle.poke.look();
        }
    }

    fn pod_event(&mut self, event: &WatchEvent) {
        match event.kind {
            EventKind::Bookmark => self.all_listed(),
            EventKind::Deleted => self.pod_gone(super::api::uid_of(&event.object)),
            EventKind::Added | EventKind::Modified => {
                let node = event.object.pointer("/spec/nodeName").and_then(Value::as_str);
                if node != Some(self.shared.config.node_name.as_str()) {
                    return;
                }
                match Pod::deserialize(event.object.as_ref()) {
                    Ok(pod) => self.pod_present(pod),
                    Err(error) => {
                        tracing::warn!(%error, uid = super::api::uid_of(&event.object), "a pod in the store is malformed")
                    }
                }
            }
        }
    }

    fn pod_present(&mut self, pod: Pod) {
        let meta = &pod.metadata;
        let identity = PodIdentity {
            namespace: meta.namespace.clone().unwrap_or_default(),
            name: meta.name.clone().unwrap_or_default(),
            uid: meta.uid.clone().unwrap_or_default(),
        };
        if !is_plain_name(&identity.uid) || identity.name.is_empty() {
            tracing::warn!(pod = identity.name, uid = identity.uid, "a pod without a usable uid is not run");
            return;
        }
        self.present.insert(identity.uid.clone());
        let references = references(&pod);
        let pod = Arc::new(pod);
        if let Some(handle) = self.pods.get_mut(&identity.uid) {
            handle.references = references;
            let poke = Arc::clone(&handle.poke);
            handle.desired.send_if_modified(|desired| {
                let news = is_news(desired, &pod);
                if desired.pod().metadata.labels != pod.metadata.labels
                    || desired.pod().metadata.annotations != pod.metadata.annotations
                {
                    poke.inputs_changed();
                }
                *desired = Desired::Present(pod);
                news
            });
            return;
        }
        // Another pod of that name in the store's place means that the old one is gone.
        let older: Vec<String> = self
            .pods
            .values()
            .filter(|h| h.identity.name == identity.name && h.identity.namespace == identity.namespace)
            .map(|h| h.identity.uid.clone())
            .collect();
        for uid in older {
            self.pod_gone(&uid);
        }
        let uid = identity.uid.clone();
        let handle = Handle {
            identity,
            desired: watch::Sender::new(Desired::Present(pod)),
            poke: Arc::new(Poke::default()),
            references,
            held: true,
        };
        self.pods.insert(uid, handle);
        self.release_held();
    }

    fn pod_gone(&mut self, uid: &str) {
        let Some(handle) = self.pods.get(uid) else { return };
        if handle.held {
            // Nothing of it was ever started here, or it's found as an orphan.
            self.pods.remove(uid);
            return;
        }
        handle.desired.send_if_modified(|desired| {
            let news = matches!(desired, Desired::Present(_));
            *desired = Desired::Gone(Arc::clone(desired.pod()));
            news
        });
    }

    /// Starts the pods that waited and need not wait any more.
    fn release_held(&mut self) {
        // Before both were listed, an orphan of that name may still be there.
        if !self.listed || !self.relisted {
            return;
        }
        let busy: BTreeSet<(String, String)> = self
            .pods
            .values()
            .filter(|handle| !handle.held)
            .map(|handle| (handle.identity.namespace.clone(), handle.identity.name.clone()))
            .chain(self.orphan_pods.values().cloned())
            .collect();
        let mut released = Vec::new();
        for (uid, handle) in self.pods.iter_mut().filter(|(_, handle)| handle.held) {
            if !busy.contains(&(handle.identity.namespace.clone(), handle.identity.name.clone())) {
                handle.held = false;
                released.push(uid.clone());
            }
        }
        for uid in released {
            let Some(handle) = self.pods.get(&uid) else { continue };
            let worker = Worker::new(
                Arc::clone(&self.shared),
                handle.identity.clone(),
                handle.desired.subscribe(),
                Arc::clone(&handle.poke),
            );
            let stopping = self.stopping.clone();
            self.workers.spawn(async move {
                let gone = worker.run(stopping).await;
                (uid, gone)
            });
        }
    }

    /// The store has shown all present pods: those that it didn't show are gone.
    fn all_listed(&mut self) {
        let vanished: Vec<String> = self.pods.keys().filter(|uid| !self.present.contains(*uid)).cloned().collect();
        for uid in vanished {
            self.pod_gone(&uid);
        }
        if !self.listed {
            tracing::info!(pods = self.pods.len(), "the pods of this node are known");
        }
        self.listed = true;
        self.release_held();
    }

    fn input_event(&mut self, event: &WatchEvent, name: fn(String) -> InputName) {
        if event.kind == EventKind::Bookmark {
            return;
        }
        let text = |path: &str| event.object.pointer(path).and_then(Value::as_str).unwrap_or_default();
        let (namespace, name) = (text("/metadata/namespace"), name(text("/metadata/name").to_owned()));
        for handle in self.pods.values() {
            if handle.identity.namespace == namespace && handle.references.contains(&name) {
                handle.poke.inputs_changed();
            }
        }
    }

    fn relisted(&mut self, relist: Relist) {
        for uid in &relist.changed {
            if let Some(handle) = self.pods.get(uid) {
                handle.poke.look();
            }
        }
        if !self.listed {
            return;
        }
        for (uid, seen) in &relist.seen {
            if !self.pods.contains_key(uid) && !self.orphan_pods.contains_key(uid) {
                self.remove_orphan(seen.clone());
            }
        }
        if !self.relisted {
            self.relisted = true;
            self.remove_leftovers(&relist.seen);
            self.release_held();
        }
    }

    fn remove_orphan(&mut self, seen: Seen) {
        let uid = seen.identity.uid.clone();
        self.orphan_pods.insert(uid.clone(), (seen.identity.namespace.clone(), seen.identity.name.clone()));
        let shared = Arc::clone(&self.shared);
        self.orphans.spawn(async move {
            if let Err(error) = Box::pin(end_orphan(&shared, &seen)).await {
                tracing::warn!(uid, %error, "an unknown pod could not be removed yet");
            }
            uid
        });
    }

    /// Folders of pods that nobody knows, left by a crash or a runtime that lost its records.
    fn remove_leftovers(&mut self, seen: &BTreeMap<String, Seen>) {
        let Ok(entries) = std::fs::read_dir(&self.shared.config.pods_dir) else { return };
        let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
        for uid in names.filter(|uid| !seen.contains_key(uid) && !self.pods.contains_key(uid)) {
            let shared = Arc::clone(&self.shared);
            self.orphan_pods.insert(uid.clone(), Default::default());
            self.orphans.spawn(async move {
                if let Err(error) = end_leftover(&shared, &uid).await {
                    tracing::warn!(uid, %error, "the folder of an unknown pod could not be removed");
                }
                uid
            });
        }
    }

    fn worker_ended(&mut self, ended: Result<(String, bool), tokio::task::JoinError>) {
        match ended {
            Ok((uid, true)) => {
                self.pods.remove(&uid);
                self.release_held();
            }
            Ok((_, false)) => {}
            Err(error) => {
                // A defect in a worker must not leave its pod without an owner.
                tracing::error!(%error, "the owner of a pod died; all owners that died are started again");
                self.restart_dead();
            }
        }
    }

    fn restart_dead(&mut self) {
        for handle in self.pods.values_mut() {
            if handle.desired.receiver_count() == 0 {
                handle.held = true;
            }
        }
        self.release_held();
    }
}

/// Whether a new object asks for anything: a worker's own status comes back through the watch.
fn is_news(before: &Desired, pod: &Pod) -> bool {
    let Desired::Present(old) = before else { return true };
    let (a, b) = (&old.metadata, &pod.metadata);
    old.spec != pod.spec
        || a.deletion_timestamp != b.deletion_timestamp
        || a.deletion_grace_period_seconds != b.deletion_grace_period_seconds
        || a.labels != b.labels
        || a.annotations != b.annotations
        || pod.spec.as_ref().is_some_and(|spec| spec.readiness_gates.is_some())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_own_status_write_wakes_nobody() {
        let pod = |value: Value| serde_json::from_value::<Pod>(value).unwrap();
        let base = json!({"metadata": {"name": "p", "resourceVersion": "1"}, "spec": {"containers": []}});
        let before = Desired::Present(Arc::new(pod(base.clone())));
        let mut changed = base.clone();
        changed["status"] = json!({"phase": "Running"});
        changed["metadata"]["resourceVersion"] = json!("2");
        assert!(!is_news(&before, &pod(changed)));
        let mut deleted = base.clone();
        deleted["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        assert!(is_news(&before, &pod(deleted)));
        let gone = Desired::Gone(Arc::clone(before.pod()));
        assert!(is_news(&gone, &pod(base)), "an object that is back is news");
    }
}
