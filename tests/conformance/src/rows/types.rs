//! Services that change their type.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;

use crate::{
    callers::From::{Node, Pod},
    case::{Case, Row, Service},
};

const ALL: [&str; 4] = ["server-cloud-1", "server-cloud-2", "server-edge-a1", "server-edge-b1"];
const CLIENT: &str = "client-edge-a1";

pub(super) const ROWS: &[Row] = &[
    Row::new(
        "Services should be able to change the type from ExternalName to ClusterIP [Conformance]",
        external_name_to_cluster_ip,
    ),
    Row::new(
        "Services should be able to change the type from ExternalName to NodePort [Conformance]",
        external_name_to_node_port,
    ),
    Row::new(
        "Services should be able to change the type from ClusterIP to ExternalName [Conformance]",
        cluster_ip_to_external_name,
    ),
    Row::new(
        "Services should be able to change the type from NodePort to ExternalName [Conformance]",
        node_port_to_external_name,
    ),
];

fn external_name(case: &Case<'_>) -> Result<Service> {
    case.service(
        "svc",
        json!({"type": "ExternalName", "externalName": "outside.example", "selector": null, "ports": null}),
    )
}

fn resolves(case: &Case<'_>, service: &Service, expected: &str) -> Result<()> {
    case.until(&format!("{} is {expected}", service.name), Duration::from_secs(15), || {
        let said = case.shell(CLIENT, &format!("nslookup -type=a {}.conformance.svc.cluster.local", service.name))?;
        ensure!(said.contains(expected), "{said}");
        Ok(())
    })
}

fn external_name_to_cluster_ip(case: &Case<'_>) -> Result<()> {
    let alias = external_name(case)?;
    resolves(case, &alias, "outside.example")?;
    let service = case.service("svc", json!({"type": "ClusterIP", "externalName": null}))?;
    resolves(case, &service, service.ip())?;
    case.reaches(Pod(CLIENT), &format!("http://{}/", service.name), &ALL)
}

fn external_name_to_node_port(case: &Case<'_>) -> Result<()> {
    let alias = external_name(case)?;
    resolves(case, &alias, "outside.example")?;
    let service = case.service("svc", json!({"type": "NodePort", "externalName": null}))?;
    resolves(case, &service, service.ip())?;
    case.reaches(Pod(CLIENT), &format!("http://{}/", service.name), &ALL)?;
    case.reaches(Node("edge-a1"), &service.node_url(case.field.address("edge-a1")?, "http"), &ALL)
}

/// The alias leads to another Service.
fn becomes_an_alias(case: &Case<'_>, service: &Service) -> Result<()> {
    case.reaches(Pod(CLIENT), &service.url("http"), &ALL)?;
    let target = case.service("target", json!({"selector": {"app": "server", "node": "edge-b1"}}))?;
    let name = format!("{}.conformance.svc.cluster.local", target.name);
    let alias = json!({"spec": {"type": "ExternalName", "externalName": name, "clusterIP": "", "clusterIPs": null, "selector": null}});
    case.patch(&format!("service/{}", service.name), &alias)?;
    resolves(case, service, target.ip())?;
    case.reaches(Pod(CLIENT), &format!("http://{}/", service.name), &["server-edge-b1"])?;
    case.silent(Pod(CLIENT), &service.url("http"))
}

fn cluster_ip_to_external_name(case: &Case<'_>) -> Result<()> {
    let service = case.service("svc", json!({}))?;
    becomes_an_alias(case, &service)
}

fn node_port_to_external_name(case: &Case<'_>) -> Result<()> {
    let service = case.service("svc", json!({"type": "NodePort"}))?;
    let node_url = service.node_url(case.field.address("edge-a1")?, "http");
    case.reaches(Node("edge-a1"), &node_url, &ALL)?;
    becomes_an_alias(case, &service)?;
    case.silent(Node("edge-a1"), &node_url)
}
