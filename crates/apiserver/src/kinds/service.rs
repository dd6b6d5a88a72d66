//! Services: defaults, what an update keeps, validation and the table row. Addresses and node ports: [`super::allocation`].

pub(crate) mod families;

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Service;
use serde_json::{Value, json};

use super::built_in::{AGE, BuiltIn, NAME, column, wide};
use super::field_error::Errors;
use super::tables::{text, text_or_none};
use super::{built_in, decode, merge_keys, metadata, names, tables};

pub(crate) static SERVICE: BuiltIn = BuiltIn {
    group: "",
    version: "v1",
    plural: "services",
    singular: "service",
    kind: "Service",
    short_names: &["svc"],
    categories: &["all"],
    namespaced: true,
    status: true,
    scale: false,
    generation: false,
    keeps_status_on_create: false,
    graceful: false,
    columns: &[
        NAME,
        column("Type", "string", "How it is exposed."),
        column("Cluster-IP", "string", "Its address in the cluster."),
        column("External-IP", "string", "Its addresses outside of the cluster, or the name that it stands for."),
        column("Port(s)", "string", "Ports, with their node ports."),
        AGE,
        wide("Selector", "Which pods serve it."),
    ],
    selectable: &["spec.clusterIP", "spec.type"],
    merge_keys: merge_keys::SERVICE,
    typed: decode::typed::<Service>,
    schema: built_in::schema::<Service>(),
    default,
    validate,
    prepare_update,
    validate_update,
    cells,
};

fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

/// `None` as the cluster IP: DNS answers with the endpoints themselves.
pub(crate) fn is_headless(spec: &Value) -> bool {
    spec["clusterIP"] == json!("None") || spec["clusterIPs"][0] == json!("None")
}

/// Whether the type has an address in the cluster.
pub(crate) fn has_cluster_ip(spec: &Value) -> bool {
    matches!(text(&spec["type"]), "" | "ClusterIP" | "NodePort" | "LoadBalancer")
}

/// Whether the type can open ports on the nodes.
pub(crate) fn can_have_node_ports(spec: &Value) -> bool {
    matches!(text(&spec["type"]), "NodePort" | "LoadBalancer")
}

/// Whether each port is given a node port. Without it, those that are named count nevertheless.
pub(crate) fn wants_node_ports(spec: &Value) -> bool {
    match text(&spec["type"]) {
        "NodePort" => true,
        "LoadBalancer" => spec["allocateLoadBalancerNodePorts"] != json!(false),
        _ => false,
    }
}

/// Values of `trafficDistribution`: the two newer ones are of Kubernetes 1.34, and the mesh follows them.
const DISTRIBUTIONS: [&str; 3] = ["PreferClose", "PreferSameZone", "PreferSameNode"];

/// Whether load balancers ask the nodes at a port of their own which of them has endpoints.
pub(crate) fn needs_health_check(spec: &Value) -> bool {
    text(&spec["type"]) == "LoadBalancer" && text(&spec["externalTrafficPolicy"]) == "Local"
}

fn is_external(spec: &Value) -> bool {
    matches!(text(&spec["type"]), "NodePort" | "LoadBalancer") || !list(&spec["externalIPs"]).is_empty()
}

fn default(object: &mut Value) {
    let spec = &mut object["spec"];
    let set = |spec: &mut Value, field: &str, value: Value| {
        if spec[field].is_null() || spec[field] == json!("") {
            spec[field] = value;
        }
    };
    set(spec, "type", json!("ClusterIP"));
    set(spec, "sessionAffinity", json!("None"));
    if spec["sessionAffinity"] == json!("ClientIP") {
        if spec["sessionAffinityConfig"]["clientIP"]["timeoutSeconds"].is_null() {
            spec["sessionAffinityConfig"]["clientIP"]["timeoutSeconds"] = json!(10800);
        }
    } else if let Some(map) = spec.as_object_mut() {
        map.shift_remove("sessionAffinityConfig");
    }
    for port in spec.get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
        set(port, "protocol", json!("TCP"));
        if matches!(&port["targetPort"], Value::Null)
            || port["targetPort"] == json!(0)
            || port["targetPort"] == json!("")
        {
            port["targetPort"] = port["port"].clone();
        }
    }
    if has_cluster_ip(spec) {
        set(spec, "internalTrafficPolicy", json!("Cluster"));
        match (text(&spec["clusterIP"]).to_owned(), text(&spec["clusterIPs"][0]).to_owned()) {
            (one, many) if !one.is_empty() && many.is_empty() => spec["clusterIPs"] = json!([one]),
            (one, many) if one.is_empty() && !many.is_empty() => spec["clusterIP"] = json!(many),
            _ => {}
        }
    }
    if is_external(spec) {
        set(spec, "externalTrafficPolicy", json!("Cluster"));
    }
    if spec["type"] == json!("LoadBalancer") {
        set(spec, "allocateLoadBalancerNodePorts", json!(true));
    }
    if object["status"]["loadBalancer"].is_null() {
        object["status"]["loadBalancer"] = json!({});
    }
}

/// What an update keeps and gives back: addresses and node ports that it doesn't mention stay, those that the new type
/// doesn't have go (Kubernetes `patchAllocatedValues`, `dropTypeDependentFields`).
fn prepare_update(old: &Value, new: &mut Value) {
    let (before, after) = (&old["spec"], &mut new["spec"]);
    if !after.is_object() {
        return;
    }
    let remove = |after: &mut Value, field: &str| {
        if let Some(map) = after.as_object_mut() {
            map.shift_remove(field);
        }
    };
    if has_cluster_ip(before) && has_cluster_ip(after) {
        keep_cluster_ips(before, after);
    } else if has_cluster_ip(before) {
        for field in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy", "internalTrafficPolicy"] {
            if after[field] == before[field] {
                remove(after, field);
            }
        }
    }
    let keeps = can_have_node_ports(before) && wants_node_ports(after);
    let drops = can_have_node_ports(before) && !can_have_node_ports(after);
    let used: HashSet<i64> = list(&after["ports"]).iter().filter_map(|p| p["nodePort"].as_i64()).collect();
    // A port is known by its name: all else of it may have been changed.
    let had: HashMap<&str, i64> =
        list(&before["ports"]).iter().filter_map(|p| Some((text(&p["name"]), p["nodePort"].as_i64()?))).collect();
    for port in after.get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
        let Some(node_port) = had.get(text(&port["name"])).copied() else { continue };
        let wanted = port["nodePort"].as_i64().unwrap_or(0);
        if keeps && wanted == 0 && !used.contains(&node_port) {
            port["nodePort"] = json!(node_port);
        } else if drops && wanted == node_port {
            remove(port, "nodePort");
        }
    }
    if is_external(before) && !is_external(after) && after["externalTrafficPolicy"] == before["externalTrafficPolicy"] {
        remove(after, "externalTrafficPolicy");
    }
    if needs_health_check(before) {
        let unset = after["healthCheckNodePort"].as_i64().unwrap_or(0) == 0;
        if needs_health_check(after) && unset {
            after["healthCheckNodePort"] = before["healthCheckNodePort"].clone();
        } else if !needs_health_check(after) && after["healthCheckNodePort"] == before["healthCheckNodePort"] {
            remove(after, "healthCheckNodePort");
        }
    }
    if before["type"] == json!("LoadBalancer") && after["type"] != json!("LoadBalancer") {
        remove(after, "allocateLoadBalancerNodePorts");
        remove(after, "loadBalancerClass");
    }
    if before["type"] == json!("ExternalName")
        && after["type"] != before["type"]
        && after["externalName"] == before["externalName"]
    {
        remove(after, "externalName");
    }
}

/// Who writes one of the two forms of the address means both; who writes neither, or empties one, keeps the old one.
fn keep_cluster_ips(before: &Value, after: &mut Value) {
    let one = text(&after["clusterIP"]);
    let same_list = after["clusterIPs"] == before["clusterIPs"];
    let no_list = text(&after["clusterIPs"][0]).is_empty();
    if (one.is_empty() && (same_list || no_list)) || (no_list && after["clusterIP"] == before["clusterIP"]) {
        for field in ["clusterIP", "clusterIPs"] {
            if !before[field].is_null() {
                after[field] = before[field].clone();
            }
        }
    } else if same_list && after["clusterIP"] != before["clusterIP"] {
        after["clusterIPs"] = json!([one]);
    }
}

fn validate(object: &Value, errors: &mut Errors) {
    let spec = &object["spec"];
    let kind = text(&spec["type"]);
    if kind.is_empty() {
        errors.required("spec.type", "");
    }
    errors.one_of("spec.type", &spec["type"], &["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"]);
    let ports = list(&spec["ports"]);
    if ports.is_empty() && kind != "ExternalName" && !is_headless(spec) {
        errors.required("spec.ports", "");
    }
    if kind == "ExternalName" {
        let name = text(&spec["externalName"]);
        if name.is_empty() {
            errors.required("spec.externalName", "");
        } else if let Some(problem) = names::dns_subdomain(name.strip_suffix('.').unwrap_or(name)) {
            errors.invalid("spec.externalName", name, problem);
        }
        if !text(&spec["clusterIP"]).is_empty() {
            errors.forbidden("spec.clusterIP", "may not be set when `type` is 'ExternalName'");
        }
    } else if kind != "ClusterIP" && is_headless(spec) {
        errors.invalid("spec.clusterIPs[0]", "None", format!("may not be set to 'None' for {kind} services"));
    }
    cluster_ips(spec, errors);
    validate_ports(spec, errors);
    metadata::labels(&spec["selector"], "spec.selector", errors);
    errors.one_of("spec.sessionAffinity", &spec["sessionAffinity"], &["ClientIP", "None"]);
    if spec["sessionAffinity"] == json!("ClientIP") {
        let timeout = &spec["sessionAffinityConfig"]["clientIP"]["timeoutSeconds"];
        if !timeout.as_i64().is_some_and(|s| (1..=86400).contains(&s)) {
            errors.invalid(
                "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
                timeout.clone(),
                "must be greater than 0 and less than 86400",
            );
        }
    }
    for (i, address) in list(&spec["externalIPs"]).iter().enumerate() {
        let field = format!("spec.externalIPs[{i}]");
        match text(address).parse::<IpAddr>() {
            Err(_) => {
                errors.invalid(field, address.clone(), "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)")
            }
            Ok(ip) if ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() => {
                errors.invalid(field, address.clone(), "may not be an unspecified, loopback or multicast address");
            }
            Ok(_) => {}
        }
    }
    for (i, range) in list(&spec["loadBalancerSourceRanges"]).iter().enumerate() {
        if !super::node::is_cidr(text(range).trim()) {
            errors.invalid(
                format!("spec.loadBalancerSourceRanges[{i}]"),
                range.clone(),
                "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)",
            );
        }
    }
    if !list(&spec["loadBalancerSourceRanges"]).is_empty() && kind != "LoadBalancer" {
        errors.forbidden("spec.loadBalancerSourceRanges", "may only be used when `type` is 'LoadBalancer'");
    }
    let policies = &["Cluster", "Local"];
    errors.one_of("spec.internalTrafficPolicy", &spec["internalTrafficPolicy"], policies);
    errors.one_of("spec.externalTrafficPolicy", &spec["externalTrafficPolicy"], policies);
    if !spec["externalTrafficPolicy"].is_null() && !is_external(spec) {
        errors.invalid(
            "spec.externalTrafficPolicy",
            spec["externalTrafficPolicy"].clone(),
            "may only be set for externally-accessible services",
        );
    }
    errors.one_of("spec.trafficDistribution", &spec["trafficDistribution"], &DISTRIBUTIONS);
    errors.one_of(
        "spec.ipFamilyPolicy",
        &spec["ipFamilyPolicy"],
        &["PreferDualStack", "RequireDualStack", "SingleStack"],
    );
    for (i, family) in list(&spec["ipFamilies"]).iter().enumerate() {
        errors.one_of(format!("spec.ipFamilies[{i}]"), family, &["IPv4", "IPv6"]);
    }
}

fn cluster_ips(spec: &Value, errors: &mut Errors) {
    let many = list(&spec["clusterIPs"]);
    let one = text(&spec["clusterIP"]);
    if let Some(first) = many.first()
        && text(first) != one
    {
        errors.invalid("spec.clusterIPs", spec["clusterIPs"].clone(), "first value must match `clusterIP`");
    }
    if is_headless(spec) && many.len() > 1 {
        errors.invalid("spec.clusterIPs", spec["clusterIPs"].clone(), "'None' must be the first and only value");
    }
    if many.len() > 2 {
        errors.invalid("spec.clusterIPs", spec["clusterIPs"].clone(), "may only hold up to 2 values");
    }
    if !matches!(one, "" | "None") && one.parse::<IpAddr>().is_err() {
        errors.invalid("spec.clusterIP", one, "must be empty, 'None', or a valid IP address");
    }
    if let Some(second) = many.get(1).filter(|_| !is_headless(spec))
        && text(second).parse::<IpAddr>().is_err()
    {
        errors.invalid("spec.clusterIPs[1]", second.clone(), "must be a valid IP address");
    }
}

fn validate_ports(spec: &Value, errors: &mut Errors) {
    let ports = list(&spec["ports"]);
    let (mut seen_names, mut seen_ports, mut seen_node_ports) = (HashSet::new(), HashSet::new(), HashSet::new());
    for (i, port) in ports.iter().enumerate() {
        let field = format!("spec.ports[{i}]");
        let name = text(&port["name"]);
        if name.is_empty() {
            if ports.len() > 1 {
                errors.required(format!("{field}.name"), "");
            }
        } else if let Some(problem) = names::dns_label(name) {
            errors.invalid(format!("{field}.name"), name, problem);
        } else if seen_names.contains(&name) {
            errors.duplicate(format!("{field}.name"), name);
        }
        seen_names.insert(name);
        let number = port["port"].as_i64().unwrap_or(0);
        if let Some(problem) = names::port_number(number) {
            errors.invalid(format!("{field}.port"), number, problem);
        }
        let protocol = text(&port["protocol"]);
        if protocol.is_empty() {
            errors.required(format!("{field}.protocol"), "");
        }
        errors.one_of(format!("{field}.protocol"), &port["protocol"], &["SCTP", "TCP", "UDP"]);
        super::pod::port_reference(&port["targetPort"], &format!("{field}.targetPort"), errors);
        if let Some(problem) = port["appProtocol"].as_str().and_then(names::qualified_name) {
            errors.invalid(format!("{field}.appProtocol"), port["appProtocol"].clone(), problem);
        }
        if seen_ports.contains(&(number, protocol)) {
            errors.duplicate(&field, json!({"port": number, "protocol": protocol}));
        }
        seen_ports.insert((number, protocol));
        let Some(node_port) = port["nodePort"].as_i64().filter(|n| *n != 0) else { continue };
        if !can_have_node_ports(spec) {
            errors.forbidden(
                format!("{field}.nodePort"),
                format!("may not be used when `type` is '{}'", text(&spec["type"])),
            );
        } else if seen_node_ports.contains(&(node_port, protocol)) {
            errors.duplicate(format!("{field}.nodePort"), node_port);
        }
        seen_node_ports.insert((node_port, protocol));
    }
}

fn validate_update(old: &Value, new: &Value, errors: &mut Errors) {
    let (old, new) = (&old["spec"], &new["spec"]);
    let external = |spec: &Value| spec["type"] == json!("ExternalName");
    if external(old) || external(new) {
        return;
    }
    if !text(&old["clusterIP"]).is_empty() {
        errors.immutable("spec.clusterIP", &old["clusterIP"], &new["clusterIP"]);
    }
    // A second address comes and goes, but isn't exchanged for another in one step.
    if let (Some(before), Some(after)) = (list(&old["clusterIPs"]).get(1), list(&new["clusterIPs"]).get(1)) {
        errors.immutable("spec.clusterIPs[1]", before, after);
    }
    if let (Some(before), Some(after)) = (list(&old["ipFamilies"]).get(1), list(&new["ipFamilies"]).get(1))
        && before != after
    {
        errors.invalid("spec.ipFamilies[1]", after.clone(), "may not change once set");
    }
    if !text(&old["ipFamilies"][0]).is_empty() && old["ipFamilies"][0] != new["ipFamilies"][0] {
        errors.invalid("spec.ipFamilies[0]", new["ipFamilies"][0].clone(), "may not change once set");
    }
}

fn cells(object: &Value, now: Timestamp) -> Vec<Value> {
    let spec = &object["spec"];
    let ports: Vec<String> = list(&spec["ports"])
        .iter()
        .map(|p| {
            let (port, protocol) = (p["port"].as_i64().unwrap_or(0), text(&p["protocol"]));
            match p["nodePort"].as_i64().unwrap_or(0) {
                0 => format!("{port}/{protocol}"),
                node_port => format!("{port}:{node_port}/{protocol}"),
            }
        })
        .collect();
    vec![
        tables::name(object),
        json!(text(&spec["type"])),
        json!(text_or_none(&spec["clusterIP"])),
        json!(external_ip(object)),
        json!(if ports.is_empty() { "<none>".to_owned() } else { ports.join(",") }),
        tables::age(object, now),
        json!(tables::labels(&spec["selector"])),
    ]
}

fn external_ip(object: &Value) -> String {
    let spec = &object["spec"];
    let kind = text(&spec["type"]);
    if kind == "ExternalName" {
        return text(&spec["externalName"]).to_owned();
    }
    let mut addresses: Vec<&str> = Vec::new();
    if kind == "LoadBalancer" {
        for ingress in list(&object["status"]["loadBalancer"]["ingress"]) {
            let ip = text(&ingress["ip"]);
            addresses.push(if ip.is_empty() { text(&ingress["hostname"]) } else { ip });
        }
    }
    addresses.extend(list(&spec["externalIPs"]).iter().map(text));
    match (addresses.is_empty(), kind) {
        (true, "LoadBalancer") => "<pending>".to_owned(),
        (true, _) => "<none>".to_owned(),
        (false, _) => addresses.join(","),
    }
}

#[cfg(test)]
mod tests;
