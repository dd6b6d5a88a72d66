//! Keeps what sockets see equal to the catalog: plans it, and programs the differences.

mod counters;
pub mod ebpf;
pub(crate) mod host;
mod namespaces;
pub(crate) mod pins;
pub mod plan;
pub mod planner;
mod slots;
mod sock_diag;
pub mod stale;
mod tables;

use std::{
    collections::HashSet,
    fmt,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use edgemesh_mesh::{Catalog, CatalogStore, Viewpoint, model::Protocol};
use edgemesh_telemetry::{ReadinessTask, Shutdown};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::{config::Config, metrics::DatapathMetrics, node_local::Allocator};
use ebpf::{Counters, EbpfDatapathError, Programs};
use parking_lot::RwLock;
use plan::{Change, Frontend, Plan, Surroundings, Target};
use planner::{Planner, Wanted};
use stale::Reaper;

/// Changes that come close together are programmed together.
const DEBOUNCE: Duration = Duration::from_millis(5);
/// How long to wait before what could not be programmed is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// How soon a change of the host's addresses is seen, where Services have `externalIPs`.
const HOST_ADDRESSES: Duration = Duration::from_secs(15);

/// What is programmed, for `/debug/datapath`.
#[derive(Debug, Clone, Default)]
pub struct State {
    /// Generation of the catalog from which it was planned.
    pub generation: u64,
    /// From where endpoints were chosen; none before the first plan.
    pub viewpoint: Option<Viewpoint>,
    /// Every frontend.
    pub plan: Arc<RwLock<Plan>>,
}

/// The running datapath.
#[derive(Debug)]
pub struct Datapath {
    state: Arc<ArcSwap<State>>,
    counters: Arc<Counters>,
    cgroup: PathBuf,
    task: JoinHandle<()>,
}

impl Datapath {
    /// Attaches the programs and keeps them up to date until the shutdown is forced, because connections need them while the
    /// agent drains. They are pinned and serve on after it. `dns` is where this node answers for the cluster DNS address. `readiness` is released when a complete catalog is programmed.
    ///
    /// # Errors
    /// When the kernel can't or may not run the programs.
    pub fn start(
        config: Arc<Config>,
        catalog: Arc<CatalogStore>,
        allocator: Arc<Allocator>,
        dns: SocketAddr,
        metrics: DatapathMetrics,
        shutdown: &Shutdown,
        readiness: ReadinessTask,
    ) -> Result<Self, EbpfDatapathError> {
        let (mut programs, counters) = match Programs::start_pinned(&config.cgroup, &config.bpffs) {
            Err(error @ EbpfDatapathError::Pins { .. }) => {
                tracing::warn!(%error, "nothing will be served while the agent is away");
                Programs::start(&config.cgroup)?
            }
            started => started?,
        };
        let adopted = programs.take_adopted();
        if !adopted.is_empty() {
            tracing::info!(frontends = adopted.len(), "serving on with what an earlier run programmed");
        }
        let cgroup = programs.cgroup().to_owned();
        tracing::info!(cgroup = %cgroup.display(), "eBPF programs attached");
        let state = Arc::<ArcSwap<State>>::default();
        let (node_local, node_local6) = (config.node_local_cidr, config.node_local_cidr6);
        let is_ours = move |backend: SocketAddr| match backend.ip() {
            _ if backend == dns => true,
            IpAddr::V4(ip) => node_local.contains(ip),
            IpAddr::V6(ip) => node_local6.contains(ip),
        };
        let reaper = programs.take_sweeper().and_then(|sweeper| {
            Reaper::start(sweeper, is_ours, metrics.clone())
                .inspect_err(|error| tracing::error!(%error, "sockets of endpoints that are gone will not be ended"))
                .ok()
        });
        let worker = Worker {
            programs,
            reaper,
            swept: None,
            plan: Arc::new(RwLock::new(adopted)),
            planner: Planner::default(),
            older_removed: false,
            metrics,
            state: Arc::clone(&state),
            config,
            allocator,
            dns,
            has_external: false,
        };
        let task = tokio::spawn(worker.run(catalog, shutdown.clone(), readiness));
        Ok(Self { state, counters: Arc::new(counters), cgroup, task })
    }

    /// What is programmed now, as JSON.
    pub fn debug_page(&self) -> impl Fn() -> Value + Send + Sync + 'static {
        let (state, counters, cgroup) = (Arc::clone(&self.state), Arc::clone(&self.counters), self.cgroup.clone());
        move || view(&state.load(), &counters, &cgroup)
    }

    /// What the programs count.
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }

    /// Waits until nothing is programmed any more, after the shutdown was forced.
    pub async fn ended(self) {
        if let Err(error) = self.task.await {
            tracing::error!(%error, "the datapath's task failed");
        }
    }
}

struct Worker {
    programs: Programs,
    reaper: Option<Reaper>,
    /// The complete catalog by which sockets were last looked at.
    swept: Option<Arc<Catalog>>,
    /// What is in the maps. Written by this task alone, read by the debug page.
    plan: Arc<RwLock<Plan>>,
    planner: Planner,
    /// Whether programs of other versions are gone.
    older_removed: bool,
    metrics: DatapathMetrics,
    state: Arc<ArcSwap<State>>,
    config: Arc<Config>,
    allocator: Arc<Allocator>,
    /// Where this node answers DNS.
    dns: SocketAddr,
    /// Whether a Service has `externalIPs`, so that the host's addresses matter.
    has_external: bool,
}

impl Worker {
    async fn run(mut self, catalog: Arc<CatalogStore>, shutdown: Shutdown, readiness: ReadinessTask) {
        let mut generations = catalog.subscribe();
        let mut readiness = Some(readiness);
        loop {
            generations.mark_unchanged();
            // From half a catalog, Services would be refused whose endpoints were only not read yet. Cluster DNS leads
            // here from the start: other names can be answered.
            let synced = catalog.is_synced();
            let snapshot = if synced { catalog.snapshot() } else { Arc::default() };
            let round = tokio::task::spawn_blocking(move || {
                let done = self.program(&snapshot);
                if snapshot.is_synced() {
                    self.look_for_stale_sockets(snapshot);
                }
                (self, done)
            });
            let retry;
            match round.await {
                Ok((worker, done)) => {
                    self = worker;
                    retry = !done;
                }
                Err(error) => {
                    tracing::error!(%error, "programming failed; what is programmed stays as it is");
                    return;
                }
            }
            if synced
                && !retry
                && let Some(readiness) = readiness.take()
            {
                readiness.ready();
            }
            tokio::select! {
                changed = generations.changed() => if changed.is_err() {
                    // Discovery has ended: what is programmed stays until the end.
                    shutdown.forced().cancelled().await;
                    return;
                },
                () = tokio::time::sleep(RETRY), if retry => {}
                () = tokio::time::sleep(HOST_ADDRESSES), if self.has_external => {}
                () = shutdown.forced().cancelled() => return,
            }
            tokio::time::sleep(DEBOUNCE).await;
        }
    }

    /// Plans and writes the differences. Returns whether all of them could be written.
    fn program(&mut self, catalog: &Arc<Catalog>) -> bool {
        let started = Instant::now();
        let viewpoint = self.config.viewpoint(catalog);
        let cluster_dns = SocketAddr::from((self.config.dns.cluster_address, plan::DNS_PORT));
        // A backend is of its frontend's family.
        let dns = self.dns.is_ipv4().then_some((cluster_dns, self.dns));
        self.has_external = catalog.services().any(|service| !service.external_ips.is_empty());
        let host_addresses = if self.has_external { host::addresses() } else { HashSet::new() };
        let surroundings =
            Surroundings { viewpoint: &viewpoint, allocator: &self.allocator, host_addresses: &host_addresses, dns };
        let wanted = self.planner.plan(catalog, surroundings);
        // Before sockets are sent there, so that an address means the same Service port after a crash.
        if let Err(error) = self.allocator.save() {
            tracing::warn!(%error, "node-local addresses can't be saved: after a restart they may be others");
        }
        let planned = started.elapsed();
        let (written, failed) = match wanted {
            Wanted::All(all) => self.write_all(all, catalog.is_synced()),
            Wanted::Some(some) => self.write_some(some),
        };
        let took = started.elapsed() - planned;
        if written + failed > 0 {
            tracing::debug!(generation = catalog.generation(), written, failed, ?planned, ?took, "programmed");
        }
        self.metrics.record(planned, took, written, failed);
        self.metrics.frontends(self.plan.read().values());
        self.state.store(Arc::new(State {
            generation: catalog.generation(),
            viewpoint: Some(viewpoint),
            plan: Arc::clone(&self.plan),
        }));
        if failed > 0 || !catalog.is_synced() {
            self.planner.forget();
        } else if !std::mem::replace(&mut self.older_removed, true) {
            self.programs.remove_older();
        }
        failed == 0
    }

    /// Brings the maps to a plan. Returns how many frontends were written, and how many could not be.
    fn write_all(&mut self, mut wanted: Plan, synced: bool) -> (usize, usize) {
        if !synced {
            // What an earlier run programmed holds until it is known what there is now.
            let new = std::mem::replace(&mut wanted, self.plan.read().clone());
            wanted.extend(new);
        }
        let mut failed = Vec::new();
        // Only this task writes: the plan stays as it is between the locks.
        let before = self.plan.read().clone();
        let changes = plan::changes(&before, &wanted);
        let count = changes.len();
        for change in changes {
            if !apply(&mut self.programs, &change, failed.is_empty()) {
                failed.push(change.frontend);
            }
        }
        for frontend in &failed {
            match before.get(frontend) {
                Some(old) => drop(wanted.insert(*frontend, old.clone())),
                None => drop(wanted.remove(frontend)),
            }
        }
        *self.plan.write() = wanted;
        (count - failed.len(), failed.len())
    }

    /// Brings some frontends to where they lead now. Returns as [`Worker::write_all`].
    fn write_some(&mut self, wanted: Vec<(Frontend, Option<Target>)>) -> (usize, usize) {
        let (mut written, mut failed) = (0, 0);
        for (frontend, target) in wanted {
            let same = match (self.plan.read().get(&frontend), &target) {
                (Some(old), Some(new)) => old.is_same_in_maps(new),
                (None, None) => true,
                _ => false,
            };
            if !same {
                if !apply(&mut self.programs, &Change { frontend, target: target.as_ref() }, failed == 0) {
                    failed += 1;
                    continue;
                }
                written += 1;
            }
            match target {
                Some(target) => drop(self.plan.write().insert(frontend, target)),
                None => drop(self.plan.write().remove(&frontend)),
            }
        }
        (written, failed)
    }

    /// After the maps are written, so that no socket is sent to what is gone any more.
    fn look_for_stale_sockets(&mut self, catalog: Arc<Catalog>) {
        let Some(reaper) = &self.reaper else { return };
        if self.swept.as_ref().is_none_or(|older| stale::any_gone(older, &catalog)) {
            reaper.look(Arc::clone(&catalog));
        }
        self.swept = Some(catalog);
    }
}

/// Writes one change. Returns whether it could be.
fn apply(programs: &mut Programs, change: &Change<'_>, warn: bool) -> bool {
    match programs.apply(change) {
        Ok(()) => true,
        Err(error) => {
            if warn {
                tracing::warn!(frontend = %change.frontend, %error, "can't be programmed; trying again");
            }
            false
        }
    }
}

impl fmt::Display for Frontend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match self.protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        };
        write!(f, "{}/{protocol}", self.address)
    }
}

fn view(state: &State, counters: &Counters, cgroup: &std::path::Path) -> Value {
    let frontends: Vec<Value> = state
        .plan
        .read()
        .iter()
        .map(|(frontend, target)| {
            let kind = match target {
                Target::Direct(_) | Target::Sticky(..) => "direct",
                Target::Listener(_) => "listener",
                Target::Refuse => "refuse",
            };
            let mut entry = json!({"frontend": frontend.to_string(), "target": kind, "backends": target.backends()});
            if let Some(timeout) = target.affinity() {
                entry["affinitySeconds"] = timeout.as_secs().into();
            }
            entry
        })
        .collect();
    json!({
        "datapath": "ebpf",
        "cgroup": cgroup,
        "rememberedPeers": counters.remembered_peers(),
        "generation": state.generation,
        "network": state.viewpoint.as_ref().map(|viewpoint| &viewpoint.network),
        "frontends": frontends,
    })
}
