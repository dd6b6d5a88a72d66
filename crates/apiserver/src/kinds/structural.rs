//! Custom resources against the structural OpenAPI v3 schema of their definition: pruning, defaults, validation
//! (Kubernetes, "Specifying a structural schema").
//!
//! The schema is kept without its descriptions: a Gateway API definition is then a tenth of its JSON. CEL rules
//! (`x-kubernetes-validations`) are not run.

use serde_json::{Map, Value};

mod validate;

pub(crate) use validate::check_patterns;

/// The JSON type that a schema wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum JsonType {
    Any,
    Object,
    Array,
    String,
    Integer,
    Number,
    Boolean,
    IntOrString,
}

/// A compiled schema.
#[derive(Debug, Clone)]
pub(crate) struct Schema {
    json_type: JsonType,
    nullable: bool,
    preserve_unknown: bool,
    embedded: bool,
    properties: Box<[(Box<str>, Schema)]>,
    additional: Option<Box<Schema>>,
    items: Option<Box<Schema>>,
    required: Box<[Box<str>]>,
    default: Option<Box<Value>>,
    limits: Option<Box<Limits>>,
}

/// The value validations of a schema; most have none.
#[derive(Debug, Clone, Default)]
struct Limits {
    format: Option<Box<str>>,
    pattern: Option<Box<str>>,
    one_of_values: Box<[Value]>,
    minimum: Option<f64>,
    maximum: Option<f64>,
    exclusive_minimum: bool,
    exclusive_maximum: bool,
    multiple_of: Option<f64>,
    min_length: Option<usize>,
    max_length: Option<usize>,
    min_items: Option<usize>,
    max_items: Option<usize>,
    min_properties: Option<usize>,
    max_properties: Option<usize>,
    is_set: bool,
    map_keys: Box<[Box<str>]>,
    all_of: Box<[Schema]>,
    any_of: Box<[Schema]>,
    one_of: Box<[Schema]>,
    not: Option<Box<Schema>>,
}

impl Schema {
    /// Compiles `openAPIV3Schema`. What isn't understood constrains nothing: the definition's own validation has
    /// refused what may not be there.
    pub(crate) fn compile(schema: &Value) -> Self {
        let flag = |name: &str| schema[name] == Value::Bool(true);
        let json_type = if flag("x-kubernetes-int-or-string") {
            JsonType::IntOrString
        } else {
            match schema["type"].as_str() {
                Some("object") => JsonType::Object,
                Some("array") => JsonType::Array,
                Some("string") => JsonType::String,
                Some("integer") => JsonType::Integer,
                Some("number") => JsonType::Number,
                Some("boolean") => JsonType::Boolean,
                _ => JsonType::Any,
            }
        };
        let compile = |value: &Value| value.is_object().then(|| Box::new(Self::compile(value)));
        Self {
            json_type,
            nullable: flag("nullable"),
            preserve_unknown: flag("x-kubernetes-preserve-unknown-fields")
                || schema["additionalProperties"] == Value::Bool(true),
            embedded: flag("x-kubernetes-embedded-resource"),
            properties: schema["properties"]
                .as_object()
                .into_iter()
                .flatten()
                .map(|(name, property)| (name.as_str().into(), Self::compile(property)))
                .collect(),
            additional: compile(&schema["additionalProperties"]),
            items: compile(&schema["items"]),
            required: texts(&schema["required"]),
            default: schema.get("default").map(|d| Box::new(d.clone())),
            limits: Limits::compile(schema).map(Box::new),
        }
    }

    fn property(&self, name: &str) -> Option<&Self> {
        self.properties.iter().find(|(n, _)| n.as_ref() == name).map(|(_, schema)| schema)
    }

    /// Drops what the schema doesn't know and notes the paths of what was dropped.
    pub(crate) fn prune(&self, value: &mut Value, path: &mut String, dropped: &mut Vec<String>) {
        self.prune_at(value, path, dropped, true);
    }

    fn prune_at(&self, value: &mut Value, path: &mut String, dropped: &mut Vec<String>, root: bool) {
        let length = path.len();
        match value {
            Value::Object(map) => {
                let resource = root || self.embedded;
                map.retain(|key, value| {
                    if resource && matches!(key.as_str(), "apiVersion" | "kind" | "metadata") {
                        return true;
                    }
                    if length > 0 {
                        path.push('.');
                    }
                    path.push_str(key);
                    let schema = self.property(key).or(self.additional.as_deref());
                    let keep = match schema {
                        Some(schema) => {
                            schema.prune_at(value, path, dropped, false);
                            true
                        }
                        None if self.preserve_unknown || self.json_type == JsonType::IntOrString => true,
                        None => {
                            super::decode::note_unknown(path, dropped);
                            false
                        }
                    };
                    path.truncate(length);
                    keep
                });
            }
            Value::Array(items) => {
                let Some(schema) = &self.items else { return };
                for (i, item) in items.iter_mut().enumerate() {
                    path.push_str(&format!("[{i}]"));
                    schema.prune_at(item, path, dropped, false);
                    path.truncate(length);
                }
            }
            _ => {}
        }
    }

    /// Fills in defaults, also inside what is filled in. A null where null isn't allowed counts as missing.
    pub(crate) fn default(&self, value: &mut Value) {
        match value {
            Value::Object(map) => {
                for (name, schema) in &self.properties {
                    schema.default_property(name, map);
                }
                if let Some(schema) = &self.additional {
                    for (name, value) in map.iter_mut() {
                        if self.property(name).is_none() {
                            schema.default(value);
                        }
                    }
                }
            }
            Value::Array(items) => {
                if let Some(schema) = &self.items {
                    items.iter_mut().for_each(|item| schema.default(item));
                }
            }
            _ => {}
        }
    }

    fn default_property(&self, name: &str, map: &mut Map<String, Value>) {
        let missing = map.get(name).is_none_or(|v| v.is_null() && !self.nullable);
        if missing && let Some(default) = &self.default {
            map.insert(name.to_owned(), (**default).clone());
        }
        if let Some(value) = map.get_mut(name) {
            self.default(value);
        }
    }
}

fn texts(value: &Value) -> Box<[Box<str>]> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).map(Into::into).collect()
}

impl Limits {
    fn compile(schema: &Value) -> Option<Self> {
        let size = |name: &str| schema[name].as_u64().and_then(|n| usize::try_from(n).ok());
        let schemas = |name: &str| -> Box<[Schema]> {
            schema[name].as_array().into_iter().flatten().map(Schema::compile).collect()
        };
        const LIMITING: &[&str] = &[
            "format",
            "pattern",
            "enum",
            "minimum",
            "maximum",
            "multipleOf",
            "minLength",
            "maxLength",
            "minItems",
            "maxItems",
            "minProperties",
            "maxProperties",
            "uniqueItems",
            "x-kubernetes-list-type",
            "allOf",
            "anyOf",
            "oneOf",
            "not",
        ];
        if !LIMITING.iter().any(|name| schema.get(name).is_some()) {
            return None;
        }
        let list_type = schema["x-kubernetes-list-type"].as_str();
        Some(Self {
            format: schema["format"].as_str().map(Into::into),
            pattern: schema["pattern"].as_str().map(Into::into),
            one_of_values: schema["enum"].as_array().cloned().unwrap_or_default().into(),
            minimum: schema["minimum"].as_f64(),
            maximum: schema["maximum"].as_f64(),
            exclusive_minimum: schema["exclusiveMinimum"] == Value::Bool(true),
            exclusive_maximum: schema["exclusiveMaximum"] == Value::Bool(true),
            multiple_of: schema["multipleOf"].as_f64(),
            min_length: size("minLength"),
            max_length: size("maxLength"),
            min_items: size("minItems"),
            max_items: size("maxItems"),
            min_properties: size("minProperties"),
            max_properties: size("maxProperties"),
            is_set: list_type == Some("set") || schema["uniqueItems"] == Value::Bool(true),
            map_keys: if list_type == Some("map") {
                texts(&schema["x-kubernetes-list-map-keys"])
            } else {
                Box::default()
            },
            all_of: schemas("allOf"),
            any_of: schemas("anyOf"),
            one_of: schemas("oneOf"),
            not: schema["not"].is_object().then(|| Box::new(Schema::compile(&schema["not"]))),
        })
    }
}

#[cfg(test)]
mod tests;
