//! What the `edgemesh` command says on a node is what calls do there. No upstream test: the name says what it holds.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::{
    callers::{
        self,
        From::{Node, Pod},
    },
    case::{Case, Row},
};

pub(super) const ROWS: &[Row] = &[
    Row::new("edgemesh services shows what this node would use of each Service", services),
    Row::new("edgemesh resolve shows what a pod is told about a name, step by step", resolve),
    Row::new("edgemesh trace names the endpoints that a pod's calls reach, and what removed the others", trace),
];

/// Runs the command on a node; gives its exit code and what it said.
fn edgemesh(case: &Case<'_>, node: &str, words: &[&str]) -> Result<(Option<i32>, String)> {
    let program = case.field.lab.programs.join("edgemesh").display().to_string();
    callers::run(case.field, Node(node), &[&[program.as_str()], words].concat())
}

fn services(case: &Case<'_>) -> Result<()> {
    let local = json!({"internalTrafficPolicy": "Local", "selector": {"app": "server", "node": "cloud-1"}});
    let service = case.service("svc", local)?;
    case.reaches(Pod("client-cloud-1"), &service.url("http"), &["server-cloud-1"])?;
    case.refused(Pod("client-cloud-2"), &service.url("http"))?;
    for (node, chosen, target) in [("cloud-1", 1, "direct"), ("cloud-2", 0, "refuse")] {
        // Calls are served a moment before the agent says so.
        case.until("the page shows what is served", Duration::from_secs(15), || {
            let (code, said) = edgemesh(case, node, &["services", "-n", "conformance", "-o", "json"])?;
            ensure!(code == Some(0), "{code:?}: {said}");
            let page: Value = serde_json::from_str(&said)?;
            let listed = page["services"].as_array().into_iter().flatten().find(|entry| entry["name"] == service.name);
            let port = listed.map(|entry| &entry["ports"][0]).with_context(|| said.clone())?;
            ensure!(port["endpoints"] == 1 && port["chosen"] == chosen && port["target"] == target, "{node}: {port}");
            Ok(())
        })?;
        let (code, said) = edgemesh(case, node, &["services"])?;
        let name = format!("conformance/{} ", service.name);
        let line = said.lines().find(|line| line.starts_with(&name)).with_context(|| said.clone())?;
        let shows = [service.ip(), "80/TCP http", "1/1", target].iter().all(|part| line.contains(part));
        ensure!(code == Some(0) && shows, "{node}, {code:?}: {line}");
    }
    let (code, said) = edgemesh(case, "cloud-1", &["services", "--agent", "http://127.0.0.1:1"])?;
    ensure!(code == Some(1) && said.contains("127.0.0.1:1"), "without an agent, {code:?}: {said}");
    let (code, said) = edgemesh(case, "cloud-1", &["services", "--no-such-option"])?;
    ensure!(code == Some(64), "{code:?}: {said}");
    Ok(())
}

fn resolve(case: &Case<'_>) -> Result<()> {
    let service = case.service("svc", json!({}))?;
    let pod = "conformance/client-edge-a1";
    let short = format!("{}.conformance", service.name);
    case.until("the name has its address", Duration::from_secs(15), || {
        let (code, said) = edgemesh(case, "edge-a1", &["resolve", &short, "--pod", pod])?;
        let full = format!("{short}.svc.cluster.local.");
        let shows = [pod, full.as_str(), "NOERROR", service.ip()].iter().all(|part| said.contains(part));
        ensure!(code == Some(0) && shows, "{code:?}: {said}");
        Ok(())
    })?;
    let (code, said) = edgemesh(case, "edge-a1", &["resolve", &short, "--pod", pod, "-o", "json"])?;
    let page: Value = serde_json::from_str(&said)?;
    let last = page["steps"].as_array().and_then(|steps| steps.last()).with_context(|| said.clone())?;
    let mut records = last["records"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let has_address = records.any(|record| record.ends_with(service.ip()));
    ensure!(code == Some(0) && page["found"] == true && has_address, "{code:?}: {said}");
    let (code, said) = edgemesh(case, "edge-a1", &["resolve", "nobody.conformance", "--pod", pod, "-o", "json"])?;
    let page: Value = serde_json::from_str(&said)?;
    ensure!(code == Some(1) && page["found"] == false && said.contains("NXDOMAIN"), "{code:?}: {said}");
    let (code, said) = edgemesh(case, "edge-a1", &["resolve", &short, "NONE"])?;
    ensure!(code == Some(64) && said.contains("type"), "{code:?}: {said}");
    Ok(())
}

fn trace(case: &Case<'_>) -> Result<()> {
    let spec = json!({"trafficDistribution": "PreferSameZone"});
    let service = case.service("svc", spec)?;
    let near = ["server-cloud-1", "server-cloud-2"];
    case.reaches(Pod("client-cloud-2"), &service.url("http"), &near)?;
    let name = format!("{}:http", service.name);
    let (code, said) = edgemesh(case, "cloud-2", &["trace", "conformance/client-cloud-2", &name, "-o", "json"])?;
    ensure!(code == Some(0), "{code:?}: {said}");
    let page: Value = serde_json::from_str(&said)?;
    for endpoint in page["ports"][0]["endpoints"].as_array().into_iter().flatten() {
        let pod = endpoint["pod"].as_str().unwrap_or_default().trim_start_matches("conformance/");
        let chosen = near.contains(&pod);
        let removed = if chosen { Value::Null } else { json!("distribution") };
        ensure!(endpoint["chosen"] == chosen && endpoint["removedBy"] == removed, "{endpoint}");
    }
    ensure!(
        page["dns"]["steps"][0]["records"][0].as_str().is_some_and(|record| record.ends_with(service.ip())),
        "{page}"
    );
    let (code, said) = edgemesh(case, "cloud-2", &["trace", "conformance/client-edge-a1", &service.name])?;
    ensure!(code == Some(1) && said.contains("edge-a1"), "the pod of another node, {code:?}: {said}");
    Ok(())
}
