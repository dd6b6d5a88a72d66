//! Whether endpoints answer: TCP connections to those of this node and of its network, judged by several in a row.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use edgemesh_mesh::{Catalog, Observed, Viewpoint, choice::Reach, model::Protocol};
use futures::{StreamExt as _, stream};
use tokio::{net::TcpStream, time::timeout};

use super::message::{Held, Report};
use crate::overlay::is_of_this_host;

/// Endpoints that are looked at; those of this node come first.
const MAX_ENDPOINTS: usize = 2048;
/// Connections that are made at a time.
const CONCURRENCY: usize = 64;
const CONNECT_DEADLINE: Duration = Duration::from_secs(1);
/// Failures in a row after which an endpoint is dead.
const DEAD_AFTER: u32 = 3;
/// Successes in a row after which a dead endpoint is back.
const BACK_AFTER: u32 = 2;

/// What is known of one endpoint.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Seen {
    failures: u32,
    successes: u32,
    /// Whether it ever answered to this node.
    answered: bool,
    /// What is held of it: nothing until it was dead once, for then the API's word is still as good.
    answers: Option<bool>,
}

impl Seen {
    /// Takes a result in. Returns whether it turned dead or came back.
    fn note(&mut self, answered: bool) -> bool {
        let before = self.answers;
        self.answered |= answered;
        if answered {
            (self.failures, self.successes) = (0, self.successes.saturating_add(1));
            if self.answers == Some(false) && self.successes >= BACK_AFTER {
                self.answers = Some(true);
            }
        } else {
            (self.failures, self.successes) = (self.failures.saturating_add(1), 0);
            if self.failures >= DEAD_AFTER {
                self.answers = Some(false);
            }
        }
        self.answers != before
    }
}

/// What is known of all.
#[derive(Debug, Default)]
pub(super) struct Checks {
    seen: HashMap<SocketAddr, Seen>,
}

impl Checks {
    /// Takes the results of a round in, and what other nodes said of their endpoints; endpoints that were part of neither are
    /// forgotten. Returns those that turned dead (false) or came back.
    pub(super) fn note(
        &mut self,
        results: &[(SocketAddr, Option<bool>)],
        followed: &[(SocketAddr, Held)],
    ) -> Vec<(SocketAddr, bool)> {
        let mut turned = Vec::new();
        let mut seen = HashMap::with_capacity(results.len() + followed.len());
        for &(endpoint, answered) in results {
            let mut known = self.seen.remove(&endpoint).unwrap_or_default();
            if let Some(answered) = answered
                && known.note(answered)
            {
                turned.push((endpoint, answered));
            }
            seen.insert(endpoint, known);
        }
        for &(endpoint, held) in followed {
            let answers = held.answers();
            let before = self.seen.remove(&endpoint).and_then(|known| known.answers);
            if before != answers && (before, answers) != (None, Some(true)) {
                turned.push((endpoint, answers != Some(false)));
            }
            // Own checks, once they have to do again, begin with what was said last.
            seen.insert(endpoint, Seen { answers, ..Seen::default() });
        }
        self.seen = seen;
        turned
    }

    /// What is held of these endpoints, for other nodes. Those that never answered and are not dead yet are left out: nothing is
    /// known of them.
    pub(super) fn report(&self, own: &[SocketAddr]) -> Report {
        let held = |seen: &Seen| match seen.answers {
            Some(false) => Some(Held::Dead),
            Some(true) => Some(Held::Back),
            None => seen.answered.then_some(Held::AsKnown),
        };
        own.iter().filter_map(|endpoint| Some((*endpoint, held(self.seen.get(endpoint)?)?))).collect()
    }

    /// What takes the place of what the API says.
    pub(super) fn observed(&self) -> Observed {
        let mut observed = Observed::default();
        for (endpoint, answers) in self.seen.iter().filter_map(|(endpoint, seen)| Some((*endpoint, seen.answers?))) {
            observed.endpoints.insert(endpoint, answers);
        }
        // An address is dead when all that is known of it is.
        let mut of_address: HashMap<IpAddr, Vec<Option<bool>>> = HashMap::new();
        for (endpoint, seen) in &self.seen {
            of_address.entry(endpoint.ip()).or_default().push(seen.answers);
        }
        for (address, answers) in of_address {
            if answers.iter().all(|answers| *answers == Some(false)) {
                observed.addresses.insert(address, false);
            } else if answers.contains(&Some(true)) {
                observed.addresses.insert(address, true);
            }
        }
        observed
    }
}

/// The TCP endpoints to look at, with their nodes: those on this node, then those in its network.
pub(super) fn endpoints(catalog: &Catalog, viewpoint: &Viewpoint) -> Vec<(Arc<str>, SocketAddr)> {
    let mut found = BTreeMap::new();
    let ports = catalog.services().flat_map(|service| &service.ports).filter(|port| port.protocol == Protocol::Tcp);
    for endpoint in ports.flat_map(|port| &port.endpoints).filter(|endpoint| !endpoint.terminating) {
        let address = SocketAddr::new(endpoint.address, endpoint.port);
        let Some(node) = catalog.node_of_endpoint(endpoint) else { continue };
        match viewpoint.reach(catalog, endpoint) {
            // An address that two nodes claim has the first one's word.
            Reach::Local => drop(found.insert((0, address), node)),
            Reach::Direct => drop(found.entry((1, address)).or_insert(node)),
            // Of another network: nothing that this network could know better.
            Reach::Tunnel { .. } => {}
        }
    }
    found.into_iter().map(|((_, address), node)| (node, address)).take(MAX_ENDPOINTS).collect()
}

/// One connection to each. No result where this host itself could not make one.
pub(super) async fn round(endpoints: Vec<SocketAddr>) -> Vec<(SocketAddr, Option<bool>)> {
    let check = |endpoint: SocketAddr| async move {
        let answered = match timeout(CONNECT_DEADLINE, TcpStream::connect(endpoint)).await {
            Ok(Ok(_)) => Some(true),
            Ok(Err(error)) => (!is_of_this_host(&error)).then_some(false),
            Err(_) => Some(false),
        };
        (endpoint, answered)
    };
    stream::iter(endpoints).map(check).buffer_unordered(CONCURRENCY).collect().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_dead_after_three_failures_and_back_after_two_successes() {
        let endpoint: SocketAddr = "10.244.1.5:80".parse().unwrap();
        let mut checks = Checks::default();
        let mut turned = Vec::new();
        for (at, answered) in
            [true, false, false, true, false, false, false, false, true, false, true, true].into_iter().enumerate()
        {
            for (_, alive) in checks.note(&[(endpoint, Some(answered))], &[]) {
                turned.push((at, alive));
            }
        }
        assert_eq!(turned, [(6, false), (11, true)]);
        assert!(checks.observed().endpoints[&endpoint]);
        checks.note(&[], &[]);
        assert_eq!(checks.observed(), Observed::default(), "it is no endpoint any more");
    }

    #[test]
    fn what_was_never_dead_is_left_to_the_api_and_an_address_is_dead_with_all_its_ports() {
        let [one, other]: [SocketAddr; 2] = ["10.244.1.5:80", "10.244.1.5:81"].map(|text| text.parse().unwrap());
        let mut checks = Checks::default();
        for _ in 0..5 {
            checks.note(&[(one, Some(true)), (other, Some(false))], &[]);
        }
        assert_eq!(checks.observed().endpoints, HashMap::from([(other, false)]));
        assert!(checks.observed().addresses.is_empty());
        for _ in 0..5 {
            checks.note(&[(one, Some(false)), (other, None)], &[]);
        }
        assert_eq!(checks.observed().addresses, HashMap::from([(one.ip(), false)]));
    }

    #[test]
    fn what_another_node_said_is_where_own_checks_begin_and_what_never_answered_is_not_reported() {
        let endpoint: SocketAddr = "10.244.1.5:80".parse().unwrap();
        let mut checks = Checks::default();
        assert_eq!(checks.note(&[], &[(endpoint, Held::Dead)]), [(endpoint, false)]);
        checks.note(&[(endpoint, Some(true))], &[]);
        assert!(!checks.observed().endpoints[&endpoint], "one answer is not enough");
        assert_eq!(checks.note(&[], &[(endpoint, Held::AsKnown)]), [(endpoint, true)]);
        assert_eq!(
            checks.observed(),
            Observed::default(),
            "a pod that its node holds to be as it was is no more ready for it"
        );

        let mut checks = Checks::default();
        checks.note(&[(endpoint, Some(false))], &[]);
        assert_eq!(checks.report(&[endpoint]), Report::new());
        for (answered, held) in
            [(true, Held::AsKnown), (false, Held::AsKnown), (false, Held::AsKnown), (false, Held::Dead)]
        {
            checks.note(&[(endpoint, Some(answered))], &[]);
            assert_eq!(checks.report(&[endpoint]), Report::from([(endpoint, held)]));
        }
    }
}
