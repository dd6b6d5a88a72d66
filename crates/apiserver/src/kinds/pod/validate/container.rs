//! One container of a pod.

use std::collections::HashSet;

use serde_json::{Value, json};

use super::list;
use crate::kinds::field_error::Errors;
use crate::kinds::tables::text;
use crate::kinds::workload::not_negative;
use crate::kinds::{names, quantity};

pub(super) fn validate(container: &Value, init: bool, volumes: &HashSet<&str>, at: &str, errors: &mut Errors) {
    let name = text(&container["name"]);
    if name.is_empty() {
        errors.required(format!("{at}.name"), "");
    } else if let Some(problem) = names::dns_label(name) {
        errors.invalid(format!("{at}.name"), name, problem);
    }
    let image = text(&container["image"]);
    if image.is_empty() {
        errors.required(format!("{at}.image"), "");
    } else if image != image.trim() {
        errors.invalid(format!("{at}.image"), image, "must not have leading or trailing whitespace");
    }
    errors.one_of(format!("{at}.imagePullPolicy"), &container["imagePullPolicy"], &["Always", "IfNotPresent", "Never"]);
    errors.one_of(
        format!("{at}.terminationMessagePolicy"),
        &container["terminationMessagePolicy"],
        &["FallbackToLogsOnError", "File"],
    );
    ports(&container["ports"], &format!("{at}.ports"), errors);
    env(&container["env"], &format!("{at}.env"), errors);
    env_from(&container["envFrom"], &format!("{at}.envFrom"), errors);
    mounts(&container["volumeMounts"], volumes, &format!("{at}.volumeMounts"), errors);
    resources(&container["resources"], &format!("{at}.resources"), errors);
    let sidecar = container["restartPolicy"] == json!("Always");
    if init {
        errors.one_of(format!("{at}.restartPolicy"), &container["restartPolicy"], &["Always"]);
    } else if !container["restartPolicy"].is_null() {
        errors.forbidden(format!("{at}.restartPolicy"), "may not be set for non-init containers");
    }
    for kind in ["livenessProbe", "readinessProbe", "startupProbe"] {
        let probe = &container[kind];
        if probe.is_null() {
            continue;
        }
        let field = format!("{at}.{kind}");
        if init && !sidecar {
            errors.forbidden(field, "may not be set for init containers without restartPolicy=Always");
            continue;
        }
        validate_probe(probe, &field, errors);
        if kind != "readinessProbe" && probe["successThreshold"].as_i64().is_some_and(|n| n != 1) {
            errors.invalid(format!("{field}.successThreshold"), probe["successThreshold"].clone(), "must be 1");
        }
    }
    let lifecycle = &container["lifecycle"];
    if lifecycle.is_object() && init && !sidecar {
        errors.forbidden(format!("{at}.lifecycle"), "may not be set for init containers without restartPolicy=Always");
    } else {
        for kind in ["postStart", "preStop"] {
            if lifecycle[kind].is_object() {
                handler(&lifecycle[kind], &format!("{at}.lifecycle.{kind}"), errors);
            }
        }
    }
    let security = &container["securityContext"];
    for part in ["runAsUser", "runAsGroup"] {
        if let Some(id) = security[part].as_i64()
            && !(0..=i64::from(i32::MAX)).contains(&id)
        {
            errors.invalid(format!("{at}.securityContext.{part}"), id, "must be between 0 and 2147483647, inclusive");
        }
    }
}

fn ports(ports: &Value, at: &str, errors: &mut Errors) {
    let mut seen = HashSet::new();
    for (i, port) in list(ports).iter().enumerate() {
        let field = format!("{at}[{i}]");
        let name = text(&port["name"]);
        if !name.is_empty() {
            if let Some(problem) = names::port_name(name) {
                errors.invalid(format!("{field}.name"), name, problem);
            } else if seen.contains(&name) {
                errors.duplicate(format!("{field}.name"), name);
            }
            seen.insert(name);
        }
        match port["containerPort"].as_i64() {
            None | Some(0) => errors.required(format!("{field}.containerPort"), ""),
            Some(number) => {
                if let Some(problem) = names::port_number(number) {
                    errors.invalid(format!("{field}.containerPort"), number, problem);
                }
            }
        }
        if let Some(number) = port["hostPort"].as_i64().filter(|n| *n != 0)
            && let Some(problem) = names::port_number(number)
        {
            errors.invalid(format!("{field}.hostPort"), number, problem);
        }
        if text(&port["protocol"]).is_empty() {
            errors.required(format!("{field}.protocol"), "");
        }
        errors.one_of(format!("{field}.protocol"), &port["protocol"], &["SCTP", "TCP", "UDP"]);
    }
}

/// What `valueFrom.fieldRef` may name in an environment variable.
const FIELDS: &[&str] = &[
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.serviceAccountName",
    "status.hostIP",
    "status.hostIPs",
    "status.podIP",
    "status.podIPs",
];

fn env(env: &Value, at: &str, errors: &mut Errors) {
    for (i, variable) in list(env).iter().enumerate() {
        let field = format!("{at}[{i}]");
        let name = text(&variable["name"]);
        if name.is_empty() {
            errors.required(format!("{field}.name"), "");
        } else if let Some(problem) = names::environment_name(name) {
            errors.invalid(format!("{field}.name"), name, problem);
        }
        let Some(source) = variable["valueFrom"].as_object() else { continue };
        let field = format!("{field}.valueFrom");
        if !text(&variable["value"]).is_empty() {
            errors.invalid(&field, "", "may not be specified when `value` is not empty");
        }
        match source.len() {
            0 => errors.invalid(
                &field,
                "",
                "must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef` or `secretKeyRef`",
            ),
            1 => {}
            _ => errors.invalid(&field, "", "may not have more than one field specified at a time"),
        }
        for (kind, reference) in source {
            let field = format!("{field}.{kind}");
            match kind.as_str() {
                "configMapKeyRef" | "secretKeyRef" => {
                    for part in ["name", "key"] {
                        if text(&reference[part]).is_empty() {
                            errors.required(format!("{field}.{part}"), "");
                        }
                    }
                }
                "fieldRef" => {
                    let path = text(&reference["fieldPath"]);
                    let subscript = path.ends_with("']")
                        && (path.starts_with("metadata.labels['") || path.starts_with("metadata.annotations['"));
                    if path.is_empty() {
                        errors.required(format!("{field}.fieldPath"), "");
                    } else if !subscript {
                        errors.one_of(format!("{field}.fieldPath"), &reference["fieldPath"], FIELDS);
                    }
                }
                "resourceFieldRef" if text(&reference["resource"]).is_empty() => {
                    errors.required(format!("{field}.resource"), "");
                }
                _ => {}
            }
        }
    }
}

fn env_from(sources: &Value, at: &str, errors: &mut Errors) {
    for (i, source) in list(sources).iter().enumerate() {
        let field = format!("{at}[{i}]");
        let refs: Vec<&str> =
            ["configMapRef", "secretRef"].into_iter().filter(|kind| source[kind].is_object()).collect();
        match refs.as_slice() {
            [] => errors.invalid(&field, "", "must specify one of: `configMapRef` or `secretRef`"),
            [_] => {}
            _ => errors.invalid(&field, "", "may not have more than one field specified at a time"),
        }
        for kind in refs {
            if text(&source[kind]["name"]).is_empty() {
                errors.required(format!("{field}.{kind}.name"), "");
            }
        }
    }
}

fn mounts(mounts: &Value, volumes: &HashSet<&str>, at: &str, errors: &mut Errors) {
    let mut seen = HashSet::new();
    for (i, mount) in list(mounts).iter().enumerate() {
        let field = format!("{at}[{i}]");
        let name = text(&mount["name"]);
        if name.is_empty() {
            errors.required(format!("{field}.name"), "");
        } else if !volumes.contains(&name) {
            errors.not_found(format!("{field}.name"), name);
        }
        let path = text(&mount["mountPath"]);
        if path.is_empty() {
            errors.required(format!("{field}.mountPath"), "");
        } else if seen.contains(&path) {
            errors.invalid(format!("{field}.mountPath"), path, "must be unique");
        }
        seen.insert(path);
        let sub = text(&mount["subPath"]);
        if sub.starts_with('/') {
            errors.invalid(format!("{field}.subPath"), sub, "must be a relative path");
        }
        if sub.split('/').any(|part| part == "..") {
            errors.invalid(format!("{field}.subPath"), sub, "must not contain '..'");
        }
        if !sub.is_empty() && !text(&mount["subPathExpr"]).is_empty() {
            errors.invalid(
                format!("{field}.subPathExpr"),
                mount["subPathExpr"].clone(),
                "subPathExpr and subPath are mutually exclusive",
            );
        }
        errors.one_of(
            format!("{field}.mountPropagation"),
            &mount["mountPropagation"],
            &["Bidirectional", "HostToContainer", "None"],
        );
    }
}

fn resources(resources: &Value, at: &str, errors: &mut Errors) {
    for part in ["limits", "requests"] {
        quantity::validate_list(&resources[part], &format!("{at}.{part}"), errors);
    }
    for (name, request) in resources["requests"].as_object().into_iter().flatten() {
        let limit = &resources["limits"][name];
        let (Some(wanted), Some(most)) = (quantity::parse_milli(text(request)), quantity::parse_milli(text(limit)))
        else {
            continue;
        };
        if wanted > most {
            errors.invalid(
                format!("{at}.requests"),
                request.clone(),
                format!("must be less than or equal to {name} limit of {}", text(limit)),
            );
        }
    }
}

fn validate_probe(probe: &Value, at: &str, errors: &mut Errors) {
    handler(probe, at, errors);
    for part in ["initialDelaySeconds", "timeoutSeconds", "periodSeconds", "successThreshold", "failureThreshold"] {
        not_negative(&probe[part], &format!("{at}.{part}"), errors);
    }
}

fn handler(handler: &Value, at: &str, errors: &mut Errors) {
    let kinds: Vec<&str> =
        ["exec", "httpGet", "tcpSocket", "grpc", "sleep"].into_iter().filter(|k| !handler[k].is_null()).collect();
    let Some(first) = kinds.first() else {
        errors.required(at, "must specify a handler type");
        return;
    };
    for other in kinds.iter().skip(1) {
        errors.forbidden(format!("{at}.{other}"), "may not specify more than 1 handler type");
    }
    let field = format!("{at}.{first}");
    match *first {
        "exec" if list(&handler["exec"]["command"]).is_empty() => errors.required(format!("{field}.command"), ""),
        "httpGet" => {
            port_reference(&handler["httpGet"]["port"], &format!("{field}.port"), errors);
            errors.one_of(format!("{field}.scheme"), &handler["httpGet"]["scheme"], &["HTTP", "HTTPS"]);
        }
        kind @ ("tcpSocket" | "grpc") => port_reference(&handler[kind]["port"], &format!("{field}.port"), errors),
        _ => {}
    }
}

/// A port by number, or by the name of a container port.
pub(crate) fn port_reference(port: &Value, field: &str, errors: &mut Errors) {
    match port {
        Value::Number(number) => {
            let number = number.as_i64().unwrap_or(0);
            if let Some(problem) = names::port_number(number) {
                errors.invalid(field, number, problem);
            }
        }
        Value::String(name) => {
            if let Some(problem) = names::port_name(name) {
                errors.invalid(field, name.as_str(), problem);
            }
        }
        _ => errors.required(field, ""),
    }
}
