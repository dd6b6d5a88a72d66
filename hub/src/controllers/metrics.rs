//! The controllers' metrics.

use std::sync::Arc;

use parking_lot::RwLock;
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

/// How a reconcile ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(crate) enum Outcome {
    Ok,
    Conflict,
    Error,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct ReconcileLabels {
    pub(crate) controller: &'static str,
    pub(crate) result: Outcome,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct ControllerLabels {
    pub(crate) controller: &'static str,
}

/// Reconciles by controller and result, and how many objects wait.
#[derive(Debug, Clone, Default)]
pub(crate) struct ControllerMetrics {
    pub(crate) reconciles: Family<ReconcileLabels, Counter>,
    pub(crate) queue_depth: Family<ControllerLabels, Gauge>,
}

impl ControllerMetrics {
    pub(crate) fn register(registry: &Arc<RwLock<Registry>>) -> Self {
        let metrics = Self::default();
        let mut registry = registry.write();
        let controllers = registry.sub_registry_with_prefix("edgemesh_hub_controller");
        controllers.register("reconciles", "Reconciles by controller and result", metrics.reconciles.clone());
        controllers.register("queue_depth", "Objects that wait for their controller", metrics.queue_depth.clone());
        metrics
    }
}
