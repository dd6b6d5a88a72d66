//! DNS with no upstream.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::applications;
use crate::{Stage, stage::Answer};

/// A cluster name, or one in the cache, must answer within this.
const AT_ONCE: Duration = Duration::from_millis(200);
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
    let (own, took) = timed(stage, pod, "web.default.svc.cluster.local")?;
    ensure!(took < AT_ONCE, "a cluster name took {took:?}");
    ensure!(own.ok()?.contains("10.96."), "a cluster name has a cluster address");
    let (cached, took) = timed(stage, pod, "outside.example")?;
    ensure!(took < AT_ONCE, "a cached name took {took:?}");
    ensure!(cached.ok()?.contains("198.51.100.7"), "a cached name keeps its address");
    let (unknown, took) = timed(stage, pod, "never-asked.example")?;
    ensure!(took < FAST, "a name that can't be resolved took {took:?}");
    unknown.failed()?;
    Ok(())
}

/// Resolves a name in a pod; the time is that of the resolution alone, as the pod's own clock has it.
fn timed(stage: &Stage, pod: &str, name: &str) -> Result<(Answer, Duration)> {
    let clock = "read now rest < /proc/uptime";
    let line = format!(
        "{clock}; a=$now; nslookup -type=a {name}; c=$?; {clock}; echo \"resolved between $a and $now s\"; exit $c"
    );
    let answer = stage.in_pod(pod, &line)?;
    let words: Vec<_> =
        answer.text.lines().rfind(|l| l.starts_with("resolved")).context("the times")?.split(' ').collect();
    let (from, to): (f64, f64) = (words[2].parse()?, words[4].parse()?);
    Ok((answer, Duration::from_secs_f64(to - from)))
}
