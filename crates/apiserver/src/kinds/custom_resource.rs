//! Objects of CustomResourceDefinitions: kinds that come and go while the server runs.

use std::borrow::Cow;
use std::sync::Arc;

use edgemesh_api::ResourceName;
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::{Map, Value, json};

use super::decode::{self, DecodeError, Decoded};
use super::field_error::Errors;
use super::json_path::JsonPath;
use super::registry::VERBS;
use super::structural::Schema;
use super::tables::{self, text};
use super::{Behaviour, Column, KindInfo, ScalePaths, Subresources};

/// One served version of a custom resource.
#[derive(Debug)]
pub(crate) struct CustomVersion {
    schema: Schema,
    /// Paths of the columns after the name; nothing where the path can't be parsed.
    columns: Box<[(Option<JsonPath>, Box<str>)]>,
    /// Fields that fieldSelectors may name.
    pub(crate) selectable: Box<[Box<str>]>,
}

/// The kinds that a definition serves: one for each served version.
pub(crate) fn kinds_of(definition: &Value) -> Vec<KindInfo> {
    let spec = &definition["spec"];
    let versions = || spec["versions"].as_array().into_iter().flatten();
    let group = text(&spec["group"]);
    let names = &spec["names"];
    let resource = |version: &str| ResourceName::new(group, version, text(&names["plural"]));
    let Some(storage) = versions().find(|v| v["storage"] == json!(true)) else { return Vec::new() };
    let storage = resource(text(&storage["name"]));
    let words = |value: &Value| -> Vec<Cow<'static, str>> {
        value.as_array().into_iter().flatten().filter_map(Value::as_str).map(|s| Cow::Owned(s.to_owned())).collect()
    };
    let kind = text(&names["kind"]);
    let or = |value: &Value, other: String| match text(value) {
        "" => other,
        text => text.to_owned(),
    };
    versions()
        .filter(|v| v["served"] == json!(true))
        .map(|version| {
            let (columns, paths) = columns(version);
            let selectable = version["selectableFields"].as_array().into_iter().flatten();
            KindInfo {
                resource: resource(text(&version["name"])),
                storage: storage.clone(),
                kind: Cow::Owned(kind.to_owned()),
                list_kind: Cow::Owned(or(&names["listKind"], format!("{kind}List"))),
                singular: Cow::Owned(or(&names["singular"], kind.to_lowercase())),
                short_names: words(&names["shortNames"]),
                categories: words(&names["categories"]),
                namespaced: spec["scope"] == json!("Namespaced"),
                subresources: subresources(&version["subresources"]),
                verbs: VERBS,
                columns,
                behaviour: Behaviour::Custom(Arc::new(CustomVersion {
                    schema: Schema::compile(&version["schema"]["openAPIV3Schema"]),
                    columns: paths,
                    selectable: selectable.map(|f| text(&f["jsonPath"]).trim_start_matches('.').into()).collect(),
                })),
            }
        })
        .collect()
}

fn subresources(subresources: &Value) -> Subresources {
    let scale = &subresources["scale"];
    let path = |name: &str| Cow::Owned(text(&scale[name]).trim_start_matches('.').to_owned());
    Subresources {
        status: subresources["status"].is_object(),
        scale: scale.is_object().then(|| ScalePaths {
            spec_replicas: path("specReplicasPath"),
            status_replicas: path("statusReplicasPath"),
            label_selector: path("labelSelectorPath"),
        }),
    }
}

type ColumnPaths = Box<[(Option<JsonPath>, Box<str>)]>;

fn columns(version: &Value) -> (Vec<Column>, ColumnPaths) {
    let name = Column {
        name: "Name".into(),
        r#type: "string".into(),
        format: "name".into(),
        description: "Name must be unique within a namespace.".into(),
        priority: 0,
    };
    let age = [json!({"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp",
        "description": "Time since the object was created."})];
    let defined = match version["additionalPrinterColumns"].as_array() {
        Some(columns) if !columns.is_empty() => columns.as_slice(),
        _ => &age,
    };
    let mut columns = vec![name];
    let mut paths = Vec::new();
    for column in defined {
        let owned = |field: &str| Cow::Owned(text(&column[field]).to_owned());
        columns.push(Column {
            name: owned("name"),
            r#type: owned("type"),
            format: owned("format"),
            description: owned("description"),
            priority: column["priority"].as_i64().and_then(|p| i32::try_from(p).ok()).unwrap_or(0),
        });
        paths.push((JsonPath::parse(text(&column["jsonPath"])), text(&column["type"]).into()));
    }
    (columns, paths.into())
}

impl CustomVersion {
    /// Prunes the object. Wrong types below `metadata` are errors here; all others are found by the validation.
    pub(crate) fn decode(&self, mut object: Value) -> Result<Decoded, DecodeError> {
        let Some(map) = object.as_object_mut() else {
            return Err(DecodeError { field: String::new(), message: "the object must be a JSON object".to_owned() });
        };
        let mut unknown_fields = Vec::new();
        if let Some(metadata) = map.get_mut("metadata") {
            let typed = decode::typed::<ObjectMeta>(metadata).map_err(|error| DecodeError {
                field: format!("metadata.{}", error.field).trim_end_matches('.').to_owned(),
                message: error.message,
            })?;
            decode::keep_known(metadata, &typed, &mut "metadata".to_owned(), &mut unknown_fields);
        } else {
            map.insert("metadata".to_owned(), Value::Object(Map::new()));
        }
        self.schema.prune(&mut object, &mut String::new(), &mut unknown_fields);
        Ok(Decoded { object, unknown_fields })
    }

    pub(crate) fn default_object(&self, object: &mut Value) {
        self.schema.default(object);
    }

    pub(crate) fn validate(&self, object: &Value, errors: &mut Errors) {
        self.schema.validate(object, "", errors);
    }

    pub(crate) fn cells(&self, object: &Value, now: Timestamp) -> Vec<Value> {
        let cell = |(path, kind): &(Option<JsonPath>, Box<str>)| {
            let value = path.as_ref().and_then(|p| p.first(object)).unwrap_or(&Value::Null);
            match (kind.as_ref(), value) {
                (_, Value::Null) => Value::Null,
                ("date", Value::String(_)) => json!(tables::since(value, now)),
                ("integer", Value::Number(n)) => json!(n.as_i64().or_else(|| n.as_f64().map(|f| f as i64))),
                ("number", Value::Number(_)) | ("boolean", Value::Bool(_)) => value.clone(),
                ("string", Value::String(_)) => value.clone(),
                ("string", other) => json!(other.to_string()),
                _ => Value::Null,
            }
        };
        [tables::name(object)].into_iter().chain(self.columns.iter().map(cell)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds::{
        Registry, decode, default_object, from_storage, prepare_create, prepare_status_update, prepare_update,
        table_row, to_storage, validate_create,
    };

    fn definition() -> Value {
        json!({"metadata": {"name": "widgets.example.com"}, "spec": {"group": "example.com", "scope": "Namespaced",
            "names": {"plural": "widgets", "singular": "widget", "kind": "Widget", "shortNames": ["wd"], "categories": ["all"]},
            "versions": [
                {"name": "v1", "served": true, "storage": true, "subresources": {"status": {}, "scale": {"specReplicasPath": ".spec.n",
                    "statusReplicasPath": ".status.n"}},
                    "additionalPrinterColumns": [{"name": "N", "type": "integer", "jsonPath": ".spec.n"},
                        {"name": "Ready", "type": "string", "jsonPath": ".status.conditions[?(@.type==\"Ready\")].status"},
                        {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}],
                    "schema": {"openAPIV3Schema": {"type": "object", "properties": {
                        "spec": {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}, "m": {"type": "string", "default": "x"}}},
                        "status": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}}}},
                {"name": "v1beta1", "served": true, "storage": false, "schema": {"openAPIV3Schema": {"type": "object",
                    "x-kubernetes-preserve-unknown-fields": true}}},
                {"name": "v1alpha1", "served": false, "storage": false, "schema": {"openAPIV3Schema": {"type": "object"}}}]}})
    }

    #[test]
    fn a_definition_adds_its_served_versions_and_takes_them_away() {
        let registry = Registry::built_in().with_crd(&definition());
        let v1 = registry.lookup("example.com", "v1", "widgets").unwrap();
        assert_eq!(
            (v1.kind.as_ref(), v1.list_kind.as_ref(), v1.short_names[0].as_ref()),
            ("Widget", "WidgetList", "wd")
        );
        assert_eq!(v1.subresources.scale.as_ref().unwrap().spec_replicas, "spec.n");
        let beta = registry.lookup("example.com", "v1beta1", "widgets").unwrap();
        assert_eq!(beta.storage, v1.resource);
        assert!(registry.lookup("example.com", "v1alpha1", "widgets").is_none());
        assert_eq!(
            registry.groups().pop().unwrap(),
            ("example.com".to_owned(), vec!["v1".to_owned(), "v1beta1".to_owned()])
        );
        let mut object = json!({"apiVersion": "example.com/v1beta1"});
        to_storage(&beta, &mut object);
        assert_eq!(object["apiVersion"], json!("example.com/v1"));
        from_storage(&beta, &mut object);
        assert_eq!(object["apiVersion"], json!("example.com/v1beta1"));
        let without = registry.without_crd("widgets.example.com");
        assert!(without.lookup("example.com", "v1", "widgets").is_none());
    }

    #[test]
    fn objects_go_through_the_schema_and_into_the_columns() {
        let registry = Registry::built_in().with_crd(&definition());
        let info = registry.lookup("example.com", "v1", "widgets").unwrap();
        let object = json!({"apiVersion": "example.com/v1", "kind": "Widget", "metadata": {"name": "a", "namespace": "n", "x": 1},
            "spec": {"n": 3, "q": 1}, "status": {"a": 1}});
        let decoded = decode(&info, object).unwrap();
        assert_eq!(decoded.unknown_fields, ["metadata.x", "spec.q"]);
        let mut object = decoded.object;
        prepare_create(&info, &mut object);
        default_object(&info, &mut object);
        assert_eq!(object["spec"], json!({"n": 3, "m": "x"}));
        assert_eq!((&object["metadata"]["generation"], object.get("status")), (&json!(1), None));
        assert_eq!(validate_create(&info, &object), []);
        let mut bad = object.clone();
        bad["spec"]["n"] = json!("three");
        assert_eq!(validate_create(&info, &bad)[0].field, "spec.n");
        bad["spec"] = json!({});
        assert_eq!(validate_create(&info, &bad)[0].to_string(), "spec.n: Required value");

        let mut status = object.clone();
        status["spec"]["n"] = json!(9);
        status["status"] = json!({"conditions": [{"type": "Ready", "status": "True"}]});
        prepare_status_update(&info, &object, &mut status);
        assert_eq!((&status["spec"]["n"], &status["metadata"]["generation"]), (&json!(3), &json!(1)));
        let row = table_row(&info, &status, Timestamp::now());
        assert_eq!(row, [json!("a"), json!(3), json!("True"), Value::Null]);

        let mut changed = status.clone();
        changed["spec"]["n"] = json!(4);
        changed["status"] = json!({});
        prepare_update(&info, &status, &mut changed);
        assert_eq!((&changed["status"], &changed["metadata"]["generation"]), (&status["status"], &json!(2)));
    }
}
