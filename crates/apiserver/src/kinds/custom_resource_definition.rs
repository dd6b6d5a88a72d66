//! CustomResourceDefinitions themselves.

use jiff::Timestamp;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use serde_json::{Value, json};

use super::built_in::{BuiltIn, NAME, column, no_prepare};
use super::field_error::Errors;
use super::json_path::JsonPath;
use super::structural::check_patterns;
use super::tables::{self, text};
use super::{built_in, decode, merge_keys, names};

pub(crate) static CUSTOM_RESOURCE_DEFINITION: BuiltIn = BuiltIn {
    group: "apiextensions.k8s.io",
    version: "v1",
    plural: "customresourcedefinitions",
    singular: "customresourcedefinition",
    kind: "CustomResourceDefinition",
    short_names: &["crd", "crds"],
    categories: &["api-extensions"],
    namespaced: false,
    status: true,
    scale: false,
    generation: true,
    keeps_status_on_create: false,
    graceful: false,
    columns: &[NAME, column("Created At", "date", "When it was created.")],
    selectable: &[],
    merge_keys: merge_keys::PLAIN,
    typed: decode::typed::<CustomResourceDefinition>,
    schema: built_in::schema::<CustomResourceDefinition>(),
    default,
    validate,
    prepare_update: no_prepare,
    validate_update,
    cells: |object, _: Timestamp| vec![tables::name(object), object["metadata"]["creationTimestamp"].clone()],
};

fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

fn default(object: &mut Value) {
    let spec = &mut object["spec"];
    if !spec.is_object() {
        return;
    }
    let kind = text(&spec["names"]["kind"]).to_owned();
    if text(&spec["names"]["singular"]).is_empty() {
        spec["names"]["singular"] = json!(kind.to_lowercase());
    }
    if text(&spec["names"]["listKind"]).is_empty() {
        spec["names"]["listKind"] = json!(format!("{kind}List"));
    }
    if spec["conversion"].is_null() {
        spec["conversion"] = json!({"strategy": "None"});
    }
    if let Some(map) = spec.as_object_mut()
        && map.get("preserveUnknownFields") == Some(&json!(false))
    {
        map.shift_remove("preserveUnknownFields");
    }
    establish(object);
}

/// Definitions are served as soon as they are valid, so their status says so from the start, with the names and the
/// version in which objects are kept.
fn establish(object: &mut Value) {
    let since = match &object["metadata"]["creationTimestamp"] {
        Value::String(time) => time.clone(),
        _ => jiff::fmt::strtime::format("%Y-%m-%dT%H:%M:%SZ", Timestamp::now()).unwrap_or_default(),
    };
    if list(&object["status"]["conditions"]).is_empty() {
        object["status"]["conditions"] = json!([
            {"type": "NamesAccepted", "status": "True", "reason": "NoConflicts", "message": "no conflicts found",
                "lastTransitionTime": since},
            {"type": "Established", "status": "True", "reason": "InitialNamesAccepted",
                "message": "the initial names have been accepted", "lastTransitionTime": since},
        ]);
    }
    object["status"]["acceptedNames"] = object["spec"]["names"].clone();
    let stored =
        list(&object["spec"]["versions"]).iter().find(|v| v["storage"] == json!(true)).map(|v| v["name"].clone());
    if let Some(stored) = stored
        && !list(&object["status"]["storedVersions"]).contains(&stored)
    {
        let mut versions = list(&object["status"]["storedVersions"]).to_vec();
        versions.push(stored);
        object["status"]["storedVersions"] = json!(versions);
    }
}

fn label(value: &Value, field: &str, errors: &mut Errors) {
    match text(value) {
        "" => errors.required(field, ""),
        name => {
            if let Some(problem) = names::dns_1035_label(name) {
                errors.invalid(field, name, problem);
            }
        }
    }
}

fn validate(object: &Value, errors: &mut Errors) {
    let spec = &object["spec"];
    let group = text(&spec["group"]);
    if group.is_empty() {
        errors.required("spec.group", "");
    } else if let Some(problem) = names::dns_subdomain(group) {
        errors.invalid("spec.group", group, problem);
    } else if !group.contains('.') {
        errors.invalid("spec.group", group, "should be a domain with at least one dot");
    }
    if text(&spec["scope"]).is_empty() {
        errors.required("spec.scope", "");
    }
    errors.one_of("spec.scope", &spec["scope"], &["Cluster", "Namespaced"]);
    let accepted = &spec["names"];
    for part in ["plural", "singular"] {
        label(&accepted[part], &format!("spec.names.{part}"), errors);
    }
    for part in ["kind", "listKind"] {
        label(&json!(text(&accepted[part]).to_lowercase()), &format!("spec.names.{part}"), errors);
    }
    if !text(&accepted["kind"]).is_empty() && accepted["kind"] == accepted["listKind"] {
        errors.invalid("spec.names.listKind", accepted["listKind"].clone(), "kind and listKind may not be the same");
    }
    for part in ["shortNames", "categories"] {
        for (i, name) in list(&accepted[part]).iter().enumerate() {
            label(name, &format!("spec.names.{part}[{i}]"), errors);
        }
    }
    let name = text(&object["metadata"]["name"]);
    if name != format!("{}.{group}", text(&accepted["plural"])) {
        errors.invalid("metadata.name", name, "must be spec.names.plural+\".\"+spec.group");
    }
    if spec["preserveUnknownFields"] == json!(true) {
        errors.invalid(
            "spec.preserveUnknownFields",
            true,
            "cannot set to true, set x-kubernetes-preserve-unknown-fields to true in spec.versions[*].schema instead",
        );
    }
    errors.one_of("spec.conversion.strategy", &spec["conversion"]["strategy"], &["None"]);
    versions(&spec["versions"], errors);
}

fn versions(versions: &Value, errors: &mut Errors) {
    let all = list(versions);
    if all.is_empty() {
        errors.required("spec.versions", "must have at least one version");
        return;
    }
    let named = || -> Value { all.iter().map(|v| v["name"].clone()).collect() };
    if all.iter().filter(|v| v["storage"] == json!(true)).count() != 1 {
        errors.invalid("spec.versions", named(), "must have exactly one version marked as storage version");
    }
    let mut seen = Vec::new();
    for (i, version) in all.iter().enumerate() {
        let at = format!("spec.versions[{i}]");
        label(&version["name"], &format!("{at}.name"), errors);
        if seen.contains(&&version["name"]) {
            errors.invalid("spec.versions", named(), "must contain unique version names");
        }
        seen.push(&version["name"]);
        let schema = &version["schema"]["openAPIV3Schema"];
        let at_schema = format!("{at}.schema.openAPIV3Schema");
        if schema.is_object() {
            if schema["type"] != json!("object") {
                errors.invalid(format!("{at_schema}.type"), schema["type"].clone(), "must be object at the root");
            }
            structural(schema, &at_schema, errors);
            check_patterns(schema, &at_schema, errors);
        } else {
            errors.required(at_schema, "schemas are required");
        }
        for (j, column) in list(&version["additionalPrinterColumns"]).iter().enumerate() {
            let at = format!("{at}.additionalPrinterColumns[{j}]");
            for part in ["name", "type", "jsonPath"] {
                if text(&column[part]).is_empty() {
                    errors.required(format!("{at}.{part}"), "");
                }
            }
            errors.one_of(format!("{at}.type"), &column["type"], &["boolean", "date", "integer", "number", "string"]);
            let path = text(&column["jsonPath"]);
            if !path.is_empty() && JsonPath::parse(path).is_none() {
                errors.invalid(format!("{at}.jsonPath"), path, "is not a JSON path that printer columns can have");
            }
        }
        let scale = &version["subresources"]["scale"];
        if scale.is_object() {
            for (part, start) in [("specReplicasPath", ".spec."), ("statusReplicasPath", ".status.")] {
                let path = text(&scale[part]);
                if !path.starts_with(start) {
                    errors.invalid(
                        format!("{at}.subresources.scale.{part}"),
                        path,
                        format!("should be a json path under {}", start.trim_end_matches('.')),
                    );
                }
            }
        }
    }
}

/// Each field that a schema names has a type, so that pruning and defaults know what to do.
fn structural(schema: &Value, at: &str, errors: &mut Errors) {
    let flag = |name: &str| schema[name] == json!(true);
    if text(&schema["type"]).is_empty()
        && !flag("x-kubernetes-int-or-string")
        && !flag("x-kubernetes-preserve-unknown-fields")
    {
        errors.required(format!("{at}.type"), "must not be empty for specified object fields");
    }
    errors.one_of(
        format!("{at}.type"),
        &schema["type"],
        &["array", "boolean", "integer", "number", "object", "string"],
    );
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        structural(property, &format!("{at}.properties[{name}]"), errors);
    }
    if schema["type"] == json!("array") {
        if schema["items"].is_object() {
            structural(&schema["items"], &format!("{at}.items"), errors);
        } else if !flag("x-kubernetes-preserve-unknown-fields") {
            errors.required(format!("{at}.items"), "must be specified");
        }
    }
    if schema["additionalProperties"].is_object() {
        if schema["properties"].as_object().is_some_and(|p| !p.is_empty()) {
            errors.forbidden(
                format!("{at}.additionalProperties"),
                "additionalProperties and properties are mutual exclusive",
            );
        }
        structural(&schema["additionalProperties"], &format!("{at}.additionalProperties"), errors);
    }
    for forbidden in ["$ref", "definitions", "dependencies", "id", "patternProperties", "additionalItems"] {
        if schema.get(forbidden).is_some() {
            errors.forbidden(format!("{at}.{forbidden}"), format!("{forbidden} is not supported"));
        }
    }
}

fn validate_update(old: &Value, new: &Value, errors: &mut Errors) {
    let (old, new) = (&old["spec"], &new["spec"]);
    for part in ["group", "scope"] {
        errors.immutable(format!("spec.{part}"), &old[part], &new[part]);
    }
    for part in ["plural", "kind"] {
        errors.immutable(format!("spec.names.{part}"), &old["names"][part], &new["names"][part]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds::{Registry, decode, default_object, validate_create, validate_update};

    fn definition() -> Value {
        json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": {"name": "widgets.example.com"},
            "spec": {"group": "example.com", "scope": "Namespaced", "names": {"plural": "widgets", "kind": "Widget"},
            "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": {"type": "object",
                "properties": {"spec": {"type": "object", "x-kubernetes-preserve-unknown-fields": true, "properties": {
                    "a": {"type": "string", "default": "x", "enum": ["x", "y"]}, "n": {"x-kubernetes-int-or-string": true}}}}}}}]}})
    }

    #[test]
    fn a_valid_definition_is_established_with_its_names() {
        let info = Registry::built_in().lookup("apiextensions.k8s.io", "v1", "customresourcedefinitions").unwrap();
        let decoded = decode(&info, definition()).unwrap();
        assert_eq!(decoded.unknown_fields, Vec::<String>::new());
        assert_eq!(decoded.object, definition());
        let mut object = decoded.object;
        default_object(&info, &mut object);
        assert_eq!(validate_create(&info, &object), []);
        let names = json!({"plural": "widgets", "kind": "Widget", "singular": "widget", "listKind": "WidgetList"});
        assert_eq!(object["spec"]["names"], names);
        assert_eq!((&object["status"]["acceptedNames"], &object["status"]["storedVersions"]), (&names, &json!(["v1"])));
        assert_eq!(object["status"]["conditions"][1]["type"], json!("Established"));
        let mut moved = object.clone();
        moved["spec"]["scope"] = json!("Cluster");
        assert_eq!(validate_update(&info, &object, &moved)[0].field, "spec.scope");
    }

    #[test]
    fn bad_definitions_are_rejected_with_the_field() {
        let info = Registry::built_in().lookup("apiextensions.k8s.io", "v1", "customresourcedefinitions").unwrap();
        for (path, value, expected) in [
            (
                "/metadata/name",
                json!("other.example.com"),
                "metadata.name: Invalid value: \"other.example.com\": must be spec.names.plural",
            ),
            (
                "/spec/group",
                json!("example"),
                "spec.group: Invalid value: \"example\": should be a domain with at least one dot",
            ),
            ("/spec/scope", json!("World"), "spec.scope: Unsupported value: \"World\""),
            (
                "/spec/versions/0/storage",
                json!(false),
                "spec.versions: Invalid value: [\"v1\"]: must have exactly one version marked as storage version",
            ),
            (
                "/spec/versions/0/schema",
                json!({}),
                "spec.versions[0].schema.openAPIV3Schema: Required value: schemas are required",
            ),
            (
                "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/a",
                json!({"description": "no type"}),
                "spec.versions[0].schema.openAPIV3Schema.properties[spec].properties[a].type: Required value",
            ),
            (
                "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/a",
                json!({"type": "string", "pattern": "("}),
                "spec.versions[0].schema.openAPIV3Schema.properties[spec].properties[a].pattern: Invalid value: \"(\"",
            ),
            (
                "/spec/versions/0/additionalPrinterColumns",
                json!([{"name": "A", "type": "word", "jsonPath": ".a"}]),
                "spec.versions[0].additionalPrinterColumns[0].type: Unsupported value: \"word\"",
            ),
            ("/spec/names/plural", json!("Widgets"), "spec.names.plural: Invalid value: \"Widgets\": a DNS-1035 label"),
            (
                "/spec/conversion",
                json!({"strategy": "Webhook"}),
                "spec.conversion.strategy: Unsupported value: \"Webhook\": supported values: \"None\"",
            ),
        ] {
            let mut object = definition();
            let (parent, key) = path.rsplit_once('/').unwrap();
            object.pointer_mut(parent).unwrap()[key] = value;
            default_object(&info, &mut object);
            let found: Vec<_> = validate_create(&info, &object).iter().map(ToString::to_string).collect();
            assert!(found.iter().any(|f| f.starts_with(expected)), "{expected}: {found:?}");
        }
    }

    /// The definitions that the hub installs are derived from Rust types: they must be good ones, and their objects must
    /// come through.
    #[test]
    fn the_definitions_of_the_mesh_and_the_gateway_api_are_good() {
        use kube::CustomResourceExt as _;
        let info = Registry::built_in().lookup("apiextensions.k8s.io", "v1", "customresourcedefinitions").unwrap();
        let mut registry = Registry::built_in();
        for definition in [
            edgemesh_api::MeshNode::crd(),
            gateway_api::gatewayclasses::GatewayClass::crd(),
            gateway_api::gateways::Gateway::crd(),
            gateway_api::httproutes::HttpRoute::crd(),
            gateway_api::referencegrants::ReferenceGrant::crd(),
        ] {
            let decoded = decode(&info, serde_json::to_value(definition).unwrap()).unwrap();
            assert_eq!(decoded.unknown_fields, Vec::<String>::new());
            let mut object = decoded.object;
            default_object(&info, &mut object);
            assert_eq!(validate_create(&info, &object), []);
            registry = registry.with_crd(&object);
        }
        for (group, version, plural, spec) in [
            (
                "edgemesh.dev",
                "v1alpha1",
                "meshnodes",
                json!({"peers": {"agent": {"peerId": "p", "addresses": ["/ip4/1.2.3.4"]}}}),
            ),
            (
                "gateway.networking.k8s.io",
                "v1",
                "httproutes",
                json!({"hostnames": ["a.example"],
                "parentRefs": [{"name": "g", "sectionName": "http"}], "rules": [{"matches": [{"path": {"type": "PathPrefix", "value": "/"},
                "headers": [{"name": "x", "value": "y"}]}], "backendRefs": [{"name": "s", "port": 80, "weight": 3}]}]}),
            ),
            (
                "gateway.networking.k8s.io",
                "v1",
                "gateways",
                json!({"gatewayClassName": "edgemesh",
                "listeners": [{"name": "http", "port": 80, "protocol": "HTTP", "allowedRoutes": {"namespaces": {"from": "All"}}},
                    {"name": "https", "port": 443, "protocol": "HTTPS", "tls": {"mode": "Terminate", "certificateRefs": [{"name": "c"}]}}]}),
            ),
        ] {
            let info = registry.lookup(group, version, plural).unwrap();
            let mut object =
                json!({"apiVersion": info.api_version(), "kind": info.kind, "metadata": {"name": "a"}, "spec": spec});
            if info.namespaced {
                object["metadata"]["namespace"] = json!("n");
            }
            let decoded = decode(&info, object.clone()).unwrap();
            assert_eq!((decoded.object, decoded.unknown_fields), (object.clone(), Vec::new()));
            assert_eq!(validate_create(&info, &object), []);
        }
    }
}
