//! The node's end of the link: carries frames between the hub and the protocol's state, and changes between that state
//! and the store.

use std::{
    collections::VecDeque,
    future::Future,
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use bytes::Bytes;
use edgemesh_api::link::{ToEdge, ToHub, WriteVerb};
use edgemesh_apiserver::store::{OutboxEntry, ReplicaChange, Store, WriteOp};
use edgemesh_link::{
    EdgeEffect, EdgeSession, Fault, Limits, Millis,
    edge_effect::{EdgeChange, EdgePhase, HeldVersion, OutboxWrite, Rejection},
    frames,
    tls::{self, KeyPair},
    transport::{self, Connection, Event},
};
use edgemesh_telemetry::Shutdown;
use futures::future::join_all;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::{net::TcpStream, sync::watch, time::Instant};
use tokio_rustls::client::TlsStream;

use crate::metrics::Metrics;

/// How long saying goodbye may take.
const CLOSE_DEADLINE: Duration = Duration::from_secs(1);
/// The outbox is counted up to here.
const OUTBOX_COUNT_LIMIT: usize = 1_000;
/// How often the outbox is counted at most.
const OUTBOX_COUNT_INTERVAL: Duration = Duration::from_secs(2);

type Hub = Connection<TlsStream<TcpStream>>;
type Pending<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// What `/debug/link` shows.
#[derive(Debug, Clone, Default)]
struct Shown {
    phase: &'static str,
    epoch: u64,
    acked: u64,
    applied: u64,
    rejected: u64,
    writes_in_flight: usize,
    connections: u64,
    last_fault: Option<String>,
}

/// What other parts see of the link.
#[derive(Debug, Clone)]
pub struct LinkStatus {
    shown: Arc<Mutex<Shown>>,
    outbox: Arc<Mutex<usize>>,
    synced: watch::Receiver<u64>,
}

impl LinkStatus {
    /// Counts how often the node came in step with the hub.
    pub fn synced(&self) -> watch::Receiver<u64> {
        self.synced.clone()
    }

    /// The state, for the debug page.
    pub fn describe(&self) -> Value {
        let shown = self.shown.lock().clone();
        json!({
            "state": shown.phase, "epoch": shown.epoch, "lastAckedBatch": shown.acked, "applied": shown.applied,
            "rejected": shown.rejected, "writesInFlight": shown.writes_in_flight, "connections": shown.connections,
            "outboxDepth": *self.outbox.lock(), "lastFault": shown.last_fault,
        })
    }
}

/// What the link needs.
pub struct LinkConfig {
    /// The node's name.
    pub node: String,
    /// The hub's address.
    pub hub: String,
    /// Folder of the node's certificate and key, and of the hub's authority.
    pub pki_dir: PathBuf,
    /// Is told whether the store is in step with the cloud, for the metaserver's clients.
    pub cloud: watch::Sender<bool>,
}

/// Starts the link. It ends when edgecore stops.
///
/// # Errors
/// When the hub's address is none.
pub fn start(config: LinkConfig, store: Store, metrics: Metrics, shutdown: &Shutdown) -> anyhow::Result<LinkStatus> {
    let (host, port) = transport::hub_address(&config.hub).map_err(|error| anyhow::anyhow!("join.json: {error}"))?;
    let (synced_sender, synced) = watch::channel(0);
    let status = LinkStatus { shown: Arc::default(), outbox: Arc::default(), synced };
    let software = concat!("edgecore/", env!("CARGO_PKG_VERSION"));
    let link = Link {
        session: EdgeSession::new(config.node, software, Limits::default(), rand::random()),
        started: Instant::now(),
        target: Arc::new(Target { host, port, pki_dir: config.pki_dir }),
        store: store.clone(),
        metrics: metrics.clone(),
        status: status.clone(),
        synced: synced_sender,
        cloud: config.cloud,
        hub: None,
        connecting: None,
        ready: None,
        work: VecDeque::new(),
        working: None,
    };
    shutdown.spawn(link.run(shutdown.clone()));
    shutdown.spawn(count_outbox(store, Arc::clone(&status.outbox), metrics, shutdown.clone()));
    Ok(status)
}

struct Target {
    host: String,
    port: u16,
    pki_dir: PathBuf,
}

impl Target {
    async fn connect(self: Arc<Self>) -> Result<Hub, Fault> {
        let broken = |error: anyhow::Error| Fault::Transport(format!("{error:#}"));
        // Read anew each time: a renewed certificate counts from the next connection on.
        let part = |name: &str| read(&self.pki_dir, name).map_err(broken);
        let (ca, certificate, key) = (part("ca.crt")?, part("node.crt")?, part("node.key")?);
        let tls = tls::client_config(&ca, Some(KeyPair { certificate: &certificate, key: &key }))
            .map_err(|error| Fault::Transport(format!("the node's certificate can't be used: {error}")))?;
        transport::connect(&self.host, self.port, tls).await
    }
}

fn read(folder: &Path, name: &str) -> anyhow::Result<Vec<u8>> {
    let path = folder.join(name);
    std::fs::read(&path).with_context(|| path.display().to_string())
}

/// What the store is asked to do, one after the other.
enum StoreWork {
    Digest,
    Apply(Vec<EdgeChange>),
    Outbox { after: u64, limit: usize },
    Done(u64),
}

enum StoreAnswer {
    Digest(Result<Vec<HeldVersion>, String>),
    Applied(Result<Vec<Rejection>, String>),
    Outbox(Result<Vec<OutboxWrite>, String>, usize),
    Done(Result<(), String>),
}

struct Link {
    session: EdgeSession,
    started: Instant,
    target: Arc<Target>,
    store: Store,
    metrics: Metrics,
    status: LinkStatus,
    synced: watch::Sender<u64>,
    cloud: watch::Sender<bool>,
    hub: Option<Hub>,
    connecting: Option<Pending<Result<Hub, Fault>>>,
    ready: Option<ToHub>,
    work: VecDeque<StoreWork>,
    working: Option<Pending<StoreAnswer>>,
}

impl Link {
    fn now(&self) -> Millis {
        Millis::try_from(self.started.elapsed().as_millis()).unwrap_or(Millis::MAX)
    }

    async fn run(mut self, shutdown: Shutdown) {
        let mut outbox = self.store.outbox_watch();
        loop {
            let now = self.now();
            self.session.tick(now);
            self.carry_out_effects();
            if self.hub.is_some() && self.ready.is_none() {
                self.ready = self.session.next_frame(now);
                self.carry_out_effects();
            }
            self.start_store_work();
            self.show();
            let wake = self.session.deadline().map_or_else(
                || Instant::now() + Duration::from_secs(60),
                |at| self.started + Duration::from_millis(at),
            );
            tokio::select! {
                event = next_event(self.hub.as_mut(), self.ready.is_some()) => self.on_event(event),
                connected = pending(self.connecting.as_mut()) => {
                    self.connecting = None;
                    self.on_connected(connected);
                }
                answer = pending(self.working.as_mut()) => {
                    self.working = None;
                    self.on_store(answer);
                }
                Ok(()) = outbox.changed() => self.session.outbox_appended(),
                () = tokio::time::sleep_until(wake) => {}
                () = shutdown.stopping().cancelled() => break,
            }
        }
        if let Some(hub) = self.hub.take() {
            hub.close(None::<&ToHub>, CLOSE_DEADLINE).await;
        }
    }

    fn on_event(&mut self, event: Result<Event, Fault>) {
        let now = self.now();
        let result = match event {
            Ok(Event::Frame(bytes)) => frames::decode::<ToEdge>(bytes).map(|frame| self.session.on_frame(now, frame)),
            Ok(Event::Writable) => match (self.ready.take(), &mut self.hub) {
                (Some(frame), Some(hub)) => hub.send(&frame),
                _ => Ok(()),
            },
            Err(fault) => Err(fault),
        };
        if let Err(fault) = result {
            self.session.disconnected(now, fault.to_string());
        }
    }

    fn on_connected(&mut self, connected: Result<Hub, Fault>) {
        let now = self.now();
        match connected {
            Ok(hub) => {
                tracing::info!(hub = self.target.host, "connected to the hub");
                self.hub = Some(hub);
                self.session.connected(now);
            }
            Err(fault) => self.session.failed(now, fault),
        }
    }

    fn on_store(&mut self, answer: StoreAnswer) {
        let now = self.now();
        match answer {
            StoreAnswer::Digest(held) => self.session.digest_loaded(now, held),
            StoreAnswer::Applied(result) => {
                for rejection in result.iter().flatten() {
                    tracing::error!(
                        key = %rejection.key, reason = rejection.reason, message = rejection.message,
                        "the store refused an object from the cloud"
                    );
                }
                self.session.applied(now, result);
            }
            StoreAnswer::Outbox(entries, limit) => self.session.outbox_loaded(now, entries, limit),
            StoreAnswer::Done(result) => {
                if let Err(error) = result {
                    // The entry stays and is sent again in the next session; doing it twice does no harm.
                    tracing::error!(error, "a finished write can't be removed from the outbox");
                }
            }
        }
    }

    fn carry_out_effects(&mut self) {
        while let Some(effect) = self.session.next_effect() {
            match effect {
                EdgeEffect::Connect => self.connecting = Some(Box::pin(Arc::clone(&self.target).connect())),
                EdgeEffect::Disconnect(fault) => {
                    let text = fault.to_string();
                    let mut shown = self.status.shown.lock();
                    // A cut lasts: say it once, not at each attempt.
                    if shown.last_fault.as_deref() != Some(&text) || self.hub.is_some() {
                        tracing::warn!(fault = text, "no connection to the hub");
                    }
                    shown.last_fault = Some(text);
                    drop(shown);
                    self.metrics.disconnects.get_or_create(&crate::metrics::Reason { reason: fault.label() }).inc();
                    self.connecting = None;
                    self.hub = None;
                    self.ready = None;
                }
                EdgeEffect::LoadDigest => self.work.push_back(StoreWork::Digest),
                EdgeEffect::Apply(changes) => self.work.push_back(StoreWork::Apply(changes)),
                EdgeEffect::LoadOutbox { after, limit } => self.work.push_back(StoreWork::Outbox { after, limit }),
                EdgeEffect::WriteDone { seq, refusal } => {
                    if let Some((reason, message)) = refusal {
                        self.metrics.writes_refused.inc();
                        tracing::warn!(seq, reason, message, "the cluster refused a write of this node; it is dropped");
                    } else {
                        self.metrics.writes_done.inc();
                    }
                    self.work.push_back(StoreWork::Done(seq));
                }
                EdgeEffect::Synced { epoch } => {
                    tracing::info!(epoch, "in step with the cloud");
                    self.status.shown.lock().last_fault = None;
                    self.synced.send_modify(|count| *count += 1);
                }
            }
        }
    }

    fn start_store_work(&mut self) {
        if self.working.is_some() {
            return;
        }
        let store = self.store.clone();
        self.working = match self.work.pop_front() {
            None => None,
            Some(StoreWork::Digest) => Some(Box::pin(async move { StoreAnswer::Digest(digest(&store).await) })),
            Some(StoreWork::Apply(changes)) => {
                Some(Box::pin(async move { StoreAnswer::Applied(apply(&store, changes).await) }))
            }
            Some(StoreWork::Outbox { after, limit }) => Some(Box::pin(async move {
                let entries = store.outbox_pending(after, limit).await.map_err(|error| error.to_string());
                let writes = entries.and_then(|entries| {
                    entries.into_iter().map(outbox_write).collect::<Result<_, _>>().map_err(|error| error.to_string())
                });
                StoreAnswer::Outbox(writes, limit)
            })),
            Some(StoreWork::Done(first)) => {
                // Results come many at a time; together they need one commit.
                let mut all = vec![first];
                while let Some(StoreWork::Done(seq)) = self.work.front() {
                    all.push(*seq);
                    self.work.pop_front();
                }
                Some(Box::pin(async move {
                    let results = join_all(all.into_iter().map(|seq| store.outbox_done(seq))).await;
                    let result = results.into_iter().collect::<Result<(), _>>();
                    StoreAnswer::Done(result.map_err(|error| error.to_string()))
                }))
            }
        };
    }

    fn show(&mut self) {
        let (phase, counts) = (self.session.phase(), self.session.counts());
        let connected = counts.epoch != 0;
        let in_step = phase == EdgePhase::Live;
        self.cloud.send_if_modified(|known| std::mem::replace(known, in_step) != in_step);
        self.metrics.link_connected.set(i64::from(connected));
        self.metrics.applied.set(counts.applied);
        self.metrics.rejected.set(counts.rejected);
        self.metrics.connections.set(counts.connections);
        let mut shown = self.status.shown.lock();
        let last_fault = shown.last_fault.take();
        *shown = Shown {
            phase: phase.label(),
            epoch: counts.epoch,
            acked: counts.acked,
            applied: counts.applied,
            rejected: counts.rejected,
            writes_in_flight: counts.writes_in_flight,
            connections: counts.connections,
            last_fault,
        };
    }
}

async fn next_event(hub: Option<&mut Hub>, want_send: bool) -> Result<Event, Fault> {
    match hub {
        Some(hub) => hub.next(want_send).await,
        None => std::future::pending().await,
    }
}

async fn pending<T>(future: Option<&mut Pending<T>>) -> T {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

async fn digest(store: &Store) -> Result<Vec<HeldVersion>, String> {
    let held = store.replica_versions().await.map_err(|error| error.to_string())?;
    let held =
        held.into_iter().map(|held| HeldVersion { key: held.key, uid: held.uid, origin_version: held.origin_version });
    Ok(held.collect())
}

/// Commits all changes in one transaction. Where the store refuses that, it gets them one by one, so that one bad object
/// does not hold up the others.
async fn apply(store: &Store, changes: Vec<EdgeChange>) -> Result<Vec<Rejection>, String> {
    let mut rejections = Vec::new();
    let mut good: Vec<(EdgeChange, ReplicaChange)> = Vec::with_capacity(changes.len());
    for change in changes {
        match replica_change(&change) {
            Ok(parsed) => good.push((change, parsed)),
            Err(message) => rejections.push(rejection(&change, "BadRequest", message)),
        }
    }
    let (changes, parsed): (Vec<_>, Vec<_>) = good.into_iter().unzip();
    let Err(first_error) = store.apply_replica(parsed).await else { return Ok(rejections) };
    tracing::warn!(error = %first_error, "a transaction was refused; its changes are tried one by one");
    let mut applied = 0_usize;
    let mut store_failed = false;
    for change in changes {
        let Ok(parsed) = replica_change(&change) else { continue };
        match store.apply_replica(vec![parsed]).await {
            Ok(()) => applied += 1,
            Err(error) => {
                store_failed |= error.code() >= 500;
                rejections.push(rejection(&change, &format!("{:?}", error.reason), error.to_string()));
            }
        }
    }
    // Nothing at all went in: that is the disk, not the objects.
    if applied == 0 && store_failed { Err(first_error.to_string()) } else { Ok(rejections) }
}

fn replica_change(change: &EdgeChange) -> Result<ReplicaChange, String> {
    let Some(json) = &change.object else {
        let uid = Some(change.uid.clone()).filter(|uid| !uid.is_empty());
        return Ok(ReplicaChange::Delete { key: change.key.clone(), uid });
    };
    let object: Value = serde_json::from_slice(json).map_err(|error| format!("not JSON: {error}"))?;
    let meta = |field: &str| object["metadata"][field].as_str().unwrap_or_default();
    if meta("name") != change.key.name || meta("namespace") != change.key.namespace || meta("uid") != change.uid {
        return Err("the object is not the one that its key names".to_owned());
    }
    Ok(ReplicaChange::Upsert { key: change.key.clone(), origin_version: change.origin_version.clone(), object })
}

fn rejection(change: &EdgeChange, reason: &str, message: String) -> Rejection {
    Rejection { seq: change.seq, key: change.key.clone(), reason: reason.to_owned(), message }
}

fn outbox_write(entry: OutboxEntry) -> Result<OutboxWrite, serde_json::Error> {
    Ok(OutboxWrite {
        seq: entry.seq,
        verb: match entry.op {
            WriteOp::Create => WriteVerb::Create,
            WriteOp::Update => WriteVerb::Update,
            WriteOp::UpdateStatus => WriteVerb::UpdateStatus,
            WriteOp::Delete => WriteVerb::Delete,
        },
        key: entry.key,
        uid: entry.uid,
        body: Bytes::from(serde_json::to_vec(&entry.object)?),
    })
}

/// Keeps the gauge of the outbox's depth.
async fn count_outbox(store: Store, depth: Arc<Mutex<usize>>, metrics: Metrics, shutdown: Shutdown) {
    let mut appended = store.outbox_watch();
    loop {
        let count = match store.outbox_pending(0, OUTBOX_COUNT_LIMIT).await {
            Ok(entries) => entries.len(),
            Err(error) => {
                tracing::warn!(%error, "the outbox can't be counted");
                0
            }
        };
        *depth.lock() = count;
        metrics.outbox_depth.set(i64::try_from(count).unwrap_or(i64::MAX));
        let changed = async {
            tokio::time::sleep(OUTBOX_COUNT_INTERVAL).await;
            // What was appended is counted soon; what was acknowledged, too, while there is any.
            if count == 0 && appended.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            () = changed => {}
            () = shutdown.stopping().cancelled() => return,
        }
    }
}
