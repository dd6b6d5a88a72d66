//! What callers pass to the store and get back from it.

use std::sync::Arc;

use edgemesh_api::ObjectKey;
use serde_json::Value;

use crate::kinds::allocation::ServiceRanges;

/// Who decides about the objects in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mode {
    /// This store is the cluster's truth.
    Authoritative,
    /// This store holds what concerns one node; the truth is elsewhere. Local writes go through the outbox.
    Replica {
        /// The node's name.
        node: String,
    },
}

/// How a store is opened.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// How many changes per resource are remembered, so that watches can resume.
    pub history: usize,
    /// Enables Service address and node port allocation; authoritative stores only.
    pub services: Option<ServiceRanges>,
    /// Memory for SQLite's page cache, in KiB.
    pub page_cache_kib: u32,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self { history: 1024, services: None, page_cache_kib: 2048 }
    }
}

impl StoreOptions {
    /// Small buffers, for the replica on a node.
    pub fn small() -> Self {
        Self { history: 64, services: None, page_cache_kib: 256 }
    }
}

/// Which objects a list returns, and how.
#[derive(Debug, Clone, Default)]
pub struct ListOptions {
    /// Only this namespace; `None` is all of them.
    pub namespace: Option<String>,
    /// As in the `labelSelector` query parameter; `None` matches all.
    pub label_selector: Option<String>,
    /// As in the `fieldSelector` query parameter; `None` matches all.
    pub field_selector: Option<String>,
    /// At most so many objects; the rest through `continue_token`.
    pub limit: Option<usize>,
    /// From the page before.
    pub continue_token: Option<String>,
    /// Not older than this (Kubernetes, "Resource versions"); with `exact`, precisely this one.
    pub resource_version: Option<u64>,
    /// `resourceVersionMatch=Exact`.
    pub exact: bool,
}

impl ListOptions {
    /// All objects of a namespace.
    pub fn namespace(namespace: impl Into<String>) -> Self {
        Self { namespace: Some(namespace.into()), ..Self::default() }
    }
}

/// A list, or a page of one.
#[derive(Debug, Clone)]
pub struct ListPage {
    /// In order of namespace and name.
    pub items: Vec<Arc<Value>>,
    /// The version of the store that the list shows; a watch continues from here.
    pub resource_version: u64,
    /// Where the next page starts; `None` at the end.
    pub continue_token: Option<String>,
    /// How many are left after this page, when no selector makes that unknown.
    pub remaining: Option<usize>,
}

/// Which changes a watch delivers.
#[derive(Debug, Clone, Default)]
pub struct WatchOptions {
    /// Only this namespace; `None` is all of them.
    pub namespace: Option<String>,
    /// As in the `labelSelector` query parameter; `None` matches all.
    pub label_selector: Option<String>,
    /// As in the `fieldSelector` query parameter; `None` matches all.
    pub field_selector: Option<String>,
    /// Changes after this resource version; `None` starts with the present objects as `Added`.
    pub since: Option<u64>,
    /// Whether `Bookmark` events are wanted: after the initial objects (when `since` is `None`), then once a minute.
    pub bookmarks: bool,
}

/// What happened to an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    /// It is new, or came to match the selectors.
    Added,
    /// It changed.
    Modified,
    /// It is gone, or no longer matches the selectors. The object is its last state.
    Deleted,
    /// Nothing happened up to the object's resource version. The object carries nothing else, but the annotation
    /// `k8s.io/initial-events-end` when it closes the initial objects.
    Bookmark,
}

/// One change.
#[derive(Debug, Clone)]
pub struct WatchEvent {
    /// What happened.
    pub kind: EventKind,
    /// The object after it; with its resource version.
    pub object: Arc<Value>,
}

/// What becomes of the objects that an object owns (Kubernetes, "Cascading deletion").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Propagation {
    /// They stay, without their owner.
    Orphan,
    /// They are deleted after it.
    Background,
    /// It waits until they are deleted.
    Foreground,
}

/// How to delete.
#[derive(Debug, Clone, Default)]
pub struct DeleteOptions {
    /// Time for a pod to end, in seconds; `None` is the pod's own, 0 removes it at once.
    pub grace_period_seconds: Option<u64>,
    /// What becomes of dependents; `None` is the default of the resource.
    pub propagation: Option<Propagation>,
    /// Only if the object has this uid.
    pub uid: Option<String>,
    /// Only if the object has this resource version.
    pub resource_version: Option<String>,
}

/// What a delete did.
#[derive(Debug, Clone)]
pub struct DeleteOutcome {
    /// The object as it is now, or as it was last.
    pub object: Arc<Value>,
    /// Whether it is gone. Otherwise it waits for its grace period or finalizers.
    pub removed: bool,
}

/// A change that comes from the cloud.
#[derive(Debug, Clone)]
pub enum ReplicaChange {
    /// This is the object now.
    Upsert {
        /// Which object.
        key: ObjectKey,
        /// Its resource version in the cloud.
        origin_version: String,
        /// All of it.
        object: Value,
    },
    /// The object is gone, or doesn't concern this node any more.
    Delete {
        /// Which object.
        key: ObjectKey,
        /// Only the one with this uid; `None` is any.
        uid: Option<String>,
    },
}

/// An object that came from the cloud and is here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaVersion {
    /// Which object.
    pub key: ObjectKey,
    /// Its uid.
    pub uid: String,
    /// Its resource version in the cloud.
    pub origin_version: String,
}

/// What a local write on a replica did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WriteOp {
    /// A new object.
    Create,
    /// A change to all but the status.
    Update,
    /// A change to the status.
    UpdateStatus,
    /// A removal.
    Delete,
}

/// A local write that the hub doesn't know yet.
#[derive(Debug, Clone, PartialEq)]
pub struct OutboxEntry {
    /// Its place in the order of writes.
    pub seq: u64,
    /// What was done.
    pub op: WriteOp,
    /// To which object.
    pub key: ObjectKey,
    /// The object's uid as it is known here.
    pub uid: String,
    /// The full object as written locally; for [`WriteOp::Delete`] the Kubernetes `DeleteOptions`.
    pub object: Value,
}
