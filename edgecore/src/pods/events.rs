//! Events about pods, as `kubectl describe` shows them: counted when they repeat, and limited for each pod.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use edgemesh_telemetry::drain::Shutdown;
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::{api::NodeApi, metrics::PodMetrics, sandbox::PodIdentity};

/// Events that wait to be written.
const QUEUE: usize = 256;
/// Distinct events whose repetitions are counted.
const REMEMBERED: usize = 512;
/// A repeated event is written again at most so often, after its first repetitions.
const REWRITE_INTERVAL: Duration = Duration::from_secs(60);
/// So many events of one pod at once, then one for each refill interval (as client-go's spam filter does).
const BURST: f64 = 25.0;
const REFILL_INTERVAL: Duration = Duration::from_secs(60);
/// Longest message.
const MAX_MESSAGE_CHARS: usize = 1000;

/// Something that happened to a pod.
#[derive(Debug, Clone)]
pub(crate) struct PodEvent {
    pub(crate) pod: PodIdentity,
    /// The container that it's about.
    pub(crate) container: Option<String>,
    pub(crate) warning: bool,
    pub(crate) reason: &'static str,
    pub(crate) message: String,
}

/// Where events are handed in. Never waits: events are dropped when there are too many.
#[derive(Debug, Clone)]
pub(crate) struct Events {
    queue: mpsc::Sender<PodEvent>,
    metrics: PodMetrics,
}

impl Events {
    /// Starts the task that writes events.
    pub(crate) fn start(api: NodeApi, node: &str, metrics: PodMetrics, shutdown: &Shutdown) -> Self {
        let (queue, events) = mpsc::channel(QUEUE);
        let recorder = Recorder {
            api,
            node: node.to_owned(),
            metrics: metrics.clone(),
            seen: HashMap::new(),
            budgets: HashMap::new(),
        };
        let stopping = shutdown.stopping().clone();
        shutdown.spawn(async move {
            tokio::select! {
                () = recorder.run(events) => {}
                () = stopping.cancelled() => {}
            }
        });
        Self { queue, metrics }
    }

    /// Hands in an event.
    pub(crate) fn send(&self, event: PodEvent) {
        if self.queue.try_send(event).is_err() {
            self.metrics.events_dropped.inc();
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct EventKey {
    uid: String,
    container: Option<String>,
    reason: &'static str,
    message: String,
}

#[derive(Debug)]
struct Seen {
    event: Value,
    name: String,
    count: u64,
    written: Instant,
}

struct Recorder {
    api: NodeApi,
    node: String,
    metrics: PodMetrics,
    seen: HashMap<EventKey, Seen>,
    budgets: HashMap<String, (f64, Instant)>,
}

impl Recorder {
    async fn run(mut self, mut events: mpsc::Receiver<PodEvent>) {
        while let Some(event) = events.recv().await {
            self.record(event).await;
        }
    }

    async fn record(&mut self, mut event: PodEvent) {
        event.message = event.message.chars().take(MAX_MESSAGE_CHARS).collect();
        let now = Instant::now();
        let key = EventKey {
            uid: event.pod.uid.clone(),
            container: event.container.clone(),
            reason: event.reason,
            message: event.message.clone(),
        };
        let time = timestamp_now();
        if let Some(seen) = self.seen.get_mut(&key) {
            seen.count += 1;
            if seen.count > 3 && now.duration_since(seen.written) < REWRITE_INTERVAL {
                return;
            }
            seen.written = now;
            if let Some(fields) = seen.event.as_object_mut() {
                fields.insert("count".to_owned(), json!(seen.count));
                fields.insert("lastTimestamp".to_owned(), json!(time));
            }
            let (name, body) = (seen.name.clone(), seen.event.clone());
            if let Err(error) = self.api.update_event(&event.pod.namespace, &name, body).await {
                // Gone after its time: the next one is a new event.
                tracing::debug!(%error, name, "an event could not be updated");
                self.seen.remove(&key);
            }
            return;
        }
        if !spend(&mut self.budgets, &event.pod.uid, now) {
            self.metrics.events_dropped.inc();
            return;
        }
        let name = format!("{}.{:016x}", event.pod.name, rand::random::<u64>());
        let body = body(&event, &name, &time, &self.node);
        if let Err(error) = self.api.create_event(&event.pod.namespace, body.clone()).await {
            tracing::warn!(%error, reason = event.reason, "an event could not be written");
            return;
        }
        if self.seen.len() >= REMEMBERED {
            // The oldest half goes: rare, and cheaper than keeping an order.
            let mut ages: Vec<Instant> = self.seen.values().map(|seen| seen.written).collect();
            ages.sort_unstable();
            let middle = ages.get(ages.len() / 2).copied().unwrap_or(now);
            self.seen.retain(|_, seen| seen.written > middle);
        }
        self.seen.insert(key, Seen { event: body, name, count: 1, written: now });
    }
}

/// Takes one from a pod's budget, if there is one left.
fn spend(budgets: &mut HashMap<String, (f64, Instant)>, uid: &str, now: Instant) -> bool {
    let refilled = |(tokens, since): (f64, Instant)| {
        (tokens + now.saturating_duration_since(since).as_secs_f64() / REFILL_INTERVAL.as_secs_f64()).min(BURST)
    };
    if budgets.len() > REMEMBERED {
        budgets.retain(|_, budget| refilled(*budget) < BURST);
    }
    let tokens = budgets.get(uid).map_or(BURST, |budget| refilled(*budget));
    let enough = tokens >= 1.0;
    budgets.insert(uid.to_owned(), (if enough { tokens - 1.0 } else { tokens }, now));
    enough
}

/// Now, in whole seconds.
pub(crate) fn timestamp_now() -> Timestamp {
    Timestamp::from_second(Timestamp::now().as_second()).unwrap_or(Timestamp::UNIX_EPOCH)
}

fn body(event: &PodEvent, name: &str, time: &Timestamp, node: &str) -> Value {
    let mut involved = json!({
        "kind": "Pod", "apiVersion": "v1", "namespace": event.pod.namespace, "name": event.pod.name, "uid": event.pod.uid,
    });
    if let (Some(container), Some(fields)) = (&event.container, involved.as_object_mut()) {
        fields.insert("fieldPath".to_owned(), json!(format!("spec.containers{{{container}}}")));
    }
    json!({
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": name, "namespace": event.pod.namespace},
        "involvedObject": involved,
        "type": if event.warning { "Warning" } else { "Normal" },
        "reason": event.reason,
        "message": event.message,
        "source": {"component": "edgecore", "host": node},
        "reportingComponent": "edgecore",
        "reportingInstance": node,
        "firstTimestamp": time,
        "lastTimestamp": time,
        "count": 1,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_pod_can_not_write_events_without_end() {
        let mut budgets = HashMap::new();
        let now = Instant::now();
        let spent = (0..100).filter(|_| spend(&mut budgets, "a", now)).count();
        assert_eq!(spent, 25);
        assert!(spend(&mut budgets, "b", now), "another pod has its own budget");
        assert!(spend(&mut budgets, "a", now + REFILL_INTERVAL));
        assert!(!spend(&mut budgets, "a", now + REFILL_INTERVAL));
    }

    #[test]
    fn an_event_names_its_pod_and_container() {
        let pod = PodIdentity { namespace: "shop".to_owned(), name: "web".to_owned(), uid: "u".to_owned() };
        let event = PodEvent {
            pod,
            container: Some("c".to_owned()),
            warning: true,
            reason: "BackOff",
            message: "m".to_owned(),
        };
        let body = body(&event, "web.1", &Timestamp::UNIX_EPOCH, "edge-1");
        assert_eq!(body["involvedObject"]["fieldPath"], "spec.containers{c}");
        assert_eq!((&body["type"], &body["firstTimestamp"]), (&json!("Warning"), &json!("1970-01-01T00:00:00Z")));
    }
}
