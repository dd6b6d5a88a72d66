//! Which endpoints the clients of Services with session affinity have: one keeps its endpoint until that is none any more, or until
//! it has not called for the Service's timeout (Kubernetes, "Virtual IPs and Service Proxies": session affinity).

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use edgemesh_mesh::{Candidates, model::Endpoint};
use parking_lot::Mutex;

use crate::node_local::ServicePortName;

/// Pairs of client and Service port that are remembered, as many as the maps hold for sockets that go to endpoints directly.
const MAX_CLIENTS: usize = 8192;
/// How many are forgotten at once when there are too many, so that the search is not done for each new one.
const FORGOTTEN_AT_ONCE: usize = MAX_CLIENTS / 32;

/// All clients.
#[derive(Debug, Default)]
pub(super) struct Affinity {
    clients: Mutex<HashMap<(IpAddr, ServicePortName), Kept>>,
}

/// What a client has.
#[derive(Debug)]
struct Kept {
    endpoint: SocketAddr,
    /// The number of its choice: the first one is the same on every node, and after a restart.
    round: u64,
    last: Instant,
}

impl Affinity {
    /// The endpoint for a client that calls now. It has one of `all`, which the rules choose while nothing is passed over, and keeps
    /// it also while that is not among the `usable`: then it gets one of these, always the same.
    pub(super) fn endpoint(
        &self,
        client: IpAddr,
        port: &ServicePortName,
        timeout: Duration,
        now: Instant,
        all: &Candidates,
        usable: &Candidates,
    ) -> Option<Arc<Endpoint>> {
        let (kept, round) = self.keep(client, port, timeout, now, all);
        let stays = kept.and_then(|kept| usable.endpoints.iter().find(|endpoint| address_of(endpoint) == kept));
        stays.or_else(|| usable.pick_for_client(client, round)).cloned()
    }

    /// What the client has from now on, if it can have anything, and the number of its choice.
    fn keep(
        &self,
        client: IpAddr,
        port: &ServicePortName,
        timeout: Duration,
        now: Instant,
        all: &Candidates,
    ) -> (Option<SocketAddr>, u64) {
        let mut clients = self.clients.lock();
        let choose = |round| all.pick_for_client(client, round).map(|endpoint| address_of(endpoint));
        if let Some(kept) = clients.get_mut(&(client, port.clone())) {
            let timed_out = now.saturating_duration_since(kept.last) >= timeout;
            kept.last = now;
            if timed_out {
                kept.round = rand::random();
            }
            if timed_out || !all.endpoints.iter().any(|endpoint| address_of(endpoint) == kept.endpoint) {
                let Some(endpoint) = choose(kept.round) else { return (None, kept.round) };
                kept.endpoint = endpoint;
            }
            return (Some(kept.endpoint), kept.round);
        }
        let Some(endpoint) = choose(0) else { return (None, 0) };
        if clients.len() >= MAX_CLIENTS {
            forget_some(&mut clients);
        }
        clients.insert((client, port.clone()), Kept { endpoint, round: 0, last: now });
        (Some(endpoint), 0)
    }
}

/// Forgets those that have been silent for longest.
fn forget_some(clients: &mut HashMap<(IpAddr, ServicePortName), Kept>) {
    let mut times: Vec<Instant> = clients.values().map(|kept| kept.last).collect();
    let (_, newest, _) = times.select_nth_unstable(FORGOTTEN_AT_ONCE - 1);
    let newest = *newest;
    clients.retain(|_, kept| kept.last > newest);
}

fn address_of(endpoint: &Endpoint) -> SocketAddr {
    SocketAddr::new(endpoint.address, endpoint.port)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use edgemesh_mesh::{
        Tier,
        model::{Protocol, ServiceName},
    };

    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(10);

    fn port(name: &str) -> ServicePortName {
        let service = ServiceName { namespace: "default".into(), name: name.into() };
        ServicePortName { service, port: "".into(), protocol: Protocol::Tcp }
    }

    /// Endpoints 10.244.1.x.
    fn candidates(numbers: impl IntoIterator<Item = u8>) -> Candidates {
        let endpoint = |number| {
            Arc::new(Endpoint {
                address: [10, 244, 1, number].into(),
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
            })
        };
        Candidates { tier: Tier::Network, endpoints: numbers.into_iter().map(endpoint).collect(), spilled: false }
    }

    /// What each of some clients gets.
    fn calls(affinity: &Affinity, now: Instant, all: &Candidates, usable: &Candidates) -> Vec<IpAddr> {
        let call = |client| affinity.endpoint([10, 244, 0, client].into(), &port("web"), TIMEOUT, now, all, usable);
        (0..100).map(|client| call(client).unwrap().address).collect()
    }

    #[test]
    fn clients_keep_their_endpoints_until_these_are_gone() {
        let (affinity, now, three) = (Affinity::default(), Instant::now(), candidates(1..=3));
        let first = calls(&affinity, now, &three, &three);
        assert_eq!(first.iter().collect::<HashSet<_>>().len(), 3, "they are spread");
        let more = candidates(1..=20);
        assert_eq!(calls(&affinity, now, &more, &more), first);
        let less = candidates(2..=20);
        let second = calls(&affinity, now, &less, &less);
        let gone = IpAddr::from([10, 244, 1, 1]);
        for (before, after) in first.iter().zip(&second) {
            assert_eq!(before == after, *before != gone);
        }
        // It comes back, as another pod may with its address.
        assert_eq!(calls(&affinity, now, &more, &more), second);
        let none = candidates([]);
        let web = port("web");
        assert!(affinity.endpoint([10, 244, 0, 1].into(), &web, TIMEOUT, now, &none, &none).is_none());
    }

    #[test]
    fn clients_return_to_an_endpoint_that_was_passed_over() {
        let (affinity, now, all, some) = (Affinity::default(), Instant::now(), candidates(1..=4), candidates(2..=4));
        let first = calls(&affinity, now, &all, &all);
        let meanwhile = calls(&affinity, now, &all, &some);
        assert_eq!(calls(&affinity, now, &all, &some), meanwhile);
        assert_ne!(first, meanwhile);
        assert_eq!(calls(&affinity, now, &all, &all), first);
    }

    #[test]
    fn a_client_that_pauses_longer_than_the_timeout_chooses_anew() {
        let (affinity, begin, all) = (Affinity::default(), Instant::now(), candidates(1..=20));
        let first = calls(&affinity, begin, &all, &all);
        let short = TIMEOUT - Duration::from_secs(1);
        assert_eq!(calls(&affinity, begin + short, &all, &all), first);
        assert_eq!(calls(&affinity, begin + 2 * short, &all, &all), first, "each call begins the time again");
        let second = calls(&affinity, begin + 2 * short + TIMEOUT, &all, &all);
        assert_ne!(first, second);
        assert_eq!(calls(&affinity, begin + 3 * short + TIMEOUT, &all, &all), second);
    }

    #[test]
    fn the_clients_that_are_silent_for_longest_are_forgotten_first() {
        let (affinity, begin, all) = (Affinity::default(), Instant::now(), candidates(1..=4));
        for number in 0..=MAX_CLIENTS as u32 {
            let now = begin + Duration::from_millis(number.into());
            affinity.endpoint(IpAddr::V4(number.into()), &port("web"), TIMEOUT, now, &all, &all);
        }
        let clients = affinity.clients.lock();
        assert_eq!(clients.len(), MAX_CLIENTS + 1 - FORGOTTEN_AT_ONCE);
        let known = |number: usize| clients.contains_key(&(IpAddr::V4((number as u32).into()), port("web")));
        assert_eq!([FORGOTTEN_AT_ONCE - 1, FORGOTTEN_AT_ONCE, MAX_CLIENTS].map(known), [false, true, true]);
    }
}
