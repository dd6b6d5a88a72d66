//! An island: a site without the internet, and a reboot on it.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::applications;
use crate::Stage;

/// From power-on to a pod that answers, containerd's own start included.
const BACK_DEADLINE: Duration = Duration::from_secs(45);

pub(super) fn run(stage: &Stage) -> Result<()> {
    applications::ensure_all(stage)?;
    let pods = applications::pods_by_node(stage, "web")?;
    stage.lab(&["cut", "site-a", "internet"])?.ok()?;
    let result = alone(stage, &pods["edge-a1"], &pods["edge-a2"]);
    stage.lab(&["heal", "all"])?.ok()?;
    result?;
    stage.until("every node is Ready again", BACK_DEADLINE, |stage| {
        let nodes = stage.kubectl("get nodes --no-headers")?.ok()?;
        ensure!(nodes.lines().all(|line| line.contains(" Ready")), "{nodes}");
        Ok(())
    })
}

fn alone(stage: &Stage, a1: &str, a2: &str) -> Result<()> {
    stage.lab(&["reboot", "edge-a2"])?.ok()?;
    stage.until("edge-a2's pods are back from its disk", BACK_DEADLINE, |stage| {
        for pod in [a2, &applications::local_pod(stage, "edge-a2", "only-a2")?] {
            stage.in_pod(pod, "true")?.ok()?;
        }
        Ok(())
    })?;
    stage.until("edge-a1 reaches edge-a2 by Service name", BACK_DEADLINE, |stage| {
        let by = applications::call(stage, a1, "http://only-a2/")?;
        ensure!(by == "edge-a2", "{by} answered");
        Ok(())
    })?;
    let by = applications::call(stage, a1, "http://only-a2.default.svc.cluster.local/")?;
    ensure!(by == "edge-a2", "{by} answered edge-a1");
    stage.until("edge-a2 has its own endpoints", BACK_DEADLINE, |stage| {
        let by = applications::call(stage, a2, "http://web/")?;
        ensure!(by == "edge-a2", "{by} answered");
        Ok(())
    })?;
    let by = applications::call(stage, a2, "udp://web:7000")?;
    ensure!(by.starts_with("edge-a"), "{by} answered edge-a2");
    Ok(())
}
