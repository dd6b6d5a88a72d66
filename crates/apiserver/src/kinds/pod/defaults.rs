//! Defaults of Pods (Kubernetes `SetDefaults_Pod`, `SetDefaults_PodSpec`, `SetDefaults_Container`, `SetDefaults_Volume`).

use serde_json::{Value, json};

use crate::kinds::tables::text;

/// Sets a field that is missing.
fn set(object: &mut Value, field: &str, value: impl Into<Value>) {
    if object[field].is_null() {
        object[field] = value.into();
    }
}

/// Sets a text field that is missing or empty.
fn set_text(object: &mut Value, field: &str, value: &str) {
    if text(&object[field]).is_empty() {
        object[field] = json!(value);
    }
}

fn each<'a>(object: &'a mut Value, field: &str) -> impl Iterator<Item = &'a mut Value> {
    object.get_mut(field).and_then(Value::as_array_mut).into_iter().flatten()
}

/// The containers of all three sorts.
fn containers(spec: &mut Value) -> impl Iterator<Item = &mut Value> {
    let Value::Object(map) = spec else { return Vec::new().into_iter() };
    let lists = map
        .iter_mut()
        .filter(|(key, _)| matches!(key.as_str(), "containers" | "initContainers" | "ephemeralContainers"));
    lists.filter_map(|(_, list)| list.as_array_mut()).flatten().collect::<Vec<_>>().into_iter()
}

pub(crate) fn default(pod: &mut Value) {
    // In a bare Pod a limit is also the request; in a template it becomes so when the Pod is made.
    for container in containers(&mut pod["spec"]) {
        let limits = container["resources"]["limits"].clone();
        for (name, amount) in limits.as_object().into_iter().flatten() {
            if container["resources"]["requests"][name].is_null() {
                container["resources"]["requests"][name] = amount.clone();
            }
        }
    }
    default_spec(&mut pod["spec"]);
    let spec = &mut pod["spec"];
    set(spec, "enableServiceLinks", true);
    priority_and_tolerations(spec);
    set_text(&mut pod["status"], "phase", "Pending");
    if text(&pod["status"]["qosClass"]).is_empty() {
        pod["status"]["qosClass"] = json!(qos_class(&pod["spec"]));
    }
}

/// What the admission plugins of a stock cluster add to each Pod: its priority, its service account and how long it stays
/// on a node that is gone.
fn priority_and_tolerations(spec: &mut Value) {
    set(spec, "priority", 0);
    set_text(spec, "preemptionPolicy", "PreemptLowerPriority");
    set_text(spec, "serviceAccountName", "default");
    if text(&spec["serviceAccount"]).is_empty() {
        spec["serviceAccount"] = spec["serviceAccountName"].clone();
    }
    if spec["tolerations"].is_null() {
        spec["tolerations"] = json!([]);
    }
    for key in ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"] {
        let Some(tolerations) = spec["tolerations"].as_array_mut() else { return };
        let there = tolerations.iter().any(|t| {
            let (k, effect) = (text(&t["key"]), text(&t["effect"]));
            (k == key || k.is_empty()) && (effect == "NoExecute" || effect.is_empty())
        });
        if !there {
            tolerations
                .push(json!({"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}));
        }
    }
}

/// Defaults of a pod's spec, also of one in a template.
pub(crate) fn default_spec(spec: &mut Value) {
    if !spec.is_object() {
        return;
    }
    if spec["hostNetwork"] == json!(true) {
        host_network_ports(spec);
    }
    for container in containers(spec) {
        default_container(container);
    }
    for volume in each(spec, "volumes") {
        default_volume(volume);
    }
    set_text(spec, "restartPolicy", "Always");
    set_text(spec, "dnsPolicy", "ClusterFirst");
    set_text(spec, "schedulerName", "default-scheduler");
    set(spec, "terminationGracePeriodSeconds", 30);
    set(spec, "securityContext", json!({}));
}

/// In the host's network a container port is a host port.
fn host_network_ports(spec: &mut Value) {
    for container in containers(spec) {
        for port in each(container, "ports") {
            if port["hostPort"].as_i64().unwrap_or(0) == 0 {
                port["hostPort"] = port["containerPort"].clone();
            }
        }
    }
}

fn default_container(container: &mut Value) {
    set_text(container, "terminationMessagePath", "/dev/termination-log");
    set_text(container, "terminationMessagePolicy", "File");
    set(container, "resources", json!({}));
    if text(&container["imagePullPolicy"]).is_empty() {
        let policy = if tag_is_latest(text(&container["image"])) { "Always" } else { "IfNotPresent" };
        container["imagePullPolicy"] = json!(policy);
    }
    for port in each(container, "ports") {
        set_text(port, "protocol", "TCP");
    }
    for env in each(container, "env") {
        let Some(source) = env.get_mut("valueFrom") else { continue };
        if let Some(field) = source.get_mut("fieldRef") {
            set_text(field, "apiVersion", "v1");
        }
        if let Some(field) = source.get_mut("resourceFieldRef") {
            set_text(field, "divisor", "0");
        }
    }
    for kind in ["livenessProbe", "readinessProbe", "startupProbe"] {
        if let Some(probe) = container.get_mut(kind).filter(|p| p.is_object()) {
            for (field, value) in
                [("timeoutSeconds", 1), ("periodSeconds", 10), ("successThreshold", 1), ("failureThreshold", 3)]
            {
                if probe[field].as_i64().unwrap_or(0) == 0 {
                    probe[field] = json!(value);
                }
            }
            default_handler(probe);
        }
    }
    if let Some(lifecycle) = container.get_mut("lifecycle") {
        for kind in ["postStart", "preStop"] {
            if let Some(handler) = lifecycle.get_mut(kind) {
                default_handler(handler);
            }
        }
    }
}

fn default_handler(handler: &mut Value) {
    if let Some(http) = handler.get_mut("httpGet").filter(|h| h.is_object()) {
        set_text(http, "path", "/");
        set_text(http, "scheme", "HTTP");
    }
    if let Some(grpc) = handler.get_mut("grpc").filter(|h| h.is_object()) {
        set(grpc, "service", "");
    }
}

/// Whether an image reference has the tag `latest`, or neither tag nor digest.
fn tag_is_latest(image: &str) -> bool {
    if image.contains('@') {
        return false;
    }
    let last = image.rsplit('/').next().unwrap_or(image);
    last.split_once(':').is_none_or(|(_, tag)| tag == "latest")
}

/// Kubernetes makes an emptyDir of a volume that has no type. Here that is an error instead: most often the type is
/// misspelt or unknown, and its data would silently be lost.
fn default_volume(volume: &mut Value) {
    for kind in ["configMap", "secret", "projected", "downwardAPI"] {
        if let Some(source) = volume.get_mut(kind).filter(|s| s.is_object()) {
            set(source, "defaultMode", 0o644);
            for item in each(source, "items") {
                if let Some(field) = item.get_mut("fieldRef") {
                    set_text(field, "apiVersion", "v1");
                }
            }
            for part in each(source, "sources") {
                if let Some(token) = part.get_mut("serviceAccountToken") {
                    set(token, "expirationSeconds", 3600);
                }
                if let Some(items) = part.get_mut("downwardAPI") {
                    for item in each(items, "items") {
                        if let Some(field) = item.get_mut("fieldRef") {
                            set_text(field, "apiVersion", "v1");
                        }
                    }
                }
            }
        }
    }
    if let Some(host) = volume.get_mut("hostPath").filter(|s| s.is_object()) {
        set(host, "type", "");
    }
}

/// The quality of service class (Kubernetes, "Pod Quality of Service Classes").
fn qos_class(spec: &Value) -> &'static str {
    let (mut guaranteed, mut any) = (true, false);
    for list in ["containers", "initContainers"] {
        for container in spec[list].as_array().into_iter().flatten() {
            let resources = &container["resources"];
            for name in ["cpu", "memory"] {
                let amount = |part: &str| {
                    resources[part][name].as_str().and_then(crate::kinds::quantity::parse_milli).filter(|n| *n > 0)
                };
                let (request, limit) = (amount("requests"), amount("limits"));
                any |= request.is_some() || limit.is_some();
                guaranteed &= limit.is_some() && (request.is_none() || request == limit);
            }
        }
    }
    match (any, guaranteed) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_pod_gets_what_kubernetes_gives_it() {
        let mut pod = json!({"spec": {"containers": [{"name": "c", "image": "nginx", "ports": [{"containerPort": 80}],
            "resources": {"limits": {"cpu": "1"}}, "readinessProbe": {"httpGet": {"port": 80}},
            "env": [{"name": "A", "value": "x"}, {"name": "N", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}]}],
            "volumes": [{"name": "a", "configMap": {"name": "x"}}, {"name": "b", "emptyDir": {}}, {"name": "c", "hostPath": {"path": "/"}}]}});
        default(&mut pod);
        let again = pod.clone();
        default(&mut pod);
        assert_eq!(pod, again);
        let spec = &pod["spec"];
        for (field, value) in [
            ("restartPolicy", json!("Always")),
            ("dnsPolicy", json!("ClusterFirst")),
            ("schedulerName", json!("default-scheduler")),
            ("terminationGracePeriodSeconds", json!(30)),
            ("securityContext", json!({})),
            ("enableServiceLinks", json!(true)),
        ] {
            assert_eq!(spec[field], value, "{field}");
        }
        let container = &spec["containers"][0];
        assert_eq!(container["imagePullPolicy"], json!("Always"));
        assert_eq!(container["ports"], json!([{"containerPort": 80, "protocol": "TCP"}]));
        assert_eq!(container["resources"], json!({"limits": {"cpu": "1"}, "requests": {"cpu": "1"}}));
        assert_eq!(container["env"][0], json!({"name": "A", "value": "x"}));
        assert_eq!(container["env"][1]["valueFrom"]["fieldRef"]["apiVersion"], json!("v1"));
        assert_eq!(
            container["readinessProbe"],
            json!({"httpGet": {"port": 80, "path": "/", "scheme": "HTTP"}, "timeoutSeconds": 1, "periodSeconds": 10,
                "successThreshold": 1, "failureThreshold": 3})
        );
        assert_eq!(
            spec["volumes"],
            json!([{"name": "a", "configMap": {"name": "x", "defaultMode": 420}}, {"name": "b", "emptyDir": {}},
                {"name": "c", "hostPath": {"path": "/", "type": ""}}])
        );
        assert_eq!(pod["status"], json!({"phase": "Pending", "qosClass": "Burstable"}));
    }

    #[test]
    fn the_pull_policy_follows_the_tag() {
        for (image, latest) in [
            ("a", true),
            ("a:latest", true),
            ("h:5000/a", true),
            ("a:1", false),
            ("h:5000/a:1", false),
            ("a@sha256:x", false),
        ] {
            assert_eq!(tag_is_latest(image), latest, "{image}");
        }
    }
}
