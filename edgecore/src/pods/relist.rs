//! Asks the runtime once a second what it has: containers that ended by themselves, sandboxes that nobody knows, and its own state.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use edgemesh_telemetry::drain::Shutdown;
use tokio::sync::{mpsc, watch};

use super::{
    NodeConditions,
    sandbox::{ANNOTATION_GRACE, DEFAULT_GRACE_SECONDS, PodIdentity},
};
use crate::runtime::{LABEL_POD_NAME, LABEL_POD_NAMESPACE, LABEL_POD_UID, Runtime, RuntimeCondition, RuntimeError};

/// Containerd 1.6 has no event stream in its CRI, so it is asked. Two list calls cost it about a millisecond.
const INTERVAL: Duration = Duration::from_secs(1);
/// The runtime's own state is asked for every so many times, while it's good.
const STATUS_EVERY: u32 = 5;

/// A pod that the runtime has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) identity: PodIdentity,
    pub(crate) grace: Duration,
}

/// What the runtime has.
#[derive(Debug)]
pub(crate) struct Relist {
    /// Pods of which something changed since the last time, by uid.
    pub(crate) changed: BTreeSet<String>,
    /// All pods, by uid.
    pub(crate) seen: BTreeMap<String, Seen>,
}

/// Starts the task that asks.
pub(crate) fn start(
    runtime: Runtime,
    shutdown: &Shutdown,
) -> (mpsc::Receiver<Relist>, watch::Receiver<NodeConditions>) {
    // A reader that is late gets one relist later; the state in it is then read anew by the workers anyway.
    let (relists, receiver) = mpsc::channel(1);
    let (conditions, conditions_receiver) = watch::channel(NodeConditions::default());
    let stopping = shutdown.stopping().clone();
    shutdown.spawn(async move {
        tokio::select! {
            () = run(runtime, relists, conditions) => {}
            () = stopping.cancelled() => {}
        }
    });
    (receiver, conditions_receiver)
}

async fn run(runtime: Runtime, relists: mpsc::Sender<Relist>, conditions: watch::Sender<NodeConditions>) {
    let mut before: BTreeMap<String, Fingerprint> = BTreeMap::new();
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut round: u32 = 0;
    loop {
        ticks.tick().await;
        if round.is_multiple_of(STATUS_EVERY) || !conditions.borrow().ready() {
            update_conditions(&runtime, &conditions).await;
        }
        round = round.wrapping_add(1);
        let (now, seen) = match list(&runtime).await {
            Ok(listed) => listed,
            Err(error) => {
                tracing::debug!(%error, "the runtime could not be listed");
                continue;
            }
        };
        let changed = changed(&before, &now);
        before = now;
        if relists.send(Relist { changed, seen }).await.is_err() {
            return;
        }
    }
}

async fn update_conditions(runtime: &Runtime, conditions: &watch::Sender<NodeConditions>) {
    let mut found = NodeConditions { version: conditions.borrow().version.clone(), ..NodeConditions::default() };
    match runtime.status().await {
        Ok(status) => {
            found.runtime = status.runtime;
            found.network = status.network;
            // Asked for again after an outage: it may have been an upgrade.
            if found.version.is_none() || !conditions.borrow().runtime.ready {
                found.version = runtime.version().await.ok().or(found.version);
            }
        }
        Err(error) => {
            let down = RuntimeCondition {
                ready: false,
                reason: "RuntimeNotReachable".to_owned(),
                message: format!("{}: {error}", runtime.socket().display()),
            };
            found.network = down.clone();
            found.runtime = down;
        }
    }
    conditions.send_if_modified(|present| {
        let changed = *present != found;
        if changed {
            tracing::info!(
                runtime = found.runtime.ready,
                network = found.network.ready,
                reason = found.network.message,
                "the runtime's state changed"
            );
            *present = found;
        }
        changed
    });
}

/// The ids and states of all that belongs to one pod.
type Fingerprint = BTreeSet<(String, i32)>;

async fn list(runtime: &Runtime) -> Result<(BTreeMap<String, Fingerprint>, BTreeMap<String, Seen>), RuntimeError> {
    let mut prints: BTreeMap<String, Fingerprint> = BTreeMap::new();
    let mut seen = BTreeMap::new();
    for sandbox in runtime.sandboxes(None).await? {
        let label = |name: &str| sandbox.labels.get(name).cloned().unwrap_or_default();
        let uid = label(LABEL_POD_UID);
        if uid.is_empty() {
            // Not made by a node agent.
            continue;
        }
        let grace = sandbox.annotations.get(ANNOTATION_GRACE).and_then(|text| text.parse().ok());
        let grace = Duration::from_secs(grace.unwrap_or(DEFAULT_GRACE_SECONDS.unsigned_abs()));
        let identity =
            PodIdentity { namespace: label(LABEL_POD_NAMESPACE), name: label(LABEL_POD_NAME), uid: uid.clone() };
        seen.insert(uid.clone(), Seen { identity, grace });
        prints.entry(uid).or_default().insert((sandbox.id, sandbox.state));
    }
    for container in runtime.containers(None).await? {
        if let Some(uid) = container.labels.get(LABEL_POD_UID) {
            prints.entry(uid.clone()).or_default().insert((container.id, container.state));
        }
    }
    Ok((prints, seen))
}

fn changed(before: &BTreeMap<String, Fingerprint>, now: &BTreeMap<String, Fingerprint>) -> BTreeSet<String> {
    let different = now.iter().filter(|(uid, print)| before.get(*uid) != Some(print)).map(|(uid, _)| uid);
    let gone = before.keys().filter(|uid| !now.contains_key(*uid));
    different.chain(gone).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_changed_and_vanished_pods_are_reported() {
        let print = |state| Fingerprint::from([("c".to_owned(), state)]);
        let listed = |pods: &[(&str, i32)]| pods.iter().map(|(uid, s)| ((*uid).to_owned(), print(*s))).collect();
        let before = listed(&[("same", 1), ("changed", 1), ("gone", 1)]);
        let now = listed(&[("same", 1), ("changed", 2), ("new", 0)]);
        let names: Vec<_> = changed(&before, &now).into_iter().collect();
        assert_eq!(names, ["changed", "gone", "new"]);
    }
}
