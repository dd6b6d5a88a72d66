//! Keeps what sockets see equal to the catalog: plans it, and programs the differences.

mod conntrack;
mod counters;
pub mod ebpf;
pub mod flows;
pub mod frontend_counts;
pub(crate) mod host;
mod map_batch;
pub mod map_sizes;
pub mod mode;
mod namespaces;
mod netlink;
pub mod nftables;
pub mod outside;
pub(crate) mod pins;
pub mod plan;
pub mod planner;
mod silent;
mod slots;
mod sock_diag;
pub mod stale;
mod tables;
mod unanswered;

use std::{
    collections::HashSet,
    fmt,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use edgemesh_mesh::{Catalog, CatalogStore, Viewpoint, cidr::Cidr, model::Protocol};
use edgemesh_telemetry::{Done, ReadinessTask, Shutdown};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::{config::Config, metrics::DatapathMetrics, node_local::Allocator};
use ebpf::{Counters, Programs};
use frontend_counts::Owners;
use mode::{Chosen, DatapathError};
use nftables::{RuleCounts, Rules};
use outside::OutsidePlan;
use parking_lot::RwLock;
use plan::{Change, ClusterDns, Frontend, Plan, Surroundings, Target};
use planner::{Planner, Wanted};
use stale::{Reaper, Sweep};

/// Changes that come close together are programmed together.
const DEBOUNCE: Duration = Duration::from_millis(5);
/// How long to wait before what could not be programmed is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// The longest pause between such attempts, each pause being twice as long as the last.
const MAX_RETRY: Duration = Duration::from_secs(60);
/// How soon is seen that somebody else removed the rules.
const RULES_LOOK: Duration = Duration::from_secs(10);
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
    about: Arc<About>,
    task: JoinHandle<()>,
}

/// What stays the same while a datapath runs.
#[derive(Debug)]
struct About {
    mode: &'static str,
    reason: String,
    cgroup: Option<PathBuf>,
    counters: Option<Arc<Counters>>,
    rule_counts: Arc<RuleCounts>,
}

impl Datapath {
    /// Attaches the programs, or readies the rules of nftables, and keeps them up to date until the shutdown is forced, because connections need them while the
    /// agent drains. They serve on after it. `dns` is where this node answers for the cluster DNS addresses. `readiness` is released when a complete catalog is programmed.
    ///
    /// # Errors
    /// When the kernel can't or may not do what the settings ask for.
    pub fn start(
        config: Arc<Config>,
        catalog: Arc<CatalogStore>,
        allocator: Arc<Allocator>,
        dns: Vec<ClusterDns>,
        metrics: DatapathMetrics,
        shutdown: &Shutdown,
        readiness: ReadinessTask,
    ) -> Result<Self, DatapathError> {
        let Chosen { mut programs, counters, rules, cgroup, mode, reason } = mode::choose(&config)?;
        metrics.mode(mode);
        let adopted = programs.as_mut().map(Programs::take_adopted).unwrap_or_default();
        if !adopted.is_empty() {
            tracing::info!(frontends = adopted.len(), "serving on with what an earlier run programmed");
        }
        let state = Arc::<ArcSwap<State>>::default();
        let (node_local, node_local6) = (config.node_local_cidr, config.node_local_cidr6);
        let listeners: Vec<SocketAddr> = dns.iter().map(|dns| dns.listener).collect();
        let is_node_local = move |ip| match ip {
            IpAddr::V4(ip) => node_local.contains(ip),
            IpAddr::V6(ip) => node_local6.contains(ip),
        };
        // Where rules translate the cluster DNS address, they need the host to track its packets. Another address than a node-local
        // one can be the host's for other purposes.
        let untracked = listeners.iter().filter(|listener| is_node_local(listener.ip()));
        let untracked = untracked.filter(|_| programs.is_some() && config.dns.untracked).copied().collect();
        let rules_gone = Arc::<AtomicBool>::default();
        tokio::spawn(nftables::keep_dns_untracked(
            untracked,
            Arc::clone(&rules_gone),
            metrics.clone(),
            shutdown.clone(),
        ));
        let is_ours = move |backend: SocketAddr| listeners.contains(&backend) || is_node_local(backend.ip());
        let mut sweepers: Vec<Box<dyn Sweep>> = Vec::new();
        if let Some(sweeper) = programs.as_mut().and_then(Programs::take_sweeper) {
            sweepers.push(Box::new(sweeper));
        }
        match rules.sweeper(cgroup.clone()) {
            Ok(sweeper) => sweepers.push(Box::new(sweeper)),
            Err(error) => tracing::error!(%error, "flows to endpoints that are gone will not be ended"),
        }
        let reaper = Reaper::start(sweepers, is_ours, metrics.clone(), stale::FIRST_LOOK)
            .inspect_err(|error| tracing::error!(%error, "sockets of endpoints that are gone will not be ended"))
            .ok();
        let rules_lead = Arc::new(AtomicBool::new(programs.is_none()));
        if let Some(suspicions) = silent::start(Arc::clone(&config), Arc::clone(&catalog), metrics.clone(), shutdown) {
            if let Some(ring) = programs.as_mut().and_then(Programs::take_unanswered) {
                tokio::spawn(unanswered::of_sockets(ring, suspicions.clone()));
            }
            tokio::spawn(unanswered::of_flows(Arc::clone(&rules_lead), suspicions));
        }
        let about = About { mode, reason, cgroup, counters: counters.map(Arc::new), rule_counts: Arc::default() };
        let worker = Worker {
            programs,
            rules,
            outside: OutsidePlan::new(),
            rules_lead,
            guarded: Plan::new(),
            planned_outside: None,
            outside_failures: 0,
            failures: 0,
            missing: Programmed::default(),
            reaper,
            looked_at: None,
            plan: Arc::new(RwLock::new(adopted)),
            planner: Planner::default(),
            older_removed: false,
            rules_gone,
            metrics,
            state: Arc::clone(&state),
            config,
            allocator,
            dns,
            has_external: false,
            host_addresses: host::KnownAddresses::default(),
        };
        let task = tokio::spawn(worker.run(catalog, shutdown.clone(), readiness));
        Ok(Self { state, about: Arc::new(about), task })
    }

    /// What is programmed now, as JSON.
    pub fn debug_page(&self) -> impl Fn() -> Value + Send + Sync + 'static {
        let (state, about) = (Arc::clone(&self.state), Arc::clone(&self.about));
        move || view(&state.load(), &about)
    }

    /// What the programs count, where there are programs.
    pub fn counters(&self) -> Option<Arc<Counters>> {
        self.about.counters.clone()
    }

    /// What the rules count.
    pub fn rule_counts(&self) -> Arc<RuleCounts> {
        Arc::clone(&self.about.rule_counts)
    }

    /// Waits until nothing is programmed any more, after the shutdown was forced.
    pub async fn ended(self) {
        if let Err(error) = self.task.await {
            tracing::error!(%error, "the datapath's task failed");
        }
    }
}

struct Worker {
    /// The programs, in eBPF mode.
    programs: Option<Programs>,
    /// The rules: for everybody, or with programs for callers from outside only.
    rules: Rules,
    /// What is to be in force for callers from outside.
    outside: OutsidePlan,
    /// Whether rules lead flows to endpoints.
    rules_lead: Arc<AtomicBool>,
    /// What the programs leave to the rules.
    guarded: Plan,
    /// From which catalog it was planned, unless it has to be planned in full; or something is not in force.
    planned_outside: Option<Arc<Catalog>>,
    /// How often in a row the rules could not be written: said once.
    outside_failures: u32,
    /// How often in a row not all frontends could be programmed.
    failures: u32,
    /// What could not be programmed since all were planned last.
    missing: Programmed,
    reaper: Option<Reaper>,
    /// The last complete catalog that was programmed.
    looked_at: Option<Arc<Catalog>>,
    /// What is in the maps. Written by this task alone, read by the debug page.
    plan: Arc<RwLock<Plan>>,
    planner: Planner,
    /// Whether programs of other versions are gone.
    older_removed: bool,
    /// Whether no rules of an earlier agent translate what programs do now.
    rules_gone: Arc<AtomicBool>,
    metrics: DatapathMetrics,
    state: Arc<ArcSwap<State>>,
    config: Arc<Config>,
    allocator: Arc<Allocator>,
    /// Where this node answers DNS.
    dns: Vec<ClusterDns>,
    /// Whether a Service has `externalIPs`, so that the host's addresses matter.
    has_external: bool,
    host_addresses: host::KnownAddresses,
}

impl Worker {
    async fn run(mut self, catalog: Arc<CatalogStore>, shutdown: Shutdown, readiness: ReadinessTask) {
        let mut generations = catalog.subscribe();
        let (mut readiness, mut is_ready) = (Some(readiness), None);
        let mut retry_at = None;
        let rules_lead = Arc::clone(&self.rules_lead);
        let mut look_at = tokio::time::Instant::now() + RULES_LOOK;
        loop {
            generations.mark_unchanged();
            // From half a catalog, Services would be refused whose endpoints were only not read yet. Cluster DNS leads
            // here from the start: other names can be answered.
            let synced = catalog.is_synced();
            let snapshot = if synced { catalog.snapshot() } else { Arc::default() };
            let look = tokio::time::Instant::now() >= look_at;
            if look {
                look_at = tokio::time::Instant::now() + RULES_LOOK;
            }
            let round = tokio::task::spawn_blocking(move || {
                if look && self.rules_lead.load(Ordering::Relaxed) {
                    self.rules.look();
                }
                let passed_on = snapshot.is_synced() && self.forget_counts(&snapshot);
                let is_whole = self.program(&snapshot);
                if snapshot.is_synced() {
                    self.look_back(snapshot, passed_on);
                }
                (self, is_whole)
            });
            let is_whole;
            match round.await {
                Ok((worker, whole)) => (self, is_whole) = (worker, whole),
                Err(error) => {
                    tracing::error!(%error, "programming failed; what is programmed stays as it is");
                    // Changes are not seen any more: the node must not look as if they were.
                    drop(is_ready.map(Done::undo));
                    return;
                }
            }
            // What there is no room for must not take the rest of the node away.
            if synced
                && self.missing.failed == 0
                && let Some(readiness) = readiness.take()
            {
                is_ready = Some(readiness.ready());
            }
            match (self.missing.is_all(), is_whole) {
                (true, _) => self.failures = 0,
                (false, true) => self.failures = self.failures.saturating_add(1),
                (false, false) => self.failures = self.failures.max(1),
            }
            // Other changes meanwhile put it off no further.
            if self.failures == 0 {
                retry_at = None;
            } else if is_whole || retry_at.is_none() {
                retry_at = Some(tokio::time::Instant::now() + pause_after(self.failures));
            }
            tokio::select! {
                changed = generations.changed() => if changed.is_err() {
                    // Discovery has ended: what is programmed stays until the end.
                    shutdown.forced().cancelled().await;
                    return;
                },
                () = tokio::time::sleep_until(retry_at.unwrap_or_else(tokio::time::Instant::now)), if retry_at.is_some() => {
                    self.planner.forget();
                }
                () = tokio::time::sleep(pause_after(self.outside_failures)), if self.outside_failures > 0 => {}
                () = tokio::time::sleep(HOST_ADDRESSES), if self.has_external => {}
                // Where they can't be written that is tried again by itself.
                () = tokio::time::sleep_until(look_at), if self.outside_failures == 0 && rules_lead.load(Ordering::Relaxed) => {}
                () = shutdown.forced().cancelled() => return,
            }
            tokio::time::sleep(DEBOUNCE).await;
        }
    }

    /// Plans and writes the differences. Returns whether all frontends were planned, and not only those of what changed.
    fn program(&mut self, catalog: &Arc<Catalog>) -> bool {
        let started = Instant::now();
        let viewpoint = self.config.viewpoint(catalog);
        self.has_external = catalog.services().any(|service| !service.external_ips.is_empty());
        let host_addresses =
            if self.has_external { self.host_addresses.update(host::addresses()).clone() } else { HashSet::new() };
        let (allocator, dns) = (Arc::clone(&self.allocator), self.dns.clone());
        let surroundings =
            Surroundings { viewpoint: &viewpoint, allocator: &allocator, host_addresses: &host_addresses, dns: &dns };
        let wanted = self.planner.plan(catalog, surroundings);
        // Before sockets are sent there, so that an address means the same Service port after a crash.
        if let Err(error) = self.allocator.save() {
            tracing::warn!(%error, "node-local addresses can't be saved: after a restart they may be others");
        }
        let planned = started.elapsed();
        let is_whole = matches!(wanted, Wanted::All(_));
        let synced = catalog.is_synced();
        let programmed = match self.programs.is_some() {
            true => {
                let mut wanted = wanted;
                let outside = synced.then(|| self.plan_rules(catalog, surroundings, &mut wanted));
                // What the rules of another mode serve must be served by the programs before they go. Later, callers from outside are
                // served in another way before those on the node are.
                let takes_over = !self.older_removed;
                if !takes_over && let Some(outside) = &outside {
                    self.write_outside(catalog, surroundings, outside);
                }
                let programmed = match wanted {
                    Wanted::All(all) => self.write_all(all, synced),
                    Wanted::Some(some) => self.write_some(some),
                };
                if takes_over && let Some(outside) = &outside {
                    self.write_outside(catalog, surroundings, outside);
                }
                programmed
            }
            false => self.write_rules(catalog, surroundings, wanted),
        };
        let took = started.elapsed() - planned;
        if programmed != Programmed::default() {
            tracing::debug!(generation = catalog.generation(), ?programmed, ?planned, ?took, "programmed");
        }
        let before = self.missing;
        // What failed before is not among the frontends of a change, unless it is its own.
        self.missing = Programmed {
            written: 0,
            failed: programmed.failed + if is_whole { 0 } else { before.failed },
            without_room: programmed.without_room + if is_whole { 0 } else { before.without_room },
        };
        if self.missing.without_room > before.without_room {
            tracing::warn!(
                frontends = self.missing.without_room,
                "the eBPF maps have no room for all Services: these are not served; `backendSlots` gives more"
            );
        }
        self.metrics.record(planned, took, programmed);
        self.metrics.slots(self.programs.as_ref().map(Programs::slots));
        self.metrics.frontends(self.plan.read().values());
        self.metrics.outside_frontends(self.outside.len());
        self.rules_lead.store(self.programs.is_none() || !self.outside.is_empty(), Ordering::Relaxed);
        self.state.store(Arc::new(State {
            generation: catalog.generation(),
            viewpoint: Some(viewpoint),
            plan: Arc::clone(&self.plan),
        }));
        if !synced || (self.programs.is_none() && !programmed.is_all()) {
            self.planner.forget();
        } else if self.missing.failed == 0 && !std::mem::replace(&mut self.older_removed, true) {
            self.remove_older();
        }
        is_whole
    }

    /// What another version, or another mode, left: it served until now.
    fn remove_older(&self) {
        match &self.programs {
            Some(programs) => {
                programs.remove_older();
                nftables::remove_routes();
                self.rules_gone.store(self.outside_failures == 0, Ordering::Relaxed);
            }
            None => {
                if let Err(error) = Programs::uninstall(&self.config.cgroup, &self.config.bpffs) {
                    tracing::debug!(%error, "no eBPF programs of an earlier run to remove");
                }
            }
        }
    }

    /// Plans the rules for callers from outside. Returns what changed, or nothing if that can be all.
    ///
    /// What may not be called from everywhere is taken from what is wanted of the programs, which can't tell where a
    /// pod's socket calls from: the rules serve it to all.
    fn plan_rules(
        &mut self,
        catalog: &Arc<Catalog>,
        surroundings: Surroundings<'_>,
        wanted: &mut Wanted,
    ) -> Option<Vec<(Frontend, Option<outside::OutsideTarget>)>> {
        let older = self.planned_outside.take().filter(|_| matches!(wanted, Wanted::Some(_)));
        let changed = self.plan_outside(catalog, surroundings, older);
        if let Wanted::All(all) = wanted {
            let is_guarded = |at: &Frontend| matches!(self.outside.get(at), Some(outside::OutsideTarget::Within(..)));
            (self.guarded, *all) = std::mem::take(all).into_iter().partition(|(frontend, _)| is_guarded(frontend));
        }
        changed
    }

    /// Brings the rules for callers from outside to what is planned, beside the programs. If that fails it is tried
    /// again with pauses of its own: the node's own sockets, and readiness, don't wait for it.
    fn write_outside(
        &mut self,
        catalog: &Arc<Catalog>,
        surroundings: Surroundings<'_>,
        changed: &Option<Vec<(Frontend, Option<outside::OutsideTarget>)>>,
    ) {
        self.rules.set_pods(pod_ranges(catalog, &surroundings.viewpoint.node));
        let is_local = |backend, protocol| is_local(catalog, surroundings.viewpoint, backend, protocol);
        let written = match changed {
            None => self.rules.replace(&self.guarded, &self.outside, &is_local),
            Some(outside) => {
                let changes = nftables::Changes { inside: Vec::new(), outside: outside.clone() };
                self.rules.apply(changes, &is_local)
            }
        };
        match written {
            Ok(_) => {
                self.planned_outside = Some(Arc::clone(catalog));
                if self.older_removed {
                    self.rules_gone.store(true, Ordering::Relaxed);
                }
                if std::mem::take(&mut self.outside_failures) > 0 {
                    tracing::info!("NodePorts and external addresses are served to callers outside of this node again");
                }
            }
            Err(error) => {
                self.metrics.rules_failed();
                if self.outside_failures == 0 {
                    tracing::warn!(%error, "NodePorts and external addresses are not served to callers outside of this node; trying again");
                }
                self.outside_failures = self.outside_failures.saturating_add(1);
            }
        }
    }

    /// Brings the plan for callers from outside up to date. Returns what changed, or nothing if that can be all.
    fn plan_outside(
        &mut self,
        catalog: &Catalog,
        surroundings: Surroundings<'_>,
        older: Option<Arc<Catalog>>,
    ) -> Option<Vec<(Frontend, Option<outside::OutsideTarget>)>> {
        let Some(older) = older else {
            self.outside = outside::plan(catalog, surroundings);
            return None;
        };
        let changed = outside::changed(catalog, &older, surroundings);
        for (frontend, target) in &changed {
            match target {
                Some(target) => drop(self.outside.insert(*frontend, target.clone())),
                None => drop(self.outside.remove(frontend)),
            }
        }
        Some(changed)
    }

    /// Brings the rules to what is wanted, where they are all there is.
    fn write_rules(&mut self, catalog: &Arc<Catalog>, surroundings: Surroundings<'_>, wanted: Wanted) -> Programmed {
        if !catalog.is_synced() && Rules::is_present() {
            // What an earlier run left holds until it is known what there is now.
            return Programmed::default();
        }
        let older = self.planned_outside.take().filter(|_| matches!(wanted, Wanted::Some(_)));
        let outside = self.plan_outside(catalog, surroundings, older);
        self.rules.set_pods(pod_ranges(catalog, &surroundings.viewpoint.node));
        let is_local = |backend, protocol| is_local(catalog, surroundings.viewpoint, backend, protocol);
        let (count, written) = match wanted {
            Wanted::All(all) => {
                let written = self.rules.replace(&all, &self.outside, &is_local);
                let count = all.len();
                if written.is_ok() {
                    *self.plan.write() = all;
                }
                (count, written)
            }
            Wanted::Some(inside) => {
                let (count, new) = (inside.len(), inside.clone());
                let changes = nftables::Changes { inside, outside: outside.unwrap_or_default() };
                let written = self.rules.apply(changes, &is_local);
                if written.is_ok() {
                    let mut plan = self.plan.write();
                    for (frontend, target) in new {
                        match target {
                            Some(target) => drop(plan.insert(frontend, target)),
                            None => drop(plan.remove(&frontend)),
                        }
                    }
                }
                (count, written)
            }
        };
        match written {
            Ok(written) => {
                self.planned_outside = Some(Arc::clone(catalog));
                self.outside_failures = 0;
                Programmed { written, ..Programmed::default() }
            }
            Err(error) => {
                self.metrics.rules_failed();
                if self.outside_failures == 0 {
                    tracing::warn!(%error, "rules can't be written; trying again");
                }
                self.outside_failures = self.outside_failures.saturating_add(1);
                Programmed { failed: count.max(1), ..Programmed::default() }
            }
        }
    }

    /// Brings the maps to a plan.
    fn write_all(&mut self, mut wanted: Plan, synced: bool) -> Programmed {
        if !synced {
            // What an earlier run programmed holds until it is known what there is now.
            let new = std::mem::replace(&mut wanted, self.plan.read().clone());
            wanted.extend(new);
        }
        let mut programmed = Programmed::default();
        let Some(programs) = &mut self.programs else { return programmed };
        let mut failed = Vec::new();
        // Only this task writes: the plan stays as it is between the locks.
        let before = self.plan.read().clone();
        for change in plan::changes(&before, &wanted) {
            if !programmed.apply(programs, &change) {
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
        programmed
    }

    /// Brings some frontends to where they lead now.
    fn write_some(&mut self, wanted: Vec<(Frontend, Option<Target>)>) -> Programmed {
        let mut programmed = Programmed::default();
        let Some(programs) = &mut self.programs else { return programmed };
        for (frontend, target) in wanted {
            let is_other = self.plan.read().get(&frontend) != target.as_ref();
            if is_other && !programmed.apply(programs, &Change { frontend, target: target.as_ref() }) {
                continue;
            }
            match target {
                Some(target) => drop(self.plan.write().insert(frontend, target)),
                None => drop(self.plan.write().remove(&frontend)),
            }
        }
        programmed
    }

    /// Forgets what was counted of a Service at an address that another has now, before that one is served there. Returns whether
    /// there is such an address.
    fn forget_counts(&mut self, catalog: &Catalog) -> bool {
        let Some(older) = &self.looked_at else { return false };
        let passed_on = passed_on(catalog, older, &self.config.node_name);
        if let Some(programs) = &mut self.programs {
            passed_on.iter().for_each(|frontend| programs.forget_calls(*frontend));
        }
        if let Err(error) = self.rules.forget_counts(&passed_on) {
            tracing::warn!(%error, "what was counted of a Service is shown as another's");
        }
        !passed_on.is_empty()
    }

    /// Sees to what the catalog before had and this one lacks. After the maps are written, so that no socket is sent to
    /// what is gone any more. `passed_on` says whether an address is another Service's now.
    fn look_back(&mut self, catalog: Arc<Catalog>, passed_on: bool) {
        let older = self.looked_at.replace(Arc::clone(&catalog));
        let Some(reaper) = &self.reaper else { return };
        reaper.note(Arc::clone(&catalog));
        if passed_on || older.is_none_or(|older| stale::any_gone(&older, &catalog)) {
            reaper.look();
        }
    }
}

/// Frontends that a Service had and another has now, which begins with none of its counts.
fn passed_on(catalog: &Catalog, older: &Catalog, node: &str) -> Vec<Frontend> {
    let (before, now) = (Owners::new(older), Owners::new(catalog));
    let mut own_addresses = plan::own_addresses(older, node);
    own_addresses.extend(outside::OWN);
    let mut passed_on = Vec::new();
    for name in catalog.changed_services(older) {
        let Some(service) = older.service_named(&name) else { continue };
        let had =
            planner::frontends(service, &own_addresses).into_iter().chain(planner::external(service).map(|(at, _)| at));
        passed_on
            .extend(had.filter(|at| before.of(*at) == Some(&name) && now.of(*at).is_some_and(|owner| *owner != name)));
    }
    passed_on
}

/// How long to wait after so many failures in a row.
fn pause_after(failures: u32) -> Duration {
    RETRY.saturating_mul(1 << failures.saturating_sub(1).min(6)).min(MAX_RETRY)
}

/// Whether a backend is an endpoint on the node from which is looked.
fn is_local(catalog: &Catalog, viewpoint: &Viewpoint, backend: SocketAddr, protocol: Protocol) -> bool {
    catalog.is_endpoint_on(backend, protocol, &viewpoint.node)
}

fn pod_ranges(catalog: &Catalog, node: &str) -> Vec<Cidr> {
    catalog
        .node(node)
        .into_iter()
        .flat_map(|node| node.pod_cidrs.iter())
        .filter_map(|range| Cidr::parse(range))
        .collect()
}

/// What became of the frontends that were to be written or removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Programmed {
    /// They are in force.
    pub(crate) written: usize,
    /// They are as before.
    pub(crate) failed: usize,
    /// They are as before because the maps are full.
    pub(crate) without_room: usize,
}

impl Programmed {
    fn is_all(self) -> bool {
        self.failed + self.without_room == 0
    }

    /// Writes one change. Returns whether it could be.
    fn apply(&mut self, programs: &mut Programs, change: &Change<'_>) -> bool {
        let outcome = programs.apply(change);
        match &outcome {
            Ok(()) => self.written += 1,
            Err(error) if error.is_full() => self.without_room += 1,
            Err(error) => {
                if self.failed == 0 {
                    tracing::warn!(frontend = %change.frontend, %error, "can't be programmed; trying again");
                }
                self.failed += 1;
            }
        }
        outcome.is_ok()
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

fn view(state: &State, about: &About) -> Value {
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
        "datapath": about.mode,
        "reason": about.reason,
        "cgroup": about.cgroup,
        "rememberedPeers": about.counters.as_ref().and_then(|counters| counters.remembered_peers().ok()),
        "generation": state.generation,
        "network": state.viewpoint.as_ref().map(|viewpoint| &viewpoint.network),
        "frontends": frontends,
    })
}
