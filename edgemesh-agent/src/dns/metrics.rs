//! What DNS counts. Every label has a fixed set of values: nothing that a client chooses becomes one.

use std::sync::OnceLock;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

use super::wire::kind;

/// Names of the record types that are counted by name.
const KINDS: [(u16, &str); 10] = [
    (kind::A, "A"),
    (kind::AAAA, "AAAA"),
    (kind::SRV, "SRV"),
    (kind::PTR, "PTR"),
    (kind::CNAME, "CNAME"),
    (kind::TXT, "TXT"),
    (kind::MX, "MX"),
    (kind::NS, "NS"),
    (kind::SOA, "SOA"),
    (kind::HTTPS, "HTTPS"),
];
const RCODES: [&str; 6] = ["NOERROR", "FORMERR", "SERVFAIL", "NXDOMAIN", "NOTIMP", "REFUSED"];
const SOURCES: [&str; 5] = ["cluster", "cache", "stale", "upstream", "refused"];

/// Where an answer came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    /// The catalog.
    Cluster,
    /// The cache, within the TTL.
    Cache,
    /// The cache, past the TTL: no upstream answered.
    Stale,
    /// An upstream, or the failure to get an answer from any.
    Upstream,
    /// Nowhere: the query can't be answered by this server.
    Refused,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct QueryLabels {
    r#type: &'static str,
    rcode: &'static str,
    source: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TargetLabel {
    target: &'static str,
}

/// Searches that were completed, by where the name was found.
#[derive(Debug)]
pub(super) struct Completions {
    /// In the cluster zone.
    pub(super) cluster: Counter,
    /// Upstream.
    pub(super) outside: Counter,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TransportLabel {
    transport: &'static str,
}

/// Messages sent to upstreams, probes and repeated questions included.
#[derive(Debug)]
pub(super) struct Exchanges {
    pub(super) udp: Counter,
    pub(super) tcp: Counter,
    pub(super) tls: Counter,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LimitLabel {
    limit: &'static str,
}

/// What was refused, by the limit that was met.
#[derive(Debug)]
pub(super) struct Limited {
    /// Queries of all clients together.
    pub(super) queries: Counter,
    /// Queries of one client.
    pub(super) client: Counter,
    /// Questions being asked of upstreams.
    pub(super) upstream: Counter,
    /// TCP connections, in all or of one client.
    pub(super) connections: Counter,
}

/// The metrics.
#[derive(Debug)]
pub(super) struct Metrics {
    queries: Family<QueryLabels, Counter>,
    /// Counters of the family by type, rcode and source: found by index in the hot path.
    found: Box<[OnceLock<Counter>]>,
    /// Seconds from a query about a cluster name to its answer, where no upstream is needed.
    pub(super) cluster_seconds: Histogram,
    /// Answers that were cut for UDP.
    pub(super) truncated: Counter,
    /// Messages that aren't answered: no queries, or none that can be read.
    pub(super) ignored: Counter,
    /// Queries that wait for upstreams.
    pub(super) waiting: Gauge,
    /// TCP connections of clients.
    pub(super) connections: Gauge,
    /// Seconds until an upstream answered.
    pub(super) upstream_seconds: Histogram,
    /// Queries that no upstream answered.
    pub(super) upstream_failures: Counter,
    /// Upstreams that answer.
    pub(super) upstreams_alive: Gauge,
    /// Messages sent to upstreams.
    pub(super) exchanges: Exchanges,
    /// Connections opened to upstreams over TLS.
    pub(super) tls_connections: Counter,
    /// Entries asked for anew before they expired.
    pub(super) prefetches: Counter,
    /// Entries in the cache.
    pub(super) cache_entries: Gauge,
    /// Searches that were completed for the client.
    pub(super) completions: Completions,
    /// Queries and connections refused by a limit.
    pub(super) limited: Limited,
}

impl Metrics {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let completions: Family<TargetLabel, Counter> = Family::default();
        let completed = |target| completions.get_or_create_owned(&TargetLabel { target });
        let exchanges: Family<TransportLabel, Counter> = Family::default();
        let over = |transport| exchanges.get_or_create_owned(&TransportLabel { transport });
        let limited: Family<LimitLabel, Counter> = Family::default();
        let by = |limit| limited.get_or_create_owned(&LimitLabel { limit });
        let metrics = Self {
            queries: Family::default(),
            found: (0..(KINDS.len() + 1) * (RCODES.len() + 1) * SOURCES.len()).map(|_| OnceLock::new()).collect(),
            cluster_seconds: Histogram::new(exponential_buckets(0.000_001, 4.0, 10)),
            truncated: Counter::default(),
            ignored: Counter::default(),
            waiting: Gauge::default(),
            connections: Gauge::default(),
            upstream_seconds: Histogram::new(exponential_buckets(0.001, 2.0, 13)),
            upstream_failures: Counter::default(),
            upstreams_alive: Gauge::default(),
            cache_entries: Gauge::default(),
            completions: Completions { cluster: completed("cluster"), outside: completed("outside") },
            exchanges: Exchanges { udp: over("udp"), tcp: over("tcp"), tls: over("tls") },
            tls_connections: Counter::default(),
            prefetches: Counter::default(),
            limited: Limited {
                queries: by("queries"),
                client: by("client"),
                upstream: by("upstream"),
                connections: by("connections"),
            },
        };
        let registry = registry.sub_registry_with_prefix("edgemesh_agent_dns");
        registry.register("queries", "DNS queries answered", metrics.queries.clone());
        let help = "Time from a query about a cluster name to its answer, where no upstream is needed";
        registry.register("cluster_seconds", help, metrics.cluster_seconds.clone());
        registry.register("truncated", "Answers that were cut for UDP", metrics.truncated.clone());
        registry.register("ignored", "Messages that aren't answered", metrics.ignored.clone());
        registry.register("waiting", "Queries that wait for upstreams", metrics.waiting.clone());
        registry.register("connections", "TCP connections of clients", metrics.connections.clone());
        registry.register("upstream_seconds", "Time until an upstream answered", metrics.upstream_seconds.clone());
        registry.register("upstream_failures", "Queries that no upstream answered", metrics.upstream_failures.clone());
        registry.register("upstreams_alive", "Upstreams that answer", metrics.upstreams_alive.clone());
        registry.register("cache_entries", "Answers in the cache", metrics.cache_entries.clone());
        let help = "Searches that were completed for the client, by where the name is";
        registry.register("completions", help, completions);
        registry.register("limited", "Queries and connections refused, by the limit that was met", limited);
        registry.register("upstream_exchanges", "Messages sent to upstreams", exchanges);
        let help = "Connections opened to upstreams over TLS";
        registry.register("upstream_tls_connections", help, metrics.tls_connections.clone());
        let help = "Answers asked for anew before they expired";
        registry.register("prefetches", help, metrics.prefetches.clone());
        metrics
    }

    /// Counts an answer.
    pub(super) fn answered(&self, asked: u16, rcode: u8, source: Source) {
        let kind = KINDS.iter().position(|(number, _)| *number == asked).unwrap_or(KINDS.len());
        let code = usize::from(rcode).min(RCODES.len());
        let at = (kind * (RCODES.len() + 1) + code) * SOURCES.len() + source as usize;
        let Some(cell) = self.found.get(at) else { return };
        let counter = cell.get_or_init(|| {
            let labels = QueryLabels {
                r#type: KINDS.get(kind).map_or("other", |(_, name)| name),
                rcode: RCODES.get(code).copied().unwrap_or("other"),
                source: SOURCES[source as usize],
            };
            self.queries.get_or_create_owned(&labels)
        });
        counter.inc();
    }
}
