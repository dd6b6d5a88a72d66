//! What must be refused, and how; and that nothing falls over on the way.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::applications::{self, NODES};
use crate::Stage;

const NO_PORTS: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: broken}\nspec: {selector: {app: web}}\n";
const UNKNOWN_VOLUME: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: broken}
spec:
  containers:
    - {name: server, image: "edgemesh.dev/demo:1", volumeMounts: [{name: nowhere, mountPath: /data}]}
"#;
const TOO_LARGE: usize = 50 << 20;

pub(super) fn run(stage: &Stage) -> Result<()> {
    applications::ensure_all(stage)?;
    let before = processes(stage)?;
    says(&stage.kubectl_with("create -f -", NO_PORTS)?.failed()?, &["spec.ports", "Required value"])?;
    says(
        &stage.kubectl_with("create -f -", UNKNOWN_VOLUME)?.failed()?,
        &["spec.containers[0].volumeMounts[0].name", "nowhere"],
    )?;
    tokens(stage)?;
    large_object(stage)?;
    garbage(stage)?;
    let after = processes(stage)?;
    ensure!(before == after, "daemons before: {before:?}, after: {after:?}");
    stage.say("    every daemon is still the same process, and the mesh works:");
    let pods = applications::pods_by_node(stage, "web")?;
    let by = applications::call(stage, &pods["edge-a1"], "http://only-b1/")?;
    ensure!(by == "edge-b1", "{by} answered");
    Ok(())
}

fn says(text: &str, parts: &[&str]) -> Result<()> {
    let missing: Vec<_> = parts.iter().filter(|part| !text.contains(**part)).collect();
    ensure!(missing.is_empty(), "{text:?} doesn't say {missing:?}");
    Ok(())
}

/// The process of each daemon in the lab.
fn processes(stage: &Stage) -> Result<BTreeMap<String, Value>> {
    let status: Value = serde_json::from_str(&stage.unseen().lab(&["status", "--json"])?.ok()?)?;
    let mut all = BTreeMap::new();
    for host in status["hosts"].as_array().context("a lab has hosts")? {
        for (name, daemon) in host["daemons"].as_object().into_iter().flatten() {
            ensure!(daemon["ready"] == true, "{name} of {} isn't ready", host["name"]);
            all.insert(format!("{}/{name}", host["name"].as_str().unwrap_or_default()), daemon["pid"].clone());
        }
    }
    Ok(all)
}

fn tokens(stage: &Stage) -> Result<()> {
    let edgecore = stage.program("edgecore");
    let status: Value = serde_json::from_str(&stage.unseen().lab(&["status", "--json"])?.ok()?)?;
    let config = format!("{}/hub/hub.yaml", status["folder"].as_str().context("a lab has a folder")?);
    let hub = stage.program("hub");
    let join = |token: &str, node: &str, folder: &str| {
        let set = format!("dataDir={folder}");
        stage.lab(&[
            "node",
            "client",
            "--",
            &edgecore,
            "join",
            "--hub",
            "https://203.0.113.10:10443",
            "--token",
            token,
            "--node",
            node,
            "--set",
            &set,
        ])
    };
    let token = stage
        .unseen()
        .lab(&["node", "hub", "--", &hub, "token", "create", "--node", "spare", "--config", &config])?
        .ok()?;
    let token = token.lines().next().context("a token")?.trim();
    let parts: Vec<_> = token.split('.').collect();
    let wrong = format!("{}.{}.{}", parts[0], "0".repeat(parts[1].len()), parts[2..].join("."));
    says(&join(&wrong, "spare", "/tmp/lab-spare-1")?.failed()?, &["token"])?;
    says(&join(token, "other", "/tmp/lab-spare-2")?.failed()?, &["token", "other"])?;
    join(token, "spare", "/tmp/lab-spare-3")?.ok()?;
    says(&join(token, "spare", "/tmp/lab-spare-4")?.failed()?, &["token"])?;
    stage.unseen().lab(&["node", "client", "--", "sh", "-c", "rm -rf /tmp/lab-spare-*"])?.ok()?;
    Ok(())
}

fn large_object(stage: &Stage) -> Result<()> {
    let object = format!(
        "{{\"apiVersion\":\"v1\",\"kind\":\"ConfigMap\",\"metadata\":{{\"name\":\"huge\"}},\"data\":{{\"x\":\"{}\"}}}}",
        "x".repeat(TOO_LARGE)
    );
    let text = stage.kubectl_with("create --validate=false -f -", &object)?.failed()?;
    says(&text.to_lowercase(), &["too large"])
}

/// Sends random bytes to every TCP and UDP port that any host of the lab listens on.
fn garbage(stage: &Stage) -> Result<()> {
    let script = r#"
        count=0
        for kind in t u; do
            for socket in $(ss -Hnl$kind | awk '{print $4}' | sort -u); do
                port=${socket##*:}; address=${socket%:*}; address=${address%%%*}; address=${address#[}; address=${address%]}
                case $address in 0.0.0.0|'*'|::) address=127.0.0.1;; *:*) continue;; esac
                flag=; [ $kind = u ] && flag=-u
                for size in 1 300 70000; do
                    if [ $kind = u ] && [ $size -gt 60000 ]; then continue; fi
                    head -c $size /dev/urandom | timeout 2 busybox nc $flag -w 1 $address $port >/dev/null 2>&1 &
                done
                count=$((count + 1))
            done
        done
        wait
        echo "$count ports"
    "#;
    for host in NODES.iter().chain(&["hub"]) {
        let text = stage.unseen().lab(&["node", host, "--", "sh", "-c", script])?.ok()?;
        stage.say(&format!("    {host}: garbage sent to {}", text.trim()));
        let ports: usize = text.split_whitespace().next().context("a count")?.parse()?;
        ensure!(ports >= 2, "{host} listens on {ports} ports only");
    }
    Ok(())
}
