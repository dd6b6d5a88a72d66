//! A hub that keeps dying while the cluster changes: nothing acknowledged is lost, nothing is left behind.

use std::{fmt::Write, thread, time::Duration};

use anyhow::{Result, ensure};

use super::applications::{self, NODES};
use crate::Stage;

const OBJECTS: usize = 200;
const RESTARTS: usize = 20;
const CONVERGED_DEADLINE: Duration = Duration::from_secs(20);

pub(super) fn run(stage: &Stage) -> Result<()> {
    let unseen = stage.unseen();
    unseen.kubectl("create namespace storm")?.ok()?;
    let result = storm(stage, &unseen);
    unseen.lab(&["start", "hub"])?.ok()?;
    unseen.until("the hub is back", CONVERGED_DEADLINE, |stage| stage.kubectl("get --raw /readyz")?.ok().map(drop))?;
    unseen.kubectl("delete namespace storm --wait=false")?.ok()?;
    result
}

fn services(round: usize) -> Result<String> {
    let mut text = String::new();
    for number in 0..OBJECTS {
        writeln!(
            text,
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: s{number}, namespace: storm, labels: {{round: \"{round}\"}}}}"
        )?;
        writeln!(text, "spec: {{selector: {{app: none}}, ports: [{{port: {}}}]}}", 1000 + round)?;
    }
    Ok(text)
}

fn storm(stage: &Stage, unseen: &Stage) -> Result<()> {
    unseen.kubectl_with("create -f -", &services(0)?)?.ok()?;
    stage.say(&format!(
        "    {OBJECTS} Services are created; {RESTARTS} times they change while the hub is killed and started"
    ));
    for round in 1..=RESTARTS {
        thread::scope(|scope| -> Result<()> {
            // The hub dies under these: some are taken, some are not.
            let change =
                scope.spawn(|| unseen.kubectl(&format!("label services -n storm --all --overwrite round={round}")));
            let delete = format!("delete service -n storm s{round} --ignore-not-found --wait=false");
            unseen.kubectl(&delete)?;
            unseen.lab(&["kill", "hub"])?.ok()?;
            unseen.lab(&["start", "hub"])?.ok()?;
            drop(change.join());
            unseen.until("the hub answers", CONVERGED_DEADLINE, |stage| {
                stage.kubectl("get --raw /readyz")?.ok().map(drop)
            })
        })?;
    }
    let count = stage.json("services -n storm")?["items"].as_array().map_or(0, Vec::len);
    ensure!((OBJECTS - RESTARTS..OBJECTS).contains(&count), "{count} Services are left of {OBJECTS}");
    stage.say(&format!("    {count} Services are left; now each node's store is compared with the API"));
    stage.until("all stores equal the API", CONVERGED_DEADLINE, |stage| {
        for node in NODES {
            for path in ["/api/v1/services", "/apis/discovery.k8s.io/v1/endpointslices", "/api/v1/namespaces"] {
                let differences = applications::differences(stage, node, path, &|_| true)?;
                ensure!(differences.is_empty(), "{} differences, the first: {}", differences.len(), differences[0]);
            }
            let own = |pod: &serde_json::Value| pod["spec"]["nodeName"] == node;
            let differences = applications::differences(stage, node, "/api/v1/pods", &own)?;
            ensure!(differences.is_empty(), "{} differences, the first: {}", differences.len(), differences[0]);
        }
        Ok(())
    })
}
