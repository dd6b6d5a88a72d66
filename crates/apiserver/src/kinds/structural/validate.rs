//! Validation of a value against a structural schema, in the words of Kubernetes' API server.

use jiff::Timestamp;
use serde_json::{Value, json};

use super::{JsonType, Limits, Schema};
use crate::kinds::field_error::{Errors, FieldErrorKind};

impl Schema {
    /// Checks a value; `path` is empty for the object itself.
    pub(crate) fn validate(&self, value: &Value, path: &str, errors: &mut Errors) {
        if value.is_null() && self.nullable {
            return;
        }
        if !self.has_type(value) {
            let wanted = self.type_name();
            let found = type_of(value);
            errors.type_invalid(path, found, format!("{} in body must be of type {wanted}: {found:?}", shown(path)));
            return;
        }
        match value {
            Value::Object(map) => {
                for name in &self.required {
                    if !map.contains_key(name.as_ref()) {
                        errors.required(join(path, name), "");
                    }
                }
                for (name, value) in map {
                    if let Some(schema) = self.property(name).or(self.additional.as_deref()) {
                        schema.validate(value, &join(path, name), errors);
                    }
                }
            }
            Value::Array(items) => {
                if let Some(schema) = &self.items {
                    for (i, item) in items.iter().enumerate() {
                        schema.validate(item, &format!("{path}[{i}]"), errors);
                    }
                }
            }
            _ => {}
        }
        if let Some(limits) = &self.limits {
            limits.validate(value, path, errors);
        }
    }

    fn has_type(&self, value: &Value) -> bool {
        match self.json_type {
            JsonType::Any => true,
            JsonType::Object => value.is_object(),
            JsonType::Array => value.is_array(),
            JsonType::String => value.is_string(),
            JsonType::Number => value.is_number(),
            JsonType::Boolean => value.is_boolean(),
            JsonType::Integer => is_integer(value),
            JsonType::IntOrString => is_integer(value) || value.is_string(),
        }
    }

    fn type_name(&self) -> &'static str {
        match self.json_type {
            JsonType::Any => "any",
            JsonType::Object => "object",
            JsonType::Array => "array",
            JsonType::String => "string",
            JsonType::Number => "number",
            JsonType::Boolean => "boolean",
            JsonType::Integer => "integer",
            JsonType::IntOrString => "integer,string",
        }
    }

    fn accepts(&self, value: &Value, path: &str) -> bool {
        let mut errors = Errors::default();
        self.validate(value, path, &mut errors);
        errors.0.is_empty()
    }
}

fn is_integer(value: &Value) -> bool {
    value.is_i64() || value.is_u64() || value.as_f64().is_some_and(|n| n.fract() == 0.0)
}

fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) if is_integer(value) => "integer",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

fn shown(path: &str) -> &str {
    if path.is_empty() { "object" } else { path }
}

impl Limits {
    fn validate(&self, value: &Value, path: &str, errors: &mut Errors) {
        if !self.one_of_values.is_empty() && !self.one_of_values.contains(value) {
            let list: Vec<String> = self.one_of_values.iter().map(Value::to_string).collect();
            errors.push(
                FieldErrorKind::NotSupported,
                path,
                value.clone(),
                format!("supported values: {}", list.join(", ")),
            );
        }
        match value {
            Value::String(text) => self.validate_text(text, path, errors),
            Value::Number(number) => self.validate_number(number.as_f64().unwrap_or(0.0), value, path, errors),
            Value::Array(items) => self.validate_items(items, path, errors),
            Value::Object(map) => {
                let count = map.len();
                if self.min_properties.is_some_and(|n| count < n) {
                    let least = self.min_properties.unwrap_or_default();
                    errors.invalid(
                        path,
                        value.clone(),
                        format!("{} in body should have at least {least} properties", shown(path)),
                    );
                }
                if let Some(most) = self.max_properties.filter(|n| count > *n) {
                    errors.too_many(path, count, most);
                }
            }
            _ => {}
        }
        self.validate_combined(value, path, errors);
    }

    fn validate_text(&self, text: &str, path: &str, errors: &mut Errors) {
        let length = text.chars().count();
        if let Some(least) = self.min_length.filter(|n| length < *n) {
            errors.invalid(path, text, format!("{} in body should be at least {least} chars long", shown(path)));
        }
        if let Some(most) = self.max_length.filter(|n| length > *n) {
            errors.too_long(path, most);
        }
        if let Some(pattern) = &self.pattern {
            // Patterns are compiled for each use: kept ones would cost more memory than they save time. One that can't be
            // compiled was refused with the definition.
            let matches = regex_lite::Regex::new(pattern).map_or(true, |r| r.is_match(text));
            if !matches {
                errors.invalid(path, text, format!("{} in body should match '{pattern}'", shown(path)));
            }
        }
        if let Some(format) = &self.format
            && !has_format(text, format)
        {
            errors.invalid(path, text, format!("{} in body must be of type {format}: {text:?}", shown(path)));
        }
    }

    fn validate_number(&self, number: f64, value: &Value, path: &str, errors: &mut Errors) {
        let shown = shown(path);
        if let Some(least) = self.minimum {
            if self.exclusive_minimum && number <= least {
                errors.invalid(path, value.clone(), format!("{shown} in body should be greater than {least}"));
            } else if number < least {
                errors.invalid(
                    path,
                    value.clone(),
                    format!("{shown} in body should be greater than or equal to {least}"),
                );
            }
        }
        if let Some(most) = self.maximum {
            if self.exclusive_maximum && number >= most {
                errors.invalid(path, value.clone(), format!("{shown} in body should be less than {most}"));
            } else if number > most {
                errors.invalid(path, value.clone(), format!("{shown} in body should be less than or equal to {most}"));
            }
        }
        if let Some(step) = self.multiple_of.filter(|s| *s != 0.0)
            && (number / step).fract() != 0.0
        {
            errors.invalid(path, value.clone(), format!("{shown} in body should be a multiple of {step}"));
        }
        if self.format.as_deref() == Some("int32") && !(f64::from(i32::MIN)..=f64::from(i32::MAX)).contains(&number) {
            errors.invalid(path, value.clone(), format!("{shown} in body must be of type int32: {value}"));
        }
    }

    fn validate_items(&self, items: &[Value], path: &str, errors: &mut Errors) {
        if let Some(least) = self.min_items.filter(|n| items.len() < *n) {
            errors.invalid(path, items.len(), format!("{} in body should have at least {least} items", shown(path)));
        }
        if let Some(most) = self.max_items.filter(|n| items.len() > *n) {
            errors.too_many(path, items.len(), most);
        }
        let key = |item: &Value| -> Value {
            if self.map_keys.is_empty() {
                item.clone()
            } else {
                self.map_keys.iter().map(|k| (k.to_string(), item[k.as_ref()].clone())).collect()
            }
        };
        if self.is_set || !self.map_keys.is_empty() {
            let mut seen = std::collections::HashSet::new();
            for (i, item) in items.iter().enumerate() {
                let key = key(item);
                if !seen.insert(key.to_string()) {
                    errors.duplicate(format!("{path}[{i}]"), key);
                }
            }
        }
    }

    fn validate_combined(&self, value: &Value, path: &str, errors: &mut Errors) {
        for schema in &self.all_of {
            schema.validate(value, path, errors);
        }
        if !self.any_of.is_empty() && !self.any_of.iter().any(|s| s.accepts(value, path)) {
            errors.invalid(path, "", format!("{:?} must validate at least one schema (anyOf)", shown(path)));
        }
        if !self.one_of.is_empty() {
            match self.one_of.iter().filter(|s| s.accepts(value, path)).count() {
                1 => {}
                n => {
                    let found = if n == 0 { "none valid".to_owned() } else { format!("{n} valid alternatives") };
                    errors.invalid(
                        path,
                        "",
                        format!("{:?} must validate one and only one schema (oneOf). Found {found}", shown(path)),
                    );
                }
            }
        }
        if let Some(schema) = &self.not
            && schema.accepts(value, path)
        {
            errors.invalid(path, "", format!("{:?} must not validate the schema (not)", shown(path)));
        }
    }
}

/// The formats that Kubernetes checks in strings; others pass.
fn has_format(text: &str, format: &str) -> bool {
    match format {
        "date-time" | "datetime" => text.parse::<Timestamp>().is_ok(),
        "date" => text.parse::<jiff::civil::Date>().is_ok(),
        "ipv4" => text.parse::<std::net::Ipv4Addr>().is_ok(),
        "ipv6" => text.parse::<std::net::Ipv6Addr>().is_ok(),
        "cidr" => crate::kinds::node::is_cidr(text),
        "uuid" => uuid::Uuid::try_parse(text).is_ok(),
        "byte" => base64::Engine::decode(&base64::engine::general_purpose::STANDARD, text).is_ok(),
        _ => true,
    }
}

/// A schema's own problems that would make it useless: patterns that can't be compiled.
pub(crate) fn check_patterns(schema: &Value, at: &str, errors: &mut Errors) {
    if let Some(pattern) = schema["pattern"].as_str()
        && let Err(error) = regex_lite::Regex::new(pattern)
    {
        errors.invalid(
            format!("{at}.pattern"),
            pattern,
            format!("must be a valid regular expression, but isn't: {error}"),
        );
    }
    for (name, value) in schema["properties"].as_object().into_iter().flatten() {
        check_patterns(value, &format!("{at}.properties[{name}]"), errors);
    }
    for part in ["items", "additionalProperties", "not"] {
        if schema[part].is_object() {
            check_patterns(&schema[part], &format!("{at}.{part}"), errors);
        }
    }
    for part in ["allOf", "anyOf", "oneOf"] {
        for (i, value) in schema[part].as_array().into_iter().flatten().enumerate() {
            check_patterns(value, &format!("{at}.{part}[{i}]"), errors);
        }
    }
    if schema["default"] != json!(null)
        && schema.get("type").is_none()
        && schema.get("x-kubernetes-int-or-string").is_none()
    {
        errors.forbidden(format!("{at}.default"), "must not be set without a type");
    }
}
