//! Shutdown in order: stop accepting, let work in flight finish, then force at the deadline.

use std::time::Duration;

use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Tells a daemon's tasks to stop, and counts those still at work.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    stop: CancellationToken,
    force: CancellationToken,
    tracker: TaskTracker,
}

/// Held by work in flight; the drain waits until all are dropped.
pub type DrainToken = tokio_util::task::task_tracker::TaskTrackerToken;

impl Shutdown {
    /// Cancelled when no new work may begin.
    pub fn stopping(&self) -> &CancellationToken {
        &self.stop
    }

    /// Cancelled when work in flight must end at once. Every spawned task selects on it.
    pub fn forced(&self) -> &CancellationToken {
        &self.force
    }

    /// Counts as work in flight until it is dropped.
    pub fn token(&self) -> DrainToken {
        self.tracker.token()
    }

    /// Runs a task that the drain waits for, and that ends at the latest when the drain is forced.
    pub fn spawn<F>(&self, task: F) -> tokio::task::JoinHandle<()>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let force = self.force.clone();
        // On the heap, since a future that an async block takes over and awaits has its room in that one twice.
        let task = Box::pin(task);
        self.tracker.spawn(async move {
            tokio::select! {
                // First, so that a task that hears of the force itself can end in its own way.
                biased;
                () = task => {}
                () = force.cancelled() => {}
            }
        })
    }

    /// Stops: no new work, then up to `deadline` for work in flight, then force. Returns whether all ended by itself.
    pub async fn drain(&self, deadline: Duration) -> bool {
        self.stop.cancel();
        self.tracker.close();
        let in_time = tokio::time::timeout(deadline, self.tracker.wait()).await.is_ok();
        self.force.cancel();
        if !in_time {
            tracing::warn!(left = self.tracker.len(), ?deadline, "work was still in flight at the deadline");
            self.tracker.wait().await;
        }
        in_time
    }
}

/// Returns when the process is asked to stop (SIGTERM or SIGINT).
///
/// # Errors
/// When the signal handlers can't be installed.
pub async fn stop_signal() -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn work_in_flight_finishes_before_the_deadline() {
        let shutdown = Shutdown::default();
        shutdown.spawn(tokio::time::sleep(Duration::from_secs(1)));
        assert!(shutdown.drain(Duration::from_secs(5)).await);
    }

    #[tokio::test(start_paused = true)]
    async fn work_past_the_deadline_is_forced_to_end() {
        let shutdown = Shutdown::default();
        shutdown.spawn(std::future::pending());
        assert!(!shutdown.drain(Duration::from_secs(5)).await);
    }
}
