//! The ConfigMaps and Secrets that a pod refers to, and a pod's own fields: what environments and volumes are made of.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use k8s_openapi::api::core::v1::{ConfigMap, Container, Pod, ResourceFieldSelector, Secret};

use super::{dns::is_host_network, quantity, resources, resources::Machine};

/// Why a container can't be configured now; it's tried again when what it misses appears.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum InputError {
    #[error("{kind} \"{name}\" not found")]
    MissingObject { kind: &'static str, name: String },
    #[error("couldn't find key {key} in {kind} {namespace}/{name}")]
    MissingKey { kind: &'static str, namespace: String, name: String, key: String },
    #[error("the value of key {key} in {kind} {name} is not text")]
    NotText { kind: &'static str, name: String, key: String },
    #[error("{0}: the node has no address yet")]
    NoAddress(String),
    #[error("unsupported fieldPath {0:?}")]
    Field(String),
    #[error("unsupported resource {0:?}")]
    Resource(String),
    #[error("container {0:?} of the resourceFieldRef does not exist")]
    Container(String),
}

/// An object that a pod refers to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum InputName {
    ConfigMap(String),
    Secret(String),
}

/// The objects that a pod refers to, those that exist.
#[derive(Debug, Default)]
pub(crate) struct Inputs {
    pub(crate) namespace: String,
    pub(crate) config_maps: BTreeMap<String, ConfigMap>,
    pub(crate) secrets: BTreeMap<String, Secret>,
}

/// Everything that a pod refers to: environment, volumes, image pull secrets.
pub(crate) fn references(pod: &Pod) -> BTreeSet<InputName> {
    let mut names = BTreeSet::new();
    let Some(spec) = &pod.spec else { return names };
    let config_map = |name: &str| InputName::ConfigMap(name.to_owned());
    let secret = |name: &str| InputName::Secret(name.to_owned());
    for container in spec.init_containers.iter().flatten().chain(&spec.containers) {
        for from in container.env_from.iter().flatten() {
            names.extend(from.config_map_ref.as_ref().map(|r| config_map(&r.name)));
            names.extend(from.secret_ref.as_ref().map(|r| secret(&r.name)));
        }
        for source in container.env.iter().flatten().filter_map(|env| env.value_from.as_ref()) {
            names.extend(source.config_map_key_ref.as_ref().map(|r| config_map(&r.name)));
            names.extend(source.secret_key_ref.as_ref().map(|r| secret(&r.name)));
        }
    }
    for volume in spec.volumes.iter().flatten() {
        names.extend(volume.config_map.as_ref().map(|source| config_map(&source.name)));
        names.extend(volume.secret.as_ref().and_then(|source| source.secret_name.as_deref()).map(secret));
        for source in volume.projected.iter().flat_map(|p| p.sources.iter().flatten()) {
            names.extend(source.config_map.as_ref().map(|source| config_map(&source.name)));
            names.extend(source.secret.as_ref().map(|source| secret(&source.name)));
        }
    }
    names.extend(spec.image_pull_secrets.iter().flatten().map(|r| secret(&r.name)));
    names
}

/// What a pod knows about itself: the source of `fieldRef` and `resourceFieldRef`.
#[derive(Debug)]
pub(crate) struct OwnFields<'a> {
    pub(crate) pod: &'a Pod,
    pub(crate) pod_ips: &'a [IpAddr],
    pub(crate) host_ips: &'a [IpAddr],
    pub(crate) machine: Machine,
}

impl OwnFields<'_> {
    /// The value of a `fieldRef` (Kubernetes, "Downward API").
    pub(crate) fn field(&self, path: &str) -> Result<String, InputError> {
        let meta = &self.pod.metadata;
        let spec = self.pod.spec.as_ref();
        let subscript = |prefix: &str| {
            path.strip_prefix(prefix).and_then(|rest| rest.strip_prefix("['")).and_then(|rest| rest.strip_suffix("']"))
        };
        if let Some(key) = subscript("metadata.labels") {
            return Ok(meta.labels.as_ref().and_then(|l| l.get(key)).cloned().unwrap_or_default());
        }
        if let Some(key) = subscript("metadata.annotations") {
            return Ok(meta.annotations.as_ref().and_then(|a| a.get(key)).cloned().unwrap_or_default());
        }
        let joined = |ips: &[IpAddr]| ips.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        // What a container is started with stays: it waits for the node's addresses, as a kubelet has it.
        let lacks = match path {
            "status.hostIP" | "status.hostIPs" => self.host_ips.is_empty(),
            "status.podIP" | "status.podIPs" => self.pod_ips.is_empty() && spec.is_some_and(is_host_network),
            _ => false,
        };
        if lacks {
            return Err(InputError::NoAddress(path.to_owned()));
        }
        let text = match path {
            "metadata.name" => meta.name.clone(),
            "metadata.namespace" => meta.namespace.clone(),
            "metadata.uid" => meta.uid.clone(),
            "metadata.labels" => Some(map_lines(meta.labels.as_ref())),
            "metadata.annotations" => Some(map_lines(meta.annotations.as_ref())),
            "spec.nodeName" => spec.and_then(|s| s.node_name.clone()),
            "spec.serviceAccountName" => spec.and_then(|s| s.service_account_name.clone()),
            "status.hostIP" => self.host_ips.first().map(ToString::to_string),
            "status.hostIPs" => Some(joined(self.host_ips)),
            "status.podIP" => self.pod_ips.first().map(ToString::to_string),
            "status.podIPs" => Some(joined(self.pod_ips)),
            _ => return Err(InputError::Field(path.to_owned())),
        };
        Ok(text.unwrap_or_default())
    }

    /// The value of a `resourceFieldRef`: limits that are not set are those of the machine.
    pub(crate) fn resource(
        &self,
        selector: &ResourceFieldSelector,
        own: Option<&Container>,
    ) -> Result<String, InputError> {
        let container = match (&selector.container_name, own) {
            (Some(name), _) => {
                let spec = self.pod.spec.as_ref();
                let mut all = spec.into_iter().flat_map(|s| s.init_containers.iter().flatten().chain(&s.containers));
                all.find(|c| c.name == *name).ok_or_else(|| InputError::Container(name.clone()))?
            }
            (None, Some(own)) => own,
            (None, None) => return Err(InputError::Container(String::new())),
        };
        let (kind, resource) =
            selector.resource.split_once('.').ok_or_else(|| InputError::Resource(selector.resource.clone()))?;
        let set = match kind {
            "limits" => resources::limit(container, resource),
            "requests" => resources::request(container, resource),
            _ => return Err(InputError::Resource(selector.resource.clone())),
        };
        let milli = set.and_then(quantity::milli).unwrap_or(match (kind, resource) {
            ("limits", "cpu") => self.machine.cpus.saturating_mul(1000),
            ("limits", "memory") => self.machine.memory_bytes.saturating_mul(1000),
            _ => 0,
        });
        let divisor = selector.divisor.as_ref().and_then(quantity::milli).filter(|&d| d > 0).unwrap_or(1000);
        // Rounded up, as the API says.
        let quotient = milli / divisor + i64::from(milli % divisor != 0);
        Ok(quotient.to_string())
    }
}

/// `key="value"` lines, as downward API volumes hold maps.
fn map_lines(map: Option<&BTreeMap<String, String>>) -> String {
    map.into_iter().flatten().map(|(key, value)| format!("{key}={value:?}")).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod() -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "web", "namespace": "shop", "uid": "u-1", "labels": {"app": "web", "x/y": "z"}},
            "spec": {
                "nodeName": "edge-1", "serviceAccountName": "robot",
                "imagePullSecrets": [{"name": "pull"}],
                "initContainers": [{"name": "i", "envFrom": [{"configMapRef": {"name": "cm-from"}}]}],
                "containers": [{"name": "c", "resources": {"limits": {"memory": "100Mi"}, "requests": {"cpu": "250m"}},
                    "env": [{"name": "S", "valueFrom": {"secretKeyRef": {"name": "s-env", "key": "k"}}}]}],
                "volumes": [
                    {"name": "a", "configMap": {"name": "cm-vol"}},
                    {"name": "b", "secret": {"secretName": "s-vol"}},
                    {"name": "c", "projected": {"sources": [{"configMap": {"name": "cm-proj"}}, {"secret": {"name": "s-proj"}}]}}
                ]
            }
        }))
        .unwrap()
    }

    #[test]
    fn every_reference_of_a_pod_is_found() {
        let names: Vec<_> = references(&pod())
            .into_iter()
            .map(|name| match name {
                InputName::ConfigMap(name) => format!("cm:{name}"),
                InputName::Secret(name) => format!("s:{name}"),
            })
            .collect();
        assert_eq!(names, ["cm:cm-from", "cm:cm-proj", "cm:cm-vol", "s:pull", "s:s-env", "s:s-proj", "s:s-vol"]);
    }

    #[test]
    fn own_fields_have_the_values_of_the_downward_api() {
        let pod = pod();
        let ips = ["10.1.2.3".parse().unwrap()];
        let machine = Machine { memory_bytes: 2000, cpus: 3, lowest_oom_score_adj: 0 };
        let fields = OwnFields { pod: &pod, pod_ips: &ips, host_ips: &["192.168.1.5".parse().unwrap()], machine };
        for (path, expected) in [
            ("metadata.name", "web"),
            ("metadata.namespace", "shop"),
            ("metadata.uid", "u-1"),
            ("metadata.labels['x/y']", "z"),
            ("metadata.labels['none']", ""),
            ("metadata.labels", "app=\"web\"\nx/y=\"z\""),
            ("spec.nodeName", "edge-1"),
            ("spec.serviceAccountName", "robot"),
            ("status.podIP", "10.1.2.3"),
            ("status.hostIP", "192.168.1.5"),
        ] {
            assert_eq!(fields.field(path).unwrap(), expected, "{path}");
        }
        let none = OwnFields { pod: &pod, pod_ips: &ips, host_ips: &[], machine };
        for path in ["status.hostIP", "status.hostIPs"] {
            assert_eq!(none.field(path), Err(InputError::NoAddress(path.to_owned())));
        }
        let mut of_host = pod.clone();
        of_host.spec.as_mut().unwrap().host_network = Some(true);
        let none = OwnFields { pod: &of_host, pod_ips: &[], host_ips: &[], machine };
        assert!(none.field("status.podIP").is_err() && none.field("metadata.name").is_ok());
        assert_eq!(fields.field("spec.nope"), Err(InputError::Field("spec.nope".to_owned())));
        let resource = |resource: &str, divisor: Option<&str>| {
            let selector =
                serde_json::from_value(json!({"resource": resource, "containerName": "c", "divisor": divisor}))
                    .unwrap();
            fields.resource(&selector, None).unwrap()
        };
        assert_eq!(resource("limits.memory", Some("1Mi")), "100");
        assert_eq!(resource("limits.cpu", None), "3", "an unset limit is the machine's");
        assert_eq!(resource("requests.cpu", None), "1", "rounded up");
        assert_eq!(resource("requests.cpu", Some("1m")), "250");
    }
}
