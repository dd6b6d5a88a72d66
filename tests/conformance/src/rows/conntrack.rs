//! UDP flows whose server goes: the next datagrams of the same client and port must reach another one.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::traffic_policy::balanced;
use crate::{
    callers::{
        From::{self, Outside, Pod},
        Stream,
    },
    case::{Case, Row, Service},
    manifests,
};

/// The port from which the client sends, as upstream's does.
const PORT: &str = "12345";
/// Upstream gives a minute.
const MOVED: Duration = Duration::from_secs(60);

pub(super) const ROWS: &[Row] = &[
    Row::new(
        "Conntrack should be able to preserve UDP traffic when server pod cycles for a ClusterIP service",
        cluster_ip,
    ),
    Row::new(
        "Conntrack should be able to preserve UDP traffic when server pod cycles for a ClusterIP service (one connected socket)",
        kept_socket,
    ),
    Row::new(
        "Conntrack should be able to preserve UDP traffic when server pod cycles for a ClusterIP service (through the tunnel)",
        tunnel,
    ),
    Row::new(
        "Conntrack should be able to preserve UDP traffic when server pod cycles for a NodePort service",
        node_port,
    ),
    Row::new(
        "LoadBalancers should be able to preserve UDP traffic when server pod cycles for a LoadBalancer service on different nodes",
        |case| load_balancer(case, "cloud-2", "198.18.0.6", "12348"),
    ),
    Row::new(
        "LoadBalancers should be able to preserve UDP traffic when server pod cycles for a LoadBalancer service on the same nodes",
        |case| load_balancer(case, "cloud-1", "198.18.0.7", "12350"),
    ),
    Row::new(
        "Conntrack should be able to preserve UDP traffic when initial unready endpoints get ready",
        unready_first,
    ),
];

/// Waits until the newest answer is the pod's.
fn answered_by(case: &Case<'_>, stream: &Stream, pod: &str) -> Result<()> {
    case.until(&format!("{pod} answers the stream"), MOVED, || {
        let outcomes = stream.outcomes();
        let last = outcomes.last().context("no outcome yet")?;
        ensure!(last.as_ref().is_ok_and(|answer| answer.pod == pod), "{last:?}, of {}", outcomes.len());
        Ok(())
    })
}

/// Calls through a Service from one port go on while its only pod is replaced by another.
struct Flow<'a> {
    kind: &'a str,
    servers: [&'a str; 2],
    client: From<'a>,
    url: &'a dyn Fn(&Service) -> Result<String>,
    options: &'a [&'a str],
}

fn cycles(case: &Case<'_>, flow: &Flow<'_>) -> Result<()> {
    let (one, two) = (case.name("one"), case.name("two"));
    let service = case.service("svc", json!({"type": flow.kind, "selector": {"case": case.id}}))?;
    let url = (flow.url)(&service)?;
    case.pod(manifests::pod(&one, flow.servers[0], &[("case", &case.id)], &[]))?;
    let options = [&["--every", "100", "--timeout", "1000", "--from"], flow.options].concat();
    let stream = case.stream(flow.client, &options, &url)?;
    answered_by(case, &stream, &one)?;
    case.pod(manifests::pod(&two, flow.servers[1], &[("case", &case.id)], &[]))?;
    case.delete(&format!("pod {one} --grace-period=0 --force"))?;
    answered_by(case, &stream, &two)
}

fn at_cluster_ip(case: &Case<'_>, node: &str, client: &str, options: &[&str]) -> Result<()> {
    let url = &|service: &Service| Ok(service.url("udp"));
    cycles(case, &Flow { kind: "ClusterIP", servers: [node; 2], client: Pod(client), url, options })
}

fn cluster_ip(case: &Case<'_>) -> Result<()> {
    at_cluster_ip(case, "cloud-1", "client-cloud-2", &[PORT])
}

/// The socket stays with the first pod unless the mesh ends it, or has its datagrams go elsewhere.
fn kept_socket(case: &Case<'_>) -> Result<()> {
    at_cluster_ip(case, "cloud-1", "client-cloud-2", &["12346", "--keep"])
}

fn tunnel(case: &Case<'_>) -> Result<()> {
    at_cluster_ip(case, "edge-b1", "client-edge-a1", &[PORT, "--keep"])
}

/// A pod of one node calls another node, which remembers the flow for it.
fn node_port(case: &Case<'_>) -> Result<()> {
    let url = &|service: &Service| Ok(service.node_url(case.field.address("cloud-1")?, "udp"));
    let client = Pod("client-cloud-2");
    cycles(case, &Flow { kind: "NodePort", servers: ["cloud-1"; 2], client, url, options: &["12347", "--keep"] })
}

/// A client outside of the cluster calls through the load balancer's node, cloud-1.
fn load_balancer(case: &Case<'_>, second: &str, address: &str, from: &str) -> Result<()> {
    let url = &|service: &Service| {
        balanced(case, service, address, "cloud-1")?;
        Ok(service.url_at(address, "udp"))
    };
    let servers = ["cloud-1", second];
    cycles(case, &Flow { kind: "LoadBalancer", servers, client: Outside, url, options: &[from, "--keep"] })
}

/// The client sends before there is anybody to answer.
fn unready_first(case: &Case<'_>) -> Result<()> {
    let pod = case.name("pod");
    let service = case.service("svc", json!({"selector": {"case": case.id}}))?;
    let options = ["--every", "100", "--timeout", "1000", "--from", "12349"];
    let stream = case.stream(Pod("client-cloud-2"), &options, &service.url("udp"))?;
    case.until("the client has sent", Duration::from_secs(10), || {
        ensure!(!stream.outcomes().is_empty(), "not yet");
        Ok(())
    })?;
    case.pod(manifests::pod(&pod, "cloud-1", &[("case", &case.id)], &[]))?;
    answered_by(case, &stream, &pod)
}
