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
    worker::{Desired, Shared, Worker},
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
            let alive: Vec<(&str, &str)> = actual
                .runs
                .iter()
                .flat_map(|(name, runs)| runs.iter().map(move |run| (name.as_str(), run)))
                .filter(|(_, run)| matches!(run.state, RunState::Running | RunState::Unknown))
                .map(|(name, run)| (name, run.id.as_str()))
                .collect();
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
            let runtime = &self.shared.runtime;
            let stops = join_all(alive.iter().map(|(_, id)| runtime.stop_container(id, left)));
            let mut watcher = self.desired.clone();
            let shorter = watcher.wait_for(|new| grace(new) < grace(&desired));
            let renewed = tokio::select! {
                stopped = stops => {
                    for result in stopped {
                        result?;
                    }
                    None
                }
                new = shorter => new.ok().map(|new| new.clone()),
            };
            if let Some(new) = renewed {
                desired = new;
            }
        }
    }
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
    let stops = containers.iter().map(|container| runtime.stop_container(&container.id, grace));
    for result in join_all(stops).await {
        result?;
    }
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
