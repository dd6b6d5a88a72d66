//! DNS with no upstream.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::applications;
use crate::Stage;

/// A cluster name must answer within this, the start of a process in the container included.
const AT_ONCE: Duration = Duration::from_millis(1000);
/// An outside name that nobody can resolve must fail within this.
const FAST: Duration = Duration::from_secs(3);

pub(super) fn run(stage: &Stage) -> Result<()> {
    applications::ensure_all(stage)?;
    let pod = &applications::pods_by_node(stage, "web")?["edge-a1"];
    outside_name(stage, pod)?;
    stage.lab(&["cut", "site-a", "internet"])?.ok()?;
    let result = with_upstream_cut(stage, pod);
    stage.lab(&["heal", "all"])?.ok()?;
    result?;
    stage.until("outside names resolve again", Duration::from_secs(10), |stage| {
        stage.in_pod(pod, "nslookup -type=a other.example")?.ok().map(drop)
    })
}

/// A name of the internet resolves, through the node's upstream or its cache.
pub(super) fn outside_name(stage: &Stage, pod: &str) -> Result<()> {
    let known = stage.in_pod(pod, "nslookup -type=a outside.example")?.ok()?;
    ensure!(known.contains("198.51.100.7"), "{known}");
    Ok(())
}

fn with_upstream_cut(stage: &Stage, pod: &str) -> Result<()> {
    let own = stage.in_pod(pod, "nslookup -type=a web.default.svc.cluster.local")?;
    ensure!(own.took < AT_ONCE, "a cluster name took {:?}", own.took);
    ensure!(own.ok()?.contains("10.96."), "a cluster name has a cluster address");
    let cached = stage.in_pod(pod, "nslookup -type=a outside.example")?;
    ensure!(cached.took < AT_ONCE, "a cached name took {:?}", cached.took);
    ensure!(cached.ok()?.contains("198.51.100.7"), "a cached name keeps its address");
    let unknown = stage.in_pod(pod, "nslookup -type=a never-asked.example")?;
    ensure!(unknown.took < FAST, "a name that can't be resolved took {:?}", unknown.took);
    unknown.failed()?;
    Ok(())
}
