//! What makes a Pod invalid, and what of it may change (Kubernetes `ValidatePodSpec`, `ValidatePodUpdate`).

mod container;
mod volume;

use std::collections::HashSet;
use std::net::IpAddr;

use serde_json::{Value, json};

pub(crate) use container::port_reference;

use crate::kinds::field_error::Errors;
use crate::kinds::tables::text;
use crate::kinds::workload::not_negative;
use crate::kinds::{metadata, names};

fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

pub(super) fn validate(pod: &Value, errors: &mut Errors) {
    validate_spec(&pod["spec"], "spec", errors);
}

/// Checks a pod's spec, also one in a template; `at` is its path.
pub(crate) fn validate_spec(spec: &Value, at: &str, errors: &mut Errors) {
    let volumes = volume::validate(&spec["volumes"], &format!("{at}.volumes"), errors);
    let mut seen = HashSet::new();
    if list(&spec["containers"]).is_empty() {
        errors.required(format!("{at}.containers"), "");
    }
    for sort in ["containers", "initContainers"] {
        for (i, c) in list(&spec[sort]).iter().enumerate() {
            let field = format!("{at}.{sort}[{i}]");
            let name = text(&c["name"]);
            if seen.contains(&name) {
                errors.duplicate(format!("{field}.name"), name);
            }
            seen.insert(name);
            container::validate(c, sort == "initContainers", &volumes, &field, errors);
        }
    }
    host_ports(spec, at, errors);
    errors.one_of(format!("{at}.restartPolicy"), &spec["restartPolicy"], &["Always", "OnFailure", "Never"]);
    errors.one_of(
        format!("{at}.dnsPolicy"),
        &spec["dnsPolicy"],
        &["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"],
    );
    dns_config(spec, at, errors);
    not_negative(&spec["terminationGracePeriodSeconds"], &format!("{at}.terminationGracePeriodSeconds"), errors);
    if let Some(seconds) = spec["activeDeadlineSeconds"].as_i64()
        && !(1..=i64::from(i32::MAX)).contains(&seconds)
    {
        errors.invalid(format!("{at}.activeDeadlineSeconds"), seconds, "must be between 1 and 2147483647, inclusive");
    }
    for (part, check) in [
        ("nodeName", names::dns_subdomain as fn(&str) -> Option<String>),
        ("serviceAccountName", names::dns_subdomain),
        ("hostname", names::dns_label),
        ("subdomain", names::dns_label),
    ] {
        let value = text(&spec[part]);
        if !value.is_empty()
            && let Some(problem) = check(value)
        {
            errors.invalid(format!("{at}.{part}"), value, problem);
        }
    }
    metadata::labels(&spec["nodeSelector"], &format!("{at}.nodeSelector"), errors);
    tolerations(&spec["tolerations"], &format!("{at}.tolerations"), errors);
    host_aliases(&spec["hostAliases"], &format!("{at}.hostAliases"), errors);
    for (i, gate) in list(&spec["readinessGates"]).iter().enumerate() {
        if let Some(problem) = names::qualified_name(text(&gate["conditionType"])) {
            errors.invalid(format!("{at}.readinessGates[{i}].conditionType"), gate["conditionType"].clone(), problem);
        }
    }
    if !list(&spec["ephemeralContainers"]).is_empty() {
        errors.forbidden(format!("{at}.ephemeralContainers"), "ephemeral containers are not supported");
    }
}

/// Two containers of a pod can't have the same port of the host.
fn host_ports(spec: &Value, at: &str, errors: &mut Errors) {
    let mut taken = HashSet::new();
    for (i, container) in list(&spec["containers"]).iter().enumerate() {
        for (j, port) in list(&container["ports"]).iter().enumerate() {
            let Some(number) = port["hostPort"].as_i64().filter(|n| *n != 0) else { continue };
            let field = format!("{at}.containers[{i}].ports[{j}].hostPort");
            if spec["hostNetwork"] == json!(true) && port["containerPort"] != port["hostPort"] {
                errors.invalid(
                    format!("{at}.containers[{i}].ports[{j}].containerPort"),
                    port["containerPort"].clone(),
                    "must match `hostPort` when `hostNetwork` is true",
                );
            }
            let key = (number, text(&port["protocol"]), text(&port["hostIP"]));
            if taken.contains(&key) {
                errors.duplicate(field, format!("{}/{}/{}", key.1, key.2, key.0));
            }
            taken.insert(key);
        }
    }
}

fn dns_config(spec: &Value, at: &str, errors: &mut Errors) {
    let config = &spec["dnsConfig"];
    let servers = list(&config["nameservers"]);
    if spec["dnsPolicy"] == json!("None") {
        if config.is_null() {
            errors.required(format!("{at}.dnsConfig"), "must provide `dnsConfig` when `dnsPolicy` is None");
        } else if servers.is_empty() {
            errors.required(
                format!("{at}.dnsConfig.nameservers"),
                "must provide at least one DNS nameserver when `dnsPolicy` is None",
            );
        }
    }
    if servers.len() > 3 {
        errors.invalid(
            format!("{at}.dnsConfig.nameservers"),
            config["nameservers"].clone(),
            "must not have more than 3 nameservers",
        );
    }
    for (i, server) in servers.iter().enumerate() {
        ip(server, &format!("{at}.dnsConfig.nameservers[{i}]"), errors);
    }
    let searches = list(&config["searches"]);
    if searches.len() > 32 {
        errors.invalid(
            format!("{at}.dnsConfig.searches"),
            config["searches"].clone(),
            "must not have more than 32 search paths",
        );
    }
    for (i, search) in searches.iter().enumerate() {
        let name = text(search).strip_suffix('.').unwrap_or(text(search));
        if !name.is_empty()
            && let Some(problem) = names::dns_subdomain(&name.replace('_', "-"))
        {
            errors.invalid(format!("{at}.dnsConfig.searches[{i}]"), search.clone(), problem);
        }
    }
    for (i, option) in list(&config["options"]).iter().enumerate() {
        if text(&option["name"]).is_empty() {
            errors.required(format!("{at}.dnsConfig.options[{i}]"), "must not be empty");
        }
    }
}

fn ip(value: &Value, field: &str, errors: &mut Errors) {
    if text(value).parse::<IpAddr>().is_err() {
        errors.invalid(field, value.clone(), "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)");
    }
}

fn host_aliases(aliases: &Value, at: &str, errors: &mut Errors) {
    for (i, alias) in list(aliases).iter().enumerate() {
        ip(&alias["ip"], &format!("{at}[{i}].ip"), errors);
        for (j, name) in list(&alias["hostnames"]).iter().enumerate() {
            if let Some(problem) = names::dns_subdomain(text(name)) {
                errors.invalid(format!("{at}[{i}].hostnames[{j}]"), name.clone(), problem);
            }
        }
    }
}

fn tolerations(tolerations: &Value, at: &str, errors: &mut Errors) {
    for (i, toleration) in list(tolerations).iter().enumerate() {
        let field = format!("{at}[{i}]");
        let (key, operator) = (text(&toleration["key"]), text(&toleration["operator"]));
        if !key.is_empty()
            && let Some(problem) = names::qualified_name(key)
        {
            errors.invalid(format!("{field}.key"), key, problem);
        }
        if key.is_empty() && operator != "Exists" {
            errors.invalid(
                format!("{field}.operator"),
                operator,
                "operator must be Exists when `key` is empty, which means \"match all values and all keys\"",
            );
        }
        if !toleration["tolerationSeconds"].is_null() && toleration["effect"] != json!("NoExecute") {
            errors.invalid(
                format!("{field}.effect"),
                toleration["effect"].clone(),
                "effect must be 'NoExecute' when `tolerationSeconds` is set",
            );
        }
        match operator {
            "" | "Equal" => {
                if let Some(problem) = names::label_value(text(&toleration["value"])) {
                    errors.invalid(format!("{field}.operator"), toleration["value"].clone(), problem);
                }
            }
            "Exists" if !text(&toleration["value"]).is_empty() => {
                errors.invalid(
                    format!("{field}.operator"),
                    toleration.clone(),
                    "value must be empty when `operator` is 'Exists'",
                );
            }
            "Exists" => {}
            other => errors.not_supported(format!("{field}.operator"), other, &["Equal", "Exists"]),
        }
        errors.one_of(
            format!("{field}.effect"),
            &toleration["effect"],
            &["NoSchedule", "PreferNoSchedule", "NoExecute"],
        );
    }
}

const MUTABLE: &str = "pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)";

/// A Pod's spec stays but for a few fields. `nodeName` may be set once: that is how a pod is bound to its node here.
pub(super) fn validate_update(old: &Value, new: &Value, errors: &mut Errors) {
    let (before, after) = (&old["spec"], &new["spec"]);
    for sort in ["containers", "initContainers"] {
        if list(&before[sort]).len() != list(&after[sort]).len() {
            errors.forbidden(format!("spec.{sort}"), "pod updates may not add or remove containers");
            return;
        }
    }
    let (was, wanted) = (before["activeDeadlineSeconds"].as_i64(), after["activeDeadlineSeconds"].as_i64());
    match (was, wanted) {
        (Some(was), Some(wanted)) if wanted > was => {
            errors.invalid(
                "spec.activeDeadlineSeconds",
                wanted,
                format!("must be less than or equal to previous value {was}"),
            );
        }
        (Some(_), None) => errors.invalid(
            "spec.activeDeadlineSeconds",
            Value::Null,
            "must not update from a positive integer to nil value",
        ),
        _ => {}
    }
    let wanted: HashSet<String> = list(&after["tolerations"]).iter().map(Value::to_string).collect();
    let kept = list(&before["tolerations"]).iter().all(|t| wanted.contains(&t.to_string()));
    if !kept {
        errors.forbidden("spec.tolerations", "existing toleration can not be modified except its tolerationSeconds");
    }
    let mut settled = after.clone();
    for part in ["activeDeadlineSeconds", "tolerations", "schedulingGates"] {
        carry(&mut settled, before, part);
    }
    if text(&before["nodeName"]).is_empty() {
        carry(&mut settled, before, "nodeName");
    }
    for sort in ["containers", "initContainers"] {
        let mut images = list(&before[sort]).iter();
        for container in settled.get_mut(sort).and_then(Value::as_array_mut).into_iter().flatten() {
            if let Some(old) = images.next() {
                carry(container, old, "image");
            }
        }
    }
    if before["terminationGracePeriodSeconds"].as_i64().is_some_and(|s| s < 0)
        && after["terminationGracePeriodSeconds"] == json!(1)
    {
        carry(&mut settled, before, "terminationGracePeriodSeconds");
    }
    if settled != *before {
        let changed: Vec<&str> = settled
            .as_object()
            .into_iter()
            .flatten()
            .filter(|(k, v)| before.get(k.as_str()) != Some(v))
            .map(|(k, _)| k.as_str())
            .chain(
                before
                    .as_object()
                    .into_iter()
                    .flatten()
                    .filter(|(k, _)| settled.get(k.as_str()).is_none())
                    .map(|(k, _)| k.as_str()),
            )
            .collect();
        errors.forbidden("spec", format!("{MUTABLE}; changed: {}", changed.join(", ")));
    }
}

/// Makes a field of `target` what it is in `source`.
fn carry(target: &mut Value, source: &Value, field: &str) {
    let Some(map) = target.as_object_mut() else { return };
    match source.get(field) {
        Some(value) => map.insert(field.to_owned(), value.clone()),
        None => map.shift_remove(field),
    };
}

#[cfg(test)]
mod tests;
