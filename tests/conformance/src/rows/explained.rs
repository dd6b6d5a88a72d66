//! What the `edgemesh` command says on a node is what calls do there. No upstream test: the name says what it holds.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use crate::{
    callers::{
        self,
        From::{Node, Pod},
    },
    case::{Case, Row},
};

pub(super) const ROWS: &[Row] =
    &[Row::new("edgemesh trace names the endpoints that a pod's calls reach, and what removed the others", trace)];

fn trace(case: &Case<'_>) -> Result<()> {
    let spec = json!({"trafficDistribution": "PreferSameZone"});
    let service = case.service("svc", spec)?;
    let near = ["server-cloud-1", "server-cloud-2"];
    case.reaches(Pod("client-cloud-2"), &service.url("http"), &near)?;
    let program = case.field.lab.programs.join("edgemesh").display().to_string();
    let name = format!("{}:http", service.name);
    let words = [program.as_str(), "trace", "conformance/client-cloud-2", &name, "-o", "json"];
    let (good, said) = callers::run(case.field, Node("cloud-2"), &words)?;
    ensure!(good, "{said}");
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
    let words = [program.as_str(), "trace", "conformance/client-edge-a1", &service.name];
    let (good, said) = callers::run(case.field, Node("cloud-2"), &words)?;
    ensure!(!good && said.contains("edge-a1"), "the pod of another node: {said}");
    Ok(())
}
