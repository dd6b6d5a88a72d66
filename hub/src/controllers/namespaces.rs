//! Namespaces: those that must exist, their default ServiceAccount, and the emptying of one that is deleted.

use std::{sync::Arc, time::Duration};

use edgemesh_api::names::{NODE_LEASE_NAMESPACE, SYSTEM_NAMESPACE};
use futures::future::join_all;
use k8s_openapi::api::core::v1::{Namespace, ServiceAccount};
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, ListParams, PostParams, Preconditions},
    core::{DynamicObject, ObjectMeta, PartialObjectMeta},
};
use tokio::task::JoinHandle;

use super::{
    Context,
    cache::Name,
    queue::WorkQueue,
    served::Served,
    worker::{self, Failure, Next, ignore_not_found},
};

const CONTROLLER: &str = "namespaces";
const WORKERS: usize = 4;
/// Namespaces that are always there.
const BOOTSTRAP: [&str; 5] = ["default", "kube-system", "kube-public", NODE_LEASE_NAMESPACE, SYSTEM_NAMESPACE];
/// The ServiceAccount of pods that name none.
const DEFAULT_ACCOUNT: &str = "default";
/// `spec.finalizers` entry that this controller removes when the namespace is empty.
const FINALIZER: &str = "kubernetes";
/// How often a namespace is looked at again while objects in it wait for their own end.
const EMPTYING: Duration = Duration::from_millis(500);
/// Objects listed, and deletes in flight, at once.
const PAGE: u32 = 500;
const AT_ONCE: usize = 16;

pub(crate) fn start(context: &Arc<Context>, served: Served) -> Vec<JoinHandle<()>> {
    let queue: Arc<WorkQueue<Name>> = worker::queue(context, CONTROLLER);
    let target = Arc::clone(&queue);
    context.namespaces.on_change(move |old, new| {
        if let Some(namespace) = new.or(old) {
            target.add(Name::of(&**namespace));
        }
    });
    let target = Arc::clone(&queue);
    context.service_accounts.on_change(move |old, new| {
        if let (Some(account), None) = (old, new) {
            target.add(Name::new("", account.namespace().unwrap_or_default()));
        }
    });
    for name in BOOTSTRAP {
        queue.add(Name::new("", name));
    }
    let synced = {
        let context = Arc::clone(context);
        async move {
            context.namespaces.synced().await;
            context.service_accounts.synced().await;
        }
    };
    let shared = Arc::clone(context);
    let reconcile = move |name: Name| {
        let (context, served) = (Arc::clone(&shared), served.clone());
        async move { reconcile(&context, &served, &name.name).await }
    };
    vec![worker::run(context, CONTROLLER, queue, WORKERS, synced, reconcile)]
}

async fn reconcile(context: &Context, served: &Served, name: &str) -> Result<Next, Failure> {
    let api: Api<Namespace> = Api::all(context.client.clone());
    let Some(namespace) = context.namespaces.get(&Name::new("", name)) else {
        if BOOTSTRAP.contains(&name) {
            let namespace = Namespace {
                metadata: ObjectMeta { name: Some(name.to_owned()), ..Default::default() },
                ..Default::default()
            };
            match api.create(&PostParams::default(), &namespace).await {
                Ok(created) => context.namespaces.wrote(created),
                Err(error) if worker::already_exists(&error) => {}
                Err(error) => return Err(Failure::api("create a namespace")(error)),
            }
        }
        return Ok(Next::OnChange);
    };
    if namespace.metadata.deletion_timestamp.is_some() {
        return terminate(context, served, &api, &namespace).await;
    }
    if context.service_accounts.get(&Name::new(name, DEFAULT_ACCOUNT)).is_none() {
        let accounts: Api<ServiceAccount> = Api::namespaced(context.client.clone(), name);
        let account = ServiceAccount {
            metadata: ObjectMeta { name: Some(DEFAULT_ACCOUNT.to_owned()), ..Default::default() },
            ..Default::default()
        };
        match accounts.create(&PostParams::default(), &account).await {
            Ok(created) => context.service_accounts.wrote(created),
            Err(error) if worker::already_exists(&error) => {}
            Err(error) => return Err(Failure::api("create a default ServiceAccount")(error)),
        }
    }
    Ok(Next::OnChange)
}

async fn terminate(
    context: &Context,
    served: &Served,
    api: &Api<Namespace>,
    namespace: &Namespace,
) -> Result<Next, Failure> {
    let finalizers = namespace.spec.as_ref().and_then(|spec| spec.finalizers.clone()).unwrap_or_default();
    if !finalizers.iter().any(|finalizer| finalizer == FINALIZER) {
        return Ok(Next::OnChange);
    }
    let Some(served) = served.borrow().clone() else { return Ok(Next::After(EMPTYING)) };
    let name = namespace.name_any();
    let mut left = 0;
    for resource in served.iter().filter(|resource| resource.namespaced) {
        let objects: Api<PartialObjectMeta<DynamicObject>> =
            Api::namespaced_with(context.client.clone(), &name, &resource.resource);
        left += empty(&objects).await?;
    }
    if left > 0 {
        tracing::debug!(namespace = name, left, "objects are still ending");
        return Ok(Next::After(EMPTYING));
    }
    let Some(mut live) = ignore_not_found(api.get(&name).await).map_err(Failure::api("look at a namespace"))? else {
        return Ok(Next::OnChange);
    };
    if live.uid() != namespace.uid() {
        return Ok(Next::OnChange);
    }
    if let Some(finalizers) = live.spec.as_mut().and_then(|spec| spec.finalizers.as_mut()) {
        finalizers.retain(|finalizer| finalizer != FINALIZER);
    }
    let finalized = api.replace_subresource("finalize", &name, &PostParams::default(), &live).await;
    ignore_not_found(finalized).map_err(Failure::api("finalize a namespace"))?;
    tracing::info!(namespace = name, "emptied and removed");
    Ok(Next::OnChange)
}

/// Deletes the objects of one resource in the namespace; returns how many there were.
async fn empty(objects: &Api<PartialObjectMeta<DynamicObject>>) -> Result<usize, Failure> {
    let page = objects.list(&ListParams::default().limit(PAGE)).await;
    let Some(page) = ignore_not_found(page).map_err(Failure::api("list a namespace"))? else { return Ok(0) };
    for batch in page.items.chunks(AT_ONCE) {
        let deletions = batch.iter().filter(|object| object.metadata.deletion_timestamp.is_none()).map(|object| {
            let params = DeleteParams {
                preconditions: Some(Preconditions { uid: object.uid(), resource_version: None }),
                ..DeleteParams::background()
            };
            let name = object.name_any();
            async move { objects.delete(&name, &params).await }
        });
        for deleted in join_all(deletions).await {
            ignore_not_found(deleted).map_err(Failure::api("empty a namespace"))?;
        }
    }
    Ok(page.items.len())
}
