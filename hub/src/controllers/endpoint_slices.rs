//! EndpointSlices for Services with a selector, from their pods.

use std::{collections::BTreeMap, sync::Arc};

use k8s_openapi::api::{
    core::v1::{Node, Pod, Service},
    discovery::v1::EndpointSlice,
};
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, PostParams, Preconditions},
};
use tokio::task::JoinHandle;

use super::{
    Context,
    cache::Name,
    queue::WorkQueue,
    slice_plan::{self, MANAGED_BY, MANAGER, SERVICE_NAME},
    worker::{self, Failure, Next, ignore_not_found},
};

const CONTROLLER: &str = "endpoint-slices";
/// Services that are worked on at once.
const WORKERS: usize = 8;
/// Label of a node's zone.
const ZONE: &str = "topology.kubernetes.io/zone";

pub(crate) fn start(context: &Arc<Context>) -> Vec<JoinHandle<()>> {
    let queue: Arc<WorkQueue<Name>> = worker::queue(context, CONTROLLER);
    let target = Arc::clone(&queue);
    context.services.on_change(move |old, new| {
        if let Some(service) = new.or(old) {
            target.add(Name::of(&**service));
        }
    });
    let target = Arc::clone(&queue);
    context.slices.on_change(move |old, new| {
        if let Some(slice) = new.or(old)
            && let Some(service) = slice.labels().get(SERVICE_NAME)
            && slice.labels().get(MANAGED_BY).is_some_and(|manager| manager == MANAGER)
        {
            target.add(Name::new(slice.namespace().unwrap_or_default(), service));
        }
    });
    let (target, services) = (Arc::clone(&queue), Arc::clone(&context.services));
    context.pods.on_change(move |old, new| {
        let Some(pod) = new.or(old) else { return };
        if old.zip(new).is_some_and(|(old, new)| same_for_services(old, new)) {
            return;
        }
        let labels: Vec<&BTreeMap<String, String>> = old.into_iter().chain(new).map(|pod| pod.labels()).collect();
        for service in services.in_namespace(&pod.namespace().unwrap_or_default()) {
            if labels.iter().any(|labels| slice_plan::selects(&service, labels)) {
                target.add(Name::of(&*service));
            }
        }
    });
    let (target, services) = (Arc::clone(&queue), Arc::clone(&context.services));
    context.nodes.on_change(move |old, new| {
        if old.and_then(|node| zone(node)) != new.and_then(|node| zone(node)) {
            for service in services.all() {
                target.add(Name::of(&*service));
            }
        }
    });
    let synced = {
        let context = Arc::clone(context);
        async move {
            context.services.synced().await;
            context.slices.synced().await;
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

/// Nothing that an endpoint is made of changed.
fn same_for_services(old: &Pod, new: &Pod) -> bool {
    old.uid() == new.uid()
        && old.labels() == new.labels()
        && old.metadata.deletion_timestamp.is_some() == new.metadata.deletion_timestamp.is_some()
        && old.spec.as_ref().map(|spec| &spec.node_name) == new.spec.as_ref().map(|spec| &spec.node_name)
        && super::pod_state::is_ready(old) == super::pod_state::is_ready(new)
        && super::pod_state::is_terminal(old) == super::pod_state::is_terminal(new)
        && old.status.as_ref().map(|status| (&status.pod_ip, &status.pod_ips))
            == new.status.as_ref().map(|status| (&status.pod_ip, &status.pod_ips))
}

fn zone(node: &Node) -> Option<String> {
    node.labels().get(ZONE).cloned()
}

async fn reconcile(context: &Context, name: &Name) -> Result<Next, Failure> {
    let api: Api<EndpointSlice> = Api::namespaced(context.client.clone(), &name.namespace);
    let mut existing = context.slices.in_namespace(&name.namespace);
    existing.retain(|slice| {
        slice.labels().get(SERVICE_NAME) == Some(&name.name)
            && slice.labels().get(MANAGED_BY).is_some_and(|manager| manager == MANAGER)
            && slice.metadata.deletion_timestamp.is_none()
    });
    let service = context.services.get(name).filter(|service| service.metadata.deletion_timestamp.is_none());
    let Some(service) = service else {
        return delete(context, &api, existing.iter().map(|slice| &**slice)).await;
    };
    if service.spec.as_ref().is_some_and(|spec| spec.type_.as_deref() == Some("ExternalName")) {
        return delete(context, &api, existing.iter().map(|slice| &**slice)).await;
    }
    if !slice_plan::selects_pods(&service) {
        // The Service's owner writes its slices by hand now.
        return Ok(Next::OnChange);
    }
    // Slices of an earlier Service of the same name are not this one's.
    let (own, foreign): (Vec<_>, Vec<_>) = existing.into_iter().partition(|slice| owned(slice, &service));
    delete(context, &api, foreign.iter().map(|slice| &**slice)).await?;

    let mut pods = context.pods.in_namespace(&name.namespace);
    pods.retain(|pod| slice_plan::selects(&service, pod.labels()));
    let zone = |node: &str| context.nodes.get(&Name::new("", node)).and_then(|node| zone(&node));
    let plan = slice_plan::plan(&service, &own, slice_plan::groups(&service, &pods, zone));
    for slice in &plan.create {
        let created =
            api.create(&PostParams::default(), slice).await.map_err(Failure::api("create an EndpointSlice"))?;
        context.slices.wrote(created);
    }
    for slice in &plan.update {
        match api.replace(&slice.name_any(), &PostParams::default(), slice).await {
            Ok(updated) => context.slices.wrote(updated),
            Err(error) if worker::is_not_found(&error) => {
                context.slices.gone(slice);
                return Err(Failure::Conflict);
            }
            Err(error) => return Err(Failure::api("update an EndpointSlice")(error)),
        }
    }
    delete(context, &api, plan.delete.iter()).await
}

fn owned(slice: &EndpointSlice, service: &Service) -> bool {
    service.uid().is_some_and(|uid| slice.owner_references().iter().any(|owner| owner.uid == uid))
}

async fn delete(
    context: &Context,
    api: &Api<EndpointSlice>,
    slices: impl Iterator<Item = &EndpointSlice>,
) -> Result<Next, Failure> {
    for slice in slices {
        let preconditions = Some(Preconditions { uid: slice.uid(), resource_version: None });
        let params = DeleteParams { preconditions, ..Default::default() };
        ignore_not_found(api.delete(&slice.name_any(), &params).await)
            .map_err(Failure::api("delete an EndpointSlice"))?;
        context.slices.gone(slice);
    }
    Ok(Next::OnChange)
}
