//! A work queue of object names: each at most once, delayed retries, and no two workers on the same name.

use std::{
    collections::{BTreeSet, HashMap, HashSet, VecDeque},
    hash::Hash,
    time::Duration,
};

use parking_lot::Mutex;
use prometheus_client::metrics::gauge::Gauge;
use tokio::{sync::Notify, time::Instant};

/// The first and the longest wait after a failure; it doubles in between.
const FIRST_RETRY: Duration = Duration::from_millis(20);
const LONGEST_RETRY: Duration = Duration::from_secs(30);

/// The queue. Its size is bounded by the number of objects, as each is in it once.
pub(crate) struct WorkQueue<T> {
    state: Mutex<State<T>>,
    changed: Notify,
    depth: Gauge,
}

struct State<T> {
    ready: VecDeque<T>,
    /// What is in `ready`.
    queued: HashSet<T>,
    delayed: BTreeSet<(Instant, T)>,
    due: HashMap<T, Instant>,
    running: HashSet<T>,
    /// Added again while it was running.
    again: HashSet<T>,
    failures: HashMap<T, u32>,
}

impl<T: Clone + Eq + Hash + Ord> WorkQueue<T> {
    pub(crate) fn new(depth: Gauge) -> Self {
        let state = State {
            ready: VecDeque::new(),
            queued: HashSet::new(),
            delayed: BTreeSet::new(),
            due: HashMap::new(),
            running: HashSet::new(),
            again: HashSet::new(),
            failures: HashMap::new(),
        };
        Self { state: Mutex::new(state), changed: Notify::new(), depth }
    }

    /// Queues an item; one that is running runs again afterwards.
    pub(crate) fn add(&self, item: T) {
        self.state.lock().add(item, &self.depth);
        self.changed.notify_one();
    }

    /// Queues an item for later, or for the earlier of the two times when it is already delayed.
    pub(crate) fn add_after(&self, item: T, delay: Duration) {
        self.state.lock().delay(item, Instant::now() + delay);
        self.changed.notify_one();
    }

    /// The next item; call [`WorkQueue::done`] with it afterwards.
    pub(crate) async fn next(&self) -> T {
        loop {
            let changed = self.changed.notified();
            let wait_until = {
                let mut state = self.state.lock();
                state.wake_delayed(Instant::now(), &self.depth);
                if let Some(item) = state.ready.pop_front() {
                    state.queued.remove(&item);
                    state.running.insert(item.clone());
                    self.depth.dec();
                    if !state.ready.is_empty() {
                        // Another worker may sleep: one notification can stand for several items.
                        self.changed.notify_one();
                    }
                    return item;
                }
                state.delayed.first().map(|(at, _)| *at)
            };
            match wait_until {
                Some(at) => {
                    tokio::select! {
                        () = changed => {}
                        () = tokio::time::sleep_until(at) => {}
                    }
                }
                None => changed.await,
            }
        }
    }

    /// Ends the run of an item. `failed` brings it back after its backoff; otherwise its backoff starts anew. One that changed
    /// meanwhile comes back at once in any case, as in client-go's workqueue: the change may be what it failed for.
    pub(crate) fn done(&self, item: &T, failed: bool) {
        let mut state = self.state.lock();
        state.running.remove(item);
        if failed {
            let failures = state.failures.entry(item.clone()).or_insert(0);
            *failures += 1;
            let delay = FIRST_RETRY.saturating_mul(1 << (*failures - 1).min(16)).min(LONGEST_RETRY);
            state.delay(item.clone(), Instant::now() + delay);
        } else {
            state.failures.remove(item);
        }
        if state.again.remove(item) {
            state.add(item.clone(), &self.depth);
        }
        drop(state);
        self.changed.notify_one();
    }
}

impl<T: Clone + Eq + Hash + Ord> State<T> {
    fn add(&mut self, item: T, depth: &Gauge) {
        if self.running.contains(&item) {
            self.again.insert(item);
        } else if self.queued.insert(item.clone()) {
            self.ready.push_back(item);
            depth.inc();
        }
    }

    fn delay(&mut self, item: T, at: Instant) {
        if let Some(due) = self.due.get(&item) {
            if *due <= at {
                return;
            }
            self.delayed.remove(&(*due, item.clone()));
        }
        self.due.insert(item.clone(), at);
        self.delayed.insert((at, item));
    }

    fn wake_delayed(&mut self, now: Instant, depth: &Gauge) {
        while self.delayed.first().is_some_and(|(at, _)| *at <= now) {
            if let Some((_, item)) = self.delayed.pop_first() {
                self.due.remove(&item);
                self.add(item, depth);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_item_added_many_times_runs_once() {
        let queue = WorkQueue::new(Gauge::default());
        for _ in 0..3 {
            queue.add("a");
        }
        queue.add("b");
        assert_eq!(queue.next().await, "a");
        assert_eq!(queue.next().await, "b");
        assert_eq!(queue.depth.get(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn an_item_added_while_it_runs_runs_again_after_and_never_twice_at_once() {
        let queue = WorkQueue::new(Gauge::default());
        queue.add("a");
        assert_eq!(queue.next().await, "a");
        queue.add("a");
        assert!(tokio::time::timeout(Duration::from_secs(1), queue.next()).await.is_err());
        queue.done(&"a", false);
        assert_eq!(queue.next().await, "a");
    }

    #[tokio::test(start_paused = true)]
    async fn a_change_during_a_run_that_fails_does_not_wait_for_the_backoff() {
        let queue = WorkQueue::new(Gauge::default());
        queue.add("a");
        for _ in 0..10 {
            queue.next().await;
            queue.done(&"a", true);
        }
        queue.next().await;
        queue.add("a");
        queue.done(&"a", true);
        let begin = Instant::now();
        assert_eq!(queue.next().await, "a");
        assert_eq!(begin.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn failures_wait_longer_each_time_up_to_a_limit() {
        let queue = WorkQueue::new(Gauge::default());
        queue.add("a");
        let mut waits = Vec::new();
        for _ in 0..20 {
            let start = Instant::now();
            let item = queue.next().await;
            waits.push(start.elapsed());
            queue.done(&item, true);
        }
        assert!(waits[2] >= waits[1] * 2 - Duration::from_millis(2), "{waits:?}");
        assert!(*waits.last().unwrap() <= LONGEST_RETRY + Duration::from_millis(2), "{waits:?}");
    }
}
