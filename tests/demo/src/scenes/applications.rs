//! The example applications that scenes play with: bringing them up, finding their pods, calling their Services.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::Value;

use crate::Stage;

/// The nodes of the demo's lab.
pub(super) const NODES: [&str; 4] = ["cloud-1", "edge-a1", "edge-a2", "edge-b1"];
const END_OF_ANSWER: &str = "--end-of-answer--";
/// How long a pod may take from `kubectl apply` to Running.
pub(super) const RUNNING_DEADLINE: Duration = Duration::from_secs(15);
/// How long a change may take to reach a node's datapath.
pub(super) const PROPAGATION_DEADLINE: Duration = Duration::from_secs(5);

/// Applies an example and waits until its pods run.
pub(super) fn apply(stage: &Stage, file: &str, deployments: &[&str]) -> Result<()> {
    stage.kubectl(&format!("apply -f examples/{file}"))?.ok()?;
    stage.until("all its pods are Ready", RUNNING_DEADLINE, |stage| {
        deployments.iter().try_for_each(|name| all_available(&stage.json(&format!("deployment {name}"))?))
    })
}

/// The applications of all scenes but the first are up.
pub(super) fn ensure_all(stage: &Stage) -> Result<()> {
    let unseen = stage.unseen();
    apply(&unseen, "web.yaml", &["web"])?;
    apply(&unseen, "sites.yaml", &["only-a2", "only-b1"])
}

fn all_available(deployment: &Value) -> Result<()> {
    let wanted = &deployment["spec"]["replicas"];
    let name = &deployment["metadata"]["name"];
    let status = &deployment["status"];
    let current = status["observedGeneration"] == deployment["metadata"]["generation"];
    ensure!(
        current && status["availableReplicas"] == *wanted && status["updatedReplicas"] == *wanted,
        "{name}: {status}"
    );
    Ok(())
}

/// Names of the running pods of an application, by node.
pub(super) fn pods_by_node(stage: &Stage, app: &str) -> Result<BTreeMap<String, String>> {
    let list = stage.json(&format!("pods -l app={app}"))?;
    let mut pods = BTreeMap::new();
    for pod in list["items"].as_array().context("a list has items")? {
        if pod["metadata"]["deletionTimestamp"].is_null() && pod["status"]["phase"] == "Running" {
            let text = |value: &Value| value.as_str().map(str::to_owned).context("a running pod has a name and a node");
            pods.insert(text(&pod["spec"]["nodeName"])?, text(&pod["metadata"]["name"])?);
        }
    }
    Ok(pods)
}

/// Which node answered: `POD NODE`, or the demo server's JSON.
fn node_of(answer: &str) -> Result<String> {
    if let Some(line) = answer.lines().find(|line| line.starts_with('{')) {
        let answer: Value = serde_json::from_str(line)?;
        return answer["node"].as_str().map(str::to_owned).context("an answer names its node");
    }
    let first = answer.lines().next().unwrap_or_default();
    first.split(' ').nth(1).map(str::to_owned).ok_or_else(|| anyhow!("no answer of the application: {answer:?}"))
}

/// Calls a URL (`http://`, `tcp://` or `udp://`) from a pod; gives the node that answered.
pub(super) fn call(stage: &Stage, pod: &str, url: &str) -> Result<String> {
    node_of(&stage.in_pod(pod, &format!("call {url}"))?.ok()?)
}

/// Calls several URLs from a pod; gives the nodes that answered. Where nobody watches, the pod is entered only once.
pub(super) fn call_all(stage: &Stage, pod: &str, urls: &[String]) -> Result<Vec<String>> {
    if stage.is_shown() {
        return urls.iter().map(|url| call(stage, pod, url)).collect();
    }
    let lines: Vec<_> = urls.iter().map(|url| format!("call {url} && echo {END_OF_ANSWER}")).collect();
    let text = stage.in_pod(pod, &lines.join(" && "))?.ok()?;
    text.split_terminator(&format!("{END_OF_ANSWER}\n")).map(|answer| node_of(answer.trim_start())).collect()
}

/// Connections that a node's agent carried to other networks since it started.
pub(super) fn tunnelled(stage: &Stage, node: &str) -> Result<u64> {
    let metrics = stage.get_on(node, "http://127.0.0.1:9442/metrics")?;
    let lines = metrics.lines().filter(|line| {
        line.starts_with("edgemesh_agent_proxied_connections_total") && !line.contains("path=\"direct\"")
    });
    Ok(lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).map(|count| count as u64).sum())
}

/// Waits until a node's metaserver and the cluster's API agree on the objects of a resource; `path` is like `/api/v1/services`.
pub(super) fn differences(
    stage: &Stage,
    node: &str,
    path: &str,
    wanted: &dyn Fn(&Value) -> bool,
) -> Result<Vec<String>> {
    let cluster = stage.unseen().kubectl(&format!("get --raw {path}"))?.ok()?;
    let local = stage.get_on(node, &format!("http://127.0.0.1:10550{path}"))?;
    let index = |text: &str| -> Result<BTreeMap<String, Value>> {
        let list: Value = serde_json::from_str(text)?;
        let items = list["items"].as_array().context("a list has items")?;
        let wanted = items.iter().filter(|item| wanted(item));
        Ok(wanted
            .map(|item| {
                let mut item = item.clone();
                // Versions are each store's own.
                if let Some(metadata) = item["metadata"].as_object_mut() {
                    metadata.remove("resourceVersion");
                    metadata.remove("managedFields");
                }
                let metadata = &item["metadata"];
                (
                    format!(
                        "{}/{}",
                        metadata["namespace"].as_str().unwrap_or(""),
                        metadata["name"].as_str().unwrap_or("")
                    ),
                    item,
                )
            })
            .collect())
    };
    let (cluster, local) = (index(&cluster)?, index(&local)?);
    let names: std::collections::BTreeSet<_> = cluster.keys().chain(local.keys()).collect();
    Ok(names
        .into_iter()
        .filter(|name| cluster.get(*name) != local.get(*name))
        .map(|name| {
            format!(
                "{path} {name}: cluster {:?}, {node} {:?}",
                cluster.get(name).map(Value::to_string),
                local.get(name).map(Value::to_string)
            )
        })
        .collect())
}

/// The name of an application's pod on a node, as that node's own API says: it works with no cloud.
pub(super) fn local_pod(stage: &Stage, node: &str, app: &str) -> Result<String> {
    let url = format!("http://127.0.0.1:10550/api/v1/namespaces/default/pods?labelSelector=app%3D{app}");
    let list: Value = serde_json::from_str(&stage.get_on(node, &url)?)?;
    let name = list["items"][0]["metadata"]["name"].as_str();
    name.map(str::to_owned).with_context(|| format!("{node} has no pod of {app}"))
}
