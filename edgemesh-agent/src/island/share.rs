//! Tells the other agents of this network what this one holds of the endpoints of its node: when that changed, and now and then.

use std::{sync::Arc, time::Duration};

use edgemesh_mesh::CatalogStore;
use edgemesh_tunnel::{Carried, StreamHeader, StreamTarget, Tunnel};
use futures::{StreamExt as _, stream};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::watch,
    time::{Instant, timeout, timeout_at},
};

use super::{
    jitter,
    message::{self, Report},
    reports::{Reports, TAKEN},
};
use crate::{config::Config, metrics::IslandMetrics, overlay::COMPONENT};

/// Checks for which one report is enough.
pub(super) const CHECKS_PER_REPORT: u32 = 3;
/// Reports that may be lost before the last one is forgotten.
pub(super) const REPORTS_KEPT: u32 = 3;
/// For one peer, with the connection to it: silent ones must not keep the others from the next report.
const DEADLINE: Duration = Duration::from_secs(3);
/// Peers that are told at a time.
const CONCURRENCY: usize = 64;

/// Sends to the agents of this network.
pub(super) struct Sharing {
    pub(super) config: Arc<Config>,
    pub(super) catalog: Arc<CatalogStore>,
    pub(super) tunnel: Tunnel,
    pub(super) metrics: IslandMetrics,
    /// What the others said.
    pub(super) reports: Arc<Reports>,
    /// What to say, or nothing while the cloud is there.
    pub(super) report: watch::Receiver<Option<Report>>,
}

impl Sharing {
    pub(super) async fn run(mut self) {
        let interval = Duration::from_secs(self.config.island_check_seconds) * CHECKS_PER_REPORT;
        loop {
            let report = self.report.borrow_and_update().clone();
            let changed = if let Some(report) = report {
                let next = Instant::now() + jitter(interval);
                self.send(&message::encode(&report)).await;
                timeout_at(next, self.report.changed()).await.unwrap_or(Ok(()))
            } else {
                self.report.changed().await
            };
            if changed.is_err() {
                return;
            }
        }
    }

    async fn send(&self, message: &[u8]) {
        let snapshot = self.catalog.snapshot();
        let viewpoint = self.config.viewpoint(&snapshot);
        let peers: Vec<Arc<str>> = snapshot
            .nodes()
            .filter(|node| node.network == viewpoint.network && node.name != viewpoint.node)
            .filter(|node| node.peers.contains_key(COMPONENT))
            .map(|node| Arc::clone(&node.name))
            .collect();
        let tell = |node: Arc<str>| async move {
            let told = matches!(timeout(DEADLINE, self.tell(&node, message)).await, Ok(Some(TAKEN)));
            self.metrics.reported(if told { "sent" } else { "failed" });
            if !told {
                // Who can't be told anything may be gone: what it said last is worth no more than what is seen from here.
                self.reports.forget(&node);
            }
        };
        stream::iter(peers).for_each_concurrent(CONCURRENCY, tell).await;
    }

    /// Sends a message, and gives the answer.
    async fn tell(&self, node: &str, message: &[u8]) -> Option<u8> {
        let header = StreamHeader {
            target: StreamTarget::Island,
            protocol: Carried::Tcp,
            endpoint: edgemesh_tunnel::NO_ENDPOINT,
            source: String::new(),
        };
        let mut stream = self.tunnel.open(node, &header).await.ok()?;
        stream.write_all(message).await.ok()?;
        stream.shutdown().await.ok()?;
        stream.read_u8().await.ok()
    }
}
