//! Passive health: an endpoint that could not be reached is ejected, which means that new connections pass it over for a
//! while, and then one of them tries it again.
//!
//! The times grow with each failure in a row, up to a bound, and differ a little from process to process, so that not all try
//! at the same moment. If all endpoints of a choice are ejected, connections go to those that would be chosen next, farther
//! away; if all that may be used at all are ejected, all of them are used: a wrong guess must not take a Service away. No
//! decision here reads a clock, and nothing is sent.

use std::{
    collections::HashMap,
    hash::{Hash, Hasher},
    net::SocketAddr,
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use k8s_openapi::jiff::Timestamp;
use parking_lot::Mutex;

use crate::{
    catalog::Catalog,
    choice::{Call, Candidates, Explanation, PassedOver, Viewpoint},
    model::{Endpoint, Protocol, ServicePort},
};

/// Times and bounds of ejection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HealthSettings {
    /// Time of the first ejection; each further failure in a row doubles it.
    pub first: Duration,
    /// Longest ejection. Zero ejects nothing.
    pub max: Duration,
    /// How long others keep away from an endpoint that one connection tries again. It ends sooner when that has an outcome.
    pub trial: Duration,
    /// Endpoints that are remembered; of more, those whose time ends first are forgotten.
    pub entries: usize,
}

impl Default for HealthSettings {
    fn default() -> Self {
        Self {
            first: Duration::from_secs(2),
            max: Duration::from_secs(60),
            trial: Duration::from_secs(15),
            entries: 4096,
        }
    }
}

/// What is ejected: an address, its port, and the protocol. One pod behind several Services is one endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct EndpointKey {
    /// Address and port.
    pub address: SocketAddr,
    /// Protocol.
    pub protocol: Protocol,
}

impl EndpointKey {
    /// The key of an endpoint of the catalog.
    pub fn of(endpoint: &Endpoint, protocol: Protocol) -> Self {
        Self { address: SocketAddr::new(endpoint.address, endpoint.port), protocol }
    }
}

/// An ejected endpoint, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ejected {
    /// Which.
    pub endpoint: EndpointKey,
    /// How often in a row it could not be reached.
    pub failures: u32,
    /// How much longer it is passed over.
    pub left: Duration,
}

/// Which endpoints could not be reached lately.
#[derive(Debug)]
pub struct Health {
    settings: HealthSettings,
    seed: u64,
    state: Mutex<State>,
    /// Ejections in `state`: while nothing is wrong, no lock is taken.
    known: AtomicUsize,
}

#[derive(Debug, Default)]
struct State {
    ejections: HashMap<EndpointKey, Ejection>,
    /// When none of them means anything any more. Those of endpoints that are gone would stay otherwise.
    obsolete: Option<Instant>,
}

#[derive(Debug)]
struct Ejection {
    failures: u32,
    since: Instant,
    /// From then on a connection may try it.
    until: Instant,
    /// One is trying it.
    trial: bool,
}

impl Health {
    /// Nothing is ejected yet. `seed` makes the times of this process differ from those of others.
    pub fn new(settings: HealthSettings, seed: u64) -> Self {
        Self { settings, seed, state: Mutex::default(), known: AtomicUsize::new(0) }
    }

    /// The endpoints for a connection that has tried some in vain: those that the rules choose and that are not ejected, else
    /// such ones farther away, else ejected ones.
    pub fn candidates(
        &self,
        from: &Viewpoint,
        catalog: &Catalog,
        port: &ServicePort,
        call: Call,
        tried: &PassedOver,
        now: Instant,
    ) -> Candidates {
        let ejected = self.ejected_of(port, now);
        if !ejected.is_empty() {
            let healthy = from.candidates_besides(catalog, port, call, &ejected.union(tried).copied().collect());
            if !healthy.endpoints.is_empty() {
                return healthy;
            }
        }
        from.candidates_besides(catalog, port, call, tried)
    }

    /// The choice of a connection that has tried none yet, with the rule that removed each endpoint.
    pub fn explain(
        &self,
        from: &Viewpoint,
        catalog: &Catalog,
        port: &ServicePort,
        call: Call,
        now: Instant,
    ) -> Explanation {
        let healthy = from.explain(catalog, port, call, &self.ejected_of(port, now));
        if healthy.candidates.endpoints.is_empty() {
            return from.explain(catalog, port, call, &PassedOver::new());
        }
        healthy
    }

    /// Whether nothing is remembered of any endpoint: then the rules alone choose.
    pub fn is_clear(&self) -> bool {
        self.known.load(Ordering::Relaxed) == 0
    }

    fn ejected_of(&self, port: &ServicePort, now: Instant) -> PassedOver {
        if self.is_clear() {
            return PassedOver::new();
        }
        let mut state = self.state.lock();
        if state.obsolete.is_some_and(|at| now >= at) {
            *state = State::default();
            self.known.store(0, Ordering::Relaxed);
            return PassedOver::new();
        }
        let keys = port.endpoints.iter().map(|endpoint| EndpointKey::of(endpoint, port.protocol));
        let ejected = keys.filter(|key| state.ejections.get(key).is_some_and(|ejection| now < ejection.until));
        ejected.map(|key| key.address).collect()
    }

    /// A connection is about to try the endpoint. If its ejection has ended, the others keep away until the outcome is known.
    pub fn trying(&self, endpoint: EndpointKey, now: Instant) {
        if self.is_clear() {
            return;
        }
        let mut state = self.state.lock();
        let until = now + self.settings.trial;
        if let Some(ejection) = state.ejections.get_mut(&endpoint)
            && now >= ejection.until
        {
            ejection.trial = true;
            ejection.until = until;
            state.obsolete = state.obsolete.max(Some(until + self.memory()));
        }
    }

    /// It was reached: it is as good as any. Says whether that ended an ejection.
    pub fn reached(&self, endpoint: EndpointKey) -> bool {
        if self.is_clear() {
            return false;
        }
        let mut state = self.state.lock();
        let was_there = state.ejections.remove(&endpoint).is_some();
        self.known.store(state.ejections.len(), Ordering::Relaxed);
        was_there
    }

    /// An attempt that began at `began` could not reach it. Gives the time for which it is ejected now, or nothing when this
    /// failure changes nothing: it belongs to an attempt that others have already reported about.
    pub fn failed(&self, endpoint: EndpointKey, began: Instant, now: Instant) -> Option<Duration> {
        if self.settings.max.is_zero() || self.settings.entries == 0 {
            return None;
        }
        let mut state = self.state.lock();
        let before = match state.ejections.get(&endpoint) {
            Some(ejection) if began < ejection.since || (now < ejection.until && !ejection.trial) => return None,
            Some(ejection) if now < ejection.until + self.memory() => ejection.failures,
            _ => 0,
        };
        let failures = before.saturating_add(1);
        let time = self.time(endpoint, failures);
        self.make_room(&mut state.ejections, endpoint, now);
        state.ejections.insert(endpoint, Ejection { failures, since: now, until: now + time, trial: false });
        state.obsolete = state.obsolete.max(Some(now + time + self.memory()));
        self.known.store(state.ejections.len(), Ordering::Relaxed);
        Some(time)
    }

    /// What is ejected, the longest first.
    pub fn ejected(&self, now: Instant) -> Vec<Ejected> {
        let state = self.state.lock();
        let mut all: Vec<_> = state
            .ejections
            .iter()
            .filter(|(_, ejection)| now < ejection.until)
            .map(|(endpoint, ejection)| Ejected {
                endpoint: *endpoint,
                failures: ejection.failures,
                left: ejection.until.saturating_duration_since(now),
            })
            .collect();
        all.sort_by_key(|ejected| (std::cmp::Reverse(ejected.left), ejected.endpoint.address));
        all
    }

    /// What is ejected as JSON, for a debug page.
    pub fn debug_view(&self, now: Instant) -> serde_json::Value {
        let page = self.ejected(now).into_iter().map(|ejected| {
            let until = Timestamp::now().checked_add(ejected.left).ok();
            serde_json::json!({
                "endpoint": ejected.endpoint.address,
                "protocol": ejected.endpoint.protocol,
                "failures": ejected.failures,
                "secondsLeft": ejected.left.as_secs_f32(),
                "until": until.map(|until| until.to_string()),
            })
        });
        serde_json::json!({ "ejected": page.collect::<Vec<_>>() })
    }

    /// How long after an ejection its failures still count.
    fn memory(&self) -> Duration {
        self.settings.max * 2
    }

    /// The doubled first time within the bound, less up to a quarter.
    fn time(&self, endpoint: EndpointKey, failures: u32) -> Duration {
        let doubled = self.settings.first.saturating_mul(1 << (failures - 1).min(20)).min(self.settings.max);
        let mut hasher = std::hash::DefaultHasher::new();
        (self.seed, endpoint, failures).hash(&mut hasher);
        let share = (hasher.finish() % 1024) as f64 / 4096.0;
        doubled.mul_f64(1.0 - share)
    }

    fn make_room(&self, state: &mut HashMap<EndpointKey, Ejection>, endpoint: EndpointKey, now: Instant) {
        if state.len() < self.settings.entries || state.contains_key(&endpoint) {
            return;
        }
        state.retain(|_, ejection| now < ejection.until);
        while state.len() >= self.settings.entries {
            let Some(soonest) = state.iter().min_by_key(|(_, ejection)| ejection.until).map(|(key, _)| *key) else {
                return;
            };
            state.remove(&soonest);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::model::ServiceName;

    const SECOND: Duration = Duration::from_secs(1);

    fn key(last: u8) -> EndpointKey {
        EndpointKey { address: ([10, 244, 0, last], 80).into(), protocol: Protocol::Tcp }
    }

    /// A Service port with three endpoints.
    fn port(protocol: Protocol) -> ServicePort {
        let endpoint = |last: u8| Endpoint {
            address: [10, 244, 0, last].into(),
            port: 80,
            node: None,
            zone: None,
            zone_hints: None,
            hostname: None,
            pod: None,
            ready: true,
            serving: true,
            terminating: false,
            silent: false,
        };
        ServicePort {
            service: ServiceName { namespace: "default".into(), name: "web".into() },
            name: "".into(),
            protocol,
            port: 80,
            node_port: None,
            app_protocol: None,
            endpoints: [1, 2, 3].map(|last| Arc::new(endpoint(last))).into(),
        }
    }

    /// The last bytes of the addresses that are not ejected.
    fn usable(health: &Health, now: Instant) -> Vec<u8> {
        let ejected = health.ejected_of(&port(Protocol::Tcp), now);
        (1..=3).filter(|last| !ejected.contains(&key(*last).address)).collect()
    }

    fn health() -> Health {
        Health::new(HealthSettings::default(), 1)
    }

    #[test]
    fn an_endpoint_that_failed_is_passed_over_and_comes_back_by_itself() {
        let (health, begin) = (health(), Instant::now());
        assert_eq!(usable(&health, begin), [1, 2, 3]);
        let time = health.failed(key(2), begin, begin).unwrap();
        assert!(time > SECOND && time <= 2 * SECOND, "{time:?}");
        assert_eq!(usable(&health, begin), [1, 3]);
        assert_eq!(usable(&health, begin + time), [1, 2, 3]);
        // The same address with another protocol is another endpoint.
        assert!(health.ejected_of(&port(Protocol::Udp), begin).is_empty());
    }

    #[test]
    fn an_endpoint_that_never_comes_back_is_forgotten_in_the_end() {
        let (health, begin) = (health(), Instant::now());
        let time = health.failed(key(2), begin, begin).unwrap();
        health.trying(key(2), begin + time);
        let end = begin + time + HealthSettings::default().trial + health.memory();
        assert_eq!(usable(&health, end - SECOND), [1, 2, 3]);
        assert!(!health.is_clear(), "its failures still count");
        assert_eq!(usable(&health, end), [1, 2, 3]);
        assert!(health.is_clear());
    }

    #[test]
    fn the_time_doubles_with_each_failure_in_a_row_up_to_its_bound() {
        let (health, mut now) = (health(), Instant::now());
        let mut longest = Duration::ZERO;
        for failures in 0..12 {
            let time = health.failed(key(1), now, now).unwrap();
            let whole = (2 * SECOND).saturating_mul(1 << failures).min(60 * SECOND);
            assert!(time <= whole && time >= whole.mul_f64(0.75), "{failures}: {time:?} of {whole:?}");
            longest = longest.max(time);
            now += time;
            health.trying(key(1), now);
        }
        assert!(longest > 45 * SECOND);
        assert!(health.reached(key(1)));
        assert!(health.failed(key(1), now, now).unwrap() <= 2 * SECOND, "a success ends the row");
    }

    #[test]
    fn many_failures_of_the_same_moment_count_once() {
        let (health, begin) = (health(), Instant::now());
        assert!(health.failed(key(1), begin, begin + SECOND).is_some());
        for _ in 0..100 {
            assert_eq!(health.failed(key(1), begin, begin + 2 * SECOND), None);
            assert_eq!(health.failed(key(1), begin, begin + 100 * SECOND), None, "it began before the ejection");
        }
        assert_eq!(health.ejected(begin + SECOND)[0].failures, 1);
    }

    #[test]
    fn one_connection_tries_an_endpoint_again_while_the_others_keep_away() {
        let (health, begin) = (health(), Instant::now());
        let after = begin + health.failed(key(1), begin, begin).unwrap();
        assert_eq!(usable(&health, after), [1, 2, 3]);
        health.trying(key(1), after);
        assert_eq!(usable(&health, after), [2, 3]);
        // Nothing is heard of that one: another may try.
        assert_eq!(usable(&health, after + 15 * SECOND), [1, 2, 3]);
        health.trying(key(1), after + 15 * SECOND);
        assert!(health.failed(key(1), after + 15 * SECOND, after + 16 * SECOND).unwrap() > 2 * SECOND);
        assert_eq!(usable(&health, after + 16 * SECOND), [2, 3]);
        assert!(health.reached(key(1)));
        assert_eq!(usable(&health, after + 16 * SECOND), [1, 2, 3]);
    }

    #[test]
    fn old_failures_are_forgotten_and_memory_is_bounded() {
        let (health, begin) =
            (Health::new(HealthSettings { entries: 2, ..HealthSettings::default() }, 1), Instant::now());
        for last in 1..=3 {
            health.failed(key(last), begin, begin + u32::from(last) * SECOND);
        }
        assert_eq!(health.state.lock().ejections.len(), 2);
        let later = begin + 600 * SECOND;
        assert!(health.failed(key(3), later, later).unwrap() <= 2 * SECOND);
    }

    #[test]
    fn a_bound_of_zero_ejects_nothing() {
        let (health, now) =
            (Health::new(HealthSettings { max: Duration::ZERO, ..HealthSettings::default() }, 1), Instant::now());
        assert_eq!(health.failed(key(1), now, now), None);
        assert_eq!(usable(&health, now), [1, 2, 3]);
    }
}
