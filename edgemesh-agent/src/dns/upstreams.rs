//! The upstream servers: which are asked for a domain, in which order, and which of them are passed over.
//!
//! An upstream that doesn't answer is found out soon and passed over until it answers again, so a node without a way out fails at
//! once instead of making every client wait. It is probed; and since some servers answer no probe, any answer of theirs counts, and
//! with each probe one question may be asked of it, too.

use std::{
    collections::VecDeque,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use edgemesh_telemetry::Shutdown;
use futures::{StreamExt, future::join_all, stream::FuturesUnordered};
use rustls::pki_types::ServerName;
use tokio::sync::Semaphore;
use tokio_rustls::TlsConnector;

use super::{
    address::UpstreamAddress,
    cache::{Entry, Key, Lifetimes},
    dot::DotServer,
    metrics::Metrics,
    resolv_conf,
    upstream::{Link, Upstream},
    wire::{Name, kind, rcode},
};

/// Another upstream is asked, or the same again, when there was no answer for this long.
const NEXT_AFTER: Duration = Duration::from_millis(300);
/// The upstreams that were asked are probed when there was no answer for this long.
const PROBE_AFTER: Duration = Duration::from_millis(600);
/// Longest time for one question, while an upstream is alive.
pub(super) const DEADLINE: Duration = Duration::from_secs(4);
/// Datagrams get lost: with one upstream, it is asked this often.
const LEAST_ATTEMPTS: usize = 3;
/// Waits between the probes of a dead upstream.
const FIRST_REVIVE: Duration = Duration::from_millis(500);
const LONGEST_REVIVE: Duration = Duration::from_secs(5);
/// Questions that nobody waits for any more whose answers would still show that an upstream is alive.
const MAX_LATE: usize = 64;
/// Names under it are asked of upstreams only to see whether they come back. `invalid` never exists (RFC 6761).
const LOOP_ZONE: &str = "loop.edgemesh.invalid";

/// Where upstreams come from.
#[derive(Debug, Clone)]
pub(super) enum Origin {
    /// These.
    Listed(Vec<UpstreamAddress>),
    /// Those of this file, followed as it changes.
    ResolvConf(PathBuf),
}

/// Which upstreams there are to be.
pub(super) struct Wanted {
    /// For all names that no domain holds.
    pub(super) default: Origin,
    /// For the names of single domains.
    pub(super) domains: Vec<(Name, Vec<UpstreamAddress>)>,
    /// This server's own addresses, which are never upstreams.
    pub(super) own: Vec<SocketAddr>,
    /// What makes TLS connections, if any upstream wants them.
    pub(super) tls: Option<TlsConnector>,
}

/// What resolv.conf said.
#[derive(Debug, Default)]
struct Known {
    /// The servers in use; none if it couldn't be read yet.
    servers: Option<Vec<SocketAddr>>,
    /// It named none when it was last looked at, though others are in use.
    was_empty: bool,
}

type List = Arc<Vec<Arc<Upstream>>>;

/// The upstream servers.
pub(super) struct Upstreams {
    default: ArcSwap<Vec<Arc<Upstream>>>,
    /// The most specific first.
    domains: Vec<(Name, List)>,
    own: Vec<SocketAddr>,
    tls: Option<TlsConnector>,
    lifetimes: Lifetimes,
    next_number: AtomicU32,
    /// First label of the names that find loops.
    loop_mark: String,
    loop_zone: Option<Name>,
    /// Places for questions that nobody waits for any more.
    late: Arc<Semaphore>,
    metrics: Arc<Metrics>,
    shutdown: Shutdown,
}

impl Upstreams {
    /// Starts with those that are wanted, and follows resolv.conf if they come from there.
    pub(super) fn start(wanted: Wanted, lifetimes: Lifetimes, metrics: Arc<Metrics>, shutdown: Shutdown) -> Arc<Self> {
        let mut upstreams = Self {
            default: ArcSwap::default(),
            domains: Vec::new(),
            own: wanted.own,
            tls: wanted.tls,
            lifetimes,
            next_number: AtomicU32::new(0),
            loop_mark: format!("{:016x}", rand::random::<u64>()),
            loop_zone: Name::from_text(LOOP_ZONE),
            late: Arc::new(Semaphore::new(MAX_LATE)),
            metrics,
            shutdown,
        };
        let domains = wanted.domains.into_iter().map(|(name, addresses)| (name, upstreams.list(&addresses, &[])));
        let mut domains: Vec<_> = domains.collect();
        domains.sort_by_key(|(name, _)| std::cmp::Reverse(name.labels().count()));
        upstreams.domains = domains;
        let upstreams = Arc::new(upstreams);
        match wanted.default {
            Origin::Listed(addresses) => upstreams.use_default(&addresses),
            Origin::ResolvConf(path) => {
                let mut known = Known::default();
                upstreams.reload(&path, &mut known);
                if known.servers.is_none() {
                    upstreams.begin();
                }
                let following = Arc::clone(&upstreams);
                let stopping = upstreams.shutdown.stopping().clone();
                upstreams.shutdown.spawn(async move {
                    let wait = || tokio::time::sleep(resolv_conf::RELOAD_EVERY);
                    while stopping.run_until_cancelled(wait()).await.is_some() {
                        following.reload(&path, &mut known);
                    }
                });
            }
        }
        upstreams
    }

    /// Whether a question may be asked of one of a list now.
    pub(super) fn may_ask(list: &List) -> bool {
        list.iter().any(|upstream| upstream.is_usable() || upstream.is_on_trial())
    }

    /// Those that are asked for a name.
    pub(super) fn of(&self, name: &Name) -> List {
        let domain = self.domains.iter().find(|(domain, _)| name.suffix_at(domain.wire()).is_some());
        domain.map_or_else(|| self.default.load_full(), |(_, list)| Arc::clone(list))
    }

    /// Whether a name is in a domain that has upstreams of its own.
    pub(super) fn has_domain_of(&self, name: &Name) -> bool {
        self.domains.iter().any(|(domain, _)| name.suffix_at(domain.wire()).is_some())
    }

    /// Looks whether a query is one of our own that an upstream sent back; if so, that upstream isn't asked any more.
    pub(super) fn is_our_own(&self, name: &Name) -> bool {
        let Some(zone) = &self.loop_zone else { return false };
        if name.suffix_at(zone.wire()).is_none() {
            return false;
        }
        let first = name.labels().next().and_then(|label| std::str::from_utf8(label).ok()).unwrap_or_default();
        let Some((mark, number)) = first.split_once('-') else { return false };
        if mark != self.loop_mark {
            return false;
        }
        if let Ok(number) = number.parse::<u32>()
            && let Some(upstream) = self.all().into_iter().find(|upstream| upstream.number == number)
            && upstream.set_looped()
        {
            tracing::error!(upstream = %upstream.address, "this upstream sends queries back to this server; not used");
            self.count_alive();
        }
        true
    }

    /// Asks one upstream after the other, in order, without waiting for the earlier ones to give up.
    pub(super) async fn ask(self: &Arc<Self>, list: &List, key: &Key) -> Option<Entry> {
        let first = list.iter().position(|upstream| upstream.is_usable()).unwrap_or(list.len());
        let mut usable: Vec<&Arc<Upstream>> = list[first..].iter().filter(|upstream| upstream.is_usable()).collect();
        // Dead ones on trial, of those only that would come first if they were alive.
        let tried: Vec<&Arc<Upstream>> = list[..first].iter().filter(|upstream| upstream.take_trial()).collect();
        let question = key.question().len();
        let attempt = |upstream: &Arc<Upstream>| {
            let (upstream, key) = (Arc::clone(upstream), key.clone());
            async move {
                let result = upstream.ask(&key).await;
                (upstream, result)
            }
        };
        // Where all are dead, those on trial are asked at once: none of them gets another chance soon.
        let (attempts, at_once) = if usable.is_empty() {
            usable = tried;
            (usable.len(), usable.len())
        } else {
            if !tried.is_empty() {
                self.listen_on(tried.into_iter().map(attempt).collect());
            }
            (LEAST_ATTEMPTS, 1)
        };
        let again = usable.iter().filter(|upstream| upstream.may_lose()).cycle();
        let again = again.take(attempts.saturating_sub(usable.len()));
        let mut queue: VecDeque<&Arc<Upstream>> = usable.iter().chain(again).copied().collect();
        let mut asked: FuturesUnordered<_> = queue.drain(..at_once).map(attempt).collect();
        let mut deadline = pin!(tokio::time::sleep(DEADLINE));
        let mut probes = pin!(async {
            tokio::time::sleep(PROBE_AFTER).await;
            join_all(usable.iter().map(|upstream| upstream.check(|| self.lost(upstream, "no answer")))).await;
        });
        let mut probed = false;
        let mut last = None;
        let mut next_at = tokio::time::Instant::now() + NEXT_AFTER;
        loop {
            tokio::select! {
                Some((upstream, result)) = asked.next(), if !asked.is_empty() => {
                    if result.is_ok() {
                        self.found(&upstream);
                    }
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
                        self.listen_on(asked);
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

    /// Waits for answers that nobody else waits for: they show that their upstreams are alive.
    fn listen_on(
        self: &Arc<Self>,
        mut asked: FuturesUnordered<impl Future<Output = (Arc<Upstream>, io::Result<Vec<u8>>)> + Send + 'static>,
    ) {
        let Ok(place) = Arc::clone(&self.late).try_acquire_owned() else { return };
        let upstreams = Arc::clone(self);
        self.shutdown.spawn(async move {
            let _place = place;
            let answers = async {
                while let Some((upstream, result)) = asked.next().await {
                    if result.is_ok() {
                        upstreams.found(&upstream);
                    }
                }
            };
            let stopping = upstreams.shutdown.stopping();
            stopping.run_until_cancelled(tokio::time::timeout(DEADLINE, answers)).await;
        });
    }

    /// Takes an upstream that answered for alive.
    fn found(self: &Arc<Self>, upstream: &Upstream) {
        if upstream.set_alive() {
            tracing::info!(upstream = %upstream.address, "this upstream answers again");
            self.begin();
        }
    }

    /// Takes an upstream for dead, and probes it until it answers again.
    fn lost(self: &Arc<Self>, upstream: &Arc<Upstream>, why: &str) {
        let Some(death) = upstream.set_dead() else { return };
        tracing::warn!(upstream = %upstream.address, why, "this upstream doesn't answer; passed over until it does");
        self.count_alive();
        let upstreams = Arc::clone(self);
        let upstream = Arc::clone(upstream);
        self.shutdown.spawn(async move {
            let stopping = upstreams.shutdown.stopping().clone();
            let mut wait = FIRST_REVIVE;
            while stopping.run_until_cancelled(tokio::time::sleep(wait)).await.is_some() {
                let is_known = upstreams.all().iter().any(|known| Arc::ptr_eq(known, &upstream));
                if !is_known || !upstream.is_dead_since(death) {
                    return;
                }
                upstream.put_on_trial();
                if upstream.is_back().await {
                    upstreams.found(&upstream);
                    return;
                }
                wait = (wait * 2).min(LONGEST_REVIVE);
            }
        });
    }

    fn reload(self: &Arc<Self>, path: &Path, known: &mut Known) {
        match resolv_conf::read(path).map(|host| host.servers) {
            Ok(addresses) if known.servers.as_ref() == Some(&addresses) => known.was_empty = false,
            // The file may be rewritten in place right now: that it names no server counts when it does so twice in a row.
            Ok(addresses) if addresses.is_empty() && known.servers.is_some() && !known.was_empty => {
                known.was_empty = true
            }
            Ok(addresses) => {
                tracing::info!(path = %path.display(), ?addresses, "upstreams");
                let listed: Vec<UpstreamAddress> = addresses.iter().copied().map(UpstreamAddress::from).collect();
                self.use_default(&listed);
                *known = Known { servers: Some(addresses), was_empty: false };
            }
            Err(error) => {
                // The file may be replaced right now; what was known still holds.
                if known.servers.is_none() {
                    tracing::warn!(path = %path.display(), %error, "no upstreams yet");
                }
            }
        }
    }

    fn use_default(self: &Arc<Self>, addresses: &[UpstreamAddress]) {
        let list = self.list(addresses, &self.default.load());
        self.default.store(list);
        self.begin();
    }

    /// The upstreams at these addresses; those that were known before keep what is known of them.
    fn list(&self, addresses: &[UpstreamAddress], before: &[Arc<Upstream>]) -> List {
        let mut list: Vec<Arc<Upstream>> = Vec::new();
        for address in addresses {
            if self.own.contains(&address.address) {
                tracing::warn!(%address, "this server's own address is no upstream");
            } else if !list.iter().any(|known| known.address == *address) {
                let kept = before.iter().find(|known| known.address == *address).cloned();
                list.extend(kept.or_else(|| self.upstream(address).map(Arc::new)));
            }
        }
        Arc::new(list)
    }

    fn upstream(&self, address: &UpstreamAddress) -> Option<Upstream> {
        let number = self.next_number.fetch_add(1, Ordering::Relaxed);
        let link = match &address.tls {
            None => Link::Plain,
            Some(name) => {
                // Both were checked with the settings.
                let (name, tls) = (ServerName::try_from(name.clone()).ok()?, self.tls.clone()?);
                let (metrics, shutdown) = (Arc::clone(&self.metrics), self.shutdown.clone());
                Link::Tls(DotServer::new(address.address, name, tls, metrics, shutdown))
            }
        };
        Some(Upstream::new(address.clone(), number, link, Arc::clone(&self.metrics)))
    }

    fn all(&self) -> Vec<Arc<Upstream>> {
        let domains = self.domains.iter().flat_map(|(_, list)| list.iter().cloned());
        self.default.load().iter().cloned().chain(domains).collect()
    }

    /// After any change of who is asked: counts them, and sends each a name that only a loop can bring back here.
    fn begin(&self) {
        self.count_alive();
        for upstream in self.all().into_iter().filter(|upstream| upstream.is_usable()) {
            let label = format!("{}-{}", self.loop_mark, upstream.number);
            let Some(name) = self.loop_zone.as_ref().and_then(|zone| Name::under(&[label], zone)) else { continue };
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
        let alive = self.all().iter().filter(|upstream| upstream.is_usable()).count();
        self.metrics.upstreams_alive.set(alive as i64);
    }
}

/// An answer that says nothing about the name, or not all: another upstream, or a stale answer, may.
pub(super) fn is_failure(entry: &Entry) -> bool {
    entry.truncated || !matches!(entry.rcode, rcode::NOERROR | rcode::NXDOMAIN)
}

#[cfg(test)]
mod tests {
    use prometheus_client::registry::Registry;

    use super::*;

    #[tokio::test]
    async fn a_resolv_conf_that_is_empty_for_a_moment_changes_nothing() {
        let lifetimes = Lifetimes { positive: DEADLINE, negative: DEADLINE, stale: DEADLINE };
        let wanted = Wanted { default: Origin::Listed(Vec::new()), domains: Vec::new(), own: Vec::new(), tls: None };
        let metrics = Arc::new(Metrics::new(&mut Registry::default()));
        let upstreams = Upstreams::start(wanted, lifetimes, metrics, Shutdown::default());
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        let mut known = Known::default();
        let mut used_after = |text: &str| {
            std::fs::write(&path, text).unwrap();
            upstreams.reload(&path, &mut known);
            upstreams.of(&Name::root()).len()
        };
        let one = "nameserver 127.53.73.1\n";
        assert_eq!(["", one, "", one, "", ""].map(&mut used_after), [0, 1, 1, 1, 1, 0]);
        assert_eq!([one, ""].map(&mut used_after), [1, 1]);
    }
}
