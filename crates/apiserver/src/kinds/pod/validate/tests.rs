//! Pods that are accepted and rejected, as data.

use serde_json::{Value, json};

use crate::kinds::{Registry, decode, default_object, validate_create, validate_update};

fn pod() -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": "n"}, "spec": {
        "containers": [{"name": "c", "image": "i:1", "ports": [{"name": "web", "containerPort": 80}],
            "env": [{"name": "A", "value": "1"}], "volumeMounts": [{"name": "data", "mountPath": "/data"}]}],
        "volumes": [{"name": "data", "emptyDir": {}}]}})
}

fn problems(object: Value) -> Vec<String> {
    let info = Registry::built_in().lookup("", "v1", "pods").unwrap();
    let mut object = decode(&info, object).unwrap().object;
    default_object(&info, &mut object);
    validate_create(&info, &object).iter().map(ToString::to_string).collect()
}

#[test]
fn good_pods_are_accepted() {
    assert_eq!(problems(pod()), Vec::<String>::new());
    for (path, value) in [
        (
            "/spec/initContainers",
            json!([{"name": "i", "image": "i"}, {"name": "s", "image": "s", "restartPolicy": "Always"}]),
        ),
        ("/spec/tolerations", json!([{"operator": "Exists"}, {"key": "a", "value": "b", "effect": "NoSchedule"}])),
        ("/spec/containers/0/resources", json!({"requests": {"cpu": "100m", "memory": "64Mi"}, "limits": {"cpu": 1}})),
        ("/spec/containers/0/livenessProbe", json!({"exec": {"command": ["true"]}})),
        ("/spec/containers/0/envFrom", json!([{"configMapRef": {"name": "a"}}])),
        ("/spec/hostNetwork", json!(true)),
        ("/spec/nodeSelector", json!({"a": "b"})),
    ] {
        let mut object = pod();
        let (parent, key) = path.rsplit_once('/').unwrap();
        object.pointer_mut(parent).unwrap()[key] = value;
        assert_eq!(problems(object), Vec::<String>::new(), "{path}");
    }
}

#[test]
fn bad_pods_are_rejected_with_the_field() {
    for (path, value, expected) in [
        ("/spec/containers", json!([]), "spec.containers: Required value"),
        ("/spec/containers/0/image", json!(""), "spec.containers[0].image: Required value"),
        (
            "/spec/containers/0/name",
            json!("A"),
            "spec.containers[0].name: Invalid value: \"A\": a lowercase RFC 1123 label",
        ),
        (
            "/spec/initContainers",
            json!([{"name": "c", "image": "i"}]),
            "spec.initContainers[0].name: Duplicate value: \"c\"",
        ),
        ("/spec/volumes/0", json!({"name": "data"}), "spec.volumes[0]: Required value: must specify a volume type"),
        (
            "/spec/volumes/0",
            json!({"name": "data", "floppy": {"size": 1}}),
            "spec.volumes[0]: Required value: must specify a volume type",
        ),
        (
            "/spec/volumes/0",
            json!({"name": "data", "emptyDir": {}, "hostPath": {"path": "/"}}),
            "spec.volumes[0].hostPath: Forbidden: may not specify more than 1 volume type",
        ),
        (
            "/spec/volumes/0",
            json!({"name": "data", "configMap": {"items": [{"key": "a", "path": "../x"}]}}),
            "spec.volumes[0].configMap.name: Required value",
        ),
        (
            "/spec/containers/0/volumeMounts/0/name",
            json!("x"),
            "spec.containers[0].volumeMounts[0].name: Not found: \"x\"",
        ),
        (
            "/spec/containers/0/ports/0/containerPort",
            json!(70000),
            "spec.containers[0].ports[0].containerPort: Invalid value: 70000: must be between 1 and 65535, inclusive",
        ),
        (
            "/spec/containers/0/ports/0/protocol",
            json!("ICMP"),
            "spec.containers[0].ports[0].protocol: Unsupported value: \"ICMP\": supported values: \"SCTP\", \"TCP\", \"UDP\"",
        ),
        (
            "/spec/containers/0/env/0/name",
            json!("a=b"),
            "spec.containers[0].env[0].name: Invalid value: \"a=b\": a valid environment",
        ),
        (
            "/spec/containers/0/env/0",
            json!({"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "spec.x"}}}),
            "spec.containers[0].env[0].valueFrom.fieldRef.fieldPath: Unsupported value: \"spec.x\"",
        ),
        (
            "/spec/containers/0/resources",
            json!({"limits": {"cpu": "much"}}),
            "spec.containers[0].resources.limits[cpu]: Invalid value: \"much\": quantities must match",
        ),
        (
            "/spec/containers/0/resources",
            json!({"limits": {"cpu": "1"}, "requests": {"cpu": "2"}}),
            "spec.containers[0].resources.requests: Invalid value: \"2\": must be less than or equal to cpu limit of 1",
        ),
        (
            "/spec/containers/0/livenessProbe",
            json!({"periodSeconds": 1}),
            "spec.containers[0].livenessProbe: Required value: must specify a handler type",
        ),
        ("/spec/restartPolicy", json!("Sometimes"), "spec.restartPolicy: Unsupported value: \"Sometimes\""),
        ("/spec/dnsPolicy", json!("None"), "spec.dnsConfig: Required value"),
        (
            "/spec/tolerations",
            json!([{"key": "a", "operator": "Maybe"}]),
            "spec.tolerations[0].operator: Unsupported value: \"Maybe\"",
        ),
        ("/spec/nodeSelector", json!({"a b": "c"}), "spec.nodeSelector: Invalid value: \"a b\": name part"),
        ("/spec/terminationGracePeriodSeconds", json!(-1), "spec.terminationGracePeriodSeconds: Invalid value: -1"),
    ] {
        let mut object = pod();
        let (parent, key) = path.rsplit_once('/').unwrap();
        let parent = object.pointer_mut(parent).unwrap();
        match parent {
            Value::Array(items) => items[key.parse::<usize>().unwrap()] = value,
            parent => parent[key] = value,
        }
        let found = problems(object);
        assert!(found.iter().any(|f| f.starts_with(expected)), "{expected}: {found:?}");
    }
}

#[test]
fn a_wrong_type_is_an_error_that_names_the_field() {
    let info = Registry::built_in().lookup("", "v1", "pods").unwrap();
    let mut object = pod();
    object["spec"]["containers"][0]["ports"][0]["containerPort"] = json!("http");
    let error = decode(&info, object).unwrap_err();
    assert_eq!(error.field, "spec.containers[0].ports[0].containerPort");
}

#[test]
fn of_a_running_pod_little_may_change() {
    let info = Registry::built_in().lookup("", "v1", "pods").unwrap();
    let mut old = pod();
    default_object(&info, &mut old);
    let change = |path: &str, value: Value| {
        let mut new = old.clone();
        let (parent, key) = path.rsplit_once('/').unwrap();
        new.pointer_mut(parent).unwrap()[key] = value;
        validate_update(&info, &old, &new).iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(change("/spec/containers/0/image", json!("i:2")), Vec::<String>::new());
    assert_eq!(change("/spec/nodeName", json!("edge-a1")), Vec::<String>::new());
    assert_eq!(change("/metadata/labels", json!({"a": "b"})), Vec::<String>::new());
    assert!(
        change("/spec/containers/0/command", json!(["x"]))[0]
            .starts_with("spec: Forbidden: pod updates may not change")
    );
    assert!(
        change("/spec/containers", json!([]))[1]
            .starts_with("spec.containers: Forbidden: pod updates may not add or remove")
    );
    assert!(change("/spec/tolerations", json!([]))[0].starts_with("spec.tolerations: Forbidden"));
    let mut bound = old.clone();
    bound["spec"]["nodeName"] = json!("a");
    let mut moved = old.clone();
    moved["spec"]["nodeName"] = json!("b");
    assert!(validate_update(&info, &bound, &moved)[0].to_string().ends_with("changed: nodeName"));
}
