//! `metadata` of every kind: names, labels, annotations, owners and finalizers.

use serde_json::Value;

use super::field_error::Errors;
use super::{KindInfo, names};

/// Kubernetes' limit for all annotations of an object together, in bytes.
const ANNOTATIONS_LIMIT: usize = 256 << 10;

pub(crate) fn validate(info: &KindInfo, object: &Value, errors: &mut Errors) {
    let metadata = &object["metadata"];
    let check: fn(&str) -> Option<String> = match info.kind.as_ref() {
        _ if info.is_custom() => names::dns_subdomain,
        "Namespace" => names::dns_label,
        "Service" => names::dns_1035_label,
        _ => names::dns_subdomain,
    };
    match metadata["name"].as_str() {
        None | Some("") => match metadata["generateName"].as_str() {
            // What is generated ends in letters and digits, so a trailing dash is fine here.
            Some(prefix) if !prefix.is_empty() => {
                if let Some(problem) = check(&format!("{}a", prefix.trim_end_matches('-'))) {
                    errors.invalid("metadata.generateName", prefix, problem);
                }
            }
            _ => errors.required("metadata.name", "name or generateName is required"),
        },
        Some(name) => {
            if let Some(problem) = check(name) {
                errors.invalid("metadata.name", name, problem);
            }
        }
    }
    match metadata["namespace"].as_str().unwrap_or_default() {
        "" if info.namespaced => errors.required("metadata.namespace", ""),
        "" => {}
        _ if !info.namespaced => errors.forbidden("metadata.namespace", "not allowed on this type"),
        namespace => {
            if let Some(problem) = names::dns_label(namespace) {
                errors.invalid("metadata.namespace", namespace, problem);
            }
        }
    }
    labels(&metadata["labels"], "metadata.labels", errors);
    annotations(&metadata["annotations"], "metadata.annotations", errors);
    owners(&metadata["ownerReferences"], errors);
    for finalizer in metadata["finalizers"].as_array().into_iter().flatten() {
        if let Some(problem) = finalizer.as_str().and_then(names::qualified_name) {
            errors.invalid("metadata.finalizers", finalizer.clone(), problem);
        }
    }
}

/// Labels of an object, of a pod template or of a selector.
pub(crate) fn labels(labels: &Value, field: &str, errors: &mut Errors) {
    for (key, value) in labels.as_object().into_iter().flatten() {
        if let Some(problem) = names::qualified_name(key) {
            errors.invalid(field, key.as_str(), problem);
        }
        match value.as_str() {
            Some(text) => {
                if let Some(problem) = names::label_value(text) {
                    errors.invalid(field, text, problem);
                }
            }
            None => errors.invalid(format!("{field}.{key}"), value.clone(), "must be a string"),
        }
    }
}

/// Annotations of an object or of a pod template.
pub(crate) fn annotations(annotations: &Value, field: &str, errors: &mut Errors) {
    let mut size = 0;
    for (key, value) in annotations.as_object().into_iter().flatten() {
        if let Some(problem) = names::qualified_name(&key.to_ascii_lowercase()) {
            errors.invalid(field, key.as_str(), problem);
        }
        match value.as_str() {
            Some(text) => size += key.len() + text.len(),
            None => errors.invalid(format!("{field}.{key}"), value.clone(), "must be a string"),
        }
    }
    if size > ANNOTATIONS_LIMIT {
        errors.too_long(field, ANNOTATIONS_LIMIT);
    }
}

fn owners(owners: &Value, errors: &mut Errors) {
    let mut controller: Option<&str> = None;
    for (i, owner) in owners.as_array().into_iter().flatten().enumerate() {
        for part in ["apiVersion", "kind", "name", "uid"] {
            if owner[part].as_str().unwrap_or_default().is_empty() {
                errors.invalid(format!("metadata.ownerReferences[{i}].{part}"), "", "must not be empty");
            }
        }
        if owner["controller"] == Value::Bool(true) {
            let name = owner["name"].as_str().unwrap_or_default();
            if let Some(first) = controller {
                let detail = format!(
                    "Only one reference can have Controller set to true. Found \"true\" in references for {first} and {name}"
                );
                errors.invalid("metadata.ownerReferences", owners.clone(), detail);
            }
            controller = Some(name);
        }
    }
}

/// What may not change about an object's identity.
pub(crate) fn validate_update(old: &Value, new: &Value, errors: &mut Errors) {
    let (old, new) = (&old["metadata"], &new["metadata"]);
    for part in ["name", "namespace", "uid", "creationTimestamp"] {
        errors.immutable(format!("metadata.{part}"), &old[part], &new[part]);
    }
    if !old["deletionTimestamp"].is_null() {
        let known = old["finalizers"].as_array();
        let added: Vec<String> = new["finalizers"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|f| !known.is_some_and(|k| k.contains(f)))
            .map(Value::to_string)
            .collect();
        if !added.is_empty() {
            let list = added.join(", ");
            errors.forbidden(
                "metadata.finalizers",
                format!("no new finalizers can be added if the object is being deleted, found new finalizers []string{{{list}}}"),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::kinds::{Registry, validate_create, validate_update};

    fn problems(object: serde_json::Value) -> Vec<String> {
        let info = Registry::built_in().lookup("", "v1", "configmaps").unwrap();
        validate_create(&info, &object).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn good_metadata_is_accepted() {
        for metadata in [
            json!({"name": "a", "namespace": "default"}),
            json!({"generateName": "a-", "namespace": "default"}),
            json!({"name": "a.b", "namespace": "n", "labels": {"app.kubernetes.io/name": "A_b", "x": ""},
                "annotations": {"Some/Key": "anything at all"}, "finalizers": ["foregroundDeletion"],
                "ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": "u", "controller": true}]}),
        ] {
            assert_eq!(problems(json!({"metadata": metadata})), Vec::<String>::new());
        }
    }

    #[test]
    fn bad_metadata_is_named() {
        for (metadata, expected) in [
            (json!({"namespace": "n"}), "metadata.name: Required value: name or generateName is required"),
            (json!({"name": "a"}), "metadata.namespace: Required value"),
            (
                json!({"name": "A", "namespace": "n"}),
                "metadata.name: Invalid value: \"A\": a lowercase RFC 1123 subdomain",
            ),
            (
                json!({"name": "a", "namespace": "n", "labels": {"a b": "x"}}),
                "metadata.labels: Invalid value: \"a b\": name part",
            ),
            (
                json!({"name": "a", "namespace": "n", "labels": {"a": "-"}}),
                "metadata.labels: Invalid value: \"-\": a valid label",
            ),
            (
                json!({"name": "a", "namespace": "n", "annotations": {"a": "x".repeat(262144)}}),
                "metadata.annotations: Too long: may not be more than 262144 bytes",
            ),
            (
                json!({"name": "a", "namespace": "n", "ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": "p"}]}),
                "metadata.ownerReferences[0].uid: Invalid value: \"\": must not be empty",
            ),
        ] {
            let found = problems(json!({"metadata": metadata}));
            assert!(found.iter().any(|p| p.starts_with(expected)), "{expected}: {found:?}");
        }
    }

    #[test]
    fn identity_does_not_change() {
        let info = Registry::built_in().lookup("", "v1", "configmaps").unwrap();
        let old = json!({"metadata": {"name": "a", "namespace": "n", "uid": "1", "deletionTimestamp": "x"}});
        let new = json!({"metadata": {"name": "a", "namespace": "n", "uid": "2", "finalizers": ["a/b"]}});
        let found: Vec<_> = validate_update(&info, &old, &new).iter().map(ToString::to_string).collect();
        assert_eq!(found[0], "metadata.uid: Invalid value: \"2\": field is immutable");
        assert!(found[1].starts_with("metadata.finalizers: Forbidden: no new finalizers"), "{found:?}");
    }
}
