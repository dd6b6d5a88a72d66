//! Counters by Service: connections that the agent proxied, and what the datapath counted by frontend. A Service has each of
//! its series from the first count until it is deleted.

use std::{collections::HashMap, fmt, sync::Arc};

use edgemesh_mesh::{CatalogStore, model::ServiceName};
use parking_lot::Mutex;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::{MetricType, counter::Counter},
    registry::Registry,
};

use crate::datapath::{
    frontend_counts::{CountsFrontends, FrontendCounts, Owners},
    plan::Frontend,
};

const PATHS: [&str; 4] = ["direct", "proxied", "tunnel", "relay"];
const REASONS: [&str; 4] = ["no_endpoint", "no_such_port", "unreachable", "broken"];
const DIRECTIONS: [&str; 2] = ["to_endpoint", "to_client"];

/// Counters of one kind, with a value of a label each.
struct Kind {
    name: &'static str,
    help: &'static str,
    label: &'static str,
    values: &'static [&'static str],
    of: fn(&ServiceCounters) -> &[Counter],
}

const KINDS: [Kind; 3] = [
    Kind {
        name: "connections",
        help: "Connections and UDP flows of this node that were sent to an endpoint, or proxied to one, by Service",
        label: "path",
        values: &PATHS,
        of: |counters| &counters.connections,
    },
    Kind {
        name: "failures",
        help: "Connections and UDP flows of this node that reached no endpoint, or broke in the agent, by Service",
        label: "reason",
        values: &REASONS,
        of: |counters| &counters.failures,
    },
    Kind {
        name: "bytes",
        help: "Bytes of proxied connections and UDP flows that have ended, by Service",
        label: "direction",
        values: &DIRECTIONS,
        of: |counters| &counters.bytes,
    },
];

/// The counters of one Service. Those of a deleted one may still be counted up; nobody sees it.
#[derive(Debug, Default)]
pub(super) struct ServiceCounters {
    connections: [Counter; PATHS.len()],
    failures: [Counter; REASONS.len()],
    bytes: [Counter; DIRECTIONS.len()],
}

impl ServiceCounters {
    /// A proxied connection or flow has reached an endpoint, by a path of the proxy: what is direct there came through the
    /// agent all the same.
    pub(super) fn connected(&self, path: &str) {
        count(&self.connections, &PATHS, if path == "direct" { "proxied" } else { path }, 1);
    }

    /// One has reached none, or has broken.
    pub(super) fn failed(&self, reason: &str) {
        count(&self.failures, &REASONS, reason, 1);
    }

    /// What one has carried.
    pub(super) fn carried(&self, to_endpoint: u64, to_client: u64) {
        for (counter, bytes) in self.bytes.iter().zip([to_endpoint, to_client]) {
            counter.inc_by(bytes);
        }
    }

    /// What the datapath has counted more.
    fn sent(&self, counts: FrontendCounts) {
        count(&self.connections, &PATHS, "direct", counts.flows);
        count(&self.failures, &REASONS, "no_endpoint", counts.no_endpoint);
        count(&self.failures, &REASONS, "no_such_port", counts.no_such_port);
    }
}

fn count(counters: &[Counter], labels: &[&str], label: &str, by: u64) {
    if let Some(counter) = labels.iter().position(|known| *known == label).and_then(|at| counters.get(at)) {
        counter.inc_by(by);
    }
}

/// A datapath, and what it had counted when it was read last. Only what came since is added, so that a Service keeps what
/// was counted at an address that it no longer has, and the next one there does not get it.
#[derive(Debug)]
struct Source {
    datapath: Arc<dyn CountsFrontends>,
    last: HashMap<Frontend, FrontendCounts>,
}

/// The counters of all Services; cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct ServiceMetrics {
    catalog: Arc<CatalogStore>,
    known: Arc<Mutex<HashMap<ServiceName, Arc<ServiceCounters>>>>,
    sources: Arc<Mutex<Vec<Source>>>,
}

impl ServiceMetrics {
    pub(super) fn register(registry: &mut Registry, catalog: Arc<CatalogStore>) -> Self {
        let metrics = Self { catalog, known: Arc::default(), sources: Arc::default() };
        registry.register_collector(Box::new(metrics.clone()));
        metrics
    }

    /// Shows what a datapath counts, too.
    pub(super) fn add(&self, datapath: Arc<dyn CountsFrontends>) {
        self.sources.lock().push(Source { datapath, last: HashMap::new() });
    }

    /// The counters of a Service. They are shown only if the catalog has that Service.
    pub(super) fn of(&self, service: &ServiceName) -> Arc<ServiceCounters> {
        let mut known = self.known.lock();
        if let Some(counters) = known.get(service) {
            return counters.clone();
        }
        // Under the lock, and so before or after `forget`, never between its look at the catalog and its removal.
        if self.catalog.peek().service_named(service).is_none() {
            return Arc::default();
        }
        known.entry(service.clone()).or_default().clone()
    }

    /// Adds what datapaths have counted since they were read last.
    fn read(&self) {
        let catalog = self.catalog.snapshot();
        let owners = Owners::new(&catalog);
        for Source { datapath, last } in self.sources.lock().iter_mut() {
            let read = match datapath.read() {
                Ok(read) => read,
                Err(error) => {
                    tracing::debug!(%error, "what the datapath counted can't be read");
                    continue;
                }
            };
            let read = read.into_iter().map(|(frontend, counts)| {
                let earlier = last.get(&frontend).copied().unwrap_or_default();
                // Until the catalog has the Service, what was counted for it waits.
                let Some(service) = owners.of(frontend) else { return (frontend, earlier) };
                let new = counts.since(earlier);
                if new != FrontendCounts::default() {
                    self.of(service).sent(new);
                }
                (frontend, counts)
            });
            *last = read.collect();
        }
    }

    /// The counters of a Service as JSON; all are zero before it is called.
    pub(super) fn view(&self, service: &ServiceName) -> serde_json::Value {
        self.read();
        let counters = self.known.lock().get(service).cloned().unwrap_or_default();
        let of_kind = |kind: &Kind| -> serde_json::Value {
            let values = kind.values.iter().zip((kind.of)(&counters));
            values.map(|(name, counter)| ((*name).to_owned(), serde_json::Value::from(counter.get()))).collect()
        };
        KINDS.iter().map(|kind| (kind.name.to_owned(), of_kind(kind))).collect()
    }

    /// Removes the series of deleted Services, until it is dropped.
    pub(super) async fn follow(self) {
        let mut generations = self.catalog.subscribe();
        while generations.changed().await.is_ok() {
            self.forget();
        }
    }

    fn forget(&self) {
        let mut known = self.known.lock();
        let catalog = self.catalog.snapshot();
        known.retain(|service, _| catalog.service_named(service).is_some());
    }
}

impl Collector for ServiceMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.read();
        let known = self.known.lock().clone();
        for kind in KINDS {
            let name = format!("edgemesh_agent_service_{}", kind.name);
            let mut metric = encoder.encode_descriptor(&name, kind.help, None, MetricType::Counter)?;
            for (ServiceName { namespace, name }, counters) in &known {
                for (value, counter) in kind.values.iter().zip((kind.of)(counters)).filter(|(_, c)| c.get() > 0) {
                    let labels = [("namespace", &**namespace), ("service", &**name), (kind.label, *value)];
                    counter.encode(metric.encode_family(&labels)?)?;
                }
            }
        }
        Ok(())
    }
}
