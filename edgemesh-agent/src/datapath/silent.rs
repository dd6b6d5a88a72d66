//! Endpoints that take no connections, though the API calls them ready: a node that died a moment ago, a rule that drops
//! packets, a pod whose queue is full.
//!
//! Where sockets are sent to endpoints directly, nobody but the kernel sees that a SYN stays unanswered. What it tells makes
//! an endpoint a suspect; a suspect is called from here, and one that answers none of several calls is silent: others are
//! chosen, as long as there are others. It is called on, with growing pauses, and chosen again once it answers. So no
//! client has to try, one lost packet moves nothing, and what only one client can't reach stays for the rest.

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use edgemesh_mesh::{
    CatalogStore,
    choice::Reach,
    model::{Endpoint, Protocol},
};
use edgemesh_telemetry::Shutdown;
use tokio::sync::mpsc;

use crate::{config::Config, island::checks, metrics::DatapathMetrics};

/// Suspects that are known at a time; more must wait until these are judged.
const MAX_SUSPECTS: usize = 512;
/// Calls in a row without an answer that make an endpoint silent.
const SILENT_AFTER: u32 = 2;
/// The first pause after a call without an answer; each further one doubles it.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// How long an endpoint that answered is no suspect again, so that clients that it refuses cost it no more calls than that.
const TRUSTED: Duration = Duration::from_secs(5);
/// Addresses that wait to be looked at; what comes while it is full is told again by the next SYN.
const QUEUE: usize = 256;

/// Where the addresses of endpoints that left a SYN unanswered go in.
pub(super) type Suspicions = mpsc::Sender<SocketAddr>;

/// What is known of a suspect.
#[derive(Debug, Clone, Copy)]
struct Suspect {
    failures: u32,
    /// When it is called next, or forgotten if it answered.
    due: Instant,
    answered: bool,
}

/// The suspects, and which of them are silent.
#[derive(Debug)]
struct Suspects {
    max_pause: Duration,
    known: HashMap<SocketAddr, Suspect>,
}

impl Suspects {
    fn new(max_pause: Duration) -> Self {
        Self { max_pause, known: HashMap::new() }
    }

    /// An endpoint is suspected: it is to be called, unless it is being judged or answered a moment ago.
    fn suspect(&mut self, endpoint: SocketAddr, now: Instant) {
        if self.known.len() < MAX_SUSPECTS {
            self.known.entry(endpoint).or_insert(Suspect { failures: 0, due: now, answered: false });
        }
    }

    /// Forgets those that are no endpoints any more, and those that answered long enough ago.
    fn retain(&mut self, now: Instant, is_endpoint: impl Fn(SocketAddr) -> bool) {
        self.known.retain(|endpoint, suspect| is_endpoint(*endpoint) && !(suspect.answered && now >= suspect.due));
    }

    /// When there is something to do next.
    fn next(&self) -> Option<Instant> {
        self.known.values().map(|suspect| suspect.due).min()
    }

    /// Those that are to be called now.
    fn due(&self, now: Instant) -> Vec<SocketAddr> {
        let is_due = |suspect: &Suspect| !suspect.answered && now >= suspect.due;
        self.known.iter().filter(|(_, suspect)| is_due(suspect)).map(|(endpoint, _)| *endpoint).collect()
    }

    /// Takes in whether an endpoint answered, or nothing if this host could not call it. Returns whether it turned silent
    /// (true) or came back (false).
    fn note(&mut self, endpoint: SocketAddr, answered: Option<bool>, now: Instant) -> Option<bool> {
        let suspect = self.known.get_mut(&endpoint)?;
        let was_silent = suspect.is_silent();
        match answered {
            Some(true) => *suspect = Suspect { failures: 0, due: now + TRUSTED, answered: true },
            Some(false) => {
                suspect.failures = suspect.failures.saturating_add(1);
                let doubled = FIRST_PAUSE.saturating_mul(1 << (suspect.failures - 1).min(16));
                suspect.due = now + doubled.min(self.max_pause);
            }
            None => suspect.due = now + self.max_pause.min(TRUSTED),
        }
        let is_silent = suspect.is_silent();
        (is_silent != was_silent).then_some(is_silent)
    }

    fn silent(&self) -> HashSet<SocketAddr> {
        self.known.iter().filter(|(_, suspect)| suspect.is_silent()).map(|(endpoint, _)| *endpoint).collect()
    }
}

impl Suspect {
    fn is_silent(&self) -> bool {
        self.failures >= SILENT_AFTER
    }
}

/// Begins to judge suspects until the agent stops; nothing where the settings don't want it.
pub(super) fn start(
    config: Arc<Config>,
    catalog: Arc<CatalogStore>,
    metrics: DatapathMetrics,
    shutdown: &Shutdown,
) -> Option<Suspicions> {
    let max_pause = Duration::from_secs(config.silent_check_seconds);
    if max_pause.is_zero() {
        return None;
    }
    let (suspicions, suspected) = mpsc::channel(QUEUE);
    let judge = Judge { config, catalog, metrics, suspects: Suspects::new(max_pause), shown: HashSet::new() };
    let stopping = shutdown.stopping().clone();
    shutdown.spawn(async move {
        tokio::select! {
            () = judge.run(suspected) => {}
            () = stopping.cancelled() => {}
        }
    });
    Some(suspicions)
}

struct Judge {
    config: Arc<Config>,
    catalog: Arc<CatalogStore>,
    metrics: DatapathMetrics,
    suspects: Suspects,
    /// What the catalog was told.
    shown: HashSet<SocketAddr>,
}

impl Judge {
    async fn run(mut self, mut suspected: mpsc::Receiver<SocketAddr>) {
        let mut generations = self.catalog.subscribe();
        loop {
            let next = self.suspects.next();
            tokio::select! {
                endpoint = suspected.recv() => match endpoint {
                    Some(endpoint) if self.is_direct(endpoint) => self.suspects.suspect(endpoint, Instant::now()),
                    Some(_) => continue,
                    // Nobody is left who could tell.
                    None => return,
                },
                () = tokio::time::sleep_until(next.unwrap_or_else(Instant::now).into()), if next.is_some() => {}
                // Endpoints that are gone are forgotten at once.
                changed = generations.changed(), if next.is_some() => if changed.is_err() {
                    return;
                },
            }
            generations.mark_unchanged();
            self.judge().await;
        }
    }

    /// Whether this node calls the endpoint by its own address. Of others, those that call them know more.
    fn is_direct(&self, endpoint: SocketAddr) -> bool {
        let catalog = self.catalog.peek();
        let reach = |endpoint: &Arc<Endpoint>| self.config.viewpoint(&catalog).reach(&catalog, endpoint);
        matches!(catalog.endpoint_at(endpoint, Protocol::Tcp).map(reach), Some(Reach::Local | Reach::Direct))
    }

    async fn judge(&mut self) {
        let catalog = self.catalog.snapshot();
        self.suspects.retain(Instant::now(), |endpoint| catalog.endpoint_at(endpoint, Protocol::Tcp).is_some());
        let due = self.suspects.due(Instant::now());
        let targets = due.into_iter().map(|endpoint| (endpoint, Protocol::Tcp)).collect();
        for ((endpoint, _), answered) in checks::round(targets).await {
            match self.suspects.note(endpoint, answered, Instant::now()) {
                Some(true) => {
                    self.metrics.turned_silent();
                    tracing::warn!(%endpoint, "an endpoint takes no connections: others are chosen where there are others");
                }
                Some(false) => tracing::info!(%endpoint, "an endpoint takes connections again"),
                None => {}
            }
        }
        let silent = self.suspects.silent();
        if silent != self.shown {
            self.catalog.set_silent(silent.clone());
            self.catalog.publish();
            self.metrics.silent(silent.len());
            self.shown = silent;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn endpoint(last: u16) -> SocketAddr {
        SocketAddr::from(([10, 244, 1, 5], last))
    }

    #[test]
    fn one_failed_call_moves_nothing_and_two_do_until_it_answers() {
        let (mut suspects, begin) = (Suspects::new(15 * SECOND), Instant::now());
        assert_eq!(suspects.next(), None);
        suspects.suspect(endpoint(1), begin);
        assert_eq!(suspects.due(begin), [endpoint(1)]);
        assert_eq!(suspects.note(endpoint(1), Some(false), begin), None);
        assert!(suspects.silent().is_empty());
        assert!(suspects.due(begin).is_empty());
        let mut now = begin + SECOND;
        assert_eq!(suspects.note(endpoint(1), Some(false), now), Some(true));
        assert_eq!(suspects.silent(), HashSet::from([endpoint(1)]));
        let mut pauses = Vec::new();
        for _ in 0..6 {
            suspects.suspect(endpoint(1), now);
            let next = suspects.next().unwrap();
            pauses.push((next - now).as_secs());
            now = next;
            assert_eq!(suspects.due(now), [endpoint(1)]);
            assert_eq!(suspects.note(endpoint(1), Some(false), now), None);
        }
        assert_eq!(pauses, [1, 2, 4, 8, 15, 15]);
        assert_eq!(suspects.note(endpoint(1), Some(true), now), Some(false));
        assert!(suspects.silent().is_empty());
    }

    #[test]
    fn what_answers_is_left_alone_for_a_while_and_what_is_no_endpoint_is_forgotten() {
        let (mut suspects, begin) = (Suspects::new(15 * SECOND), Instant::now());
        suspects.suspect(endpoint(1), begin);
        assert_eq!(suspects.note(endpoint(1), Some(true), begin), None);
        suspects.suspect(endpoint(1), begin + SECOND);
        assert!(suspects.due(begin + SECOND).is_empty());
        suspects.retain(begin + TRUSTED, |_| true);
        suspects.suspect(endpoint(1), begin + TRUSTED);
        assert_eq!(suspects.due(begin + TRUSTED), [endpoint(1)]);
        for _ in 0..2 {
            suspects.note(endpoint(1), Some(false), begin + TRUSTED);
        }
        suspects.retain(begin + TRUSTED, |_| false);
        assert!(suspects.silent().is_empty() && suspects.next().is_none());
    }

    #[test]
    fn a_host_that_can_call_nobody_judges_nobody_and_suspects_are_bounded() {
        let (mut suspects, begin) = (Suspects::new(15 * SECOND), Instant::now());
        suspects.suspect(endpoint(1), begin);
        for _ in 0..5 {
            assert_eq!(suspects.note(endpoint(1), None, begin), None);
        }
        assert!(suspects.next().unwrap() > begin);
        for port in 0..2000 {
            suspects.suspect(endpoint(port), begin);
        }
        assert_eq!(suspects.known.len(), MAX_SUSPECTS);
    }
}
