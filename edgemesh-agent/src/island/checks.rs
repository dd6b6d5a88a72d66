//! Whether endpoints answer: TCP connections to those of this node and of its network, judged by several in a row.
//!
//! Of pods with UDP ports only it is looked whether they are there: an attempt to connect that their kernel refuses says so, and no
//! program of theirs hears of it, as it would of a datagram. Silence says less than with TCP endpoints, since a firewall may
//! let nothing but UDP through; so it counts only for those that have answered before.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use edgemesh_mesh::{
    Catalog, Observed, Viewpoint,
    choice::Reach,
    model::{Endpoint, Protocol},
};
use futures::{StreamExt as _, stream};
use tokio::{net::TcpStream, time::timeout};

use super::message::{Held, Report};
use crate::overlay::is_of_this_host;

/// Endpoints that are looked at: TCP endpoints of this node first, then those of its network, then pods with UDP ports only.
const MAX_ENDPOINTS: usize = 2048;
/// Connections that are made at a time.
const CONCURRENCY: usize = 64;
const CONNECT_DEADLINE: Duration = Duration::from_secs(1);
/// Failures in a row after which an endpoint is dead.
const DEAD_AFTER: u32 = 3;
/// Successes in a row after which a dead endpoint is back.
const BACK_AFTER: u32 = 2;

/// What is looked at: a TCP endpoint, or a UDP endpoint for a pod that has no others.
pub(crate) type Target = (SocketAddr, Protocol);

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
    fn note(&mut self, protocol: Protocol, answered: bool) -> bool {
        if protocol == Protocol::Udp && !(answered || self.answered) {
            return false;
        }
        let before = self.answers;
        self.answered |= answered;
        if answered {
            (self.failures, self.successes) = (0, self.successes.saturating_add(1));
            if self.answers == Some(false) && self.successes >= BACK_AFTER {
                // That a pod is there again doesn't make its UDP endpoints ready: they are what the API said.
                self.answers = (protocol == Protocol::Tcp).then_some(true);
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
    /// Begins with what was observed before.
    pub(super) fn beginning_with(observed: &Observed) -> Self {
        let seen = |(endpoint, answers): (&SocketAddr, &bool)| {
            (*endpoint, Seen { answers: Some(*answers), ..Seen::default() })
        };
        Self { seen: observed.endpoints.iter().map(seen).collect() }
    }

    /// Takes the results of a round in, and what other nodes said of their endpoints; endpoints that were part of neither are
    /// forgotten. Returns those that turned dead (false) or came back.
    pub(super) fn note(
        &mut self,
        results: &[(Target, Option<bool>)],
        followed: &[(SocketAddr, Held)],
    ) -> Vec<(SocketAddr, bool)> {
        let mut turned = Vec::new();
        let mut seen = HashMap::with_capacity(results.len() + followed.len());
        for &((endpoint, protocol), answered) in results {
            let mut known = self.seen.remove(&endpoint).unwrap_or_default();
            if let Some(answered) = answered
                && known.note(protocol, answered)
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

/// What to look at, with its node.
pub(super) fn targets(catalog: &Catalog, viewpoint: &Viewpoint) -> Vec<(Arc<str>, Target)> {
    let of_protocol = |protocol| {
        let ports = catalog.services().flat_map(|service| &service.ports).filter(move |port| port.protocol == protocol);
        ports.flat_map(|port| &port.endpoints).filter(|endpoint| !endpoint.terminating)
    };
    let mut found = BTreeMap::new();
    let mut add = |endpoint: &Endpoint, protocol| {
        let Some(node) = catalog.node_of_endpoint(endpoint) else { return };
        let target = (SocketAddr::new(endpoint.address, endpoint.port), protocol);
        match viewpoint.reach(catalog, endpoint) {
            // An address that two nodes claim has the first one's word.
            Reach::Local => drop(found.insert((protocol, 0, target), node)),
            Reach::Direct => drop(found.entry((protocol, 1, target)).or_insert(node)),
            // Of another network: nothing that this network could know better.
            Reach::Tunnel { .. } => {}
        }
    };
    let mut addresses = HashSet::new();
    for endpoint in of_protocol(Protocol::Tcp) {
        addresses.insert(endpoint.address);
        add(endpoint, Protocol::Tcp);
    }
    for endpoint in of_protocol(Protocol::Udp) {
        // One for each address.
        if addresses.insert(endpoint.address) {
            add(endpoint, Protocol::Udp);
        }
    }
    found.into_iter().map(|((.., target), node)| (node, target)).take(MAX_ENDPOINTS).collect()
}

/// One connection to each. No result where this host itself could not make one.
pub(crate) async fn round(targets: Vec<Target>) -> Vec<(Target, Option<bool>)> {
    let check = |(endpoint, protocol): Target| async move {
        let answered = match timeout(CONNECT_DEADLINE, TcpStream::connect(endpoint)).await {
            Ok(Ok(_)) => Some(true),
            Ok(Err(error)) if is_of_this_host(&error) => None,
            Ok(Err(error)) => Some(protocol == Protocol::Udp && error.kind() == io::ErrorKind::ConnectionRefused),
            Err(_) => Some(false),
        };
        ((endpoint, protocol), answered)
    };
    stream::iter(targets).map(check).buffer_unordered(CONCURRENCY).collect().await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(endpoint: SocketAddr) -> Target {
        (endpoint, Protocol::Tcp)
    }

    #[test]
    fn an_endpoint_is_dead_after_three_failures_and_back_after_two_successes() {
        let endpoint: SocketAddr = "10.244.1.5:80".parse().unwrap();
        let mut checks = Checks::default();
        let mut turned = Vec::new();
        for (at, answered) in
            [true, false, false, true, false, false, false, false, true, false, true, true].into_iter().enumerate()
        {
            for (_, alive) in checks.note(&[(tcp(endpoint), Some(answered))], &[]) {
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
            checks.note(&[(tcp(one), Some(true)), (tcp(other), Some(false))], &[]);
        }
        assert_eq!(checks.observed().endpoints, HashMap::from([(other, false)]));
        assert!(checks.observed().addresses.is_empty());
        for _ in 0..5 {
            checks.note(&[(tcp(one), Some(false)), (tcp(other), None)], &[]);
        }
        assert_eq!(checks.observed().addresses, HashMap::from([(one.ip(), false)]));
    }

    #[test]
    fn what_another_node_said_is_where_own_checks_begin_and_what_never_answered_is_not_reported() {
        let endpoint: SocketAddr = "10.244.1.5:80".parse().unwrap();
        let mut checks = Checks::default();
        assert_eq!(checks.note(&[], &[(endpoint, Held::Dead)]), [(endpoint, false)]);
        checks.note(&[(tcp(endpoint), Some(true))], &[]);
        assert!(!checks.observed().endpoints[&endpoint], "one answer is not enough");
        assert_eq!(checks.note(&[], &[(endpoint, Held::AsKnown)]), [(endpoint, true)]);
        assert_eq!(
            checks.observed(),
            Observed::default(),
            "a pod that its node holds to be as it was is no more ready for it"
        );

        let mut checks = Checks::default();
        checks.note(&[(tcp(endpoint), Some(false))], &[]);
        assert_eq!(checks.report(&[endpoint]), Report::new());
        for (answered, held) in
            [(true, Held::AsKnown), (false, Held::AsKnown), (false, Held::AsKnown), (false, Held::Dead)]
        {
            checks.note(&[(tcp(endpoint), Some(answered))], &[]);
            assert_eq!(checks.report(&[endpoint]), Report::from([(endpoint, held)]));
        }
    }

    #[test]
    fn a_pod_with_udp_ports_only_is_dead_only_if_it_answered_before_and_no_more_ready_when_it_is_back() {
        let endpoint: SocketAddr = "10.244.1.5:5353".parse().unwrap();
        let mut checks = Checks::default();
        let mut note = |answered: bool| {
            let turned = checks.note(&[((endpoint, Protocol::Udp), Some(answered))], &[]);
            (turned.first().map(|(_, alive)| *alive), checks.observed().addresses)
        };
        let (dead, nothing) = (HashMap::from([(endpoint.ip(), false)]), HashMap::new());
        for _ in 0..5 {
            assert_eq!(note(false), (None, nothing.clone()), "nothing is known of it");
        }
        assert_eq!(note(true), (None, nothing.clone()));
        assert_eq!([note(false), note(false)], [(None, nothing.clone()), (None, nothing.clone())]);
        assert_eq!(note(false), (Some(false), dead.clone()));
        assert_eq!(note(true), (None, dead));
        assert_eq!(note(true), (Some(true), nothing));
    }
}
