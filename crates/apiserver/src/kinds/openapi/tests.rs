//! What kubectl looks for in the documents.

use super::*;

fn registry() -> (Registry, Vec<Arc<Value>>) {
    let definition = json!({"metadata": {"name": "widgets.example.com"}, "spec": {"group": "example.com", "scope": "Namespaced",
        "names": {"plural": "widgets", "kind": "Widget"}, "versions": [{"name": "v1", "served": true, "storage": true,
        "schema": {"openAPIV3Schema": {"type": "object", "description": "A widget.", "properties": {"spec": {"type": "object",
            "properties": {"n": {"x-kubernetes-int-or-string": true, "anyOf": [{"type": "integer"}, {"type": "string"}]},
                "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}, "maybe": {"type": "string", "nullable": true}}}}}}}]}});
    (Registry::built_in().with_crd(&definition), vec![Arc::new(definition)])
}

/// Every reference of a document leads somewhere.
fn assert_references(value: &Value, document: &Value) {
    match value {
        Value::Object(map) => {
            if let Some(Value::String(reference)) = map.get("$ref")
                && map.len() == 1
            {
                let pointer = reference.strip_prefix('#').unwrap();
                assert!(document.pointer(pointer).is_some(), "{reference}");
            }
            map.values().for_each(|v| assert_references(v, document));
        }
        Value::Array(items) => items.iter().for_each(|v| assert_references(v, document)),
        _ => {}
    }
}

#[test]
fn every_group_and_version_has_a_document_that_is_whole() {
    let (registry, definitions) = registry();
    let index = openapi_v3_index(&registry, &definitions);
    let paths = index["paths"].as_object().unwrap();
    assert!(
        paths.contains_key("api/v1") && paths.contains_key("apis/apps/v1") && paths.contains_key("apis/example.com/v1")
    );
    for (group, versions) in registry.groups() {
        for version in versions {
            let document = openapi_v3(&registry, &definitions, &group, &version).unwrap();
            assert_references(&document, &document);
        }
    }
    assert!(openapi_v3(&registry, &definitions, "nothing.example", "v1").is_none());
}

#[test]
fn the_documents_have_the_patch_metadata_and_the_parameters_that_kubectl_needs() {
    let (registry, definitions) = registry();
    let document = openapi_v3(&registry, &definitions, "", "v1").unwrap();
    let schemas = &document["components"]["schemas"];
    let spec = &schemas["io.k8s.api.core.v1.PodSpec"]["properties"];
    assert_eq!(spec["containers"]["x-kubernetes-patch-merge-key"], json!("name"));
    assert_eq!(spec["volumes"]["x-kubernetes-patch-strategy"], json!("merge,retainKeys"));
    let container = &schemas["io.k8s.api.core.v1.Container"]["properties"];
    assert_eq!(container["ports"]["x-kubernetes-list-map-keys"], json!(["containerPort", "protocol"]));
    assert_eq!(container["env"]["x-kubernetes-patch-merge-key"], json!("name"));
    assert!(spec["tolerations"]["x-kubernetes-patch-strategy"].is_null());
    let pod = &schemas["io.k8s.api.core.v1.Pod"];
    assert_eq!(pod["x-kubernetes-group-version-kind"], json!([{"group": "", "version": "v1", "kind": "Pod"}]));
    assert_eq!(pod["properties"]["spec"]["allOf"][0]["$ref"], json!("#/components/schemas/io.k8s.api.core.v1.PodSpec"));
    assert!(pod.get("required").is_none());
    let patch = &document["paths"]["/api/v1/namespaces/{namespace}/pods/{name}"]["patch"];
    assert!(patch["parameters"].as_array().unwrap().iter().any(|p| p["name"] == json!("fieldValidation")));
    assert_eq!(patch["x-kubernetes-group-version-kind"]["kind"], json!("Pod"));
    let apps = openapi_v3(&registry, &definitions, "apps", "v1").unwrap();
    let deployment = &apps["components"]["schemas"]["io.k8s.api.apps.v1.DeploymentSpec"]["properties"]["strategy"];
    assert_eq!(deployment["x-kubernetes-patch-strategy"], json!("retainKeys"));
}

#[test]
fn version_2_says_only_what_version_2_can_say() {
    let (registry, definitions) = registry();
    let document = openapi_v2(&registry, &definitions);
    assert_references(&document, &document);
    let widget = &document["definitions"]["com.example.v1.Widget"];
    assert_eq!(widget["description"], json!("A widget."));
    assert_eq!(
        widget["properties"]["metadata"]["$ref"],
        json!("#/definitions/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta")
    );
    assert_eq!(
        widget["properties"]["spec"]["properties"],
        json!({"n": {"format": "int-or-string", "type": "string"}, "free": {}, "maybe": {}})
    );
    assert!(!openapi_v2_protobuf(&registry, &definitions).is_empty());
}
