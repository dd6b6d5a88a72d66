//! The scheduler: binds pods to nodes, and tells why where it can't. Decisions are made one at a time, bindings written together.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use k8s_openapi::{
    api::core::v1::{Binding, Node, ObjectReference, Pod},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{
    Api, ResourceExt,
    api::{Patch, PatchParams, PostParams},
};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use super::{
    Context,
    cache::Name,
    fit::NodeView,
    node_lifecycle, placement, pod_state,
    queue::WorkQueue,
    worker::{self, Failure, Next},
};

const CONTROLLER: &str = "scheduler";
/// Bindings that are written at once.
const WORKERS: usize = 16;
/// `spec.schedulerName` of the pods that it binds.
const SCHEDULER_NAME: &str = "default-scheduler";
/// A pod that fits nowhere is tried again at every change that can help, and after this time in any case.
const RETRY: Duration = Duration::from_secs(30);

/// Bindings of this process that the cache doesn't show yet: pod uid to node.
type Assumed = Mutex<HashMap<String, String>>;

pub(crate) fn start(context: &Arc<Context>) -> Vec<JoinHandle<()>> {
    let queue: Arc<WorkQueue<Name>> = worker::queue(context, CONTROLLER);
    let assumed: Arc<Assumed> = Arc::default();
    let (target, pods, bound) = (Arc::clone(&queue), Arc::clone(&context.pods), Arc::clone(&assumed));
    context.pods.on_change(move |old, new| {
        let took_place = |pod: &Arc<Pod>| pod_state::node(pod).is_some() && !pod_state::is_terminal(pod);
        if let Some(pod) = new.filter(|pod| waits(pod)) {
            target.add(Name::of(&**pod));
        } else if let Some(pod) = new.or(old) {
            bound.lock().remove(&pod.uid().unwrap_or_default());
        }
        // A place became free.
        if old.is_some_and(took_place) && !new.is_some_and(took_place) {
            for pod in pods.all().iter().filter(|pod| waits(pod)) {
                target.add(Name::of(&**pod));
            }
        }
    });
    let (target, pods) = (Arc::clone(&queue), Arc::clone(&context.pods));
    context.nodes.on_change(move |old, new| {
        let Some(new) = new else { return };
        if old.is_none_or(|old| offers_other_places(old, new)) {
            for pod in pods.all().iter().filter(|pod| waits(pod)) {
                target.add(Name::of(&**pod));
            }
        }
    });
    let synced = {
        let context = Arc::clone(context);
        async move {
            context.pods.synced().await;
            context.nodes.synced().await;
            context.namespaces.synced().await;
        }
    };
    let shared = Arc::clone(context);
    let reconcile = move |name: Name| {
        let (context, assumed) = (Arc::clone(&shared), Arc::clone(&assumed));
        async move { reconcile(&context, &assumed, &name).await }
    };
    vec![worker::run(context, CONTROLLER, queue, WORKERS, synced, reconcile)]
}

/// The pod needs a node, from this scheduler.
fn waits(pod: &Pod) -> bool {
    let Some(spec) = &pod.spec else { return false };
    pod_state::node(pod).is_none()
        && pod_state::is_active(pod)
        && spec.scheduler_name.as_deref().unwrap_or(SCHEDULER_NAME) == SCHEDULER_NAME
        && spec.scheduling_gates.as_ref().is_none_or(Vec::is_empty)
}

/// Something changed that decides which pods fit; heartbeats don't.
fn offers_other_places(old: &Node, new: &Node) -> bool {
    let spec =
        |node: &Node| node.spec.as_ref().map(|spec| (spec.taints.clone(), spec.unschedulable)).unwrap_or_default();
    let allocatable = |node: &Node| node.status.as_ref().and_then(|status| status.allocatable.clone());
    old.labels() != new.labels()
        || spec(old) != spec(new)
        || allocatable(old) != allocatable(new)
        || node_lifecycle::is_ready(old) != node_lifecycle::is_ready(new)
}

async fn reconcile(context: &Context, assumed: &Assumed, name: &Name) -> Result<Next, Failure> {
    let Some(pod) = context.pods.get(name).filter(|pod| waits(pod)) else { return Ok(Next::OnChange) };
    let uid = pod.uid().unwrap_or_default();
    let namespaces = context.namespaces.all();
    let namespaces = namespaces.iter().map(|one| (one.name_any(), one.labels().clone())).collect();
    let decision = {
        // Held from the look to the note of the decision: each sees those before it.
        let mut assumed = assumed.lock();
        if assumed.contains_key(&uid) {
            return Ok(Next::OnChange);
        }
        let views = views(context, &assumed);
        let decision = placement::choose(&pod, &views, &namespaces).map(|at| views[at].node.name_any());
        if let Ok(node) = &decision {
            assumed.insert(uid, node.clone());
        }
        decision
    };
    let api: Api<Pod> = Api::namespaced(context.client.clone(), &name.namespace);
    match decision {
        Ok(node) => {
            bind(context, assumed, &api, &pod, &node).await?;
            Ok(Next::OnChange)
        }
        Err(message) => {
            context.recorder.warning(SCHEDULER_NAME, &*pod, "FailedScheduling", message.clone());
            note_unschedulable(context, &api, &pod, &message).await?;
            Ok(Next::After(RETRY))
        }
    }
}

/// All nodes with the pods on them, those bound a moment ago included.
fn views(context: &Context, assumed: &HashMap<String, String>) -> Vec<NodeView> {
    let mut views: BTreeMap<String, NodeView> =
        context.nodes.all().into_iter().map(|node| (node.name_any(), NodeView::new(node))).collect();
    for pod in context.pods.all() {
        if pod_state::is_terminal(&pod) {
            continue;
        }
        let node = pod_state::node(&pod);
        let node = node.or_else(|| assumed.get(pod.metadata.uid.as_ref()?).map(String::as_str)).map(str::to_owned);
        if let Some(view) = node.and_then(|node| views.get_mut(&node)) {
            view.add(pod);
        }
    }
    views.into_values().collect()
}

async fn bind(context: &Context, assumed: &Assumed, api: &Api<Pod>, pod: &Pod, node: &str) -> Result<(), Failure> {
    let uid = pod.uid().unwrap_or_default();
    let binding = Binding {
        metadata: ObjectMeta {
            name: pod.metadata.name.clone(),
            namespace: pod.metadata.namespace.clone(),
            uid: Some(uid.clone()),
            ..Default::default()
        },
        target: ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Node".to_owned()),
            name: Some(node.to_owned()),
            ..Default::default()
        },
    };
    let bound: Result<Value, _> =
        api.create_subresource("binding", &pod.name_any(), &PostParams::default(), &binding).await;
    match bound {
        Ok(_) => {
            // The watch may have been faster than the answer, or the pod may be gone: then nothing is assumed.
            let known = context.pods.get(&Name::of(pod));
            if known.is_none_or(|known| !waits(&known) || known.uid().as_ref() != Some(&uid)) {
                assumed.lock().remove(&uid);
            }
            let name = Name::of(pod);
            let message = format!("Successfully assigned {name} to {node}");
            context.recorder.normal(SCHEDULER_NAME, pod, "Scheduled", message);
            tracing::debug!(pod = %name, node, "bound");
            Ok(())
        }
        Err(error) => {
            assumed.lock().remove(&uid);
            if worker::is_not_found(&error) {
                context.pods.gone(pod);
                return Ok(());
            }
            Err(Failure::api("bind a pod")(error))
        }
    }
}

async fn note_unschedulable(context: &Context, api: &Api<Pod>, pod: &Pod, message: &str) -> Result<(), Failure> {
    let before = pod_state::condition(pod, "PodScheduled");
    let told = before.is_some_and(|before| {
        before.status == "False"
            && before.reason.as_deref() == Some("Unschedulable")
            && before.message.as_deref() == Some(message)
    });
    if told {
        return Ok(());
    }
    let since = before.filter(|before| before.status == "False").and_then(|before| before.last_transition_time.clone());
    let patch = json!({"metadata": {"uid": pod.uid()}, "status": {"conditions": [{
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": message,
        "lastTransitionTime": since.unwrap_or_else(super::now),
    }]}});
    let written = api.patch_status(&pod.name_any(), &PatchParams::default(), &Patch::Strategic(&patch)).await;
    let written = worker::ignore_not_found(written).map_err(Failure::api("say why a pod isn't bound"))?;
    if let Some(written) = written {
        context.pods.wrote(written);
    }
    Ok(())
}
