//! Readiness: named tasks that are released on purpose. A daemon is ready when none is left.

use std::{collections::BTreeSet, sync::Arc};

use parking_lot::Mutex;
use tokio::sync::watch;

/// The tasks that keep a daemon from being ready.
#[derive(Debug, Clone)]
pub struct Readiness(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    pending: Mutex<BTreeSet<&'static str>>,
    ready: watch::Sender<bool>,
}

impl Default for Readiness {
    fn default() -> Self {
        Self(Arc::new(Inner { pending: Mutex::default(), ready: watch::Sender::new(false) }))
    }
}

impl Readiness {
    /// Adds a task; the daemon isn't ready before [`ReadinessTask::ready`] is called on it.
    pub fn task(&self, name: &'static str) -> ReadinessTask {
        self.0.pending.lock().insert(name);
        self.0.ready.send_replace(false);
        ReadinessTask { readiness: self.clone(), name, released: false }
    }

    /// The names of the tasks that are not done, in order; empty means ready.
    pub fn pending(&self) -> Vec<&'static str> {
        self.0.pending.lock().iter().copied().collect()
    }

    /// Waits until every task added so far is done.
    pub async fn wait(&self) {
        let mut ready = self.0.ready.subscribe();
        while !self.pending().is_empty() {
            if ready.changed().await.is_err() {
                return;
            }
        }
    }
}

/// One thing that must happen before the daemon is ready. Dropping it keeps the daemon not ready, and says so.
#[derive(Debug)]
pub struct ReadinessTask {
    readiness: Readiness,
    name: &'static str,
    released: bool,
}

impl ReadinessTask {
    /// This task is done, unless what is returned is taken back.
    pub fn ready(mut self) -> Done {
        self.released = true;
        let left = {
            let mut pending = self.readiness.0.pending.lock();
            pending.remove(self.name);
            pending.len()
        };
        tracing::info!(task = self.name, left, "readiness task done");
        self.readiness.0.ready.send_replace(left == 0);
        Done { readiness: self.readiness.clone(), name: self.name }
    }
}

/// A task that is done.
#[derive(Debug)]
pub struct Done {
    readiness: Readiness,
    name: &'static str,
}

impl Done {
    /// It is not done any more: the daemon isn't ready again before the task is released anew.
    pub fn undo(self) -> ReadinessTask {
        self.readiness.task(self.name)
    }
}

impl Drop for ReadinessTask {
    fn drop(&mut self) {
        if !self.released {
            tracing::warn!(task = self.name, "a readiness task was dropped before it was done: not ready for good");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn ready_only_when_every_task_was_released_on_purpose() {
        let readiness = Readiness::default();
        let one = readiness.task("one");
        let two = readiness.task("two");
        one.ready();
        assert_eq!(readiness.pending(), ["two"]);
        drop(two);
        assert_eq!(readiness.pending(), ["two"], "a dropped task must stay pending");
        let done = readiness.task("two").ready();
        readiness.wait().await;
        let two = done.undo();
        assert_eq!(readiness.pending(), ["two"]);
        two.ready();
        readiness.wait().await;
    }
}
