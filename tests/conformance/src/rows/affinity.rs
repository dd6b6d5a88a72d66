//! Session affinity: who keeps an endpoint, for how long, and what ends it.

use std::{
    collections::BTreeSet,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow, ensure};
use serde_json::json;

use crate::{
    callers::From::{self, Pod},
    case::{Case, Row, Service},
};

const ALL: [&str; 4] = ["server-cloud-1", "server-cloud-2", "server-edge-a1", "server-edge-b1"];
/// One client in a network where endpoints are near, one where all but one are far.
const CLIENTS: [&str; 2] = ["client-cloud-2", "client-edge-a1"];
const CALLS: usize = 15;

pub(super) const ROWS: &[Row] = &[
    Row::new("Services should have session affinity work for service with type clusterIP [Conformance]", cluster_ip),
    Row::new("Services should have session affinity work for NodePort service [Conformance]", node_port),
    Row::new(
        "Services should be able to switch session affinity for service with type clusterIP [Conformance]",
        switch_cluster_ip,
    ),
    Row::new("Services should be able to switch session affinity for NodePort service [Conformance]", switch_node_port),
    Row::new("Services should have session affinity timeout work for service with type clusterIP", timeout_cluster_ip),
    Row::new("Services should have session affinity timeout work for NodePort service", timeout_node_port),
    Row::new("Networking Granular Checks: Services should function for client IP based session affinity: http", http),
    Row::new("Networking Granular Checks: Services should function for client IP based session affinity: udp", udp),
];

fn service(case: &Case<'_>, kind: &str, affinity: &str) -> Result<Service> {
    case.service("svc", json!({"type": kind, "sessionAffinity": affinity}))
}

/// The URL of a port as a client calls it: at the cluster address, or at the port of the client's own node.
fn url(case: &Case<'_>, service: &Service, client: &str, port: &str) -> Result<String> {
    if service.object["spec"]["type"] == "NodePort" {
        let node = client.trim_start_matches("client-");
        return Ok(service.node_url(case.field.address(node)?, port));
    }
    Ok(service.url(port))
}

/// Waits until a client's calls all have the same answer; gives it.
pub(super) fn sticks(case: &Case<'_>, from: From<'_>, url: &str) -> Result<String> {
    case.until(&format!("{from:?} keeps its endpoint of {url}"), Duration::from_secs(15), || {
        let answers = case.calls(from, url, CALLS)?.into_iter().collect::<Result<Vec<_>, _>>();
        let answers = answers.map_err(|reason| anyhow!("{reason}"))?;
        let pods: BTreeSet<_> = answers.into_iter().map(|answer| answer.pod).collect();
        ensure!(pods.len() == 1, "{pods:?} answered");
        pods.into_iter().next().ok_or_else(|| anyhow!("nobody answered"))
    })
}

fn all_stick(case: &Case<'_>, service: &Service, ports: &[&str]) -> Result<()> {
    for client in CLIENTS {
        for port in ports {
            let url = url(case, service, client, port)?;
            let first = sticks(case, Pod(client), &url)?;
            ensure!(first == sticks(case, Pod(client), &url)?, "{client} got another endpoint");
        }
    }
    Ok(())
}

fn cluster_ip(case: &Case<'_>) -> Result<()> {
    all_stick(case, &service(case, "ClusterIP", "ClientIP")?, &["http"])
}

fn node_port(case: &Case<'_>) -> Result<()> {
    all_stick(case, &service(case, "NodePort", "ClientIP")?, &["http"])
}

fn switches(case: &Case<'_>, kind: &str) -> Result<()> {
    let without = service(case, kind, "None")?;
    for client in CLIENTS {
        case.reaches(Pod(client), &url(case, &without, client, "http")?, &ALL)?;
    }
    all_stick(case, &service(case, kind, "ClientIP")?, &["http"])?;
    let without = service(case, kind, "None")?;
    for client in CLIENTS {
        case.reaches(Pod(client), &url(case, &without, client, "http")?, &ALL)?;
    }
    Ok(())
}

fn switch_cluster_ip(case: &Case<'_>) -> Result<()> {
    switches(case, "ClusterIP")
}

fn switch_node_port(case: &Case<'_>) -> Result<()> {
    switches(case, "NodePort")
}

/// An endpoint is kept while calls come, and chosen anew when none came for the time: with four to choose from, another one is
/// hit sooner or later.
fn times_out(case: &Case<'_>, kind: &str) -> Result<()> {
    let seconds = 2;
    let config = json!({"clientIP": {"timeoutSeconds": seconds}});
    let service =
        case.service("svc", json!({"type": kind, "sessionAffinity": "ClientIP", "sessionAffinityConfig": config}))?;
    let client = CLIENTS[0];
    let url = url(case, &service, client, "http")?;
    let mut before = sticks(case, Pod(client), &url)?;
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(60) {
        // The condition is that time has passed: there is nothing else to wait for.
        thread::sleep(Duration::from_millis(seconds * 1000 + 200));
        let now = sticks(case, Pod(client), &url)?;
        if now != before {
            return Ok(());
        }
        before = now;
    }
    Err(anyhow!("after each of many pauses {before} answered"))
}

fn timeout_cluster_ip(case: &Case<'_>) -> Result<()> {
    times_out(case, "ClusterIP")
}

fn timeout_node_port(case: &Case<'_>) -> Result<()> {
    times_out(case, "NodePort")
}

fn http(case: &Case<'_>) -> Result<()> {
    all_stick(case, &service(case, "ClusterIP", "ClientIP")?, &["http", "tcp"])
}

fn udp(case: &Case<'_>) -> Result<()> {
    all_stick(case, &service(case, "ClusterIP", "ClientIP")?, &["udp"])
}
