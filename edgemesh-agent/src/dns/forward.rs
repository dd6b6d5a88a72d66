//! Names outside the cluster: from the cache, else from the upstreams, else from the cache past its time (RFC 8767).

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use edgemesh_telemetry::Shutdown;
use parking_lot::Mutex;
use tokio::sync::watch;

use super::{
    cache::{Cache, Entry, Freshness, Key, Lifetimes},
    metrics::{Metrics, Source},
    upstreams::{DEADLINE, Upstreams, is_failure},
    wire::Name,
};

/// A client that could get a stale answer waits this long for a fresh one.
const STALE_AFTER: Duration = Duration::from_secs(1);

/// What a question came to.
#[derive(Debug)]
pub(super) struct Found {
    /// The answer; none if nobody has one.
    pub(super) entry: Option<Arc<Entry>>,
    /// Whether the entry is within its lifetime.
    pub(super) freshness: Freshness,
    /// Where it came from.
    pub(super) source: Source,
}

impl Found {
    /// An entry from the cache, within its lifetime.
    pub(super) fn cached(entry: Arc<Entry>) -> Self {
        Self { entry: Some(entry), freshness: Freshness::Fresh, source: Source::Cache }
    }
}

type Outcome = Option<Option<Arc<Entry>>>;

/// The place of a question being asked; dropping it leaves it, however the asking ends.
struct Place {
    forwarder: Arc<Forwarder>,
    key: Key,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.forwarder.flights.lock().remove(&self.key);
    }
}

/// Answers questions about names outside the cluster.
pub(super) struct Forwarder {
    upstreams: Arc<Upstreams>,
    limits: Limits,
    cache: Mutex<Cache>,
    /// Questions being asked, so that each is asked once.
    flights: Mutex<HashMap<Key, watch::Receiver<Outcome>>>,
    metrics: Arc<Metrics>,
    shutdown: Shutdown,
}

/// Limits of the forwarder.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) lifetimes: Lifetimes,
    pub(super) cache_entries: usize,
    pub(super) cache_bytes: usize,
    /// Questions being asked of upstreams at one time.
    pub(super) flights: usize,
    /// Whether popular entries are asked for anew shortly before they expire.
    pub(super) prefetch: bool,
}

impl Forwarder {
    /// Starts with an empty cache.
    pub(super) fn new(
        upstreams: Arc<Upstreams>,
        limits: Limits,
        metrics: Arc<Metrics>,
        shutdown: Shutdown,
    ) -> Arc<Self> {
        let cache = Mutex::new(Cache::new(limits.cache_entries, limits.cache_bytes));
        Arc::new(Self { upstreams, limits, cache, flights: Mutex::default(), metrics, shutdown })
    }

    /// An entry that is within its lifetime. A popular one that is about to expire is asked for anew meanwhile.
    pub(super) fn cached(self: &Arc<Self>, key: &Key, now: Instant) -> Option<Arc<Entry>> {
        let entry = {
            let mut cache = self.cache.lock();
            let entry = cache.get(key)?;
            (entry.freshness(now, &self.limits.lifetimes) == Some(Freshness::Fresh)).then(|| Arc::clone(entry))?
        };
        if self.limits.prefetch && entry.is_to_be_renewed(now) {
            self.renew(key);
        }
        Some(entry)
    }

    /// Whether a name is in a domain that has upstreams of its own.
    pub(super) fn has_domain_of(&self, name: &Name) -> bool {
        self.upstreams.has_domain_of(name)
    }

    /// Whether a query is one of our own that an upstream sent back.
    pub(super) fn is_our_own(&self, name: &Name) -> bool {
        self.upstreams.is_our_own(name)
    }

    /// Asks for an entry that clients will soon want; they come first where places are few.
    fn renew(self: &Arc<Self>, key: &Key) {
        if self.flights.lock().len() < self.limits.flights / 2 && self.join(key.clone()).is_some() {
            self.metrics.prefetches.inc();
        }
    }

    /// Asks the upstreams, together with all who ask the same, and falls back to an entry past its lifetime.
    pub(super) async fn resolve(self: &Arc<Self>, key: Key) -> Found {
        let past = {
            let mut cache = self.cache.lock();
            let now = Instant::now();
            let found = cache.get(&key).map(|entry| (Arc::clone(entry), entry.freshness(now, &self.limits.lifetimes)));
            match found {
                Some((entry, Some(Freshness::Fresh))) => return Found::cached(entry),
                Some((entry, Some(Freshness::Stale))) => Some(entry),
                Some((_, None)) | None => None,
            }
        };
        let patience = if past.is_some() { STALE_AFTER } else { DEADLINE + Duration::from_secs(1) };
        let answer = match self.join(key) {
            Some(mut flight) => {
                let outcome = tokio::time::timeout(patience, flight.wait_for(Option::is_some)).await;
                outcome.ok().and_then(Result::ok).and_then(|outcome| outcome.clone().flatten())
            }
            None => None,
        };
        match (answer, past) {
            (Some(entry), past) if past.is_none() || !is_failure(&entry) => {
                Found { entry: Some(entry), freshness: Freshness::Fresh, source: Source::Upstream }
            }
            (_, Some(entry)) => Found { entry: Some(entry), freshness: Freshness::Stale, source: Source::Stale },
            (answer, None) => Found { entry: answer, freshness: Freshness::Fresh, source: Source::Upstream },
        }
    }

    /// The flight of a question: the one under way or a new one. None if nobody could answer, or too many are under way.
    fn join(self: &Arc<Self>, key: Key) -> Option<watch::Receiver<Outcome>> {
        let mut flights = self.flights.lock();
        if let Some(flight) = flights.get(&key) {
            return Some(flight.clone());
        }
        let list = self.upstreams.of(&key.name()?);
        if !Upstreams::may_ask(&list) {
            self.metrics.upstream_failures.inc();
            return None;
        }
        if flights.len() >= self.limits.flights {
            self.metrics.limited.upstream.inc();
            return None;
        }
        let (landed, flight) = watch::channel(None);
        flights.insert(key.clone(), flight.clone());
        drop(flights);
        let place = Place { forwarder: Arc::clone(self), key };
        self.shutdown.spawn(async move {
            let Place { forwarder, key } = &place;
            let started = Instant::now();
            let entry = forwarder.upstreams.ask(&list, key).await.map(Arc::new);
            match &entry {
                Some(entry) => {
                    forwarder.metrics.upstream_seconds.observe(started.elapsed().as_secs_f64());
                    if !is_failure(entry) {
                        let mut cache = forwarder.cache.lock();
                        cache.put(key.clone(), Arc::clone(entry));
                        forwarder.metrics.cache_entries.set(cache.len() as i64);
                    }
                }
                None => drop(forwarder.metrics.upstream_failures.inc()),
            }
            drop(place);
            landed.send_replace(Some(entry));
        });
        Some(flight)
    }
}
