//! The node's side: changes that come from the cloud, and which local writes go back to it.

use std::sync::Arc;

use edgemesh_api::{ObjectKey, names::NODE_LEASE_NAMESPACE};
use serde_json::{Value, json};

use super::{
    options::{ReplicaChange, WriteOp},
    state::Stored,
    transaction::Transaction,
};
use crate::{error::ApiError, fields};

/// Whether this node may make this write. The rest is the cluster's to decide.
pub(crate) fn admit(
    node: &str,
    op: WriteOp,
    key: &ObjectKey,
    old: Option<&Value>,
    new: Option<&Value>,
) -> Result<(), ApiError> {
    let resource = (key.resource.group.as_str(), key.resource.plural.as_str());
    // A new object may get its name from the server; nothing that a node owns does, except events.
    let own_name = key.name == node;
    let status_only = op == WriteOp::UpdateStatus;
    let allowed = match resource {
        ("" | "events.k8s.io", "events") => !status_only,
        ("", "nodes") => own_name && op != WriteOp::Delete,
        ("coordination.k8s.io", "leases") => own_name && key.namespace == NODE_LEASE_NAMESPACE,
        ("edgemesh.dev", "meshnodes") => own_name,
        ("", "pods") => {
            let bound = |o: &Value| fields::text(o, &["spec", "nodeName"]) == node;
            (status_only || op == WriteOp::Delete) && old.or(new).is_some_and(bound)
        }
        ("gateway.networking.k8s.io", "gatewayclasses" | "gateways" | "httproutes" | "grpcroutes") => status_only,
        _ => false,
    };
    if allowed {
        return Ok(());
    }
    let why = format!("node \"{node}\" holds a copy that it can't change; write to the cluster's API");
    Err(ApiError::forbidden(key, &why))
}

/// Takes over what the cloud says, in one transaction.
pub(crate) fn apply(
    transaction: &mut Transaction<'_>,
    node: &str,
    changes: Vec<ReplicaChange>,
) -> Result<(), ApiError> {
    for change in changes {
        match change {
            ReplicaChange::Upsert { key, origin_version, object } => {
                upsert(transaction, node, &key, &origin_version, object)?;
            }
            ReplicaChange::Delete { key, uid } => remove(transaction, &key, uid.as_deref())?,
        }
    }
    Ok(())
}

fn upsert(
    transaction: &mut Transaction<'_>,
    node: &str,
    key: &ObjectKey,
    origin_version: &str,
    mut object: Value,
) -> Result<(), ApiError> {
    let place = place(transaction, key);
    // Who wrote which field is of no use here, and often the larger part of an object.
    fields::map_in(&mut object, "metadata").shift_remove("managedFields");
    name_the_kind(transaction, key, &mut object);
    let uid = fields::meta(&object, "uid").to_owned();
    let pending = transaction.database.outbox_of(key).map_err(ApiError::internal)?;
    if pending.iter().any(|(op, of)| *op == WriteOp::Delete && *of == uid) {
        // It ended here; the cloud just doesn't know yet. Taking it back would start it again.
        return Ok(());
    }
    let origin: Arc<str> = origin_version.into();
    let Some(Stored { object: local, origin_version: known }) = transaction.get(&place) else {
        transaction.put(&place, object, Some(origin))?;
        return Ok(());
    };
    let born_here = known.is_none();
    let same = fields::meta(&local, "uid") == uid;
    if !same && !born_here {
        for op in [WriteOp::Update, WriteOp::UpdateStatus] {
            transaction.database.outbox_drop(op, key).map_err(ApiError::internal)?;
        }
        transaction.remove(&place)?;
        transaction.put(&place, object, Some(origin))?;
        return Ok(());
    }
    let told = object.get("status").cloned();
    keep_local(node, key, &pending, born_here, &local, &mut object);
    // The cloud holds another status of what runs here, perhaps from a time when it took the node for lost: say it again.
    // The hub drops what the cloud has already, so this ends.
    let waits = pending.iter().any(|(op, _)| matches!(op, WriteOp::UpdateStatus | WriteOp::Create | WriteOp::Delete));
    if runs_here(node, key) && !waits && local.get("status").is_some_and(|own| told.as_ref() != Some(own)) {
        transaction.outbox(WriteOp::UpdateStatus, key, &uid, &object)?;
    }
    let local_version = fields::meta(&local, "resourceVersion");
    fields::map_in(&mut object, "metadata").insert("resourceVersion".to_owned(), json!(local_version));
    if object == *local {
        if known.as_deref() != Some(origin_version) {
            transaction.set_origin(&place, origin_version)?;
        }
        return Ok(());
    }
    if !same {
        // Watchers must see that it is another object now, as they would in the cloud.
        transaction.remove(&place)?;
    }
    transaction.put(&place, object, Some(origin))?;
    Ok(())
}

/// Local writes win until the hub has them; the status of what runs here always does.
fn keep_local(
    node: &str,
    key: &ObjectKey,
    pending: &[(WriteOp, String)],
    born_here: bool,
    local: &Value,
    object: &mut Value,
) {
    let is_pending = |op: WriteOp| pending.iter().any(|(o, _)| *o == op);
    let resource = (key.resource.group.as_str(), key.resource.plural.as_str());
    let take = |object: &mut Value, part: &str| {
        if let Some(value) = local.get(part) {
            fields::as_map(object).insert(part.to_owned(), value.clone());
        }
    };
    if runs_here(node, key) || born_here || is_pending(WriteOp::UpdateStatus) {
        take(object, "status");
    }
    if !(is_pending(WriteOp::Update) || is_pending(WriteOp::Create)) {
        return;
    }
    match resource {
        ("edgemesh.dev", "meshnodes") | ("coordination.k8s.io", "leases") => take(object, "spec"),
        ("", "nodes") => {
            for part in ["labels", "annotations"] {
                let Some(own) = fields::at(local, &["metadata", part]).and_then(Value::as_object) else { continue };
                let merged = fields::as_map(fields::map_in(object, "metadata").entry(part).or_insert(Value::Null));
                merged.extend(own.iter().map(|(k, v)| (k.clone(), v.clone())));
            }
        }
        _ => {}
    }
}

/// Whether the object is something on this node, of which the node itself knows the status best.
fn runs_here(node: &str, key: &ObjectKey) -> bool {
    key.resource.group.is_empty()
        && (key.resource.plural == "pods" || (key.resource.plural == "nodes" && key.name == node))
}

fn remove(transaction: &mut Transaction<'_>, key: &ObjectKey, uid: Option<&str>) -> Result<(), ApiError> {
    let place = place(transaction, key);
    let Some(stored) = transaction.get(&place) else { return Ok(()) };
    if uid.is_some_and(|uid| uid != fields::meta(&stored.object, "uid")) {
        return Ok(());
    }
    for op in [WriteOp::Update, WriteOp::UpdateStatus] {
        transaction.database.outbox_drop(op, key).map_err(ApiError::internal)?;
    }
    transaction.remove(&place)?;
    Ok(())
}

/// Items of lists come without their kind; here each object says it.
fn name_the_kind(transaction: &Transaction<'_>, key: &ObjectKey, object: &mut Value) {
    let object = fields::as_map(object);
    object.insert("apiVersion".to_owned(), json!(key.resource.api_version()));
    if !object.contains_key("kind")
        && let Ok(info) = transaction.kind(&key.resource)
    {
        object.insert("kind".to_owned(), json!(info.kind));
    }
}

/// Where an object is kept: in the version in which it came, so that the cloud's names stay what they are.
fn place(transaction: &Transaction<'_>, key: &ObjectKey) -> ObjectKey {
    match transaction.kind(&key.resource) {
        // A view of another resource has no place of its own.
        Ok(info) if info.storage.group != key.resource.group => super::write::storage_key(&info, key),
        _ => key.clone(),
    }
}
