//! Counters of the tunnel, by path.

use std::{
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use parking_lot::Mutex;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use tokio::time::Instant;

use crate::peer::{DirectTransport, Path};

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PathLabel {
    path: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByteLabel {
    path: &'static str,
    direction: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

/// All metrics of one tunnel; cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Metrics {
    opened: Family<PathLabel, Counter>,
    accepted: Family<PathLabel, Counter>,
    bytes: Family<ByteLabel, Counter>,
    open_failures: Family<ReasonLabel, Counter>,
    refused: Family<ReasonLabel, Counter>,
    connections: Family<PathLabel, Gauge>,
    pub(crate) streams: OpenStreams,
    pub(crate) strangers: Counter,
    pub(crate) reservations: Gauge,
    pub(crate) upgrades: Counter,
    pub(crate) upgrade_retries: Counter,
}

/// How many streams are open, and when one ended last.
#[derive(Debug, Clone, Default)]
pub(crate) struct OpenStreams {
    count: Gauge,
    last_end: Arc<Mutex<Option<Instant>>>,
}

/// Counts a stream as open until it is dropped.
#[derive(Debug)]
pub(crate) struct OpenStream {
    all: OpenStreams,
    /// Whether what it has sent is waited for after its end.
    carried: bool,
}

impl OpenStreams {
    pub(crate) fn begin(&self) -> OpenStream {
        self.count.inc();
        OpenStream { all: self.clone(), carried: true }
    }

    /// Whether there was none all this time, but for those that carried nothing.
    pub(crate) fn none_for(&self, time: Duration) -> bool {
        self.count.get() == 0 && self.last_end.lock().is_none_or(|end| end.elapsed() >= time)
    }
}

impl OpenStream {
    /// It was refused: nobody waits for more of it.
    pub(crate) fn carries_nothing(&mut self) {
        self.carried = false;
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        if self.carried {
            // Before it is no longer counted.
            *self.all.last_end.lock() = Some(Instant::now());
        }
        self.all.count.dec();
    }
}

/// The counters of streams on one path.
#[derive(Debug, Clone)]
pub(crate) struct StreamBytes {
    pub(crate) sent: Counter<u64, AtomicU64>,
    pub(crate) received: Counter<u64, AtomicU64>,
}

impl Metrics {
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let registry = registry.sub_registry_with_prefix("edgemesh_tunnel");
        registry.register("streams_opened", "Streams opened to other nodes", metrics.opened.clone());
        registry.register("streams_accepted", "Streams accepted from other nodes", metrics.accepted.clone());
        registry.register("bytes", "Bytes carried in streams", metrics.bytes.clone());
        registry.register("open_failures", "Streams that could not be opened", metrics.open_failures.clone());
        registry.register("streams_refused", "Streams of other nodes that were refused", metrics.refused.clone());
        registry.register("connections", "Connections to other nodes", metrics.connections.clone());
        registry.register("streams", "Streams open now", metrics.streams.count.clone());
        registry.register("strangers_refused", "Connections refused: unknown PeerId", metrics.strangers.clone());
        registry.register("reservations", "Relays that hold a place for this node", metrics.reservations.clone());
        registry.register("upgrades", "Relayed connections upgraded to direct ones", metrics.upgrades.clone());
        let help = "Peers reached through a relay that were tried again by better ways";
        registry.register("upgrade_retries", help, metrics.upgrade_retries.clone());
        for path in [Path::Direct(DirectTransport::Quic), Path::Direct(DirectTransport::Tcp)] {
            metrics.start_at_zero(&path);
        }
        metrics.start_at_zero(&Path::Relayed { via: String::new() });
        metrics
    }

    /// A counter that was never touched isn't shown; these are shown as zero from the start.
    fn start_at_zero(&self, path: &Path) {
        drop(self.opened.get_or_create(&PathLabel { path: path.label() }));
        drop(self.accepted.get_or_create(&PathLabel { path: path.label() }));
        let _ = self.stream_bytes(path);
    }

    pub(crate) fn opened(&self, path: &Path) {
        self.opened.get_or_create(&PathLabel { path: path.label() }).inc();
    }

    pub(crate) fn accepted(&self, path: &Path) {
        self.accepted.get_or_create(&PathLabel { path: path.label() }).inc();
    }

    pub(crate) fn open_failed(&self, reason: &'static str) {
        self.open_failures.get_or_create(&ReasonLabel { reason }).inc();
    }

    pub(crate) fn refused(&self, reason: &'static str) {
        self.refused.get_or_create(&ReasonLabel { reason }).inc();
    }

    pub(crate) fn connection(&self, path: &Path, change: i64) {
        self.connections.get_or_create(&PathLabel { path: path.label() }).inc_by(change);
    }

    pub(crate) fn stream_bytes(&self, path: &Path) -> StreamBytes {
        let of = |direction| self.bytes.get_or_create_owned(&ByteLabel { path: path.label(), direction });
        StreamBytes { sent: of("sent"), received: of("received") }
    }
}
