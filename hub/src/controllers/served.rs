//! Which resources the API serves, kept current: custom resources come and go.

use std::{sync::Arc, time::Duration};

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::{
    Api, Client,
    core::discovery::{ApiResource, Scope},
    discovery::Discovery,
};
use tokio::{
    sync::{Notify, watch},
    task::JoinHandle,
};

use super::{Context, cache::Cache};

/// How often the list is read again without a change of a CustomResourceDefinition, and after a failure.
const REFRESH: Duration = Duration::from_secs(60);
const RETRY: Duration = Duration::from_secs(1);
const DEADLINE: Duration = Duration::from_secs(30);

/// One resource that can be listed, watched and deleted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ServedResource {
    pub(crate) resource: ApiResource,
    pub(crate) namespaced: bool,
}

/// The current list; `None` before the first answer.
pub(crate) type Served = watch::Receiver<Option<Arc<Vec<ServedResource>>>>;

/// Keeps the list current.
pub(crate) fn watch(context: &Arc<Context>, tasks: &mut Vec<JoinHandle<()>>) -> Served {
    let (sender, receiver) = watch::channel(None);
    let changed = Arc::new(Notify::new());
    let definitions = Cache::<CustomResourceDefinition>::new("customresourcedefinitions");
    let notify = Arc::clone(&changed);
    definitions.on_change(move |_, _| notify.notify_one());
    tasks.push(definitions.fill(Api::all(context.client.clone()), &context.shutdown));
    let client = context.client.clone();
    let stopping = context.shutdown.stopping().clone();
    tasks.push(context.shutdown.spawn(async move {
        // Held here, as the cache's watch must live as long as this.
        let _definitions = definitions;
        loop {
            let read = tokio::time::timeout(DEADLINE, discover(client.clone()));
            let wait = tokio::select! {
                () = stopping.cancelled() => return,
                read = read => match read {
                    Ok(Ok(list)) => {
                        sender.send_if_modified(|known: &mut Option<Arc<Vec<ServedResource>>>| {
                            let new = known.as_ref().is_none_or(|known| **known != list);
                            if new {
                                *known = Some(Arc::new(list));
                            }
                            new
                        });
                        REFRESH
                    }
                    Ok(Err(error)) => {
                        tracing::warn!(%error, "discovery failed; trying again");
                        RETRY
                    }
                    Err(_) => RETRY,
                },
            };
            tokio::select! {
                () = stopping.cancelled() => return,
                () = tokio::time::sleep(wait) => {}
                () = changed.notified() => {
                    // A definition is served a moment after it is stored; the next refresh sees what this one misses.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }));
    receiver
}

async fn discover(client: Client) -> Result<Vec<ServedResource>, kube::Error> {
    let discovery = Discovery::new(client).run().await?;
    let mut list = Vec::new();
    for group in discovery.groups() {
        for (resource, capabilities) in group.recommended_resources() {
            if ["list", "watch", "delete"].iter().all(|verb| capabilities.supports_operation(verb)) {
                list.push(ServedResource { resource, namespaced: capabilities.scope == Scope::Namespaced });
            }
        }
    }
    list.sort_by(|a, b| (&a.resource.group, &a.resource.plural).cmp(&(&b.resource.group, &b.resource.plural)));
    Ok(list)
}
