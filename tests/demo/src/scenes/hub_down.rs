//! No hub: everything that runs goes on.

use anyhow::{Result, ensure};

use super::{applications, calls, dns, gateway};
use crate::Stage;

pub(super) fn run(stage: &Stage) -> Result<()> {
    gateway::ensure_gateway(&stage.unseen())?;
    let pods = applications::pods_by_node(stage, "web")?;
    stage.lab(&["kill", "hub"])?.ok()?;
    let result = goes_on(stage, &pods);
    stage.lab(&["start", "hub"])?.ok()?;
    result?;
    stage.until("kubectl works again", applications::RUNNING_DEADLINE, |stage| {
        stage.kubectl("get nodes")?.ok().map(drop)
    })
}

fn goes_on(stage: &Stage, pods: &std::collections::BTreeMap<String, String>) -> Result<()> {
    let refused = stage.kubectl("get nodes --request-timeout=2s")?.failed()?;
    ensure!(!refused.is_empty(), "kubectl says why");
    calls::all_paths(stage, pods)?;
    let name = stage.in_pod(&pods["edge-b1"], "nslookup -type=a web.default.svc.cluster.local")?.ok()?;
    ensure!(name.contains("10.96."), "{name}");
    dns::outside_name(stage, &pods["edge-b1"])?;
    gateway::serves(stage)
}
