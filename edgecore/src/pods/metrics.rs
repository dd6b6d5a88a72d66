//! Metrics of the node's pods.

use std::sync::atomic::AtomicI64;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PhaseLabel {
    phase: &'static str,
}

/// What is counted about the pods.
#[derive(Debug, Clone, Default)]
pub(crate) struct PodMetrics {
    pods: Family<PhaseLabel, Gauge<i64, AtomicI64>>,
    /// Containers that were started again.
    pub(crate) restarts: Counter,
    /// Events that were not written because there were too many.
    pub(crate) events_dropped: Counter,
}

impl PodMetrics {
    /// Adds the metrics to the registry.
    pub(crate) fn register(&self, registry: &mut Registry) {
        registry.register("edgemesh_edgecore_pods", "Pods of this node by phase", self.pods.clone());
        registry.register(
            "edgemesh_edgecore_container_restarts",
            "Containers that were started again",
            self.restarts.clone(),
        );
        registry.register(
            "edgemesh_edgecore_events_dropped",
            "Events that were not written because there were too many",
            self.events_dropped.clone(),
        );
    }

    /// Counts a pod in its phase until the guard is dropped.
    pub(crate) fn pod(&self) -> PhaseGuard {
        PhaseGuard { metrics: self.clone(), phase: None }
    }

    fn add(&self, phase: Option<&'static str>, change: i64) {
        if let Some(phase) = phase {
            self.pods.get_or_create(&PhaseLabel { phase }).inc_by(change);
        }
    }
}

/// One pod in the gauge by phase.
#[derive(Debug)]
pub(crate) struct PhaseGuard {
    metrics: PodMetrics,
    phase: Option<&'static str>,
}

impl PhaseGuard {
    /// The pod is in this phase now.
    pub(crate) fn set(&mut self, phase: &str) {
        let phase = match phase {
            "Running" => "Running",
            "Succeeded" => "Succeeded",
            "Failed" => "Failed",
            _ => "Pending",
        };
        self.metrics.add(self.phase, -1);
        self.metrics.add(Some(phase), 1);
        self.phase = Some(phase);
    }
}

impl Drop for PhaseGuard {
    fn drop(&mut self) {
        self.metrics.add(self.phase, -1);
    }
}
