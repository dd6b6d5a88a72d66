//! Namespaces.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Namespace;
use serde_json::{Value, json};

use super::built_in::{AGE, BuiltIn, NAME, column, no_validate, no_validate_update};
use super::{built_in, decode, merge_keys, tables};

pub(crate) static NAMESPACE: BuiltIn = BuiltIn {
    group: "",
    version: "v1",
    plural: "namespaces",
    singular: "namespace",
    kind: "Namespace",
    short_names: &["ns"],
    categories: &[],
    namespaced: false,
    status: true,
    scale: false,
    generation: false,
    keeps_status_on_create: false,
    graceful: false,
    columns: &[NAME, column("Status", "string", "The status of the namespace"), AGE],
    selectable: &["status.phase"],
    merge_keys: merge_keys::CONDITIONED,
    typed: decode::typed::<Namespace>,
    schema: built_in::schema::<Namespace>(),
    default,
    validate: no_validate,
    prepare_update,
    validate_update: no_validate_update,
    cells,
};

/// The finalizer that keeps it until its objects are gone, the phase, and the label by which selectors name it.
fn default(object: &mut Value) {
    if object["spec"]["finalizers"].is_null() && object["metadata"]["deletionTimestamp"].is_null() {
        object["spec"]["finalizers"] = json!(["kubernetes"]);
    }
    if tables::text(&object["status"]["phase"]).is_empty() {
        object["status"]["phase"] = json!("Active");
    }
    let name = object["metadata"]["name"].clone();
    if name.is_string() {
        object["metadata"]["labels"]["kubernetes.io/metadata.name"] = name;
    }
}

/// Its finalizers change only while it is being deleted, by whoever empties it.
fn prepare_update(old: &Value, new: &mut Value) {
    if old["metadata"]["deletionTimestamp"].is_null()
        && let Some(finalizers) = old["spec"].get("finalizers")
    {
        new["spec"]["finalizers"] = finalizers.clone();
    }
}

fn cells(object: &Value, now: Timestamp) -> Vec<Value> {
    vec![tables::name(object), json!(tables::text(&object["status"]["phase"])), tables::age(object, now)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds::{Registry, default_object, validate_create};

    #[test]
    fn a_namespace_gets_its_finalizer_phase_and_label() {
        let info = Registry::built_in().lookup("", "v1", "namespaces").unwrap();
        let mut namespace = json!({"metadata": {"name": "a"}});
        default_object(&info, &mut namespace);
        assert_eq!(
            namespace,
            json!({"metadata": {"name": "a", "labels": {"kubernetes.io/metadata.name": "a"}},
                "spec": {"finalizers": ["kubernetes"]}, "status": {"phase": "Active"}})
        );
        assert!(validate_create(&info, &namespace).is_empty());
        let bad = validate_create(&info, &json!({"metadata": {"name": "a.b"}}));
        assert_eq!(bad[0].field, "metadata.name");
    }
}
