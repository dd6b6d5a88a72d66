//! Removes pods that nobody else will: bound to a Node that doesn't exist, or deleted before they were bound.

use std::{collections::HashMap, sync::Arc, time::Duration};

use k8s_openapi::api::core::v1::{Node, Pod};
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, Preconditions},
};
use parking_lot::Mutex;
use tokio::{task::JoinHandle, time::Instant};

use super::{
    Context,
    cache::Name,
    pod_state,
    queue::WorkQueue,
    worker::{self, Failure, Next, ignore_not_found},
};

const CONTROLLER: &str = "pod-gc";

pub(crate) fn start(context: &Arc<Context>) -> Vec<JoinHandle<()>> {
    let queue: Arc<WorkQueue<Name>> = worker::queue(context, CONTROLLER);
    let (target, nodes) = (Arc::clone(&queue), Arc::clone(&context.nodes));
    context.pods.on_change(move |_, new| {
        let Some(pod) = new else { return };
        let orphaned = pod_state::node(pod).is_some_and(|node| nodes.get(&Name::new("", node)).is_none());
        if orphaned || (pod_state::node(pod).is_none() && pod_state::is_terminating(pod)) {
            target.add(Name::of(&**pod));
        }
    });
    let (target, pods) = (Arc::clone(&queue), Arc::clone(&context.pods));
    context.nodes.on_change(move |old, new| {
        let (Some(old), None) = (old, new) else { return };
        let node = old.name_any();
        for pod in pods.all().iter().filter(|pod| pod_state::node(pod) == Some(&node)) {
            target.add(Name::of(&**pod));
        }
    });
    let synced = {
        let context = Arc::clone(context);
        async move {
            context.pods.synced().await;
            context.nodes.synced().await;
        }
    };
    let shared = Arc::clone(context);
    let missing: Arc<Mutex<HashMap<String, Instant>>> = Arc::default();
    let reconcile = move |name: Name| {
        let (context, missing) = (Arc::clone(&shared), Arc::clone(&missing));
        async move { reconcile(&context, &missing, &name).await }
    };
    vec![worker::run(context, CONTROLLER, queue, 2, synced, reconcile)]
}

/// `missing`: since when a node isn't there.
async fn reconcile(context: &Context, missing: &Mutex<HashMap<String, Instant>>, name: &Name) -> Result<Next, Failure> {
    let Some(pod) = context.pods.get(name) else { return Ok(Next::OnChange) };
    let Some(node) = pod_state::node(&pod) else {
        if pod_state::is_terminating(&pod) {
            delete(context, &pod).await?;
        }
        return Ok(Next::OnChange);
    };
    if context.nodes.get(&Name::new("", node)).is_some() {
        missing.lock().remove(node);
        return Ok(Next::OnChange);
    }
    let waited = missing.lock().entry(node.to_owned()).or_insert_with(Instant::now).elapsed();
    let left = context.config.orphan_grace.saturating_sub(waited);
    if !left.is_zero() {
        return Ok(Next::After(left.max(Duration::from_millis(10))));
    }
    let nodes: Api<Node> = Api::all(context.client.clone());
    let live = ignore_not_found(nodes.get(node).await).map_err(Failure::api("look whether a node is gone"))?;
    if live.is_some() {
        missing.lock().remove(node);
        return Ok(Next::OnChange);
    }
    tracing::info!(pod = %name, node, "removing the pod of a node that is gone");
    delete(context, &pod).await?;
    // Nodes that are long gone and have no pods any more needn't be remembered.
    let pods = context.pods.all();
    missing.lock().retain(|node, _| pods.iter().any(|pod| pod_state::node(pod) == Some(node)));
    Ok(Next::OnChange)
}

async fn delete(context: &Context, pod: &Pod) -> Result<(), Failure> {
    let api: Api<Pod> = Api::namespaced(context.client.clone(), &pod.namespace().unwrap_or_default());
    let preconditions = Some(Preconditions { uid: pod.uid(), resource_version: None });
    let params = DeleteParams { grace_period_seconds: Some(0), preconditions, ..Default::default() };
    let deleted = ignore_not_found(api.delete(&pod.name_any(), &params).await);
    match deleted.map_err(Failure::api("remove a pod"))? {
        Some(_) => context.pods.deleted(pod),
        None => context.pods.gone(pod),
    }
    Ok(())
}
