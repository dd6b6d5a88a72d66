//! OpenAPI documents: version 3 by group and version, version 2 as one document in JSON and in gnostic's protobuf.
//!
//! kubectl reads them to explain fields, to merge patches (`x-kubernetes-patch-…`) and to find out whether the server
//! checks fields itself (`fieldValidation` of PATCH). They are built for each request and kept nowhere: requests are rare,
//! clients cache them by the hash in the index, and together they would be larger than the rest of edgecore.

mod gnostic;
mod paths;
mod v2;

use std::sync::Arc;

use schemars::SchemaGenerator;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::built_in::BuiltIn;
use super::merge_keys::MergeRule;
use super::tables::text;
use super::{Behaviour, KindInfo, Registry};

/// The index of version 3: one entry for each group and version. `definitions` are the CustomResourceDefinitions: the
/// registry keeps their schemas without the descriptions.
pub fn openapi_v3_index(registry: &Registry, definitions: &[Arc<Value>]) -> Value {
    let mut paths = Map::new();
    for (group, versions) in registry.groups() {
        for version in versions {
            let path = document_path(&group, &version);
            let mut hash = Sha256::new();
            hash.update(env!("CARGO_PKG_VERSION"));
            for definition in definitions.iter().filter(|d| text(&d["spec"]["group"]) == group) {
                hash.update(definition["spec"].to_string());
            }
            let hash: String = hash.finalize().iter().take(16).map(|b| format!("{b:02X}")).collect();
            let url = format!("/openapi/v3/{path}?hash={hash}");
            paths.insert(path, json!({"serverRelativeURL": url}));
        }
    }
    json!({"paths": paths})
}

/// The document of one group and version; nothing if it isn't served.
pub fn openapi_v3(registry: &Registry, definitions: &[Arc<Value>], group: &str, version: &str) -> Option<Value> {
    let kinds: Vec<_> =
        registry.iter().filter(|k| k.resource.group == group && k.resource.version == version).collect();
    if kinds.is_empty() {
        return None;
    }
    let schemas = Schemas::new("/components/schemas").with(&kinds, definitions);
    let mut out = schemas.finish();
    out.values_mut().for_each(wrap_references);
    let mut all_paths = Map::new();
    for kind in &kinds {
        paths::v3(kind, &definition_name(kind), &mut all_paths);
    }
    Some(json!({
        "openapi": "3.0.0",
        "info": {"title": "Kubernetes", "version": super::VERSION},
        "paths": all_paths,
        "components": {"schemas": out},
    }))
}

/// The whole API in version 2, in JSON.
pub fn openapi_v2(registry: &Registry, definitions: &[Arc<Value>]) -> Value {
    let kinds: Vec<_> = registry.iter().collect();
    let mut schemas = Schemas::new("/definitions").with(&kinds, definitions).finish();
    schemas.values_mut().for_each(v2::convert);
    let mut all_paths = Map::new();
    for kind in &kinds {
        paths::v2(kind, &definition_name(kind), &mut all_paths);
    }
    json!({
        "swagger": "2.0",
        "info": {"title": "Kubernetes", "version": super::VERSION},
        "paths": all_paths,
        "definitions": schemas,
    })
}

/// The whole API in version 2, in the protobuf encoding (`openapi.v2.Document` of gnostic) that is all that kubectl 1.20
/// reads.
pub fn openapi_v2_protobuf(registry: &Registry, definitions: &[Arc<Value>]) -> Vec<u8> {
    gnostic::encode(&openapi_v2(registry, definitions))
}

/// `api/v1` or `apis/apps/v1`.
fn document_path(group: &str, version: &str) -> String {
    if group.is_empty() { format!("api/{version}") } else { format!("apis/{group}/{version}") }
}

/// The name of a kind's schema: that of the Rust type for built-in kinds, `com.example.v1.Widget` for custom ones.
fn definition_name(kind: &KindInfo) -> String {
    match &kind.behaviour {
        Behaviour::BuiltIn(built_in) => (built_in.schema.name)().into_owned(),
        Behaviour::Custom(_) => {
            let group: Vec<&str> = kind.resource.group.rsplit('.').collect();
            format!("{}.{}.{}", group.join("."), kind.resource.version, kind.kind)
        }
    }
}

fn reference_name(schema: &Value) -> String {
    text(&schema["$ref"]).rsplit('/').next().unwrap_or_default().to_owned()
}

/// Named schemas that refer to one another.
struct Schemas {
    generator: SchemaGenerator,
    roots: Vec<(String, Value, Option<&'static BuiltIn>)>,
    custom: Vec<(String, Value)>,
}

impl Schemas {
    fn new(prefix: &'static str) -> Self {
        let settings = SchemaSettings::openapi3().with(|s| s.definitions_path = prefix.into());
        Self { generator: SchemaGenerator::new(settings), roots: Vec::new(), custom: Vec::new() }
    }

    fn with(mut self, kinds: &[&Arc<KindInfo>], definitions: &[Arc<Value>]) -> Self {
        for kind in kinds {
            let gvk = json!({"group": kind.resource.group, "version": kind.resource.version, "kind": kind.kind});
            match &kind.behaviour {
                Behaviour::BuiltIn(built_in) => {
                    (built_in.schema.generate)(&mut self.generator);
                    let name = (built_in.schema.name)().into_owned();
                    self.roots.push((name, gvk, Some(built_in)));
                }
                Behaviour::Custom(_) => {
                    let schema = self.custom_schema(kind, definitions);
                    let name = definition_name(kind);
                    self.custom.push((name.clone(), schema));
                    self.roots.push((name, gvk, None));
                }
            }
        }
        self
    }

    /// The schema of a custom resource, with what every object has.
    fn custom_schema(&mut self, kind: &KindInfo, definitions: &[Arc<Value>]) -> Value {
        let mut schema = definitions
            .iter()
            .filter(|d| {
                text(&d["spec"]["group"]) == kind.resource.group
                    && text(&d["spec"]["names"]["plural"]) == kind.resource.plural
            })
            .flat_map(|d| d["spec"]["versions"].as_array().into_iter().flatten())
            .find(|v| text(&v["name"]) == kind.resource.version)
            .map(|v| v["schema"]["openAPIV3Schema"].clone())
            .filter(Value::is_object)
            .unwrap_or_else(|| json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true}));
        let metadata =
            self.generator.subschema_for::<k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta>().to_value();
        if schema["properties"].is_null() {
            schema["properties"] = json!({});
        }
        for (name, value) in [
            (
                "apiVersion",
                json!({"type": "string", "description": "Group and version of this representation of the object."}),
            ),
            ("kind", json!({"type": "string", "description": "Kind of the object."})),
            ("metadata", metadata),
        ] {
            schema["properties"][name] = value;
        }
        schema
    }

    fn finish(mut self) -> Map<String, Value> {
        let mut schemas = self.generator.take_definitions(false);
        schemas.extend(self.custom);
        schemas.values_mut().for_each(as_kubernetes_has_it);
        for (name, gvk, built_in) in self.roots {
            let Some(schema) = schemas.get_mut(&name) else { continue };
            schema["x-kubernetes-group-version-kind"] = json!([gvk]);
            // The Rust types want metadata, the API fills it in.
            if let Some(required) = schema.get_mut("required").and_then(Value::as_array_mut) {
                required.retain(|field| field != "metadata");
                if required.is_empty()
                    && let Some(map) = schema.as_object_mut()
                {
                    map.shift_remove("required");
                }
            }
            if let Some(built_in) = built_in {
                for (path, rule) in built_in.merge_keys.iter() {
                    annotate(&mut schemas, &name, &path, rule);
                }
            }
        }
        schemas
    }
}

/// Differences of the Rust types' schemas from those that Kubernetes serves.
fn as_kubernetes_has_it(schema: &mut Value) {
    let Some(map) = schema.as_object_mut() else { return };
    if map.get("x-kubernetes-int-or-string") == Some(&Value::Bool(true)) && !map.contains_key("properties") {
        map.insert("format".to_owned(), json!("int-or-string"));
        map.insert("oneOf".to_owned(), json!([{"type": "integer"}, {"type": "string"}]));
        map.shift_remove("anyOf");
    }
    if text(map.get("description").unwrap_or(&Value::Null)).starts_with("JSON represents any valid JSON value.") {
        map.shift_remove("type");
    }
    for (key, value) in map.iter_mut() {
        match key.as_str() {
            "properties" => value.as_object_mut().into_iter().flatten().for_each(|(_, v)| as_kubernetes_has_it(v)),
            "items" | "additionalProperties" | "not" => as_kubernetes_has_it(value),
            "allOf" | "anyOf" | "oneOf" => value.as_array_mut().into_iter().flatten().for_each(as_kubernetes_has_it),
            _ => {}
        }
    }
}

/// Writes a merge rule at its field, which lies below the root schema through references and lists.
fn annotate(schemas: &mut Map<String, Value>, root: &str, path: &str, rule: MergeRule) {
    let mut owner = root.to_owned();
    // Pointer of the schema that has the next field, inside its named schema.
    let mut pointer = String::new();
    let mut fields = path.split('.').peekable();
    while let Some(field) = fields.next() {
        let Some(schema) = schemas.get_mut(&owner) else { return };
        let at = format!("{pointer}/properties/{field}");
        let Some(property) = schema.pointer_mut(&at) else { return };
        if fields.peek().is_none() {
            write_rule(property, rule);
            return;
        }
        let (inner, at) =
            if property["items"].is_object() { (&property["items"], format!("{at}/items")) } else { (&*property, at) };
        match reference_name(inner) {
            name if name.is_empty() => pointer = at,
            name => {
                owner = name;
                pointer.clear();
            }
        }
    }
}

fn write_rule(property: &mut Value, rule: MergeRule) {
    let strategy = match (rule.merge_key, rule.retain_keys) {
        (Some(_), true) => "merge,retainKeys",
        (Some(_), false) => "merge",
        (None, _) => "retainKeys",
    };
    property["x-kubernetes-patch-strategy"] = json!(strategy);
    match rule.merge_key {
        Some("") => property["x-kubernetes-list-type"] = json!("set"),
        Some(key) => {
            property["x-kubernetes-patch-merge-key"] = json!(key);
            if !rule.map_keys.is_empty() {
                property["x-kubernetes-list-type"] = json!("map");
                property["x-kubernetes-list-map-keys"] = json!(rule.map_keys);
            }
        }
        None => {}
    }
}

/// Version 3 has no words beside a reference, so they go around it, as Kubernetes does it.
fn wrap_references(schema: &mut Value) {
    let Some(map) = schema.as_object_mut() else { return };
    if map.len() > 1
        && let Some(reference) = map.shift_remove("$ref")
    {
        map.insert("allOf".to_owned(), json!([{"$ref": reference}]));
    }
    for (key, value) in map.iter_mut() {
        match key.as_str() {
            "properties" => value.as_object_mut().into_iter().flatten().for_each(|(_, v)| wrap_references(v)),
            "items" | "additionalProperties" => wrap_references(value),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests;
