//! Traffic policies: endpoints of the own node only, what is done when they are going, and what clients outside see.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::{
    callers::{
        self,
        From::{self, Node, Outside, Pod},
    },
    case::{Case, Row, Service},
    manifests,
};

pub(super) const ROWS: &[Row] = &[
    Row::new("Services should respect internalTrafficPolicy=Local Pod to Pod", pod_to_pod),
    Row::new("Services should respect internalTrafficPolicy=Local Pod (hostNetwork: true) to Pod", host_to_pod),
    Row::new("Services should respect internalTrafficPolicy=Local Pod and Node, to Pod (hostNetwork: true)", to_host),
    Row::new(
        "Services should fallback to terminating endpoints when there are no ready endpoints with internalTrafficPolicy=Cluster",
        terminating_internal_cluster,
    ),
    Row::new(
        "Services should fallback to local terminating endpoints when there are no ready endpoints with internalTrafficPolicy=Local",
        terminating_internal_local,
    ),
    Row::new(
        "Services should fallback to terminating endpoints when there are no ready endpoints with externalTrafficPolicy=Cluster",
        terminating_external_cluster,
    ),
    Row::new(
        "Services should fallback to local terminating endpoints when there are no ready endpoints with externalTrafficPolicy=Local",
        terminating_external_local,
    ),
    Row::new(
        "Services should fail health check node port if there are only terminating endpoints",
        health_check_node_port,
    ),
    Row::new("ESIPP should work for type=NodePort", esipp_node_port),
    Row::new("ESIPP should work for type=LoadBalancer", esipp_load_balancer),
    Row::new("ESIPP should work from pods", esipp_from_pods),
    Row::new("ESIPP should only target nodes with endpoints", esipp_only_with_endpoints),
    Row::new("ESIPP should handle updates to ExternalTrafficPolicy field", esipp_updates),
    Row::new(
        "LoadBalancers should not have connectivity disruption during rolling update with externalTrafficPolicy=Cluster",
        rolling_cluster,
    ),
    Row::new(
        "LoadBalancers should not have connectivity disruption during rolling update with externalTrafficPolicy=Local",
        rolling_local,
    ),
    Row::new("LoadBalancers should only allow access from service loadbalancer source ranges", source_ranges),
];

/// A Service with its only endpoint on cloud-1.
fn local_only(case: &Case<'_>, selector: &Value) -> Result<Service> {
    let ports = if selector["app"] == "host" {
        json!([{"name": "http", "port": 80, "targetPort": 18080}, {"name": "udp", "port": 90, "targetPort": 17000, "protocol": "UDP"}])
    } else {
        manifests::ports()
    };
    case.service("svc", json!({"selector": selector, "internalTrafficPolicy": "Local", "ports": ports}))
}

fn respected(
    case: &Case<'_>,
    service: &Service,
    server: &str,
    here: &[From<'_>],
    elsewhere: &[From<'_>],
) -> Result<()> {
    for from in here {
        case.reaches(*from, &service.url("http"), &[server])?;
        case.reaches(*from, &service.url("udp"), &[server])?;
    }
    for from in elsewhere {
        case.refused(*from, &service.url("http"))?;
        case.refused(*from, &service.url("udp"))?;
    }
    Ok(())
}

fn pod_to_pod(case: &Case<'_>) -> Result<()> {
    let service = local_only(case, &json!({"app": "server", "node": "cloud-1"}))?;
    respected(
        case,
        &service,
        "server-cloud-1",
        &[Pod("client-cloud-1")],
        &[Pod("client-cloud-2"), Pod("client-edge-a1")],
    )
}

fn host_to_pod(case: &Case<'_>) -> Result<()> {
    let service = local_only(case, &json!({"app": "server", "node": "cloud-1"}))?;
    respected(case, &service, "server-cloud-1", &[Pod("host-cloud-1")], &[Pod("host-cloud-2"), Node("edge-a1")])
}

fn to_host(case: &Case<'_>) -> Result<()> {
    let service = local_only(case, &json!({"app": "host", "node": "cloud-1"}))?;
    let here = [Pod("client-cloud-1"), Pod("host-cloud-1"), Node("cloud-1")];
    respected(case, &service, "host-cloud-1", &here, &[Pod("client-cloud-2"), Pod("host-cloud-2"), Node("edge-a1")])
}

/// A pod on cloud-1 that is ending and serves on.
fn ending(case: &Case<'_>) -> Result<String> {
    let name = case.name("ending");
    case.pod(manifests::pod(&name, "cloud-1", &[("case", &case.id)], &["--linger", "100"]))?;
    Ok(name)
}

fn terminates(case: &Case<'_>, pod: &str, service: &Service) -> Result<()> {
    case.delete(&format!("pod {pod} --grace-period=100"))?;
    case.terminating(service, true)
}

fn terminating_internal_cluster(case: &Case<'_>) -> Result<()> {
    let pod = ending(case)?;
    let service = case.service("svc", json!({"selector": {"case": case.id}}))?;
    terminates(case, &pod, &service)?;
    for from in [Pod("client-cloud-1"), Pod("client-cloud-2"), Pod("client-edge-a1"), Node("cloud-2")] {
        case.reaches(from, &service.url("http"), &[&pod])?;
    }
    Ok(())
}

fn terminating_internal_local(case: &Case<'_>) -> Result<()> {
    let pod = ending(case)?;
    let service = case.service("svc", json!({"selector": {"case": case.id}, "internalTrafficPolicy": "Local"}))?;
    terminates(case, &pod, &service)?;
    case.reaches(Pod("client-cloud-1"), &service.url("http"), &[&pod])?;
    case.refused(Pod("client-cloud-2"), &service.url("http"))
}

fn terminating_external_cluster(case: &Case<'_>) -> Result<()> {
    let pod = ending(case)?;
    let service = case.service("svc", json!({"type": "NodePort", "selector": {"case": case.id}}))?;
    terminates(case, &pod, &service)?;
    for node in ["cloud-1", "cloud-2"] {
        case.reaches(Outside, &service.node_url(case.field.address(node)?, "http"), &[&pod])?;
    }
    Ok(())
}

fn terminating_external_local(case: &Case<'_>) -> Result<()> {
    let pod = ending(case)?;
    let service = external_local(case, "NodePort", &json!({"case": case.id}))?;
    terminates(case, &pod, &service)?;
    case.reaches(Outside, &service.node_url(case.field.address("cloud-1")?, "http"), &[&pod])?;
    case.silent(Outside, &service.node_url(case.field.address("cloud-2")?, "http"))
}

fn external_local(case: &Case<'_>, kind: &str, selector: &Value) -> Result<Service> {
    case.service("svc", json!({"type": kind, "selector": selector, "externalTrafficPolicy": "Local"}))
}

fn health_check_node_port(case: &Case<'_>) -> Result<()> {
    let pod = ending(case)?;
    let service = external_local(case, "LoadBalancer", &json!({"case": case.id}))?;
    let port =
        service.object["spec"]["healthCheckNodePort"].as_u64().context("spec.healthCheckNodePort is not given")?;
    let url = format!("http://{}:{port}/healthz", case.field.address("cloud-1")?);
    let status = |expected: &str| {
        case.until(&format!("{url} says {expected}"), Duration::from_secs(15), || {
            let words = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "--max-time", "2", &url];
            let (_, said) = callers::run(case.field, Outside, &words)?;
            ensure!(said == expected, "{said}");
            Ok(())
        })
    };
    status("200")?;
    terminates(case, &pod, &service)?;
    status("503")
}

fn esipp_node_port(case: &Case<'_>) -> Result<()> {
    let service = external_local(case, "NodePort", &json!({"app": "server"}))?;
    for node in ["cloud-1", "cloud-2"] {
        let url = service.node_url(case.field.address(node)?, "http");
        case.reaches(Outside, &url, &[&format!("server-{node}")])?;
        case.sees(Outside, &url, case.field.address("client")?)?;
    }
    Ok(())
}

/// Gives a load balancer's address to a Service, and lets the outside client send it to a node, as a load balancer would.
pub(super) fn balanced(case: &Case<'_>, service: &Service, address: &str, node: &str) -> Result<String> {
    let ingress = json!({"status": {"loadBalancer": {"ingress": [{"ip": address}]}}});
    case.patch(&format!("service/{} --subresource=status", service.name), &ingress)?;
    let via = case.field.address(node)?;
    let (code, said) = callers::run(case.field, Outside, &["ip", "route", "replace", address, "via", via])?;
    ensure!(code == Some(0), "{said}");
    Ok(service.url_at(address, "http"))
}

fn esipp_load_balancer(case: &Case<'_>) -> Result<()> {
    let service = external_local(case, "LoadBalancer", &json!({"app": "server"}))?;
    let url = balanced(case, &service, "198.18.0.1", "cloud-1")?;
    case.reaches(Outside, &url, &["server-cloud-1"])?;
    case.sees(Outside, &url, case.field.address("client")?)
}

/// Callers on the nodes use all endpoints, whatever the policy for those outside.
fn esipp_from_pods(case: &Case<'_>) -> Result<()> {
    let service = external_local(case, "LoadBalancer", &json!({"app": "server", "node": "cloud-1"}))?;
    let url = balanced(case, &service, "198.18.0.2", "cloud-1")?;
    for from in [Pod("client-cloud-2"), Pod("client-edge-a1"), Node("cloud-2")] {
        case.reaches(from, &url, &["server-cloud-1"])?;
    }
    Ok(())
}

fn esipp_only_with_endpoints(case: &Case<'_>) -> Result<()> {
    let service = external_local(case, "NodePort", &json!({"app": "server", "node": "cloud-1"}))?;
    case.reaches(Outside, &service.node_url(case.field.address("cloud-1")?, "http"), &["server-cloud-1"])?;
    case.silent(Outside, &service.node_url(case.field.address("cloud-2")?, "http"))
}

fn esipp_updates(case: &Case<'_>) -> Result<()> {
    let selector = json!({"app": "server", "node": "cloud-1"});
    let service = external_local(case, "NodePort", &selector)?;
    let url = service.node_url(case.field.address("cloud-2")?, "http");
    case.silent(Outside, &url)?;
    case.patch(&format!("service/{}", service.name), &json!({"spec": {"externalTrafficPolicy": "Cluster"}}))?;
    case.reaches(Outside, &url, &["server-cloud-1"])?;
    case.patch(&format!("service/{}", service.name), &json!({"spec": {"externalTrafficPolicy": "Local"}}))?;
    case.silent(Outside, &url)?;
    let own = service.node_url(case.field.address("cloud-1")?, "http");
    case.sees(Outside, &own, case.field.address("client")?)
}

/// Every pod is replaced by a new one, first come and then go, while calls come from outside: none may fail.
fn rolls(case: &Case<'_>, policy: &str, address: &str) -> Result<()> {
    let spec = json!({"type": "LoadBalancer", "selector": {"case": case.id}, "externalTrafficPolicy": policy});
    let service = case.service("svc", spec)?;
    let labels = [("case", case.id.as_str())];
    let pod = |round: usize, node: &str| {
        let mut pod = manifests::pod(&case.name(&format!("{round}-{node}")), node, &labels, &["--linger", "5"]);
        pod["spec"]["terminationGracePeriodSeconds"] = json!(10);
        pod
    };
    let nodes = ["cloud-1", "cloud-2"];
    for node in nodes {
        case.pod(pod(0, node))?;
    }
    let url = balanced(case, &service, address, "cloud-1")?;
    let first: Vec<_> = if policy == "Local" {
        vec![case.name("0-cloud-1")]
    } else {
        nodes.map(|node| case.name(&format!("0-{node}"))).to_vec()
    };
    case.reaches(Outside, &url, &first.iter().map(String::as_str).collect::<Vec<_>>())?;
    let stream = case.stream(Outside, &["--every", "20", "--timeout", "3000"], &url)?;
    for node in nodes {
        case.pod(pod(1, node))?;
        case.delete(&format!("pod {}", case.name(&format!("0-{node}"))))?;
    }
    for node in nodes {
        case.gone_pod(&case.name(&format!("0-{node}")))?;
    }
    let outcomes = stream.outcomes();
    let failed: Vec<_> = outcomes.iter().filter_map(|outcome| outcome.as_ref().err()).collect();
    ensure!(
        outcomes.len() > 50 && failed.is_empty(),
        "{} of {} calls failed: {:?}",
        failed.len(),
        outcomes.len(),
        failed.first()
    );
    Ok(())
}

fn rolling_cluster(case: &Case<'_>) -> Result<()> {
    rolls(case, "Cluster", "198.18.0.3")
}

fn rolling_local(case: &Case<'_>) -> Result<()> {
    rolls(case, "Local", "198.18.0.4")
}

/// As upstream: of two pods one is in the ranges; and the machine outside is or is not.
fn source_ranges(case: &Case<'_>) -> Result<()> {
    let all = ["server-cloud-1", "server-cloud-2", "server-edge-a1", "server-edge-b1"];
    let (accepted, dropped) = ("client-cloud-1", "client-cloud-2");
    let service = case.service("svc", json!({"type": "LoadBalancer"}))?;
    let url = balanced(case, &service, "198.18.0.5", "cloud-1")?;
    case.reaches(Outside, &url, &all)?;
    let admit = |address: &str| {
        let ranges = json!({"spec": {"loadBalancerSourceRanges": [format!("{address}/32")]}});
        case.patch(&format!("service/{}", service.name), &ranges)
    };
    admit(case.field.pod_ip(accepted)?)?;
    case.silent(Outside, &url)?;
    case.silent(Pod(dropped), &url)?;
    case.reaches(Pod(accepted), &url, &all)?;
    admit(case.field.address("client")?)?;
    case.silent(Pod(accepted), &url)?;
    case.reaches(Outside, &url, &all)?;
    case.patch(&format!("service/{}", service.name), &json!({"spec": {"loadBalancerSourceRanges": null}}))?;
    case.reaches(Pod(dropped), &url, &all)
}
