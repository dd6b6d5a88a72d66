//! Reading fields of objects that are held as JSON.

use serde_json::{Map, Value};

/// The value at a path of member names.
pub(crate) fn at<'a>(object: &'a Value, path: &[&str]) -> Option<&'a Value> {
    path.iter().try_fold(object, |value, name| value.get(name))
}

/// The string at a path, or the empty string.
pub(crate) fn text<'a>(object: &'a Value, path: &[&str]) -> &'a str {
    at(object, path).and_then(Value::as_str).unwrap_or_default()
}

/// `metadata.<name>` as a string, or the empty string.
pub(crate) fn meta<'a>(object: &'a Value, name: &str) -> &'a str {
    text(object, &["metadata", name])
}

/// Whether deletion was asked for (`metadata.deletionTimestamp` is set).
pub(crate) fn is_terminating(object: &Value) -> bool {
    at(object, &["metadata", "deletionTimestamp"]).is_some_and(|v| !v.is_null())
}

/// The strings of the array at a path.
pub(crate) fn strings<'a>(object: &'a Value, path: &[&str]) -> impl Iterator<Item = &'a str> {
    at(object, path).and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str)
}

/// The member as a JSON object, made one when it is missing or something else.
pub(crate) fn map_in<'a>(object: &'a mut Value, name: &str) -> &'a mut Map<String, Value> {
    let parent = as_map(object);
    as_map(parent.entry(name).or_insert(Value::Null))
}

/// The value as a JSON object, made one when it is something else.
pub(crate) fn as_map(value: &mut Value) -> &mut Map<String, Value> {
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    match value {
        Value::Object(map) => map,
        // The value was made an object above.
        _ => unreachable!(),
    }
}
