//! Keeps what sockets see equal to the catalog: plans it, and programs the differences.

mod counters;
pub mod ebpf;
mod host;
mod namespaces;
mod pins;
pub mod plan;
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
use plan::{Frontend, Plan, Surroundings, Target};
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
    pub plan: Arc<Plan>,
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
        let node_local = config.node_local_cidr;
        let is_ours = move |backend: SocketAddr| match backend.ip() {
            _ if backend == dns => true,
            IpAddr::V4(ip) => node_local.contains(ip),
            IpAddr::V6(_) => false,
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
            plan: Arc::new(adopted),
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
    /// What is in the maps.
    plan: Arc<Plan>,
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
    fn program(&mut self, catalog: &Catalog) -> bool {
        let started = Instant::now();
        let viewpoint = self.config.viewpoint(catalog);
        let cluster_dns = SocketAddr::from((self.config.dns.cluster_address, plan::DNS_PORT));
        // A backend is of its frontend's family.
        let dns = self.dns.is_ipv4().then_some((cluster_dns, self.dns));
        self.has_external = catalog.services().any(|service| !service.external_ips.is_empty());
        let host_addresses = if self.has_external { host::addresses() } else { HashSet::new() };
        let surroundings =
            Surroundings { viewpoint: &viewpoint, allocator: &self.allocator, host_addresses: &host_addresses, dns };
        let mut wanted = plan::plan(catalog, surroundings);
        if !catalog.is_synced() {
            // What an earlier run programmed holds until it is known what there is now.
            let new = std::mem::replace(&mut wanted, (*self.plan).clone());
            wanted.extend(new);
        }
        // Before sockets are sent there, so that an address means the same Service port after a crash.
        if let Err(error) = self.allocator.save() {
            tracing::warn!(%error, "node-local addresses can't be saved: after a restart they may be others");
        }
        let planned = started.elapsed();
        let mut failed = Vec::new();
        let changes = plan::changes(&self.plan, &wanted);
        let count = changes.len();
        for change in changes {
            if let Err(error) = self.programs.apply(&change) {
                if failed.is_empty() {
                    tracing::warn!(frontend = %change.frontend, %error, "can't be programmed; trying again");
                }
                failed.push(change.frontend);
            }
        }
        let written = started.elapsed() - planned;
        if count > 0 {
            tracing::debug!(generation = catalog.generation(), changes = count, ?planned, ?written, "programmed");
        }
        self.metrics.record(planned, written, count - failed.len(), failed.len());
        self.plan = Arc::new(self.in_maps(wanted, &failed));
        self.metrics.frontends(self.plan.values());
        self.state.store(Arc::new(State {
            generation: catalog.generation(),
            viewpoint: Some(viewpoint),
            plan: Arc::clone(&self.plan),
        }));
        if catalog.is_synced() && failed.is_empty() && !std::mem::replace(&mut self.older_removed, true) {
            self.programs.remove_older();
        }
        failed.is_empty()
    }

    /// After the maps are written, so that no socket is sent to what is gone any more.
    fn look_for_stale_sockets(&mut self, catalog: Arc<Catalog>) {
        let Some(reaper) = &self.reaper else { return };
        if self.swept.as_ref().is_none_or(|older| stale::any_gone(older, &catalog)) {
            reaper.look(Arc::clone(&catalog));
        }
        self.swept = Some(catalog);
    }

    /// What is in the maps when some frontends stayed as they were.
    fn in_maps(&self, mut wanted: Plan, failed: &[Frontend]) -> Plan {
        for frontend in failed {
            match self.plan.get(frontend) {
                Some(old) => drop(wanted.insert(*frontend, old.clone())),
                None => drop(wanted.remove(frontend)),
            }
        }
        wanted
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
