//! How a pod ends: its containers get their grace period, then everything of it is removed from the node.

use std::time::{Duration, Instant};

use futures::future::join_all;
use k8s_openapi::api::core::v1::Pod;

use super::{
    actual::{Actual, RunState},
    cgroup,
    folders::PodFolder,
    relist::Seen,
    sandbox::spec_grace_seconds,
    volumes,
    worker::{Desired, Shared, Worker, until},
};
use crate::runtime::{LABEL_POD_UID, Runtime, RuntimeError};

/// Time for a pod that was removed by force, as a kubelet gives it.
const FORCED_GRACE: Duration = Duration::from_secs(2);
/// Longest grace of containers that nobody knows any more.
const MAX_ORPHAN_GRACE: Duration = Duration::from_secs(30);

/// Why a pod is still there.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EndError {
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    #[error(transparent)]
    Volumes(#[from] volumes::VolumeError),
    #[error("the cgroup: {0}")]
    Cgroup(std::io::Error),
    #[error("the store: {0}")]
    Store(String),
}

/// How long the containers may take.
fn grace(desired: &Desired) -> Duration {
    match desired {
        Desired::Gone(pod) => grace_of_spec(pod).min(FORCED_GRACE),
        Desired::Present(pod) => match pod.metadata.deletion_grace_period_seconds {
            Some(seconds) => Duration::from_secs(u64::try_from(seconds).unwrap_or(0)),
            None => grace_of_spec(pod),
        },
    }
}

fn grace_of_spec(pod: &Pod) -> Duration {
    Duration::from_secs(spec_grace_seconds(pod).unsigned_abs())
}

impl Worker {
    /// Ends the pod and removes all of it; the last step is its object. May be called again after an error.
    pub(super) async fn end(&mut self, desired: &Desired) -> Result<(), EndError> {
        let pod = desired.pod();
        self.stop_containers(desired).await?;
        let actual = self.reader.read(&self.shared.runtime, &self.identity.uid).await?;
        self.waiting.clear();
        if matches!(desired, Desired::Present(_)) {
            // The last status says how the containers ended.
            self.report(pod, &actual).await;
        }
        remove_sandboxes(&self.shared.runtime, &actual).await?;
        clean_up(&self.shared, &self.identity.uid).await?;
        if matches!(*self.desired.borrow(), Desired::Present(_)) {
            self.shared.api.confirm_deletion(&self.identity).await.map_err(|e| EndError::Store(e.to_string()))?;
        }
        tracing::info!(pod = %self.name(), uid = self.identity.uid, "the pod is gone");
        Ok(())
    }

    /// Stops all containers at once. When the grace period gets shorter meanwhile (a forced deletion), that counts.
    async fn stop_containers(&mut self, desired: &Desired) -> Result<(), EndError> {
        let begun = Instant::now();
        let mut desired = desired.clone();
        let mut told = false;
        loop {
            let actual = self.reader.read(&self.shared.runtime, &self.identity.uid).await?;
            let mut alive: Vec<(String, String)> = Vec::new();
            for (name, runs) in &actual.runs {
                let running = runs.iter().filter(|run| matches!(run.state, RunState::Running | RunState::Unknown));
                alive.extend(running.map(|run| (name.clone(), run.id.clone())));
            }
            if alive.is_empty() {
                return Ok(());
            }
            if !told {
                for (name, _) in &alive {
                    self.event(Some(name), false, "Killing", format!("Stopping container {name}"));
                }
                told = true;
            }
            let left = grace(&desired).saturating_sub(begun.elapsed());
            let stops = stop_all(&self.shared.runtime, alive.into_iter().map(|(_, id)| id), left);
            let mut watcher = self.desired.clone();
            let allowed = grace(&desired);
            tokio::select! {
                stopped = stops => stopped?,
                () = until(&mut watcher, move |new: &Desired| grace(new) < allowed) => {
                    desired = watcher.borrow().clone();
                }
            }
        }
    }
}

/// Stops containers at the same time, each with the same grace period.
async fn stop_all(runtime: &Runtime, ids: impl Iterator<Item = String>, grace: Duration) -> Result<(), RuntimeError> {
    let stops: Vec<_> = ids
        .map(|id| {
            let runtime = runtime.clone();
            async move { runtime.stop_container(&id, grace).await }
        })
        .collect();
    join_all(stops).await.into_iter().collect()
}

async fn remove_sandboxes(runtime: &Runtime, actual: &Actual) -> Result<(), RuntimeError> {
    for sandbox in &actual.sandboxes {
        runtime.stop_sandbox(&sandbox.id).await?;
        runtime.remove_sandbox(&sandbox.id).await?;
    }
    Ok(())
}

/// Removes a pod's cgroup, volumes and logs.
async fn clean_up(shared: &Shared, uid: &str) -> Result<(), EndError> {
    let folder = PodFolder::new(&shared.config.pods_dir, uid);
    let (root, uid) = (shared.config.cgroup_root.clone(), uid.to_owned());
    let done = tokio::task::spawn_blocking(move || {
        // Processes leave their cgroup a moment after their end: a few tries.
        let mut tries = 0;
        while let Err(error) = cgroup::remove(&root, &uid) {
            tries += 1;
            if tries > 20 {
                return Err(EndError::Cgroup(error));
            }
            std::thread::sleep(Duration::from_millis(25));
        }
        volumes::remove_all(&folder).map_err(EndError::from)
    });
    done.await.map_err(|error| EndError::Store(error.to_string()))?
}

/// Removes a pod that the runtime has and nobody knows.
pub(crate) async fn end_orphan(shared: &Shared, seen: &Seen) -> Result<(), EndError> {
    let uid = &seen.identity.uid;
    let runtime = &shared.runtime;
    let grace = seen.grace.min(MAX_ORPHAN_GRACE);
    let containers = runtime.containers(Some(uid)).await?;
    stop_all(runtime, containers.into_iter().map(|container| container.id), grace).await?;
    for sandbox in runtime.sandboxes(Some(uid)).await? {
        runtime.stop_sandbox(&sandbox.id).await?;
        runtime.remove_sandbox(&sandbox.id).await?;
    }
    // The folder is found by the uid that the sandbox carries, which must be a plain name.
    if super::folders::is_plain_name(uid) {
        clean_up(shared, uid).await?;
    }
    tracing::info!(
        pod = %format!("{}/{}", seen.identity.namespace, seen.identity.name),
        label = LABEL_POD_UID,
        uid,
        "removed a pod that the node should not have"
    );
    Ok(())
}

/// Removes a folder that was left by a pod which neither the store nor the runtime knows.
pub(crate) async fn end_leftover(shared: &Shared, uid: &str) -> Result<(), EndError> {
    clean_up(shared, uid).await
}
