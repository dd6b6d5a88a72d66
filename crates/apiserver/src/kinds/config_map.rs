//! ConfigMaps.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::ConfigMap;
use serde_json::{Value, json};

use super::built_in::{AGE, BuiltIn, NAME, column, no_default, no_prepare};
use super::field_error::Errors;
use super::{built_in, decode, merge_keys, names, tables};

/// What all values of one ConfigMap or Secret may hold together, in bytes.
pub(crate) const DATA_LIMIT: usize = 1 << 20;

pub(crate) static CONFIG_MAP: BuiltIn = BuiltIn {
    group: "",
    version: "v1",
    plural: "configmaps",
    singular: "configmap",
    kind: "ConfigMap",
    short_names: &["cm"],
    categories: &[],
    namespaced: true,
    status: false,
    scale: false,
    generation: false,
    keeps_status_on_create: false,
    graceful: false,
    columns: &[NAME, column("Data", "string", "Number of entries."), AGE],
    selectable: &[],
    merge_keys: merge_keys::PLAIN,
    typed: decode::typed::<ConfigMap>,
    schema: built_in::schema::<ConfigMap>(),
    default: no_default,
    validate,
    prepare_update: no_prepare,
    validate_update,
    cells,
};

fn validate(object: &Value, errors: &mut Errors) {
    let mut size = 0;
    for part in ["data", "binaryData"] {
        for (key, value) in object[part].as_object().into_iter().flatten() {
            if let Some(problem) = names::config_key(key) {
                errors.invalid(format!("{part}[{key}]"), key.as_str(), problem);
            }
            if part == "binaryData" && object["data"].get(key).is_some() {
                errors.invalid(format!("data[{key}]"), key.as_str(), "duplicate of key present in binaryData");
            }
            size += tables::text(value).len();
        }
    }
    if size > DATA_LIMIT {
        errors.too_long("", DATA_LIMIT);
    }
}

fn validate_update(old: &Value, new: &Value, errors: &mut Errors) {
    immutable_data(old, new, &["data", "binaryData"], errors);
}

/// `immutable: true` is for good, and so is the data under it.
pub(crate) fn immutable_data(old: &Value, new: &Value, parts: &[&str], errors: &mut Errors) {
    if old["immutable"] != json!(true) {
        return;
    }
    if new["immutable"] != json!(true) {
        errors.forbidden("immutable", "field is immutable when `immutable` is set");
    }
    for part in parts {
        if old[part] != new[part] {
            errors.forbidden(*part, "field is immutable when `immutable` is set");
        }
    }
}

fn cells(object: &Value, now: Timestamp) -> Vec<Value> {
    let entries = tables::count(&object["data"]) + tables::count(&object["binaryData"]);
    vec![tables::name(object), json!(entries), tables::age(object, now)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds::{Registry, validate_create, validate_update};

    #[test]
    fn keys_are_checked_and_immutable_data_stays() {
        let info = Registry::built_in().lookup("", "v1", "configmaps").unwrap();
        let good =
            json!({"metadata": {"name": "a", "namespace": "n"}, "data": {"a.b": "x"}, "binaryData": {"c": "AA=="}});
        assert!(validate_create(&info, &good).is_empty());
        let bad = json!({"metadata": {"name": "a", "namespace": "n"}, "data": {"a/b": "x", "c": ""}, "binaryData": {"c": "AA=="}});
        let found: Vec<_> = validate_create(&info, &bad).iter().map(|e| e.field.clone()).collect();
        assert_eq!(found, ["data[a/b]", "data[c]"]);

        let mut old = good;
        old["immutable"] = json!(true);
        let mut new = old.clone();
        new["data"]["a.b"] = json!("y");
        let found: Vec<_> = validate_update(&info, &old, &new).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["data: Forbidden: field is immutable when `immutable` is set"]);
    }
}
