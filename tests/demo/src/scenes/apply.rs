//! From `kubectl apply` to running containers, and back.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};

use super::applications::{self, NODES, RUNNING_DEADLINE};
use crate::Stage;

const CONTAINERD: &str = "/run/containerd/containerd.sock";

pub(super) fn run(stage: &Stage) -> Result<()> {
    applications::apply(stage, "web.yaml", &["web"])?;
    stage.kubectl("get nodes,pods,svc,endpointslices -o wide")?.ok()?;
    let pods = applications::pods_by_node(stage, "web")?;
    ensure!(pods.keys().map(String::as_str).eq(NODES), "a pod on each node is expected, there are {pods:?}");
    everything_shown_is_true(stage)?;

    stage.say("   The containers are really there, and go with their Deployment:");
    let before = containers(stage, "web")?;
    ensure!(before.len() == NODES.len(), "4 containers are expected: {before:?}");
    stage.kubectl("delete deployment web")?.ok()?;
    stage.until("no container and no pod is left", RUNNING_DEADLINE, |stage| {
        let left = containers(stage, "web")?;
        ensure!(left.is_empty(), "containers {left:?}");
        let pods = stage.json("pods -l app=web")?;
        ensure!(pods["items"].as_array().is_some_and(Vec::is_empty), "pods {pods}");
        Ok(())
    })?;
    applications::apply(stage, "web.yaml", &["web"])?;
    stage.kubectl("rollout status deployment web --timeout=15s")?.ok()?;
    Ok(())
}

/// What the API says of pods, their addresses and endpoints is what the nodes have.
fn everything_shown_is_true(stage: &Stage) -> Result<()> {
    let pods = stage.json("pods -l app=web")?;
    let mut addresses = BTreeSet::new();
    for pod in pods["items"].as_array().into_iter().flatten() {
        let (name, node) = (&pod["metadata"]["name"], pod["spec"]["nodeName"].as_str().unwrap_or_default());
        let (Some(name), Some(address)) = (name.as_str(), pod["status"]["podIP"].as_str()) else {
            anyhow::bail!("pod {name} has no address: {}", pod["status"]);
        };
        let own = stage.unseen().in_pod(name, "ip -4 addr show eth0")?.ok()?;
        ensure!(own.contains(&format!("inet {address}/")), "{name} on {node} says {own}");
        addresses.insert(address.to_owned());
    }
    stage.until("the EndpointSlices list the pods", RUNNING_DEADLINE, |stage| {
        let slices = stage.json("endpointslices -l kubernetes.io/service-name=web")?;
        let endpoints = slices["items"]
            .as_array()
            .into_iter()
            .flatten()
            .flat_map(|s| s["endpoints"].as_array().into_iter().flatten());
        let ready = endpoints.filter(|endpoint| endpoint["conditions"]["ready"] == true);
        let listed: BTreeSet<_> = ready.filter_map(|e| e["addresses"][0].as_str().map(str::to_owned)).collect();
        ensure!(listed == addresses, "pods have {addresses:?}, slices {listed:?}");
        Ok(())
    })
}

/// The application's containers that the nodes' runtimes have, whatever the API says.
fn containers(stage: &Stage, app: &str) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for node in NODES {
        let filter = format!("labels.\"io.cri-containerd.kind\"==container,labels.\"io.kubernetes.pod.name\"~=^{app}-");
        let words = ["node", node, "--", "ctr", "-a", CONTAINERD, "-n", "k8s.io", "containers", "list", "-q", &filter];
        let list = stage.unseen().lab(&words)?.ok()?;
        found.extend(list.lines().map(|id| format!("{node}/{id}")));
    }
    Ok(found)
}
