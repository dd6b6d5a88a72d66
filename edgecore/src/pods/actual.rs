//! A pod as the runtime has it: its sandboxes and the runs of its containers.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_cri::v1;

use super::container::ANNOTATION_HASH;
use crate::runtime::{LABEL_CONTAINER_NAME, Runtime, RuntimeError};

/// One sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sandbox {
    pub(crate) id: String,
    pub(crate) attempt: u32,
    pub(crate) ready: bool,
    pub(crate) created_at: i64,
}

/// Where a run of a container is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RunState {
    /// Made, never started.
    Created,
    /// Its process runs.
    Running,
    /// Its process ended.
    Exited,
    /// The runtime lost track of it.
    Unknown,
}

/// One run of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) id: String,
    pub(crate) sandbox: String,
    pub(crate) attempt: u32,
    pub(crate) state: RunState,
    /// Nanoseconds since 1970; 0: not yet.
    pub(crate) created_at: i64,
    pub(crate) started_at: i64,
    pub(crate) finished_at: i64,
    pub(crate) exit_code: i32,
    pub(crate) reason: String,
    pub(crate) message: String,
    /// The image as the runtime names it.
    pub(crate) image: String,
    /// The image's digest.
    pub(crate) image_ref: String,
    /// What it was made from.
    pub(crate) hash: String,
}

impl Run {
    /// Whether its process ended, or is lost.
    pub(crate) fn ended(&self) -> bool {
        matches!(self.state, RunState::Exited | RunState::Unknown)
    }

    /// How long it ran, in nanoseconds.
    pub(crate) fn ran_for(&self) -> std::time::Duration {
        let begun = if self.started_at > 0 { self.started_at } else { self.finished_at };
        std::time::Duration::from_nanos(u64::try_from(self.finished_at.saturating_sub(begun)).unwrap_or(0))
    }
}

/// Whole seconds since 1970, as Kubernetes writes times; `None` for "not yet".
pub(crate) fn timestamp(nanoseconds: i64) -> Option<Timestamp> {
    (nanoseconds > 0).then(|| Timestamp::from_second(nanoseconds / 1_000_000_000).ok()).flatten()
}

/// All that the runtime has of a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Actual {
    /// The newest first.
    pub(crate) sandboxes: Vec<Sandbox>,
    /// By container name, the newest first.
    pub(crate) runs: BTreeMap<String, Vec<Run>>,
}

impl Actual {
    /// The newest sandbox, if it's ready.
    pub(crate) fn live_sandbox(&self) -> Option<&Sandbox> {
        self.sandboxes.first().filter(|sandbox| sandbox.ready)
    }

    /// The live sandbox is as good as dead: another takes its place.
    pub(crate) fn give_up_sandbox(&mut self) {
        if let Some(newest) = self.sandboxes.first_mut() {
            newest.ready = false;
        }
    }

    /// The newest run of a container.
    pub(crate) fn newest(&self, container: &str) -> Option<&Run> {
        self.runs.get(container)?.first()
    }

    /// The newest run of a container in one sandbox.
    pub(crate) fn newest_in(&self, container: &str, sandbox: &str) -> Option<&Run> {
        self.runs.get(container)?.iter().find(|run| run.sandbox == sandbox)
    }

    /// Every run, of all containers.
    pub(crate) fn all_runs(&self) -> impl Iterator<Item = &Run> {
        self.runs.values().flatten()
    }

    /// Puts sandboxes and runs in order.
    pub(crate) fn sort(&mut self) {
        self.sandboxes.sort_by_key(|s| std::cmp::Reverse((s.attempt, s.created_at)));
        for runs in self.runs.values_mut() {
            runs.sort_by_key(|run| std::cmp::Reverse((run.attempt, run.created_at)));
        }
    }
}

/// Reads a pod from the runtime. Containers that ended don't change any more, so their details are asked for once.
#[derive(Debug, Default)]
pub(crate) struct ActualReader {
    ended: BTreeMap<String, Run>,
}

impl ActualReader {
    /// The pod as it is now.
    pub(crate) async fn read(&mut self, runtime: &Runtime, uid: &str) -> Result<Actual, RuntimeError> {
        let mut actual = Actual::default();
        for sandbox in runtime.sandboxes(Some(uid)).await? {
            actual.sandboxes.push(Sandbox {
                ready: sandbox.state() == v1::PodSandboxState::SandboxReady,
                attempt: sandbox.metadata.map_or(0, |m| m.attempt),
                created_at: sandbox.created_at,
                id: sandbox.id,
            });
        }
        let mut ended = BTreeMap::new();
        for listed in runtime.containers(Some(uid)).await? {
            let Some(name) = listed.labels.get(LABEL_CONTAINER_NAME).cloned() else { continue };
            let run = match self.ended.remove(&listed.id) {
                Some(run) => run,
                None => match runtime.container_status(&listed.id).await {
                    Ok(status) => run(listed, status),
                    Err(error) if error.is_not_found() => continue,
                    Err(error) => return Err(error),
                },
            };
            if run.state == RunState::Exited {
                ended.insert(run.id.clone(), run.clone());
            }
            actual.runs.entry(name).or_default().push(run);
        }
        self.ended = ended;
        actual.sort();
        Ok(actual)
    }
}

fn run(listed: v1::Container, status: v1::ContainerStatus) -> Run {
    let state = match status.state() {
        v1::ContainerState::ContainerCreated => RunState::Created,
        v1::ContainerState::ContainerRunning => RunState::Running,
        v1::ContainerState::ContainerExited => RunState::Exited,
        v1::ContainerState::ContainerUnknown => RunState::Unknown,
    };
    Run {
        state,
        attempt: status.metadata.map_or(0, |m| m.attempt),
        created_at: status.created_at,
        started_at: status.started_at,
        finished_at: status.finished_at,
        exit_code: status.exit_code,
        reason: status.reason,
        message: status.message,
        image: status.image.map(|i| i.image).unwrap_or_default(),
        image_ref: status.image_ref,
        hash: listed.annotations.get(ANNOTATION_HASH).cloned().unwrap_or_default(),
        sandbox: listed.pod_sandbox_id,
        id: listed.id,
    }
}
