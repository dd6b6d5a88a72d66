//! CustomResourceDefinitions: their kind is served from the moment that they are stored.

use edgemesh_api::ResourceName;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::write::seconds;
use crate::fields;

/// The resource whose objects define kinds.
pub(crate) fn definitions() -> ResourceName {
    ResourceName::new("apiextensions.k8s.io", "v1", "customresourcedefinitions")
}

/// Whether objects of this resource define kinds.
pub(crate) fn is_definition(resource: &ResourceName) -> bool {
    resource.plural == "customresourcedefinitions" && resource.group == "apiextensions.k8s.io"
}

/// Sets the status that the API server's own controllers would: names accepted, established.
pub(crate) fn accept(definition: &mut Value, now: Timestamp) {
    let names = fields::at(definition, &["spec", "names"]).cloned().unwrap_or(json!({}));
    let storage_version = fields::at(definition, &["spec", "versions"])
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .find(|v| v["storage"] == true)
        .map(|v| v["name"].clone());
    let status = fields::map_in(definition, "status");
    let mut versions = match status.get("storedVersions").and_then(Value::as_array) {
        Some(versions) => versions.clone(),
        None => Vec::new(),
    };
    if let Some(version) = storage_version
        && !versions.contains(&version)
    {
        versions.push(version);
    }
    status.insert("acceptedNames".to_owned(), names);
    status.insert("storedVersions".to_owned(), json!(versions));
    let conditions = status.entry("conditions").or_insert(json!([]));
    if !conditions.is_array() {
        *conditions = json!([]);
    }
    let Some(conditions) = conditions.as_array_mut() else { return };
    for (kind, reason, message) in [
        ("NamesAccepted", "NoConflicts", "no conflicts found"),
        ("Established", "InitialNamesAccepted", "the initial names have been accepted"),
    ] {
        if !conditions.iter().any(|c| c["type"] == kind && c["status"] == "True") {
            conditions.retain(|c| c["type"] != kind);
            conditions.push(json!({"type": kind, "status": "True", "lastTransitionTime": seconds(now),
                "reason": reason, "message": message}));
        }
    }
}
