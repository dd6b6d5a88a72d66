//! Services at their cluster addresses: endpoints that come and go, ports, labels, restarts of what carries them.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;

use crate::{
    callers::{
        From::{Node, Outside, Pod},
        Stream,
    },
    case::{Case, Row},
    manifests,
};

const NEAR: &str = "client-cloud-2";
const EDGE: &str = "client-edge-a1";
const ALL: [&str; 4] = ["server-cloud-1", "server-cloud-2", "server-edge-a1", "server-edge-b1"];

pub(super) const ROWS: &[Row] = &[
    Row::new("Services should serve a basic endpoint from pods [Conformance]", basic_endpoint),
    Row::new("Services should serve multiport endpoints from pods [Conformance]", multiport),
    Row::new("Services should provide secure master service [Conformance]", master_service),
    Row::new("Services should be able to handle same port with different protocols", same_port),
    Row::new("Services should be updated after adding or deleting ports", ports_change),
    Row::new("Services should be able to up and down services", up_and_down),
    Row::new("Services should work after the service has been recreated", recreated),
    Row::alone("Services should work after restarting kube-proxy [Disruptive]", agent_restarts),
    Row::alone("Services should work after restarting apiserver [Disruptive]", hub_restarts),
    Row::new("Services should preserve source pod IP for traffic thru service cluster IP", source_address),
    Row::new("Services should allow pods to hairpin back to themselves through services", hairpin),
    Row::new("Services should be rejected when no endpoints exist", no_endpoints),
    Row::new("Services should be rejected for evicted pods (no endpoints exist)", evicted_pods),
    Row::new("Services should implement service.kubernetes.io/service-proxy-name", other_proxy),
    Row::new("Services should implement service.kubernetes.io/headless", headless_label),
    Row::new("Services should create endpoints for unready pods", unready_published),
    Row::new(
        "Services should be able to connect to terminating and unready endpoints if PublishNotReadyAddresses is true",
        unready_and_terminating_published,
    ),
    Row::new(
        "Services should not be able to connect to terminating and unready endpoints if PublishNotReadyAddresses is false",
        unready_not_published,
    ),
    Row::new("Services should delete a collection of services [Conformance]", delete_collection),
    Row::new("Services should complete a service status lifecycle [Conformance]", status_lifecycle),
];

fn basic_endpoint(case: &Case<'_>) -> Result<()> {
    let (one, two) = (case.name("one"), case.name("two"));
    let service = case.service("svc", json!({"selector": {"case": case.id}}))?;
    case.has_endpoints(&service, &[])?;
    let first = case.pod(manifests::pod(&one, "cloud-1", &[("case", &case.id)], &[]))?;
    case.has_endpoints(&service, &[&first])?;
    case.reaches(Pod(EDGE), &service.url("http"), &[&one])?;
    let second = case.pod(manifests::pod(&two, "edge-b1", &[("case", &case.id)], &[]))?;
    case.has_endpoints(&service, &[&first, &second])?;
    case.reaches(Pod(EDGE), &service.url("http"), &[&one, &two])?;
    case.delete(&format!("pod {one}"))?;
    case.has_endpoints(&service, &[&second])?;
    case.reaches(Pod(EDGE), &service.url("http"), &[&two])?;
    case.delete(&format!("pod {two}"))?;
    case.has_endpoints(&service, &[])?;
    case.refused(Pod(EDGE), &service.url("http"))
}

/// Two ports, each served by a pod of its own: named target ports find the pods that have them.
fn multiport(case: &Case<'_>) -> Result<()> {
    let (one, two) = (case.name("one"), case.name("two"));
    let ports = json!([{"name": "http", "port": 80, "targetPort": "first"}, {"name": "tcp", "port": 81, "targetPort": "second"}]);
    let service = case.service("svc", json!({"selector": {"case": case.id}, "ports": ports}))?;
    let mut first = manifests::pod(&one, "cloud-1", &[("case", &case.id)], &[]);
    first["spec"]["containers"][0]["ports"] = json!([{"name": "first", "containerPort": manifests::HTTP}]);
    let mut second = manifests::pod(&two, "cloud-2", &[("case", &case.id)], &[]);
    second["spec"]["containers"][0]["ports"] = json!([{"name": "second", "containerPort": manifests::ECHO}]);
    case.field.apply(&[first, second])?;
    case.reaches(Pod(EDGE), &service.url("http"), &[&one])?;
    case.reaches(Pod(EDGE), &service.url("tcp"), &[&two])?;
    case.delete(&format!("pod {one}"))?;
    case.refused(Pod(EDGE), &service.url("http"))?;
    case.reaches(Pod(EDGE), &service.url("tcp"), &[&two])
}

fn master_service(case: &Case<'_>) -> Result<()> {
    let service = case.field.get("service kubernetes --namespace default")?;
    let port = &service["spec"]["ports"][0];
    ensure!(port["name"] == "https" && port["port"] == 443, "{service}");
    for pod in [NEAR, EDGE] {
        case.until(&format!("{pod} connects to the API"), Duration::from_secs(10), || {
            // The API server waits for the client's first words and says nothing to these.
            case.shell(pod, "nc -w 2 kubernetes.default 443 < /dev/null").map(drop)
        })?;
    }
    Ok(())
}

fn same_port(case: &Case<'_>) -> Result<()> {
    let service = case.service("svc", json!({}))?;
    for from in [Pod(NEAR), Pod(EDGE)] {
        case.reaches(from, &service.url("tcp"), &ALL)?;
        case.reaches(from, &service.url("udp"), &ALL)?;
    }
    Ok(())
}

fn ports_change(case: &Case<'_>) -> Result<()> {
    let all = manifests::ports();
    let service = case.service("svc", json!({"ports": [all[0]]}))?;
    case.reaches(Pod(EDGE), &service.url("http"), &ALL)?;
    let service = case.service("svc", json!({"ports": [all[0], all[1]]}))?;
    case.reaches(Pod(EDGE), &service.url("tcp"), &ALL)?;
    let removed = service.url("http");
    let service = case.service("svc", json!({"ports": [all[1]]}))?;
    case.no_such_port(Pod(EDGE), &removed)?;
    case.reaches(Pod(EDGE), &service.url("tcp"), &ALL)
}

fn up_and_down(case: &Case<'_>) -> Result<()> {
    let one = case.service("one", json!({}))?;
    let two = case.service("two", json!({"selector": {"app": "server", "node": "edge-b1"}}))?;
    case.reaches(Node("cloud-2"), &one.url("http"), &ALL)?;
    case.reaches(Pod(EDGE), &two.url("http"), &["server-edge-b1"])?;
    case.delete(&format!("service {}", one.name))?;
    case.silent(Node("cloud-2"), &one.url("http"))?;
    case.reaches(Pod(EDGE), &two.url("http"), &["server-edge-b1"])?;
    let three = case.service("three", json!({}))?;
    case.reaches(Pod(EDGE), &three.url("http"), &ALL)?;
    case.reaches(Pod(EDGE), &two.url("http"), &["server-edge-b1"])
}

fn recreated(case: &Case<'_>) -> Result<()> {
    let service = case.service("svc", json!({}))?;
    case.reaches(Pod(EDGE), &service.url("http"), &ALL)?;
    case.field.kubectl(&format!("delete service {}", service.name), "")?;
    case.silent(Pod(EDGE), &service.url("http"))?;
    let again = case.service("svc", json!({"clusterIP": service.ip()}))?;
    ensure!(again.ip() == service.ip(), "another address: {}", again.ip());
    case.reaches(Pod(EDGE), &again.url("http"), &ALL)
}

fn agent_restarts(case: &Case<'_>) -> Result<()> {
    let before = case.service("before", json!({}))?;
    case.reaches(Pod(EDGE), &before.url("http"), &ALL)?;
    case.daemon("edge-a1", "agent", |_| Ok(()))?;
    case.reaches(Pod(EDGE), &before.url("http"), &ALL)?;
    calls_go_on(case, "cloud-2")?;
    let after = case.service("after", json!({}))?;
    case.reaches(Pod(EDGE), &after.url("http"), &ALL)?;
    case.reaches(Pod(NEAR), &after.url("http"), &ALL)
}

/// Calls that a node sends straight to an endpoint don't notice that its agent is killed, is away, and comes back: new ones, those
/// of an open connection, of a UDP socket that is kept, and of clients outside of the cluster.
fn calls_go_on(case: &Case<'_>, node: &str) -> Result<()> {
    let selector = json!({"app": "server", "node": "cloud-1"});
    let service = case.service("direct", json!({"type": "NodePort", "selector": selector}))?;
    let pod = format!("client-{node}");
    let address = case.field.address(node)?;
    let mut streams = Vec::new();
    for (from, url, keep) in [
        (Pod(&pod), service.url("http"), false),
        (Node(node), service.url("http"), false),
        (Pod(&pod), service.url("udp"), false),
        (Pod(&pod), service.url("tcp"), true),
        (Pod(&pod), service.url("udp"), true),
        (Outside, service.node_url(address, "http"), false),
        (Outside, service.node_url(address, "udp"), true),
    ] {
        case.reaches(from, &url, &["server-cloud-1"])?;
        let keep: &[&str] = if keep { &["--keep"] } else { &[] };
        let stream = case.stream(from, &[&["--every", "5", "--timeout", "2000"], keep].concat(), &url)?;
        streams.push((format!("{from:?} {url} {keep:?}"), stream));
    }
    go_on(case, &streams)?;
    case.daemon(node, "agent", |case| go_on(case, &streams))?;
    case.service("meanwhile", json!({}))?;
    go_on(case, &streams)
}

/// Waits until each stream had many more answers; none may have failed.
fn go_on(case: &Case<'_>, streams: &[(String, Stream)]) -> Result<()> {
    for (name, stream) in streams {
        let before = stream.outcomes().len();
        case.until(&format!("{name} goes on"), Duration::from_secs(20), || {
            let outcomes = stream.outcomes();
            ensure!(outcomes.len() >= before + 100, "{} answers, {before} of them before", outcomes.len());
            Ok(())
        })?;
        let outcomes = stream.outcomes();
        let failed: Vec<_> = outcomes.iter().filter_map(|outcome| outcome.as_ref().err()).collect();
        ensure!(failed.is_empty(), "{name}: {} of {} failed: {:?}", failed.len(), outcomes.len(), failed[0]);
    }
    Ok(())
}

fn hub_restarts(case: &Case<'_>) -> Result<()> {
    let before = case.service("before", json!({}))?;
    case.reaches(Pod(EDGE), &before.url("http"), &ALL)?;
    case.daemon("hub", "hub", |case| case.reaches(Pod(EDGE), &before.url("http"), &ALL))?;
    case.reaches(Pod(EDGE), &before.url("http"), &ALL)?;
    let after = case.until("the API takes a Service", Duration::from_secs(30), || case.service("after", json!({})))?;
    case.reaches(Pod(EDGE), &after.url("http"), &ALL)?;
    case.reaches(Pod(NEAR), &after.url("http"), &ALL)
}

fn source_address(case: &Case<'_>) -> Result<()> {
    let service = case.service("svc", json!({"selector": {"app": "server", "node": "cloud-1"}}))?;
    for client in ["client-cloud-1", "client-cloud-2"] {
        case.reaches(Pod(client), &service.url("http"), &["server-cloud-1"])?;
        for port in ["http", "tcp", "udp"] {
            case.sees(Pod(client), &service.url(port), case.field.pod_ip(client)?)?;
        }
    }
    Ok(())
}

fn hairpin(case: &Case<'_>) -> Result<()> {
    for node in ["cloud-1", "edge-a1"] {
        let pod = format!("server-{node}");
        let service = case.service(node, json!({"selector": {"app": "server", "node": node}}))?;
        for port in ["http", "tcp", "udp"] {
            case.reaches(Pod(&pod), &service.url(port), &[&pod])?;
        }
    }
    Ok(())
}

fn no_endpoints(case: &Case<'_>) -> Result<()> {
    let service = case.service("svc", json!({"selector": {"case": case.id}}))?;
    for from in [Pod(NEAR), Pod(EDGE), Node("cloud-1"), Node("edge-a1")] {
        for port in ["http", "udp"] {
            case.refused(from, &service.url(port))?;
        }
    }
    Ok(())
}

/// An evicted pod stays as an object that has failed.
fn evicted_pods(case: &Case<'_>) -> Result<()> {
    let name = case.name("evicted");
    let service = case.service("svc", json!({"selector": {"case": case.id}}))?;
    let mut pod = manifests::pod(&name, "cloud-1", &[("case", &case.id)], &[]);
    pod["spec"]["restartPolicy"] = json!("Never");
    pod["spec"]["containers"][0]["command"] = json!(["/bin/false"]);
    case.field.apply(&[pod])?;
    case.until("the pod has failed", Duration::from_secs(20), || {
        let pod = case.field.get(&format!("pod {name}"))?;
        ensure!(pod["status"]["phase"] == "Failed", "{}", pod["status"]);
        Ok(())
    })?;
    case.refused(Pod(EDGE), &service.url("http"))?;
    case.refused(Node("cloud-1"), &service.url("http"))
}

fn other_proxy(case: &Case<'_>) -> Result<()> {
    label_takes_it_away(case, "service.kubernetes.io/service-proxy-name", "other")
}

fn headless_label(case: &Case<'_>) -> Result<()> {
    label_takes_it_away(case, "service.kubernetes.io/headless", "")
}

/// A Service that has the label from the start is not served; one that gets it no longer is, and is again without it.
fn label_takes_it_away(case: &Case<'_>, label: &str, value: &str) -> Result<()> {
    let labelled = json!({"labels": {label: value}});
    let never = case.service_with("never", labelled.clone(), json!({}))?;
    let sometimes = case.service("sometimes", json!({}))?;
    case.reaches(Pod(EDGE), &sometimes.url("http"), &ALL)?;
    case.silent(Pod(EDGE), &never.url("http"))?;
    case.service_with("sometimes", labelled, json!({}))?;
    case.silent(Pod(EDGE), &sometimes.url("http"))?;
    case.service("sometimes", json!({}))?;
    case.reaches(Pod(EDGE), &sometimes.url("http"), &ALL)
}

fn unready_published(case: &Case<'_>) -> Result<()> {
    let name = case.name("pod");
    let spec = |publish: bool| json!({"selector": {"case": case.id}, "publishNotReadyAddresses": publish});
    case.pod(manifests::unready(manifests::pod(&name, "cloud-1", &[("case", &case.id)], &[])))?;
    let service = case.service("svc", spec(false))?;
    case.refused(Pod(EDGE), &service.url("http"))?;
    case.service("svc", spec(true))?;
    case.reaches(Pod(EDGE), &service.url("http"), &[&name])?;
    let names = case.shell(EDGE, &format!("nslookup -type=a {}.conformance.svc.cluster.local", service.name))?;
    ensure!(names.contains(service.ip()), "{names}");
    case.service("svc", spec(false))?;
    case.refused(Pod(EDGE), &service.url("http"))
}

fn unready_and_terminating_published(case: &Case<'_>) -> Result<()> {
    let (unready, ending) = unready_and_ending(case)?;
    let service = case.service("svc", json!({"selector": {"case": case.id}, "publishNotReadyAddresses": true}))?;
    case.terminating(&service, true)?;
    for from in [Pod(EDGE), Node("cloud-2")] {
        case.reaches(from, &service.url("http"), &[&unready, &ending])?;
    }
    Ok(())
}

fn unready_not_published(case: &Case<'_>) -> Result<()> {
    let name = case.name("unready");
    case.pod(manifests::unready(manifests::pod(&name, "cloud-1", &[("case", &case.id)], &["--linger", "60"])))?;
    case.delete(&format!("pod {name} --grace-period=60"))?;
    let service = case.service("svc", json!({"selector": {"case": case.id}}))?;
    case.terminating(&service, false)?;
    for from in [Pod(EDGE), Node("cloud-2")] {
        case.refused(from, &service.url("http"))?;
    }
    Ok(())
}

/// A pod that is not ready, and one that is ending.
fn unready_and_ending(case: &Case<'_>) -> Result<(String, String)> {
    let (unready, ending) = (case.name("unready"), case.name("ending"));
    case.field.apply(&[
        manifests::unready(manifests::pod(&unready, "cloud-1", &[("case", &case.id)], &[])),
        manifests::pod(&ending, "edge-b1", &[("case", &case.id)], &["--linger", "60"]),
    ])?;
    case.running(&unready)?;
    case.running(&ending)?;
    case.delete(&format!("pod {ending} --grace-period=60"))?;
    Ok((unready, ending))
}

fn delete_collection(case: &Case<'_>) -> Result<()> {
    let labels = json!({"labels": {"case": case.id}});
    for of in ["one", "two", "three"] {
        case.service_with(of, labels.clone(), json!({}))?;
    }
    let kept = case.service("kept", json!({}))?;
    case.field.kubectl(&format!("delete services -l case={}", case.id), "")?;
    let left = case.field.get(&format!("services -l case={}", case.id))?;
    ensure!(left["items"] == json!([]), "{left}");
    case.now(&kept).map(drop)
}

fn status_lifecycle(case: &Case<'_>) -> Result<()> {
    let service = case.service("svc", json!({"type": "LoadBalancer"}))?;
    let object = format!("service/{}", service.name);
    let patched = case.patch(
        &format!("{object} --subresource=status"),
        &json!({"status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.200"}]}}}),
    )?;
    ensure!(patched["status"]["loadBalancer"]["ingress"][0]["ip"] == "203.0.113.200", "{patched}");
    let updated = case.patch(
        &format!("{object} --subresource=status"),
        &json!({"status": {"conditions": [
            {"type": "Checked", "status": "True", "reason": "Row", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}]}}),
    )?;
    ensure!(updated["status"]["conditions"][0]["type"] == "Checked", "{updated}");
    let spec =
        case.patch(&object, &json!({"metadata": {"annotations": {"row": "patched"}}, "status": {"conditions": null}}))?;
    ensure!(spec["status"]["conditions"][0]["type"] == "Checked", "the status is a subresource: {spec}");
    case.delete(&object)
}
