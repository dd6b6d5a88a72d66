//! Timings of the calls to the container runtime.

use std::time::Duration;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{family::Family, histogram::Histogram},
    registry::Registry,
};

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OperationLabels {
    operation: &'static str,
    result: &'static str,
}

/// One histogram by CRI method and result.
#[derive(Debug, Clone)]
pub struct RuntimeMetrics {
    operations: Family<OperationLabels, Histogram, fn() -> Histogram>,
}

impl Default for RuntimeMetrics {
    fn default() -> Self {
        Self { operations: Family::new_with_constructor(seconds) }
    }
}

/// From a list call (a millisecond) to an image pull (minutes).
fn seconds() -> Histogram {
    Histogram::new([0.002, 0.01, 0.05, 0.2, 1.0, 5.0, 30.0, 300.0])
}

impl RuntimeMetrics {
    /// Adds the histogram to the registry.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "edgemesh_edgecore_cri_operation_seconds",
            "Time that calls to the container runtime took",
            self.operations.clone(),
        );
    }

    /// Records one call.
    pub fn observe(&self, operation: &'static str, took: Duration, ok: bool) {
        let result = if ok { "ok" } else { "error" };
        self.operations.get_or_create(&OperationLabels { operation, result }).observe(took.as_secs_f64());
    }
}
