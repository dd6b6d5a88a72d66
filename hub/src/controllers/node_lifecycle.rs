//! Nodes that fall silent: conditions become Unknown, new pods stay away, pods that are there are left alone.
//!
//! A node at the edge is often out of reach and still at work. So no pod is ever evicted, and the pods of an edge node keep their
//! last known readiness: the copy of their EndpointSlices in their own site must stay usable while the cloud is away, and
//! the sites that can't reach them find that out by connecting. Pods of other nodes become not ready, as in Kubernetes.

use std::{collections::HashMap, sync::Arc, time::Duration};

use edgemesh_api::names::{EDGE_ROLE_LABEL, NODE_LEASE_NAMESPACE};
use k8s_openapi::api::core::v1::{Node, NodeCondition, Pod, Taint};
use kube::{
    Api, ResourceExt,
    api::{Patch, PatchParams},
};
use parking_lot::Mutex;
use serde_json::json;
use tokio::{task::JoinHandle, time::Instant};

use super::{
    Context,
    cache::Name,
    pod_state,
    queue::WorkQueue,
    worker::{self, Failure, Next, ignore_not_found},
};

const CONTROLLER: &str = "node-lifecycle";
const WORKERS: usize = 8;
/// Taints that follow from the Ready condition.
const UNREACHABLE: &str = "node.kubernetes.io/unreachable";
const NOT_READY: &str = "node.kubernetes.io/not-ready";
/// Reason of the conditions of a silent node.
const SILENT: &str = "NodeStatusUnknown";
const SILENT_MESSAGE: &str = "edgecore stopped renewing its lease";
/// Annotation that keeps the conditions from before the silence, to put them back when the node is heard again: an edge
/// node writes its status only when it changes, and doesn't know that it was taken for silent.
const LAST_HEARD: &str = "edgemesh.dev/conditions-last-heard";
/// Conditions that the node itself reports.
const OWN_CONDITIONS: [&str; 4] = ["Ready", "MemoryPressure", "DiskPressure", "PIDPressure"];

/// Whether the node's Ready condition is True.
pub(crate) fn is_ready(node: &Node) -> bool {
    condition(node, "Ready").is_some_and(|ready| ready.status == "True")
}

fn condition<'a>(node: &'a Node, type_: &str) -> Option<&'a NodeCondition> {
    node.status.as_ref()?.conditions.as_ref()?.iter().find(|condition| condition.type_ == type_)
}

/// The node was found silent by this controller, and has said nothing since.
fn taken_for_silent(node: &Node) -> bool {
    condition(node, "Ready").is_some_and(|ready| ready.status == "Unknown" && ready.reason.as_deref() == Some(SILENT))
}

/// The last sign of a node. Times of the node's own clock are only compared with each other.
struct Heartbeat {
    renewed: Option<jiff::Timestamp>,
    reported: Option<jiff::Timestamp>,
    /// When the last new sign was seen here; `None` for a node that was already silent when this process began.
    heard: Option<Instant>,
}

impl Heartbeat {
    /// Takes what the Lease and the status say now, and returns for how long the node has been silent.
    fn listen(
        known: Option<&Self>,
        renewed: Option<jiff::Timestamp>,
        reported: Option<jiff::Timestamp>,
        silent: bool,
        now: Instant,
    ) -> Self {
        let heard = match known {
            None => (!silent).then_some(now),
            Some(known) if known.renewed != renewed || known.reported < reported => Some(now),
            Some(known) => known.heard,
        };
        Self { renewed, reported, heard }
    }

    /// Time left until the node counts as silent; `None` if it does.
    fn left(&self, grace: Duration, now: Instant) -> Option<Duration> {
        let left = (self.heard? + grace).saturating_duration_since(now);
        (!left.is_zero()).then_some(left)
    }
}

pub(crate) fn start(context: &Arc<Context>) -> Vec<JoinHandle<()>> {
    let queue: Arc<WorkQueue<Name>> = worker::queue(context, CONTROLLER);
    let target = Arc::clone(&queue);
    context.nodes.on_change(move |old, new| {
        if let Some(node) = new.or(old) {
            target.add(Name::of(&**node));
        }
    });
    let target = Arc::clone(&queue);
    context.leases.on_change(move |_, new| {
        if let Some(lease) = new {
            target.add(Name::new("", lease.name_any()));
        }
    });
    let synced = {
        let context = Arc::clone(context);
        async move {
            context.nodes.synced().await;
            context.leases.synced().await;
            context.pods.synced().await;
        }
    };
    let shared = Arc::clone(context);
    let heartbeats: Arc<Mutex<HashMap<String, Heartbeat>>> = Arc::default();
    let reconcile = move |name: Name| {
        let (context, heartbeats) = (Arc::clone(&shared), Arc::clone(&heartbeats));
        async move { reconcile(&context, &heartbeats, &name).await }
    };
    vec![worker::run(context, CONTROLLER, queue, WORKERS, synced, reconcile)]
}

async fn reconcile(
    context: &Context,
    heartbeats: &Mutex<HashMap<String, Heartbeat>>,
    name: &Name,
) -> Result<Next, Failure> {
    let Some(node) = context.nodes.get(name) else {
        heartbeats.lock().remove(&name.name);
        return Ok(Next::OnChange);
    };
    let lease = context.leases.get(&Name::new(NODE_LEASE_NAMESPACE, &name.name));
    let renewed = lease.and_then(|lease| lease.spec.as_ref()?.renew_time.as_ref().map(|time| time.0));
    let reported = condition(&node, "Ready").and_then(|ready| ready.last_heartbeat_time.as_ref()).map(|time| time.0);
    let now = Instant::now();
    let left = {
        let mut heartbeats = heartbeats.lock();
        let known = heartbeats.get(&name.name);
        let heartbeat = Heartbeat::listen(known, renewed, reported, taken_for_silent(&node), now);
        let left = heartbeat.left(context.config.node_grace, now);
        heartbeats.insert(name.name.clone(), heartbeat);
        left
    };
    let api: Api<Node> = Api::all(context.client.clone());
    let node = if left.is_some() {
        if taken_for_silent(&node) { put_back(context, &api, &node).await? } else { Some(node) }
    } else if taken_for_silent(&node) {
        Some(node)
    } else {
        silence(context, &api, &node).await?
    };
    let Some(node) = node else { return Ok(Next::OnChange) };
    taint(context, &api, &node, left.is_some()).await?;
    if left.is_none() && !node.labels().contains_key(EDGE_ROLE_LABEL) {
        unready_pods(context, &name.name).await?;
    }
    Ok(left.map_or(Next::OnChange, Next::After))
}

/// Remembers the node's conditions and makes them Unknown.
async fn silence(context: &Context, api: &Api<Node>, node: &Node) -> Result<Option<Arc<Node>>, Failure> {
    let conditions = node.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    let own: Vec<_> = conditions.iter().filter(|one| OWN_CONDITIONS.contains(&one.type_.as_str())).collect();
    let remembered = serde_json::to_string(&own).unwrap_or_default();
    let patch = json!({"metadata": {"uid": node.uid(), "annotations": {LAST_HEARD: remembered}}});
    let noted = api.patch(&node.name_any(), &PatchParams::default(), &Patch::Merge(&patch)).await;
    if ignore_not_found(noted).map_err(Failure::api("remember a node's conditions"))?.is_none() {
        return Ok(None);
    }
    let mut unknown: Vec<NodeCondition> = own.into_iter().cloned().collect();
    if unknown.iter().all(|one| one.type_ != "Ready") {
        unknown.push(NodeCondition { type_: "Ready".to_owned(), ..Default::default() });
    }
    for one in &mut unknown {
        one.status = "Unknown".to_owned();
        one.reason = Some(SILENT.to_owned());
        one.message = Some(format!("{SILENT_MESSAGE}; its pods are left as they are."));
        one.last_transition_time = Some(super::now());
    }
    tracing::warn!(node = %node.name_any(), "silent: its conditions are unknown now");
    let message = format!("Node {} status is now: NodeNotReady", node.name_any());
    context.recorder.normal("node-controller", node, "NodeNotReady", message);
    write_conditions(context, api, node, &unknown).await
}

/// The node is heard again, but didn't write its conditions anew: those from before hold.
async fn put_back(context: &Context, api: &Api<Node>, node: &Node) -> Result<Option<Arc<Node>>, Failure> {
    let remembered = node.annotations().get(LAST_HEARD);
    let remembered = remembered.and_then(|text| serde_json::from_str::<Vec<NodeCondition>>(text).ok());
    let Some(mut conditions) = remembered.filter(|list| !list.is_empty()) else {
        // Nothing is known of it: it will say itself what it is.
        return Ok(Some(Arc::new(node.clone())));
    };
    for one in &mut conditions {
        one.last_transition_time = Some(super::now());
    }
    tracing::info!(node = %node.name_any(), "heard again");
    write_conditions(context, api, node, &conditions).await
}

async fn write_conditions(
    context: &Context,
    api: &Api<Node>,
    node: &Node,
    conditions: &[NodeCondition],
) -> Result<Option<Arc<Node>>, Failure> {
    let patch = json!({"metadata": {"uid": node.uid()}, "status": {"conditions": conditions}});
    let written = api.patch_status(&node.name_any(), &PatchParams::default(), &Patch::Strategic(&patch)).await;
    let written = ignore_not_found(written).map_err(Failure::api("write a node's conditions"))?;
    Ok(written.map(|written| {
        context.nodes.wrote(written.clone());
        Arc::new(written)
    }))
}

/// The taints that a node should have; `None` when it has them. Others' taints stay.
fn taints(node: &Node) -> Option<Vec<Taint>> {
    let before = node.spec.as_ref().and_then(|spec| spec.taints.clone()).unwrap_or_default();
    let wanted = match condition(node, "Ready").map(|ready| ready.status.as_str()) {
        Some("True") => None,
        Some("Unknown") => Some(UNREACHABLE),
        _ => Some(NOT_READY),
    };
    let ours = |taint: &Taint| taint.effect == "NoSchedule" && [UNREACHABLE, NOT_READY].contains(&taint.key.as_str());
    let mut after: Vec<Taint> =
        before.iter().filter(|taint| !ours(taint) || Some(taint.key.as_str()) == wanted).cloned().collect();
    if let Some(key) = wanted
        && !after.iter().any(ours)
    {
        after.push(Taint {
            key: key.to_owned(),
            effect: "NoSchedule".to_owned(),
            time_added: Some(super::now()),
            ..Default::default()
        });
    }
    (before != after).then_some(after)
}

/// Brings the taints in line with the Ready condition; what was remembered is dropped once the node is heard.
async fn taint(context: &Context, api: &Api<Node>, node: &Node, heard: bool) -> Result<(), Failure> {
    let taints = taints(node);
    let forget = heard && !taken_for_silent(node) && node.annotations().contains_key(LAST_HEARD);
    if taints.is_none() && !forget {
        return Ok(());
    }
    let mut patch = json!({"metadata": {"uid": node.uid(), "resourceVersion": node.resource_version()}});
    if let Some(taints) = taints {
        patch["spec"] = json!({"taints": taints});
    }
    if forget {
        patch["metadata"]["annotations"] = json!({LAST_HEARD: null});
    }
    let written = api.patch(&node.name_any(), &PatchParams::default(), &Patch::Merge(&patch)).await;
    if let Some(written) = ignore_not_found(written).map_err(Failure::api("taint a node"))? {
        context.nodes.wrote(written);
    }
    Ok(())
}

/// Makes the pods of a silent node that isn't at the edge not ready, so that Services leave them out.
async fn unready_pods(context: &Context, node: &str) -> Result<(), Failure> {
    for pod in context.pods.all() {
        if pod_state::node(&pod) != Some(node) || !pod_state::is_ready(&pod) {
            continue;
        }
        let patch = json!({"metadata": {"uid": pod.uid()}, "status": {"conditions": [{
            "type": "Ready",
            "status": "False",
            "reason": "NodeNotReady",
            "lastTransitionTime": super::now(),
        }]}});
        let api: Api<Pod> = Api::namespaced(context.client.clone(), &pod.namespace().unwrap_or_default());
        let written = api.patch_status(&pod.name_any(), &PatchParams::default(), &Patch::Strategic(&patch)).await;
        if let Some(written) = ignore_not_found(written).map_err(Failure::api("make a pod not ready"))? {
            context.pods.wrote(written);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn node(ready: &str, taints: Value) -> Node {
        serde_json::from_value(json!({
            "metadata": {"name": "n"}, "spec": {"taints": taints},
            "status": {"conditions": [{"type": "Ready", "status": ready, "reason": SILENT}]}
        }))
        .unwrap()
    }

    fn at(text: &str) -> Option<jiff::Timestamp> {
        Some(text.parse().unwrap())
    }

    const GRACE: Duration = Duration::from_secs(40);

    #[tokio::test(start_paused = true)]
    async fn a_node_is_silent_after_the_grace_whatever_its_clock_says() {
        let first = Heartbeat::listen(None, at("2001-01-01T00:00:00Z"), None, false, Instant::now());
        assert_eq!(first.left(GRACE, Instant::now()), Some(GRACE));
        tokio::time::advance(Duration::from_secs(30)).await;
        let same = Heartbeat::listen(Some(&first), at("2001-01-01T00:00:00Z"), None, false, Instant::now());
        assert_eq!(same.left(GRACE, Instant::now()), Some(Duration::from_secs(10)));
        let renewed = Heartbeat::listen(Some(&same), at("2001-01-01T00:00:10Z"), None, false, Instant::now());
        assert_eq!(renewed.left(GRACE, Instant::now()), Some(GRACE));
        tokio::time::advance(GRACE).await;
        assert_eq!(renewed.left(GRACE, Instant::now()), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_that_was_silent_before_a_restart_stays_so_until_it_is_heard() {
        let first = Heartbeat::listen(None, at("2026-01-01T00:00:00Z"), None, true, Instant::now());
        assert_eq!(first.left(GRACE, Instant::now()), None);
        let heard = Heartbeat::listen(Some(&first), at("2026-01-01T00:01:00Z"), None, true, Instant::now());
        assert_eq!(heard.left(GRACE, Instant::now()), Some(GRACE));
    }

    #[test]
    fn a_silent_node_is_tainted_against_new_pods_only_and_foreign_taints_stay() {
        let own = json!([{"key": "site", "value": "a", "effect": "NoExecute"}]);
        let silent = taints(&node("Unknown", own.clone())).unwrap();
        let listed: Vec<_> = silent.iter().map(|taint| (taint.key.as_str(), taint.effect.as_str())).collect();
        assert_eq!(listed, [("site", "NoExecute"), (UNREACHABLE, "NoSchedule")]);
        let back = taints(&node("True", json!(silent))).unwrap();
        assert_eq!(json!(back), own);
        assert_eq!(taints(&node("True", own)), None);
    }
}
