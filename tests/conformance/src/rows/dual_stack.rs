//! Dual-stack: nodes, pods and Services with addresses of both families, and what holds for a Service's first address repeated for
//! its second one.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{affinity, dns, granular};
use crate::{
    callers::From::{Outside, Pod},
    case::{
        Case,
        Family::{Primary, Secondary},
        Row, Service,
    },
    field::NODES,
    manifests,
};

const ALL: [&str; 4] = ["server-cloud-1", "server-cloud-2", "server-edge-a1", "server-edge-b1"];
/// One client beside other endpoints, one where all but one are in other networks.
const CLIENTS: [&str; 2] = ["client-cloud-2", "client-edge-a1"];

pub(super) const ROWS: &[Row] = &[
    Row::new("[Feature:IPv6DualStack] should have ipv4 and ipv6 internal node ip", node_addresses),
    Row::new("[Feature:IPv6DualStack] should create pod, add ipv6 and ipv4 ip to pod ips", pod_addresses),
    Row::new("[Feature:IPv6DualStack] should be able to reach pod on ipv4 and ipv6 ip", pods),
    Row::new(
        "[Feature:IPv6DualStack] should create a single stack service with cluster ip from primary service range",
        |case| created(case, json!({}), &["IPv4"], "SingleStack"),
    ),
    Row::new("[Feature:IPv6DualStack] should create service with ipv4 cluster ip", |case| {
        created(case, json!({"ipFamilies": ["IPv4"]}), &["IPv4"], "SingleStack")
    }),
    Row::new("[Feature:IPv6DualStack] should create service with ipv6 cluster ip", |case| {
        created(case, json!({"ipFamilies": ["IPv6"]}), &["IPv6"], "SingleStack")
    }),
    Row::new("[Feature:IPv6DualStack] should create service with ipv4,v6 cluster ip", |case| {
        both(case, ["IPv4", "IPv6"])
    }),
    Row::new("[Feature:IPv6DualStack] should create service with ipv6,v4 cluster ip", |case| {
        both(case, ["IPv6", "IPv4"])
    }),
    Row::new(
        "[Feature:IPv6DualStack] should create service with ipv4,v6 cluster ip (from a single stack one, and back)",
        changed,
    ),
    Row::new(
        "[Feature:IPv6DualStack] Granular Checks: Services Secondary IP Family [LinuxOnly] should function for pod-Service: http",
        |case| granular::from_pods(case, Secondary, "http"),
    ),
    Row::new(
        "[Feature:IPv6DualStack] Granular Checks: Services Secondary IP Family [LinuxOnly] should function for pod-Service: udp",
        |case| granular::from_pods(case, Secondary, "udp"),
    ),
    Row::new(
        "[Feature:IPv6DualStack] Granular Checks: Services Secondary IP Family [LinuxOnly] should function for node-Service: http",
        |case| granular::from_nodes(case, Secondary, "http"),
    ),
    Row::new(
        "[Feature:IPv6DualStack] Granular Checks: Services Secondary IP Family [LinuxOnly] should function for node-Service: udp",
        |case| granular::from_nodes(case, Secondary, "udp"),
    ),
    Row::new(
        "[Feature:IPv6DualStack] Granular Checks: Services Secondary IP Family [LinuxOnly] should function for endpoint-Service: http",
        |case| granular::from_endpoints(case, Secondary, "http"),
    ),
    Row::new(
        "[Feature:IPv6DualStack] Granular Checks: Services Secondary IP Family [LinuxOnly] should function for endpoint-Service: udp",
        |case| granular::from_endpoints(case, Secondary, "udp"),
    ),
    Row::new(
        "[Feature:IPv6DualStack] Granular Checks: Services Secondary IP Family [LinuxOnly] should update endpoints: http",
        |case| granular::endpoints_change(case, Secondary, "http"),
    ),
    Row::new(
        "[Feature:IPv6DualStack] Granular Checks: Services Secondary IP Family [LinuxOnly] should update endpoints: udp",
        |case| granular::endpoints_change(case, Secondary, "udp"),
    ),
    Row::new(
        "[Feature:IPv6DualStack] Granular Checks: Services Secondary IP Family [LinuxOnly] should function for client IP based session affinity: http [LinuxOnly]",
        |case| sticks(case, "http"),
    ),
    Row::new(
        "[Feature:IPv6DualStack] Granular Checks: Services Secondary IP Family [LinuxOnly] should function for client IP based session affinity: udp [LinuxOnly]",
        |case| sticks(case, "udp"),
    ),
    Row::new(
        "[Feature:IPv6DualStack] Granular Checks: Services Secondary IP Family [LinuxOnly] should be able to handle large requests: http",
        |case| granular::large_http(case, Secondary),
    ),
    Row::new(
        "[Feature:IPv6DualStack] Granular Checks: Services Secondary IP Family [LinuxOnly] should be able to handle large requests: udp",
        |case| granular::large_udp(case, Secondary),
    ),
    Row::new(
        "[Feature:IPv6DualStack] Granular Checks: Services Secondary IP Family [LinuxOnly] should function for service endpoints using hostNetwork",
        |case| granular::host_network(case, Secondary),
    ),
    Row::new(
        "Services should be able to create a functioning NodePort service [Conformance] (of the secondary family, callers from outside)",
        from_outside,
    ),
    Row::new("DNS should provide DNS for services [Conformance] (of the secondary family)", names),
];

fn family(text: &Value) -> Result<&'static str> {
    let address: IpAddr = text.as_str().context("an address")?.parse()?;
    Ok(if address.is_ipv4() { "IPv4" } else { "IPv6" })
}

fn families(list: &Value, field: &str) -> Result<Vec<&'static str>> {
    list.as_array()
        .into_iter()
        .flatten()
        .map(|item| family(if field.is_empty() { item } else { &item[field] }))
        .collect()
}

fn node_addresses(case: &Case<'_>) -> Result<()> {
    for node in NODES {
        let node = case.field.get(&format!("node {node}"))?;
        let addresses = node["status"]["addresses"].as_array().cloned().unwrap_or_default();
        let internal = json!(addresses.iter().filter(|address| address["type"] == "InternalIP").collect::<Vec<_>>());
        ensure!(families(&internal, "address")? == ["IPv4", "IPv6"], "{internal}");
        ensure!(node["spec"]["podCIDRs"].as_array().is_some_and(|ranges| ranges.len() == 2), "{}", node["spec"]);
    }
    Ok(())
}

fn pod_addresses(case: &Case<'_>) -> Result<()> {
    for node in ["cloud-1", "edge-b1"] {
        let name = case.name(node);
        let first = case.pod(manifests::pod(&name, node, &[], &[]))?;
        let status = &case.field.get(&format!("pod {name}"))?["status"];
        ensure!(
            families(&status["podIPs"], "ip")? == ["IPv4", "IPv6"] && status["podIPs"][0]["ip"] == first,
            "{status}"
        );
        ensure!(families(&status["hostIPs"], "ip")? == ["IPv4", "IPv6"], "{status}");
        let own = case.shell(&name, "cat /etc/hosts")?;
        let second = status["podIPs"][1]["ip"].as_str().unwrap_or_default();
        ensure!(own.contains(&first) && own.contains(second), "{own}");
    }
    Ok(())
}

/// Every pod from every node, in the network and across networks.
fn pods(case: &Case<'_>) -> Result<()> {
    for client in NODES.map(|node| format!("client-{node}")) {
        for server in ALL {
            for family in [Primary, Secondary] {
                let address = case.field.pod_ip_of(server, family)?;
                let address = if family == Secondary { format!("[{address}]") } else { address.to_owned() };
                case.reaches(Pod(&client), &format!("http://{address}:{}/", manifests::HTTP), &[server])?;
                case.reaches(Pod(&client), &format!("udp://{address}:{}", manifests::ECHO), &[server])?;
            }
        }
    }
    Ok(())
}

/// The Service has these families in this order, an address and a slice for each, and answers at every one.
fn has(case: &Case<'_>, service: &Service, wanted: &[&str], policy: &str) -> Result<()> {
    let spec = &service.object["spec"];
    ensure!(spec["ipFamilies"] == json!(wanted) && spec["ipFamilyPolicy"] == policy, "{spec}");
    ensure!(families(&spec["clusterIPs"], "")? == wanted && spec["clusterIP"] == spec["clusterIPs"][0], "{spec}");
    case.until(&format!("{} has endpoints of {wanted:?}", service.name), Duration::from_secs(15), || {
        let slices = case.field.get(&format!("endpointslices -l kubernetes.io/service-name={}", service.name))?;
        let mut found: BTreeMap<String, usize> = BTreeMap::new();
        for slice in slices["items"].as_array().into_iter().flatten() {
            let kind = slice["addressType"].as_str().unwrap_or_default();
            let endpoints = slice["endpoints"].as_array().into_iter().flatten();
            let of: BTreeSet<_> = endpoints.map(|one| family(&one["addresses"][0])).collect::<Result<_>>()?;
            ensure!(of == BTreeSet::from([kind]), "{slice}");
            *found.entry(kind.to_owned()).or_default() += slice["endpoints"].as_array().map_or(0, Vec::len);
        }
        ensure!(found == wanted.iter().map(|kind| ((*kind).to_owned(), ALL.len())).collect(), "{found:?}");
        Ok(())
    })?;
    for address in spec["clusterIPs"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        for client in CLIENTS {
            case.reaches(Pod(client), &service.url_at(address, "http"), &ALL)?;
        }
    }
    Ok(())
}

fn created(case: &Case<'_>, spec: Value, wanted: &[&str], policy: &str) -> Result<()> {
    let service = case.service("svc", spec)?;
    has(case, &service, wanted, policy)
}

fn both(case: &Case<'_>, wanted: [&str; 2]) -> Result<()> {
    created(case, json!({"ipFamilies": wanted, "ipFamilyPolicy": "RequireDualStack"}), &wanted, "RequireDualStack")
}

fn changed(case: &Case<'_>) -> Result<()> {
    let single = case.service("svc", json!({}))?;
    let object = format!("service {}", single.name);
    case.patch(&object, &json!({"spec": {"ipFamilyPolicy": "PreferDualStack"}}))?;
    let dual = case.now(&single)?;
    ensure!(dual.ip() == single.ip(), "{} became {}", single.ip(), dual.ip());
    has(case, &dual, &["IPv4", "IPv6"], "PreferDualStack")?;
    let second = dual.url_at(dual.ip_of(Secondary), "http");
    case.patch(&object, &json!({"spec": {"ipFamilyPolicy": "SingleStack"}}))?;
    has(case, &case.now(&single)?, &["IPv4"], "SingleStack")?;
    CLIENTS.iter().try_for_each(|client| case.silent(Pod(client), &second))
}

fn sticks(case: &Case<'_>, port: &str) -> Result<()> {
    let service = case.service("svc", json!({"ipFamilyPolicy": "RequireDualStack", "sessionAffinity": "ClientIP"}))?;
    let url = service.url_at(service.ip_of(Secondary), port);
    for client in CLIENTS {
        let first = affinity::sticks(case, Pod(client), &url)?;
        ensure!(first == affinity::sticks(case, Pod(client), &url)?, "{client} got another endpoint");
    }
    Ok(())
}

/// Both traffic policies; with `Local` the pod sees who calls.
fn from_outside(case: &Case<'_>) -> Result<()> {
    let service = case.service("svc", json!({"type": "NodePort", "ipFamilyPolicy": "RequireDualStack"}))?;
    for node in ["cloud-1", "cloud-2"] {
        let address = case.field.address_of(node, Secondary)?;
        for port in ["http", "tcp", "udp"] {
            case.reaches(Outside, &service.node_url(address, port), &ALL)?;
        }
    }
    let local = json!({"type": "NodePort", "ipFamilyPolicy": "RequireDualStack", "externalTrafficPolicy": "Local"});
    let local = case.service("local", local)?;
    let url = local.node_url(case.field.address_of("cloud-1", Secondary)?, "http");
    case.reaches(Outside, &url, &["server-cloud-1"])?;
    case.sees(Outside, &url, case.field.address_of("client", Secondary)?)
}

fn names(case: &Case<'_>) -> Result<()> {
    let plain = case.service("plain", Secondary.spec())?;
    let headless = case.service("headless", json!({"clusterIP": "None", "ipFamilyPolicy": "RequireDualStack"}))?;
    let [plain_name, headless_name] = [&plain, &headless].map(|service| format!("{}.{}", service.name, dns::ZONE));
    dns::answers(case, &CLIENTS, "aaaa", &plain_name, &[plain.ip_of(Secondary)])?;
    dns::answers(case, &CLIENTS, "a", &plain_name, &[plain.ip()])?;
    dns::answers(case, &CLIENTS, "ptr", &dns::arpa(plain.ip_of(Secondary)), &[&plain_name])?;
    let ips: Vec<_> = ALL.iter().map(|server| case.field.pod_ip_of(server, Secondary)).collect::<Result<_>>()?;
    dns::answers(case, &CLIENTS, "aaaa", &headless_name, &ips)?;
    // By its name alone, a Service that has no IPv4 address.
    let six = case.service("six", json!({"ipFamilies": ["IPv6"]}))?;
    CLIENTS.iter().try_for_each(|client| case.reaches(Pod(client), &format!("http://{}/", six.name), &ALL))
}
