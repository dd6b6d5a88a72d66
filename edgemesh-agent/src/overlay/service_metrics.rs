//! Counters of proxied connections by Service. A Service has series from its first proxied connection until it is deleted.

use std::{collections::HashMap, sync::Arc};

use edgemesh_mesh::{CatalogStore, model::ServiceName};
use parking_lot::Mutex;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

const PATHS: [&str; 3] = ["direct", "tunnel", "relay"];
const REASONS: [&str; 3] = ["no_endpoint", "unreachable", "broken"];
const DIRECTIONS: [&str; 2] = ["to_endpoint", "to_client"];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PathLabels {
    namespace: Arc<str>,
    service: Arc<str>,
    path: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabels {
    namespace: Arc<str>,
    service: Arc<str>,
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DirectionLabels {
    namespace: Arc<str>,
    service: Arc<str>,
    direction: &'static str,
}

/// The labels of all series of one Service.
struct Labels {
    connections: [PathLabels; PATHS.len()],
    failures: [ReasonLabels; REASONS.len()],
    bytes: [DirectionLabels; DIRECTIONS.len()],
}

impl Labels {
    fn of(name: &ServiceName) -> Self {
        let namespace = || name.namespace.clone();
        let service = || name.name.clone();
        Self {
            connections: PATHS.map(|path| PathLabels { namespace: namespace(), service: service(), path }),
            failures: REASONS.map(|reason| ReasonLabels { namespace: namespace(), service: service(), reason }),
            bytes: DIRECTIONS.map(|direction| DirectionLabels {
                namespace: namespace(),
                service: service(),
                direction,
            }),
        }
    }
}

/// The counters of one Service. Those of a deleted one may still be counted up; nobody sees it.
#[derive(Debug, Default)]
pub(super) struct ServiceCounters {
    connections: [Counter; PATHS.len()],
    failures: [Counter; REASONS.len()],
    bytes: [Counter; DIRECTIONS.len()],
}

impl ServiceCounters {
    /// A connection or flow has reached an endpoint.
    pub(super) fn connected(&self, path: &str) {
        count(&self.connections, &PATHS, path);
    }

    /// One has reached none, or has broken.
    pub(super) fn failed(&self, reason: &str) {
        count(&self.failures, &REASONS, reason);
    }

    /// What one has carried.
    pub(super) fn carried(&self, to_endpoint: u64, to_client: u64) {
        for (counter, bytes) in self.bytes.iter().zip([to_endpoint, to_client]) {
            counter.inc_by(bytes);
        }
    }
}

fn count(counters: &[Counter], labels: &[&str], label: &str) {
    if let Some(counter) = labels.iter().position(|known| *known == label).and_then(|at| counters.get(at)) {
        counter.inc();
    }
}

/// The counters of all Services; cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct ServiceMetrics {
    catalog: Arc<CatalogStore>,
    known: Arc<Mutex<HashMap<ServiceName, Arc<ServiceCounters>>>>,
    connections: Family<PathLabels, Counter>,
    failures: Family<ReasonLabels, Counter>,
    bytes: Family<DirectionLabels, Counter>,
}

impl ServiceMetrics {
    pub(super) fn register(registry: &mut Registry, catalog: Arc<CatalogStore>) -> Self {
        let metrics = Self {
            catalog,
            known: Arc::default(),
            connections: Family::default(),
            failures: Family::default(),
            bytes: Family::default(),
        };
        let registry = registry.sub_registry_with_prefix("edgemesh_agent_service");
        registry.register(
            "connections",
            "Proxied connections and UDP flows that reached an endpoint, by Service",
            metrics.connections.clone(),
        );
        registry.register(
            "failures",
            "Proxied connections and UDP flows that reached no endpoint, or broke, by Service",
            metrics.failures.clone(),
        );
        registry.register(
            "bytes",
            "Bytes of proxied connections and UDP flows that have ended, by Service",
            metrics.bytes.clone(),
        );
        metrics
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
        let labels = Labels::of(service);
        let counters = Arc::new(ServiceCounters {
            connections: labels.connections.map(|labels| self.connections.get_or_create_owned(&labels)),
            failures: labels.failures.map(|labels| self.failures.get_or_create_owned(&labels)),
            bytes: labels.bytes.map(|labels| self.bytes.get_or_create_owned(&labels)),
        });
        known.insert(service.clone(), counters.clone());
        counters
    }

    /// The counters of a Service as JSON; all are zero before its first connection.
    pub(super) fn view(&self, service: &ServiceName) -> serde_json::Value {
        let counters = self.known.lock().get(service).cloned().unwrap_or_default();
        let named = |names: &[&str], counters: &[Counter]| -> serde_json::Value {
            names
                .iter()
                .zip(counters)
                .map(|(name, counter)| ((*name).to_owned(), serde_json::Value::from(counter.get())))
                .collect()
        };
        serde_json::json!({
            "connections": named(&PATHS, &counters.connections),
            "failures": named(&REASONS, &counters.failures),
            "bytes": named(&DIRECTIONS, &counters.bytes),
        })
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
        known.retain(|service, _| {
            let exists = catalog.service_named(service).is_some();
            if !exists {
                let labels = Labels::of(service);
                labels.connections.iter().for_each(|labels| _ = self.connections.remove(labels));
                labels.failures.iter().for_each(|labels| _ = self.failures.remove(labels));
                labels.bytes.iter().for_each(|labels| _ = self.bytes.remove(labels));
            }
            exists
        });
    }
}
