//! Endpoint choice: which endpoints of a Service port a caller on a node uses, and how it reaches them.
//!
//! Readiness, the terminating fallback, `publishNotReadyAddresses`, `internalTrafficPolicy`, `trafficDistribution` and
//! topology hints follow Kubernetes ("Virtual IPs and Service Proxies"). Where they leave the choice open, the mesh adds
//! the order: the same node, then the same network, then the same zone, then the rest.

use std::{
    collections::HashSet,
    hash::{Hash, Hasher},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use edgemesh_api::names::DEFAULT_NETWORK;

use crate::{
    catalog::Catalog,
    model::{Endpoint, ServicePort, TrafficDistribution},
};

/// From where a choice is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Viewpoint {
    /// The node.
    pub node: Arc<str>,
    /// Its network.
    pub network: Arc<str>,
    /// Its zone, if known.
    pub zone: Option<Arc<str>>,
}

/// How an endpoint is reached from a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reach {
    /// It is on this node.
    Local,
    /// By its own address: in the same network, or not on a node of the cluster at all.
    Direct,
    /// Through the tunnel to its node.
    Tunnel {
        /// The endpoint's node.
        node: Arc<str>,
    },
}

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IpFamily {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl From<IpAddr> for IpFamily {
    fn from(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

/// How a Service port is called.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Call {
    /// Family that the endpoints must have: that of the Service address (Kubernetes, "IPv4/IPv6 dual-stack"). Any if left out.
    pub family: Option<IpFamily>,
    /// It is called at a node port, an external address or a load balancer's: `internalTrafficPolicy` is about cluster
    /// addresses only. `externalTrafficPolicy: Local` does not hold for callers on the nodes: it is there to keep the
    /// address of clients outside.
    pub external: bool,
    /// The caller is neither on this node nor one of its pods: `externalTrafficPolicy: Local` holds.
    pub from_outside: bool,
}

/// How near the chosen endpoints are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
pub enum Tier {
    /// On this node.
    Node,
    /// Reached directly in this network.
    Network,
    /// Reached through the tunnel, in this zone.
    Zone,
    /// Reached through the tunnel.
    Remote,
}

/// The endpoints that may be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidates {
    /// How near the farthest of them is.
    pub tier: Tier,
    /// The endpoints, in the catalog's order; empty when the Service has none that may be used.
    pub endpoints: Vec<Arc<Endpoint>>,
    /// They stand in for those that the rules prefer, which are all passed over.
    pub spilled: bool,
}

/// Endpoints that are not to be used, whatever the API says of them: they could not be reached.
pub type PassedOver = HashSet<SocketAddr>;

/// What removes an endpoint from a choice, in the order in which the rules are applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Rule {
    /// The address that is called is of the other family.
    Family,
    /// It is not ready, or terminating while others are ready.
    Condition,
    /// It is on another node, and the traffic policy is `Local`.
    TrafficPolicy,
    /// Topology hints keep it for other zones.
    Hints,
    /// `trafficDistribution` prefers others.
    Distribution,
    /// Others are nearer.
    Tier,
    /// Its node is not `Ready`, and those of others are.
    NodeNotReady,
    /// It is passed over, or takes no connections from this node.
    Ejection,
}

/// An endpoint, and what became of it in a choice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explained {
    /// The endpoint.
    pub endpoint: Arc<Endpoint>,
    /// How it would be reached.
    pub reach: Reach,
    /// How near it is.
    pub tier: Tier,
    /// What removed it; nothing if it was chosen.
    pub removed: Option<Rule>,
}

/// A choice and its reasons.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explanation {
    /// All endpoints of the port, in the catalog's order.
    pub endpoints: Vec<Explained>,
    /// Those chosen.
    pub candidates: Candidates,
}

impl Viewpoint {
    /// The viewpoint of a node as the catalog knows it; a node that it doesn't know is in the default network.
    pub fn of(catalog: &Catalog, node: &str) -> Self {
        match catalog.node(node) {
            Some(known) => {
                Self { node: Arc::clone(&known.name), network: Arc::clone(&known.network), zone: known.zone.clone() }
            }
            None => Self { node: node.into(), network: DEFAULT_NETWORK.into(), zone: None },
        }
    }

    /// How an endpoint is reached from here. An endpoint on a node that the catalog doesn't know is taken to be remote.
    pub fn reach(&self, catalog: &Catalog, endpoint: &Endpoint) -> Reach {
        let Some(name) = catalog.node_of_endpoint(endpoint) else { return Reach::Direct };
        if name == self.node {
            return Reach::Local;
        }
        match catalog.node(&name) {
            Some(node) if node.network == self.network => Reach::Direct,
            _ => Reach::Tunnel { node: name },
        }
    }

    /// The endpoints to use for a Service port that is called in a certain way.
    ///
    /// By default that is the nearest tier that has any. `trafficDistribution` and topology hints choose the zone or the
    /// node first, and strict spreading takes every endpoint that they leave. Among those chosen, endpoints on nodes that
    /// are `Ready` come first: the rest is used when there are no others.
    pub fn candidates_for(&self, catalog: &Catalog, port: &ServicePort, call: Call) -> Candidates {
        self.candidates_besides(catalog, port, call, &PassedOver::new())
    }

    /// The same choice without some endpoints. When all that it would give are passed over it spills: the rules choose again
    /// among the others. None is left when all that may be used at all are passed over.
    pub fn candidates_besides(
        &self,
        catalog: &Catalog,
        port: &ServicePort,
        call: Call,
        passed_over: &PassedOver,
    ) -> Candidates {
        self.choose(catalog, port, call, passed_over, |_, _| {})
    }

    /// The same choice, with the rule that removed each endpoint that was not chosen.
    pub fn explain(&self, catalog: &Catalog, port: &ServicePort, call: Call, passed_over: &PassedOver) -> Explanation {
        let mut removed: Vec<Option<Rule>> = vec![None; port.endpoints.len()];
        let candidates = self.choose(catalog, port, call, passed_over, |endpoint, rule| {
            let Some(at) = port.endpoints.iter().position(|known| Arc::ptr_eq(known, endpoint)) else { return };
            // An endpoint that had no place among the ready ones has one among the terminating, where another rule may remove
            // it. One that a rule removed keeps it.
            if removed[at].is_none_or(|rule| rule == Rule::Condition) {
                removed[at] = Some(rule);
            }
        });
        let chosen = |endpoint: &Arc<Endpoint>| candidates.endpoints.iter().any(|other| Arc::ptr_eq(other, endpoint));
        let endpoints = port.endpoints.iter().zip(removed).map(|(endpoint, removed)| Explained {
            endpoint: Arc::clone(endpoint),
            reach: self.reach(catalog, endpoint),
            tier: self.see(catalog, endpoint).tier,
            removed: removed.filter(|_| !chosen(endpoint)),
        });
        Explanation { endpoints: endpoints.collect(), candidates }
    }

    fn choose(
        &self,
        catalog: &Catalog,
        port: &ServicePort,
        call: Call,
        passed_over: &PassedOver,
        mut removed: impl FnMut(&Arc<Endpoint>, Rule),
    ) -> Candidates {
        let is_left = |endpoint: &Endpoint| !passed_over.contains(&SocketAddr::new(endpoint.address, endpoint.port));
        if port.endpoints.iter().any(|endpoint| endpoint.silent) {
            let answers = |endpoint: &Endpoint| !endpoint.silent && is_left(endpoint);
            let candidates = self.choose_among(catalog, port, call, answers, &mut removed);
            if !candidates.endpoints.is_empty() {
                return candidates;
            }
        }
        self.choose_among(catalog, port, call, is_left, &mut removed)
    }

    /// The choice without the endpoints that are not left: of those that the rules prefer, or else, when none of these is
    /// left, of the others.
    fn choose_among(
        &self,
        catalog: &Catalog,
        port: &ServicePort,
        call: Call,
        is_left: impl Fn(&Endpoint) -> bool,
        removed: &mut impl FnMut(&Arc<Endpoint>, Rule),
    ) -> Candidates {
        let mut found = self.preferred(catalog, port, call, |_| true, removed);
        let spills =
            !found.is_empty() && !keep_if_any(&mut found, |seen| is_left(seen.endpoint), Rule::Ejection, removed);
        if spills {
            found = self.preferred(catalog, port, call, is_left, removed);
        }
        Candidates {
            tier: found.iter().map(|seen| seen.tier).max().unwrap_or(Tier::Remote),
            spilled: spills && !found.is_empty(),
            endpoints: found.into_iter().map(|seen| Arc::clone(seen.endpoint)).collect(),
        }
    }

    /// What the rules choose among the endpoints that are left.
    fn preferred<'a>(
        &self,
        catalog: &Catalog,
        port: &'a ServicePort,
        call: Call,
        is_left: impl Fn(&Endpoint) -> bool,
        removed: &mut impl FnMut(&Arc<Endpoint>, Rule),
    ) -> Vec<Seen<'a>> {
        let of_family = |endpoint: &Endpoint| call.family.is_none_or(|family| family == endpoint.address.into());
        let service = catalog.service_named(&port.service);
        let publish_not_ready = service.is_some_and(|service| service.publish_not_ready);
        let local_only = service.is_some_and(|service| {
            (!call.external && service.internal_traffic_local) || (call.from_outside && service.external_traffic_local)
        });
        let distribution = service.map(|service| service.traffic_distribution).unwrap_or_default();
        let strict = service.is_some_and(|service| service.strict_spreading);
        let usable: [fn(&Endpoint) -> bool; 2] = [|e| e.ready, |e| e.serving && e.terminating];
        for may_use in usable {
            let mut found = Vec::new();
            let mut any_passed_over = false;
            for endpoint in &port.endpoints {
                if !of_family(endpoint) {
                    removed(endpoint, Rule::Family);
                } else if !(publish_not_ready || may_use(endpoint)) {
                    removed(endpoint, Rule::Condition);
                } else {
                    let seen = self.see(catalog, endpoint);
                    if local_only && seen.tier != Tier::Node {
                        removed(endpoint, Rule::TrafficPolicy);
                    } else if !is_left(endpoint) {
                        removed(endpoint, Rule::Ejection);
                        any_passed_over = true;
                    } else {
                        found.push(seen);
                    }
                }
            }
            if found.is_empty() {
                // Terminating ones stand in for those that aren't ready only.
                if any_passed_over {
                    break;
                }
                continue;
            }
            self.follow_hints(&mut found, removed);
            let in_preferred_place = match distribution {
                TrafficDistribution::Unset => false,
                TrafficDistribution::PreferSameZone => {
                    keep_if_any(&mut found, |seen| seen.same_zone, Rule::Distribution, removed)
                }
                TrafficDistribution::PreferSameNode => {
                    keep_if_any(&mut found, |seen| seen.tier == Tier::Node, Rule::Distribution, removed)
                        || keep_if_any(&mut found, |seen| seen.same_zone, Rule::Distribution, removed)
                }
            };
            if !in_preferred_place
                && !strict
                && let Some(nearest) = found.iter().map(|seen| seen.tier).min()
            {
                keep_if_any(&mut found, |seen| seen.tier == nearest, Rule::Tier, removed);
            }
            keep_if_any(&mut found, |seen| seen.alive, Rule::NodeNotReady, removed);
            return found;
        }
        Vec::new()
    }

    fn see<'a>(&self, catalog: &Catalog, endpoint: &'a Arc<Endpoint>) -> Seen<'a> {
        let node = endpoint.node.as_ref().and_then(|name| catalog.node(name));
        let zone = endpoint.zone.as_ref().or_else(|| node.and_then(|node| node.zone.as_ref()));
        let same_zone = self.zone.is_some() && zone == self.zone.as_ref();
        let tier = match self.reach(catalog, endpoint) {
            Reach::Local => Tier::Node,
            Reach::Direct => Tier::Network,
            Reach::Tunnel { .. } if same_zone => Tier::Zone,
            Reach::Tunnel { .. } => Tier::Remote,
        };
        let alive = tier == Tier::Node || node.is_none_or(|node| node.ready);
        Seen { endpoint, tier, same_zone, alive }
    }

    /// Hints hold when every endpoint has some, and at least one is for this zone (Kubernetes, "Topology Aware Routing":
    /// safeguards).
    fn follow_hints(&self, found: &mut Vec<Seen<'_>>, removed: &mut impl FnMut(&Arc<Endpoint>, Rule)) {
        let Some(zone) = &self.zone else { return };
        if found.iter().all(|seen| seen.endpoint.zone_hints.as_ref().is_some_and(|hints| !hints.is_empty())) {
            let for_this_zone = |seen: &Seen<'_>| seen.endpoint.zone_hints.as_ref().is_some_and(|h| h.contains(zone));
            keep_if_any(found, for_this_zone, Rule::Hints, removed);
        }
    }
}

/// An endpoint as seen from a viewpoint.
struct Seen<'a> {
    endpoint: &'a Arc<Endpoint>,
    tier: Tier,
    same_zone: bool,
    /// Its node is `Ready`, or it is this one.
    alive: bool,
}

/// Keeps what is preferred, if there is any, and tells which rule removed the others. Returns whether there was any.
fn keep_if_any(
    found: &mut Vec<Seen<'_>>,
    preferred: impl Fn(&Seen<'_>) -> bool,
    rule: Rule,
    removed: &mut impl FnMut(&Arc<Endpoint>, Rule),
) -> bool {
    let any = found.iter().any(&preferred);
    if any {
        found.retain(|seen| {
            let keep = preferred(seen);
            if !keep {
                removed(seen.endpoint, rule);
            }
            keep
        });
    }
    any
}

impl Candidates {
    /// One endpoint by a key: a random one spreads evenly.
    pub fn pick(&self, key: u64) -> Option<&Arc<Endpoint>> {
        let len = self.endpoints.len() as u64;
        self.endpoints.get(key.checked_rem(len)? as usize)
    }

    /// An endpoint for a client (`sessionAffinity: ClientIP`), the same on every node. One that goes moves its own clients only, but
    /// one that comes takes its share of all (rendezvous hashing): who is to keep what it has must be remembered. With another
    /// `round` it is another choice: for a client whose affinity has timed out.
    pub fn pick_for_client(&self, client: IpAddr, round: u64) -> Option<&Arc<Endpoint>> {
        self.endpoints.iter().max_by_key(|endpoint| {
            // Fixed keys, so that every process agrees.
            #[allow(deprecated)]
            let mut hasher = std::hash::SipHasher::new();
            (client, round, endpoint.address, endpoint.port).hash(&mut hasher);
            hasher.finish()
        })
    }
}
