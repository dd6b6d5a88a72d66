//! Growing waits between restarts and between image pulls (Kubernetes, "Container restarts").

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

/// The first wait.
pub(crate) const FIRST: Duration = Duration::from_secs(10);
/// The longest wait.
pub(crate) const LONGEST: Duration = Duration::from_secs(300);
/// A container that ran this long starts from the first wait again.
pub(crate) const RESET_AFTER: Duration = Duration::from_secs(600);

#[derive(Debug, Clone, Copy)]
struct Entry {
    wait: Duration,
    since: Instant,
}

/// The waits of one pod, by container name or image.
#[derive(Debug, Default)]
pub(crate) struct Backoff(BTreeMap<String, Entry>);

impl Backoff {
    /// How long is still to wait before the next try; zero: try now.
    pub(crate) fn remaining(&self, key: &str, now: Instant) -> Duration {
        self.0
            .get(key)
            .map_or(Duration::ZERO, |entry| entry.wait.saturating_sub(now.saturating_duration_since(entry.since)))
    }

    /// The wait that holds now, for messages.
    pub(crate) fn wait(&self, key: &str) -> Duration {
        self.0.get(key).map_or(Duration::ZERO, |entry| entry.wait)
    }

    /// A try failed or a container exited at `now`, after it had run for `ran`. The first time asks for no wait if `free_first` is set: an
    /// exited container is restarted once at once.
    pub(crate) fn failed(&mut self, key: &str, now: Instant, ran: Duration, free_first: bool) {
        let entry = self.0.entry(key.to_owned()).or_insert(Entry { wait: Duration::ZERO, since: now });
        let fresh = entry.wait.is_zero() || ran >= RESET_AFTER;
        entry.wait = match (fresh, free_first) {
            (true, false) => FIRST,
            // A wait below the granularity of anything that happens here, and the step to FIRST next time.
            (true, true) => Duration::from_nanos(1),
            (false, _) => entry.wait.saturating_mul(2).clamp(FIRST, LONGEST),
        };
        entry.since = now;
    }

    /// It worked: the next failure starts from the beginning.
    pub(crate) fn succeeded(&mut self, key: &str) {
        self.0.remove(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_from_ten_seconds_to_five_minutes() {
        let mut backoff = Backoff::default();
        let now = Instant::now();
        let mut waits = Vec::new();
        for _ in 0..8 {
            backoff.failed("c", now, Duration::ZERO, true);
            waits.push(backoff.wait("c").as_secs());
        }
        assert_eq!(waits, [0, 10, 20, 40, 80, 160, 300, 300]);
        assert_eq!(backoff.remaining("c", now + Duration::from_secs(100)).as_secs(), 200);
        assert_eq!(backoff.remaining("c", now + Duration::from_secs(300)), Duration::ZERO);
        assert_eq!(backoff.remaining("other", now), Duration::ZERO);
    }

    #[test]
    fn a_long_run_or_a_success_starts_over() {
        let mut backoff = Backoff::default();
        let now = Instant::now();
        for _ in 0..5 {
            backoff.failed("c", now, Duration::ZERO, false);
        }
        assert_eq!(backoff.wait("c"), Duration::from_secs(160));
        backoff.failed("c", now, RESET_AFTER, false);
        assert_eq!(backoff.wait("c"), FIRST);
        backoff.succeeded("c");
        backoff.failed("c", now, Duration::ZERO, false);
        assert_eq!(backoff.wait("c"), FIRST);
    }
}
