//! edgecore's counters about the link.

use std::sync::{Arc, atomic::AtomicU64};

use parking_lot::RwLock;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

/// Why a connection ended.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Reason {
    /// One of a fixed set of words.
    pub reason: &'static str,
}

/// The link's metrics.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    pub(crate) link_connected: Gauge,
    pub(crate) outbox_depth: Gauge,
    pub(crate) applied: Total,
    pub(crate) rejected: Total,
    pub(crate) connections: Total,
    pub(crate) disconnects: Family<Reason, Counter>,
    pub(crate) writes_done: Counter,
    pub(crate) writes_refused: Counter,
}

/// A counter that is counted elsewhere and copied here.
#[derive(Debug, Clone, Default)]
pub(crate) struct Total(Counter, Arc<AtomicU64>);

impl Total {
    pub(crate) fn set(&self, value: u64) {
        let before = self.1.swap(value, std::sync::atomic::Ordering::Relaxed);
        self.0.inc_by(value.saturating_sub(before));
    }
}

impl Metrics {
    /// Registers the metrics with edgecore's prefix.
    pub fn register(registry: &Arc<RwLock<Registry>>) -> Self {
        let metrics = Self::default();
        let mut registry = registry.write();
        let edgecore = registry.sub_registry_with_prefix("edgemesh_edgecore");
        edgecore.register("link_connected", "Whether the hub has welcomed this node", metrics.link_connected.clone());
        edgecore.register("outbox_depth", "Local writes that the hub doesn't have yet", metrics.outbox_depth.clone());
        edgecore.register("applied", "Changes from the cloud that are on disk", metrics.applied.0.clone());
        edgecore.register("rejected", "Changes from the cloud that the store refused", metrics.rejected.0.clone());
        edgecore.register("connections", "Connections to the hub that were made", metrics.connections.0.clone());
        edgecore.register("disconnects", "Connections and attempts that ended, by reason", metrics.disconnects.clone());
        edgecore.register("writes_done", "Local writes that the cluster took", metrics.writes_done.clone());
        edgecore.register("writes_refused", "Local writes that the cluster refused", metrics.writes_refused.clone());
        metrics
    }
}
