//! The nodes that are connected, or have a write under way: one protocol state each, and who wakes its connection.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use edgemesh_api::ObjectKey;
use edgemesh_link::{HubNode, Limits, Millis};
use parking_lot::{Mutex, RwLock};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::gauge::ConstGauge,
};
use serde_json::{Value, json};
use tokio::sync::Notify;

use crate::desired::{Affected, Desired};

/// One node.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) node: String,
    pub(crate) state: Mutex<HubNode>,
    /// Wakes the task that serves the node's connection: something may be sent.
    pub(crate) wake: Notify,
    /// Wakes the task of a connection that a newer one replaced.
    pub(crate) replaced: Notify,
}

/// All nodes, and what they should hold.
#[derive(Debug)]
pub(crate) struct Nodes {
    pub(crate) desired: Desired,
    slots: RwLock<HashMap<String, Arc<Slot>>>,
    epoch: AtomicU64,
    started: Instant,
    limits: Limits,
}

impl Nodes {
    pub(crate) fn new(limits: Limits) -> Self {
        // Epochs grow across restarts too, as long as the clock does; nothing breaks where it does not.
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self {
            desired: Desired::default(),
            slots: RwLock::default(),
            epoch: AtomicU64::new(u64::try_from(since.as_millis()).unwrap_or(1)),
            started: Instant::now(),
            limits,
        }
    }

    /// Now, on the clock of the protocol.
    pub(crate) fn now(&self) -> Millis {
        Millis::try_from(self.started.elapsed().as_millis()).unwrap_or(Millis::MAX)
    }

    /// The moment of a protocol time.
    pub(crate) fn instant(&self, at: Millis) -> Instant {
        self.started + Duration::from_millis(at)
    }

    /// Opens a session of the node; an older one of it is over.
    pub(crate) fn attach(&self, node: &str) -> (Arc<Slot>, u64) {
        let epoch = self.epoch.fetch_add(1, Ordering::Relaxed) + 1;
        let mut slots = self.slots.write();
        let slot = slots.entry(node.to_owned()).or_insert_with(|| {
            Arc::new(Slot {
                node: node.to_owned(),
                state: Mutex::new(HubNode::new(node, self.limits)),
                wake: Notify::new(),
                replaced: Notify::new(),
            })
        });
        let slot = Arc::clone(slot);
        slot.state.lock().attach(self.now(), epoch);
        slot.replaced.notify_waiters();
        (slot, epoch)
    }

    /// Ends the session of that epoch.
    pub(crate) fn detach(&self, slot: &Slot, epoch: u64) {
        slot.state.lock().detach(epoch);
        self.forget_idle(slot);
    }

    /// Drops the state of a node that has neither a session nor a write under way.
    pub(crate) fn forget_idle(&self, slot: &Slot) {
        let mut slots = self.slots.write();
        // A session opens under the same lock, so the state can't come to life in between.
        if slots.get(&slot.node).is_some_and(|present| std::ptr::eq(&**present, slot)) && slot.state.lock().idle() {
            slots.remove(&slot.node);
        }
    }

    /// Tells the sessions of the nodes concerned.
    pub(crate) fn changed(&self, affected: &[Affected]) {
        if affected.is_empty() {
            return;
        }
        let slots = self.slots.read();
        let tell = |slot: &Slot, key: &Arc<ObjectKey>| {
            slot.state.lock().changed(key);
            slot.wake.notify_one();
        };
        for one in affected {
            match one {
                Affected::All(key) => slots.values().for_each(|slot| tell(slot, key)),
                Affected::Node(node, key) => {
                    if let Some(slot) = slots.get(node) {
                        tell(slot, key);
                    }
                }
                Affected::Gateways(key) => {
                    for slot in slots.values().filter(|slot| self.desired.is_gateway_node(&slot.node)) {
                        tell(slot, key);
                    }
                }
            }
        }
    }

    /// The sessions, for the debug page.
    pub(crate) fn describe(&self) -> Value {
        let mut sessions: Vec<_> = self
            .slots
            .read()
            .values()
            .map(|slot| {
                let counts = slot.state.lock().counts();
                json!({
                    "node": slot.node, "epoch": counts.epoch, "synced": counts.synced, "queued": counts.queued,
                    "unacknowledged": counts.unacknowledged, "ackedBatch": counts.acked, "sent": counts.sent,
                })
            })
            .collect();
        sessions.sort_by_key(|session| session["node"].to_string());
        json!({"objects": self.desired.len(), "sessions": sessions})
    }
}

/// Gauges that are counted when they are read.
#[derive(Debug)]
pub(crate) struct NodesCollector(pub(crate) Arc<Nodes>);

impl Collector for NodesCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let (mut sessions, mut synced, mut queued, mut unacknowledged) = (0_i64, 0_i64, 0_i64, 0_i64);
        for slot in self.0.slots.read().values() {
            let counts = slot.state.lock().counts();
            sessions += i64::from(counts.epoch != 0);
            synced += i64::from(counts.synced);
            queued += i64::try_from(counts.queued).unwrap_or(i64::MAX);
            unacknowledged += i64::try_from(counts.unacknowledged).unwrap_or(i64::MAX);
        }
        for (name, help, value) in [
            ("sessions", "Nodes that are connected", sessions),
            ("synced_sessions", "Nodes that hold everything that they should have held when they connected", synced),
            ("queued_objects", "Changed objects that wait to be sent, over all nodes", queued),
            ("unacknowledged_objects", "Objects that were sent and not acknowledged, over all nodes", unacknowledged),
        ] {
            let gauge = ConstGauge::new(value);
            let metric = encoder.encode_descriptor(name, help, None, gauge.metric_type())?;
            gauge.encode(metric)?;
        }
        Ok(())
    }
}
