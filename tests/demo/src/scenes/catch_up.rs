//! Changes in the cloud while a site is cut off, and what the site has once the link is back.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::applications::{self, PROPAGATION_DEADLINE, RUNNING_DEADLINE};
use crate::Stage;

const EXTRA: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: extra}
spec:
  selector: {app: only-a2}
  ports: [{port: 81, targetPort: 8080}]
"#;
const DOOMED: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: doomed}
spec:
  nodeName: edge-a1
  containers: [{name: server, image: "edgemesh.dev/demo:1"}]
"#;

pub(super) fn run(stage: &Stage) -> Result<()> {
    applications::ensure_all(stage)?;
    stage.kubectl_with("apply -f -", DOOMED)?.ok()?;
    stage.until("pod doomed runs at edge-a1", RUNNING_DEADLINE, |stage| {
        let pod = stage.json("pod doomed")?;
        ensure!(pod["status"]["phase"] == "Running", "{}", pod["status"]);
        Ok(())
    })?;
    stage.lab(&["cut", "site-a", "internet"])?.ok()?;
    let changed = change(stage);
    stage.lab(&["heal", "all"])?.ok()?;
    changed?;
    let result = converged(stage);
    // The scene ends as it began.
    stage.unseen().kubectl("delete service extra --ignore-not-found")?.ok()?;
    stage.unseen().kubectl("replace -f examples/sites.yaml")?.ok()?;
    result
}

fn change(stage: &Stage) -> Result<()> {
    let port = r#"[{"op":"replace","path":"/spec/ports/0/port","value":8888}]"#;
    stage.lab(&["kubectl", "patch", "service", "only-a2", "--type=json", "-p", port])?.ok()?;
    stage.lab(&["kubectl", "patch", "configmap", "settings", "-p", r#"{"data":{"colour":"green"}}"#])?.ok()?;
    stage.kubectl("delete pod doomed --wait=false")?.ok()?;
    stage.kubectl_with("apply -f -", EXTRA)?.ok()?;
    Ok(())
}

fn converged(stage: &Stage) -> Result<()> {
    let pods = applications::pods_by_node(stage, "web")?;
    let caller = &pods["edge-a1"];
    stage.until("edge-a1 calls the new Service and the changed port", PROPAGATION_DEADLINE, |stage| {
        applications::call(stage, caller, "http://extra:81/")?;
        applications::call(stage, caller, "http://only-a2:8888/")?;
        ensure!(stage.in_pod(caller, "call http://only-a2:80/")?.code != 0, "the old port still answers");
        Ok(())
    })?;
    stage.until("the stores of site a equal the API", PROPAGATION_DEADLINE, |stage| {
        for node in ["edge-a1", "edge-a2"] {
            for path in ["/api/v1/services", "/apis/discovery.k8s.io/v1/endpointslices"] {
                let differences = applications::differences(stage, node, path, &|_| true)?;
                ensure!(differences.is_empty(), "{differences:#?}");
            }
            let own = |pod: &serde_json::Value| pod["spec"]["nodeName"] == node;
            let differences = applications::differences(stage, node, "/api/v1/pods", &own)?;
            ensure!(differences.is_empty(), "{differences:#?}");
        }
        Ok(())
    })?;
    stage.until("the mounted ConfigMap has the new value", Duration::from_secs(10), |stage| {
        let pod = applications::local_pod(stage, "edge-a2", "only-a2")?;
        let colour = stage.in_pod(&pod, "cat /etc/settings/colour")?.ok()?;
        ensure!(colour.trim() == "green", "{colour}");
        Ok(())
    })?;
    stage.until("the deleted pod is gone everywhere", RUNNING_DEADLINE, |stage| {
        ensure!(stage.kubectl("get pod doomed")?.code != 0, "the API still has it");
        ensure!(stage.in_pod("doomed", "true")?.code != 0, "its container still runs");
        Ok(())
    })?;
    stage.kubectl("get pods -o wide")?.ok()?;
    Ok(())
}
