//! The hub's end of the link for one node, across its sessions. No I/O and no clock: frames, ticks and local events go in;
//! frames, writes and events come out.
//!
//! A session holds no objects: it holds the keys that changed since they were last sent, and looks the object up in the
//! node's [`View`] at the moment of sending. So only the latest version is ever queued, and a key whose object is gone
//! by then is sent as a delete.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Arc,
};

use bytes::Bytes;
use edgemesh_api::{
    ObjectKey,
    link::{
        Ack, Batch, Change, Digest, EdgeFrame, Heartbeat, Hello, HubFrame, MAX_PROTOCOL_VERSION, MIN_PROTOCOL_VERSION,
        ObjectRef, Refuse, SyncDone, ToEdge, ToHub, Welcome, WriteResult, WriteResults, WriteVerb, Writes,
    },
    names::MAX_OBJECT_BYTES,
};

use crate::{Fault, Limits, Millis, frames};

/// Most results in one frame; far below the frame limit with their messages cut to [`MAX_MESSAGE_BYTES`].
const RESULTS_PER_FRAME: usize = 128;
/// Longest text for people in a message.
const MAX_MESSAGE_BYTES: usize = 1024;

/// One object as it is sent: shared by all nodes that hold it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldObject {
    /// `metadata.uid`.
    pub uid: String,
    /// `metadata.resourceVersion` in the cluster.
    pub origin_version: String,
    /// The whole object.
    pub json: Bytes,
}

/// The set of objects that a node should hold, as known now. It must be complete whenever a session asks:
/// what it lacks is deleted at the node.
pub trait View {
    /// The object, or none where the node should not hold it.
    fn get(&self, key: &ObjectKey) -> Option<Arc<HeldObject>>;
    /// Calls `each` for every object that the node should hold.
    fn for_each(&self, each: &mut dyn FnMut(&Arc<ObjectKey>, &HeldObject));
}

/// A write of the node that is to be executed now. No other write of the same object of this node is under way.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeWrite {
    /// The session that it came in.
    pub epoch: u64,
    /// Its number in the node's outbox.
    pub seq: u64,
    /// What it does.
    pub verb: WriteVerb,
    /// To which object.
    pub key: ObjectKey,
    /// The uid that the object had at the node.
    pub uid: String,
    /// The object, or DeleteOptions, as JSON.
    pub body: Bytes,
}

/// How a write ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WriteOutcome {
    /// The API took it.
    Done,
    /// The API or the hub's rules will never take it.
    Refused {
        /// A Kubernetes status reason.
        reason: String,
        /// Why, for people.
        message: String,
    },
    /// Given up because the session is over; the node sends it again.
    Abandoned,
}

/// What the hub's owner should know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HubEvent {
    /// The node has acknowledged all that differed when the session began.
    Synced {
        /// How many changes that took.
        changes: usize,
    },
    /// An object did not reach the node's store.
    Rejected {
        /// Which object.
        key: ObjectKey,
        /// A Kubernetes status reason.
        reason: String,
        /// Why, for people.
        message: String,
    },
}

/// Counters of a node's session for metrics and debug pages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HubCounts {
    /// The session's epoch; 0 without one.
    pub epoch: u64,
    /// Changed objects that were not sent yet.
    pub queued: usize,
    /// Changes that were sent and not acknowledged.
    pub unacknowledged: usize,
    /// The highest acknowledged batch.
    pub acked: u64,
    /// Whether the node has acknowledged all that differed when the session began.
    pub synced: bool,
    /// Changes sent in this session.
    pub sent: u64,
}

/// The hub's state for one node.
#[derive(Debug)]
pub struct HubNode {
    node: String,
    limits: Limits,
    session: Option<Session>,
    /// Objects with a write under way, of any session: a later session's write of the same object waits for it.
    executing: HashSet<ObjectKey>,
}

#[derive(Debug)]
enum Phase {
    Greeting,
    Digesting(HashMap<ObjectKey, (String, String)>),
    Streaming,
}

#[derive(Debug)]
struct InFlight {
    seq: u64,
    bytes: usize,
    changes: usize,
    sent_at: Millis,
}

#[derive(Debug)]
struct Session {
    epoch: u64,
    phase: Phase,
    phase_since: Millis,
    last_received: Millis,
    last_sent: Millis,
    control: VecDeque<EdgeFrame>,
    results: VecDeque<WriteResult>,
    dirty: HashSet<Arc<ObjectKey>>,
    order: VecDeque<Arc<ObjectKey>>,
    next_seq: u64,
    in_flight: VecDeque<InFlight>,
    in_flight_bytes: usize,
    acked: u64,
    sent: u64,
    /// Changes of the first difference that were not sent yet; keys are sent in order, so these come first.
    initial_left: usize,
    initial_total: usize,
    sync_marker: Option<u64>,
    synced: bool,
    writes: VecDeque<NodeWrite>,
    write_outstanding: usize,
    events: VecDeque<HubEvent>,
}

impl HubNode {
    /// The state for a node without a session.
    pub fn new(node: impl Into<String>, limits: Limits) -> Self {
        Self { node: node.into(), limits, session: None, executing: HashSet::new() }
    }

    /// A connection of the node is there. It replaces the session before it, if any: whoever serves that one learns it
    /// from the [`Fault::Replaced`] that every call with its epoch returns. Epochs must grow.
    pub fn attach(&mut self, now: Millis, epoch: u64) {
        self.session = Some(Session {
            epoch,
            phase: Phase::Greeting,
            phase_since: now,
            last_received: now,
            last_sent: now,
            control: VecDeque::new(),
            results: VecDeque::new(),
            dirty: HashSet::new(),
            order: VecDeque::new(),
            next_seq: 1,
            in_flight: VecDeque::new(),
            in_flight_bytes: 0,
            acked: 0,
            sent: 0,
            initial_left: 0,
            initial_total: 0,
            sync_marker: None,
            synced: false,
            writes: VecDeque::new(),
            write_outstanding: 0,
            events: VecDeque::new(),
        });
    }

    /// The connection of that epoch is gone.
    pub fn detach(&mut self, epoch: u64) {
        if self.session.as_ref().is_some_and(|session| session.epoch == epoch) {
            self.session = None;
        }
    }

    /// Whether neither a session nor a write is there, so that the state may be dropped.
    pub fn idle(&self) -> bool {
        self.session.is_none() && self.executing.is_empty()
    }

    /// Whether that epoch is the node's current session.
    pub fn current(&self, epoch: u64) -> bool {
        self.session.as_ref().is_some_and(|session| session.epoch == epoch)
    }

    /// The counters of the current session.
    pub fn counts(&self) -> HubCounts {
        self.session.as_ref().map_or_else(HubCounts::default, |session| HubCounts {
            epoch: session.epoch,
            queued: session.order.len(),
            unacknowledged: session.in_flight.iter().map(|batch| batch.changes).sum(),
            acked: session.acked,
            synced: session.synced,
            sent: session.sent,
        })
    }

    fn session(&mut self, epoch: u64) -> Result<&mut Session, Fault> {
        self.session.as_mut().filter(|session| session.epoch == epoch).ok_or(Fault::Replaced)
    }

    /// A frame came over the connection of that epoch.
    ///
    /// # Errors
    /// When the session is over; the caller sends [`refusal`] and closes.
    pub fn on_frame(&mut self, now: Millis, epoch: u64, frame: ToHub, view: &dyn View) -> Result<(), Fault> {
        let limits = self.limits;
        let node = self.node.clone();
        let session = self.session(epoch)?;
        session.last_received = now;
        match frame.frame {
            None | Some(HubFrame::Heartbeat(_)) => Ok(()),
            Some(HubFrame::Hello(hello)) => session.hello(now, &node, &hello, &limits),
            Some(HubFrame::Digest(digest)) => session.digest(now, digest, view, &limits),
            Some(HubFrame::Ack(ack)) => session.ack(ack),
            Some(HubFrame::Writes(writes)) => session.accept_writes(writes, &limits),
        }
    }

    /// The view changed at `key`: an object came, changed, or went.
    pub fn changed(&mut self, key: &Arc<ObjectKey>) {
        // Before the digest is complete there is nothing to note: the difference will be taken from the view itself.
        if let Some(session) = &mut self.session
            && matches!(session.phase, Phase::Streaming)
        {
            session.mark(key);
        }
    }

    /// The next frame to send, if any. Called when the connection can take one, so a slow connection holds back the
    /// stream and not the hub.
    ///
    /// # Errors
    /// When that epoch is over.
    pub fn next_frame(&mut self, now: Millis, epoch: u64, view: &dyn View) -> Result<Option<ToEdge>, Fault> {
        let limits = self.limits;
        let session = self.session(epoch)?;
        let frame = session.next_frame(now, view, &limits);
        if frame.is_some() {
            session.last_sent = now;
        }
        Ok(frame.map(ToEdge::from))
    }

    /// The next write to execute: the oldest of an object that has none under way.
    pub fn next_write(&mut self, epoch: u64) -> Option<NodeWrite> {
        let executing = &self.executing;
        let session = self.session.as_mut().filter(|session| session.epoch == epoch)?;
        let at = session.writes.iter().position(|write| !executing.contains(&write.key))?;
        let write = session.writes.remove(at)?;
        self.executing.insert(write.key.clone());
        Some(write)
    }

    /// A write has ended. Its result reaches the node only in the session that brought the write: in another one, the
    /// same number may mean another write, of a store that was made anew.
    pub fn executed(&mut self, write: &NodeWrite, outcome: WriteOutcome) {
        self.executing.remove(&write.key);
        let Ok(session) = self.session(write.epoch) else { return };
        let (reason, message) = match outcome {
            WriteOutcome::Done => (String::new(), String::new()),
            WriteOutcome::Refused { reason, message } => {
                (if reason.is_empty() { "Invalid".to_owned() } else { reason }, cut(message))
            }
            WriteOutcome::Abandoned => return,
        };
        session.write_outstanding = session.write_outstanding.saturating_sub(1);
        session.results.push_back(WriteResult { seq: write.seq, reason, message });
    }

    /// The next thing that the owner should know.
    pub fn next_event(&mut self) -> Option<HubEvent> {
        self.session.as_mut()?.events.pop_front()
    }

    /// Checks the deadlines.
    ///
    /// # Errors
    /// When one has passed, or that epoch is over.
    pub fn tick(&mut self, now: Millis, epoch: u64) -> Result<(), Fault> {
        let limits = self.limits;
        let session = self.session(epoch)?;
        if now >= session.last_received + limits.dead_after {
            return Err(Fault::Silent(limits.dead_after));
        }
        if !matches!(session.phase, Phase::Streaming) && now >= session.phase_since + limits.greeting {
            return Err(Fault::SlowStart(limits.greeting));
        }
        if session.in_flight.front().is_some_and(|oldest| now >= oldest.sent_at + limits.ack_deadline) {
            return Err(Fault::Stalled(limits.ack_deadline));
        }
        Ok(())
    }

    /// When [`Self::tick`] or [`Self::next_frame`] has something to do at the latest.
    pub fn deadline(&self) -> Option<Millis> {
        let session = self.session.as_ref()?;
        let mut at = (session.last_received + self.limits.dead_after).min(session.last_sent + self.limits.heartbeat);
        if !matches!(session.phase, Phase::Streaming) {
            at = at.min(session.phase_since + self.limits.greeting);
        }
        if let Some(oldest) = session.in_flight.front() {
            at = at.min(oldest.sent_at + self.limits.ack_deadline);
        }
        Some(at)
    }
}

/// The frame that tells the node why its session ends.
pub fn refusal(fault: &Fault) -> ToEdge {
    EdgeFrame::Refuse(Refuse { code: fault.refuse_code() as i32, message: cut(fault.to_string()) }).into()
}

impl Session {
    fn hello(&mut self, now: Millis, node: &str, hello: &Hello, limits: &Limits) -> Result<(), Fault> {
        if !matches!(self.phase, Phase::Greeting) {
            return Err(Fault::protocol("a second Hello"));
        }
        if hello.node != node {
            return Err(Fault::Identity { certificate: node.to_owned(), said: cut(hello.node.clone()) });
        }
        let version = hello.max_version.min(MAX_PROTOCOL_VERSION);
        if version < hello.min_version.max(MIN_PROTOCOL_VERSION) {
            return Err(Fault::Version {
                node_min: hello.min_version,
                node_max: hello.max_version,
                hub_min: MIN_PROTOCOL_VERSION,
                hub_max: MAX_PROTOCOL_VERSION,
            });
        }
        self.control.push_back(EdgeFrame::Welcome(Welcome {
            version,
            epoch: self.epoch,
            heartbeat_ms: u32::try_from(limits.heartbeat).unwrap_or(u32::MAX),
            dead_after_ms: u32::try_from(limits.dead_after).unwrap_or(u32::MAX),
            write_window: u32::try_from(limits.write_window).unwrap_or(u32::MAX),
        }));
        self.phase = Phase::Digesting(HashMap::new());
        self.phase_since = now;
        Ok(())
    }

    fn digest(&mut self, now: Millis, digest: Digest, view: &dyn View, limits: &Limits) -> Result<(), Fault> {
        let Phase::Digesting(held) = &mut self.phase else { return Err(Fault::protocol("a digest out of turn")) };
        for entry in digest.entries {
            held.insert(frames::key(entry.key)?, (entry.uid, entry.origin_version));
        }
        if held.len() > limits.digest_entries {
            return Err(Fault::protocol(format!("a digest of more than {} objects", limits.digest_entries)));
        }
        self.phase_since = now;
        if !digest.last {
            return Ok(());
        }
        let mut held = std::mem::take(held);
        self.phase = Phase::Streaming;
        let mut changed = Vec::new();
        view.for_each(&mut |key, object| match held.remove(&**key) {
            Some((uid, version)) if uid == object.uid && version == object.origin_version => {}
            _ => changed.push(Arc::clone(key)),
        });
        // What the node holds and should not goes first: it may stand in the way of something new.
        let mut gone: Vec<_> = held.into_keys().map(Arc::new).collect();
        gone.sort_unstable();
        changed.sort_unstable_by(|a, b| rank(a).cmp(&rank(b)).then_with(|| a.cmp(b)));
        for key in gone.iter().chain(&changed) {
            self.mark(key);
        }
        self.initial_left = self.order.len();
        self.initial_total = self.order.len();
        Ok(())
    }

    fn mark(&mut self, key: &Arc<ObjectKey>) {
        if self.dirty.insert(Arc::clone(key)) {
            self.order.push_back(Arc::clone(key));
        }
    }

    fn ack(&mut self, ack: Ack) -> Result<(), Fault> {
        if ack.seq >= self.next_seq {
            return Err(Fault::protocol(format!("batch {} was acknowledged but never sent", ack.seq)));
        }
        while let Some(oldest) = self.in_flight.front()
            && oldest.seq <= ack.seq
        {
            self.in_flight_bytes -= oldest.bytes;
            self.in_flight.pop_front();
        }
        self.acked = self.acked.max(ack.seq);
        for rejected in ack.rejected {
            self.events.push_back(HubEvent::Rejected {
                key: frames::key(rejected.key)?,
                reason: cut(rejected.reason),
                message: cut(rejected.message),
            });
        }
        self.check_synced();
        Ok(())
    }

    fn check_synced(&mut self) {
        if !self.synced && self.sync_marker.is_some_and(|marker| self.acked >= marker) {
            self.synced = true;
            self.events.push_back(HubEvent::Synced { changes: self.initial_total });
        }
    }

    fn accept_writes(&mut self, writes: Writes, limits: &Limits) -> Result<(), Fault> {
        if matches!(self.phase, Phase::Greeting) {
            return Err(Fault::protocol("writes before Hello"));
        }
        for write in writes.writes {
            if self.write_outstanding >= limits.write_window {
                return Err(Fault::protocol(format!("more than {} writes without a result", limits.write_window)));
            }
            self.write_outstanding += 1;
            self.writes.push_back(NodeWrite {
                epoch: self.epoch,
                seq: write.seq,
                verb: WriteVerb::try_from(write.verb).unwrap_or(WriteVerb::Unspecified),
                key: frames::key(write.key)?,
                uid: write.uid,
                body: write.body,
            });
        }
        Ok(())
    }

    fn next_frame(&mut self, now: Millis, view: &dyn View, limits: &Limits) -> Option<EdgeFrame> {
        if let Some(frame) = self.control.pop_front() {
            return Some(frame);
        }
        if !self.results.is_empty() {
            let count = self.results.len().min(RESULTS_PER_FRAME);
            return Some(EdgeFrame::WriteResults(WriteResults { results: self.results.drain(..count).collect() }));
        }
        if let Some(batch) = self.next_batch(now, view, limits) {
            return Some(EdgeFrame::Batch(batch));
        }
        if matches!(self.phase, Phase::Streaming) && self.initial_left == 0 && self.sync_marker.is_none() {
            let seq = self.next_seq - 1;
            self.sync_marker = Some(seq);
            self.check_synced();
            return Some(EdgeFrame::SyncDone(SyncDone { seq }));
        }
        (now >= self.last_sent + limits.heartbeat).then_some(EdgeFrame::Heartbeat(Heartbeat {}))
    }

    fn next_batch(&mut self, now: Millis, view: &dyn View, limits: &Limits) -> Option<Batch> {
        if self.in_flight.len() >= limits.window_batches || self.in_flight_bytes >= limits.window_bytes {
            return None;
        }
        let mut changes = Vec::new();
        let mut bytes = 0;
        while changes.len() < limits.batch_changes {
            let Some(key) = self.order.front() else { break };
            let object = view.get(key);
            let size = 256 + object.as_ref().map_or(0, |object| object.json.len());
            if !changes.is_empty() && bytes + size > limits.batch_bytes {
                break;
            }
            let Some(key) = self.order.pop_front() else { break };
            self.dirty.remove(&key);
            // The marker follows the first difference, which may end within a batch.
            self.initial_left = self.initial_left.saturating_sub(1);
            if object.as_ref().is_some_and(|object| object.json.len() > MAX_OBJECT_BYTES) {
                self.events.push_back(HubEvent::Rejected {
                    key: (*key).clone(),
                    reason: "RequestEntityTooLarge".to_owned(),
                    message: format!("the object is larger than {MAX_OBJECT_BYTES} bytes"),
                });
                continue;
            }
            bytes += size;
            changes.push(match object {
                Some(object) => Change {
                    key: Some(ObjectRef::from(&*key)),
                    uid: object.uid.clone(),
                    origin_version: object.origin_version.clone(),
                    object: Some(object.json.clone()),
                },
                None => Change { key: Some(ObjectRef::from(&*key)), ..Change::default() },
            });
        }
        if changes.is_empty() {
            return None;
        }
        let seq = self.next_seq;
        self.next_seq += 1;
        self.sent += changes.len() as u64;
        self.in_flight.push_back(InFlight { seq, bytes, changes: changes.len(), sent_at: now });
        self.in_flight_bytes += bytes;
        Some(Batch { seq, changes })
    }
}

/// The order of the first difference: what others refer to comes before what refers to it.
fn rank(key: &ObjectKey) -> u8 {
    match key.resource.plural.as_str() {
        "namespaces" => 0,
        "customresourcedefinitions" => 1,
        "nodes" | "meshnodes" => 2,
        "services" => 3,
        "endpointslices" => 4,
        "configmaps" | "secrets" | "serviceaccounts" => 5,
        "pods" => 7,
        _ => 6,
    }
}

fn cut(mut text: String) -> String {
    if text.len() > MAX_MESSAGE_BYTES {
        let mut end = MAX_MESSAGE_BYTES;
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
    }
    text
}
