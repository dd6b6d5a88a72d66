//! Follows all objects of one kind, for as long as the process runs.

use std::{fmt::Debug, pin::pin, time::Duration};

use futures::StreamExt;
use kube::{
    Api, Resource,
    runtime::watcher::{self, Event},
};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;

/// Objects of one page of a list. Small, for the agent's memory.
const PAGE: u32 = 200;
/// A watch is renewed this often, in seconds; a dead connection is found soon after.
const WATCH_SECONDS: u32 = 60;
const FIRST_WAIT: Duration = Duration::from_millis(250);
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// Sends every event of a kind, slimmed, until the receiver is gone. Errors are retried with backoff; after a gap the
/// watcher lists again (`Init`, `InitApply`…, `InitDone`), and what isn't listed has been deleted.
///
/// With `may_be_absent`, a kind that the API doesn't know (a custom resource that isn't installed) counts as empty. It is
/// asked for again as soon as after an error: on a node that has just joined, its definition is on the way.
pub async fn follow<K, T>(
    api: Api<K>,
    may_be_absent: bool,
    slim: fn(&mut K),
    wrap: fn(Event<K>) -> T,
    changes: mpsc::Sender<T>,
) where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let kind = K::kind(&()).into_owned();
    let config = watcher::Config::default().page_size(PAGE).timeout(WATCH_SECONDS);
    let mut events = pin!(watcher::watcher(api, config));
    let mut wait = FIRST_WAIT;
    let mut down = false;
    loop {
        // With the receiver gone nobody waits for what comes next, and shutdown waits for this task.
        let event = tokio::select! {
            event = events.next() => event,
            () = changes.closed() => return,
        };
        let Some(event) = event else { return };
        match event {
            Ok(event) => {
                if std::mem::take(&mut down) {
                    tracing::info!(kind, "watching again");
                }
                wait = FIRST_WAIT;
                if changes.send(wrap(event.modify(slim))).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                let absent = may_be_absent && is_absent(&error);
                if !std::mem::replace(&mut down, true) {
                    if absent {
                        tracing::info!(kind, "the API doesn't know this kind yet; taken as empty");
                        for event in [Event::Init, Event::InitDone] {
                            if changes.send(wrap(event)).await.is_err() {
                                return;
                            }
                        }
                    } else {
                        tracing::warn!(kind, %error, "the API can't be watched; going on with what is known");
                    }
                } else {
                    tracing::debug!(kind, %error, "still can't be watched");
                }
                tokio::select! {
                    () = tokio::time::sleep(wait.mul_f64(rand::random_range(0.7..1.0))) => {}
                    () = changes.closed() => return,
                }
                wait = (wait * 2).min(LONGEST_WAIT);
            }
        }
    }
}

fn is_absent(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status)) => status.code == 404,
        _ => false,
    }
}
