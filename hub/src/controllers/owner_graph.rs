//! Who owns whom, by uid, for the garbage collector. No I/O.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};

use super::{cache::Name, served::ServedResource};

/// Finalizers with which a delete request says what happens to dependents (Kubernetes, "Garbage Collection").
pub(crate) const FOREGROUND: &str = "foregroundDeletion";
pub(crate) const ORPHAN: &str = "orphan";

/// What the collector needs to know of an object.
#[derive(Debug, Clone)]
pub(crate) struct Item {
    pub(crate) resource: Arc<ServedResource>,
    pub(crate) name: Name,
    pub(crate) owners: Vec<OwnerReference>,
    pub(crate) deleting: bool,
    /// Waits for its dependents, or wants them kept.
    pub(crate) foreground: bool,
    pub(crate) orphan: bool,
}

impl Item {
    pub(crate) fn new(resource: &Arc<ServedResource>, meta: &ObjectMeta) -> Self {
        let has = |finalizer: &str| meta.finalizers.iter().flatten().any(|known| known == finalizer);
        Self {
            resource: Arc::clone(resource),
            name: Name::new(meta.namespace.clone().unwrap_or_default(), meta.name.clone().unwrap_or_default()),
            owners: meta.owner_references.clone().unwrap_or_default(),
            deleting: meta.deletion_timestamp.is_some(),
            foreground: has(FOREGROUND),
            orphan: has(ORPHAN),
        }
    }

    /// It is being deleted and waits for its dependents to go first.
    pub(crate) fn waits_for_dependents(&self) -> bool {
        self.deleting && self.foreground
    }
}

/// How an owner stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Owner {
    /// It exists.
    Solid,
    /// It is being deleted and waits for its dependents.
    Waiting,
    /// It doesn't exist (any more).
    Absent,
}

/// The objects and their dependents.
#[derive(Debug, Default)]
pub(crate) struct Graph {
    items: HashMap<String, Item>,
    dependents: HashMap<String, BTreeSet<String>>,
}

impl Graph {
    pub(crate) fn get(&self, uid: &str) -> Option<&Item> {
        self.items.get(uid)
    }

    pub(crate) fn len(&self) -> usize {
        self.items.len()
    }

    /// uids of the objects that name this one as an owner.
    pub(crate) fn dependents(&self, uid: &str) -> Vec<String> {
        self.dependents.get(uid).into_iter().flatten().cloned().collect()
    }

    /// uids of the dependents that an owner in foreground deletion waits for.
    pub(crate) fn blocking(&self, uid: &str) -> Vec<String> {
        let mut dependents = self.dependents(uid);
        dependents.retain(|dependent| {
            self.items.get(dependent).is_some_and(|item| {
                item.owners.iter().any(|owner| owner.uid == uid && owner.block_owner_deletion == Some(true))
            })
        });
        dependents
    }

    /// uids of the objects of a resource.
    pub(crate) fn of_resource(&self, resource: &ServedResource) -> Vec<String> {
        let same = self.items.iter().filter(|(_, item)| item.resource.resource == resource.resource);
        same.map(|(uid, _)| uid.clone()).collect()
    }

    /// How an owner stands as far as is known; `None` when it must be asked for.
    pub(crate) fn owner(&self, owner: &OwnerReference, namespace: &str) -> Option<Owner> {
        let item = self.items.get(&owner.uid)?;
        if !item.name.namespace.is_empty() && item.name.namespace != namespace {
            // A namespaced owner owns only within its namespace.
            return Some(Owner::Absent);
        }
        Some(if item.waits_for_dependents() { Owner::Waiting } else { Owner::Solid })
    }

    /// Takes an object's current state; returns the uids to look at because of it.
    pub(crate) fn put(&mut self, uid: &str, item: Item) -> Vec<String> {
        let mut look = Vec::new();
        let before = self.items.get(uid).map(|item| item.owners.clone()).unwrap_or_default();
        for owner in &before {
            if !item.owners.iter().any(|now| now.uid == owner.uid) {
                self.unlink(&owner.uid, uid);
            }
            look.extend(self.waiting(&owner.uid));
        }
        for owner in &item.owners {
            self.dependents.entry(owner.uid.clone()).or_default().insert(uid.to_owned());
        }
        let dealt_with = !item.deleting
            && item.owners.iter().all(|owner| self.owner(owner, &item.name.namespace) == Some(Owner::Solid));
        self.items.insert(uid.to_owned(), item);
        if !dealt_with {
            look.push(uid.to_owned());
        }
        look
    }

    /// Takes that an object is gone; returns the uids to look at because of it.
    pub(crate) fn remove(&mut self, uid: &str) -> Vec<String> {
        let mut look = self.dependents(uid);
        if let Some(item) = self.items.remove(uid) {
            for owner in &item.owners {
                self.unlink(&owner.uid, uid);
                look.extend(self.waiting(&owner.uid));
            }
        }
        look
    }

    fn waiting(&self, owner: &str) -> Option<String> {
        self.items.get(owner).filter(|item| item.waits_for_dependents()).map(|_| owner.to_owned())
    }

    fn unlink(&mut self, owner: &str, dependent: &str) {
        if let Some(dependents) = self.dependents.get_mut(owner) {
            dependents.remove(dependent);
            if dependents.is_empty() {
                self.dependents.remove(owner);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use kube::core::discovery::ApiResource;
    use serde_json::json;

    use super::*;

    fn item(namespace: &str, owners: &[&str], meta: serde_json::Value) -> Item {
        let resource = ApiResource {
            group: String::new(),
            version: "v1".into(),
            api_version: "v1".into(),
            kind: "Pod".into(),
            plural: "pods".into(),
        };
        let resource = Arc::new(ServedResource { resource, namespaced: true });
        let mut meta: ObjectMeta = serde_json::from_value(meta).unwrap();
        meta.namespace = Some(namespace.into());
        let owners = owners.iter().map(|uid| OwnerReference {
            uid: (*uid).into(),
            block_owner_deletion: Some(true),
            ..Default::default()
        });
        meta.owner_references = Some(owners.collect());
        Item::new(&resource, &meta)
    }

    #[test]
    fn dependents_are_looked_at_when_their_owner_goes() {
        let mut graph = Graph::default();
        assert!(graph.put("owner", item("d", &[], json!({}))).is_empty());
        assert!(graph.put("child", item("d", &["owner"], json!({}))).is_empty(), "its owner is there");
        assert_eq!(graph.remove("owner"), ["child"]);
    }

    #[test]
    fn an_object_whose_owner_is_unknown_is_looked_at() {
        let mut graph = Graph::default();
        assert_eq!(graph.put("child", item("d", &["never-seen"], json!({}))), ["child"]);
    }

    #[test]
    fn an_owner_in_another_namespace_is_none() {
        let mut graph = Graph::default();
        graph.put("owner", item("other", &[], json!({})));
        assert_eq!(graph.put("child", item("d", &["owner"], json!({}))), ["child"]);
        let reference = OwnerReference { uid: "owner".into(), ..Default::default() };
        assert_eq!(graph.owner(&reference, "d"), Some(Owner::Absent));
    }

    #[test]
    fn a_foreground_owner_is_looked_at_again_when_what_it_waits_for_is_gone() {
        let mut graph = Graph::default();
        let going = json!({"deletionTimestamp": "2026-01-01T00:00:00Z", "finalizers": [FOREGROUND]});
        graph.put("child", item("d", &["owner"], json!({})));
        assert_eq!(graph.put("owner", item("d", &[], going)), ["owner"]);
        assert_eq!(graph.blocking("owner"), ["child"]);
        assert_eq!(graph.remove("child"), ["owner"]);
        assert!(graph.blocking("owner").is_empty());
        assert!(graph.dependents.is_empty());
    }
}
