//! Takes the calls that pods and processes of this host make to pods of other networks, at their own addresses, and hands them to
//! the agent's listeners, whatever the port.
//!
//! Routes make the pod ranges of other networks this host's own, so that the kernel delivers such packets here; an eBPF program
//! (or a table of nftables) then names the agent's socket for them. No address is translated: what a client called is the local
//! address of the connection.
//!
//! Order matters: a range that is the host's own and not captured leads to whatever else listens on the host. So capturing
//! begins before the route is there and ends after it is gone, and outlives the agent with it: calls are then refused at once.

mod ranges;
mod sk_lookup;
mod tproxy;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use edgemesh_mesh::{CatalogStore, cidr::Cidr};
use edgemesh_telemetry::Shutdown;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

pub use self::{
    ranges::{Ranges, ranges},
    sk_lookup::SkLookupError,
};
use crate::{
    config::{Config, DatapathMode},
    datapath::{host, nftables::table_is_present},
    metrics::CaptureMetrics,
    node_local::Ipv6Range,
    overlay::PodSockets,
    routes::{HostRoutes, RouteError},
};

/// Changes of the catalog that come close together are handled together.
const DEBOUNCE: Duration = Duration::from_millis(50);
/// The host's addresses and routes change without a word: look again that often.
const RESYNC: Duration = Duration::from_secs(10);

/// What captures.
enum Means {
    Program(Box<sk_lookup::Program>),
    Table(Vec<SocketAddr>),
    /// Nothing can, or shall.
    Nothing,
}

impl Means {
    fn name(&self) -> &'static str {
        match self {
            Self::Program(_) => "ebpf",
            Self::Table(_) => "nftables",
            Self::Nothing => "none",
        }
    }
}

/// What is in force, for `/debug/capture`.
#[derive(Debug, Default)]
struct State {
    by: &'static str,
    captured: BTreeSet<Cidr>,
    refused: BTreeMap<Cidr, String>,
}

/// The running capture.
#[derive(Debug)]
pub struct Capture {
    state: Arc<ArcSwap<State>>,
    task: JoinHandle<()>,
}

impl Capture {
    /// Captures what the catalog says, until the shutdown is forced, because connections need it while the agent drains.
    ///
    /// # Errors
    /// When there is no netlink socket. That nothing can be captured is only a warning: all else works.
    pub fn start(
        config: Arc<Config>,
        catalog: Arc<CatalogStore>,
        sockets: Vec<PodSockets>,
        metrics: CaptureMetrics,
        shutdown: &Shutdown,
    ) -> Result<Self, RouteError> {
        let state = Arc::<ArcSwap<State>>::default();
        let worker = Worker {
            means: choose(&config, sockets),
            routes: HostRoutes::open_beyond_drain()?,
            captured: BTreeSet::new(),
            written: None,
            begun: false,
            warned: BTreeMap::new(),
            metrics,
            state: Arc::clone(&state),
            config,
            host_addresses: host::KnownAddresses::default(),
        };
        let task = tokio::spawn(worker.run(catalog, shutdown.clone()));
        Ok(Self { state, task })
    }

    /// What is captured now, as JSON.
    pub fn debug_page(&self) -> impl Fn() -> Value + Send + Sync + 'static {
        let state = Arc::clone(&self.state);
        move || {
            let state = state.load();
            let refused: BTreeMap<String, &String> =
                state.refused.iter().map(|(range, why)| (range.to_string(), why)).collect();
            json!({
                "by": state.by,
                "captured": state.captured.iter().map(Cidr::to_string).collect::<Vec<_>>(),
                "refused": refused,
            })
        }
    }

    /// Waits until it has ended, after the shutdown was forced.
    pub async fn ended(self) {
        if let Err(error) = self.task.await {
            tracing::error!(%error, "the capture's task failed");
        }
    }

    /// Removes what a stopped agent left: routes, program and table. What can't be removed is logged.
    pub async fn uninstall(routes: &HostRoutes, config: &Config) {
        release(routes, config).await;
    }
}

/// The program, or the table where that can't serve.
fn choose(config: &Config, sockets: Vec<PodSockets>) -> Means {
    if !config.capture_pods {
        return Means::Nothing;
    }
    if config.datapath != DatapathMode::Nftables {
        match sk_lookup::Program::start(&config.bpffs, &sockets) {
            Ok(program) => return Means::Program(Box::new(program)),
            Err(error) => tracing::warn!(%error, "calls of pods of other networks are captured by nftables"),
        }
    }
    Means::Table(sockets.iter().map(|sockets| sockets.address).collect())
}

/// The ranges that are the host's own for another purpose.
fn node_local(config: &Config) -> Vec<Cidr> {
    let (v4, v6) = (config.node_local_cidr, config.node_local_cidr6);
    let v4 = Cidr::new(v4.base().into(), v4.prefix());
    v4.into_iter().chain(Cidr::new(v6.base().into(), Ipv6Range::PREFIX)).collect()
}

/// Ends the capture of everything.
async fn release(routes: &HostRoutes, config: &Config) {
    if let Err(error) = routes.sync_local(&BTreeSet::new(), &[], &node_local(config)).await {
        tracing::error!(%error, "routes to captured pods can't be removed");
    }
    if let Err(error) = sk_lookup::unpin(&config.bpffs) {
        tracing::debug!(%error, "no capturing program is removed");
    }
    if let Err(error) = tproxy::remove().await {
        tracing::debug!(%error, "no capturing table is removed");
    }
}

struct Worker {
    means: Means,
    routes: HostRoutes,
    /// What the program or the table captures.
    captured: BTreeSet<Cidr>,
    /// When the table was written last. Where bridges call the hooks of IP it must be younger than the bridges, of which one
    /// may come at any time.
    written: Option<Instant>,
    /// Whether the catalog was complete once, so that what an earlier agent left is no longer needed.
    begun: bool,
    /// Each refusal is told once.
    warned: BTreeMap<Cidr, String>,
    metrics: CaptureMetrics,
    state: Arc<ArcSwap<State>>,
    config: Arc<Config>,
    host_addresses: host::KnownAddresses,
}

impl Worker {
    async fn run(mut self, catalog: Arc<CatalogStore>, shutdown: Shutdown) {
        let mut generations = catalog.subscribe();
        if matches!(self.means, Means::Nothing) {
            // Of an earlier run with other settings.
            release(&self.routes, &self.config).await;
            return shutdown.forced().cancelled().await;
        }
        loop {
            generations.mark_unchanged();
            if catalog.is_synced() {
                self.sync(&catalog).await;
            }
            tokio::select! {
                changed = generations.changed() => if changed.is_err() {
                    shutdown.forced().cancelled().await;
                    break;
                },
                () = tokio::time::sleep(RESYNC) => {}
                () = shutdown.forced().cancelled() => break,
            }
            tokio::select! {
                () = tokio::time::sleep(DEBOUNCE) => {}
                () = shutdown.forced().cancelled() => break,
            }
        }
        let outlives = match &self.means {
            Means::Program(program) => program.is_pinned(),
            Means::Table(_) | Means::Nothing => true,
        };
        if self.config.detach_on_stop || !outlives {
            release(&self.routes, &self.config).await;
        }
    }

    async fn sync(&mut self, catalog: &CatalogStore) {
        let snapshot = catalog.snapshot();
        let viewpoint = self.config.viewpoint(&snapshot);
        let host_addresses = self.host_addresses.update(host::addresses());
        let kept = node_local(&self.config);
        let Ranges { captured: wanted, refused } = ranges(&snapshot, &viewpoint, host_addresses, &kept);
        let mut refused: BTreeMap<Cidr, String> =
            refused.into_iter().map(|(range, reason)| (range, reason.to_owned())).collect();

        // A process that calls a pod does it from the node's address, as it would without the capture, while the host has that.
        let own = snapshot.node(&viewpoint.node).into_iter().flat_map(|node| node.addresses.iter().copied());
        let sources: Vec<IpAddr> = own
            .filter(|own| host_addresses.contains(own))
            .chain([IpAddr::V4(self.config.node_local_cidr.dns_address())])
            .collect();
        let captured = self.capture(&wanted, &mut refused).await;
        match self.routes.sync_local(&captured, &sources, &kept).await {
            Ok(failed) => {
                refused.extend(failed);
                self.leave(&captured).await;
            }
            Err(error) => tracing::warn!(%error, "routes to captured pods can't be kept"),
        }
        if !self.begun {
            self.begun = true;
            self.replace_earlier().await;
        }
        for (range, reason) in &refused {
            if self.warned.get(range) != Some(reason) {
                tracing::warn!(%range, reason, "pods of another network are not reached by their own addresses");
            }
        }
        self.metrics.ranges.set(i64::try_from(captured.len()).unwrap_or(i64::MAX));
        self.metrics.failed.set(i64::try_from(refused.len()).unwrap_or(i64::MAX));
        let state = State { by: self.means.name(), captured, refused: refused.clone() };
        self.state.store(Arc::new(state));
        self.warned = refused;
    }

    /// Captures what isn't yet. Returns what of the wanted is captured now.
    async fn capture(&mut self, wanted: &BTreeSet<Cidr>, refused: &mut BTreeMap<Cidr, String>) -> BTreeSet<Cidr> {
        let new: Vec<Cidr> = wanted.difference(&self.captured).copied().collect();
        match &mut self.means {
            Means::Nothing => return BTreeSet::new(),
            Means::Program(program) => {
                for range in new {
                    match program.add(range) {
                        Ok(()) => drop(self.captured.insert(range)),
                        Err(error) => drop(refused.insert(range, error.to_string())),
                    }
                }
            }
            Means::Table(listeners) => {
                // Written anew where it differs: what is no longer wanted stays until its routes are gone.
                let all: BTreeSet<Cidr> = wanted.union(&self.captured).copied().collect();
                let too_old = || self.written.is_none_or(|at| at.elapsed() >= RESYNC);
                // Without it the host itself would answer for the pods.
                let is_gone = || matches!(table_is_present(tproxy::TABLE), Ok(false));
                if !new.is_empty() || (!all.is_empty() && too_old() && (is_gone() || tproxy::bridges_call())) {
                    match tproxy::apply(&all, listeners).await {
                        Ok(()) => {
                            self.captured = all;
                            self.written = Some(Instant::now());
                        }
                        Err(error) => {
                            // Without the table nothing is captured, and the routes must go.
                            let lost = if is_gone() { std::mem::take(&mut self.captured) } else { BTreeSet::new() };
                            let lost = lost.into_iter().filter(|range| wanted.contains(range));
                            refused.extend(new.into_iter().chain(lost).map(|range| (range, error.to_string())));
                        }
                    }
                }
            }
        }
        wanted.intersection(&self.captured).copied().collect()
    }

    /// Leaves alone what is no longer wanted, after its routes are gone.
    async fn leave(&mut self, wanted: &BTreeSet<Cidr>) {
        let gone: Vec<Cidr> = self.captured.difference(wanted).copied().collect();
        if gone.is_empty() {
            return;
        }
        let outcome: Result<(), String> = match &mut self.means {
            Means::Nothing => Ok(()),
            Means::Program(program) => {
                gone.iter().try_for_each(|range| program.remove(*range)).map_err(|error| error.to_string())
            }
            Means::Table(listeners) => tproxy::apply(wanted, listeners).await.map_err(|error| error.to_string()),
        };
        match outcome {
            Ok(()) => self.captured.clone_from(wanted),
            // They are no longer this host's, so that nothing comes.
            Err(error) => tracing::warn!(error, "ranges are captured that need not be"),
        }
        for range in gone {
            tracing::info!(%range, "pods are no longer reached through the tunnel");
        }
    }

    /// Takes the place of what an earlier agent left, of either kind.
    async fn replace_earlier(&mut self) {
        match &mut self.means {
            Means::Program(program) => {
                program.pin();
                if let Err(error) = tproxy::remove().await {
                    tracing::debug!(%error, "no capturing table is removed");
                }
            }
            Means::Table(listeners) => {
                if self.captured.is_empty()
                    && let Err(error) = tproxy::apply(&self.captured, listeners).await
                {
                    tracing::debug!(%error, "no capturing table is emptied");
                }
                if let Err(error) = sk_lookup::unpin(&self.config.bpffs) {
                    tracing::debug!(%error, "no capturing program is removed");
                }
            }
            Means::Nothing => {}
        }
    }
}
