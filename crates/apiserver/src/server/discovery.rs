//! Discovery: which groups, versions and resources there are, in the old form and aggregated.

use std::sync::Arc;

use http::{Response, StatusCode};
use serde_json::{Map, Value, json};

use super::{
    accept::Discovery,
    request::Target,
    respond::{self, Body},
};
use crate::{
    error::ApiError,
    kinds::{KindInfo, Registry},
};

/// The Kubernetes version whose API this is.
const MINOR: &str = "32";

/// Health and version: what everyone may ask.
pub(crate) fn public(target: &Target, query: Option<&str>) -> Response<Body> {
    if *target == Target::Health {
        let verbose = query.is_some_and(|q| q.contains("verbose"));
        let text = if verbose { "[+]store ok\nhealthz check passed\n" } else { "ok" };
        return respond::bytes(StatusCode::OK, "text/plain; charset=utf-8", text);
    }
    let version = json!({
        "major": "1", "minor": MINOR,
        "gitVersion": format!("v1.{MINOR}.0+edgemesh-{}", env!("CARGO_PKG_VERSION")),
        "gitCommit": "", "gitTreeState": "clean", "buildDate": "1970-01-01T00:00:00Z", "goVersion": "", "compiler": "rustc",
        "platform": format!("{}/{}", std::env::consts::OS, architecture()),
    });
    respond::json(StatusCode::OK, &version)
}

/// The architecture under Kubernetes' name.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// `/api`.
pub(crate) fn core(registry: &Registry, form: Discovery) -> Response<Body> {
    match form {
        Discovery::Aggregated(version) => aggregated(registry, version, |group| group.is_empty()),
        Discovery::Plain => {
            let versions = json!({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []});
            respond::json(StatusCode::OK, &versions)
        }
    }
}

/// `/apis`.
pub(crate) fn groups(registry: &Registry, form: Discovery) -> Response<Body> {
    match form {
        Discovery::Aggregated(version) => aggregated(registry, version, |group| !group.is_empty()),
        Discovery::Plain => {
            let groups: Vec<Value> = registry
                .groups()
                .iter()
                .filter(|(group, _)| !group.is_empty())
                .map(|(group, versions)| group_value(group, versions))
                .collect();
            respond::json(StatusCode::OK, &json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}))
        }
    }
}

/// `/apis/<group>`.
pub(crate) fn group(registry: &Registry, name: &str) -> Result<Response<Body>, ApiError> {
    let groups = registry.groups();
    let (group, versions) = groups.iter().find(|(group, _)| group == name).ok_or_else(ApiError::no_such_path)?;
    let mut value = json!({"kind": "APIGroup", "apiVersion": "v1"});
    if let (Some(value), Value::Object(group)) = (value.as_object_mut(), group_value(group, versions)) {
        value.extend(group);
    }
    Ok(respond::json(StatusCode::OK, &value))
}

fn group_value(group: &str, versions: &[String]) -> Value {
    let versions: Vec<Value> =
        versions.iter().map(|v| json!({"groupVersion": format!("{group}/{v}"), "version": v})).collect();
    json!({"name": group, "versions": versions, "preferredVersion": versions.first()})
}

/// `/api/v1` and `/apis/<group>/<version>`.
pub(crate) fn group_version(registry: &Registry, group: &str, version: &str) -> Result<Response<Body>, ApiError> {
    let mut resources = Vec::new();
    let mut group_version = None;
    for kind in kinds_of(registry, group, version) {
        group_version = Some(kind.api_version());
        let mut entry = json!({
            "name": kind.resource.plural, "singularName": kind.singular, "namespaced": kind.namespaced,
            "kind": kind.kind, "verbs": kind.verbs,
        });
        names(&mut entry, &kind);
        resources.push(entry);
        for sub in subresources(&kind) {
            let mut entry = json!({
                "name": format!("{}/{}", kind.resource.plural, sub.name), "singularName": "",
                "namespaced": kind.namespaced, "kind": sub.kind, "verbs": sub.verbs,
            });
            if let Some((group, version)) = sub.group_version {
                entry["group"] = json!(group);
                entry["version"] = json!(version);
            }
            resources.push(entry);
        }
    }
    let group_version = group_version.ok_or_else(ApiError::no_such_path)?;
    let list =
        json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": resources});
    Ok(respond::json(StatusCode::OK, &list))
}

/// One document with everything (Kubernetes, "Aggregated discovery").
fn aggregated(registry: &Registry, form: &'static str, wanted: impl Fn(&str) -> bool) -> Response<Body> {
    let items: Vec<Value> = registry
        .groups()
        .iter()
        .filter(|(group, _)| wanted(group))
        .map(|(group, versions)| {
            let versions: Vec<Value> = versions
                .iter()
                .map(|version| {
                    let resources: Vec<Value> =
                        kinds_of(registry, group, version).map(|k| aggregated_kind(&k)).collect();
                    json!({"version": version, "resources": resources, "freshness": "Current"})
                })
                .collect();
            let mut metadata = Map::new();
            if !group.is_empty() {
                metadata.insert("name".to_owned(), json!(group));
            }
            metadata.insert("creationTimestamp".to_owned(), Value::Null);
            json!({"metadata": metadata, "versions": versions})
        })
        .collect();
    let list = json!({
        "kind": "APIGroupDiscoveryList", "apiVersion": format!("apidiscovery.k8s.io/{form}"), "metadata": {}, "items": items,
    });
    let content_type = match form {
        "v2" => "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList",
        _ => "application/json;g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList",
    };
    respond::bytes(StatusCode::OK, content_type, list.to_string())
}

fn aggregated_kind(kind: &KindInfo) -> Value {
    let response_kind =
        |kind_name: &str, group: &str, version: &str| json!({"group": group, "version": version, "kind": kind_name});
    let own = &kind.resource;
    let mut entry = json!({
        "resource": own.plural,
        "responseKind": response_kind(&kind.kind, &own.group, &own.version),
        "scope": if kind.namespaced { "Namespaced" } else { "Cluster" },
        "singularResource": kind.singular,
        "verbs": kind.verbs,
    });
    names(&mut entry, kind);
    let subs: Vec<Value> = subresources(kind)
        .into_iter()
        .map(|sub| {
            let (group, version) = sub.group_version.unwrap_or((&own.group, &own.version));
            json!({"subresource": sub.name, "responseKind": response_kind(sub.kind, group, version), "verbs": sub.verbs})
        })
        .collect();
    if !subs.is_empty() {
        entry["subresources"] = json!(subs);
    }
    entry
}

fn names(entry: &mut Value, kind: &KindInfo) {
    if !kind.short_names.is_empty() {
        entry["shortNames"] = json!(kind.short_names);
    }
    if !kind.categories.is_empty() {
        entry["categories"] = json!(kind.categories);
    }
}

struct Subresource<'a> {
    name: &'static str,
    kind: &'a str,
    group_version: Option<(&'static str, &'static str)>,
    verbs: &'static [&'static str],
}

fn subresources(kind: &KindInfo) -> Vec<Subresource<'_>> {
    const CHANGE: &[&str] = &["get", "patch", "update"];
    let mut subs = Vec::new();
    if kind.subresources.status {
        subs.push(Subresource { name: "status", kind: &kind.kind, group_version: None, verbs: CHANGE });
    }
    if kind.subresources.scale.is_some() {
        let group_version = Some(("autoscaling", "v1"));
        subs.push(Subresource { name: "scale", kind: "Scale", group_version, verbs: CHANGE });
    }
    match (kind.resource.group.as_str(), kind.resource.plural.as_str()) {
        ("", "pods") => {
            subs.push(Subresource { name: "binding", kind: "Binding", group_version: None, verbs: &["create"] });
            let group_version = Some(("policy", "v1"));
            subs.push(Subresource { name: "eviction", kind: "Eviction", group_version, verbs: &["create"] });
        }
        ("", "namespaces") => {
            subs.push(Subresource { name: "finalize", kind: "Namespace", group_version: None, verbs: &["update"] });
        }
        _ => {}
    }
    subs
}

fn kinds_of<'a>(
    registry: &Registry,
    group: &'a str,
    version: &'a str,
) -> impl Iterator<Item = Arc<KindInfo>> + use<'a> {
    registry.all().into_iter().filter(move |k| k.resource.group == group && k.resource.version == version)
}
