//! UDP flows whose server goes: the next datagrams of the same client and port must reach another one.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::{
    callers::{From, Stream},
    case::{Case, Row},
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
        load_balancer,
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

struct Flow<'a> {
    kind: &'a str,
    servers: [&'a str; 2],
    client: &'a str,
    url: fn(&Case<'_>, &crate::case::Service) -> Result<String>,
    keep: bool,
    from: &'a str,
}

fn cycles(case: &Case<'_>, flow: &Flow<'_>) -> Result<()> {
    let (one, two) = (case.name("one"), case.name("two"));
    let service = case.service("svc", json!({"type": flow.kind, "selector": {"case": case.id}}))?;
    let url = (flow.url)(case, &service)?;
    case.pod(manifests::pod(&one, flow.servers[0], &[("case", &case.id)], &[]))?;
    let mut options = vec!["--every", "100", "--timeout", "1000", "--from", flow.from];
    if flow.keep {
        options.push("--keep");
    }
    let stream = case.stream(From::Pod(flow.client), &options, &url)?;
    answered_by(case, &stream, &one)?;
    case.pod(manifests::pod(&two, flow.servers[1], &[("case", &case.id)], &[]))?;
    case.delete(&format!("pod {one} --grace-period=0 --force"))?;
    answered_by(case, &stream, &two)
}

fn at_cluster_ip(_: &Case<'_>, service: &crate::case::Service) -> Result<String> {
    Ok(service.url("udp"))
}

fn cluster_ip(case: &Case<'_>) -> Result<()> {
    let servers = ["cloud-1", "cloud-1"];
    cycles(
        case,
        &Flow { kind: "ClusterIP", servers, client: "client-cloud-2", url: at_cluster_ip, keep: false, from: PORT },
    )
}

fn kept_socket(case: &Case<'_>) -> Result<()> {
    let servers = ["cloud-1", "cloud-1"];
    cycles(
        case,
        &Flow { kind: "ClusterIP", servers, client: "client-cloud-2", url: at_cluster_ip, keep: true, from: "12346" },
    )
}

fn tunnel(case: &Case<'_>) -> Result<()> {
    let servers = ["edge-b1", "edge-b1"];
    cycles(
        case,
        &Flow { kind: "ClusterIP", servers, client: "client-edge-a1", url: at_cluster_ip, keep: true, from: PORT },
    )
}

fn node_port(case: &Case<'_>) -> Result<()> {
    let servers = ["cloud-1", "cloud-2"];
    let url =
        |case: &Case<'_>, service: &crate::case::Service| Ok(service.node_url(case.field.address("cloud-2")?, "udp"));
    cycles(case, &Flow { kind: "NodePort", servers, client: "client-cloud-2", url, keep: false, from: "12347" })
}

fn load_balancer(case: &Case<'_>) -> Result<()> {
    let servers = ["cloud-1", "cloud-2"];
    let url = |case: &Case<'_>, service: &crate::case::Service| {
        let address = "198.18.0.6";
        let ingress = json!({"status": {"loadBalancer": {"ingress": [{"ip": address}]}}});
        case.patch(&format!("service/{} --subresource=status", service.name), &ingress)?;
        Ok(service.url_at(address, "udp"))
    };
    cycles(case, &Flow { kind: "LoadBalancer", servers, client: "client-cloud-2", url, keep: false, from: "12348" })
}

/// The client sends before there is anybody to answer.
fn unready_first(case: &Case<'_>) -> Result<()> {
    let pod = case.name("pod");
    let service = case.service("svc", json!({"selector": {"case": case.id}}))?;
    let options = ["--every", "100", "--timeout", "1000", "--from", "12349"];
    let stream = case.stream(From::Pod("client-cloud-2"), &options, &service.url("udp"))?;
    case.until("the client has sent", Duration::from_secs(10), || {
        ensure!(!stream.outcomes().is_empty(), "not yet");
        Ok(())
    })?;
    case.pod(manifests::pod(&pod, "cloud-1", &[("case", &case.id)], &[]))?;
    answered_by(case, &stream, &pod)
}
