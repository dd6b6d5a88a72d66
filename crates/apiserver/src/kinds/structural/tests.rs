//! Objects that a schema accepts and rejects, as data.

use serde_json::json;

use super::*;
use crate::kinds::field_error::Errors;

fn schema() -> Schema {
    Schema::compile(
        &json!({"type": "object", "required": ["spec"], "properties": {"spec": {"type": "object", "required": ["host"],
        "properties": {
            "host": {"type": "string", "minLength": 1, "maxLength": 5, "pattern": "^[a-z]+$"},
            "port": {"type": "integer", "minimum": 1, "maximum": 65535, "default": 80, "format": "int32"},
            "mode": {"type": "string", "enum": ["A", "B"], "default": "A"},
            "weight": {"x-kubernetes-int-or-string": true, "anyOf": [{"type": "integer"}, {"type": "string"}]},
            "note": {"type": "string", "nullable": true},
            "labels": {"type": "object", "additionalProperties": {"type": "string"}},
            "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
            "list": {"type": "array", "maxItems": 2, "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"],
                "items": {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}, "n": {"type": "integer", "default": 7}}}},
            "either": {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "string"}},
                "oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
            "set": {"type": "array", "x-kubernetes-list-type": "set", "items": {"type": "string"}}
        }}}}),
    )
}

fn problems(spec: Value) -> Vec<String> {
    let mut errors = Errors::default();
    schema().validate(&json!({"apiVersion": "x/v1", "kind": "X", "metadata": {}, "spec": spec}), "", &mut errors);
    errors.0.iter().map(ToString::to_string).collect()
}

#[test]
fn good_objects_are_accepted() {
    for spec in [
        json!({"host": "a"}),
        json!({"host": "abc", "port": 1, "mode": "B", "weight": 5, "note": null, "labels": {"a": "b"}, "free": {"x": [1]}}),
        json!({"host": "abc", "weight": "10%", "list": [{"name": "a"}, {"name": "b"}], "either": {"a": "x"}, "set": ["a", "b"]}),
    ] {
        assert_eq!(problems(spec.clone()), Vec::<String>::new(), "{spec}");
    }
}

#[test]
fn bad_objects_are_rejected_with_the_field() {
    for (spec, expected) in [
        (json!({}), "spec.host: Required value"),
        (
            json!({"host": 3}),
            "spec.host: Invalid value: \"integer\": spec.host in body must be of type string: \"integer\"",
        ),
        (json!({"host": "abcdef"}), "spec.host: Too long: may not be more than 5 bytes"),
        (json!({"host": "A"}), "spec.host: Invalid value: \"A\": spec.host in body should match '^[a-z]+$'"),
        (json!({"host": ""}), "spec.host: Invalid value: \"\": spec.host in body should be at least 1 chars long"),
        (
            json!({"host": "a", "port": 0}),
            "spec.port: Invalid value: 0: spec.port in body should be greater than or equal to 1",
        ),
        (
            json!({"host": "a", "port": 1.5}),
            "spec.port: Invalid value: \"number\": spec.port in body must be of type integer: \"number\"",
        ),
        (json!({"host": "a", "mode": "C"}), "spec.mode: Unsupported value: \"C\": supported values: \"A\", \"B\""),
        (json!({"host": "a", "weight": true}), "spec.weight: Invalid value: \"boolean\""),
        (json!({"host": "a", "mode": null}), "spec.mode: Invalid value: \"null\""),
        (json!({"host": "a", "labels": {"a": 1}}), "spec.labels.a: Invalid value: \"integer\""),
        (json!({"host": "a", "list": [{}]}), "spec.list[0].name: Required value"),
        (
            json!({"host": "a", "list": [{"name": "a"}, {"name": "a"}]}),
            "spec.list[1]: Duplicate value: {\"name\":\"a\"}",
        ),
        (
            json!({"host": "a", "list": [{"name": "a"}, {"name": "b"}, {"name": "c"}]}),
            "spec.list: Too many: 3: must have at most 2 items",
        ),
        (
            json!({"host": "a", "either": {}}),
            "spec.either: Invalid value: \"\": \"spec.either\" must validate one and only one schema (oneOf). Found none valid",
        ),
        (json!({"host": "a", "set": ["x", "x"]}), "spec.set[1]: Duplicate value: \"x\""),
    ] {
        let found = problems(spec);
        assert!(found.iter().any(|f| f.starts_with(expected)), "{expected}: {found:?}");
    }
}

#[test]
fn unknown_fields_go_and_defaults_come() {
    let mut object = json!({"apiVersion": "x/v1", "kind": "X", "metadata": {"name": "a"}, "other": 1,
        "spec": {"host": "a", "hots": "b", "mode": null, "free": {"x": {"y": 1}}, "list": [{"name": "a", "z": 1}]}});
    let mut dropped = Vec::new();
    schema().prune(&mut object, &mut String::new(), &mut dropped);
    schema().default(&mut object);
    assert_eq!(dropped, ["other", "spec.hots", "spec.list[0].z"]);
    assert_eq!(
        object["spec"],
        json!({"host": "a", "mode": "A", "free": {"x": {"y": 1}}, "list": [{"name": "a", "n": 7}], "port": 80})
    );
}
