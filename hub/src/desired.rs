//! What each node should hold: one index of the cluster's objects for all nodes, and per node only the names of what
//! its pods need.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use bytes::Bytes;
use edgemesh_api::{ObjectKey, ResourceName, names::GATEWAY_NODE_LABEL};
use edgemesh_link::{HeldObject, View};
use parking_lot::RwLock;
use serde_json::Value;

use crate::references;

/// Groups whose CustomResourceDefinitions every node holds.
const MESH_GROUPS: [&str; 2] = ["edgemesh.dev", "gateway.networking.k8s.io"];

/// Which nodes hold the objects of a resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Audience {
    /// All nodes.
    All,
    /// The node of the pod.
    OwnPods,
    /// The nodes whose pods refer to it, and gateway nodes where a Gateway does.
    Referrers,
}

fn audience(resource: &ResourceName) -> Audience {
    match (resource.group.as_str(), resource.plural.as_str()) {
        ("", "pods") => Audience::OwnPods,
        ("", "configmaps" | "secrets") => Audience::Referrers,
        _ => Audience::All,
    }
}

/// Whose view a change touched.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Affected {
    /// Every node's, at this key.
    All(Arc<ObjectKey>),
    /// That node's, at this key.
    Node(String, Arc<ObjectKey>),
    /// Every gateway node's, at this key.
    Gateways(Arc<ObjectKey>),
}

#[derive(Debug)]
struct PodEntry {
    node: String,
    held: Arc<HeldObject>,
    references: HashSet<Arc<ObjectKey>>,
}

#[derive(Debug, Default)]
struct NodeSet {
    pods: HashSet<Arc<ObjectKey>>,
    /// How many of the node's pods refer to an object, which need not exist.
    references: HashMap<Arc<ObjectKey>, usize>,
}

#[derive(Debug, Default)]
struct State {
    shared: HashMap<Arc<ObjectKey>, Arc<HeldObject>>,
    pods: HashMap<Arc<ObjectKey>, PodEntry>,
    referable: HashMap<Arc<ObjectKey>, Arc<HeldObject>>,
    nodes: HashMap<String, NodeSet>,
    gateway_nodes: HashSet<String>,
    /// What each Gateway refers to, and how many Gateways refer to an object.
    gateways: HashMap<Arc<ObjectKey>, HashSet<Arc<ObjectKey>>>,
    gateway_references: HashMap<Arc<ObjectKey>, usize>,
}

/// The index. Its lock is held for a look-up or one change only.
#[derive(Debug, Default)]
pub(crate) struct Desired(RwLock<State>);

impl Desired {
    /// An object is there, or changed. `json` must be the object that `value` is.
    pub(crate) fn apply(&self, key: &ObjectKey, value: &Value, json: Bytes) -> Vec<Affected> {
        let text = |path: &str| value.pointer(path).and_then(Value::as_str).unwrap_or_default();
        let held = Arc::new(HeldObject {
            uid: text("/metadata/uid").to_owned(),
            origin_version: text("/metadata/resourceVersion").to_owned(),
            json,
        });
        let state = &mut *self.0.write();
        let mut affected = Vec::new();
        match audience(&key.resource) {
            Audience::All => {
                if is_crd_of_another_group(key) || state.shared.get(key).is_some_and(|old| old.same_version(&held)) {
                    return affected;
                }
                let key = Arc::new(key.clone());
                state.shared.insert(Arc::clone(&key), held);
                affected.push(Affected::All(Arc::clone(&key)));
                match key.resource.plural.as_str() {
                    "nodes" => state.label_node(&key.name, has_gateway_label(value), &mut affected),
                    "gateways" => {
                        let references = references::of_gateway(&key, value);
                        state.set_gateway(&key, references, &mut affected);
                    }
                    _ => {}
                }
            }
            Audience::OwnPods => {
                let node = text("/spec/nodeName");
                let same = |old: &PodEntry| old.node == node && old.held.same_version(&held);
                if state.pods.get(key).is_some_and(same) {
                    return affected;
                }
                let key = Arc::new(key.clone());
                let references = if node.is_empty() { HashSet::new() } else { references::of_pod(&key, value) };
                state.set_pod(&key, node, held, references, &mut affected);
            }
            Audience::Referrers => {
                if state.referable.get(key).is_some_and(|old| old.same_version(&held)) {
                    return affected;
                }
                let key = Arc::new(key.clone());
                state.referable.insert(Arc::clone(&key), held);
                state.tell_referrers(&key, &mut affected);
            }
        }
        affected
    }

    /// An object is gone.
    pub(crate) fn remove(&self, key: &ObjectKey) -> Vec<Affected> {
        let state = &mut *self.0.write();
        let mut affected = Vec::new();
        match audience(&key.resource) {
            Audience::All => {
                if let Some((key, _)) = state.shared.remove_entry(key) {
                    affected.push(Affected::All(Arc::clone(&key)));
                    match key.resource.plural.as_str() {
                        "nodes" => state.label_node(&key.name, false, &mut affected),
                        "gateways" => state.set_gateway(&key, HashSet::new(), &mut affected),
                        _ => {}
                    }
                }
            }
            Audience::OwnPods => {
                if let Some((key, old)) = state.pods.remove_entry(key) {
                    state.drop_pod(&key, &old, &mut affected);
                }
            }
            Audience::Referrers => {
                if let Some((key, _)) = state.referable.remove_entry(key) {
                    state.tell_referrers(&key, &mut affected);
                }
            }
        }
        affected
    }

    /// The keys of a resource that are there now.
    pub(crate) fn keys(&self, resource: &ResourceName) -> HashSet<Arc<ObjectKey>> {
        let state = self.0.read();
        let of = |key: &&Arc<ObjectKey>| key.resource == *resource;
        match audience(resource) {
            Audience::All => state.shared.keys().filter(of).cloned().collect(),
            Audience::OwnPods => state.pods.keys().filter(of).cloned().collect(),
            Audience::Referrers => state.referable.keys().filter(of).cloned().collect(),
        }
    }

    /// Whether the node has the gateway label.
    pub(crate) fn is_gateway_node(&self, node: &str) -> bool {
        self.0.read().gateway_nodes.contains(node)
    }

    /// Whether the pod is the node's.
    pub(crate) fn has_pod(&self, node: &str, pod: &ObjectKey) -> bool {
        self.0.read().nodes.get(node).is_some_and(|set| set.pods.contains(pod))
    }

    /// How many objects there are, for the debug page.
    pub(crate) fn len(&self) -> usize {
        let state = self.0.read();
        state.shared.len() + state.pods.len() + state.referable.len()
    }
}

impl State {
    fn set_pod(
        &mut self,
        key: &Arc<ObjectKey>,
        node: &str,
        held: Arc<HeldObject>,
        references: HashSet<Arc<ObjectKey>>,
        affected: &mut Vec<Affected>,
    ) {
        let entry = PodEntry { node: node.to_owned(), held, references };
        if !node.is_empty() {
            let set = self.nodes.entry(node.to_owned()).or_default();
            set.pods.insert(Arc::clone(key));
            // What the pod needs goes ahead of the pod.
            for reference in &entry.references {
                let count = set.references.entry(Arc::clone(reference)).or_default();
                *count += 1;
                if *count == 1 && self.referable.contains_key(reference) {
                    affected.push(Affected::Node(node.to_owned(), Arc::clone(reference)));
                }
            }
            affected.push(Affected::Node(node.to_owned(), Arc::clone(key)));
        }
        if let Some(old) = self.pods.insert(Arc::clone(key), entry) {
            let moved = old.node != node;
            self.release(key, &old, moved, affected);
        }
    }

    fn drop_pod(&mut self, key: &Arc<ObjectKey>, old: &PodEntry, affected: &mut Vec<Affected>) {
        self.release(key, old, true, affected);
    }

    /// Takes back what an older state of a pod asked for.
    fn release(&mut self, key: &Arc<ObjectKey>, old: &PodEntry, gone: bool, affected: &mut Vec<Affected>) {
        let Some(set) = self.nodes.get_mut(&old.node) else { return };
        if gone {
            set.pods.remove(key);
            affected.push(Affected::Node(old.node.clone(), Arc::clone(key)));
        }
        for reference in &old.references {
            let Some(count) = set.references.get_mut(reference) else { continue };
            *count -= 1;
            if *count == 0 {
                set.references.remove(reference);
                affected.push(Affected::Node(old.node.clone(), Arc::clone(reference)));
            }
        }
        if set.pods.is_empty() && set.references.is_empty() {
            self.nodes.remove(&old.node);
        }
    }

    fn tell_referrers(&self, key: &Arc<ObjectKey>, affected: &mut Vec<Affected>) {
        for (node, set) in &self.nodes {
            if set.references.contains_key(key) {
                affected.push(Affected::Node(node.clone(), Arc::clone(key)));
            }
        }
        if self.gateway_references.contains_key(key) {
            affected.push(Affected::Gateways(Arc::clone(key)));
        }
    }

    fn label_node(&mut self, node: &str, gateway: bool, affected: &mut Vec<Affected>) {
        let changed =
            if gateway { self.gateway_nodes.insert(node.to_owned()) } else { self.gateway_nodes.remove(node) };
        if changed {
            let keys = self.gateway_references.keys();
            affected.extend(keys.map(|key| Affected::Node(node.to_owned(), Arc::clone(key))));
        }
    }

    fn set_gateway(&mut self, key: &Arc<ObjectKey>, references: HashSet<Arc<ObjectKey>>, affected: &mut Vec<Affected>) {
        let old = if references.is_empty() {
            self.gateways.remove(key).unwrap_or_default()
        } else {
            self.gateways.insert(Arc::clone(key), references.clone()).unwrap_or_default()
        };
        for reference in references.difference(&old) {
            *self.gateway_references.entry(Arc::clone(reference)).or_default() += 1;
            affected.push(Affected::Gateways(Arc::clone(reference)));
        }
        for reference in old.difference(&references) {
            if let Some(count) = self.gateway_references.get_mut(reference) {
                *count -= 1;
                if *count == 0 {
                    self.gateway_references.remove(reference);
                }
            }
            affected.push(Affected::Gateways(Arc::clone(reference)));
        }
    }
}

/// What one node should hold.
pub(crate) struct NodeView<'a> {
    pub(crate) desired: &'a Desired,
    pub(crate) node: &'a str,
}

impl View for NodeView<'_> {
    fn get(&self, key: &ObjectKey) -> Option<Arc<HeldObject>> {
        let state = self.desired.0.read();
        match audience(&key.resource) {
            Audience::All => state.shared.get(key).cloned(),
            Audience::OwnPods => {
                state.pods.get(key).filter(|pod| pod.node == self.node).map(|pod| Arc::clone(&pod.held))
            }
            Audience::Referrers => {
                let by_pod = state.nodes.get(self.node).is_some_and(|set| set.references.contains_key(key));
                let by_gateway = state.gateway_nodes.contains(self.node) && state.gateway_references.contains_key(key);
                if by_pod || by_gateway { state.referable.get(key).cloned() } else { None }
            }
        }
    }

    fn for_each(&self, each: &mut dyn FnMut(&Arc<ObjectKey>, &HeldObject)) {
        let state = self.desired.0.read();
        for (key, held) in &state.shared {
            each(key, held);
        }
        let set = state.nodes.get(self.node);
        for key in set.into_iter().flat_map(|set| &set.pods) {
            if let Some(pod) = state.pods.get(key) {
                each(key, &pod.held);
            }
        }
        let by_pods = set.into_iter().flat_map(|set| set.references.keys());
        let is_gateway = state.gateway_nodes.contains(self.node);
        let by_gateways = state
            .gateway_references
            .keys()
            .filter(|key| is_gateway && !set.is_some_and(|set| set.references.contains_key(*key)));
        for key in by_pods.chain(by_gateways) {
            if let Some(held) = state.referable.get(key) {
                each(key, held);
            }
        }
    }
}

fn has_gateway_label(node: &Value) -> bool {
    node["metadata"]["labels"].get(GATEWAY_NODE_LABEL).is_some()
}

fn is_crd_of_another_group(key: &ObjectKey) -> bool {
    key.resource.plural == "customresourcedefinitions"
        && !MESH_GROUPS.iter().any(|group| key.name.strip_suffix(group).is_some_and(|rest| rest.ends_with('.')))
}

trait SameVersion {
    fn same_version(&self, other: &HeldObject) -> bool;
}

impl SameVersion for Arc<HeldObject> {
    fn same_version(&self, other: &HeldObject) -> bool {
        self.uid == other.uid && self.origin_version == other.origin_version
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn key(plural: &str, name: &str) -> ObjectKey {
        ObjectKey::new(ResourceName::new("", "v1", plural), "default", name)
    }

    fn put(desired: &Desired, key: &ObjectKey, version: u32, body: Value) -> Vec<Affected> {
        let mut object = body;
        object["metadata"]["uid"] = json!(key.name);
        object["metadata"]["resourceVersion"] = json!(version.to_string());
        desired.apply(key, &object, Bytes::from(object.to_string()))
    }

    fn held(desired: &Desired, node: &str) -> Vec<String> {
        let mut all = Vec::new();
        let view = NodeView { desired, node };
        view.for_each(&mut |key, _| {
            assert!(view.get(key).is_some(), "{key} is listed, so it must be found");
            all.push(key.name.clone());
        });
        all.sort();
        all
    }

    #[test]
    fn a_node_holds_its_pods_with_what_they_refer_to_and_nothing_of_other_nodes() {
        let desired = Desired::default();
        put(&desired, &key("configmaps", "settings"), 1, json!({}));
        put(&desired, &key("secrets", "other"), 2, json!({}));
        let pod = json!({"spec": {"nodeName": "a", "volumes": [{"name": "v", "configMap": {"name": "settings"}}]}});
        let affected = put(&desired, &key("pods", "p"), 3, pod);
        let names: Vec<_> = affected
            .iter()
            .map(|one| match one {
                Affected::Node(node, key) => format!("{node}/{}", key.name),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(names, ["a/settings", "a/p"], "what the pod needs goes first");
        assert_eq!(held(&desired, "a"), ["p", "settings"]);
        assert!(held(&desired, "b").is_empty());
        desired.remove(&key("pods", "p"));
        assert!(held(&desired, "a").is_empty(), "the last pod took its ConfigMap with it");
        assert!(desired.0.read().nodes.is_empty());
    }

    #[test]
    fn an_update_that_keeps_a_reference_does_not_take_it_away() {
        let desired = Desired::default();
        put(&desired, &key("configmaps", "settings"), 1, json!({}));
        let pod = json!({"spec": {"nodeName": "a", "volumes": [{"name": "v", "configMap": {"name": "settings"}}]}});
        put(&desired, &key("pods", "p"), 2, pod.clone());
        let affected = put(&desired, &key("pods", "p"), 3, pod);
        assert_eq!(affected, [Affected::Node("a".into(), Arc::new(key("pods", "p")))]);
        assert_eq!(held(&desired, "a"), ["p", "settings"]);
    }

    #[test]
    fn the_secret_of_a_gateway_reaches_gateway_nodes_only() {
        let desired = Desired::default();
        let resource = ResourceName::new("gateway.networking.k8s.io", "v1", "gateways");
        let gateway = ObjectKey::new(resource, "default", "g");
        let spec = json!({"spec": {"listeners": [{"tls": {"certificateRefs": [{"name": "cert"}]}}]}});
        put(&desired, &key("secrets", "cert"), 1, json!({}));
        put(&desired, &gateway, 2, spec);
        let node = ObjectKey::new(ResourceName::new("", "v1", "nodes"), "", "a");
        put(&desired, &node, 3, json!({"metadata": {"labels": {GATEWAY_NODE_LABEL: "true"}}}));
        assert_eq!(held(&desired, "a"), ["a", "cert", "g"]);
        assert_eq!(held(&desired, "b"), ["a", "g"]);
        let affected = put(&desired, &node, 4, json!({"metadata": {"labels": {}}}));
        assert!(affected.contains(&Affected::Node("a".into(), Arc::new(key("secrets", "cert")))), "{affected:?}");
        assert_eq!(held(&desired, "a"), ["a", "g"]);
    }

    #[test]
    fn definitions_of_other_groups_stay_in_the_cloud() {
        let desired = Desired::default();
        let resource = ResourceName::new("apiextensions.k8s.io", "v1", "customresourcedefinitions");
        for (name, here) in [("meshnodes.edgemesh.dev", true), ("x.notedgemesh.dev", false), ("y.example.com", false)] {
            let key = ObjectKey::new(resource.clone(), "", name);
            put(&desired, &key, 1, json!({}));
            assert_eq!(NodeView { desired: &desired, node: "a" }.get(&key).is_some(), here, "{name}");
        }
    }
}
