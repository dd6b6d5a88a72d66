//! Zones: topology hints and traffic distribution. cloud-1 and cloud-2 are in one zone, edge-a1 and edge-b1 each in their own.

use anyhow::Result;
use serde_json::{Value, json};

use crate::{
    callers::From::Pod,
    case::{Case, Row, Service},
    field::NODES,
    manifests,
};

const ALL: [&str; 4] = ["server-cloud-1", "server-cloud-2", "server-edge-a1", "server-edge-b1"];

pub(super) const ROWS: &[Row] = &[
    Row::new("Topology Hints should distribute endpoints evenly (slices with hints are followed)", hints),
    Row::new(
        "Traffic Distribution when Service has trafficDistribution=PreferClose should route traffic to an endpoint that is close to the client",
        prefer_close,
    ),
    Row::new(
        "Traffic Distribution when Service has trafficDistribution=PreferClose should route traffic correctly between pods on multiple nodes per zone",
        prefer_close_some,
    ),
    Row::new(
        "Traffic Distribution should route traffic to an endpoint in the same zone when using PreferSameZone",
        prefer_same_zone,
    ),
    Row::new(
        "Traffic Distribution should route traffic correctly between pods on multiple nodes per zone when using PreferSameZone",
        prefer_same_zone_some,
    ),
    Row::new(
        "Traffic Distribution should route traffic to an endpoint on the same node or fall back to same zone when using PreferSameNode",
        prefer_same_node,
    ),
    Row::new(
        "Traffic Distribution should route traffic to an endpoint on the same node when using PreferSameNode and fall back when the endpoint becomes unavailable",
        prefer_same_node_falls_back,
    ),
];

fn hints(case: &Case<'_>) -> Result<()> {
    let service = case.service("svc", json!({"selector": null}))?;
    let slice = |zone_of: &dyn Fn(&str) -> Option<&'static str>| -> Result<()> {
        let mut endpoints = Vec::new();
        for node in NODES {
            let mut endpoint = manifests::endpoint(case.field.pod_ip(&format!("server-{node}"))?, node, true);
            if let Some(zone) = zone_of(node) {
                endpoint["hints"] = json!({"forZones": [{"name": zone}]});
            }
            endpoints.push(endpoint);
        }
        let slice = manifests::slice(&case.name("slice"), &service.name, manifests::slice_ports(), endpoints);
        case.field.apply(&[slice]).map(drop)
    };
    slice(&|node| {
        Some(match node {
            "edge-a1" => "zone-a",
            "edge-b1" => "zone-b",
            _ => "zone-c",
        })
    })?;
    case.reaches(Pod("client-edge-a1"), &service.url("http"), &["server-edge-a1"])?;
    case.reaches(Pod("client-edge-b1"), &service.url("http"), &["server-edge-b1"])?;
    case.reaches(Pod("client-cloud-2"), &service.url("http"), &["server-cloud-1", "server-cloud-2"])?;
    // A zone may be given endpoints of another one.
    slice(&|node| Some(if node == "edge-b1" { "zone-a" } else { "zone-c" }))?;
    case.reaches(Pod("client-edge-a1"), &service.url("http"), &["server-edge-b1"])?;
    // Hints that are not complete, or not for this zone, are not followed.
    case.reaches(Pod("client-edge-b1"), &service.url("http"), &ALL)?;
    slice(&|node| (node == "edge-a1").then_some("zone-a"))?;
    case.reaches(Pod("client-edge-a1"), &service.url("http"), &ALL)
}

fn distributed(case: &Case<'_>, of: &str, distribution: &str, selector: Value) -> Result<Service> {
    case.service(of, json!({"trafficDistribution": distribution, "selector": selector}))
}

/// With an endpoint on every node each zone has its own; one without reaches all.
fn zones_keep_to_themselves(case: &Case<'_>, distribution: &str) -> Result<()> {
    let service = distributed(case, "all", distribution, json!({"app": "server"}))?;
    case.reaches(Pod("client-edge-a1"), &service.url("http"), &["server-edge-a1"])?;
    case.reaches(Pod("client-edge-b1"), &service.url("http"), &["server-edge-b1"])?;
    for client in ["client-cloud-1", "client-cloud-2"] {
        case.reaches(Pod(client), &service.url("http"), &["server-cloud-1", "server-cloud-2"])?;
        case.reaches(Pod(client), &service.url("udp"), &["server-cloud-1", "server-cloud-2"])?;
    }
    Ok(())
}

/// Endpoints on some nodes only: a node without one uses its zone's, a zone without any uses all.
fn some_nodes(case: &Case<'_>, distribution: &str) -> Result<()> {
    let one = case.name("one");
    let two = case.name("two");
    let service = distributed(case, "some", distribution, json!({"case": case.id}))?;
    case.field.apply(&[
        manifests::pod(&one, "cloud-1", &[("case", &case.id)], &[]),
        manifests::pod(&two, "edge-b1", &[("case", &case.id)], &[]),
    ])?;
    case.running(&one)?;
    case.running(&two)?;
    for client in ["client-cloud-1", "client-cloud-2"] {
        case.reaches(Pod(client), &service.url("http"), &[&one])?;
    }
    case.reaches(Pod("client-edge-b1"), &service.url("http"), &[&two])?;
    case.reaches(Pod("client-edge-a1"), &service.url("http"), &[&one, &two])
}

fn prefer_close(case: &Case<'_>) -> Result<()> {
    zones_keep_to_themselves(case, "PreferClose")
}

fn prefer_close_some(case: &Case<'_>) -> Result<()> {
    some_nodes(case, "PreferClose")
}

fn prefer_same_zone(case: &Case<'_>) -> Result<()> {
    zones_keep_to_themselves(case, "PreferSameZone")
}

fn prefer_same_zone_some(case: &Case<'_>) -> Result<()> {
    some_nodes(case, "PreferSameZone")
}

fn prefer_same_node(case: &Case<'_>) -> Result<()> {
    let service = distributed(case, "all", "PreferSameNode", json!({"app": "server"}))?;
    for node in NODES {
        case.reaches(Pod(&format!("client-{node}")), &service.url("http"), &[&format!("server-{node}")])?;
    }
    let one = distributed(case, "one", "PreferSameNode", json!({"app": "server", "node": "cloud-1"}))?;
    case.reaches(Pod("client-cloud-2"), &one.url("http"), &["server-cloud-1"])?;
    case.reaches(Pod("client-edge-a1"), &one.url("http"), &["server-cloud-1"])
}

fn prefer_same_node_falls_back(case: &Case<'_>) -> Result<()> {
    let (here, near) = (case.name("here"), case.name("near"));
    let service = distributed(case, "svc", "PreferSameNode", json!({"case": case.id}))?;
    case.field.apply(&[
        manifests::pod(&here, "cloud-2", &[("case", &case.id)], &[]),
        manifests::pod(&near, "cloud-1", &[("case", &case.id)], &[]),
    ])?;
    case.running(&here)?;
    case.running(&near)?;
    case.reaches(Pod("client-cloud-2"), &service.url("http"), &[&here])?;
    case.delete(&format!("pod {here}"))?;
    case.reaches(Pod("client-cloud-2"), &service.url("http"), &[&near])?;
    case.gone_pod(&here)?;
    case.pod(manifests::pod(&here, "cloud-2", &[("case", &case.id)], &[]))?;
    case.reaches(Pod("client-cloud-2"), &service.url("http"), &[&here])
}
