//! Counters of the proxied path, and of the calls of pods.

use edgemesh_mesh::model::Protocol;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

/// The `path` label: `direct` to the pod's own address, `tunnel` to its node, `relay` through another one, `none` if it never got that far.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    protocol: &'static str,
    path: &'static str,
    result: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Direction {
    protocol: &'static str,
    direction: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ProtocolLabel {
    protocol: &'static str,
}

/// The metrics; cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct ProxiedMetrics {
    connections: Family<Outcome, Counter>,
    /// Bytes of TCP connections.
    to_endpoint: Counter,
    to_client: Counter,
    active_tcp: Gauge,
    active_udp: Gauge,
    dropped: Counter,
    evicted: Counter,
    ejections: Counter,
    spilled: Counter,
}

impl ProxiedMetrics {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let registry = registry.sub_registry_with_prefix("edgemesh_agent_proxied");
        let metrics = Self::shared(registry, "Service ports that the agent proxies");
        registry.register(
            "ejections",
            "Endpoints that could not be reached and are passed over for a while",
            metrics.ejections.clone(),
        );
        registry.register(
            "spilled",
            "Connections and UDP flows to endpoints farther away, because all nearer ones are passed over",
            metrics.spilled.clone(),
        );
        metrics
    }

    /// Those of calls of pods of other networks by their own addresses.
    pub(super) fn register_for_pods(registry: &mut Registry) -> Self {
        let registry = registry.sub_registry_with_prefix("edgemesh_agent_pod_calls");
        Self::shared(registry, "pods of other networks, by their own addresses")
    }

    fn shared(registry: &mut Registry, to: &str) -> Self {
        let mut metrics = Self::default();
        registry.register("connections", format!("Connections and UDP flows to {to}"), metrics.connections.clone());
        let bytes = Family::default();
        registry.register("bytes", format!("Bytes of TCP connections to {to}"), bytes.clone());
        let of = |direction| bytes.get_or_create_owned(&Direction { protocol: "tcp", direction });
        (metrics.to_endpoint, metrics.to_client) = (of("to_endpoint"), of("to_client"));
        let active = Family::default();
        registry.register("active", format!("Connections and UDP flows to {to}, open now"), active.clone());
        let of = |protocol| active.get_or_create_owned(&ProtocolLabel { protocol });
        (metrics.active_tcp, metrics.active_udp) = (of("tcp"), of("udp"));
        registry.register(
            "dropped_datagrams",
            "Datagrams dropped: too many flows, or too fast",
            metrics.dropped.clone(),
        );
        registry.register(
            "evicted_flows",
            "UDP flows ended before their idle time, because newer ones needed their places",
            metrics.evicted.clone(),
        );
        for path in ["direct", "tunnel", "relay"] {
            for protocol in ["tcp", "udp"] {
                drop(metrics.connections.get_or_create(&Outcome { protocol, path, result: "ok" }));
            }
        }
        metrics
    }

    pub(super) fn connection(&self, protocol: &'static str, path: &'static str, result: &'static str) {
        self.connections.get_or_create(&Outcome { protocol, path, result }).inc();
    }

    pub(super) fn tcp_bytes(&self, to_endpoint: u64, to_client: u64) {
        self.to_endpoint.inc_by(to_endpoint);
        self.to_client.inc_by(to_client);
    }

    pub(super) fn dropped(&self) {
        self.dropped.inc();
    }

    pub(super) fn evicted(&self, flows: usize) {
        self.evicted.inc_by(flows as u64);
    }

    pub(super) fn ejection(&self) {
        self.ejections.inc();
    }

    pub(super) fn spilled(&self) {
        self.spilled.inc();
    }

    /// Counts as active until it is dropped.
    pub(super) fn active(&self, protocol: Protocol) -> Active {
        let gauge = match protocol {
            Protocol::Tcp => &self.active_tcp,
            Protocol::Udp => &self.active_udp,
        };
        gauge.inc();
        Active(gauge.clone())
    }
}

/// An active connection or flow.
#[derive(Debug)]
pub(super) struct Active(Gauge);

impl Drop for Active {
    fn drop(&mut self) {
        self.0.dec();
    }
}
