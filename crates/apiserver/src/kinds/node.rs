//! Nodes.

use std::collections::HashSet;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use serde_json::{Value, json};

use super::built_in::{AGE, BuiltIn, NAME, column, wide};
use super::field_error::Errors;
use super::{built_in, decode, merge_keys, names, quantity, tables};

pub(crate) static NODE: BuiltIn = BuiltIn {
    group: "",
    version: "v1",
    plural: "nodes",
    singular: "node",
    kind: "Node",
    short_names: &["no"],
    categories: &[],
    namespaced: false,
    status: true,
    scale: false,
    generation: false,
    keeps_status_on_create: true,
    graceful: false,
    columns: &[
        NAME,
        column("Status", "string", "The status of the node"),
        column("Roles", "string", "The roles of the node"),
        AGE,
        column("Version", "string", "Version of the node's agent."),
        wide("Internal-IP", "Address inside the node's network."),
        wide("External-IP", "Address outside of it."),
        wide("OS-Image", "Operating system."),
        wide("Kernel-Version", "Kernel."),
        wide("Container-Runtime", "What runs its containers."),
    ],
    selectable: &["spec.unschedulable"],
    merge_keys: merge_keys::NODE,
    typed: decode::typed::<Node>,
    schema: built_in::schema::<Node>(),
    default,
    validate,
    prepare_update: super::built_in::no_prepare,
    validate_update,
    cells,
};

/// Of the two forms of its pod range and of its resources, one fills the other.
fn default(object: &mut Value) {
    if object["spec"].is_null() {
        object["spec"] = json!({});
    }
    let (one, many) = (object["spec"]["podCIDR"].clone(), object["spec"]["podCIDRs"].clone());
    match (one.as_str(), many[0].as_str()) {
        (Some(cidr), None) if !cidr.is_empty() => object["spec"]["podCIDRs"] = json!([cidr]),
        (None | Some(""), Some(cidr)) => object["spec"]["podCIDR"] = json!(cidr),
        _ => {}
    }
    if object["status"]["allocatable"].is_null() && object["status"]["capacity"].is_object() {
        object["status"]["allocatable"] = object["status"]["capacity"].clone();
    }
}

fn validate(object: &Value, errors: &mut Errors) {
    let spec = &object["spec"];
    let cidrs: Vec<&str> = spec["podCIDRs"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    for (i, cidr) in cidrs.iter().enumerate() {
        if !is_cidr(cidr) {
            errors.invalid(
                format!("spec.podCIDRs[{i}]"),
                *cidr,
                "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)",
            );
        }
    }
    let of_ipv6 = cidrs.iter().filter(|cidr| cidr.contains(':')).count();
    if of_ipv6 > 1 || cidrs.len() - of_ipv6 > 1 {
        errors.invalid(
            "spec.podCIDRs",
            spec["podCIDRs"].clone(),
            "may specify no more than one CIDR for each IP family",
        );
    }
    if let (Some(one), Some(first)) = (spec["podCIDR"].as_str(), cidrs.first())
        && one != *first
    {
        errors.invalid("spec.podCIDR", one, "must be the first element of podCIDRs");
    }
    taints(&spec["taints"], errors);
    for part in ["capacity", "allocatable"] {
        quantity::validate_list(&object["status"][part], &format!("status.{part}"), errors);
    }
}

fn taints(taints: &Value, errors: &mut Errors) {
    let mut seen = HashSet::new();
    for (i, taint) in taints.as_array().into_iter().flatten().enumerate() {
        let field = format!("spec.taints[{i}]");
        let (key, effect) = (tables::text(&taint["key"]), tables::text(&taint["effect"]));
        if let Some(problem) = names::qualified_name(key) {
            errors.invalid(format!("{field}.key"), key, problem);
        }
        if let Some(problem) = names::label_value(tables::text(&taint["value"])) {
            errors.invalid(format!("{field}.value"), taint["value"].clone(), problem);
        }
        if effect.is_empty() {
            errors.required(format!("{field}.effect"), "");
        }
        errors.one_of(format!("{field}.effect"), &taint["effect"], &["NoSchedule", "PreferNoSchedule", "NoExecute"]);
        if seen.contains(&(key, effect)) {
            errors.duplicate(field, taint.clone());
        }
        seen.insert((key, effect));
    }
}

/// Whether the text is an address range. Kubernetes takes bits behind the prefix, too: readers pass them over.
pub(crate) fn is_cidr(text: &str) -> bool {
    let Some((address, length)) = text.split_once('/') else { return false };
    let longest = match address.parse::<std::net::IpAddr>() {
        Ok(std::net::IpAddr::V4(_)) => 32,
        Ok(std::net::IpAddr::V6(_)) => 128,
        Err(_) => return false,
    };
    length.parse::<u8>().is_ok_and(|n| n <= longest)
}

fn validate_update(old: &Value, new: &Value, errors: &mut Errors) {
    let (old, new) = (&old["spec"], &new["spec"]);
    if tables::count(&old["podCIDRs"]) > 0 && old["podCIDRs"] != new["podCIDRs"] {
        errors.forbidden("spec.podCIDRs", "node updates may not change podCIDR except from \"\" to valid");
    }
    if !tables::text(&old["providerID"]).is_empty() && old["providerID"] != new["providerID"] {
        errors.forbidden("spec.providerID", "node updates may not change providerID except from \"\" to valid");
    }
}

fn cells(object: &Value, now: Timestamp) -> Vec<Value> {
    let status = &object["status"];
    let ready = status["conditions"].as_array().into_iter().flatten().find(|c| c["type"] == json!("Ready"));
    let mut words = match ready.map(|c| tables::text(&c["status"])) {
        Some("True") => "Ready".to_owned(),
        Some(_) => "NotReady".to_owned(),
        None => "Unknown".to_owned(),
    };
    if object["spec"]["unschedulable"] == json!(true) {
        words.push_str(",SchedulingDisabled");
    }
    let address = |kind: &str| {
        status["addresses"]
            .as_array()
            .into_iter()
            .flatten()
            .find(|a| a["type"] == json!(kind))
            .map_or_else(|| "<none>".to_owned(), |a| tables::text(&a["address"]).to_owned())
    };
    let info = &status["nodeInfo"];
    let known = |value: &Value| match tables::text(value) {
        "" => json!("<unknown>"),
        text => json!(text),
    };
    vec![
        tables::name(object),
        json!(words),
        json!(roles(&object["metadata"]["labels"])),
        tables::age(object, now),
        json!(tables::text(&info["kubeletVersion"])),
        json!(address("InternalIP")),
        json!(address("ExternalIP")),
        known(&info["osImage"]),
        known(&info["kernelVersion"]),
        known(&info["containerRuntimeVersion"]),
    ]
}

/// The roles that its labels name.
fn roles(labels: &Value) -> String {
    let mut roles: Vec<&str> = labels
        .as_object()
        .into_iter()
        .flatten()
        .filter_map(|(key, value)| match key.strip_prefix("node-role.kubernetes.io/") {
            Some(role) => Some(role),
            None if key == "kubernetes.io/role" => value.as_str(),
            None => None,
        })
        .filter(|role| !role.is_empty())
        .collect();
    roles.sort_unstable();
    roles.dedup();
    if roles.is_empty() { "<none>".to_owned() } else { roles.join(",") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds::{Registry, default_object, table_row, validate_create, validate_update};

    #[test]
    fn a_node_is_shown_as_kubectl_shows_it() {
        let info = Registry::built_in().lookup("", "v1", "nodes").unwrap();
        let node = json!({"metadata": {"name": "a", "creationTimestamp": "2024-01-01T00:00:00Z",
                "labels": {"node-role.kubernetes.io/edge": "", "node-role.kubernetes.io/agent": ""}},
            "spec": {"unschedulable": true},
            "status": {"conditions": [{"type": "Ready", "status": "True"}],
                "addresses": [{"type": "InternalIP", "address": "10.0.0.1"}],
                "nodeInfo": {"kubeletVersion": "v1", "osImage": "Debian"}}});
        let row = table_row(&info, &node, "2024-01-01T00:05:12Z".parse().unwrap());
        assert_eq!(
            json!(row),
            json!([
                "a",
                "Ready,SchedulingDisabled",
                "agent,edge",
                "5m12s",
                "v1",
                "10.0.0.1",
                "<none>",
                "Debian",
                "<unknown>",
                "<unknown>"
            ])
        );
    }

    #[test]
    fn pod_ranges_and_taints_are_checked() {
        let info = Registry::built_in().lookup("", "v1", "nodes").unwrap();
        let mut node = json!({"metadata": {"name": "a"}, "spec": {"podCIDR": "10.244.1.0/24"}});
        default_object(&info, &mut node);
        assert_eq!(node["spec"]["podCIDRs"], json!(["10.244.1.0/24"]));
        assert!(validate_create(&info, &node).is_empty());
        let mut moved = node.clone();
        moved["spec"] = json!({"podCIDR": "10.244.2.0/24", "podCIDRs": ["10.244.2.0/24"]});
        assert_eq!(
            validate_update(&info, &node, &moved)[0].to_string(),
            "spec.podCIDRs: Forbidden: node updates may not change podCIDR except from \"\" to valid"
        );
        for (cidrs, refused) in [
            (json!(["10.244.1.0/24", "fd00:1::/64"]), false),
            (json!(["10.244.1.7/24"]), false),
            (json!(["10.244.1.0/24", "10.244.2.0/24"]), true),
            (json!(["10.244.1.0/24", "fd00:1::/64", "fd00:2::/64"]), true),
        ] {
            let errors = validate_create(&info, &json!({"metadata": {"name": "a"}, "spec": {"podCIDRs": cidrs}}));
            let found = errors.iter().any(|error| error.to_string().contains("more than one CIDR for each IP family"));
            assert_eq!((found, errors.is_empty()), (refused, !refused), "{cidrs}: {errors:?}");
        }
        let bad = json!({"metadata": {"name": "a"}, "spec": {"podCIDRs": ["10.244.1.0"],
            "taints": [{"key": "a b", "effect": "No"}, {"key": "k"}]}});
        let fields: Vec<_> = validate_create(&info, &bad).into_iter().map(|e| e.field).collect();
        assert_eq!(
            fields,
            ["spec.podCIDRs[0]", "spec.taints[0].key", "spec.taints[0].effect", "spec.taints[1].effect"]
        );
    }
}
