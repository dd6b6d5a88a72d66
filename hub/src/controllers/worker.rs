//! The loop around every controller's reconcile: workers, deadline, retries, metrics.

use std::{fmt, hash::Hash, sync::Arc, time::Duration};

use futures::future::join_all;
use tokio::task::JoinHandle;

use super::{
    Context,
    metrics::{ControllerLabels, Outcome, ReconcileLabels},
    queue::WorkQueue,
};

/// Longest time for one reconcile; what it did until then stands, and the object is looked at again.
const RECONCILE_DEADLINE: Duration = Duration::from_secs(60);

/// Why a reconcile couldn't finish. All are tried again with backoff.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The object changed since it was read: look again.
    #[error("it changed meanwhile")]
    Conflict,
    #[error("{action}: {source}")]
    Api { action: &'static str, source: Box<kube::Error> },
    #[error("no answer within {RECONCILE_DEADLINE:?}")]
    Deadline,
    #[error("{0}")]
    Rejected(String),
}

impl Failure {
    /// Turns an API error into a failure of `action`, for `map_err`.
    pub(crate) fn api(action: &'static str) -> impl Fn(kube::Error) -> Self {
        move |source| {
            if is_conflict(&source) { Self::Conflict } else { Self::Api { action, source: Box::new(source) } }
        }
    }
}

fn status(error: &kube::Error) -> Option<(u16, &str)> {
    match error {
        kube::Error::Api(status) => Some((status.code, status.reason.as_str())),
        _ => None,
    }
}

/// The write was based on an old resourceVersion or a replaced object.
pub(crate) fn is_conflict(error: &kube::Error) -> bool {
    status(error).is_some_and(|(code, reason)| code == 409 && reason != "AlreadyExists")
}

pub(crate) fn is_not_found(error: &kube::Error) -> bool {
    status(error).is_some_and(|(code, _)| code == 404)
}

pub(crate) fn already_exists(error: &kube::Error) -> bool {
    status(error).is_some_and(|(code, reason)| code == 409 && reason == "AlreadyExists")
}

/// The API refused for good: trying the same again can't help before something changes.
pub(crate) fn is_rejection(error: &kube::Error) -> bool {
    status(error).is_some_and(|(code, _)| matches!(code, 400 | 403 | 413 | 422))
}

/// Treats "doesn't exist" as done.
pub(crate) fn ignore_not_found<T>(result: Result<T, kube::Error>) -> Result<Option<T>, kube::Error> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if is_not_found(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// When to look at the object again without a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    OnChange,
    After(Duration),
}

/// A queue whose depth is measured under the controller's name.
pub(crate) fn queue<T: Clone + Eq + Hash + Ord>(context: &Context, controller: &'static str) -> Arc<WorkQueue<T>> {
    Arc::new(WorkQueue::new(context.metrics.queue_depth.get_or_create(&ControllerLabels { controller }).clone()))
}

/// Runs `workers` loops over the queue until the shutdown, in one task.
pub(crate) fn run<T, F, R>(
    context: &Arc<Context>,
    controller: &'static str,
    queue: Arc<WorkQueue<T>>,
    workers: usize,
    synced: impl Future<Output = ()> + Send + 'static,
    reconcile: F,
) -> JoinHandle<()>
where
    T: Clone + Eq + Hash + Ord + fmt::Display + Send + Sync + 'static,
    F: Fn(T) -> R + Send + Sync + 'static,
    R: Future<Output = Result<Next, Failure>> + Send + 'static,
{
    let metrics = context.metrics.clone();
    let stopping = context.shutdown.stopping().clone();
    context.shutdown.spawn(async move {
        let all = async {
            synced.await;
            let one = || async {
                loop {
                    let item = queue.next().await;
                    let deadline = tokio::time::timeout(RECONCILE_DEADLINE, Box::pin(reconcile(item.clone())));
                    let outcome = deadline.await.unwrap_or(Err(Failure::Deadline));
                    let result = match &outcome {
                        Ok(_) => Outcome::Ok,
                        Err(Failure::Conflict) => Outcome::Conflict,
                        Err(_) => Outcome::Error,
                    };
                    metrics.reconciles.get_or_create(&ReconcileLabels { controller, result }).inc();
                    match outcome {
                        Ok(Next::OnChange) => queue.done(&item, false),
                        Ok(Next::After(delay)) => {
                            queue.done(&item, false);
                            queue.add_after(item, delay);
                        }
                        Err(failure) => {
                            match failure {
                                Failure::Conflict => tracing::debug!(controller, %item, "conflict; looking again"),
                                failure => tracing::warn!(controller, %item, %failure, "will be tried again"),
                            }
                            queue.done(&item, true);
                        }
                    }
                }
            };
            join_all((0..workers).map(|_| one())).await;
        };
        tokio::select! {
            () = stopping.cancelled() => {}
            () = all => {}
        }
    })
}
