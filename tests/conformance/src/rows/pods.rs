//! Pods: ports of their host, calls to and from those that are ending, and addresses that are written in doubtful ways.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::{
    callers::{
        self,
        From::{Node, Pod},
    },
    case::{Case, Row},
    manifests,
};

pub(super) const ROWS: &[Row] = &[
    Row::new(
        "HostPort validates that there is no conflict between pods with same hostPort but different hostIP and protocol [Conformance]",
        host_ports,
    ),
    Row::new(
        "CVE-2021-29923 IPv4 Service Type ClusterIP with leading zeros should work interpreted as decimal (it is refused)",
        leading_zeros,
    ),
    Row::new("Connectivity Pod Lifecycle should be able to connect from a Pod to a terminating Pod", to_terminating),
    Row::new(
        "Connectivity Pod Lifecycle should be able to connect to other Pod from a terminating Pod",
        from_terminating,
    ),
];

fn host_ports(case: &Case<'_>) -> Result<()> {
    let node = "cloud-2";
    let address = case.field.address(node)?;
    let at = |of: &str, ip: &str, protocol: &str| {
        let mut pod = manifests::pod(&case.name(of), node, &[], &[]);
        let container = if protocol == "UDP" { manifests::ECHO } else { manifests::HTTP };
        let port = json!({"containerPort": container, "hostPort": 54323, "hostIP": ip, "protocol": protocol});
        pod["spec"]["containers"][0]["ports"] = json!([port]);
        pod
    };
    let pods = [at("loopback", "127.0.0.1", "TCP"), at("tcp", address, "TCP"), at("udp", address, "UDP")];
    case.field.apply(&pods)?;
    for of in ["loopback", "tcp", "udp"] {
        case.running(&case.name(of))?;
    }
    case.reaches(Node(node), "http://127.0.0.1:54323/", &[&case.name("loopback")])?;
    for from in [Node(node), Node("cloud-1"), Pod("client-cloud-1")] {
        case.reaches(from, &format!("http://{address}:54323/"), &[&case.name("tcp")])?;
        case.reaches(from, &format!("udp://{address}:54323"), &[&case.name("udp")])?;
    }
    Ok(())
}

/// Upstream's API takes such an address as decimal numbers; this one refuses what programs read in two ways.
fn leading_zeros(case: &Case<'_>) -> Result<()> {
    let free = case.service("free", json!({}))?;
    let octets: Vec<_> = free.ip().split('.').collect();
    let zeros = format!("{}.0{}.{}.{}", octets[0], octets[1], octets[2], octets[3]);
    case.field.kubectl(&format!("delete service {}", free.name), "")?;
    let error = case.service("zeros", json!({"clusterIP": zeros})).map(|service| service.object);
    let error = format!("{:#}", error.err().with_context(|| format!("{zeros} was taken"))?);
    ensure!(error.contains("clusterIP"), "{error}");
    Ok(())
}

fn url(address: &str) -> String {
    format!("http://{address}:{}/", manifests::HTTP)
}

fn terminating(case: &Case<'_>) -> Result<(String, String)> {
    let name = case.name("ending");
    let address = case.pod(manifests::pod(&name, "cloud-1", &[], &["--linger", "60"]))?;
    case.delete(&format!("pod {name} --grace-period=60"))?;
    case.until("it is being deleted", Duration::from_secs(5), || {
        let pod = case.field.get(&format!("pod {name}"))?;
        ensure!(pod["metadata"]["deletionTimestamp"].is_string(), "{pod}");
        Ok(())
    })?;
    Ok((name, address))
}

fn to_terminating(case: &Case<'_>) -> Result<()> {
    let (name, address) = terminating(case)?;
    case.reaches(Pod("client-cloud-2"), &url(&address), &[&name])
}

fn from_terminating(case: &Case<'_>) -> Result<()> {
    let (name, _) = terminating(case)?;
    case.reaches(Pod(&name), &url(case.field.pod_ip("server-cloud-2")?), &["server-cloud-2"])?;
    let service = case.service("svc", json!({"selector": {"app": "server", "node": "edge-b1"}}))?;
    case.reaches(Pod(&name), &service.url("http"), &["server-edge-b1"])?;
    let (code, said) = callers::run(
        case.field,
        Pod(&name),
        &["nslookup", "-type=a", &format!("{}.conformance.svc.cluster.local", service.name)],
    )?;
    ensure!(code == Some(0), "{said}");
    Ok(())
}
