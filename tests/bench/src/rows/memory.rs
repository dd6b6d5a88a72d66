//! Resident memory of idle daemons.

use std::{thread, time::Duration};

use anyhow::{Result, ensure};

use super::Bench;
use crate::{
    process::{age_seconds, resident_megabytes},
    row::{Budget, Row},
    workloads::PODS_ON_A1,
};

/// A start is over then, and what only it needed is given back.
const STARTED_SECONDS: f64 = 15.0;
/// Between two looks; long enough for periodic work to fall in between.
const INTERVAL: Duration = Duration::from_millis(500);

pub(super) fn agent(bench: &Bench) -> Result<Row> {
    idle(bench, "rss_agent", ("edge-a1", "agent"), Some(15.0))
}

/// edgecore of the node with ten pods.
pub(super) fn edgecore(bench: &Bench) -> Result<Row> {
    let words = ["kubectl", "get", "pods", "--field-selector=spec.nodeName=edge-a1,status.phase=Running", "-o", "name"];
    let pods = bench.cluster.run(&words)?.lines().count();
    ensure!(pods == PODS_ON_A1, "edge-a1 runs {pods} pods, not {PODS_ON_A1}");
    idle(bench, "rss_edgecore", ("edge-a1", "edgecore"), Some(20.0))
}

pub(super) fn hub(bench: &Bench) -> Result<Row> {
    idle(bench, "rss_hub", ("hub", "hub"), None)
}

pub(super) fn gateway(bench: &Bench) -> Result<Row> {
    idle(bench, "rss_gateway", ("edge-b1", "gateway"), Some(15.0))
}

fn idle(bench: &Bench, name: &str, (host, daemon): (&str, &str), most: Option<f64>) -> Result<Row> {
    let pid = bench.cluster.daemon(host, daemon)?;
    while age_seconds(pid)? < STARTED_SECONDS {
        thread::sleep(INTERVAL);
    }
    let mut samples = Vec::new();
    for _ in 0..bench.rounds(9) {
        thread::sleep(INTERVAL);
        samples.push(resident_megabytes(pid)?);
    }
    Row::alone(name, "MB", &samples, most.map(Budget::ValueAtMost))
}
