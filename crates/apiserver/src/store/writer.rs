//! The thread that owns the database: it runs operations in order and commits them in groups.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::{mpsc, oneshot};

use super::{
    Shared,
    database::Database,
    maintenance,
    state::State,
    transaction::{Done, Transaction},
};
use crate::error::{ApiError, Reason};

/// How many operations share one commit at most.
const MAX_BATCH: usize = 256;
/// How many operations wait at most; further callers wait before they are queued.
const QUEUE: usize = 1024;
/// How often old events are removed.
const MAINTENANCE_INTERVAL: Duration = Duration::from_secs(60);

/// Runs the operation and gives back what is to be told to its caller once the batch is on disk, or isn't.
/// Without a transaction it fails with the error that says why.
type Job = Box<dyn FnOnce(Result<&mut Transaction<'_>, &ApiError>) -> Completion + Send>;
type Completion = Box<dyn FnOnce(Result<(), &ApiError>) + Send>;

/// The way to the writer.
#[derive(Debug, Clone)]
pub(crate) struct Writer {
    jobs: mpsc::Sender<Job>,
}

impl Writer {
    /// Starts the thread. It ends when the last handle is gone and the queue is empty.
    pub(crate) fn start(shared: Arc<Shared>, database: Database) -> std::io::Result<Self> {
        let (jobs, queue) = mpsc::channel(QUEUE);
        std::thread::Builder::new().name("store".to_owned()).spawn(move || run(&shared, &database, queue))?;
        Ok(Self { jobs })
    }

    /// Runs an operation in a transaction and returns once it is on disk. A dry run is undone instead.
    pub(crate) async fn run<T, F>(&self, dry_run: bool, operation: F) -> Result<T, ApiError>
    where
        T: Send + 'static,
        F: FnOnce(&mut Transaction<'_>) -> Result<T, ApiError> + Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let job: Job = Box::new(move |transaction| {
            let result = match transaction {
                Ok(transaction) => isolated(transaction, dry_run, operation),
                Err(error) => Err(error.clone()),
            };
            Box::new(move |committed| {
                let result = match committed {
                    Ok(()) => result,
                    Err(error) => result.and_then(|_| Err(error.clone())),
                };
                // Nobody to tell means that the caller went away; the write stays.
                drop(answer.send(result));
            })
        });
        let gone = || ApiError::new(Reason::ServiceUnavailable, "the store is closed");
        self.jobs.send(job).await.map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }
}

/// One operation inside its own savepoint.
fn isolated<T>(
    transaction: &mut Transaction<'_>,
    dry_run: bool,
    operation: impl FnOnce(&mut Transaction<'_>) -> Result<T, ApiError>,
) -> Result<T, ApiError> {
    let mark = transaction.mark();
    transaction.database.savepoint().map_err(ApiError::internal)?;
    let result = operation(transaction);
    if result.is_err() || dry_run {
        transaction.reset(mark);
        transaction.database.undo().map_err(ApiError::internal)?;
    } else {
        transaction.database.release().map_err(ApiError::internal)?;
    }
    result
}

fn run(shared: &Shared, database: &Database, mut queue: mpsc::Receiver<Job>) {
    let mut maintained = Instant::now();
    let mut outbox_last = *shared.outbox.borrow();
    while let Some(first) = queue.blocking_recv() {
        let mut batch = vec![first];
        while batch.len() < MAX_BATCH
            && let Ok(next) = queue.try_recv()
        {
            batch.push(next);
        }
        if maintained.elapsed() >= MAINTENANCE_INTERVAL {
            maintained = Instant::now();
            batch.push(Box::new(|transaction| {
                if let Ok(transaction) = transaction
                    && let Err(error) = isolated(transaction, false, maintenance::remove_old_events)
                {
                    tracing::warn!(%error, "old events could not be removed");
                }
                Box::new(|_| {})
            }));
        }
        let mut completions = Vec::with_capacity(batch.len());
        match commit(shared, database, outbox_last, batch, &mut completions) {
            Ok(done) => {
                outbox_last = done.outbox_last;
                publish(shared, done);
                completions.into_iter().for_each(|complete| complete(Ok(())));
            }
            Err(error) => {
                tracing::error!(%error, "writes could not be stored");
                completions.into_iter().for_each(|complete| complete(Err(&error)));
            }
        }
    }
}

fn commit(
    shared: &Shared,
    database: &Database,
    outbox_last: u64,
    batch: Vec<Job>,
    completions: &mut Vec<Completion>,
) -> Result<Done, ApiError> {
    let failed = |error: super::database::DatabaseError| {
        ApiError::new(Reason::ServiceUnavailable, format!("the write could not be stored: {error}"))
    };
    if let Err(error) = database.begin().map_err(failed) {
        completions.extend(batch.into_iter().map(|job| job(Err(&error))));
        return Err(error);
    }
    let mut transaction = Transaction::new(shared, database, outbox_last);
    completions.extend(batch.into_iter().map(|job| job(Ok(&mut transaction))));
    let done = transaction.finish();
    if let Err(error) = database.commit(done.rv).map_err(failed) {
        if let Err(rollback) = database.rollback() {
            tracing::debug!(error = %rollback, "nothing to roll back");
        }
        return Err(error);
    }
    Ok(done)
}

/// Shows a committed batch to readers and wakes the watchers.
fn publish(shared: &Shared, done: Done) {
    let mut touched = Vec::new();
    {
        let mut state = shared.state.write();
        let State { rv, .. } = &mut *state;
        *rv = done.rv;
        for (resource, change, stored) in done.changes {
            if change.rv == 0 {
                if let Some(stored) = stored {
                    state.set(&resource, change.slot, Some(stored));
                }
                continue;
            }
            if !touched.contains(&resource) {
                touched.push(resource.clone());
            }
            state.apply(&resource, change, stored);
        }
    }
    *shared.registry.write() = done.registry;
    let state = shared.state.read();
    touched.iter().for_each(|resource| state.announce(resource));
    drop(state);
    shared.outbox.send_if_modified(|last| {
        let newer = done.outbox_last > *last;
        *last = (*last).max(done.outbox_last);
        newer
    });
}
