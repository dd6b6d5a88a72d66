//! Deployments: ReplicaSets for each template, and the rollout from one to the next.

use std::{collections::BTreeMap, sync::Arc};

use jiff::Timestamp;
use k8s_openapi::{
    api::apps::v1::{Deployment, DeploymentCondition, ReplicaSet, ReplicaSetSpec},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions},
};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use super::{
    Context,
    cache::Name,
    deployment_status::{self as progress, PROGRESSING},
    ownership, pod_state, pod_template,
    queue::WorkQueue,
    rollout::{self, Limits, Size},
    worker::{self, Failure, Next, ignore_not_found},
};

const CONTROLLER: &str = "deployments";
const WORKERS: usize = 8;
/// Annotations with which Kubernetes numbers rollouts and remembers the size that a ReplicaSet was scaled for.
const REVISION: &str = "deployment.kubernetes.io/revision";
const HISTORY: &str = "deployment.kubernetes.io/revision-history";
const DESIRED: &str = "deployment.kubernetes.io/desired-replicas";
const MAXIMUM: &str = "deployment.kubernetes.io/max-replicas";
/// Annotations of a Deployment that its ReplicaSets don't get.
const NOT_COPIED: [&str; 6] = [
    REVISION,
    HISTORY,
    DESIRED,
    MAXIMUM,
    "kubectl.kubernetes.io/last-applied-configuration",
    "deprecated.deployment.rollback.to",
];
/// Longest revision history (Kubernetes' limit).
const MAX_HISTORY: usize = 2000;

pub(crate) fn start(context: &Arc<Context>) -> Vec<JoinHandle<()>> {
    let queue: Arc<WorkQueue<Name>> = worker::queue(context, CONTROLLER);
    let target = Arc::clone(&queue);
    context.deployments.on_change(move |_, new| {
        if let Some(deployment) = new {
            target.add(Name::of(&**deployment));
        }
    });
    let (target, deployments) = (Arc::clone(&queue), Arc::clone(&context.deployments));
    context.replica_sets.on_change(move |old, new| {
        for set in old.into_iter().chain(new) {
            let namespace = set.namespace().unwrap_or_default();
            if let Some(owner) = ownership::controller_name::<_, Deployment>(&**set) {
                target.add(Name::new(namespace, owner));
            } else if super::cache::controller_uid(&**set).is_none() {
                for deployment in deployments.in_namespace(&namespace) {
                    if selector(&deployment).is_some_and(|selector| ownership::matches(&selector, &**set)) {
                        target.add(Name::of(&*deployment));
                    }
                }
            }
        }
    });
    // Recreate goes on when the last old pod is gone; everything else is seen in the status of the ReplicaSets.
    let (target, sets) = (Arc::clone(&queue), Arc::clone(&context.replica_sets));
    context.pods.on_change(move |old, new| {
        let Some(pod) = old else { return };
        if new.is_some_and(|new| !pod_state::is_terminal(new)) {
            return;
        }
        let namespace = pod.namespace().unwrap_or_default();
        let set = ownership::controller_name::<_, ReplicaSet>(&**pod);
        let set = set.and_then(|set| sets.get(&Name::new(&namespace, set)));
        if let Some(owner) = set.and_then(|set| ownership::controller_name::<_, Deployment>(&*set)) {
            target.add(Name::new(namespace, owner));
        }
    });
    let synced = {
        let context = Arc::clone(context);
        async move {
            context.deployments.synced().await;
            context.replica_sets.synced().await;
            context.pods.synced().await;
        }
    };
    let shared = Arc::clone(context);
    let reconcile = move |name: Name| {
        let context = Arc::clone(&shared);
        async move { Run::reconcile(&context, &name).await }
    };
    vec![worker::run(context, CONTROLLER, queue, WORKERS, synced, reconcile)]
}

fn selector(deployment: &Deployment) -> Option<kube::core::Selector> {
    ownership::selector(&deployment.spec.as_ref()?.selector)
}

/// One look at one Deployment.
struct Run<'a> {
    context: &'a Context,
    deployment: Arc<Deployment>,
    deployments: Api<Deployment>,
    sets: Api<ReplicaSet>,
    replicas: i32,
    limits: Limits,
    /// Conditions found out in this run.
    noted: Vec<DeploymentCondition>,
}

impl Run<'_> {
    async fn reconcile(context: &Context, name: &Name) -> Result<Next, Failure> {
        let Some(deployment) = context.deployments.get(name) else { return Ok(Next::OnChange) };
        let (Some(spec), Some(selector)) = (&deployment.spec, selector(&deployment)) else {
            return Ok(Next::OnChange);
        };
        let replicas = progress::replicas(&deployment);
        let recreate = spec.strategy.as_ref().is_some_and(|strategy| strategy.type_.as_deref() == Some("Recreate"));
        let limits = if recreate {
            Limits { surge: 0, unavailable: 0 }
        } else {
            rollout::limits(spec.strategy.as_ref().and_then(|strategy| strategy.rolling_update.as_ref()), replicas)
        };
        let sets: Api<ReplicaSet> = Api::namespaced(context.client.clone(), &name.namespace);
        let deployments: Api<Deployment> = Api::namespaced(context.client.clone(), &name.namespace);
        let candidates = context.replica_sets.in_namespace(&name.namespace);
        let mut owned =
            ownership::claim(&deployments, &*deployment, &selector, candidates, &sets, &context.replica_sets).await?;
        sort(&mut owned);
        let paused = spec.paused.unwrap_or(false);
        let mut run = Run {
            context,
            deployments,
            sets,
            replicas,
            limits,
            noted: Vec::new(),
            deployment: Arc::clone(&deployment),
        };
        if deployment.metadata.deletion_timestamp.is_some() {
            return run.write_status(&owned, false).await;
        }
        run.noted.extend(progress::pause_change(&deployment));
        if paused || run.was_scaled(&owned) {
            run.sync_revision(&mut owned, false).await?;
            run.scale(&mut owned).await?;
            if paused {
                run.clean_up(&owned).await?;
            }
            return run.write_status(&owned, false).await;
        }
        let outcome = if recreate { run.recreate(&mut owned).await } else { run.roll(&mut owned).await };
        if let Err(failure) = outcome {
            // What was found out is written all the same, so that a user can see why nothing happens.
            if matches!(failure, Failure::Rejected(_)) {
                let reason = progress::CREATE_ERROR;
                run.noted.push(progress::condition(PROGRESSING, "False", reason, failure.to_string()));
            }
            run.write_status(&owned, true).await?;
            return Err(failure);
        }
        run.write_status(&owned, true).await
    }

    fn template(&self) -> k8s_openapi::api::core::v1::PodTemplateSpec {
        self.deployment.spec.as_ref().map(|spec| spec.template.clone()).unwrap_or_default()
    }

    /// Where the ReplicaSet of the current template is; the oldest when several are equal.
    fn newest(&self, owned: &[Arc<ReplicaSet>]) -> Option<usize> {
        let template = self.template();
        owned.iter().position(|set| {
            let own = set.spec.as_ref().and_then(|spec| spec.template.as_ref());
            own.is_some_and(|own| pod_template::same(own, &template))
        })
    }

    fn was_scaled(&self, owned: &[Arc<ReplicaSet>]) -> bool {
        owned.iter().filter(|set| size(set).spec > 0).any(|set| {
            let desired = number(set, DESIRED);
            desired.is_some_and(|desired| desired != self.replicas)
        })
    }

    /// Gives the newest ReplicaSet its revision and the Deployment's annotations, and creates it if `create` and missing.
    async fn sync_revision(
        &mut self,
        owned: &mut Vec<Arc<ReplicaSet>>,
        create: bool,
    ) -> Result<Option<usize>, Failure> {
        let at = self.newest(owned);
        let old = owned.iter().enumerate().filter(|(other, _)| Some(*other) != at);
        let revision = 1 + old.map(|(_, set)| revision(set)).max().unwrap_or(0);
        let Some(at) = at else {
            if !create {
                return Ok(None);
            }
            return self.create(owned, revision).await.map(Some);
        };
        let set = Arc::clone(&owned[at]);
        let mut annotations = self.copied_annotations(&set);
        let current = revision_of(&set);
        let revision = current.map_or(revision, |current| current.max(revision));
        if current.is_some_and(|current| current < revision) {
            let mut history = set.annotations().get(HISTORY).cloned().unwrap_or_default();
            let entry = current.unwrap_or(0).to_string();
            if history.len() + entry.len() < MAX_HISTORY {
                if !history.is_empty() {
                    history.push(',');
                }
                history.push_str(&entry);
            }
            annotations.insert(HISTORY.to_owned(), history);
        }
        annotations.insert(REVISION.to_owned(), revision.to_string());
        let min_ready = self.deployment.spec.as_ref().and_then(|spec| spec.min_ready_seconds);
        let mut patch = json!({});
        if annotations.iter().any(|(key, value)| set.annotations().get(key) != Some(value)) {
            patch["metadata"]["annotations"] = json!(annotations);
        }
        if set.spec.as_ref().and_then(|spec| spec.min_ready_seconds).unwrap_or(0) != min_ready.unwrap_or(0) {
            patch["spec"]["minReadySeconds"] = json!(min_ready.unwrap_or(0));
        }
        if patch != json!({}) {
            owned[at] = self.patch_set(&set, patch).await?;
        }
        self.set_revision(revision).await?;
        let conditions = self.deployment.status.as_ref().and_then(|status| status.conditions.as_deref());
        if !conditions.unwrap_or_default().iter().any(|condition| condition.type_ == PROGRESSING) {
            let message = format!("Found new replica set \"{}\"", set.name_any());
            self.noted.push(progress::condition(PROGRESSING, "True", progress::FOUND, message));
        }
        Ok(Some(at))
    }

    async fn create(&mut self, owned: &mut Vec<Arc<ReplicaSet>>, revision: i64) -> Result<usize, Failure> {
        let spec = self.deployment.spec.clone().unwrap_or_default();
        let collisions = self.deployment.status.as_ref().and_then(|status| status.collision_count).unwrap_or(0);
        let mut template = spec.template;
        let hash = pod_template::hash(&template, collisions);
        let labels = template.metadata.get_or_insert_default().labels.get_or_insert_default();
        labels.insert(pod_template::HASH_LABEL.to_owned(), hash.clone());
        let labels = labels.clone();
        let mut selector = spec.selector;
        let matched = selector.match_labels.get_or_insert_default();
        matched.insert(pod_template::HASH_LABEL.to_owned(), hash.clone());
        let total = owned.iter().map(|set| size(set).spec).sum();
        let replicas =
            if self.is_recreate() { self.replicas } else { rollout::grow_new(self.replicas, self.limits, total, 0) };
        let mut annotations = self.sizes();
        annotations.insert(REVISION.to_owned(), revision.to_string());
        annotations.extend(self.deployment_annotations());
        let name = format!("{}-{hash}", self.deployment.name_any());
        let set = ReplicaSet {
            metadata: ObjectMeta {
                name: Some(name.clone()),
                namespace: self.deployment.namespace(),
                labels: Some(labels),
                annotations: Some(annotations),
                owner_references: Some(vec![ownership::controller_reference(&*self.deployment)]),
                ..Default::default()
            },
            spec: Some(ReplicaSetSpec {
                replicas: Some(replicas),
                min_ready_seconds: spec.min_ready_seconds,
                selector,
                template: Some(template),
            }),
            status: None,
        };
        let created = match self.sets.create(&PostParams::default(), &set).await {
            Ok(created) => {
                let message = format!("Created new replica set \"{name}\"");
                self.noted.push(progress::condition(PROGRESSING, "True", progress::CREATED, message));
                self.note_scale(&name, 0, replicas);
                created
            }
            Err(error) if worker::already_exists(&error) => {
                let live = ignore_not_found(self.sets.get(&name).await).map_err(Failure::api("get a ReplicaSet"))?;
                let live = live.ok_or(Failure::Conflict)?;
                let ours = super::cache::controller_uid(&live) == self.deployment.uid().as_deref()
                    && live
                        .spec
                        .as_ref()
                        .and_then(|spec| spec.template.as_ref())
                        .is_some_and(|template| pod_template::same(template, &self.template()));
                if !ours {
                    self.count_collision(collisions + 1).await?;
                    return Err(Failure::Conflict);
                }
                live
            }
            Err(error) if worker::is_rejection(&error) => {
                let message = format!("Failed to create new replica set \"{name}\": {error}");
                self.context.recorder.warning(
                    "deployment-controller",
                    &*self.deployment,
                    progress::CREATE_ERROR,
                    message.clone(),
                );
                return Err(Failure::Rejected(message));
            }
            Err(error) => return Err(Failure::api("create a ReplicaSet")(error)),
        };
        self.context.replica_sets.wrote(created.clone());
        owned.push(Arc::new(created));
        self.set_revision(revision).await?;
        Ok(owned.len() - 1)
    }

    async fn count_collision(&self, collisions: i32) -> Result<(), Failure> {
        let patch = json!({"status": {"collisionCount": collisions}});
        let name = self.deployment.name_any();
        let written = self.deployments.patch_status(&name, &PatchParams::default(), &Patch::Merge(&patch)).await;
        let written = written.map_err(Failure::api("count a collision of ReplicaSet names"))?;
        self.context.deployments.wrote(written);
        Ok(())
    }

    /// Writes the revision at the Deployment, where `kubectl rollout` looks for it.
    async fn set_revision(&mut self, revision: i64) -> Result<(), Failure> {
        let text = revision.to_string();
        if self.deployment.annotations().get(REVISION) == Some(&text) {
            return Ok(());
        }
        let patch = json!({"metadata": {"uid": self.deployment.uid(), "annotations": {REVISION: text}}});
        let name = self.deployment.name_any();
        let written = self.deployments.patch(&name, &PatchParams::default(), &Patch::Merge(&patch)).await;
        let written = written.map_err(Failure::api("write a revision"))?;
        self.context.deployments.wrote(written);
        Ok(())
    }

    fn is_recreate(&self) -> bool {
        let strategy = self.deployment.spec.as_ref().and_then(|spec| spec.strategy.as_ref());
        strategy.is_some_and(|strategy| strategy.type_.as_deref() == Some("Recreate"))
    }

    fn deployment_annotations(&self) -> BTreeMap<String, String> {
        let mut annotations = self.deployment.annotations().clone();
        annotations.retain(|key, _| !NOT_COPIED.contains(&key.as_str()));
        annotations
    }

    fn copied_annotations(&self, set: &ReplicaSet) -> BTreeMap<String, String> {
        let mut annotations = self.deployment_annotations();
        annotations.retain(|key, value| set.annotations().get(key) != Some(value));
        annotations
    }

    fn sizes(&self) -> BTreeMap<String, String> {
        let maximum = self.replicas + self.limits.surge;
        [(DESIRED.to_owned(), self.replicas.to_string()), (MAXIMUM.to_owned(), maximum.to_string())].into()
    }

    async fn roll(&mut self, owned: &mut Vec<Arc<ReplicaSet>>) -> Result<(), Failure> {
        let Some(at) = self.sync_revision(owned, true).await? else { return Ok(()) };
        let total = owned.iter().map(|set| size(set).spec).sum();
        let grown = rollout::grow_new(self.replicas, self.limits, total, size(&owned[at]).spec);
        self.resize(owned, at, grown).await?;
        let old: Vec<usize> = (0..owned.len()).filter(|other| *other != at).collect();
        let sizes: Vec<Size> = old.iter().map(|other| size(&owned[*other])).collect();
        let shrunk = rollout::shrink_old(self.replicas, self.limits, size(&owned[at]), &sizes);
        for (other, to) in old.into_iter().zip(shrunk) {
            if size(&owned[other]).spec != to {
                self.resize(owned, other, to).await?;
            }
        }
        self.clean_up_when_complete(owned).await
    }

    async fn recreate(&mut self, owned: &mut Vec<Arc<ReplicaSet>>) -> Result<(), Failure> {
        let current = self.sync_revision(owned, false).await?;
        for other in (0..owned.len()).filter(|other| Some(*other) != current) {
            if size(&owned[other]).spec > 0 {
                self.resize(owned, other, 0).await?;
            }
        }
        let old = owned.iter().enumerate().filter(|(other, _)| Some(*other) != current);
        let running = old.flat_map(|(_, set)| self.context.pods.controlled_by(&set.uid().unwrap_or_default()));
        if running.filter(|pod| !pod_state::is_terminal(pod)).count() > 0 {
            return Ok(());
        }
        if let Some(at) = self.sync_revision(owned, true).await? {
            self.resize(owned, at, self.replicas).await?;
        }
        self.clean_up_when_complete(owned).await
    }

    /// The Deployment's size changed, or it is paused: sizes change, the rollout doesn't go on.
    async fn scale(&mut self, owned: &mut [Arc<ReplicaSet>]) -> Result<(), Failure> {
        let newest = self.newest(owned);
        let active: Vec<usize> = (0..owned.len()).filter(|at| size(&owned[*at]).spec > 0).collect();
        let only = match active[..] {
            [] => newest.or_else(|| owned.len().checked_sub(1)),
            [only] => Some(only),
            _ => None,
        };
        if let Some(only) = only {
            return self.resize(owned, only, self.replicas).await;
        }
        let saturated = newest.is_some_and(|at| {
            let size = size(&owned[at]);
            size.spec == self.replicas
                && size.status_available >= self.replicas
                && number(&owned[at], DESIRED) == Some(self.replicas)
        });
        if saturated {
            for at in active.into_iter().filter(|at| Some(*at) != newest) {
                self.resize(owned, at, 0).await?;
            }
            return Ok(());
        }
        if self.is_recreate() {
            return Ok(());
        }
        let sets: Vec<_> = active.iter().map(|at| (size(&owned[*at]).spec, number(&owned[*at], MAXIMUM))).collect();
        let status = self.deployment.status.as_ref().and_then(|status| status.replicas).unwrap_or(0);
        let sizes = rollout::spread(self.replicas, self.limits, &sets, status);
        for (at, to) in active.into_iter().zip(sizes) {
            self.resize(owned, at, to).await?;
        }
        Ok(())
    }

    /// Sets the size of a ReplicaSet, and notes for which size of the Deployment that was.
    async fn resize(&self, owned: &mut [Arc<ReplicaSet>], at: usize, to: i32) -> Result<(), Failure> {
        let set = Arc::clone(&owned[at]);
        let from = size(&set).spec;
        let sizes = self.sizes();
        let noted = sizes.iter().all(|(key, value)| set.annotations().get(key) == Some(value));
        if from == to && (noted || to == 0) {
            return Ok(());
        }
        let patch = json!({"metadata": {"annotations": sizes}, "spec": {"replicas": to}});
        owned[at] = self.patch_set(&set, patch).await?;
        if from != to {
            self.note_scale(&set.name_any(), from, to);
        }
        Ok(())
    }

    fn note_scale(&self, set: &str, from: i32, to: i32) {
        let direction = if to > from { "up" } else { "down" };
        let message = format!("Scaled {direction} replica set {set} from {from} to {to}");
        self.context.recorder.normal("deployment-controller", &*self.deployment, "ScalingReplicaSet", message);
    }

    async fn patch_set(&self, set: &Arc<ReplicaSet>, mut patch: Value) -> Result<Arc<ReplicaSet>, Failure> {
        patch["metadata"]["uid"] = json!(set.uid());
        patch["metadata"]["resourceVersion"] = json!(set.resource_version());
        match self.sets.patch(&set.name_any(), &PatchParams::default(), &Patch::Merge(&patch)).await {
            Ok(written) => {
                self.context.replica_sets.wrote(written.clone());
                Ok(Arc::new(written))
            }
            Err(error) if worker::is_not_found(&error) => {
                self.context.replica_sets.gone(set);
                Err(Failure::Conflict)
            }
            Err(error) => Err(Failure::api("change a ReplicaSet")(error)),
        }
    }

    async fn clean_up_when_complete(&self, owned: &[Arc<ReplicaSet>]) -> Result<(), Failure> {
        if progress::is_complete(&self.deployment, &self.status(owned)) { self.clean_up(owned).await } else { Ok(()) }
    }

    /// Deletes the oldest ReplicaSets that are beyond `revisionHistoryLimit` and have no pods left.
    async fn clean_up(&self, owned: &[Arc<ReplicaSet>]) -> Result<(), Failure> {
        let limit = self.deployment.spec.as_ref().and_then(|spec| spec.revision_history_limit).unwrap_or(10);
        let newest = self.newest(owned);
        let mut old: Vec<_> =
            owned.iter().enumerate().filter(|(at, _)| Some(*at) != newest).map(|(_, set)| set).collect();
        let surplus = old.len().saturating_sub(usize::try_from(limit).unwrap_or(0));
        old.sort_by_key(|set| revision(set));
        for set in old.into_iter().take(surplus) {
            let status = set.status.clone().unwrap_or_default();
            let busy =
                size(set).spec > 0 || status.replicas > 0 || set.metadata.generation > status.observed_generation;
            if busy || set.metadata.deletion_timestamp.is_some() {
                continue;
            }
            let preconditions = Some(Preconditions { uid: set.uid(), resource_version: None });
            let params = DeleteParams { preconditions, ..DeleteParams::background() };
            ignore_not_found(self.sets.delete(&set.name_any(), &params).await)
                .map_err(Failure::api("delete an old ReplicaSet"))?;
            self.context.replica_sets.gone(set);
        }
        Ok(())
    }

    fn status(&self, owned: &[Arc<ReplicaSet>]) -> k8s_openapi::api::apps::v1::DeploymentStatus {
        let new = self.newest(owned).map(|at| &*owned[at]);
        progress::compute(&self.deployment, new, owned, self.limits.unavailable, self.noted.clone())
    }

    async fn write_status(&mut self, owned: &[Arc<ReplicaSet>], rolling: bool) -> Result<Next, Failure> {
        let mut status = self.status(owned);
        let mut again = None;
        if rolling {
            let new = self.newest(owned).map(|at| &*owned[at]);
            again = progress::progress(&self.deployment, new, &mut status, Timestamp::now());
        }
        if self.deployment.status.as_ref() != Some(&status) {
            let patch = json!({"status": status});
            let name = self.deployment.name_any();
            let written = self.deployments.patch_status(&name, &PatchParams::default(), &Patch::Merge(&patch)).await;
            let written = ignore_not_found(written).map_err(Failure::api("write the status of a Deployment"))?;
            if let Some(written) = written {
                self.context.deployments.wrote(written);
            }
        }
        Ok(again.map_or(Next::OnChange, Next::After))
    }
}

/// Oldest first.
fn sort(sets: &mut [Arc<ReplicaSet>]) {
    sets.sort_by_key(|set| (set.metadata.creation_timestamp.as_ref().map(|time| time.0), set.metadata.name.clone()));
}

fn size(set: &ReplicaSet) -> Size {
    Size {
        spec: set.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1),
        status_available: set.status.as_ref().and_then(|status| status.available_replicas).unwrap_or(0),
    }
}

fn number(set: &ReplicaSet, annotation: &str) -> Option<i32> {
    set.annotations().get(annotation)?.parse().ok()
}

fn revision_of(set: &ReplicaSet) -> Option<i64> {
    set.annotations().get(REVISION)?.parse().ok()
}

fn revision(set: &ReplicaSet) -> i64 {
    revision_of(set).unwrap_or(0)
}
