//! The owner of one pod: brings the runtime to what the pod should be, and writes its status.
//!
//! Its inputs are conflated (the newest pod, "something changed"), so nothing queues up however slow the runtime is.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use edgemesh_api::cidr::Cidr;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use tokio::sync::{Notify, Semaphore, watch};
use tokio_util::sync::CancellationToken;

use super::{
    NodeConditions, PodRunnerConfig,
    actual::{Actual, ActualReader, RunState},
    api::NodeApi,
    backoff::Backoff,
    dns::is_host_network,
    events::{Events, PodEvent, timestamp_now},
    folders::PodFolder,
    inputs::{Inputs, OwnFields},
    logs,
    metrics::{PhaseGuard, PodMetrics},
    plan,
    resources::Machine,
    sandbox::{self, PodIdentity},
    status::{self, Observed, Waiting},
    volumes,
};
use crate::{
    network::addresses::Addresses,
    runtime::{Runtime, RuntimeError},
};

/// Without any news a pod is looked at again so often; logs are rotated then.
const RESYNC: Duration = Duration::from_secs(60);
/// The runtime, the disk or the store failed: soon again.
pub(crate) const RETRY: Duration = Duration::from_secs(1);
/// Steps taken in one go, before others get their turn.
const MAX_STEPS: usize = 16;
/// Longest termination message (Kubernetes, "Customizing the termination message").
const MAX_TERMINATION_MESSAGE: u64 = 4096;

/// What all workers share.
pub(crate) struct Shared {
    pub(crate) config: PodRunnerConfig,
    pub(crate) runtime: Runtime,
    pub(crate) api: NodeApi,
    pub(crate) events: Events,
    pub(crate) metrics: PodMetrics,
    pub(crate) machine: Machine,
    pub(crate) conditions: watch::Receiver<NodeConditions>,
    pub(crate) addresses: Addresses,
    /// The ranges that pods get addresses from, as far as edgecore decides that.
    pub(crate) pod_ranges: watch::Receiver<Vec<Cidr>>,
    pub(crate) sandbox_slots: Semaphore,
    pub(crate) pull_slots: Semaphore,
}

/// What should become of the pod.
#[derive(Debug, Clone)]
pub(crate) enum Desired {
    /// The object as the store has it; it may say that it's being deleted.
    Present(Arc<Pod>),
    /// The object is gone; this is its last state.
    Gone(Arc<Pod>),
}

impl Desired {
    /// The newest known object.
    pub(crate) fn pod(&self) -> &Arc<Pod> {
        match self {
            Self::Present(pod) | Self::Gone(pod) => pod,
        }
    }

    /// Whether the pod must end.
    pub(crate) fn ends(&self) -> bool {
        match self {
            Self::Present(pod) => pod.metadata.deletion_timestamp.is_some(),
            Self::Gone(_) => true,
        }
    }
}

/// "Look again", from the runner to a worker.
#[derive(Debug)]
pub(crate) struct Poke {
    notify: Notify,
    inputs_changed: AtomicBool,
}

impl Default for Poke {
    fn default() -> Self {
        // What changed while nobody looked isn't known: volumes are checked once.
        Self { notify: Notify::new(), inputs_changed: AtomicBool::new(true) }
    }
}

impl Poke {
    /// Something happened to the pod in the runtime.
    pub(crate) fn look(&self) {
        self.notify.notify_one();
    }

    /// An object that the pod refers to changed.
    pub(crate) fn inputs_changed(&self) {
        self.inputs_changed.store(true, Ordering::Release);
        self.notify.notify_one();
    }
}

/// The owner of one pod.
pub(crate) struct Worker {
    pub(crate) shared: Arc<Shared>,
    pub(crate) identity: PodIdentity,
    pub(crate) folder: PodFolder,
    pub(crate) desired: watch::Receiver<Desired>,
    poke: Arc<Poke>,
    pod_ranges: watch::Receiver<Vec<Cidr>>,
    pub(crate) reader: ActualReader,
    pub(crate) backoff: Backoff,
    pub(crate) waiting: BTreeMap<String, Waiting>,
    /// The last words of ended runs, by id.
    messages: BTreeMap<String, String>,
    /// Ended runs that the backoff knows about.
    counted: BTreeSet<String>,
    /// The sandbox whose addresses are known, and they.
    pub(crate) addresses: Option<(String, Vec<IpAddr>)>,
    /// The node's addresses, as far as they are known.
    host_ips: Vec<IpAddr>,
    /// The status as it was written last.
    pub(crate) status: PodStatus,
    start_time: Timestamp,
    phase: PhaseGuard,
    /// The volumes of this pod are made, since this worker began.
    pub(crate) volumes: Option<volumes::VolumePaths>,
    logs_checked: Instant,
}

/// What one look at the pod found.
pub(crate) enum Step {
    /// Something was done: look again at once.
    Again,
    /// Nothing more to do before this time passed, or something happened.
    Wait(Duration),
}

impl Worker {
    /// The owner of a pod.
    pub(crate) fn new(
        shared: Arc<Shared>,
        identity: PodIdentity,
        desired: watch::Receiver<Desired>,
        poke: Arc<Poke>,
    ) -> Self {
        let status = desired.borrow().pod().status.clone().unwrap_or_default();
        let start_time = status.start_time.as_ref().map_or_else(timestamp_now, |time| time.0);
        let mut phase = shared.metrics.pod();
        phase.set(status.phase.as_deref().unwrap_or("Pending"));
        Self {
            folder: PodFolder::new(&shared.config.pods_dir, &identity.uid),
            pod_ranges: shared.pod_ranges.clone(),
            shared,
            identity,
            desired,
            poke,
            reader: ActualReader::default(),
            backoff: Backoff::default(),
            waiting: BTreeMap::new(),
            messages: BTreeMap::new(),
            counted: BTreeSet::new(),
            addresses: None,
            host_ips: Vec::new(),
            status,
            start_time,
            phase,
            volumes: None,
            logs_checked: Instant::now(),
        }
    }

    /// Runs until the pod is gone from the node (returns true), or until the daemon stops (the pod keeps running).
    pub(crate) async fn run(mut self, stopping: CancellationToken) -> bool {
        loop {
            let desired = self.desired.borrow_and_update().clone();
            let mut watcher = self.desired.clone();
            let wait = if desired.ends() {
                tokio::select! {
                    result = Box::pin(self.end(&desired)) => match result {
                        Ok(()) => return true,
                        Err(error) => {
                            tracing::warn!(pod = %self.name(), %error, "the pod could not be removed yet");
                            RETRY
                        }
                    },
                    () = stopping.cancelled() => return false,
                }
            } else {
                tokio::select! {
                    wait = Box::pin(self.sync(desired.pod())) => wait,
                    // Whatever is under way, a slow pull for example, is given up: the pod must end.
                    () = until(&mut watcher, Desired::ends) => continue,
                    () = stopping.cancelled() => return false,
                }
            };
            tokio::select! {
                changed = self.desired.changed() => if changed.is_err() {
                    return false;
                },
                () = self.poke.notify.notified() => {}
                Ok(()) = self.pod_ranges.changed() => {}
                () = tokio::time::sleep(wait) => {}
                () = stopping.cancelled() => return false,
            }
        }
    }

    /// `namespace/name`, for logs.
    pub(crate) fn name(&self) -> String {
        format!("{}/{}", self.identity.namespace, self.identity.name)
    }

    pub(crate) fn event(&self, container: Option<&str>, warning: bool, reason: &'static str, message: String) {
        self.shared.events.send(PodEvent {
            pod: self.identity.clone(),
            container: container.map(str::to_owned),
            warning,
            reason,
            message,
        });
    }

    /// Brings the pod to what it should be, as far as it goes now. Returns when to look again at the latest.
    async fn sync(&mut self, pod: &Arc<Pod>) -> Duration {
        for _ in 0..MAX_STEPS {
            match Box::pin(self.step(pod)).await {
                Ok(Step::Again) => {}
                Ok(Step::Wait(wait)) => return wait.min(RESYNC),
                Err(error) => {
                    tracing::warn!(pod = %self.name(), %error, "the runtime did not do it");
                    return RETRY;
                }
            }
        }
        RETRY
    }

    async fn step(&mut self, pod: &Arc<Pod>) -> Result<Step, RuntimeError> {
        let mut actual = self.reader.read(&self.shared.runtime, &self.identity.uid).await?;
        self.note_ends(&actual);
        self.update_host_ips().await;
        self.update_addresses(pod, &actual).await?;
        let over = matches!(self.status.phase.as_deref(), Some("Succeeded" | "Failed"));
        let mut plan = plan::plan(pod, &actual);
        // First what was is written down: ended runs go with their sandbox.
        let mut written = self.report(pod, &actual).await;
        if over || plan.finished {
            self.waiting.clear();
            written &= self.report(pod, &actual).await;
            return self.close_sandboxes(&actual).await.map(|()| Step::Wait(if written { RESYNC } else { RETRY }));
        }
        if self.is_stray() {
            actual.give_up_sandbox();
            plan = plan::plan(pod, &actual);
        }
        self.refresh_volumes(pod).await;
        if let Some(attempt) = plan.create_sandbox {
            let step = self.make_sandbox(pod, &actual, attempt, &plan.remove_sandboxes).await?;
            if matches!(step, Step::Wait(_)) {
                self.report(pod, &actual).await;
            }
            return Ok(step);
        }
        for id in &plan.remove_sandboxes {
            self.shared.runtime.stop_sandbox(id).await?;
            self.shared.runtime.remove_sandbox(id).await?;
        }
        for id in &plan.stop {
            self.stop_changed(pod, id).await?;
        }
        for id in &plan.remove_runs {
            self.shared.runtime.remove_container(id).await?;
        }
        self.waiting.retain(|name, _| plan.start.contains(name));
        let Some(live) = actual.live_sandbox().cloned() else { return Ok(Step::Again) };
        let mut wait = RESYNC;
        let mut started = false;
        for name in &plan.start {
            match Box::pin(self.start_container(pod, name, &actual, &live)).await? {
                Step::Again => started = true,
                Step::Wait(until) => wait = wait.min(until),
            }
        }
        if started || !plan.stop.is_empty() {
            return Ok(Step::Again);
        }
        if !self.report(pod, &actual).await {
            wait = RETRY;
        }
        self.look_after_logs(&actual).await;
        Ok(Step::Wait(wait))
    }

    /// Counts runs that ended for the backoff, and reads their last words.
    fn note_ends(&mut self, actual: &Actual) {
        let mut counted = BTreeSet::new();
        for (name, runs) in &actual.runs {
            for (place, run) in runs.iter().enumerate().filter(|(_, run)| run.ended()) {
                if !self.counted.contains(&run.id) {
                    if place == 0 {
                        self.backoff.failed(name, Instant::now(), run.ran_for(), true);
                    }
                    if let Some(message) = read_bounded(&self.folder.termination_message(name, run.attempt)) {
                        self.messages.insert(run.id.clone(), message);
                    }
                }
                counted.insert(run.id.clone());
            }
        }
        self.messages.retain(|id, _| counted.contains(id));
        self.counted = counted;
    }

    async fn update_host_ips(&mut self) {
        match self.shared.api.node_addresses().await {
            // A Node that is deleted for a moment takes the addresses from nobody.
            Ok(addresses) if addresses.is_empty() => {}
            Ok(addresses) => self.host_ips = addresses,
            Err(error) => tracing::warn!(pod = %self.name(), %error, "the node's addresses could not be read"),
        }
    }

    async fn update_addresses(&mut self, pod: &Pod, actual: &Actual) -> Result<(), RuntimeError> {
        let Some(live) = actual.live_sandbox() else {
            self.addresses = None;
            return Ok(());
        };
        let host_network = pod.spec.as_ref().is_some_and(is_host_network);
        if !host_network && self.addresses.as_ref().is_some_and(|(id, _)| *id == live.id) {
            return Ok(());
        }
        let ips = if host_network {
            self.host_ips.clone()
        } else {
            sandbox::addresses(&self.shared.runtime.sandbox_status(&live.id).await?)
        };
        self.addresses = Some((live.id.clone(), ips));
        Ok(())
    }

    /// The pod's addresses, as far as they are known.
    pub(crate) fn pod_ips(&self) -> &[IpAddr] {
        self.addresses.as_ref().map(|(_, ips)| ips.as_slice()).unwrap_or_default()
    }

    /// Whether the node has another pod range by now than when the pod got its addresses: nothing leads to them any more.
    fn is_stray(&self) -> bool {
        let ranges = self.pod_ranges.borrow();
        self.pod_ips().iter().any(|address| self.shared.addresses.is_stray(*address, &ranges))
    }

    /// What the pod knows about itself.
    pub(crate) fn own_fields<'a>(&'a self, pod: &'a Pod) -> OwnFields<'a> {
        OwnFields { pod, pod_ips: self.pod_ips(), host_ips: &self.host_ips, machine: self.shared.machine }
    }

    /// Writes the status if it changed. Returns false if it could not be written.
    pub(crate) async fn report(&mut self, pod: &Pod, actual: &Actual) -> bool {
        let mut base = pod.clone();
        let mut before = self.status.clone();
        if pod.spec.as_ref().is_some_and(|s| s.readiness_gates.is_some()) {
            adopt_foreign_conditions(&mut before, pod.status.as_ref());
        }
        base.status = Some(before);
        let version = self.shared.conditions.borrow().version.clone();
        let observed = Observed {
            actual,
            waiting: &self.waiting,
            messages: &self.messages,
            pod_ips: self.pod_ips(),
            host_ips: &self.host_ips,
            start_time: self.start_time,
            runtime_name: version.as_ref().map_or("containerd", |v| v.name.as_str()),
            now: timestamp_now(),
            rejected: None,
        };
        let status = status::compute(&base, &observed);
        if status == self.status {
            return true;
        }
        self.phase.set(status.phase.as_deref().unwrap_or("Pending"));
        match self.shared.api.write_status(&self.identity, &status).await {
            Ok(_) => {
                self.status = status;
                true
            }
            Err(error) => {
                tracing::warn!(pod = %self.name(), %error, "the pod's status could not be written");
                false
            }
        }
    }

    async fn refresh_volumes(&mut self, pod: &Arc<Pod>) {
        if !self.poke.inputs_changed.swap(false, Ordering::AcqRel) || !volumes::follows_objects(pod) {
            return;
        }
        let inputs = match self.shared.api.inputs(pod).await {
            Ok(inputs) => inputs,
            Err(error) => {
                tracing::warn!(pod = %self.name(), %error, "the pod's ConfigMaps and Secrets could not be read");
                self.poke.inputs_changed.store(true, Ordering::Release);
                return;
            }
        };
        let changed = self.on_disk(pod, inputs, volumes::refresh).await;
        if !changed.is_empty() {
            tracing::info!(pod = %self.name(), volumes = changed.join(","), "volumes follow their changed objects");
        }
    }

    /// Does work with the disk away from the tasks that must not wait.
    pub(crate) async fn on_disk<T: Send + 'static + Default>(
        &self,
        pod: &Arc<Pod>,
        inputs: Inputs,
        work: impl FnOnce(&Pod, &PodFolder, &Inputs, &OwnFields<'_>) -> T + Send + 'static,
    ) -> T {
        let (pod, folder) = (Arc::clone(pod), self.folder.clone());
        let (ips, host_ips) = (self.pod_ips().to_vec(), self.host_ips.clone());
        let machine = self.shared.machine;
        let done = tokio::task::spawn_blocking(move || {
            let own = OwnFields { pod: &pod, pod_ips: &ips, host_ips: &host_ips, machine };
            work(&pod, &folder, &inputs, &own)
        });
        done.await.unwrap_or_default()
    }

    async fn look_after_logs(&mut self, actual: &Actual) {
        if self.logs_checked.elapsed() < RESYNC {
            return;
        }
        self.logs_checked = Instant::now();
        for (name, runs) in &actual.runs {
            let Some(newest) = runs.first() else { continue };
            if newest.state == RunState::Running {
                logs::rotate(&self.shared.runtime, &self.folder, name, newest).await;
            }
        }
    }

    /// Stops a finished pod's sandboxes: its address is free again, its logs stay.
    async fn close_sandboxes(&mut self, actual: &Actual) -> Result<(), RuntimeError> {
        for sandbox in &actual.sandboxes {
            if sandbox.ready {
                self.shared.runtime.stop_sandbox(&sandbox.id).await?;
            }
        }
        Ok(())
    }
}

/// Waits until the pod's object passes a test; for ever if it never does.
pub(crate) async fn until<F: Fn(&Desired) -> bool>(desired: &mut watch::Receiver<Desired>, test: F) {
    loop {
        let passed = test(&desired.borrow_and_update());
        if passed {
            return;
        }
        if desired.changed().await.is_err() {
            // The runner is going down, and with it this worker.
            std::future::pending::<()>().await;
        }
    }
}

fn adopt_foreign_conditions(status: &mut PodStatus, stored: Option<&PodStatus>) {
    let own = |kind: &str| matches!(kind, "PodScheduled" | "Initialized" | "ContainersReady" | "Ready");
    let mut conditions = status.conditions.take().unwrap_or_default();
    conditions.retain(|condition| own(&condition.type_));
    let stored = stored.and_then(|s| s.conditions.as_ref()).into_iter().flatten();
    conditions.extend(stored.filter(|condition| !own(&condition.type_)).cloned());
    status.conditions = Some(conditions);
}

/// The start of a file that a container wrote, if there is anything in it.
fn read_bounded(path: &std::path::Path) -> Option<String> {
    use std::io::Read;
    let mut bytes = Vec::new();
    std::fs::File::open(path).ok()?.take(MAX_TERMINATION_MESSAGE).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes).trim_end().to_owned();
    (!text.is_empty()).then_some(text)
}
