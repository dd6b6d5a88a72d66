//! The protobuf encoding of an OpenAPI v2 document: the messages of gnostic's `OpenAPIv2.proto` that clients read.

use prost::Message;
use serde_json::{Map, Value};

use crate::kinds::tables::text;

#[derive(Clone, PartialEq, Message)]
struct Document {
    #[prost(string, tag = "1")]
    swagger: String,
    #[prost(message, optional, tag = "2")]
    info: Option<Info>,
    #[prost(message, optional, tag = "8")]
    paths: Option<Paths>,
    #[prost(message, optional, tag = "9")]
    definitions: Option<NamedSchemas>,
}

#[derive(Clone, PartialEq, Message)]
struct Info {
    #[prost(string, tag = "1")]
    title: String,
    #[prost(string, tag = "2")]
    version: String,
}

#[derive(Clone, PartialEq, Message)]
struct Paths {
    #[prost(message, repeated, tag = "2")]
    path: Vec<NamedPathItem>,
}

#[derive(Clone, PartialEq, Message)]
struct NamedPathItem {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, optional, tag = "2")]
    value: Option<PathItem>,
}

#[derive(Clone, PartialEq, Message)]
struct PathItem {
    #[prost(message, optional, tag = "2")]
    get: Option<Operation>,
    #[prost(message, optional, tag = "3")]
    put: Option<Operation>,
    #[prost(message, optional, tag = "4")]
    post: Option<Operation>,
    #[prost(message, optional, tag = "5")]
    delete: Option<Operation>,
    #[prost(message, optional, tag = "8")]
    patch: Option<Operation>,
}

#[derive(Clone, PartialEq, Message)]
struct Operation {
    #[prost(string, tag = "5")]
    operation_id: String,
    #[prost(string, repeated, tag = "6")]
    produces: Vec<String>,
    #[prost(message, repeated, tag = "8")]
    parameters: Vec<ParametersItem>,
    #[prost(message, repeated, tag = "13")]
    vendor_extension: Vec<NamedAny>,
}

/// The message in whose single field another one stands: `oneof`s are written as their only used arm.
#[derive(Clone, PartialEq, Message)]
struct ParametersItem {
    #[prost(message, optional, tag = "1")]
    parameter: Option<Parameter>,
}

#[derive(Clone, PartialEq, Message)]
struct Parameter {
    #[prost(message, optional, tag = "2")]
    non_body_parameter: Option<NonBodyParameter>,
}

#[derive(Clone, PartialEq, Message)]
struct NonBodyParameter {
    #[prost(message, optional, tag = "3")]
    query_parameter: Option<QueryParameter>,
}

#[derive(Clone, PartialEq, Message)]
struct QueryParameter {
    #[prost(string, tag = "2")]
    r#in: String,
    #[prost(string, tag = "3")]
    description: String,
    #[prost(string, tag = "4")]
    name: String,
    #[prost(string, tag = "6")]
    r#type: String,
}

#[derive(Clone, PartialEq, Message)]
struct NamedAny {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, optional, tag = "2")]
    value: Option<Any>,
}

/// Any value, as YAML text; JSON is YAML.
#[derive(Clone, PartialEq, Message)]
struct Any {
    #[prost(string, tag = "2")]
    yaml: String,
}

#[derive(Clone, PartialEq, Message)]
struct NamedSchemas {
    #[prost(message, repeated, tag = "1")]
    additional_properties: Vec<NamedSchema>,
}

#[derive(Clone, PartialEq, Message)]
struct NamedSchema {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, optional, tag = "2")]
    value: Option<Schema>,
}

#[derive(Clone, PartialEq, Message)]
struct Schema {
    #[prost(string, tag = "1")]
    reference: String,
    #[prost(string, tag = "2")]
    format: String,
    #[prost(string, tag = "4")]
    description: String,
    #[prost(string, repeated, tag = "19")]
    required: Vec<String>,
    #[prost(message, repeated, tag = "20")]
    r#enum: Vec<Any>,
    #[prost(message, optional, boxed, tag = "21")]
    additional_properties: Option<Box<AdditionalProperties>>,
    #[prost(message, optional, tag = "22")]
    r#type: Option<TypeItem>,
    #[prost(message, optional, tag = "23")]
    items: Option<Items>,
    #[prost(message, optional, tag = "25")]
    properties: Option<NamedSchemas>,
    #[prost(message, repeated, tag = "31")]
    vendor_extension: Vec<NamedAny>,
}

#[derive(Clone, PartialEq, Message)]
struct AdditionalProperties {
    #[prost(message, optional, boxed, tag = "1")]
    schema: Option<Box<Schema>>,
}

#[derive(Clone, PartialEq, Message)]
struct TypeItem {
    #[prost(string, repeated, tag = "1")]
    value: Vec<String>,
}

#[derive(Clone, PartialEq, Message)]
struct Items {
    #[prost(message, repeated, tag = "1")]
    schema: Vec<Schema>,
}

/// Encodes a document that is there in JSON.
pub(super) fn encode(document: &Value) -> Vec<u8> {
    let entries = |value: &Value| -> Map<String, Value> { value.as_object().cloned().unwrap_or_default() };
    let message = Document {
        swagger: text(&document["swagger"]).to_owned(),
        info: Some(Info {
            title: text(&document["info"]["title"]).to_owned(),
            version: text(&document["info"]["version"]).to_owned(),
        }),
        paths: Some(Paths {
            path: entries(&document["paths"])
                .iter()
                .map(|(name, item)| NamedPathItem { name: name.clone(), value: Some(path_item(item)) })
                .collect(),
        }),
        definitions: Some(named_schemas(&document["definitions"])),
    };
    message.encode_to_vec()
}

fn path_item(item: &Value) -> PathItem {
    let operation = |method: &str| item.get(method).map(operation);
    PathItem {
        get: operation("get"),
        put: operation("put"),
        post: operation("post"),
        delete: operation("delete"),
        patch: operation("patch"),
    }
}

fn operation(operation: &Value) -> Operation {
    let parameters = operation["parameters"].as_array().into_iter().flatten().map(|p| {
        let owned = |field: &str| text(&p[field]).to_owned();
        let query = QueryParameter {
            r#in: owned("in"),
            description: owned("description"),
            name: owned("name"),
            r#type: owned("type"),
        };
        ParametersItem {
            parameter: Some(Parameter { non_body_parameter: Some(NonBodyParameter { query_parameter: Some(query) }) }),
        }
    });
    Operation {
        operation_id: text(&operation["operationId"]).to_owned(),
        produces: texts(&operation["produces"]),
        parameters: parameters.collect(),
        vendor_extension: extensions(operation),
    }
}

fn texts(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
}

fn extensions(value: &Value) -> Vec<NamedAny> {
    value
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(name, _)| name.starts_with("x-"))
        .map(|(name, value)| NamedAny { name: name.clone(), value: Some(any(value)) })
        .collect()
}

fn any(value: &Value) -> Any {
    Any { yaml: format!("{value}\n") }
}

fn named_schemas(schemas: &Value) -> NamedSchemas {
    NamedSchemas {
        additional_properties: schemas
            .as_object()
            .into_iter()
            .flatten()
            .map(|(name, value)| NamedSchema { name: name.clone(), value: Some(schema(value)) })
            .collect(),
    }
}

fn schema(value: &Value) -> Schema {
    let owned = |field: &str| text(&value[field]).to_owned();
    let object = |field: &str| value.get(field).filter(|v| v.is_object());
    Schema {
        reference: owned("$ref"),
        format: owned("format"),
        description: owned("description"),
        required: texts(&value["required"]),
        r#enum: value["enum"].as_array().into_iter().flatten().map(any).collect(),
        additional_properties: object("additionalProperties")
            .map(|v| Box::new(AdditionalProperties { schema: Some(Box::new(schema(v))) })),
        r#type: value["type"].as_str().map(|t| TypeItem { value: vec![t.to_owned()] }),
        items: object("items").map(|v| Items { schema: vec![schema(v)] }),
        properties: object("properties").map(named_schemas),
        vendor_extension: extensions(value),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_encoded_can_be_read_back() {
        let document = json!({"swagger": "2.0", "info": {"title": "t", "version": "v"},
            "paths": {"/a": {"patch": {"operationId": "p", "x-kubernetes-group-version-kind": {"kind": "A"},
                "parameters": [{"name": "dryRun", "in": "query", "type": "string"}]}}},
            "definitions": {"A": {"type": "object", "required": ["b"], "properties": {
                "b": {"$ref": "#/definitions/B"}, "c": {"type": "array", "items": {"type": "string"}},
                "d": {"type": "object", "additionalProperties": {"type": "integer", "format": "int32"}}}}}});
        let read = Document::decode(encode(&document).as_slice()).unwrap();
        let patch = read.paths.unwrap().path[0].value.as_ref().unwrap().patch.clone().unwrap();
        assert_eq!(patch.vendor_extension[0].value.as_ref().unwrap().yaml, "{\"kind\":\"A\"}\n");
        let parameter = patch.parameters[0].parameter.as_ref().unwrap().non_body_parameter.as_ref().unwrap();
        assert_eq!(parameter.query_parameter.as_ref().unwrap().name, "dryRun");
        let a = read.definitions.unwrap().additional_properties[0].value.clone().unwrap();
        assert_eq!(a.required, ["b"]);
        let properties = a.properties.unwrap().additional_properties;
        assert_eq!(properties[0].value.as_ref().unwrap().reference, "#/definitions/B");
        assert_eq!(properties[1].value.as_ref().unwrap().items.as_ref().unwrap().schema.len(), 1);
        assert!(properties[2].value.as_ref().unwrap().additional_properties.is_some());
    }
}
