//! The agent's metrics about the datapath and the host's routes. Each begins with `edgemesh_agent_`.

use std::{fmt, sync::Arc, time::Duration};

use edgemesh_ebpf_abi::Counter as ProgramCounter;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric},
    metrics::{
        MetricType,
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

use crate::datapath::{Programmed, ebpf::Counters, plan::Target, stale::Swept};

/// What a frontend leads to, as a label.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TargetLabel {
    target: &'static str,
}

/// Slots of one family, in one state.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SlotLabels {
    family: &'static str,
    state: &'static str,
}

/// How Service addresses are translated, as a label.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModeLabel {
    mode: &'static str,
}

/// The protocol of a socket, as a label.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ProtocolLabel {
    protocol: &'static str,
}

/// The user side of the datapath.
#[derive(Debug, Clone)]
pub struct DatapathMetrics {
    mode: Family<ModeLabel, Gauge>,
    frontends: Family<TargetLabel, Gauge>,
    slots: Family<SlotLabels, Gauge>,
    outside_frontends: Gauge,
    dns_untracked: Gauge,
    changes: Counter,
    failures: Counter,
    rules_failures: Counter,
    plan_seconds: Histogram,
    write_seconds: Histogram,
    sockets_destroyed: Family<ProtocolLabel, Counter>,
    sweep_failures: Counter,
    silent: Gauge,
    turned_silent: Counter,
}

impl DatapathMetrics {
    /// Registers them.
    pub fn new(registry: &mut Registry) -> Self {
        let seconds = || Histogram::new(exponential_buckets(0.000_05, 4.0, 9));
        let metrics = Self {
            mode: Family::default(),
            frontends: Family::default(),
            slots: Family::default(),
            outside_frontends: Gauge::default(),
            dns_untracked: Gauge::default(),
            changes: Counter::default(),
            failures: Counter::default(),
            rules_failures: Counter::default(),
            plan_seconds: seconds(),
            write_seconds: seconds(),
            sockets_destroyed: Family::default(),
            sweep_failures: Counter::default(),
            silent: Gauge::default(),
            turned_silent: Counter::default(),
        };
        let registry = registry.sub_registry_with_prefix("edgemesh_agent_datapath");
        registry.register("mode", "How Service addresses are translated: 1 for the way in use", metrics.mode.clone());
        registry.register(
            "outside_frontends",
            "Service addresses and node ports that are programmed for callers from outside",
            metrics.outside_frontends.clone(),
        );
        let help = "1 while the host is kept from tracking the flows of cluster DNS";
        registry.register("dns_untracked", help, metrics.dns_untracked.clone());
        registry.register("backend_slots", "Slots for backends in the eBPF maps", metrics.slots.clone());
        registry.register("frontends", "Service addresses that are programmed", metrics.frontends.clone());
        registry.register("changes", "Frontends that were written or removed", metrics.changes.clone());
        registry.register("failures", "Frontends that could not be written", metrics.failures.clone());
        let rules_failures = metrics.rules_failures.clone();
        registry.register("rules_failures", "Times that the rules of nftables could not be written", rules_failures);
        registry.register("plan_seconds", "Time to plan after a change of the catalog", metrics.plan_seconds.clone());
        registry.register("write_seconds", "Time to write a plan's changes", metrics.write_seconds.clone());
        let destroyed = metrics.sockets_destroyed.clone();
        registry.register("sockets_destroyed", "Sockets that were ended because their endpoint is gone", destroyed);
        let failures = metrics.sweep_failures.clone();
        registry.register(
            "sweep_failures",
            "Such sockets, and network namespaces, that could not be dealt with",
            failures,
        );
        let help = "Endpoints that take no connections from this node, so that others are chosen";
        registry.register("silent_endpoints", help, metrics.silent.clone());
        let help = "Times that an endpoint was found to take no connections";
        registry.register("turned_silent", help, metrics.turned_silent.clone());
        metrics
    }

    /// Whether the host is kept from tracking the flows of cluster DNS.
    pub(crate) fn dns_untracked(&self, in_force: bool) {
        self.dns_untracked.set(in_force.into());
    }

    /// How many endpoints take no connections.
    pub(crate) fn silent(&self, count: usize) {
        self.silent.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// One was found to take none.
    pub(crate) fn turned_silent(&self) {
        self.turned_silent.inc();
    }

    /// The way in use.
    pub(crate) fn mode(&self, mode: &'static str) {
        self.mode.get_or_create(&ModeLabel { mode }).set(1);
    }

    /// How many frontends there are for callers from outside.
    pub(crate) fn outside_frontends(&self, count: usize) {
        self.outside_frontends.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// The rules could not be written.
    pub(crate) fn rules_failed(&self) {
        self.rules_failures.inc();
    }

    /// One round of programming.
    pub(crate) fn record(&self, planned: Duration, took: Duration, programmed: Programmed) {
        let Programmed { written, failed, without_room } = programmed;
        self.plan_seconds.observe(planned.as_secs_f64());
        if programmed != Programmed::default() {
            self.write_seconds.observe(took.as_secs_f64());
        }
        self.changes.inc_by(written as u64);
        self.failures.inc_by((failed + without_room) as u64);
    }

    /// Slots of the programs' maps, of IPv4 and of IPv6: how many are in use and how many there are.
    pub(crate) fn slots(&self, slots: Option<[(u32, u32); 2]>) {
        for ((used, all), family) in slots.into_iter().flatten().zip(["ipv4", "ipv6"]) {
            self.slots.get_or_create(&SlotLabels { family, state: "used" }).set(used.into());
            self.slots.get_or_create(&SlotLabels { family, state: "free" }).set((all - used).into());
        }
    }

    /// One look for sockets whose endpoint is gone.
    pub(crate) fn swept(&self, swept: Swept) {
        for (protocol, count) in [("tcp", swept.tcp), ("udp", swept.udp)] {
            self.sockets_destroyed.get_or_create(&ProtocolLabel { protocol }).inc_by(count as u64);
        }
        self.sweep_failures.inc_by(swept.failed as u64);
    }

    /// What is programmed now.
    pub(crate) fn frontends<'a>(&self, targets: impl Iterator<Item = &'a Target>) {
        let mut counts = [("direct", 0_i64), ("listener", 0), ("refuse", 0)];
        for target in targets {
            let at = match target {
                Target::Direct(_) | Target::Sticky(..) => 0,
                Target::Listener(_) => 1,
                Target::Refuse => 2,
            };
            counts[at].1 += 1;
        }
        for (target, count) in counts {
            self.frontends.get_or_create(&TargetLabel { target }).set(count);
        }
    }
}

/// Reads the programs' own counters at each scrape.
#[derive(Debug)]
pub struct ProgramMetrics(pub Arc<Counters>);

impl Collector for ProgramMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        for counter in ProgramCounter::ALL {
            let (name, help) = match counter {
                ProgramCounter::TcpConnects => ("tcp_connects", "TCP connections sent to a backend"),
                ProgramCounter::UdpConnects => ("udp_connects", "UDP sockets connected to a backend"),
                ProgramCounter::UdpDatagrams => ("udp_datagrams", "Datagrams of unconnected sockets sent to a backend"),
                ProgramCounter::Refused => ("refused", "Connections and datagrams refused for want of an endpoint"),
                ProgramCounter::Misses => ("misses", "Connections and datagrams to addresses that are no Service's"),
                ProgramCounter::Inconsistent => {
                    ("inconsistent", "Lookups that met slots of another generation, and were refused")
                }
            };
            let Ok(value) = self.0.get(counter) else { continue };
            let name = format!("edgemesh_agent_socket_{name}");
            let metric = encoder.encode_descriptor(&name, help, None, MetricType::Counter)?;
            ConstCounter::new(value).encode(metric)?;
        }
        Ok(())
    }
}

/// The capture of calls of pods of other networks.
#[derive(Debug, Clone)]
pub struct CaptureMetrics {
    /// Pod ranges that are captured.
    pub(crate) ranges: Gauge,
    /// Those that should be and can't.
    pub(crate) failed: Gauge,
}

impl CaptureMetrics {
    /// Registers them.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self { ranges: Gauge::default(), failed: Gauge::default() };
        let registry = registry.sub_registry_with_prefix("edgemesh_agent_capture");
        registry.register("ranges", "Pod ranges of other networks that are captured", metrics.ranges.clone());
        registry.register("failed", "Such ranges that are refused, by the agent or the kernel", metrics.failed.clone());
        metrics
    }
}

/// Island mode.
#[derive(Debug, Clone, Default)]
pub struct IslandMetrics {
    /// 1 while the cloud is away and endpoints are judged by own checks.
    pub(crate) active: Gauge,
    endpoints: Family<StateLabel, Gauge>,
    checks: Family<ResultLabel, Counter>,
    reports: Family<ResultLabel, Counter>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabel {
    state: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabel {
    result: &'static str,
}

impl IslandMetrics {
    /// Registers them.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let registry = registry.sub_registry_with_prefix("edgemesh_agent_island");
        registry.register(
            "active",
            "Whether the cloud is away and endpoints are judged by own checks",
            metrics.active.clone(),
        );
        registry.register("endpoints", "Endpoints that are held to be dead, or back", metrics.endpoints.clone());
        registry.register("checks", "Own checks of endpoints while the cloud was away", metrics.checks.clone());
        registry.register("reports", "Reports about endpoints to and from other nodes", metrics.reports.clone());
        metrics.endpoints(0, 0);
        metrics
    }

    /// How many endpoints are dead, and how many are back.
    pub(crate) fn endpoints(&self, dead: usize, back: usize) {
        for (state, count) in [("dead", dead), ("back", back)] {
            self.endpoints.get_or_create(&StateLabel { state }).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    /// Counts one check.
    pub(crate) fn checked(&self, answered: bool) {
        let result = if answered { "answered" } else { "failed" };
        self.checks.get_or_create(&ResultLabel { result }).inc();
    }

    /// Counts one report.
    pub(crate) fn reported(&self, result: &'static str) {
        self.reports.get_or_create(&ResultLabel { result }).inc();
    }
}

/// The host's routes.
#[derive(Debug, Clone)]
pub struct RouteMetrics {
    /// Routes to pod ranges that are in place.
    pub(crate) present: Gauge,
    /// Routes that the kernel refuses.
    pub(crate) failed: Gauge,
    /// Pod ranges to which routes of others lead.
    pub(crate) foreign: Gauge,
}

impl RouteMetrics {
    /// Registers them.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self { present: Gauge::default(), failed: Gauge::default(), foreign: Gauge::default() };
        let registry = registry.sub_registry_with_prefix("edgemesh_agent_routes");
        registry.register("present", "Routes to pod ranges of nodes of this network", metrics.present.clone());
        registry.register("failed", "Such routes that the kernel refuses", metrics.failed.clone());
        let help = "Such ranges to which a route of somebody else leads, which is left alone";
        registry.register("foreign", help, metrics.foreign.clone());
        metrics
    }
}
