//! The gateway's metrics. Labels have few values, none that a client chooses.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

/// A request's labels.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RequestLabels {
    /// `NAMESPACE/NAME` of the HTTPRoute, or `none`.
    pub route: String,
    /// Status code.
    pub code: u16,
    /// Whose answer it is: `backend` or `gateway`.
    pub source: &'static str,
}

/// An upstream connection's labels.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ConnectLabels {
    /// `direct` or `tunnel`.
    pub path: &'static str,
    /// `ok`, or the kind of failure.
    pub result: &'static str,
}

/// All metrics.
#[derive(Debug)]
pub struct Metrics {
    /// Requests.
    pub requests: Family<RequestLabels, Counter>,
    /// Time to the head of the answer.
    pub seconds: Histogram,
    /// Upstream connections.
    pub connects: Family<ConnectLabels, Counter>,
    /// Endpoints that could not be reached and are passed over for a while.
    pub ejections: Counter,
    /// Endpoints farther away that were tried because all nearer ones are passed over.
    pub spilled: Counter,
    /// Open client connections.
    pub connections: Gauge,
    /// Open listener ports.
    pub listeners: Gauge,
}

impl Metrics {
    /// Makes and registers them.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            requests: Family::default(),
            seconds: Histogram::new([0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0]),
            connects: Family::default(),
            ejections: Counter::default(),
            spilled: Counter::default(),
            connections: Gauge::default(),
            listeners: Gauge::default(),
        };
        let registry = registry.sub_registry_with_prefix("edgemesh_gateway");
        registry.register(
            "requests",
            "Requests by HTTPRoute, status code and whose answer it was",
            metrics.requests.clone(),
        );
        registry.register(
            "request_seconds",
            "Time from a request's head to its answer's head",
            metrics.seconds.clone(),
        );
        registry.register("upstream_connects", "Connections to endpoints by path and result", metrics.connects.clone());
        registry.register(
            "upstream_ejections",
            "Endpoints that could not be reached and are passed over for a while",
            metrics.ejections.clone(),
        );
        registry.register(
            "upstream_spilled",
            "Endpoints farther away that were tried because all nearer ones are passed over",
            metrics.spilled.clone(),
        );
        registry.register("connections", "Open client connections", metrics.connections.clone());
        registry.register("listeners", "Open listener ports", metrics.listeners.clone());
        metrics
    }
}
