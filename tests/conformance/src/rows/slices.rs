//! EndpointSlices: those that selectors make, and those that people write.

use std::{collections::BTreeSet, time::Duration};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::{
    callers::From::Pod,
    case::{Case, Row, Service},
    manifests,
};

const CLIENT: &str = "client-edge-a1";

pub(super) const ROWS: &[Row] = &[
    Row::new(
        "EndpointSlice should have Endpoints and EndpointSlices pointing to API Server [Conformance] (its slice)",
        api_server,
    ),
    Row::new(
        "EndpointSlice should create and delete Endpoints and EndpointSlices for a Service with a selector specified [Conformance] (its slices)",
        made_and_deleted,
    ),
    Row::new(
        "EndpointSlice should create Endpoints and EndpointSlices for Pods matching a Service [Conformance] (its slices)",
        matching_pods,
    ),
    Row::new("EndpointSlice should support creating EndpointSlice API operations [Conformance]", operations),
    Row::new(
        "EndpointSlice should support a Service with multiple ports specified in multiple EndpointSlices [Conformance]",
        several_ports,
    ),
    Row::new(
        "EndpointSlice should support a Service with multiple endpoint IPs specified in multiple EndpointSlices [Conformance]",
        several_addresses,
    ),
];

fn slices(case: &Case<'_>, service: &Service) -> Result<Vec<Value>> {
    let list = case.field.get(&format!("endpointslices -l kubernetes.io/service-name={}", service.name))?;
    list["items"].as_array().cloned().context("a list has items")
}

fn api_server(case: &Case<'_>) -> Result<()> {
    let list = case.field.get("endpointslices -l kubernetes.io/service-name=kubernetes --namespace default")?;
    let slice = &list["items"][0];
    ensure!(slice["addressType"] == "IPv4" && slice["ports"][0]["name"] == "https", "{list}");
    let hub = case.field.address("hub")?;
    ensure!(slice["endpoints"][0]["addresses"][0] == hub, "{slice}");
    Ok(())
}

fn made_and_deleted(case: &Case<'_>) -> Result<()> {
    let service = case.service("svc", json!({}))?;
    case.until("there is a slice", Duration::from_secs(10), || {
        let found = slices(case, &service)?;
        let [slice] = &found[..] else { anyhow::bail!("{} slices", found.len()) };
        ensure!(slice["metadata"]["ownerReferences"][0]["name"] == service.name.as_str(), "{slice}");
        let managed = &slice["metadata"]["labels"]["endpointslice.kubernetes.io/managed-by"];
        ensure!(*managed == "endpointslice-controller.k8s.io", "{slice}");
        Ok(())
    })?;
    case.field.kubectl(&format!("delete service {}", service.name), "")?;
    case.until("the slice is gone", Duration::from_secs(20), || {
        ensure!(slices(case, &service)?.is_empty(), "it is there");
        Ok(())
    })
}

/// Two Services over the same pods, one by number and one by a name that the two pods give to different ports.
fn matching_pods(case: &Case<'_>) -> Result<()> {
    let (one, two) = (case.name("one"), case.name("two"));
    let named = |name: &str, node: &str, port: u16| {
        let mut pod = manifests::pod(name, node, &[("case", &case.id)], &[]);
        pod["spec"]["containers"][0]["ports"] = json!([{"name": "example", "containerPort": port}]);
        pod
    };
    let by_number = case.service("number", json!({"selector": {"case": case.id}}))?;
    let ports = json!([{"name": "tcp", "port": 90, "targetPort": "example"}]);
    let by_name = case.service("name", json!({"selector": {"case": case.id}, "ports": ports}))?;
    case.field.apply(&[named(&one, "cloud-1", manifests::ECHO), named(&two, "edge-b1", manifests::HTTP)])?;
    let (first, second) = (case.running(&one)?, case.running(&two)?);
    case.has_endpoints(&by_number, &[&first, &second])?;
    case.has_endpoints(&by_name, &[&first, &second])?;
    let mut numbers = BTreeSet::new();
    for slice in slices(case, &by_name)? {
        ensure!(
            slice["endpoints"].as_array().is_some_and(|endpoints| endpoints.len() == 1),
            "a slice for each port: {slice}"
        );
        let target = &slice["endpoints"][0]["targetRef"];
        ensure!(target["kind"] == "Pod" && target["namespace"] == "conformance", "{slice}");
        numbers.insert(slice["ports"][0]["port"].as_u64());
    }
    ensure!(numbers == BTreeSet::from([Some(manifests::ECHO.into()), Some(manifests::HTTP.into())]), "{numbers:?}");
    case.reaches(Pod(CLIENT), &by_number.url("http"), &[&one, &two])
}

/// Create, read, list, watch, replace, patch, delete.
fn operations(case: &Case<'_>) -> Result<()> {
    let name = case.name("slice");
    let address = case.field.pod_ip("server-cloud-1")?;
    let slice = manifests::slice(
        &name,
        "nobody",
        manifests::slice_ports(),
        vec![manifests::endpoint(address, "cloud-1", true)],
    );
    case.field.kubectl("create -f -", &slice.to_string())?;
    let read = case.field.get(&format!("endpointslice {name}"))?;
    ensure!(read["endpoints"][0]["addresses"][0] == address, "{read}");
    let everywhere = case.field.kubectl("get endpointslices --all-namespaces", "")?;
    ensure!(everywhere.contains(&name), "{everywhere}");
    let patched =
        case.patch(&format!("endpointslice/{name}"), &json!({"metadata": {"annotations": {"row": "patched"}}}))?;
    ensure!(patched["metadata"]["annotations"]["row"] == "patched", "{patched}");
    let mut replaced = patched;
    replaced["endpoints"] = json!([]);
    case.field.kubectl("replace -f -", &replaced.to_string())?;
    let read = case.field.get(&format!("endpointslice {name}"))?;
    ensure!(read["endpoints"] == json!([]), "{read}");
    let mut immutable = read;
    immutable["addressType"] = json!("FQDN");
    ensure!(case.field.kubectl("replace -f -", &immutable.to_string()).is_err(), "addressType could be changed");
    case.field.kubectl(
        &format!("delete endpointslices -l kubernetes.io/service-name=nobody --field-selector metadata.name={name}"),
        "",
    )?;
    ensure!(case.field.get(&format!("endpointslice {name}")).is_err(), "it is there");
    Ok(())
}

/// Each slice has one of the ports, and an endpoint of its own for it.
fn several_ports(case: &Case<'_>) -> Result<()> {
    let service = case.service("svc", json!({"selector": null}))?;
    let all = manifests::slice_ports();
    let slice = |of: &str, port: &Value, server: &str, node: &str| -> Result<Value> {
        let endpoint = manifests::endpoint(case.field.pod_ip(server)?, node, true);
        Ok(manifests::slice(&case.name(of), &service.name, json!([port]), vec![endpoint]))
    };
    case.field.apply(&[
        slice("http", &all[0], "server-cloud-1", "cloud-1")?,
        slice("tcp", &all[1], "server-edge-b1", "edge-b1")?,
    ])?;
    case.reaches(Pod(CLIENT), &service.url("http"), &["server-cloud-1"])?;
    case.reaches(Pod(CLIENT), &service.url("tcp"), &["server-edge-b1"])?;
    case.refused(Pod(CLIENT), &service.url("udp"))
}

fn several_addresses(case: &Case<'_>) -> Result<()> {
    let service = case.service("svc", json!({"selector": null}))?;
    let slice = |of: &str, server: &str, node: &str| -> Result<Value> {
        let endpoint = manifests::endpoint(case.field.pod_ip(server)?, node, true);
        Ok(manifests::slice(&case.name(of), &service.name, manifests::slice_ports(), vec![endpoint]))
    };
    case.field.apply(&[slice("one", "server-cloud-1", "cloud-1")?, slice("two", "server-edge-b1", "edge-b1")?])?;
    for client in [CLIENT, "client-cloud-2"] {
        case.reaches(Pod(client), &service.url("http"), &["server-cloud-1", "server-edge-b1"])?;
        case.reaches(Pod(client), &service.url("udp"), &["server-cloud-1", "server-edge-b1"])?;
    }
    Ok(())
}
