//! Island mode: while the cloud is away nobody writes EndpointSlices, so the agent looks for itself which endpoints of its node
//! and its network answer, and has the catalog show that. DNS, the datapath and the proxies, which all read the catalog, follow.
//!
//! Connections are the judge, and not the status of pods at the metaserver: they tell of every pod of the network and not only of
//! this node's, need no word from other nodes, and work with any API server. Where another node says of its own endpoints what it
//! found, that is taken over and they are not checked from here.

pub(crate) mod checks;
mod cloud;
mod kept;
mod message;
mod reports;
mod share;

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use edgemesh_mesh::{CatalogStore, Observed, model::Protocol};
use edgemesh_telemetry::Shutdown;
use edgemesh_tunnel::Tunnel;
use rand::Rng as _;
use serde_json::{Value, json};
use tokio::sync::watch;

pub use self::reports::Reports;
use self::{checks::Checks, cloud::Cloud, kept::Kept, message::Report, share::Sharing};
use crate::{config::Config, metrics::IslandMetrics};

/// How often a metaserver is asked.
const ASK: Duration = Duration::from_secs(2);
/// How often an API server is: all agents ask the same one.
const ASK_API_SERVER: Duration = Duration::from_secs(10);
/// Answers in a row that the cloud is away before own checks begin.
const AWAY_AFTER: u32 = 3;
/// How long the cloud must be back before own checks end: what happened meanwhile has to get there and back as EndpointSlices.
const BACK_FOR: Duration = Duration::from_secs(10);

/// What `/debug/island` shows.
#[derive(Debug, Default)]
struct State {
    is_island: bool,
    checked: usize,
    observed: Observed,
}

/// The running watch over the cloud.
#[derive(Debug, Clone)]
pub struct Island {
    state: Arc<ArcSwap<State>>,
    kept: Kept,
    reports: Arc<Reports>,
    metrics: IslandMetrics,
}

impl Island {
    /// Not yet watching. What an earlier run held of endpoints, if it ended as an island, holds on. Blocks on the disk.
    pub fn new(config: &Config, metrics: IslandMetrics) -> Self {
        let keep = Duration::from_secs(config.island_check_seconds) * share::CHECKS_PER_REPORT * share::REPORTS_KEPT;
        let kept = Kept::at(config.data_dir.join("island.json"));
        let observed = if config.island_check_seconds == 0 {
            // Once they are made again it would be old.
            if let Err(error) = kept.write(&Observed::default()) {
                tracing::warn!(%error, "what an earlier run held of endpoints can't be removed");
            }
            Observed::default()
        } else {
            kept.read()
        };
        let state = State { observed, ..State::default() };
        let reports = Arc::new(Reports::new(keep, metrics.clone()));
        Self { state: Arc::new(ArcSwap::from_pointee(state)), kept, reports, metrics }
    }

    /// Has the catalog show what holds on from an earlier run.
    pub fn show_kept(&self, catalog: &CatalogStore) {
        catalog.set_observed(self.state.load().observed.clone());
        // The copy on disk was read meanwhile.
        if catalog.is_synced() {
            catalog.publish();
        }
    }

    /// Where what other nodes say arrives.
    pub fn reports(&self) -> Arc<Reports> {
        Arc::clone(&self.reports)
    }

    /// Watches whether the cloud is there, until the agent stops.
    pub fn start(
        &self,
        config: &Arc<Config>,
        catalog: &Arc<CatalogStore>,
        client: kube::Client,
        tunnel: Tunnel,
        shutdown: &Shutdown,
    ) {
        if config.island_check_seconds == 0 {
            return;
        }
        let (report, told) = watch::channel(None);
        let sharing = Sharing {
            config: Arc::clone(config),
            catalog: Arc::clone(catalog),
            tunnel,
            metrics: self.metrics.clone(),
            reports: self.reports(),
            report: told,
        };
        let worker = Worker {
            config: Arc::clone(config),
            catalog: Arc::clone(catalog),
            client,
            metrics: self.metrics.clone(),
            state: Arc::clone(&self.state),
            kept: self.kept.clone(),
            reports: self.reports(),
            report,
            checks: Checks::beginning_with(&self.state.load().observed),
        };
        let stopping = shutdown.stopping().clone();
        shutdown.spawn(async move {
            tokio::select! {
                () = worker.run() => {}
                () = sharing.run() => {}
                () = stopping.cancelled() => {}
            }
        });
    }

    /// Whether the cloud is away, and what is held of endpoints then, as JSON.
    pub fn debug_page(&self) -> impl Fn() -> Value + Send + Sync + 'static {
        let (state, reports) = (Arc::clone(&self.state), self.reports());
        move || {
            let state = state.load();
            let named = |answers: bool| if answers { "back" } else { "dead" };
            let endpoints: BTreeMap<String, &str> = state
                .observed
                .endpoints
                .iter()
                .map(|(endpoint, answers)| (endpoint.to_string(), named(*answers)))
                .collect();
            json!({
                "island": state.is_island, "checked": state.checked, "endpoints": endpoints, "reports": reports.debug_view(),
            })
        }
    }
}

struct Worker {
    config: Arc<Config>,
    catalog: Arc<CatalogStore>,
    client: kube::Client,
    metrics: IslandMetrics,
    state: Arc<ArcSwap<State>>,
    kept: Kept,
    reports: Arc<Reports>,
    /// What other nodes are told.
    report: watch::Sender<Option<Report>>,
    checks: Checks,
}

impl Worker {
    async fn run(mut self) {
        let mut was_island = self.state.load().observed != Observed::default();
        loop {
            if std::mem::take(&mut was_island) {
                self.until_synced().await;
                tracing::warn!("the cloud was away when the agent ended: what it held of endpoints holds on");
            } else {
                self.until_away().await;
                tracing::warn!("the cloud is away: endpoints of this network are judged by whether they answer");
            }
            self.reports.set_island(true);
            self.metrics.active.set(1);
            self.until_back().await;
            tracing::info!("the cloud is back: endpoints are what it says");
            self.reports.set_island(false);
            self.report.send_replace(None);
            self.checks = Checks::default();
            self.show(0).await;
            self.metrics.active.set(0);
            self.state.store(Arc::default());
        }
    }

    /// Until it is known which endpoints there are.
    async fn until_synced(&self) {
        let mut generations = self.catalog.subscribe();
        while !self.catalog.is_synced() && generations.changed().await.is_ok() {}
    }

    async fn until_away(&self) {
        let mut away = 0;
        while away < AWAY_AFTER {
            let answer = cloud::ask(&self.client).await;
            away = if answer.is_there() { 0 } else { away + 1 };
            tokio::time::sleep(jitter(if answer == Cloud::ApiServer { ASK_API_SERVER } else { ASK })).await;
        }
    }

    async fn until_back(&mut self) {
        let mut back_since: Option<Instant> = None;
        let check = Duration::from_secs(self.config.island_check_seconds);
        loop {
            let snapshot = self.catalog.snapshot();
            let targets = checks::targets(&snapshot, &self.config.viewpoint(&snapshot));
            let now = Instant::now();
            self.reports.forget_old(now);
            let (mut own, mut followed, mut to_check) = (Vec::new(), Vec::new(), Vec::new());
            for (node, target) in targets {
                let (endpoint, protocol) = target;
                // Whether silence counts, of pods with UDP ports only, is for each node to know.
                if protocol == Protocol::Tcp {
                    if *node == *self.config.node_name {
                        own.push(endpoint);
                    } else if let Some(held) = self.reports.fresh(&node, endpoint, now) {
                        followed.push((endpoint, held));
                        continue;
                    }
                }
                to_check.push(target);
            }
            let checked = to_check.len();
            let results = checks::round(to_check).await;
            for answered in results.iter().filter_map(|(_, answered)| *answered) {
                self.metrics.checked(answered);
            }
            for (endpoint, answers) in self.checks.note(&results, &followed) {
                if answers {
                    tracing::info!(%endpoint, "an endpoint is back");
                } else {
                    tracing::info!(%endpoint, "an endpoint is dead: it gets no more connections");
                }
            }
            self.show(checked).await;
            let report = self.checks.report(&own);
            self.report.send_if_modified(|told| {
                let differs = told.as_ref() != Some(&report);
                *told = Some(report);
                differs
            });
            if cloud::ask(&self.client).await.is_there() {
                if back_since.get_or_insert_with(Instant::now).elapsed() >= BACK_FOR {
                    return;
                }
            } else {
                back_since = None;
            }
            tokio::time::sleep(jitter(check)).await;
        }
    }

    /// Puts what is known into the catalog, and keeps it for the next run.
    async fn show(&self, checked: usize) {
        let observed = self.checks.observed();
        let count = |wanted: bool| observed.endpoints.values().filter(|answers| **answers == wanted).count();
        self.metrics.endpoints(count(false), count(true));
        if self.state.load().observed != observed {
            self.catalog.set_observed(observed.clone());
            self.catalog.publish();
            let (kept, held) = (self.kept.clone(), observed.clone());
            let written = tokio::task::spawn_blocking(move || kept.write(&held)).await;
            if let Err(error) = written.unwrap_or_else(|failed| Err(failed.into())) {
                tracing::warn!(%error, "what is held of endpoints can't be kept: a restart forgets it");
            }
        }
        self.state.store(Arc::new(State { is_island: true, checked, observed }));
    }
}

/// Up to a quarter more or less, so that not all nodes do the same at the same moment.
fn jitter(time: Duration) -> Duration {
    time.mul_f64(rand::rng().random_range(0.75..1.25))
}
