//! What a user may do: administrators everything, a node what concerns it (Kubernetes, "Using Node Authorization").

use std::{collections::HashSet, sync::Arc};

use edgemesh_api::{
    ObjectKey, ResourceName,
    names::{GATEWAY_NODE_LABEL, MASTERS_GROUP, NODE_LEASE_NAMESPACE},
};
use serde_json::Value;

use crate::{
    context::Identity,
    error::ApiError,
    fields,
    store::{ListOptions, Store},
};

const GATEWAY_GROUP: &str = "gateway.networking.k8s.io";

/// What a request wants to do.
#[derive(Debug, Clone, Copy)]
pub struct Attributes<'a> {
    /// Kubernetes' verb: get, list, watch, create, update, patch, delete, deletecollection.
    pub verb: &'a str,
    /// On which resource.
    pub resource: &'a ResourceName,
    /// For example `status`; empty for the object itself.
    pub subresource: &'a str,
    /// Empty for cluster-scoped resources and lists of all namespaces.
    pub namespace: &'a str,
    /// Of one object; empty for collections. For creations, the name in the body.
    pub name: &'a str,
    /// Of lists and watches.
    pub field_selector: &'a str,
}

/// Says of each object whether the user may see it.
pub type Visible = Arc<dyn Fn(&Value) -> bool + Send + Sync>;

/// The answer to a request.
#[derive(Clone)]
pub enum Decision {
    /// Go ahead.
    Allow,
    /// Go ahead, but show only these objects of the collection.
    AllowVisible(Visible),
}

impl std::fmt::Debug for Decision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Allow => "Allow",
            Self::AllowVisible(_) => "AllowVisible",
        })
    }
}

/// The rules of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Authorizer {
    /// Members of `system:masters` may do everything, nodes what concerns them, others nothing.
    #[default]
    Cluster,
    /// Every known user may do everything that the store takes: for a node's own copy, which holds nothing else.
    Copy,
}

impl Authorizer {
    /// Decides about a request.
    ///
    /// # Errors
    /// 403 in Kubernetes' words.
    pub fn authorize(self, store: &Store, user: &Identity, what: &Attributes<'_>) -> Result<Decision, ApiError> {
        if self == Self::Copy || user.in_group(MASTERS_GROUP) {
            return Ok(Decision::Allow);
        }
        let decision = user.node_name().and_then(|node| Rules { store, node }.decide(what));
        decision.ok_or_else(|| forbidden(user, what))
    }
}

/// Whether a write leaves alone what a node may not say of itself: that it runs a gateway, which shows it the certificates of
/// Gateways (Kubernetes, "Admission Control": NodeRestriction).
///
/// # Errors
/// 403, when the user is a node and the write changes it.
pub(crate) fn admit_node_labels(
    user: &Identity,
    key: &ObjectKey,
    old: Option<&Value>,
    new: &Value,
) -> Result<(), ApiError> {
    let is_node = key.resource.group.is_empty() && key.resource.plural == "nodes";
    let label = |node: &Value| fields::at(node, &["metadata", "labels", GATEWAY_NODE_LABEL]).cloned();
    if !is_node || user.node_name().is_none() || old.and_then(label) == label(new) {
        return Ok(());
    }
    let why = format!("a node can't set or remove its own label {GATEWAY_NODE_LABEL}; an administrator can");
    Err(ApiError::forbidden(key, &why))
}

/// The rules for one node.
struct Rules<'a> {
    store: &'a Store,
    node: &'a str,
}

impl Rules<'_> {
    fn decide(&self, what: &Attributes<'_>) -> Option<Decision> {
        match what.verb {
            "get" | "list" | "watch" => self.read(what),
            _ => self.may_write(what).then_some(Decision::Allow),
        }
    }

    fn read(&self, what: &Attributes<'_>) -> Option<Decision> {
        let one = |allowed: bool| allowed.then_some(Decision::Allow);
        match (what.resource.group.as_str(), what.resource.plural.as_str()) {
            ("", "services" | "nodes" | "namespaces")
            | ("discovery.k8s.io", "endpointslices")
            | ("edgemesh.dev", _)
            | (GATEWAY_GROUP, _)
            | ("apiextensions.k8s.io", "customresourcedefinitions") => Some(Decision::Allow),
            ("coordination.k8s.io", "leases") => one(what.namespace == NODE_LEASE_NAMESPACE && self.is_own_name(what)),
            ("", "pods") if what.name.is_empty() => {
                let wanted = format!("spec.nodeName={}", self.node);
                one(selectors(what).any(|s| s == wanted))
            }
            ("", "pods") => one(self.own_pod(what.namespace, what.name)),
            ("", kind @ ("secrets" | "configmaps")) => {
                let named = selectors(what).find_map(|s| s.strip_prefix("metadata.name="));
                let name = if what.name.is_empty() { named } else { Some(what.name) };
                match name {
                    Some(name) => one(self.references(kind).contains(&(what.namespace.to_owned(), name.to_owned()))),
                    // A gateway watches the certificates that its listeners name.
                    None if kind == "secrets" && self.is_gateway() => {
                        let (store, node) = (self.store.clone(), self.node.to_owned());
                        Some(Decision::AllowVisible(Arc::new(move |object| {
                            let id =
                                (fields::meta(object, "namespace").to_owned(), fields::meta(object, "name").to_owned());
                            Rules { store: &store, node: &node }.references("secrets").contains(&id)
                        })))
                    }
                    None => None,
                }
            }
            _ => None,
        }
    }

    fn may_write(&self, what: &Attributes<'_>) -> bool {
        let delete = what.verb == "delete";
        let change = matches!(what.verb, "create" | "update" | "patch");
        let own = what.name == self.node;
        match (what.resource.group.as_str(), what.resource.plural.as_str(), what.subresource) {
            ("", "nodes", "" | "status") => own && change,
            ("coordination.k8s.io", "leases", "") => {
                own && what.namespace == NODE_LEASE_NAMESPACE && (change || delete)
            }
            ("edgemesh.dev", "meshnodes", "") => own && (change || delete),
            ("" | "events.k8s.io", "events", "") => change,
            ("", "pods", "status") => change && self.own_pod(what.namespace, what.name),
            ("", "pods", "") => delete && self.own_pod(what.namespace, what.name),
            ("", "pods", "eviction") => change && self.own_pod(what.namespace, what.name),
            (GATEWAY_GROUP, _, "status") => change && self.is_gateway(),
            _ => false,
        }
    }

    fn is_own_name(&self, what: &Attributes<'_>) -> bool {
        let wanted = format!("metadata.name={}", self.node);
        what.name == self.node || (what.name.is_empty() && selectors(what).any(|s| s == wanted))
    }

    fn own_pod(&self, namespace: &str, name: &str) -> bool {
        let key = ObjectKey::new(ResourceName::new("", "v1", "pods"), namespace, name);
        self.store.read(&key).is_ok_and(|pod| fields::text(&pod, &["spec", "nodeName"]) == self.node)
    }

    fn is_gateway(&self) -> bool {
        let key = ObjectKey::new(ResourceName::new("", "v1", "nodes"), "", self.node);
        self.store.read(&key).is_ok_and(|node| fields::at(&node, &["metadata", "labels", GATEWAY_NODE_LABEL]).is_some())
    }

    /// Namespaces and names of the Secrets or ConfigMaps that the node's pods mention, and of the certificates of
    /// Gateways when it runs one.
    fn references(&self, kind: &str) -> HashSet<(String, String)> {
        let mut found = HashSet::new();
        let pods =
            ListOptions { field_selector: Some(format!("spec.nodeName={}", self.node)), ..ListOptions::default() };
        if let Ok(page) = self.store.read_list(&ResourceName::new("", "v1", "pods"), &pods) {
            for pod in &page.items {
                let mut names = Vec::new();
                mentioned(&pod["spec"], kind, &mut names);
                let namespace = fields::meta(pod, "namespace");
                found.extend(names.into_iter().map(|name| (namespace.to_owned(), name.to_owned())));
            }
        }
        if kind == "secrets" && self.is_gateway() {
            let gateways = ResourceName::new(GATEWAY_GROUP, "v1", "gateways");
            for gateway in self.store.read_list(&gateways, &ListOptions::default()).map(|p| p.items).unwrap_or_default()
            {
                let own = fields::meta(&gateway, "namespace");
                let listeners = fields::at(&gateway, &["spec", "listeners"]).and_then(Value::as_array);
                for listener in listeners.into_iter().flatten() {
                    let references = fields::at(listener, &["tls", "certificateRefs"]).and_then(Value::as_array);
                    for reference in references.into_iter().flatten() {
                        let namespace = reference["namespace"].as_str().unwrap_or(own);
                        found.insert((namespace.to_owned(), fields::text(reference, &["name"]).to_owned()));
                    }
                }
            }
        }
        found
    }
}

/// Names of Secrets or ConfigMaps anywhere in a pod's spec.
fn mentioned<'a>(value: &'a Value, kind: &str, names: &mut Vec<&'a str>) {
    let secrets = kind == "secrets";
    match value {
        Value::Array(items) => items.iter().for_each(|item| mentioned(item, kind, names)),
        Value::Object(map) => {
            for (key, member) in map {
                let name = match key.as_str() {
                    "secretName" if secrets => member.as_str(),
                    "secretRef" | "secretKeyRef" | "secret" if secrets => member["name"].as_str(),
                    "configMapRef" | "configMapKeyRef" | "configMap" if !secrets => member["name"].as_str(),
                    "imagePullSecrets" if secrets => {
                        names.extend(member.as_array().into_iter().flatten().filter_map(|r| r["name"].as_str()));
                        None
                    }
                    _ => None,
                };
                names.extend(name);
                mentioned(member, kind, names);
            }
        }
        _ => {}
    }
}

fn selectors<'a>(what: &Attributes<'a>) -> impl Iterator<Item = &'a str> {
    what.field_selector.split(',').map(str::trim)
}

fn forbidden(user: &Identity, what: &Attributes<'_>) -> ApiError {
    let resource = if what.subresource.is_empty() {
        what.resource.plural.clone()
    } else {
        format!("{}/{}", what.resource.plural, what.subresource)
    };
    let place = if what.namespace.is_empty() {
        "at the cluster scope".to_owned()
    } else {
        format!("in the namespace \"{}\"", what.namespace)
    };
    let why = format!(
        "User \"{}\" cannot {} resource \"{resource}\" in API group \"{}\" {place}",
        user.name, what.verb, what.resource.group
    );
    ApiError::forbidden(&ObjectKey::new(what.resource.clone(), what.namespace, what.name), &why)
}
