//! The hub's counters.

use std::sync::Arc;

use parking_lot::RwLock;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

use crate::nodes::{Nodes, NodesCollector};

/// One label with a fixed set of values.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Outcome {
    pub(crate) result: &'static str,
}

/// Counters of the link and of joining.
#[derive(Debug, Clone, Default)]
pub(crate) struct Metrics {
    pub(crate) frames_received: Counter,
    pub(crate) changes_sent: Counter,
    pub(crate) changes_rejected: Counter,
    pub(crate) sessions_started: Counter,
    pub(crate) sessions_ended: Family<Outcome, Counter>,
    pub(crate) writes: Family<Outcome, Counter>,
    pub(crate) write_retries: Counter,
    pub(crate) joins: Family<Outcome, Counter>,
}

impl Metrics {
    pub(crate) fn register(registry: &Arc<RwLock<Registry>>, nodes: &Arc<Nodes>) -> Self {
        let metrics = Self::default();
        let mut registry = registry.write();
        let hub = registry.sub_registry_with_prefix("edgemesh_hub");
        hub.register_collector(Box::new(NodesCollector(Arc::clone(nodes))));
        hub.register("received_frames", "Frames received from nodes", metrics.frames_received.clone());
        hub.register("sent", "Upserts and deletes sent to nodes", metrics.changes_sent.clone());
        hub.register(
            "rejected",
            "Changes that a node's store refused, or that can't be sent",
            metrics.changes_rejected.clone(),
        );
        hub.register("sessions_started", "Connections of nodes that began", metrics.sessions_started.clone());
        hub.register("sessions_ended", "Connections of nodes that ended, by reason", metrics.sessions_ended.clone());
        hub.register("writes", "Writes of nodes, by what became of them", metrics.writes.clone());
        hub.register(
            "write_retries",
            "Attempts at a write that failed and are tried again",
            metrics.write_retries.clone(),
        );
        hub.register("joins", "Requests to join, by what became of them", metrics.joins.clone());
        metrics
    }
}
