//! NodePorts and external addresses: who gets which, and who answers at them, for callers on nodes and outside.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::{
    callers::From::{Node, Outside, Pod},
    case::{Case, Row, Service},
    manifests,
};

const ALL: [&str; 4] = ["server-cloud-1", "server-cloud-2", "server-edge-a1", "server-edge-b1"];

pub(super) const ROWS: &[Row] = &[
    Row::new(
        "Services should be able to create a functioning NodePort service [Conformance] (callers on the node)",
        on_the_node,
    ),
    Row::new("Services should be able to create a functioning NodePort service [Conformance]", from_everywhere),
    Row::new("Services should prevent NodePort collisions", collisions),
    Row::new("Services should check NodePort out-of-range", out_of_range),
    Row::new("Services should release NodePorts on delete", released),
    Row::new(
        "Services should be able to update NodePorts with two same port numbers but different protocols",
        same_number,
    ),
    Row::new("Services should be able to connect to a service via its ExternalIP (of a node)", external_ip),
    Row::new(
        "Services should serve endpoints on same port and different protocol for internal traffic on Type LoadBalancer",
        load_balancer,
    ),
    Row::new(
        "Services should be able to update service type to NodePort listening on same port number but different protocols",
        type_with_same_number,
    ),
];

fn node_port(case: &Case<'_>) -> Result<Service> {
    case.service("svc", json!({"type": "NodePort"}))
}

fn on_the_node(case: &Case<'_>) -> Result<()> {
    let service = node_port(case)?;
    for node in ["cloud-2", "edge-a1"] {
        let address = case.field.address(node)?;
        let pod = format!("client-{node}");
        for port in ["http", "udp"] {
            case.reaches(Pod(&pod), &service.node_url(address, port), &ALL)?;
            case.reaches(Node(node), &service.node_url(address, port), &ALL)?;
            case.reaches(Node(node), &service.node_url("127.0.0.1", port), &ALL)?;
        }
    }
    Ok(())
}

fn from_everywhere(case: &Case<'_>) -> Result<()> {
    let service = node_port(case)?;
    for node in ["cloud-1", "cloud-2"] {
        let address = case.field.address(node)?;
        for port in ["http", "tcp", "udp"] {
            case.reaches(Outside, &service.node_url(address, port), &ALL)?;
        }
    }
    // A node's port as its neighbours call it.
    let other = case.field.address("cloud-1")?;
    case.reaches(Pod("client-cloud-2"), &service.node_url(other, "http"), &ALL)?;
    case.reaches(Node("cloud-2"), &service.node_url(other, "http"), &ALL)
}

fn node_port_of(service: &Service) -> Result<i64> {
    service.object["spec"]["ports"][0]["nodePort"].as_i64().context("a node port")
}

fn http_at(node_port: i64) -> Value {
    json!({"type": "NodePort", "ports": [{"name": "http", "port": 80, "targetPort": manifests::HTTP, "nodePort": node_port}]})
}

fn collisions(case: &Case<'_>) -> Result<()> {
    let taken = node_port_of(&node_port(case)?)?;
    let error = case.service("other", http_at(taken)).map(|other| other.object);
    let error = format!("{:#}", error.err().context("the second Service with that port was taken")?);
    ensure!(error.contains("provided port is already allocated"), "{error}");
    case.delete(&format!("service {}", case.name("svc")))?;
    case.until("the port is free", std::time::Duration::from_secs(10), || {
        case.service("other", http_at(taken)).map(drop)
    })
}

fn out_of_range(case: &Case<'_>) -> Result<()> {
    for port in [1, 29_999, 32_768] {
        let error = case.service("svc", http_at(port)).map(|service| service.object);
        let error = format!("{:#}", error.err().with_context(|| format!("{port} was taken"))?);
        ensure!(error.contains("provided port is not in the valid range"), "{error}");
    }
    let service = node_port(case)?;
    let patched = case.patch(
        &format!("service/{}", service.name),
        &json!({"spec": {"ports": [{"name": "http", "port": 80, "nodePort": 32_768}]}}),
    );
    ensure!(patched.is_err(), "{patched:?}");
    Ok(())
}

fn released(case: &Case<'_>) -> Result<()> {
    let service = node_port(case)?;
    let port = node_port_of(&service)?;
    let address = case.field.address("cloud-2")?;
    case.reaches(Node("cloud-2"), &service.node_url(address, "http"), &ALL)?;
    case.field.kubectl(&format!("delete service {}", service.name), "")?;
    case.silent(Node("cloud-2"), &service.node_url(address, "http"))?;
    let again = case.service("again", http_at(port))?;
    ensure!(node_port_of(&again)? == port, "{}", again.object);
    case.reaches(Node("cloud-2"), &again.node_url(address, "http"), &ALL)
}

fn both_protocols(port: i64) -> Value {
    json!([
        {"name": "tcp", "port": 90, "targetPort": manifests::ECHO, "nodePort": port},
        {"name": "udp", "port": 90, "targetPort": manifests::ECHO, "nodePort": port, "protocol": "UDP"},
    ])
}

fn serves_both(case: &Case<'_>, service: &Service) -> Result<()> {
    let address = case.field.address("cloud-2")?;
    case.reaches(Node("cloud-2"), &service.node_url(address, "tcp"), &ALL)?;
    case.reaches(Pod("client-cloud-2"), &service.node_url(address, "udp"), &ALL)
}

fn same_number(case: &Case<'_>) -> Result<()> {
    let first = case.service("svc", json!({"type": "NodePort", "ports": [manifests::ports()[1]]}))?;
    let port = node_port_of(&first)?;
    // Not by apply: kubectl merges ports by their number alone, and takes the two for one.
    case.patch(&format!("service/{}", first.name), &json!({"spec": {"ports": both_protocols(port)}}))?;
    let both = case.now(&first)?;
    serves_both(case, &both)
}

fn type_with_same_number(case: &Case<'_>) -> Result<()> {
    let plain = case.service("svc", json!({}))?;
    case.reaches(Pod("client-cloud-2"), &plain.url("tcp"), &ALL)?;
    // A port that this test's Services have had: nobody else asks for it by number.
    let free = case.service("free", json!({"type": "NodePort"}))?;
    let port = node_port_of(&free)?;
    case.field.kubectl(&format!("delete service {}", free.name), "")?;
    let spec = json!({"spec": {"type": "NodePort", "ports": both_protocols(port)}});
    case.patch(&format!("service/{}", plain.name), &spec)?;
    let both = case.now(&plain)?;
    serves_both(case, &both)
}

/// Upstream takes an address of no node; here it must be one of the host's (CVE-2020-8554).
fn external_ip(case: &Case<'_>) -> Result<()> {
    let address = case.field.address("cloud-1")?;
    let ports = json!([{"name": "http", "port": 8081, "targetPort": manifests::HTTP}]);
    let service = case.service("svc", json!({"externalIPs": [address], "ports": ports}))?;
    case.reaches(Node("cloud-1"), &service.url_at(address, "http"), &ALL)?;
    case.reaches(Pod("client-cloud-1"), &service.url_at(address, "http"), &ALL)?;
    case.reaches(Outside, &service.url_at(address, "http"), &ALL)
}

fn load_balancer(case: &Case<'_>) -> Result<()> {
    let service = case.service("svc", json!({"type": "LoadBalancer"}))?;
    let address = "203.0.113.201";
    let ingress = json!({"status": {"loadBalancer": {"ingress": [{"ip": address}]}}});
    case.patch(&format!("service/{} --subresource=status", service.name), &ingress)?;
    for from in [Pod("client-edge-a1"), Node("cloud-2")] {
        case.reaches(from, &service.url_at(address, "tcp"), &ALL)?;
        case.reaches(from, &service.url_at(address, "udp"), &ALL)?;
    }
    Ok(())
}
