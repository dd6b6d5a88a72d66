//! East-west calls: every node, both names, TCP and UDP; and the path that each takes.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};

use super::applications::{self, NODES};
use crate::Stage;

pub(super) fn run(stage: &Stage) -> Result<()> {
    applications::ensure_all(stage)?;
    all_paths(stage, &applications::pods_by_node(stage, "web")?)
}

/// Every call from every node, with the endpoint that must answer and the path that it must take.
pub(super) fn all_paths(stage: &Stage, pods: &BTreeMap<String, String>) -> Result<()> {
    stage.say("   Each node has an endpoint of web itself, and the nearest is preferred:");
    for (node, pod) in pods {
        // One node's calls are shown; the others are the same.
        let stage = if node == "edge-a1" { stage.clone() } else { stage.unseen() };
        let urls: Vec<_> = ["web", "web.default.svc.cluster.local"].iter().flat_map(|name| urls_of(name)).collect();
        let answered = applications::call_all(&stage, pod, &urls)?;
        ensure!(answered.iter().all(|by| by == node), "{pod} called {urls:?}: {answered:?} answered");
    }
    stage.say("   only-a2 runs at edge-a2 alone, only-b1 at edge-b1 alone:");
    for node in NODES {
        for (service, home) in [("only-a2", "edge-a2"), ("only-b1", "edge-b1")] {
            let same_site = node[..node.len() - 1] == home[..home.len() - 1];
            path_is(stage, node, &pods[node], service, home, same_site)?;
        }
    }
    Ok(())
}

/// The three ports of the example Services.
fn urls_of(name: &str) -> Vec<String> {
    vec![format!("http://{name}/"), format!("tcp://{name}:7000"), format!("udp://{name}:7000")]
}

/// All ways to call a Service reach its only endpoint, through the tunnel or not, as the node's counter says.
fn path_is(stage: &Stage, node: &str, pod: &str, service: &str, home: &str, direct: bool) -> Result<()> {
    let before = applications::tunnelled(stage, node)?;
    let unseen = if node == "edge-a1" { stage.clone() } else { stage.unseen() };
    let mut urls = urls_of(service);
    urls.push(format!("http://{service}.default.svc.cluster.local/"));
    let answered = applications::call_all(&unseen, pod, &urls)?;
    ensure!(answered.iter().all(|by| by == home), "{pod} on {node} called {service}: {answered:?} answered");
    let carried = applications::tunnelled(stage, node)? - before;
    let path = if direct { "directly" } else { "through the tunnel" };
    stage.say(&format!("    {node} → {service}: 4 calls {path} (tunnel counter +{carried})"));
    ensure!(
        carried == if direct { 0 } else { 4 },
        "{carried} of 4 calls from {node} to {service} went through the tunnel"
    );
    Ok(())
}
