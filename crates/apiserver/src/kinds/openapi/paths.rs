//! Path items: what clients look up there is the group, version and kind of a path, and the query parameters of PATCH.

use serde_json::{Map, Value, json};

use super::document_path;
use crate::kinds::KindInfo;

const PATCH_TYPES: &[&str] =
    &["application/json-patch+json", "application/merge-patch+json", "application/strategic-merge-patch+json"];

/// Query parameters of writes that clients look for.
const WRITE_PARAMETERS: &[(&str, &str)] = &[
    ("dryRun", "When present, indicates that modifications should not be persisted. Valid values: All."),
    ("fieldManager", "A name for who makes the change. Accepted and not kept: managed fields are not served."),
    ("fieldValidation", "What to do with unknown fields: Ignore, Warn or Strict."),
];

/// One operation: method, Kubernetes' action, whether it has a body, whether it is of a single object.
type Operation = (&'static str, &'static str, bool);

const OF_ALL: &[Operation] = &[("get", "list", false), ("post", "post", true), ("delete", "deletecollection", false)];
const OF_ONE: &[Operation] =
    &[("get", "get", false), ("put", "put", true), ("patch", "patch", true), ("delete", "delete", false)];

/// The paths of a kind, with their operations.
fn paths(kind: &KindInfo) -> Vec<(String, &'static [Operation])> {
    let base = format!("/{}", document_path(&kind.resource.group, &kind.resource.version));
    let plural = &kind.resource.plural;
    let scope = if kind.namespaced { "/namespaces/{namespace}" } else { "" };
    let mut paths =
        vec![(format!("{base}{scope}/{plural}"), OF_ALL), (format!("{base}{scope}/{plural}/{{name}}"), OF_ONE)];
    if kind.namespaced {
        paths.push((format!("{base}/{plural}"), &OF_ALL[..1]));
    }
    paths
}

fn group_version_kind(kind: &KindInfo) -> Value {
    json!({"group": kind.resource.group, "version": kind.resource.version, "kind": kind.kind})
}

fn is_write(method: &str) -> bool {
    method != "get" && method != "delete"
}

fn path_parameters(path: &str, schema: impl Fn() -> Value) -> Vec<Value> {
    ["namespace", "name"]
        .into_iter()
        .filter(|name| path.contains(&format!("{{{name}}}")))
        .map(|name| {
            let mut parameter = json!({"name": name, "in": "path", "required": true});
            if let (Some(map), Value::Object(schema)) = (parameter.as_object_mut(), schema()) {
                map.extend(schema);
            }
            parameter
        })
        .collect()
}

pub(super) fn v3(kind: &KindInfo, definition: &str, out: &mut Map<String, Value>) {
    let body = json!({"schema": {"$ref": format!("#/components/schemas/{definition}")}});
    for (path, operations) in paths(kind) {
        let parameters = path_parameters(&path, || json!({"schema": {"type": "string", "uniqueItems": true}}));
        let mut item = json!({ "parameters": parameters });
        for (method, action, has_body) in operations {
            let mut operation = json!({
                "operationId": format!("{action}{}{}", kind.resource.version, path.replace(['/', '{', '}'], "_")),
                "x-kubernetes-action": action,
                "x-kubernetes-group-version-kind": group_version_kind(kind),
                "responses": {"200": {"description": "OK", "content": {"application/json": body}}},
            });
            if is_write(method) {
                operation["parameters"] = WRITE_PARAMETERS
                    .iter()
                    .map(|(name, description)| {
                        json!({"name": name, "in": "query", "description": description, "schema": {"type": "string", "uniqueItems": true}})
                    })
                    .collect();
            }
            if *has_body {
                let types: &[&str] = if *method == "patch" { PATCH_TYPES } else { &["application/json"] };
                let strategic = |t: &&&str| !kind.is_custom() || !t.contains("strategic");
                let content: Map<String, Value> = types
                    .iter()
                    .filter(strategic)
                    .map(|t| {
                        (
                            (*t).to_owned(),
                            if *method == "patch" { json!({"schema": {"type": "object"}}) } else { body.clone() },
                        )
                    })
                    .collect();
                operation["requestBody"] = json!({"content": content, "required": true});
            }
            item[method] = operation;
        }
        out.insert(path, item);
    }
}

pub(super) fn v2(kind: &KindInfo, definition: &str, out: &mut Map<String, Value>) {
    for (path, operations) in paths(kind) {
        let mut item = json!({ "parameters": path_parameters(&path, || json!({"type": "string"})) });
        for (method, action, _) in operations {
            let mut operation = json!({
                "operationId": format!("{action}{}{}", kind.resource.version, path.replace(['/', '{', '}'], "_")),
                "produces": ["application/json"],
                "responses": {"200": {"description": "OK", "schema": {"$ref": format!("#/definitions/{definition}")}}},
                "x-kubernetes-action": action,
                "x-kubernetes-group-version-kind": group_version_kind(kind),
            });
            if is_write(method) {
                operation["parameters"] = WRITE_PARAMETERS
                    .iter()
                    .map(|(name, description)| json!({"name": name, "in": "query", "description": description, "type": "string"}))
                    .collect();
            }
            item[method] = operation;
        }
        out.insert(path, item);
    }
}
