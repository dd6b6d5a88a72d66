//! ReplicaSets: as many pods as asked for, made from the template, and the status of them.

use std::{cmp::Reverse, collections::HashMap, sync::Arc, time::Duration};

use futures::future::join_all;
use jiff::Timestamp;
use k8s_openapi::{
    api::{
        apps::v1::{ReplicaSet, ReplicaSetCondition, ReplicaSetStatus},
        core::v1::Pod,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions},
};
use serde_json::json;
use tokio::task::JoinHandle;

use super::{
    Context,
    cache::Name,
    node_lifecycle, ownership, pod_state,
    queue::WorkQueue,
    worker::{self, Failure, Next, ignore_not_found},
};

const CONTROLLER: &str = "replica-sets";
const WORKERS: usize = 8;
/// Pods that are created or deleted in one run; the rest follows in the next.
const BURST: usize = 256;
/// Creates and deletes in flight for one ReplicaSet.
const AT_ONCE: usize = 16;
/// Annotation by which users say which pods to delete first (Kubernetes, "Pod deletion cost").
const DELETION_COST: &str = "controller.kubernetes.io/pod-deletion-cost";

pub(crate) fn start(context: &Arc<Context>) -> Vec<JoinHandle<()>> {
    let queue: Arc<WorkQueue<Name>> = worker::queue(context, CONTROLLER);
    let target = Arc::clone(&queue);
    context.replica_sets.on_change(move |_, new| {
        if let Some(set) = new {
            target.add(Name::of(&**set));
        }
    });
    let (target, sets) = (Arc::clone(&queue), Arc::clone(&context.replica_sets));
    context.pods.on_change(move |old, new| {
        for pod in old.into_iter().chain(new) {
            let namespace = pod.namespace().unwrap_or_default();
            if let Some(owner) = ownership::controller_name::<_, ReplicaSet>(&**pod) {
                target.add(Name::new(namespace, owner));
            } else if super::cache::controller_uid(&**pod).is_none() && !pod.labels().is_empty() {
                for set in sets.in_namespace(&namespace) {
                    if selector(&set).is_some_and(|selector| ownership::matches(&selector, &**pod)) {
                        target.add(Name::of(&*set));
                    }
                }
            }
        }
    });
    let synced = {
        let context = Arc::clone(context);
        async move {
            context.replica_sets.synced().await;
            context.pods.synced().await;
            context.nodes.synced().await;
        }
    };
    let shared = Arc::clone(context);
    let reconcile = move |name: Name| {
        let context = Arc::clone(&shared);
        async move { reconcile(&context, &name).await }
    };
    vec![worker::run(context, CONTROLLER, queue, WORKERS, synced, reconcile)]
}

fn selector(set: &ReplicaSet) -> Option<kube::core::Selector> {
    ownership::selector(&set.spec.as_ref()?.selector)
}

async fn reconcile(context: &Context, name: &Name) -> Result<Next, Failure> {
    let Some(set) = context.replica_sets.get(name) else { return Ok(Next::OnChange) };
    let Some(selector) = selector(&set) else { return Ok(Next::OnChange) };
    let sets: Api<ReplicaSet> = Api::namespaced(context.client.clone(), &name.namespace);
    let api: Api<Pod> = Api::namespaced(context.client.clone(), &name.namespace);
    let candidates = context.pods.in_namespace(&name.namespace);
    let pods = ownership::claim(&sets, &*set, &selector, candidates, &api, &context.pods).await?;
    let active: Vec<_> = pods.into_iter().filter(|pod| pod_state::is_active(pod)).collect();

    let managed =
        if set.metadata.deletion_timestamp.is_none() { manage(context, &api, &set, &active).await } else { Ok(()) };
    // What was created or deleted just now counts already.
    let mut active = context.pods.controlled_by(&set.uid().unwrap_or_default());
    active.retain(|pod| pod_state::is_active(pod));
    let failure = managed.as_ref().err().map(ToString::to_string);
    let (status, next) = status(&set, &active, failure, Timestamp::now());
    if set.status.as_ref() != Some(&status) {
        let patch = json!({"status": status});
        match sets.patch_status(&name.name, &PatchParams::default(), &Patch::Merge(&patch)).await {
            Ok(written) => context.replica_sets.wrote(written),
            Err(error) if worker::is_not_found(&error) => context.replica_sets.gone(&*set),
            Err(error) => return Err(Failure::api("write the status of a ReplicaSet")(error)),
        }
    }
    managed.map(|()| next)
}

async fn manage(context: &Context, api: &Api<Pod>, set: &ReplicaSet, active: &[Arc<Pod>]) -> Result<(), Failure> {
    let wanted = usize::try_from(set.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1)).unwrap_or(0);
    if active.len() < wanted {
        return create(context, api, set, (wanted - active.len()).min(BURST)).await;
    }
    let surplus = (active.len() - wanted).min(BURST);
    if surplus == 0 {
        return Ok(());
    }
    let victims = first_to_go(active, surplus, |node| {
        context.nodes.get(&Name::new("", node)).is_some_and(|node| node_lifecycle::is_ready(&node))
    });
    for batch in victims.chunks(AT_ONCE) {
        let deletions = batch.iter().map(|pod| async {
            let preconditions = Some(Preconditions { uid: pod.uid(), resource_version: None });
            let params = DeleteParams { preconditions, ..Default::default() };
            let deleted = api.delete(&pod.name_any(), &params).await;
            match ignore_not_found(deleted) {
                Ok(Some(_)) => context.pods.deleted(pod),
                Ok(None) => context.pods.gone(pod),
                Err(error) => return Err(Failure::api("delete a pod")(error)),
            }
            let message = format!("Deleted pod: {}", pod.name_any());
            context.recorder.normal("replicaset-controller", set, "SuccessfulDelete", message);
            Ok(())
        });
        join_all(deletions).await.into_iter().collect::<Result<(), _>>()?;
    }
    Ok(())
}

/// Creates pods: one first, then twice as many each time, so that a template that the API refuses costs one request.
async fn create(context: &Context, api: &Api<Pod>, set: &ReplicaSet, missing: usize) -> Result<(), Failure> {
    let Some(pod) = pod_of(set) else { return Ok(()) };
    let (mut left, mut batch) = (missing, 1);
    while left > 0 {
        let creations = (0..batch.min(left)).map(|_| async {
            match api.create(&PostParams::default(), &pod).await {
                Ok(created) => {
                    let message = format!("Created pod: {}", created.name_any());
                    context.pods.wrote(created);
                    context.recorder.normal("replicaset-controller", set, "SuccessfulCreate", message);
                    Ok(())
                }
                Err(error) => {
                    let message = format!("Error creating: {error}");
                    context.recorder.warning("replicaset-controller", set, "FailedCreate", message);
                    Err(if worker::is_rejection(&error) {
                        Failure::Rejected(error.to_string())
                    } else {
                        Failure::api("create a pod")(error)
                    })
                }
            }
        });
        join_all(creations).await.into_iter().collect::<Result<(), _>>()?;
        left -= batch.min(left);
        batch = (batch * 2).min(AT_ONCE);
    }
    Ok(())
}

fn pod_of(set: &ReplicaSet) -> Option<Pod> {
    let template = set.spec.as_ref()?.template.as_ref()?;
    let meta = template.metadata.clone().unwrap_or_default();
    Some(Pod {
        metadata: ObjectMeta {
            generate_name: Some(format!("{}-", set.name_any())),
            namespace: set.namespace(),
            labels: meta.labels,
            annotations: meta.annotations,
            finalizers: meta.finalizers,
            owner_references: Some(vec![ownership::controller_reference(set)]),
            ..Default::default()
        },
        spec: template.spec.clone(),
        status: None,
    })
}

/// The `count` pods that are deleted first when there are too many, in the order of Kubernetes: not bound, then pending,
/// not ready, on a node that isn't ready, of lower deletion cost, with more siblings on the node, ready for a shorter
/// time, with more restarts, newer.
pub(crate) fn first_to_go(active: &[Arc<Pod>], count: usize, node_ready: impl Fn(&str) -> bool) -> Vec<Arc<Pod>> {
    let mut siblings: HashMap<&str, usize> = HashMap::new();
    for pod in active {
        *siblings.entry(pod_state::node(pod).unwrap_or_default()).or_default() += 1;
    }
    let mut order: Vec<_> = active
        .iter()
        .map(|pod| {
            let node = pod_state::node(pod);
            let phase = match pod_state::phase(pod) {
                "Pending" => 0,
                "Unknown" => 1,
                _ => 2,
            };
            let cost: i64 = pod.annotations().get(DELETION_COST).and_then(|cost| cost.parse().ok()).unwrap_or(0);
            let restarts: i32 = pod
                .status
                .iter()
                .flat_map(|status| status.container_statuses.iter().flatten())
                .map(|container| container.restart_count)
                .sum();
            let created = pod.metadata.creation_timestamp.as_ref().map(|time| time.0);
            let rank = (
                node.is_some(),
                phase,
                pod_state::is_ready(pod),
                node.is_some_and(&node_ready),
                cost,
                Reverse(siblings.get(node.unwrap_or_default()).copied().unwrap_or(0)),
                Reverse(pod_state::ready_since(pod)),
                Reverse(restarts),
                Reverse(created),
            );
            (rank, pod.metadata.name.clone(), pod)
        })
        .collect();
    order.sort_by(|a, b| a.0.cmp(&b.0).then_with(|| a.1.cmp(&b.1)));
    order.into_iter().take(count).map(|(_, _, pod)| Arc::clone(pod)).collect()
}

fn status(set: &ReplicaSet, active: &[Arc<Pod>], failure: Option<String>, now: Timestamp) -> (ReplicaSetStatus, Next) {
    let spec = set.spec.as_ref();
    let min_ready = spec.and_then(|spec| spec.min_ready_seconds).unwrap_or(0);
    let template_labels = spec
        .and_then(|spec| spec.template.as_ref())
        .and_then(|template| template.metadata.as_ref())
        .and_then(|meta| meta.labels.clone())
        .unwrap_or_default();
    let (mut labelled, mut ready, mut available) = (0, 0, 0);
    let mut wait: Option<u64> = None;
    for pod in active {
        if template_labels.iter().all(|(key, value)| pod.labels().get(key) == Some(value)) {
            labelled += 1;
        }
        if pod_state::is_ready(pod) {
            ready += 1;
        }
        match pod_state::available(pod, min_ready, now) {
            Ok(()) => available += 1,
            Err(Some(seconds)) => wait = Some(wait.map_or(seconds, |known| known.min(seconds))),
            Err(None) => {}
        }
    }
    let before = set.status.as_ref();
    let mut conditions = before.and_then(|status| status.conditions.clone()).unwrap_or_default();
    let failing = conditions.iter().position(|condition| condition.type_ == "ReplicaFailure");
    match (failure, failing) {
        (Some(message), None) => conditions.push(ReplicaSetCondition {
            type_: "ReplicaFailure".to_owned(),
            status: "True".to_owned(),
            reason: Some("FailedCreate".to_owned()),
            message: Some(message),
            last_transition_time: Some(super::now()),
        }),
        (None, Some(at)) => {
            conditions.remove(at);
        }
        _ => {}
    }
    let status = ReplicaSetStatus {
        replicas: i32::try_from(active.len()).unwrap_or(i32::MAX),
        fully_labeled_replicas: Some(labelled),
        ready_replicas: Some(ready),
        available_replicas: Some(available),
        observed_generation: set.metadata.generation,
        conditions: if conditions.is_empty() && before.is_none_or(|status| status.conditions.is_none()) {
            None
        } else {
            Some(conditions)
        },
    };
    (status, wait.map_or(Next::OnChange, |seconds| Next::After(Duration::from_secs(seconds.max(1)))))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(name: &str, node: Option<&str>, ready_since: Option<&str>, created: &str) -> Arc<Pod> {
        let conditions =
            ready_since.map(|since| json!([{"type": "Ready", "status": "True", "lastTransitionTime": since}]));
        let value = json!({
            "metadata": {"name": name, "namespace": "d", "uid": name, "creationTimestamp": created},
            "spec": {"nodeName": node, "containers": []},
            "status": {"phase": if ready_since.is_some() { "Running" } else { "Pending" }, "conditions": conditions}
        });
        Arc::new(serde_json::from_value(value).unwrap())
    }

    const T1: &str = "2026-01-01T00:00:00Z";
    const T2: &str = "2026-01-02T00:00:00Z";

    #[test]
    fn scaling_down_takes_what_serves_least_first() {
        let pods = [
            pod("old-ready", Some("a"), Some(T1), T1),
            pod("new-ready", Some("b"), Some(T2), T2),
            pod("silent-node", Some("gone"), Some(T1), T1),
            pod("pending", Some("c"), None, T1),
            pod("unbound", None, None, T1),
        ];
        let gone = first_to_go(&pods, 4, |node| node != "gone");
        let names: Vec<_> = gone.iter().map(|pod| pod.name_any()).collect();
        assert_eq!(names, ["unbound", "pending", "silent-node", "new-ready"]);
    }

    #[test]
    fn scaling_down_thins_the_fullest_node_before_it_empties_another() {
        let pods = [
            pod("one", Some("a"), Some(T1), T1),
            pod("two", Some("a"), Some(T1), T1),
            pod("alone", Some("b"), Some(T2), T2),
        ];
        let gone = first_to_go(&pods, 1, |_| true);
        assert_ne!(gone[0].name_any(), "alone");
    }

    #[test]
    fn a_pod_is_available_only_after_its_minimum_ready_time() {
        let set: ReplicaSet = serde_json::from_value(json!({
            "metadata": {"name": "s", "generation": 4},
            "spec": {"minReadySeconds": 10, "selector": {"matchLabels": {"a": "b"}}}
        }))
        .unwrap();
        let pods = [pod("p", Some("a"), Some(T1), T1)];
        let ready: Timestamp = T1.parse().unwrap();
        let at = |seconds| ready + jiff::SignedDuration::from_secs(seconds);
        let (early, next) = status(&set, &pods, None, at(4));
        assert_eq!((early.ready_replicas, early.available_replicas), (Some(1), Some(0)));
        assert_eq!(next, Next::After(Duration::from_secs(6)));
        let (late, next) = status(&set, &pods, None, at(10));
        assert_eq!((late.available_replicas, late.observed_generation, next), (Some(1), Some(4), Next::OnChange));
    }
}
