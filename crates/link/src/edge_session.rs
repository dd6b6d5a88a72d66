//! The node's end of the link, across its connections. No I/O and no clock: frames, ticks, and the results of the store go
//! in; frames and [`EdgeEffect`]s come out.
//!
//! It lives as long as the daemon, because two rules span connections: a batch of an old connection that is still being
//! committed must be finished before a new connection says what the node holds, and delays grow from attempt to attempt.

use std::collections::{BTreeSet, VecDeque};

use edgemesh_api::{
    link::{
        Ack, Batch, Digest, DigestEntry, EdgeFrame, Heartbeat, Hello, HubFrame, MAX_PROTOCOL_VERSION,
        MIN_PROTOCOL_VERSION, ObjectRef, Refuse, RefuseCode, Rejected, ToEdge, ToHub, Welcome, Write, WriteResults,
        Writes,
    },
    names::MAX_OBJECT_BYTES,
};

use crate::{
    Fault, Limits, Millis,
    backoff::Backoff,
    edge_effect::{EdgeChange, EdgeCounts, EdgeEffect, EdgePhase, HeldVersion, OutboxWrite, Rejection},
    frames,
};

/// Most bytes of writes in one frame; one larger write still travels, alone.
const WRITE_FRAME_BYTES: usize = 512 << 10;
/// A hub may be this many times its window ahead before it counts as broken.
const QUEUE_FACTOR: usize = 4;
/// Most rejections in one acknowledgement; the frame limit holds with room.
const REJECTIONS_PER_ACK: usize = 1_000;

#[derive(Debug)]
struct Applying {
    connection: u64,
    through: u64,
    changes: u64,
}

#[derive(Debug, Default)]
struct OutboxState {
    loading: Option<u64>,
    loaded_to: u64,
    /// Whether the outbox may hold entries after `loaded_to`.
    more: bool,
    to_send: VecDeque<OutboxWrite>,
    unfinished: BTreeSet<u64>,
}

/// The node's end of the link.
#[derive(Debug)]
pub struct EdgeSession {
    node: String,
    software: String,
    limits: Limits,
    backoff: Backoff,
    phase: EdgePhase,
    phase_since: Millis,
    /// Number of the connection; what an older one left behind is told apart by it.
    connection: u64,
    epoch: u64,
    heartbeat: Millis,
    dead_after: Millis,
    write_window: usize,
    last_received: Millis,
    last_sent: Millis,
    hello: bool,
    digest_loading: Option<u64>,
    digest: Option<VecDeque<DigestEntry>>,
    batches: VecDeque<Batch>,
    queued_changes: usize,
    received_to: u64,
    applying: Option<Applying>,
    acked: u64,
    ack: Option<Ack>,
    sync_marker: Option<u64>,
    outbox: OutboxState,
    effects: VecDeque<EdgeEffect>,
    applied: u64,
    rejected: u64,
}

impl EdgeSession {
    /// The link of `node`, not yet connected; the first attempt is made at the first [`Self::tick`]. `seed` makes the
    /// jitter of the delays repeatable.
    pub fn new(node: impl Into<String>, software: impl Into<String>, limits: Limits, seed: u64) -> Self {
        Self {
            node: node.into(),
            software: software.into(),
            limits,
            backoff: Backoff::new(limits.backoff_first, limits.backoff_cap, seed),
            phase: EdgePhase::Waiting(0),
            phase_since: 0,
            connection: 0,
            epoch: 0,
            heartbeat: limits.heartbeat,
            dead_after: limits.dead_after,
            write_window: 0,
            last_received: 0,
            last_sent: 0,
            hello: false,
            digest_loading: None,
            digest: None,
            batches: VecDeque::new(),
            queued_changes: 0,
            received_to: 0,
            applying: None,
            acked: 0,
            ack: None,
            sync_marker: None,
            outbox: OutboxState::default(),
            effects: VecDeque::new(),
            applied: 0,
            rejected: 0,
        }
    }

    /// Where the link is.
    pub fn phase(&self) -> EdgePhase {
        self.phase
    }

    /// The counters.
    pub fn counts(&self) -> EdgeCounts {
        EdgeCounts {
            epoch: self.epoch,
            acked: self.acked,
            applied: self.applied,
            rejected: self.rejected,
            writes_in_flight: self.outbox.unfinished.len(),
            connections: self.connection,
        }
    }

    /// The next thing to do.
    pub fn next_effect(&mut self) -> Option<EdgeEffect> {
        self.effects.pop_front()
    }

    /// The connection asked for with [`EdgeEffect::Connect`] is there.
    pub fn connected(&mut self, now: Millis) {
        if self.phase != EdgePhase::Connecting {
            return;
        }
        self.connection += 1;
        self.enter(now, EdgePhase::Greeting);
        self.heartbeat = self.limits.heartbeat;
        self.dead_after = self.limits.dead_after;
        self.write_window = 0;
        self.last_received = now;
        self.last_sent = now;
        self.hello = true;
        self.received_to = 0;
        self.acked = 0;
        self.sync_marker = None;
        self.outbox = OutboxState { loading: self.outbox.loading, more: true, ..OutboxState::default() };
    }

    /// The connection broke, or could not be made.
    pub fn disconnected(&mut self, now: Millis, why: impl Into<String>) {
        if !matches!(self.phase, EdgePhase::Waiting(_)) {
            self.end(now, Fault::Transport(why.into()));
        }
    }

    /// The attempt to connect failed in a way that the session should know.
    pub fn failed(&mut self, now: Millis, fault: Fault) {
        if self.phase == EdgePhase::Connecting {
            self.end(now, fault);
        }
    }

    /// A frame came over the current connection.
    pub fn on_frame(&mut self, now: Millis, frame: ToEdge) {
        if matches!(self.phase, EdgePhase::Waiting(_) | EdgePhase::Connecting) {
            return;
        }
        self.last_received = now;
        let result = match frame.frame {
            None | Some(EdgeFrame::Heartbeat(_)) => Ok(()),
            Some(EdgeFrame::Welcome(welcome)) => self.welcome(now, welcome),
            Some(EdgeFrame::Refuse(refuse)) => Err(refused(refuse)),
            Some(EdgeFrame::Batch(batch)) => self.batch(batch),
            Some(EdgeFrame::SyncDone(done)) => self.sync_done(now, done.seq),
            Some(EdgeFrame::WriteResults(results)) => self.write_results(results),
        };
        if let Err(fault) = result {
            self.end(now, fault);
        }
    }

    /// What the store holds from the cloud, as asked for with [`EdgeEffect::LoadDigest`].
    pub fn digest_loaded(&mut self, now: Millis, held: Result<Vec<HeldVersion>, String>) {
        let connection = self.digest_loading.take();
        if self.phase != EdgePhase::Digesting {
            return;
        }
        if connection != Some(self.connection) {
            // It was read for a connection that is gone; what came since then is missing in it.
            self.want_digest();
            return;
        }
        match held {
            Ok(held) => {
                self.digest = Some(
                    held.into_iter()
                        .map(|held| DigestEntry {
                            key: Some(ObjectRef::from(&held.key)),
                            uid: held.uid,
                            origin_version: held.origin_version,
                        })
                        .collect(),
                );
            }
            Err(error) => self.end(now, Fault::Store(error)),
        }
    }

    /// The changes of [`EdgeEffect::Apply`] are durable, but for the rejected ones; or the store failed as a whole.
    pub fn applied(&mut self, now: Millis, result: Result<Vec<Rejection>, String>) {
        let Some(applying) = self.applying.take() else { return };
        match result {
            Ok(rejections) => {
                self.rejected += rejections.len() as u64;
                self.applied += applying.changes.saturating_sub(rejections.len() as u64);
                if applying.connection == self.connection && self.streaming() {
                    self.acked = applying.through;
                    let ack = self.ack.get_or_insert_with(Ack::default);
                    ack.seq = applying.through;
                    ack.rejected.extend(rejections.into_iter().map(|rejection| Rejected {
                        seq: rejection.seq,
                        key: Some(ObjectRef::from(&rejection.key)),
                        reason: rejection.reason,
                        message: rejection.message,
                    }));
                    self.check_live(now);
                }
            }
            Err(error) => {
                if applying.connection == self.connection && self.streaming() {
                    self.end(now, Fault::Store(error));
                }
            }
        }
        self.apply_next();
        if self.phase == EdgePhase::Digesting && self.digest_loading.is_none() && self.digest.is_none() {
            self.want_digest();
        }
    }

    /// Something was appended to the outbox.
    pub fn outbox_appended(&mut self) {
        self.outbox.more = true;
        self.load_outbox();
    }

    /// The outbox's entries, as asked for with [`EdgeEffect::LoadOutbox`]; fewer than the limit means that these are all.
    pub fn outbox_loaded(&mut self, now: Millis, entries: Result<Vec<OutboxWrite>, String>, limit: usize) {
        let connection = self.outbox.loading.take();
        if !self.established() {
            return;
        }
        if connection != Some(self.connection) {
            self.load_outbox();
            return;
        }
        let entries = match entries {
            Ok(entries) => entries,
            Err(error) => return self.end(now, Fault::Store(error)),
        };
        // `more` was cleared when the load began; an append since then has set it again.
        self.outbox.more |= entries.len() >= limit;
        for entry in entries {
            if entry.seq <= self.outbox.loaded_to {
                continue;
            }
            self.outbox.loaded_to = entry.seq;
            if entry.body.len() > MAX_OBJECT_BYTES {
                let message = format!("the object is larger than {MAX_OBJECT_BYTES} bytes");
                let refusal = Some(("RequestEntityTooLarge".to_owned(), message));
                self.effects.push_back(EdgeEffect::WriteDone { seq: entry.seq, refusal });
                continue;
            }
            self.outbox.to_send.push_back(entry);
        }
        self.load_outbox();
    }

    /// Checks the deadlines, and begins an attempt to connect when it is time.
    pub fn tick(&mut self, now: Millis) {
        match self.phase {
            EdgePhase::Waiting(at) if now >= at => {
                self.enter(now, EdgePhase::Connecting);
                self.effects.push_back(EdgeEffect::Connect);
            }
            // The owner's own deadlines end an attempt.
            EdgePhase::Waiting(_) | EdgePhase::Connecting => {}
            EdgePhase::Greeting if now >= self.phase_since + self.limits.greeting => {
                self.end(now, Fault::SlowStart(self.limits.greeting));
            }
            _ if now >= self.last_received + self.dead_after => self.end(now, Fault::Silent(self.dead_after)),
            EdgePhase::Live if now >= self.phase_since + self.limits.stable_after => self.backoff.reset(),
            _ => {}
        }
    }

    /// When [`Self::tick`] or [`Self::next_frame`] has something to do at the latest.
    pub fn deadline(&self) -> Option<Millis> {
        match self.phase {
            EdgePhase::Waiting(at) => Some(at),
            EdgePhase::Connecting => None,
            EdgePhase::Greeting => Some(self.phase_since + self.limits.greeting),
            _ => Some((self.last_received + self.dead_after).min(self.last_sent + self.heartbeat)),
        }
    }

    /// The next frame to send, if any. Called when the connection can take one.
    pub fn next_frame(&mut self, now: Millis) -> Option<ToHub> {
        if matches!(self.phase, EdgePhase::Waiting(_) | EdgePhase::Connecting) {
            return None;
        }
        let frame = self.build_frame(now)?;
        self.last_sent = now;
        Some(frame.into())
    }

    fn build_frame(&mut self, now: Millis) -> Option<HubFrame> {
        if std::mem::take(&mut self.hello) {
            return Some(HubFrame::Hello(Hello {
                node: self.node.clone(),
                min_version: MIN_PROTOCOL_VERSION,
                max_version: MAX_PROTOCOL_VERSION,
                software: self.software.clone(),
            }));
        }
        if let Some(mut ack) = self.ack.take() {
            if ack.rejected.len() > REJECTIONS_PER_ACK {
                let rest = ack.rejected.split_off(REJECTIONS_PER_ACK);
                self.ack = Some(Ack { seq: ack.seq, rejected: rest });
            }
            return Some(HubFrame::Ack(ack));
        }
        if let Some(entries) = &mut self.digest {
            let count = entries.len().min(self.limits.digest_chunk);
            let part = entries.drain(..count).collect();
            let last = entries.is_empty();
            if last {
                self.digest = None;
                self.enter(now, EdgePhase::Syncing);
            }
            return Some(HubFrame::Digest(Digest { entries: part, last }));
        }
        if let Some(writes) = self.next_writes() {
            return Some(HubFrame::Writes(writes));
        }
        (now >= self.last_sent + self.heartbeat).then_some(HubFrame::Heartbeat(Heartbeat {}))
    }

    fn next_writes(&mut self) -> Option<Writes> {
        let mut writes = Vec::new();
        let mut bytes = 0;
        while self.outbox.unfinished.len() < self.write_window
            && let Some(next) = self.outbox.to_send.front()
            && (writes.is_empty() || bytes + next.body.len() <= WRITE_FRAME_BYTES)
            && let Some(write) = self.outbox.to_send.pop_front()
        {
            bytes += write.body.len() + 256;
            self.outbox.unfinished.insert(write.seq);
            writes.push(Write {
                seq: write.seq,
                verb: write.verb as i32,
                key: Some(ObjectRef::from(&write.key)),
                uid: write.uid,
                body: write.body,
            });
        }
        self.load_outbox();
        (!writes.is_empty()).then_some(Writes { writes })
    }

    fn welcome(&mut self, now: Millis, welcome: Welcome) -> Result<(), Fault> {
        if self.phase != EdgePhase::Greeting {
            return Err(Fault::protocol("a second Welcome"));
        }
        if !(MIN_PROTOCOL_VERSION..=MAX_PROTOCOL_VERSION).contains(&welcome.version) {
            return Err(Fault::protocol(format!("the hub chose protocol version {}", welcome.version)));
        }
        self.epoch = welcome.epoch;
        self.heartbeat = Millis::from(welcome.heartbeat_ms).clamp(100, 60_000);
        self.dead_after = Millis::from(welcome.dead_after_ms).clamp(2 * self.heartbeat, 300_000);
        self.write_window = (welcome.write_window as usize).clamp(1, 1024);
        self.enter(now, EdgePhase::Digesting);
        if self.applying.is_none() && self.digest_loading.is_none() {
            self.want_digest();
        }
        self.load_outbox();
        Ok(())
    }

    fn want_digest(&mut self) {
        self.digest_loading = Some(self.connection);
        self.effects.push_back(EdgeEffect::LoadDigest);
    }

    fn batch(&mut self, batch: Batch) -> Result<(), Fault> {
        if !self.streaming() {
            return Err(Fault::protocol("a batch before the digest"));
        }
        if batch.seq != self.received_to + 1 {
            return Err(Fault::protocol(format!("batch {} after batch {}", batch.seq, self.received_to)));
        }
        self.queued_changes += batch.changes.len();
        if self.batches.len() >= QUEUE_FACTOR * self.limits.window_batches
            || self.queued_changes > QUEUE_FACTOR * self.limits.window_batches * self.limits.batch_changes
        {
            return Err(Fault::protocol("the hub sends faster than its window"));
        }
        self.received_to = batch.seq;
        self.batches.push_back(batch);
        self.apply_next();
        Ok(())
    }

    /// Everything that has come in goes into the next transaction.
    fn apply_next(&mut self) {
        if self.applying.is_some() || self.batches.is_empty() || !self.streaming() {
            return;
        }
        let mut changes = Vec::with_capacity(self.queued_changes);
        let mut unreadable = Vec::new();
        let mut through = self.acked;
        for batch in self.batches.drain(..) {
            through = batch.seq;
            for change in batch.changes {
                match frames::key(change.key.clone()) {
                    Ok(key) => changes.push(EdgeChange {
                        seq: batch.seq,
                        key,
                        uid: change.uid,
                        origin_version: change.origin_version,
                        object: change.object,
                    }),
                    Err(fault) => unreadable.push(Rejected {
                        seq: batch.seq,
                        key: change.key,
                        reason: "BadRequest".to_owned(),
                        message: fault.to_string(),
                    }),
                }
            }
        }
        self.queued_changes = 0;
        if !unreadable.is_empty() {
            self.rejected += unreadable.len() as u64;
            let acked = self.acked;
            self.ack.get_or_insert_with(|| Ack { seq: acked, rejected: Vec::new() }).rejected.extend(unreadable);
        }
        self.applying = Some(Applying { connection: self.connection, through, changes: changes.len() as u64 });
        self.effects.push_back(EdgeEffect::Apply(changes));
    }

    fn sync_done(&mut self, now: Millis, seq: u64) -> Result<(), Fault> {
        if !self.streaming() || seq > self.received_to {
            return Err(Fault::protocol("SyncDone out of turn"));
        }
        self.sync_marker = Some(seq);
        self.check_live(now);
        Ok(())
    }

    fn check_live(&mut self, now: Millis) {
        if self.phase == EdgePhase::Syncing && self.sync_marker.is_some_and(|marker| self.acked >= marker) {
            self.enter(now, EdgePhase::Live);
            self.effects.push_back(EdgeEffect::Synced { epoch: self.epoch });
        }
    }

    fn write_results(&mut self, results: WriteResults) -> Result<(), Fault> {
        for result in results.results {
            if !self.outbox.unfinished.remove(&result.seq) {
                return Err(Fault::protocol(format!("a result for write {}, which awaits none", result.seq)));
            }
            let refusal = (!result.reason.is_empty()).then_some((result.reason, result.message));
            self.effects.push_back(EdgeEffect::WriteDone { seq: result.seq, refusal });
        }
        self.load_outbox();
        Ok(())
    }

    /// Reads on in the outbox once what was read is nearly sent.
    fn load_outbox(&mut self) {
        if !self.established()
            || !self.outbox.more
            || self.outbox.loading.is_some()
            || self.outbox.to_send.len() >= self.write_window
        {
            return;
        }
        self.outbox.more = false;
        self.outbox.loading = Some(self.connection);
        self.effects.push_back(EdgeEffect::LoadOutbox { after: self.outbox.loaded_to, limit: self.write_window });
    }

    fn established(&self) -> bool {
        matches!(self.phase, EdgePhase::Digesting | EdgePhase::Syncing | EdgePhase::Live)
    }

    fn streaming(&self) -> bool {
        matches!(self.phase, EdgePhase::Syncing | EdgePhase::Live)
    }

    fn enter(&mut self, now: Millis, phase: EdgePhase) {
        self.phase = phase;
        self.phase_since = now;
    }

    fn end(&mut self, now: Millis, fault: Fault) {
        if matches!(self.phase, EdgePhase::Live) && now >= self.phase_since + self.limits.stable_after {
            self.backoff.reset();
        }
        let slow = match &fault {
            Fault::Refused { code, .. } => {
                matches!(code, RefuseCode::Version | RefuseCode::Identity | RefuseCode::Replaced)
            }
            _ => false,
        };
        let delay = if slow { self.backoff.jitter(self.limits.backoff_refused) } else { self.backoff.next_delay() };
        self.enter(now, EdgePhase::Waiting(now + delay));
        self.epoch = 0;
        self.hello = false;
        self.digest = None;
        self.ack = None;
        // Not yet in a transaction: the next session's digest asks for it again.
        self.batches.clear();
        self.queued_changes = 0;
        self.outbox.to_send.clear();
        self.outbox.unfinished.clear();
        self.effects.push_back(EdgeEffect::Disconnect(fault));
    }
}

fn refused(refuse: Refuse) -> Fault {
    let code = RefuseCode::try_from(refuse.code).unwrap_or(RefuseCode::Unspecified);
    Fault::Refused { code, message: refuse.message }
}
