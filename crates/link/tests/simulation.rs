//! A deterministic simulation of both ends of the link with everything that can go wrong: connections that break or fall
//! silent at any point, frames of old connections that arrive late, a store that is slow, crashes of either end, a node
//! whose store is made anew. Each seed is one history; after it the faults stop and both sides must agree.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, clippy::print_stderr)]

mod objects;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque},
    sync::Arc,
};

use bytes::Bytes;
use edgemesh_api::{
    ObjectKey,
    link::{HubFrame, ToEdge, ToHub, WriteVerb},
};
use edgemesh_link::{
    EdgeEffect, EdgePhase, EdgeSession, HubNode, Millis,
    edge_effect::{EdgeChange, HeldVersion, OutboxWrite, Rejection},
    hub_session::{NodeWrite, WriteOutcome, refusal},
};
use objects::{HubView, key, limits};
use rand::{Rng, SeedableRng, rngs::StdRng};

const KEYS: u64 = 12;
const QUEUE: usize = 3;

type Objects = BTreeMap<ObjectKey, (u64, u64)>;

struct Hub {
    node: HubNode,
    view: HubView,
    executing: Vec<NodeWrite>,
}

/// One connection: what is on its way, and which ends still use it.
struct Wire {
    epoch: u64,
    to_hub: VecDeque<ToHub>,
    to_edge: VecDeque<ToEdge>,
    hub_open: bool,
    edge_open: bool,
    /// Nothing passes any more and nobody is told.
    silent: bool,
}

enum StoreWork {
    Digest,
    /// A digest that was read, but is not answered yet.
    DigestRead(Vec<HeldVersion>),
    /// The session's epoch, and its changes.
    Apply(u64, Vec<EdgeChange>),
    Outbox {
        after: u64,
        limit: usize,
    },
}

struct World {
    random: StdRng,
    now: Millis,
    cloud: Objects,
    next_uid: u64,
    next_version: u64,
    watch: VecDeque<(ObjectKey, Option<(u64, u64)>)>,
    api_status: HashMap<ObjectKey, u64>,
    hub: Option<Hub>,
    next_epoch: u64,
    wires: Vec<Wire>,
    edge: EdgeSession,
    edge_wire: Option<u64>,
    work: VecDeque<StoreWork>,
    store: Objects,
    gone_uids: HashSet<u64>,
    committed: BTreeSet<(u64, u64)>,
    outbox: BTreeMap<u64, (ObjectKey, u64)>,
    next_outbox: u64,
    next_value: u64,
    last_value: HashMap<ObjectKey, u64>,
    reject_rate: f64,
    fault_rate: f64,
    /// How often the store does nothing when it could.
    store_delay: f64,
    stats: Stats,
}

#[derive(Default, Debug)]
struct Stats {
    sessions: u64,
    applied: u64,
    writes: u64,
    crashes: u64,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let reject_rate = if random.random_bool(0.3) { 0.05 } else { 0.0 };
        // Rare faults for most seeds: a session must get somewhere before it breaks.
        let fault_rate = 0.15 * f64::powi(random.random(), 3);
        let store_delay = if random.random_bool(0.5) { random.random_range(0.5..0.98) } else { 0.0 };
        Self {
            now: 1,
            cloud: Objects::new(),
            next_uid: 1,
            next_version: 1,
            watch: VecDeque::new(),
            api_status: HashMap::new(),
            hub: None,
            next_epoch: 1,
            wires: Vec::new(),
            edge: EdgeSession::new("n", "simulation", limits(), seed),
            edge_wire: None,
            work: VecDeque::new(),
            store: Objects::new(),
            gone_uids: HashSet::new(),
            committed: BTreeSet::new(),
            outbox: BTreeMap::new(),
            next_outbox: 1,
            next_value: 1,
            last_value: HashMap::new(),
            reject_rate,
            fault_rate,
            store_delay,
            stats: Stats::default(),
            random,
        }
    }

    fn chance(&mut self, p: f64) -> bool {
        self.random.random_bool(p)
    }

    fn step(&mut self, faults: bool) {
        let choice = self.random.random_range(0..if faults { 125 } else { 80 });
        match choice {
            0..20 => (0..self.random.random_range(1..5)).for_each(|_| self.hub_turn()),
            20..40 => (0..self.random.random_range(1..5)).for_each(|_| self.edge_turn()),
            40..65 => (0..self.random.random_range(1..9)).for_each(|_| self.deliver()),
            65..72 => self.finish_store_work(),
            72..76 => self.finish_write(),
            76..80 => self.deliver_watch(),
            80..90 => self.change_cloud(),
            90..98 => self.write_locally(),
            98..113 => self.advance(),
            _ if !self.chance(self.fault_rate) => {}
            113..117 => self.break_wire(),
            117..120 => self.silence_wire(),
            120..122 => self.crash_edge(),
            122..124 => self.crash_hub(),
            _ => {
                if self.chance(0.1) {
                    self.wipe_edge();
                }
            }
        }
    }

    fn advance(&mut self) {
        self.now += self.random.random_range(1..600);
        self.edge.tick(self.now);
        self.carry_out_effects();
        let Some(hub) = &mut self.hub else { return };
        for wire in self.wires.iter_mut().filter(|wire| wire.hub_open) {
            if let Err(fault) = hub.node.tick(self.now, wire.epoch) {
                wire.to_edge.push_back(refusal(&fault));
                wire.hub_open = false;
                hub.node.detach(wire.epoch);
            }
        }
    }

    fn change_cloud(&mut self) {
        let key = key(self.random.random_range(0..KEYS));
        let version = self.next_version;
        self.next_version += 1;
        let state = match self.cloud.get(&key).copied() {
            Some(_) if self.chance(0.3) => None,
            // Deleted and created again between two looks.
            Some(_) if self.chance(0.1) => {
                self.next_uid += 1;
                Some((self.next_uid, version))
            }
            Some((uid, _)) => Some((uid, version)),
            None => {
                self.next_uid += 1;
                Some((self.next_uid, version))
            }
        };
        match state {
            Some(state) => self.cloud.insert(key.clone(), state),
            None => self.cloud.remove(&key),
        };
        self.watch.push_back((key, state));
    }

    fn deliver_watch(&mut self) {
        let Some(hub) = &mut self.hub else { return };
        if let Some((key, state)) = self.watch.pop_front() {
            hub.view.set(&key, state);
            hub.node.changed(&Arc::new(key));
        }
    }

    fn write_locally(&mut self) {
        let key = key(self.random.random_range(0..3));
        let value = self.next_value;
        self.next_value += 1;
        self.outbox.retain(|_, (pending, _)| *pending != key);
        self.outbox.insert(self.next_outbox, (key.clone(), value));
        self.next_outbox += 1;
        self.last_value.insert(key, value);
        self.edge.outbox_appended();
        self.carry_out_effects();
    }

    fn hub_turn(&mut self) {
        let Some(hub) = &mut self.hub else {
            let mut view = HubView(BTreeMap::new());
            for (key, state) in &self.cloud {
                view.set(key, Some(*state));
            }
            self.watch.clear();
            self.hub = Some(Hub { node: HubNode::new("n", limits()), view, executing: Vec::new() });
            return;
        };
        for wire in self.wires.iter_mut().filter(|wire| wire.hub_open && wire.to_edge.len() < QUEUE) {
            match hub.node.next_frame(self.now, wire.epoch, &hub.view) {
                Ok(Some(frame)) => wire.to_edge.push_back(frame),
                Ok(None) => {}
                Err(fault) => {
                    wire.to_edge.push_back(refusal(&fault));
                    wire.hub_open = false;
                    hub.node.detach(wire.epoch);
                }
            }
            while let Some(write) = hub.node.next_write(wire.epoch) {
                hub.executing.push(write);
            }
            while hub.node.next_event().is_some() {}
        }
    }

    fn finish_write(&mut self) {
        let Some(hub) = &mut self.hub else { return };
        if hub.executing.is_empty() {
            return;
        }
        let write = hub.executing.swap_remove(self.random.random_range(0..hub.executing.len()));
        if !hub.node.current(write.epoch) && self.random.random_bool(0.5) {
            hub.node.executed(&write, WriteOutcome::Abandoned);
            return;
        }
        execute(&mut self.api_status, &write);
        self.stats.writes += 1;
        hub.node.executed(&write, WriteOutcome::Done);
    }

    fn edge_turn(&mut self) {
        self.carry_out_effects();
        let Some(epoch) = self.edge_wire else { return };
        let Some(wire) = self.wires.iter_mut().find(|wire| wire.epoch == epoch) else { return };
        if !wire.hub_open && wire.to_edge.is_empty() && !wire.silent {
            // The hub's end is closed and everything that it sent was read.
            wire.edge_open = false;
            self.edge_wire = None;
            self.edge.disconnected(self.now, "closed");
        } else if wire.to_hub.len() < QUEUE
            && let Some(frame) = self.edge.next_frame(self.now)
        {
            wire.to_hub.push_back(frame);
        }
        self.carry_out_effects();
    }

    fn deliver(&mut self) {
        let open: Vec<usize> = (0..self.wires.len()).filter(|&at| !self.wires[at].silent).collect();
        if open.is_empty() {
            return;
        }
        let at = open[self.random.random_range(0..open.len())];
        let to_hub = self.chance(0.5);
        let wire = &mut self.wires[at];
        let epoch = wire.epoch;
        if to_hub {
            let Some(frame) = wire.to_hub.pop_front() else { return };
            // What an end has sent before it closed still arrives at the other.
            if !wire.hub_open {
                return;
            }
            let Some(hub) = &mut self.hub else { return };
            if let Some(HubFrame::Ack(ack)) = &frame.frame {
                for seq in 1..=ack.seq {
                    assert!(self.committed.contains(&(epoch, seq)), "batch {seq} of {epoch} was acked, not committed");
                }
            }
            if let Err(fault) = hub.node.on_frame(self.now, epoch, frame, &hub.view) {
                assert!(
                    !matches!(fault, edgemesh_link::Fault::Protocol(_)),
                    "two correct ends never break the protocol: {fault}"
                );
                wire.to_edge.push_back(refusal(&fault));
                wire.hub_open = false;
                hub.node.detach(epoch);
            }
        } else {
            let Some(frame) = wire.to_edge.pop_front() else { return };
            if self.edge_wire != Some(epoch) {
                return;
            }
            self.edge.on_frame(self.now, frame);
            self.carry_out_effects();
        }
    }

    fn carry_out_effects(&mut self) {
        while let Some(effect) = self.edge.next_effect() {
            match effect {
                EdgeEffect::Connect => self.connect(),
                EdgeEffect::Disconnect(fault) => {
                    assert!(!matches!(fault, edgemesh_link::Fault::Protocol(_)), "{fault}");
                    self.close_edge_wire();
                }
                EdgeEffect::LoadDigest => self.work.push_back(StoreWork::Digest),
                EdgeEffect::Apply(changes) => {
                    let epoch = self.edge.counts().epoch;
                    self.work.push_back(StoreWork::Apply(epoch, changes));
                }
                EdgeEffect::LoadOutbox { after, limit } => self.work.push_back(StoreWork::Outbox { after, limit }),
                EdgeEffect::WriteDone { seq, refusal } => {
                    assert_eq!(refusal, None);
                    if let Some((key, value)) = self.outbox.remove(&seq) {
                        let taken = self.api_status.get(&key).copied().unwrap_or(0);
                        assert!(taken >= value, "write {value} of {key} was acknowledged; the API holds {taken}");
                    }
                }
                EdgeEffect::Synced { .. } => self.stats.sessions += 1,
            }
        }
    }

    fn connect(&mut self) {
        if self.hub.is_none() || self.chance(0.1) {
            self.edge.disconnected(self.now, "refused");
            return;
        }
        let epoch = self.next_epoch;
        self.next_epoch += 1;
        if let Some(hub) = &mut self.hub {
            hub.node.attach(self.now, epoch);
        }
        self.wires.retain(|wire| wire.edge_open || wire.hub_open || !wire.to_hub.is_empty());
        self.wires.push(Wire {
            epoch,
            to_hub: VecDeque::new(),
            to_edge: VecDeque::new(),
            hub_open: true,
            edge_open: true,
            silent: false,
        });
        self.edge_wire = Some(epoch);
        self.edge.connected(self.now);
    }

    fn close_edge_wire(&mut self) {
        let Some(epoch) = self.edge_wire.take() else { return };
        let told = self.chance(0.5);
        let Some(wire) = self.wires.iter_mut().find(|wire| wire.epoch == epoch) else { return };
        wire.edge_open = false;
        // Half of the time the hub learns it; else it finds out by itself, and late frames still arrive.
        if told && !wire.silent && wire.hub_open {
            wire.hub_open = false;
            if let Some(hub) = &mut self.hub {
                hub.node.detach(epoch);
            }
        }
    }

    fn finish_store_work(&mut self) {
        if self.work.is_empty() || self.chance(self.store_delay) {
            return;
        }
        // The protocol promises no order among what it asks of the store.
        let at = self.random.random_range(0..self.work.len());
        let Some(work) = self.work.remove(at) else { return };
        match work {
            StoreWork::Digest => {
                let held = self.store.iter().map(|(key, (uid, version))| HeldVersion {
                    key: key.clone(),
                    uid: uid.to_string(),
                    origin_version: version.to_string(),
                });
                let held = held.collect();
                self.work.push_back(StoreWork::DigestRead(held));
            }
            StoreWork::DigestRead(held) => self.edge.digest_loaded(self.now, Ok(held)),
            StoreWork::Apply(epoch, changes) => {
                if self.chance(0.03) {
                    self.edge.applied(self.now, Err("disk full".to_owned()));
                } else {
                    let rejections = self.commit(epoch, changes);
                    self.edge.applied(self.now, Ok(rejections));
                }
            }
            StoreWork::Outbox { after, limit } => {
                let entries = self.outbox.range(after + 1..).take(limit).map(|(seq, (key, value))| OutboxWrite {
                    seq: *seq,
                    verb: WriteVerb::UpdateStatus,
                    key: key.clone(),
                    uid: String::new(),
                    body: Bytes::from(value.to_string()),
                });
                let entries = entries.collect();
                self.edge.outbox_loaded(self.now, Ok(entries), limit);
            }
        }
        self.carry_out_effects();
    }

    fn commit(&mut self, epoch: u64, changes: Vec<EdgeChange>) -> Vec<Rejection> {
        let mut rejections = Vec::new();
        let Some(through) = changes.last().map(|change| change.seq) else { return rejections };
        for change in changes {
            if self.chance(self.reject_rate) {
                rejections.push(Rejection {
                    seq: change.seq,
                    key: change.key,
                    reason: "Invalid".to_owned(),
                    message: "refused by the simulation".to_owned(),
                });
                continue;
            }
            self.stats.applied += 1;
            let old = self.store.get(&change.key).copied();
            if change.object.is_some() {
                let (uid, version) = (change.uid.parse().unwrap(), change.origin_version.parse().unwrap());
                assert!(!self.gone_uids.contains(&uid), "{} came back after its deletion", change.key);
                match old {
                    Some((old_uid, old_version)) if old_uid == uid => {
                        assert!(version >= old_version, "{} went back from {old_version} to {version}", change.key);
                    }
                    Some((old_uid, _)) => {
                        self.gone_uids.insert(old_uid);
                    }
                    None => {}
                }
                self.store.insert(change.key, (uid, version));
            } else if let Some((uid, _)) = self.store.remove(&change.key) {
                self.gone_uids.insert(uid);
            }
        }
        for seq in 1..=through {
            self.committed.insert((epoch, seq));
        }
        rejections
    }

    fn break_wire(&mut self) {
        let Some(epoch) = self.edge_wire else { return };
        self.edge.disconnected(self.now, "broken");
        self.carry_out_effects();
        if let Some(wire) = self.wires.iter_mut().find(|wire| wire.epoch == epoch)
            && self.random.random_bool(0.5)
        {
            // What was on its way is lost.
            wire.to_hub.clear();
            wire.to_edge.clear();
        }
    }

    fn silence_wire(&mut self) {
        if let Some(wire) = self.wires.last_mut() {
            wire.silent = true;
        }
    }

    fn crash_edge(&mut self) {
        self.stats.crashes += 1;
        for work in std::mem::take(&mut self.work) {
            if let StoreWork::Apply(epoch, changes) = work
                && self.chance(0.5)
            {
                self.commit(epoch, changes);
            }
        }
        self.close_edge_wire();
        let seed = self.random.random();
        self.edge = EdgeSession::new("n", "simulation", limits(), seed);
    }

    fn wipe_edge(&mut self) {
        self.crash_edge();
        self.store.clear();
        self.gone_uids.clear();
        self.outbox.clear();
        self.next_outbox = 1;
        self.last_value.clear();
    }

    fn crash_hub(&mut self) {
        self.stats.crashes += 1;
        if let Some(hub) = self.hub.take() {
            for write in hub.executing {
                if self.chance(0.5) {
                    execute(&mut self.api_status, &write);
                }
            }
        }
        for wire in &mut self.wires {
            wire.hub_open = false;
            wire.to_edge.clear();
            wire.to_hub.clear();
        }
    }

    /// No more faults and no more changes: how long until both sides agree?
    fn settle(&mut self, seed: u64) {
        self.reject_rate = 0.0;
        self.store_delay = 0.0;
        let began = self.now;
        // A rejected object is sent again in the next session, so end the present one.
        self.break_wire();
        for round in 0.. {
            for _ in 0..400 {
                self.step(false);
            }
            self.advance();
            if self.hub.is_some()
                && self.watch.is_empty()
                && self.edge.phase() == EdgePhase::Live
                && self.outbox.is_empty()
                && self.store == self.cloud
            {
                break;
            }
            assert!(
                round < 400 && self.now < began + 120_000,
                "seed {seed}: no agreement; {:?}, store {:?}, cloud {:?}, outbox {:?}",
                self.edge,
                self.store,
                self.cloud,
                self.outbox
            );
        }
        for (key, value) in &self.last_value {
            assert_eq!(self.api_status.get(key), Some(value), "seed {seed}: the last write of {key}");
        }
    }
}

fn execute(status: &mut HashMap<ObjectKey, u64>, write: &NodeWrite) {
    let value: u64 = std::str::from_utf8(&write.body).unwrap().parse().unwrap();
    let held = status.entry(write.key.clone()).or_default();
    assert!(value >= *held, "{} went back from {held} to {value}", write.key);
    *held = value;
}

#[test]
fn every_history_of_faults_ends_in_agreement_and_loses_nothing() {
    let seeds: u64 = std::env::var("EDGEMESH_SIMULATION_SEEDS").ok().and_then(|n| n.parse().ok()).unwrap_or(3_000);
    let first: u64 = std::env::var("EDGEMESH_SIMULATION_FIRST").ok().and_then(|n| n.parse().ok()).unwrap_or(0);
    let mut total = Stats::default();
    for seed in first..first + seeds {
        let outcome = std::panic::catch_unwind(|| {
            let mut world = World::new(seed);
            for _ in 0..1_500 {
                world.step(true);
            }
            world.settle(seed);
            world.stats
        });
        match outcome {
            Ok(stats) => {
                total.sessions += stats.sessions;
                total.applied += stats.applied;
                total.writes += stats.writes;
                total.crashes += stats.crashes;
            }
            Err(panic) => {
                eprintln!("the history of seed {seed} failed; EDGEMESH_SIMULATION_FIRST={seed} repeats it");
                std::panic::resume_unwind(panic);
            }
        }
    }
    // A simulation in which nothing happens proves nothing.
    assert!(total.sessions > seeds && total.applied > 20 * seeds && total.writes > 5 * seeds, "{total:?}");
    println!("{seeds} histories: {total:?}");
}
