//! What the pods need of the store: their objects, their status, their end, and events.

use std::{net::IpAddr, sync::Arc};

use edgemesh_api::{ObjectKey, ResourceName};
use edgemesh_apiserver::{
    ApiError, DeleteOptions, Reason, RequestContext, WatchOptions,
    store::{Store, WatchStream},
};
use k8s_openapi::api::core::v1::{ConfigMap, Pod, PodStatus, Secret};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{
    inputs::{InputName, Inputs, references},
    sandbox::PodIdentity,
};

/// A resource of the core group.
pub(crate) fn core(plural: &str) -> ResourceName {
    ResourceName::new("", "v1", plural)
}

/// The store, as the pods of one node use it.
#[derive(Clone)]
pub(crate) struct NodeApi {
    store: Store,
    context: RequestContext,
    /// The node's own name.
    node: String,
}

impl NodeApi {
    /// The store as this node's own identity.
    pub(crate) fn new(store: Store, node: &str) -> Self {
        let context = RequestContext::new(edgemesh_apiserver::Identity::node(node));
        Self { store, context, node: node.to_owned() }
    }

    /// All objects of a resource, then every change. A bookmark closes the present objects.
    pub(crate) fn watch(&self, plural: &str) -> Result<WatchStream, ApiError> {
        self.store.watch(&core(plural), &WatchOptions { bookmarks: true, ..WatchOptions::default() })
    }

    /// The own Node, then every change of it.
    pub(crate) fn watch_own_node(&self) -> Result<WatchStream, ApiError> {
        let field_selector = Some(format!("metadata.name={}", self.node));
        self.store.watch(&core("nodes"), &WatchOptions { field_selector, ..WatchOptions::default() })
    }

    /// The node's addresses as its Node has them; none while there is no such object.
    pub(crate) async fn node_addresses(&self) -> Result<Vec<IpAddr>, ApiError> {
        match self.store.get(&ObjectKey::new(core("nodes"), "", &self.node)).await {
            Ok(node) => Ok(node_addresses(&node)),
            Err(error) if error.reason == Reason::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// The ConfigMaps and Secrets that a pod refers to, as far as they exist.
    pub(crate) async fn inputs(&self, pod: &Pod) -> Result<Inputs, ApiError> {
        let namespace = pod.metadata.namespace.clone().unwrap_or_default();
        let mut inputs = Inputs { namespace, ..Inputs::default() };
        for reference in references(pod) {
            match reference {
                InputName::ConfigMap(name) => {
                    if let Some(map) = self.object::<ConfigMap>("configmaps", &inputs.namespace, &name).await? {
                        inputs.config_maps.insert(name, map);
                    }
                }
                InputName::Secret(name) => {
                    if let Some(secret) = self.object::<Secret>("secrets", &inputs.namespace, &name).await? {
                        inputs.secrets.insert(name, secret);
                    }
                }
            }
        }
        Ok(inputs)
    }

    async fn object<T: DeserializeOwned>(
        &self,
        plural: &str,
        namespace: &str,
        name: &str,
    ) -> Result<Option<T>, ApiError> {
        match self.store.get(&ObjectKey::new(core(plural), namespace, name)).await {
            Ok(value) => T::deserialize(value.as_ref())
                .map(Some)
                .map_err(|error| ApiError::bad_request(format!("{plural} {namespace}/{name}: {error}"))),
            Err(error) if error.reason == Reason::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes a pod's status, if the pod is still the same one. Returns whether it is.
    pub(crate) async fn write_status(&self, identity: &PodIdentity, status: &PodStatus) -> Result<bool, ApiError> {
        let key = pod_key(identity);
        let present = match self.store.get(&key).await {
            Ok(present) => present,
            Err(error) if error.reason == Reason::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        if uid_of(&present) != identity.uid {
            return Ok(false);
        }
        let status = serde_json::to_value(status)
            .map_err(|error| ApiError::bad_request(format!("the status of {key} is no JSON: {error}")))?;
        let mut object = Arc::unwrap_or_clone(present);
        if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
            // The status is this node's alone: whatever else changed meanwhile doesn't matter.
            metadata.remove("resourceVersion");
        }
        if let Some(fields) = object.as_object_mut() {
            fields.insert("status".to_owned(), status);
        }
        self.store.update_status(&key, object, &self.context).await.map(|_| true)
    }

    /// The pod is gone from this node: removes its object.
    pub(crate) async fn confirm_deletion(&self, identity: &PodIdentity) -> Result<(), ApiError> {
        let options = DeleteOptions {
            grace_period_seconds: Some(0),
            uid: Some(identity.uid.clone()),
            ..DeleteOptions::default()
        };
        match self.store.delete(&pod_key(identity), options, &self.context).await {
            // It's another pod of that name by now, or none.
            Err(error) if !matches!(error.reason, Reason::NotFound | Reason::Conflict) => Err(error),
            _ => Ok(()),
        }
    }

    /// Creates an event.
    pub(crate) async fn create_event(&self, namespace: &str, event: Value) -> Result<(), ApiError> {
        self.store.create(&core("events"), namespace, event, &self.context).await.map(|_| ())
    }

    /// Replaces an event.
    pub(crate) async fn update_event(&self, namespace: &str, name: &str, event: Value) -> Result<(), ApiError> {
        let key = ObjectKey::new(core("events"), namespace, name);
        self.store.update(&key, event, &self.context).await.map(|_| ())
    }
}

fn pod_key(identity: &PodIdentity) -> ObjectKey {
    ObjectKey::new(core("pods"), identity.namespace.clone(), identity.name.clone())
}

/// A Node's addresses for its pods: the first internal one, and the first one of the other family (kubelet's `GetNodeHostIPs`).
pub(crate) fn node_addresses(node: &Value) -> Vec<IpAddr> {
    let all = node.pointer("/status/addresses").and_then(Value::as_array).into_iter().flatten();
    let internal = all.filter(|address| address["type"] == "InternalIP");
    let parsed = internal.filter_map(|address| address["address"].as_str()?.parse::<IpAddr>().ok());
    let mut addresses: Vec<IpAddr> = Vec::new();
    for address in parsed {
        if addresses.iter().all(|known| known.is_ipv4() != address.is_ipv4()) {
            addresses.push(address);
        }
    }
    addresses
}

/// An object's uid.
pub(crate) fn uid_of(object: &Value) -> &str {
    object.pointer("/metadata/uid").and_then(Value::as_str).unwrap_or_default()
}
