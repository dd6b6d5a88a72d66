//! Takes a query to an answer: the cluster's names at once from the catalog, others from the cache or upstream.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
    time::{Duration, Instant},
};

use edgemesh_mesh::{Catalog, CatalogStore};
use futures::{StreamExt, stream::FuturesOrdered};

use super::{
    cache::{Entry, Freshness, Key},
    completion::{Completion, Plan},
    forward::{Forwarder, Found},
    limits::Reached,
    metrics::{Metrics, Source},
    reply::{Data, Record, Reply, Section, Transport, format_error},
    wire::{self, CLASS_IN, HEADER, Name, Query, Unreadable, kind, rcode},
    zone::{Answer, Zone},
};

/// Longest chain of aliases in the cluster zone.
const MAX_ALIASES: usize = 8;
/// A search path is completed within this time; else the client walks it by itself.
const COMPLETION_WAIT: Duration = Duration::from_secs(2);

/// What became of a query without waiting.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// The answer is written.
    Done,
    /// There is nothing to answer.
    Ignore,
    /// An upstream must be asked: call [`Resolver::later`].
    Later,
}

/// Who asks, and how.
#[derive(Debug, Clone, Copy)]
pub(super) struct Client {
    pub(super) address: IpAddr,
    pub(super) transport: Transport,
}

/// How an answer about a name of the zone goes on outside of it.
#[derive(Debug)]
enum Outside {
    /// It doesn't.
    No,
    /// An alias of the zone leads to this name.
    Alias(Name),
    /// The name may stand for the first of these that exists; if none does, it is denied.
    Completion(Vec<Name>),
}

/// Answers queries, however they came.
pub(super) struct Resolver {
    pub(super) zone: Zone,
    pub(super) catalog: Arc<CatalogStore>,
    pub(super) completion: Option<Arc<Completion>>,
    pub(super) forwarder: Arc<Forwarder>,
    pub(super) metrics: Arc<Metrics>,
}

impl Resolver {
    /// Writes the answer to `out` if no upstream is needed for it.
    pub(super) fn at_once(&self, message: &[u8], client: Client, out: &mut Vec<u8>) -> Step {
        let transport = client.transport;
        let query = match wire::read_query(message) {
            Ok(query) => query,
            Err(Unreadable::Ignore) => {
                self.metrics.ignored.inc();
                return Step::Ignore;
            }
            Err(Unreadable::FormErr { id, flags }) => {
                format_error(id, flags, out);
                self.metrics.answered(0, rcode::FORMERR, Source::Refused);
                return Step::Done;
            }
        };
        let refusal = if query.edns.is_some_and(|edns| edns.version != 0) {
            Some(rcode::BADVERS)
        } else if query.opcode() != 0 {
            Some(rcode::NOTIMP)
        } else if query.class != CLASS_IN || matches!(query.kind, kind::AXFR | kind::IXFR | kind::OPT) {
            Some(rcode::REFUSED)
        } else {
            None
        };
        if let Some(code) = refusal {
            self.empty(&query, transport, code, Source::Refused, out);
            return Step::Done;
        }
        let catalog = self.catalog.peek();
        if let Some(zone_at) = self.zone.holds(&query.name) {
            let started = Instant::now();
            if !catalog.is_synced() {
                self.empty(&query, transport, rcode::SERVFAIL, Source::Cluster, out);
                return Step::Done;
            }
            let (mut answer, outside) = self.in_zone(&catalog, &query, zone_at, client.address);
            let source = match outside {
                Outside::Alias(target) if is_address(query.kind) => {
                    let key = alias_key(&target, &query);
                    match self.forwarder.cached(&key, Instant::now()) {
                        Some(entry) => self.go_on(&mut answer, &key, &Found::cached(entry), transport),
                        None => return Step::Later,
                    }
                }
                Outside::Completion(names) => match self.completed_at_once(&query, &names) {
                    Some((key, found)) => self.complete(&mut answer, &key, &found),
                    None => return Step::Later,
                },
                Outside::No | Outside::Alias(_) => Source::Cluster,
            };
            self.cluster(&catalog, &query, transport, &answer, source, out);
            self.metrics.cluster_seconds.observe(started.elapsed().as_secs_f64());
            return Step::Done;
        }
        let denies_for_others =
            |answer: &Answer| answer.rcode == rcode::NXDOMAIN && self.forwarder.has_domain_of(&query.name);
        if let Some(answer) = self.zone.reverse(&catalog, &query.name, query.kind)
            && !denies_for_others(&answer)
        {
            self.cluster(&catalog, &query, transport, &answer, Source::Cluster, out);
            return Step::Done;
        }
        if self.forwarder.is_our_own(&query.name) {
            self.empty(&query, transport, rcode::SERVFAIL, Source::Refused, out);
            return Step::Done;
        }
        let now = Instant::now();
        match self.forwarder.cached(&Key::of(&query), now) {
            Some(entry) => {
                self.forwarded(&query, transport, &Found::cached(entry), out);
                Step::Done
            }
            None => Step::Later,
        }
    }

    /// Writes the answer to a query for which [`Resolver::at_once`] said [`Step::Later`]. False if there is none.
    pub(super) async fn later(&self, message: &[u8], client: Client, out: &mut Vec<u8>) -> bool {
        let Ok(query) = wire::read_query(message) else { return false };
        if let Some(zone_at) = self.zone.holds(&query.name) {
            let catalog = self.catalog.snapshot();
            let (mut answer, outside) = self.in_zone(&catalog, &query, zone_at, client.address);
            let source = match outside {
                Outside::Alias(target) => {
                    let key = alias_key(&target, &query);
                    let found = self.forwarder.resolve(key.clone()).await;
                    self.go_on(&mut answer, &key, &found, client.transport)
                }
                Outside::Completion(names) => match self.completed(&query, &names).await {
                    Some((key, found)) => self.complete(&mut answer, &key, &found),
                    None => Source::Cluster,
                },
                Outside::No => Source::Cluster,
            };
            self.cluster(&catalog, &query, client.transport, &answer, source, out);
            return true;
        }
        let found = self.forwarder.resolve(Key::of(&query)).await;
        self.forwarded(&query, client.transport, &found, out);
        true
    }

    /// What the catalog says about a name of the zone, and where the answer goes on.
    fn in_zone(&self, catalog: &Catalog, query: &Query<'_>, zone_at: usize, client: IpAddr) -> (Answer, Outside) {
        let mut answer = self.zone.answer(catalog, &query.name, zone_at, query.kind);
        if answer.rcode == rcode::NXDOMAIN
            && is_address(query.kind)
            && let Some(completion) = &self.completion
        {
            match completion
                .plan(&self.zone, catalog, &query.name, zone_at, client, |name| self.forwarder.has_domain_of(name))
            {
                Plan::None => {}
                Plan::Cluster(target) => answer = Answer { completed: true, ..self.zone.alias(target) },
                Plan::Outside(names) => return (answer, Outside::Completion(names)),
            }
        }
        let outside = self.chase(catalog, &mut answer, query.kind).map_or(Outside::No, Outside::Alias);
        (answer, outside)
    }

    /// Puts an upstream's answer behind an alias of the zone.
    fn go_on(&self, answer: &mut Answer, key: &Key, found: &Found, transport: Transport) -> Source {
        match &found.entry {
            Some(entry) => {
                // Over UDP the client is told that there is more; over TCP there is no way to say so.
                answer.truncated = entry.truncated;
                let cut = entry.truncated && transport == Transport::Tcp;
                answer.rcode = if cut { rcode::SERVFAIL } else { entry.rcode };
                answer.answers.extend(records(key, entry, found.freshness));
            }
            None => answer.rcode = rcode::SERVFAIL,
        }
        Source::Cluster
    }

    /// Makes the denied name an alias of the one that exists.
    fn complete(&self, answer: &mut Answer, key: &Key, found: &Found) -> Source {
        let (Some(target), Some(entry)) = (key.name(), &found.entry) else { return Source::Cluster };
        if entry.rcode != rcode::NOERROR {
            return Source::Cluster;
        }
        *answer = Answer { chase: None, ..self.zone.alias(target) };
        answer.answers.extend(records(key, entry, found.freshness));
        self.metrics.completions.outside.inc();
        found.source
    }

    /// The first of the names that exists, if the cache knows; none if upstreams must be asked. A denied one is given if all are.
    fn completed_at_once(&self, query: &Query<'_>, names: &[Name]) -> Option<(Key, Found)> {
        let now = Instant::now();
        let mut last = None;
        for name in names {
            let key = alias_key(name, query);
            let entry = self.forwarder.cached(&key, now)?;
            let ends = entry.rcode != rcode::NXDOMAIN;
            last = Some((key, Found::cached(entry)));
            if ends {
                break;
            }
        }
        last
    }

    /// Asks for all of the names, and takes the first that exists. None if none does, or if it can't be known in time.
    async fn completed(&self, query: &Query<'_>, names: &[Name]) -> Option<(Key, Found)> {
        let mut asked: FuturesOrdered<_> = names
            .iter()
            .map(|name| {
                let key = alias_key(name, query);
                async move { (name, key.clone(), self.forwarder.resolve(key).await) }
            })
            .collect();
        let first = async {
            while let Some((name, key, found)) = asked.next().await {
                let entry = found.entry.as_ref()?;
                if entry.denied_by_root
                    && let Some(completion) = &self.completion
                {
                    completion.denied_by_root(name);
                }
                match entry.rcode {
                    rcode::NXDOMAIN => {}
                    rcode::NOERROR if !entry.truncated => return Some((key, found)),
                    _ => return None,
                }
            }
            None
        };
        tokio::time::timeout(COMPLETION_WAIT, first).await.ok().flatten()
    }

    /// Writes the answer to a query that a limit keeps from being resolved.
    pub(super) fn overloaded(&self, message: &[u8], transport: Transport, limit: Reached, out: &mut Vec<u8>) -> bool {
        let (counter, code) = match limit {
            Reached::All => (&self.metrics.limited.queries, rcode::SERVFAIL),
            Reached::Client => (&self.metrics.limited.client, rcode::REFUSED),
        };
        counter.inc();
        let Ok(query) = wire::read_query(message) else { return false };
        self.empty(&query, transport, code, Source::Refused, out);
        true
    }

    /// Follows aliases inside the zone. Returns the name at which the answer goes on outside, if it does.
    fn chase(&self, catalog: &Catalog, answer: &mut Answer, asked: u16) -> Option<Name> {
        for _ in 0..MAX_ALIASES {
            let target = answer.chase.take()?;
            let Some(zone_at) = self.zone.holds(&target) else { return Some(target) };
            let next = self.zone.answer(catalog, &target, zone_at, asked);
            let owned = |record: Record| Record { owner: record.owner.or_else(|| Some(target.clone())), ..record };
            answer.rcode = next.rcode;
            answer.answers.extend(next.answers.into_iter().map(owned));
            answer.additional.extend(next.additional);
            answer.chase = next.chase;
        }
        if answer.chase.take().is_some() {
            answer.rcode = rcode::SERVFAIL;
        }
        None
    }

    fn cluster(
        &self,
        catalog: &Catalog,
        query: &Query<'_>,
        transport: Transport,
        answer: &Answer,
        source: Source,
        out: &mut Vec<u8>,
    ) {
        let mut reply = Reply::new(query, transport, answer.rcode, out);
        reply.authoritative();
        if answer.truncated {
            reply.truncated();
        }
        if answer.completed {
            self.metrics.completions.cluster.inc();
        }
        let mut whole = true;
        for record in &answer.answers {
            whole = reply.record(Section::Answer, query, record);
            if !whole {
                break;
            }
        }
        let negative = answer.answers.is_empty() || answer.rcode == rcode::NXDOMAIN;
        if negative && answer.rcode != rcode::SERVFAIL {
            let soa = match self.zone.holds(&query.name) {
                Some(_) => self.zone.soa(catalog),
                None => self.zone.reverse_soa(&query.name, catalog),
            };
            whole = whole && reply.record(Section::Authority, query, &soa);
        }
        if whole {
            for record in &answer.additional {
                if !reply.record(Section::Additional, query, record) {
                    break;
                }
            }
        }
        if reply.finish() {
            self.metrics.truncated.inc();
        }
        self.metrics.answered(query.kind, answer.rcode, source);
    }

    fn forwarded(&self, query: &Query<'_>, transport: Transport, found: &Found, out: &mut Vec<u8>) {
        let Some(entry) = &found.entry else {
            self.empty(query, transport, rcode::SERVFAIL, found.source, out);
            return;
        };
        if entry.truncated {
            // Over UDP the client is told that there is more; over TCP there is no way to say so.
            let code = if transport == Transport::Tcp { rcode::SERVFAIL } else { entry.rcode };
            let mut reply = Reply::new(query, transport, code, out);
            reply.truncated();
            reply.finish();
            self.metrics.truncated.inc();
            self.metrics.answered(query.kind, code, found.source);
            return;
        }
        let mut reply = Reply::new(query, transport, entry.rcode, out);
        let at = reply.position();
        if reply.raw(&entry.body, entry.counts) {
            entry.age_ttls(&mut reply.bytes()[at..], Instant::now(), found.freshness);
        }
        if reply.finish() {
            self.metrics.truncated.inc();
        }
        self.metrics.answered(query.kind, entry.rcode, found.source);
    }

    fn empty(&self, query: &Query<'_>, transport: Transport, code: u8, source: Source, out: &mut Vec<u8>) {
        Reply::new(query, transport, code, out).finish();
        self.metrics.answered(query.kind, code, source);
    }
}

/// What an alias's target is asked for with: the client's DNSSEC wishes hold for the zone, which isn't signed.
fn alias_key(target: &Name, query: &Query<'_>) -> Key {
    Key::new(target, query.kind, false, query.checking_disabled())
}

fn is_address(asked: u16) -> bool {
    matches!(asked, kind::A | kind::AAAA)
}

/// The addresses and aliases of an upstream's answer, to be put behind an alias of the cluster zone.
fn records(key: &Key, entry: &Entry, freshness: Freshness) -> Vec<Record> {
    // Pointers in the body count from the begin of a message with that question.
    let question = key.question();
    let body_at = HEADER + question.len();
    let mut message = vec![0; HEADER];
    message.extend_from_slice(&question);
    message.extend_from_slice(&entry.body);
    entry.age_ttls(&mut message[body_at..], Instant::now(), freshness);
    let mut found = Vec::new();
    let mut at = body_at;
    for _ in 0..entry.counts[0] {
        let (Ok((owner, _)), Ok(record)) = (Name::read(&message, at), wire::read_record(&message, at)) else { break };
        let bytes = &message[record.data.clone()];
        let data = match record.kind {
            kind::A => <[u8; 4]>::try_from(bytes).ok().map(|octets| Data::A(Ipv4Addr::from(octets))),
            kind::AAAA => <[u8; 16]>::try_from(bytes).ok().map(|octets| Data::Aaaa(Ipv6Addr::from(octets))),
            kind::CNAME => Name::read(&message, record.data.start).ok().map(|(name, _)| Data::Cname(name)),
            _ => None,
        };
        found.extend(data.map(|data| Record { owner: Some(owner), ttl: record.ttl, data }));
        at = record.data.end;
    }
    found
}
