//! Granular checks: who reaches whom over HTTP and UDP, pod by pod and address by address.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use crate::{
    callers::{
        self,
        From::{self, Node, Pod},
    },
    case::{Case, Family, Row, Service},
    field::NODES,
    manifests,
};

const ALL: [&str; 4] = ["server-cloud-1", "server-cloud-2", "server-edge-a1", "server-edge-b1"];

pub(super) const ROWS: &[Row] = &[
    Row::new(
        "Networking Granular Checks: Pods should function for intra-pod communication: http [Conformance] (in a network)",
        |case| pods(case, "http"),
    ),
    Row::new(
        "Networking Granular Checks: Pods should function for intra-pod communication: http [Conformance] (across networks)",
        |case| from_pods_of(case, &["edge-a1"], &["cloud-1", "edge-b1"], "http"),
    ),
    Row::new(
        "Networking Granular Checks: Pods should function for intra-pod communication: udp [Conformance] (in a network)",
        |case| pods(case, "udp"),
    ),
    Row::new(
        "Networking Granular Checks: Pods should function for intra-pod communication: udp [Conformance] (across networks)",
        |case| from_pods_of(case, &["edge-a1"], &["cloud-1", "edge-b1"], "udp"),
    ),
    Row::new(
        "Networking Granular Checks: Pods should function for node-pod communication: http [Conformance] (in a network)",
        |case| node_pod(case, "http"),
    ),
    Row::new(
        "Networking Granular Checks: Pods should function for node-pod communication: http [Conformance] (across networks)",
        |case| from_nodes_of(case, &["edge-a1"], &["cloud-1", "edge-b1"], "http"),
    ),
    Row::new(
        "Networking Granular Checks: Pods should function for node-pod communication: udp [Conformance] (in a network)",
        |case| node_pod(case, "udp"),
    ),
    Row::new(
        "Networking Granular Checks: Pods should function for node-pod communication: udp [Conformance] (across networks)",
        |case| from_nodes_of(case, &["edge-a1"], &["cloud-1", "edge-b1"], "udp"),
    ),
    Row::new("Networking Granular Checks: Services should function for pod-Service: http", |case| {
        from_pods(case, Family::Primary, "http")
    }),
    Row::new("Networking Granular Checks: Services should function for pod-Service: udp", |case| {
        from_pods(case, Family::Primary, "udp")
    }),
    Row::new("Networking Granular Checks: Services should function for node-Service: http", |case| {
        from_nodes(case, Family::Primary, "http")
    }),
    Row::new("Networking Granular Checks: Services should function for node-Service: udp", |case| {
        from_nodes(case, Family::Primary, "udp")
    }),
    Row::new("Networking Granular Checks: Services should function for endpoint-Service: http", |case| {
        from_endpoints(case, Family::Primary, "http")
    }),
    Row::new("Networking Granular Checks: Services should function for endpoint-Service: udp", |case| {
        from_endpoints(case, Family::Primary, "udp")
    }),
    Row::new(
        "Networking Granular Checks: Services should function for multiple endpoint-Services with same selector",
        same_selector,
    ),
    Row::new("Networking Granular Checks: Services should function for service endpoints using hostNetwork", |case| {
        host_network(case, Family::Primary)
    }),
    Row::new("Networking Granular Checks: Services should update endpoints: http", |case| {
        endpoints_change(case, Family::Primary, "http")
    }),
    Row::new("Networking Granular Checks: Services should update endpoints: udp", |case| {
        endpoints_change(case, Family::Primary, "udp")
    }),
    Row::new("Networking Granular Checks: Services should update nodePort: http [Slow]", |case| {
        node_port_goes(case, "http")
    }),
    Row::new("Networking Granular Checks: Services should update nodePort: udp [Slow]", |case| {
        node_port_goes(case, "udp")
    }),
    Row::new("Networking Granular Checks: Services should support basic nodePort: udp functionality", |case| {
        node_ports(case, "udp")
    }),
    Row::new("Networking Granular Checks: Services should be able to handle large requests: http", |case| {
        large_http(case, Family::Primary)
    }),
    Row::new("Networking Granular Checks: Services should be able to handle large requests: udp", |case| {
        large_udp(case, Family::Primary)
    }),
];

/// Every shared server of some nodes at its own address, from every caller of some nodes.
fn every_pod(case: &Case<'_>, callers: &[From<'_>], nodes: &[&str], scheme: &str) -> Result<()> {
    for from in callers {
        for node in nodes {
            let server = format!("server-{node}");
            let port = if scheme == "http" { manifests::HTTP } else { manifests::ECHO };
            let end = if scheme == "http" { "/" } else { "" };
            let url = format!("{scheme}://{}:{port}{end}", case.field.pod_ip(&server)?);
            case.reaches(*from, &url, &[&server])?;
        }
    }
    Ok(())
}

/// Nodes of one network each.
const NETWORKS: [&[&str]; 3] = [&["cloud-1", "cloud-2"], &["edge-a1"], &["edge-b1"]];

fn from_pods_of(case: &Case<'_>, network: &[&str], nodes: &[&str], scheme: &str) -> Result<()> {
    let names: Vec<_> = network.iter().map(|node| format!("client-{node}")).collect();
    let callers: Vec<_> = names.iter().map(|name| Pod(name)).collect();
    every_pod(case, &callers, nodes, scheme)
}

fn from_nodes_of(case: &Case<'_>, network: &[&str], nodes: &[&str], scheme: &str) -> Result<()> {
    let callers: Vec<_> = network.iter().map(|node| Node(node)).collect();
    every_pod(case, &callers, nodes, scheme)
}

fn pods(case: &Case<'_>, scheme: &str) -> Result<()> {
    NETWORKS.iter().try_for_each(|network| from_pods_of(case, network, network, scheme))
}

fn node_pod(case: &Case<'_>, scheme: &str) -> Result<()> {
    NETWORKS.iter().try_for_each(|network| from_nodes_of(case, network, network, scheme))
}

/// A Service that has addresses of a family.
fn service(case: &Case<'_>, family: Family, mut spec: Value) -> Result<Service> {
    if let (Some(fields), Some(further)) = (spec.as_object_mut(), family.spec().as_object()) {
        fields.extend(further.clone());
    }
    case.service("svc", spec)
}

fn url(service: &Service, family: Family, port: &str) -> String {
    service.url_at(service.ip_of(family), port)
}

/// The Service at its cluster address, and at the ports of the caller's node.
fn from_each(case: &Case<'_>, family: Family, port: &str, caller: &dyn Fn(&str) -> (String, bool)) -> Result<()> {
    let service = service(case, family, json!({"type": "NodePort"}))?;
    for node in NODES {
        let (name, on_node) = caller(node);
        let from = if on_node { Node(&name) } else { Pod(&name) };
        case.reaches(from, &url(&service, family, port), &ALL)?;
        case.reaches(from, &service.node_url(case.field.address_of(node, family)?, port), &ALL)?;
    }
    Ok(())
}

pub(super) fn from_pods(case: &Case<'_>, family: Family, port: &str) -> Result<()> {
    from_each(case, family, port, &|node| (format!("client-{node}"), false))
}

pub(super) fn from_nodes(case: &Case<'_>, family: Family, port: &str) -> Result<()> {
    from_each(case, family, port, &|node| (node.to_owned(), true))
}

pub(super) fn from_endpoints(case: &Case<'_>, family: Family, port: &str) -> Result<()> {
    from_each(case, family, port, &|node| (format!("server-{node}"), false))
}

fn same_selector(case: &Case<'_>) -> Result<()> {
    let one = case.service("one", json!({}))?;
    let two = case.service("two", json!({}))?;
    for service in [&one, &two] {
        case.reaches(Pod("server-edge-a1"), &service.url("http"), &ALL)?;
        case.reaches(Pod("server-edge-a1"), &service.url("udp"), &ALL)?;
    }
    case.delete(&format!("service {}", two.name))?;
    case.silent(Pod("server-edge-a1"), &two.url("http"))?;
    case.reaches(Pod("server-edge-a1"), &one.url("http"), &ALL)
}

pub(super) fn host_network(case: &Case<'_>, family: Family) -> Result<()> {
    let ports = json!([
        {"name": "http", "port": 80, "targetPort": 18080},
        {"name": "udp", "port": 90, "targetPort": 17000, "protocol": "UDP"},
    ]);
    let service = service(case, family, json!({"selector": {"app": "host"}, "ports": ports}))?;
    let all: Vec<_> = NODES.iter().map(|node| format!("host-{node}")).collect();
    let all: Vec<_> = all.iter().map(String::as_str).collect();
    for from in [Pod("client-cloud-2"), Pod("client-edge-a1"), Pod("host-cloud-1"), Node("edge-b1")] {
        case.reaches(from, &url(&service, family, "http"), &all)?;
        case.reaches(from, &url(&service, family, "udp"), &all)?;
    }
    Ok(())
}

pub(super) fn endpoints_change(case: &Case<'_>, family: Family, port: &str) -> Result<()> {
    let (one, two) = (case.name("one"), case.name("two"));
    case.field.apply(&[
        manifests::pod(&one, "cloud-1", &[("case", &case.id)], &[]),
        manifests::pod(&two, "edge-a1", &[("case", &case.id)], &[]),
    ])?;
    let service = service(case, family, json!({"selector": {"case": case.id}}))?;
    let url = url(&service, family, port);
    case.running(&one)?;
    case.running(&two)?;
    for client in ["client-cloud-2", "client-edge-b1"] {
        case.reaches(Pod(client), &url, &[&one, &two])?;
    }
    case.delete(&format!("pod {two}"))?;
    for client in ["client-cloud-2", "client-edge-b1"] {
        case.reaches(Pod(client), &url, &[&one])?;
    }
    Ok(())
}

fn node_ports(case: &Case<'_>, port: &str) -> Result<()> {
    let service = case.service("svc", json!({"type": "NodePort"}))?;
    for node in ["cloud-1", "edge-a1"] {
        case.reaches(Node(node), &service.node_url(case.field.address(node)?, port), &ALL)?;
    }
    Ok(())
}

fn node_port_goes(case: &Case<'_>, port: &str) -> Result<()> {
    let service = case.service("svc", json!({"type": "NodePort"}))?;
    let url = service.node_url(case.field.address("edge-a1")?, port);
    case.reaches(Pod("client-edge-a1"), &url, &ALL)?;
    case.reaches(Node("edge-a1"), &url, &ALL)?;
    let plain = case.service("svc", json!({"type": "ClusterIP"}))?;
    case.silent(Node("edge-a1"), &url)?;
    case.silent(Pod("client-edge-a1"), &url)?;
    case.reaches(Pod("client-edge-a1"), &plain.url(port), &ALL)
}

/// Upstream's message has 2000 bytes: more than one Ethernet packet carries.
pub(super) fn large_http(case: &Case<'_>, family: Family) -> Result<()> {
    let service = service(case, family, json!({}))?;
    let long = "4".repeat(2000);
    for client in ["client-cloud-2", "client-edge-a1"] {
        case.reaches(Pod(client), &format!("{}{long}", url(&service, family, "http")), &ALL)?;
        let url = url(&service, family, "tcp");
        let outcomes = callers::calls(case.field, Pod(client), &["--size", "200000"], &url, 8)?;
        ensure!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
    }
    Ok(())
}

pub(super) fn large_udp(case: &Case<'_>, family: Family) -> Result<()> {
    let service = service(case, family, json!({}))?;
    let url = url(&service, family, "udp");
    for client in ["client-cloud-2", "client-edge-a1"] {
        case.reaches(Pod(client), &url, &ALL)?;
        for size in ["2000", "8000"] {
            let outcomes = callers::calls(case.field, Pod(client), &["--size", size], &url, 8)?;
            ensure!(outcomes.iter().all(Result::is_ok), "{client}, {size} bytes: {outcomes:?}");
        }
    }
    Ok(())
}
