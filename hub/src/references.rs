//! Which ConfigMaps and Secrets an object needs at the node.

use std::{collections::HashSet, sync::Arc};

use edgemesh_api::{ObjectKey, ResourceName};
use serde_json::Value;

/// What a pod refers to in volumes, environment and image pull secrets, of all its containers.
pub(crate) fn of_pod(pod: &ObjectKey, object: &Value) -> HashSet<Arc<ObjectKey>> {
    let mut found = Found { namespace: &pod.namespace, keys: HashSet::new() };
    let spec = &object["spec"];
    for volume in items(&spec["volumes"]) {
        found.config_map(&volume["configMap"]["name"]);
        found.secret(&volume["secret"]["secretName"]);
        for source in items(&volume["projected"]["sources"]) {
            found.config_map(&source["configMap"]["name"]);
            found.secret(&source["secret"]["name"]);
        }
    }
    for secret in items(&spec["imagePullSecrets"]) {
        found.secret(&secret["name"]);
    }
    for containers in ["containers", "initContainers", "ephemeralContainers"] {
        for container in items(&spec[containers]) {
            for source in items(&container["envFrom"]) {
                found.config_map(&source["configMapRef"]["name"]);
                found.secret(&source["secretRef"]["name"]);
            }
            for variable in items(&container["env"]) {
                found.config_map(&variable["valueFrom"]["configMapKeyRef"]["name"]);
                found.secret(&variable["valueFrom"]["secretKeyRef"]["name"]);
            }
        }
    }
    found.keys
}

/// The Secrets with the certificates of a Gateway's listeners.
pub(crate) fn of_gateway(gateway: &ObjectKey, object: &Value) -> HashSet<Arc<ObjectKey>> {
    let mut keys = HashSet::new();
    for listener in items(&object["spec"]["listeners"]) {
        for reference in items(&listener["tls"]["certificateRefs"]) {
            let text = |field: &str| reference[field].as_str().unwrap_or_default();
            if !matches!((text("group"), text("kind")), ("", "" | "Secret")) {
                continue;
            }
            let namespace = match text("namespace") {
                "" => &gateway.namespace,
                other => other,
            };
            let mut found = Found { namespace, keys: HashSet::new() };
            found.secret(&reference["name"]);
            keys.extend(found.keys);
        }
    }
    keys
}

struct Found<'a> {
    namespace: &'a str,
    keys: HashSet<Arc<ObjectKey>>,
}

impl Found<'_> {
    fn config_map(&mut self, name: &Value) {
        self.add("configmaps", name);
    }

    fn secret(&mut self, name: &Value) {
        self.add("secrets", name);
    }

    fn add(&mut self, plural: &str, name: &Value) {
        if let Some(name) = name.as_str().filter(|name| !name.is_empty()) {
            let resource = ResourceName::new("", "v1", plural);
            self.keys.insert(Arc::new(ObjectKey::new(resource, self.namespace, name)));
        }
    }
}

fn items(list: &Value) -> impl Iterator<Item = &Value> {
    list.as_array().into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_place_where_a_pod_names_a_config_map_or_secret_is_found() {
        let pod = json!({"spec": {
            "volumes": [
                {"configMap": {"name": "c1"}}, {"secret": {"secretName": "s1"}},
                {"projected": {"sources": [{"configMap": {"name": "c2"}}, {"secret": {"name": "s2"}}]}},
                {"emptyDir": {}},
            ],
            "imagePullSecrets": [{"name": "s3"}],
            "containers": [{
                "envFrom": [{"configMapRef": {"name": "c3"}}, {"secretRef": {"name": "s4"}}],
                "env": [{"valueFrom": {"configMapKeyRef": {"name": "c4", "key": "k"}}}, {"name": "X", "value": "v"}],
            }],
            "initContainers": [{"env": [{"valueFrom": {"secretKeyRef": {"name": "s5", "key": "k"}}}]}],
        }});
        let key = ObjectKey::new(ResourceName::new("", "v1", "pods"), "ns", "p");
        let mut names: Vec<_> = of_pod(&key, &pod).iter().map(ToString::to_string).collect();
        names.sort();
        let expected = ["c1", "c2", "c3", "c4"].map(|n| format!("configmaps/ns/{n}"));
        assert_eq!(names[..4], expected);
        assert_eq!(names[4..], ["s1", "s2", "s3", "s4", "s5"].map(|n| format!("secrets/ns/{n}")));
    }
}
