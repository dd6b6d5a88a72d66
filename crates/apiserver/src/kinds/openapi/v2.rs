//! From version 3 schemas to what version 2 can say. What it can't say is left open: version 2 is read by old clients for
//! their own checks, and a check that is too strict would refuse good objects.

use serde_json::{Value, json};

/// Rewrites a schema in place.
pub(super) fn convert(schema: &mut Value) {
    let Some(map) = schema.as_object_mut() else { return };
    let flag = |map: &serde_json::Map<String, Value>, name: &str| map.get(name) == Some(&Value::Bool(true));
    if let Some(reference) = map.get("$ref").cloned() {
        map.retain(|key, _| key == "$ref" || key == "description" || key.starts_with("x-kubernetes-patch"));
        map.insert("$ref".to_owned(), reference);
        return;
    }
    if flag(map, "x-kubernetes-int-or-string") {
        map.insert("type".to_owned(), json!("string"));
        map.insert("format".to_owned(), json!("int-or-string"));
    }
    let open = flag(map, "nullable") || flag(map, "x-kubernetes-preserve-unknown-fields");
    map.retain(|key, _| {
        !matches!(
            key.as_str(),
            "nullable"
                | "allOf"
                | "anyOf"
                | "oneOf"
                | "not"
                | "x-kubernetes-validations"
                | "x-kubernetes-int-or-string"
                | "default"
        )
    });
    if map.get("additionalProperties").is_some_and(|p| !p.is_object()) {
        map.shift_remove("additionalProperties");
    }
    let endless = map.get("type") == Some(&json!("array")) && !map.get("items").is_some_and(Value::is_object);
    if open || endless {
        let kept = |key: &str| matches!(key, "description" | "x-kubernetes-group-version-kind");
        map.retain(|key, _| kept(key));
        return;
    }
    for (key, value) in map.iter_mut() {
        match key.as_str() {
            "properties" => value.as_object_mut().into_iter().flatten().for_each(|(_, v)| convert(v)),
            "items" | "additionalProperties" => convert(value),
            _ => {}
        }
    }
}
