//! Names outside the cluster: from the cache, else from the upstreams, else from the cache past its time (RFC 8767).
//!
//! An upstream that doesn't answer is found out within a second and passed over until it answers a probe again, so a
//! node without a way out fails at once instead of making every client wait.

use std::{
    collections::{HashMap, VecDeque},
    net::SocketAddr,
    path::PathBuf,
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use edgemesh_telemetry::Shutdown;
use futures::{StreamExt, future::join_all, stream::FuturesUnordered};
use parking_lot::Mutex;
use tokio::sync::watch;

use super::{
    cache::{Cache, Entry, Freshness, Key, Lifetimes},
    metrics::{Metrics, Source},
    resolv_conf,
    upstream::Upstream,
    wire::{Name, kind, rcode},
};

/// Another upstream is asked, or the same again, when there was no answer for this long.
const NEXT_AFTER: Duration = Duration::from_millis(300);
/// The upstreams that were asked are probed when there was no answer for this long.
const PROBE_AFTER: Duration = Duration::from_millis(600);
/// Longest time for one question, while an upstream is alive.
const DEADLINE: Duration = Duration::from_secs(4);
/// Datagrams get lost: with one upstream, it is asked this often.
const LEAST_ATTEMPTS: usize = 3;
/// A client that could get a stale answer waits this long for a fresh one.
const STALE_AFTER: Duration = Duration::from_secs(1);
/// Waits between the probes of a dead upstream.
const FIRST_REVIVE: Duration = Duration::from_millis(500);
const LONGEST_REVIVE: Duration = Duration::from_secs(5);
/// Names under it are asked of upstreams only to see whether they come back. `invalid` never exists (RFC 6761).
const LOOP_ZONE: &str = "loop.edgemesh.invalid";

/// Where upstreams come from.
#[derive(Debug, Clone)]
pub(super) enum Upstreams {
    /// These.
    Listed(Vec<SocketAddr>),
    /// Those of this file, followed as it changes.
    ResolvConf(PathBuf),
}

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

/// Answers questions about names outside the cluster.
pub(super) struct Forwarder {
    upstreams: ArcSwap<Vec<Arc<Upstream>>>,
    own: SocketAddr,
    lifetimes: Lifetimes,
    cache: Mutex<Cache>,
    /// Questions being asked, so that each is asked once.
    flights: Mutex<HashMap<Key, watch::Receiver<Outcome>>>,
    most_flights: usize,
    /// First label of the names that find loops.
    loop_mark: String,
    loop_zone: Option<Name>,
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
}

impl Forwarder {
    /// Starts with the given upstreams, and follows resolv.conf if they come from there. `own` is this server's address,
    /// which is never an upstream.
    pub(super) fn start(
        upstreams: Upstreams,
        own: SocketAddr,
        limits: Limits,
        metrics: Arc<Metrics>,
        shutdown: Shutdown,
    ) -> Arc<Self> {
        let forwarder = Arc::new(Self {
            upstreams: ArcSwap::default(),
            own,
            lifetimes: limits.lifetimes,
            cache: Mutex::new(Cache::new(limits.cache_entries, limits.cache_bytes)),
            flights: Mutex::default(),
            most_flights: limits.flights,
            loop_mark: format!("{:016x}", rand::random::<u64>()),
            loop_zone: Name::from_text(LOOP_ZONE),
            metrics,
            shutdown,
        });
        match upstreams {
            Upstreams::Listed(addresses) => forwarder.use_upstreams(&addresses),
            Upstreams::ResolvConf(path) => {
                let mut known = forwarder.reload(&path, None);
                let following = Arc::clone(&forwarder);
                forwarder.shutdown.spawn(async move {
                    let stopping = following.shutdown.stopping().clone();
                    while stopping.run_until_cancelled(tokio::time::sleep(resolv_conf::RELOAD_EVERY)).await.is_some() {
                        known = following.reload(&path, known);
                    }
                });
            }
        }
        forwarder
    }

    /// An entry that is within its lifetime.
    pub(super) fn cached(&self, key: &Key, now: Instant) -> Option<Arc<Entry>> {
        let mut cache = self.cache.lock();
        let entry = cache.get(key)?;
        (entry.freshness(now, &self.lifetimes) == Some(Freshness::Fresh)).then(|| Arc::clone(entry))
    }

    /// Asks the upstreams, together with all who ask the same, and falls back to an entry past its lifetime.
    pub(super) async fn resolve(self: &Arc<Self>, key: Key) -> Found {
        let past = {
            let mut cache = self.cache.lock();
            let now = Instant::now();
            let found = cache.get(&key).map(|entry| (Arc::clone(entry), entry.freshness(now, &self.lifetimes)));
            match found {
                Some((entry, Some(Freshness::Fresh))) => {
                    return Found::cached(entry);
                }
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

    /// Looks whether a query is one of our own that an upstream sent back; if so, that upstream isn't asked any more.
    pub(super) fn is_our_own(&self, name: &Name) -> bool {
        let Some(zone) = &self.loop_zone else { return false };
        if name.suffix_at(zone.wire()).is_none() {
            return false;
        }
        let first = name.labels().next().and_then(|label| std::str::from_utf8(label).ok()).unwrap_or_default();
        let Some((mark, index)) = first.split_once('-') else { return false };
        if mark != self.loop_mark {
            return false;
        }
        let upstreams = self.upstreams.load();
        if let Some(upstream) = index.parse::<usize>().ok().and_then(|index| upstreams.get(index))
            && upstream.set_looped()
        {
            tracing::error!(upstream = %upstream.address, "this upstream sends queries back to this server; not used");
            self.count_alive();
        }
        true
    }

    /// The flight of a question: the one under way or a new one. None if nobody could answer, or too many are under way.
    fn join(self: &Arc<Self>, key: Key) -> Option<watch::Receiver<Outcome>> {
        let mut flights = self.flights.lock();
        if let Some(flight) = flights.get(&key) {
            return Some(flight.clone());
        }
        if !self.upstreams.load().iter().any(|upstream| upstream.is_usable()) {
            self.metrics.upstream_failures.inc();
            return None;
        }
        if flights.len() >= self.most_flights {
            self.metrics.limited.inc();
            return None;
        }
        let (landed, flight) = watch::channel(None);
        flights.insert(key.clone(), flight.clone());
        drop(flights);
        let forwarder = Arc::clone(self);
        self.shutdown.spawn(async move {
            let started = Instant::now();
            let entry = forwarder.ask(&key).await.map(Arc::new);
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
            forwarder.flights.lock().remove(&key);
            landed.send_replace(Some(entry));
        });
        Some(flight)
    }

    /// Asks one upstream after the other, in order, without waiting for the earlier ones to give up.
    async fn ask(self: &Arc<Self>, key: &Key) -> Option<Entry> {
        let usable: Vec<Arc<Upstream>> =
            self.upstreams.load().iter().filter(|upstream| upstream.is_usable()).cloned().collect();
        let question = key.question().len();
        let attempts = usable.len().max(LEAST_ATTEMPTS);
        let mut queue: VecDeque<_> = usable.iter().cycle().take(attempts).collect();
        let mut asked = FuturesUnordered::new();
        let attempt = |upstream: &Arc<Upstream>| {
            let upstream = Arc::clone(upstream);
            async move {
                let result = upstream.ask(key).await;
                (upstream, result)
            }
        };
        asked.push(attempt(queue.pop_front()?));
        let mut deadline = pin!(tokio::time::sleep(DEADLINE));
        let mut probes = pin!(async {
            tokio::time::sleep(PROBE_AFTER).await;
            join_all(usable.iter().map(|upstream| async move {
                if !upstream.is_alive().await {
                    self.lost(upstream, "no answer");
                }
            }))
            .await;
        });
        let mut probed = false;
        let mut last = None;
        let mut next_at = tokio::time::Instant::now() + NEXT_AFTER;
        loop {
            tokio::select! {
                Some((upstream, result)) = asked.next(), if !asked.is_empty() => {
                    match result.map(|message| Entry::read(&message, question, &self.lifetimes)) {
                        Ok(Ok(entry)) if !is_failure(&entry) => return Some(entry),
                        Ok(Ok(entry)) => last = Some(entry),
                        Ok(Err(error)) => tracing::debug!(upstream = %upstream.address, %error, "unusable answer"),
                        Err(error) => self.lost(&upstream, &error.to_string()),
                    }
                    // An upstream that failed isn't asked again, and the next needn't wait.
                    queue.retain(|other| !Arc::ptr_eq(other, &upstream));
                    next_at = tokio::time::Instant::now();
                }
                () = tokio::time::sleep_until(next_at), if !queue.is_empty() => {
                    if let Some(upstream) = queue.pop_front().filter(|upstream| upstream.is_usable()) {
                        asked.push(attempt(upstream));
                        next_at = tokio::time::Instant::now() + NEXT_AFTER;
                    }
                }
                () = &mut probes, if !probed => {
                    probed = true;
                    if !usable.iter().any(|upstream| upstream.is_usable()) {
                        return last;
                    }
                }
                () = &mut deadline => return last,
            }
            if asked.is_empty() && queue.is_empty() {
                return last;
            }
        }
    }

    /// Takes an upstream for dead and probes it until it answers again.
    fn lost(self: &Arc<Self>, upstream: &Arc<Upstream>, why: &str) {
        if !upstream.set_dead() {
            return;
        }
        tracing::warn!(upstream = %upstream.address, why, "this upstream doesn't answer; passed over until it does");
        self.count_alive();
        let forwarder = Arc::clone(self);
        let upstream = Arc::clone(upstream);
        self.shutdown.spawn(async move {
            let stopping = forwarder.shutdown.stopping().clone();
            let mut wait = FIRST_REVIVE;
            while stopping.run_until_cancelled(tokio::time::sleep(wait)).await.is_some() {
                if !forwarder.upstreams.load().iter().any(|known| Arc::ptr_eq(known, &upstream)) {
                    return;
                }
                if upstream.is_back().await {
                    upstream.set_alive();
                    tracing::info!(upstream = %upstream.address, "this upstream answers again");
                    forwarder.count_alive();
                    forwarder.find_loops();
                    return;
                }
                wait = (wait * 2).min(LONGEST_REVIVE);
            }
        });
    }

    fn reload(self: &Arc<Self>, path: &std::path::Path, known: Option<Vec<SocketAddr>>) -> Option<Vec<SocketAddr>> {
        match resolv_conf::read(path).map(|host| host.servers) {
            Ok(addresses) if known.as_ref() == Some(&addresses) => known,
            Ok(addresses) => {
                tracing::info!(path = %path.display(), ?addresses, "upstreams");
                self.use_upstreams(&addresses);
                Some(addresses)
            }
            Err(error) => {
                // The file may be replaced right now; what was known still holds.
                if known.is_none() {
                    tracing::warn!(path = %path.display(), %error, "no upstreams yet");
                }
                known
            }
        }
    }

    fn use_upstreams(self: &Arc<Self>, addresses: &[SocketAddr]) {
        let before = self.upstreams.load_full();
        let mut upstreams: Vec<Arc<Upstream>> = Vec::new();
        for address in addresses {
            if *address == self.own {
                tracing::warn!(%address, "this server's own address is no upstream");
            } else if !upstreams.iter().any(|known| known.address == *address) {
                let kept = before.iter().find(|known| known.address == *address).cloned();
                upstreams.push(kept.unwrap_or_else(|| Arc::new(Upstream::new(*address))));
            }
        }
        self.upstreams.store(Arc::new(upstreams));
        self.count_alive();
        self.find_loops();
    }

    /// Sends each upstream a name that only a loop can bring back here.
    fn find_loops(self: &Arc<Self>) {
        for (index, upstream) in self.upstreams.load().iter().enumerate().filter(|(_, upstream)| upstream.is_usable()) {
            let name = self.loop_zone.as_ref().and_then(|z| Name::under(&[format!("{}-{index}", self.loop_mark)], z));
            let Some(name) = name else { continue };
            let upstream = Arc::clone(upstream);
            let stopping = self.shutdown.stopping().clone();
            self.shutdown.spawn(async move {
                // The answer doesn't matter: the query itself shows up here, or not.
                let key = Key::new(&name, kind::A, false, false);
                let asked = tokio::time::timeout(DEADLINE, upstream.ask(&key));
                drop(stopping.run_until_cancelled(asked).await);
            });
        }
    }

    fn count_alive(&self) {
        let alive = self.upstreams.load().iter().filter(|upstream| upstream.is_usable()).count();
        self.metrics.upstreams_alive.set(alive as i64);
    }
}

/// An answer that says nothing about the name, or not all: another upstream, or a stale answer, may.
fn is_failure(entry: &Entry) -> bool {
    entry.truncated || !matches!(entry.rcode, rcode::NOERROR | rcode::NXDOMAIN)
}
