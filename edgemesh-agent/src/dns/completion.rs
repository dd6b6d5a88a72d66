//! Search path completion: which names a pod means when its resolver asks for a name under the first entry of its search path.
//!
//! A pod's resolver tries `outside.example` as `outside.example.NAMESPACE.svc.DOMAIN` first, then under `svc.DOMAIN`, `DOMAIN`
//! and the host's search domains, and at last as it is (Kubernetes, "DNS for Services and Pods"; resolv.conf(5), `ndots`).
//! Here the rest of that walk is planned when the first step comes. Where it is doubtful what the client means, there is no
//! plan: the first step is denied, as it would be without completion, and the client walks on by itself.

use std::{
    collections::HashMap,
    net::IpAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use edgemesh_mesh::Catalog;
use edgemesh_telemetry::Shutdown;
use parking_lot::Mutex;

use super::{
    resolv_conf,
    wire::{Name, kind, rcode},
    zone::{Zone, may_have_pod},
};

/// Search domains of the host that are tried; with more of them outside names are left to the client.
const MAX_SEARCHES: usize = 4;
/// How long a top-level domain is taken for absent after the root said so.
const ABSENT_FOR: Duration = Duration::from_secs(300);
/// Top-level domains that are remembered as absent.
const MAX_ABSENT: usize = 1024;
/// Last labels that never belong to a name of public DNS (RFC 6761, RFC 6762), or to one of this cluster in short.
const NEVER_OUTSIDE: [&[u8]; 5] = [b"svc", b"pod", b"local", b"localhost", b"invalid"];

/// What the rest of a client's search comes to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Plan {
    /// Nothing that could be said in its place.
    None,
    /// A name of the cluster, with addresses.
    Cluster(Name),
    /// The first of these that exists upstream.
    Outside(Vec<Name>),
}

/// Plans the rest of searches.
#[derive(Debug, Default)]
pub(super) struct Completion {
    /// The host's search domains; none if there are too many.
    searches: ArcSwap<Option<Vec<Name>>>,
    /// Top-level domains that the root doesn't have, and since when that is known.
    absent: Mutex<HashMap<Box<[u8]>, Instant>>,
}

impl Completion {
    /// Follows the host's search domains, in a task of the shutdown's.
    pub(super) fn start(path: PathBuf, shutdown: &Shutdown) -> Arc<Self> {
        let completion = Arc::new(Self::with_searches(&[]));
        completion.reload(&path);
        let (following, stopping) = (Arc::clone(&completion), shutdown.stopping().clone());
        shutdown.spawn(async move {
            let wait = || tokio::time::sleep(resolv_conf::RELOAD_EVERY);
            while stopping.run_until_cancelled(wait()).await.is_some() {
                following.reload(&path);
            }
        });
        completion
    }

    fn with_searches(domains: &[String]) -> Self {
        let completion = Self::default();
        completion.set_searches(domains);
        completion
    }

    fn reload(&self, path: &std::path::Path) {
        // A file that can't be read may be replaced right now: what was known still holds.
        if let Ok(host) = resolv_conf::read(path) {
            self.set_searches(&host.searches);
        }
    }

    fn set_searches(&self, domains: &[String]) {
        let names: Vec<Name> = domains.iter().filter_map(|domain| Name::from_text(domain)).collect();
        let usable = names.len() == domains.len() && names.len() <= MAX_SEARCHES;
        self.searches.store(Arc::new(usable.then_some(names)));
    }

    /// Plans for a name of the zone that doesn't exist. The zone begins at `zone_at` in it. Names for which `known_outside`
    /// holds are never taken for the cluster's.
    pub(super) fn plan(
        &self,
        zone: &Zone,
        catalog: &Catalog,
        name: &Name,
        zone_at: usize,
        client: IpAddr,
        known_outside: impl Fn(&Name) -> bool,
    ) -> Plan {
        let Some(asked) = Asked::read(name, zone_at) else { return Plan::None };
        // Under a Service of that namespace are its own endpoints and ports, and nothing else.
        if !is_first_entry(catalog, client, asked.namespace) || catalog.service(asked.namespace, asked.last).is_some() {
            return Plan::None;
        }
        for candidate in asked.in_cluster(zone) {
            let Some(at) = zone.holds(&candidate) else { continue };
            let found = zone.answer(catalog, &candidate, at, kind::ANY);
            if found.rcode == rcode::NXDOMAIN {
                continue;
            }
            // Without addresses it is a step on the way to other names, at which resolvers differ.
            return if found.answers.is_empty() { Plan::None } else { Plan::Cluster(candidate) };
        }
        let Some(bare) = Name::joined(asked.prefix, &Name::root()) else { return Plan::None };
        if zone.holds(&bare).is_some() || !known_outside(&bare) && looks_like_cluster(catalog, &bare, asked.last) {
            return Plan::None;
        }
        let searches = self.searches.load();
        let Some(searches) = &**searches else { return Plan::None };
        let mut names: Vec<Name> = searches.iter().filter_map(|s| Name::joined(asked.prefix, s)).collect();
        names.retain(|name| zone.holds(name).is_none());
        // What the root denies may yet be known on the way to it: of the host's own domains nothing is left out.
        if !self.is_absent(&bare) {
            names.push(bare);
        }
        if names.is_empty() { Plan::None } else { Plan::Outside(names) }
    }

    /// Remembers that the root denied a name, and with it all names of its top-level domain (RFC 8020).
    pub(super) fn denied_by_root(&self, name: &Name) {
        let Some(top) = name.labels().last() else { return };
        let mut absent = self.absent.lock();
        if absent.len() >= MAX_ABSENT {
            absent.retain(|_, since| since.elapsed() < ABSENT_FOR);
        }
        if absent.len() < MAX_ABSENT {
            absent.insert(top.into(), Instant::now());
        }
    }

    fn is_absent(&self, name: &Name) -> bool {
        let Some(top) = name.labels().last() else { return true };
        self.absent.lock().get(top).is_some_and(|since| since.elapsed() < ABSENT_FOR)
    }
}

/// A name taken apart as `PREFIX.NAMESPACE.svc.DOMAIN`.
struct Asked<'a> {
    /// What the client was asked for, in wire form without the root: two labels at least.
    prefix: &'a [u8],
    /// Its last label.
    last: &'a str,
    namespace: &'a str,
}

impl<'a> Asked<'a> {
    /// None if it isn't of that form. A prefix of one label is none either: it means a Service here, and nothing outside.
    fn read(name: &'a Name, zone_at: usize) -> Option<Self> {
        let wire = name.wire();
        let starts: Vec<usize> = name.starts().take_while(|start| *start < zone_at).collect();
        let [.., last, namespace, svc] = starts[..] else { return None };
        let label = |at: usize| std::str::from_utf8(&wire[at + 1..at + 1 + usize::from(wire[at])]).ok();
        if last == 0 || label(svc)? != "svc" {
            return None;
        }
        Some(Self { prefix: &wire[..namespace], last: label(last)?, namespace: label(namespace)? })
    }

    /// The names of the cluster that the client would try next, in its order.
    fn in_cluster(&self, zone: &Zone) -> impl Iterator<Item = Name> {
        let under_svc = Name::under(&["svc"], zone.name()).and_then(|svc| Name::joined(self.prefix, &svc));
        let under_zone = Name::joined(self.prefix, zone.name());
        [under_svc, under_zone, Name::joined(self.prefix, &Name::root())].into_iter().flatten()
    }
}

/// Whether a client's search path begins with `NAMESPACE.svc.DOMAIN`: its pod is in that namespace, or may be.
fn is_first_entry(catalog: &Catalog, client: IpAddr, namespace: &str) -> bool {
    catalog.has_namespace(namespace) && may_have_pod(catalog, client, namespace)
}

/// Names that are meant for the cluster, though they don't exist in it now: nobody outside is to learn them.
fn looks_like_cluster(catalog: &Catalog, bare: &Name, last: &str) -> bool {
    NEVER_OUTSIDE.contains(&last.as_bytes())
        || catalog.has_namespace(last)
        || bare.labels().any(|label| label.starts_with(b"_"))
        || bare.labels().skip(1).any(|label| label == b"svc")
}
