//! Secrets.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Secret;
use serde_json::{Value, json};

use super::built_in::{AGE, BuiltIn, NAME, column, no_prepare};
use super::config_map::{DATA_LIMIT, immutable_data};
use super::field_error::Errors;
use super::{built_in, decode, merge_keys, names, tables};

pub(crate) static SECRET: BuiltIn = BuiltIn {
    group: "",
    version: "v1",
    plural: "secrets",
    singular: "secret",
    kind: "Secret",
    short_names: &[],
    categories: &[],
    namespaced: true,
    status: false,
    scale: false,
    generation: false,
    keeps_status_on_create: false,
    graceful: false,
    columns: &[
        NAME,
        column("Type", "string", "What the data is for."),
        column("Data", "string", "Number of entries."),
        AGE,
    ],
    selectable: &["type"],
    merge_keys: merge_keys::PLAIN,
    typed: decode::typed::<Secret>,
    schema: built_in::schema::<Secret>(),
    default,
    validate,
    prepare_update: no_prepare,
    validate_update,
    cells,
};

/// The type, and `stringData` becomes `data`: it is never kept.
fn default(object: &mut Value) {
    if tables::text(&object["type"]).is_empty() {
        object["type"] = json!("Opaque");
    }
    let Some(map) = object.as_object_mut() else { return };
    if let Some(Value::Object(plain)) = map.shift_remove("stringData") {
        for (key, value) in plain {
            object["data"][key] = json!(STANDARD.encode(tables::text(&value)));
        }
    }
}

/// The keys that a type must have (Kubernetes, "Types of Secret"); one of the inner list is enough.
fn wanted_keys(secret_type: &str) -> &'static [&'static [&'static str]] {
    match secret_type {
        "kubernetes.io/tls" => &[&["tls.crt"], &["tls.key"]],
        "kubernetes.io/dockercfg" => &[&[".dockercfg"]],
        "kubernetes.io/dockerconfigjson" => &[&[".dockerconfigjson"]],
        "kubernetes.io/basic-auth" => &[&["username", "password"]],
        "kubernetes.io/ssh-auth" => &[&["ssh-privatekey"]],
        _ => &[],
    }
}

fn validate(object: &Value, errors: &mut Errors) {
    let data = &object["data"];
    let mut size = 0;
    for (key, value) in data.as_object().into_iter().flatten() {
        if let Some(problem) = names::config_key(key) {
            errors.invalid(format!("data[{key}]"), key.as_str(), problem);
        }
        size += tables::text(value).len() / 4 * 3;
    }
    if size > DATA_LIMIT {
        errors.too_long("data", DATA_LIMIT);
    }
    let secret_type = tables::text(&object["type"]);
    for choice in wanted_keys(secret_type) {
        if !choice.iter().any(|key| data.get(key).is_some()) {
            match choice {
                [key] => errors.required(format!("data[{key}]"), ""),
                keys => keys.iter().for_each(|key| errors.required(format!("data[{key}]"), "")),
            }
        }
    }
    if secret_type == "kubernetes.io/service-account-token"
        && tables::text(&object["metadata"]["annotations"]["kubernetes.io/service-account.name"]).is_empty()
    {
        errors.required("metadata.annotations[kubernetes.io/service-account.name]", "");
    }
    for key in [".dockerconfigjson", ".dockercfg"] {
        if let Some(text) = data[key].as_str() {
            let parsed = STANDARD.decode(text).ok().and_then(|b| serde_json::from_slice::<Value>(&b).ok());
            if secret_type.starts_with("kubernetes.io/dockerc") && parsed.is_none() {
                errors.invalid(format!("data[{key}]"), "<secret contents redacted>", "invalid JSON");
            }
        }
    }
}

fn validate_update(old: &Value, new: &Value, errors: &mut Errors) {
    errors.immutable("type", &old["type"], &new["type"]);
    immutable_data(old, new, &["data"], errors);
}

fn cells(object: &Value, now: Timestamp) -> Vec<Value> {
    vec![
        tables::name(object),
        json!(tables::text(&object["type"])),
        json!(tables::count(&object["data"])),
        tables::age(object, now),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds::{Registry, default_object, table_row, validate_create, validate_update};

    #[test]
    fn string_data_becomes_data_and_types_are_checked() {
        let info = Registry::built_in().lookup("", "v1", "secrets").unwrap();
        let mut secret = json!({"metadata": {"name": "a", "namespace": "n"}, "stringData": {"k": "v"}});
        default_object(&info, &mut secret);
        assert_eq!(secret["data"], json!({"k": "dg=="}));
        assert_eq!((secret["type"].as_str(), secret.get("stringData")), (Some("Opaque"), None));
        assert!(validate_create(&info, &secret).is_empty());
        assert_eq!(table_row(&info, &secret, Timestamp::now())[1..3], [json!("Opaque"), json!(1)]);

        let mut tls = secret.clone();
        tls["type"] = json!("kubernetes.io/tls");
        let found: Vec<_> = validate_create(&info, &tls).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["data[tls.crt]: Required value", "data[tls.key]: Required value"]);
        let found: Vec<_> = validate_update(&info, &secret, &tls).iter().map(|e| e.field.clone()).collect();
        assert!(found.contains(&"type".to_owned()), "{found:?}");
    }
}
