//! Deleting: preconditions, grace periods, finalizers, and what becomes of dependents.

use edgemesh_api::ObjectKey;
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use super::{
    options::{DeleteOptions, DeleteOutcome, Mode, Propagation, WriteOp},
    replica,
    transaction::Transaction,
    write::{existing, is_namespace, may_go, seconds, served, storage_key},
};
use crate::{error::ApiError, fields, kinds::KindInfo};

/// The finalizer of an object that waits until its dependents are gone.
const FOREGROUND: &str = "foregroundDeletion";
/// The finalizer of an object whose dependents stay.
const ORPHAN: &str = "orphan";
/// Namespaces that can't be deleted (Kubernetes, the NamespaceLifecycle admission).
const PROTECTED_NAMESPACES: [&str; 3] = ["default", "kube-public", "kube-system"];
/// The longest grace period that is taken, in seconds: a year.
const MAX_GRACE: u64 = 365 * 86400;

/// Deletes an object, or starts to.
pub(crate) fn delete(
    transaction: &mut Transaction<'_>,
    info: &KindInfo,
    key: &ObjectKey,
    options: &DeleteOptions,
) -> Result<DeleteOutcome, ApiError> {
    if is_namespace(info) && PROTECTED_NAMESPACES.contains(&key.name.as_str()) {
        return Err(ApiError::forbidden(key, "this namespace may not be deleted"));
    }
    let stored = existing(transaction, info, key)?;
    let old = &stored.object;
    preconditions(key, options, old)?;
    let place = storage_key(info, key);
    if let Mode::Replica { node } = &transaction.shared.mode {
        replica::admit(node, WriteOp::Delete, key, Some(old), None)?;
        if info.default_grace_seconds(old).is_some() && options.grace_period_seconds != Some(0) {
            let why = "only the final delete (gracePeriodSeconds 0) is possible here; delete through the cluster's API";
            return Err(ApiError::forbidden(key, why));
        }
        let uid = fields::meta(old, "uid").to_owned();
        transaction.outbox(WriteOp::Delete, key, &uid, &wire_options(options, &uid))?;
        let object = transaction.remove(&place)?;
        return Ok(DeleteOutcome { object: served(info, &object), removed: true });
    }

    let now = Timestamp::now();
    let mut new = (**old).clone();
    let grace = grace(info, old, options);
    let finalizers: Vec<String> = finalizers(old, options.propagation);
    let namespace_waits = is_namespace(info) && fields::strings(old, &["spec", "finalizers"]).next().is_some();
    {
        let metadata = fields::map_in(&mut new, "metadata");
        if finalizers.is_empty() {
            metadata.shift_remove("finalizers");
        } else {
            metadata.insert("finalizers".to_owned(), json!(finalizers));
        }
    }
    if grace == 0 && finalizers.is_empty() && !namespace_waits {
        let object = transaction.remove(&place)?;
        return Ok(DeleteOutcome { object: served(info, &object), removed: true });
    }

    let present = fields::at(old, &["metadata", "deletionGracePeriodSeconds"]).and_then(Value::as_u64);
    let already = fields::is_terminating(old);
    if !already || present.is_none_or(|p| grace < p) {
        let at = now + SignedDuration::from_secs(i64::try_from(grace).unwrap_or(0));
        let metadata = fields::map_in(&mut new, "metadata");
        if !already || info.default_grace_seconds(old).is_some() {
            metadata.insert("deletionTimestamp".to_owned(), json!(seconds(at)));
        }
        metadata.insert("deletionGracePeriodSeconds".to_owned(), json!(grace));
        if let Some(generation) = metadata.get("generation").and_then(Value::as_u64) {
            metadata.insert("generation".to_owned(), json!(generation + 1));
        }
    }
    if is_namespace(info) {
        fields::map_in(&mut new, "status").insert("phase".to_owned(), json!("Terminating"));
    }
    if new == **old {
        return Ok(DeleteOutcome { object: served(info, old), removed: false });
    }
    let object = transaction.put(&place, new, stored.origin_version.clone())?;
    let out = served(info, &object);
    let removed = may_go(info, &object);
    if removed {
        transaction.remove(&place)?;
    }
    Ok(DeleteOutcome { object: out, removed })
}

fn preconditions(key: &ObjectKey, options: &DeleteOptions, object: &Value) -> Result<(), ApiError> {
    for (wanted, name, word) in
        [(&options.uid, "uid", "UID"), (&options.resource_version, "resourceVersion", "ResourceVersion")]
    {
        let actual = fields::meta(object, name);
        if let Some(wanted) = wanted
            && wanted != actual
        {
            return Err(ApiError::conflict(
                key,
                &format!("Precondition failed: {word} in precondition: {wanted}, {word} in object meta: {actual}"),
            ));
        }
    }
    Ok(())
}

/// How long the object may still take to end, in seconds.
fn grace(info: &KindInfo, object: &Value, options: &DeleteOptions) -> u64 {
    let Some(own) = info.default_grace_seconds(object) else { return 0 };
    let unscheduled = fields::text(object, &["spec", "nodeName"]).is_empty();
    let ended = matches!(fields::text(object, &["status", "phase"]), "Succeeded" | "Failed");
    // Nothing runs, so there is nobody to wait for.
    if unscheduled || ended {
        return 0;
    }
    options.grace_period_seconds.unwrap_or(own).min(MAX_GRACE)
}

/// The finalizers that the object has once its dependents' fate is decided.
fn finalizers(object: &Value, propagation: Option<Propagation>) -> Vec<String> {
    let mut list: Vec<String> = fields::strings(object, &["metadata", "finalizers"]).map(str::to_owned).collect();
    if let Some(propagation) = propagation {
        list.retain(|f| f != FOREGROUND && f != ORPHAN);
        match propagation {
            Propagation::Foreground => list.push(FOREGROUND.to_owned()),
            Propagation::Orphan => list.push(ORPHAN.to_owned()),
            Propagation::Background => {}
        }
    }
    list
}

/// The options as the hub passes them on.
fn wire_options(options: &DeleteOptions, uid: &str) -> Value {
    let mut out = json!({"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"uid": uid}});
    if let Some(grace) = options.grace_period_seconds {
        out["gracePeriodSeconds"] = json!(grace);
    }
    out
}
