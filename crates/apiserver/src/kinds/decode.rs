//! Objects of built-in kinds through their typed form: wrong JSON types are errors that name the field, and fields that the
//! kind doesn't know are found and dropped.

use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use super::built_in::BuiltIn;

/// An object whose fields all have the types that its kind says.
#[derive(Debug, Clone, PartialEq)]
pub struct Decoded {
    /// The object, without what the kind doesn't know.
    pub object: Value,
    /// Paths of fields that were dropped because the kind doesn't know them (for `fieldValidation`).
    pub unknown_fields: Vec<String>,
}

/// A field of a wrong type. The API answers 400 with it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}{message}", if field.is_empty() { String::new() } else { format!("{field}: ") })]
pub struct DecodeError {
    /// Path of the field, for example `spec.replicas`.
    pub field: String,
    /// What was found and what was expected.
    pub message: String,
}

/// An object through the Rust type `T` of its kind and back.
pub(crate) fn typed<T: DeserializeOwned + Serialize>(object: &Value) -> Result<Value, DecodeError> {
    let value: T = serde_path_to_error::deserialize(object).map_err(|error| {
        let field = error.path().to_string();
        DecodeError { field: if field == "." { String::new() } else { field }, message: error.into_inner().to_string() }
    })?;
    serde_json::to_value(value)
        .map_err(|error| DecodeError { field: String::new(), message: format!("cannot be written again: {error}") })
}

/// Decodes an object of a built-in kind.
pub(crate) fn built_in(kind: &BuiltIn, mut object: Value) -> Result<Decoded, DecodeError> {
    if !object.is_object() {
        return Err(DecodeError { field: String::new(), message: "the object must be a JSON object".to_owned() });
    }
    for part in ["spec", "status"] {
        if let Some(value) = object.get_mut(part) {
            quantities_as_text(value);
        }
    }
    let typed = (kind.typed)(&object)?;
    let mut unknown_fields = Vec::new();
    keep_known(&mut object, &typed, &mut String::new(), &mut unknown_fields);
    Ok(Decoded { object, unknown_fields })
}

/// Kubernetes takes quantities written as numbers (`cpu: 1`); the typed form knows text only.
fn quantities_as_text(value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(quantities_as_text),
        Value::Object(map) => {
            for (key, value) in map.iter_mut() {
                match key.as_str() {
                    "limits" | "requests" | "capacity" | "allocatable" => {
                        if let Value::Object(amounts) = value {
                            amounts.values_mut().for_each(number_as_text);
                        }
                    }
                    "sizeLimit" | "divisor" => number_as_text(value),
                    "annotations" | "labels" | "matchLabels" => {}
                    _ => quantities_as_text(value),
                }
            }
        }
        _ => {}
    }
}

fn number_as_text(value: &mut Value) {
    if value.is_number() {
        *value = Value::String(value.to_string());
    }
}

/// How many unknown fields of one object are told.
const MOST_UNKNOWN: usize = 100;

/// Notes the path of a field that is dropped.
pub(crate) fn note_unknown(path: &str, unknown: &mut Vec<String>) {
    if unknown.len() < MOST_UNKNOWN {
        unknown.push(path.to_owned());
    }
}

/// Keeps of `object` what `typed` has too, with the values as `typed` writes them. Nothing is added: what the typed form
/// makes up for a missing field would hide that it is missing.
pub(crate) fn keep_known(object: &mut Value, typed: &Value, path: &mut String, unknown: &mut Vec<String>) {
    match (object, typed) {
        (Value::Object(map), Value::Object(known)) => {
            let length = path.len();
            map.retain(|key, value| {
                if value.is_null() {
                    return false;
                }
                if length > 0 {
                    path.push('.');
                }
                path.push_str(key);
                let keep = match known.get(key) {
                    Some(typed) => {
                        keep_known(value, typed, path, unknown);
                        true
                    }
                    None => {
                        note_unknown(path, unknown);
                        false
                    }
                };
                path.truncate(length);
                keep
            });
        }
        (Value::Array(items), Value::Array(known)) => {
            let length = path.len();
            for (i, (item, known)) in items.iter_mut().zip(known).enumerate() {
                path.push_str(&format!("[{i}]"));
                keep_known(item, known, path, unknown);
                path.truncate(length);
            }
        }
        (object, typed) => *object = typed.clone(),
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::apps::v1::Deployment;
    use serde_json::json;

    use super::*;
    use crate::kinds::deployment::DEPLOYMENT;

    #[test]
    fn a_wrong_type_names_its_field() {
        let object = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "a"},
            "spec": {"replicas": 1, "template": {"spec": {"containers": [{"name": 3}]}}}});
        let error = typed::<Deployment>(&object).unwrap_err();
        assert_eq!(error.field, "spec.template.spec.containers[0].name");
        assert!(error.message.contains("invalid type: integer `3`"), "{error}");
    }

    #[test]
    fn unknown_fields_are_dropped_and_named() {
        let object = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "a", "creationTimestamp": null},
            "spec": {"replica": 1, "template": {"spec": {"containers": [{"name": "c", "imag": "x",
                "resources": {"limits": {"cpu": 1}}}]}}}});
        let decoded = built_in(&DEPLOYMENT, object).unwrap();
        assert_eq!(decoded.unknown_fields, ["spec.replica", "spec.template.spec.containers[0].imag"]);
        assert_eq!(
            decoded.object["spec"],
            json!({"template": {"spec": {"containers": [{"name": "c", "resources": {"limits": {"cpu": "1"}}}]}}})
        );
        assert_eq!(decoded.object["metadata"], json!({"name": "a"}));
    }
}
