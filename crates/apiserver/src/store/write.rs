//! Creating and changing objects: what the API server does between a request and the disk.

use std::sync::Arc;

use edgemesh_api::ObjectKey;
use jiff::Timestamp;
use rand::Rng;
use serde_json::{Value, json};

use super::{
    allocate,
    definition::{self, is_definition},
    options::{Mode, WriteOp},
    replica,
    state::Stored,
    transaction::Transaction,
};
use crate::{
    auth::admit_node_labels,
    context::{FieldValidation, RequestContext},
    error::{ApiError, Cause, Details, Reason},
    fields,
    kinds::{self, FieldError, KindInfo},
};

/// The letters of generated names: no vowels, no look-alikes (Kubernetes, `rand.SafeEncodeString`).
const NAME_LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
/// The longest prefix of a generated name.
const MAX_GENERATE_NAME: usize = 58;
/// How often a generated name is tried.
const NAME_TRIES: usize = 8;

/// Which part of an object a write may change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Everything but the status.
    Main,
    /// The status.
    Status,
    /// A Namespace's `spec.finalizers`.
    Finalize,
}

/// A write's result.
#[derive(Debug, Clone)]
pub struct Written {
    /// The object as stored, in the version that was asked for.
    pub object: Arc<Value>,
    /// What the caller should know, for `Warning` headers.
    pub warnings: Vec<String>,
}

/// The storage key of a key in any served version.
pub(crate) fn storage_key(info: &KindInfo, key: &ObjectKey) -> ObjectKey {
    ObjectKey::new(info.storage.clone(), key.namespace.clone(), key.name.clone())
}

/// A stored object in the served version of `info`.
pub(crate) fn served(info: &KindInfo, object: &Arc<Value>) -> Arc<Value> {
    if info.storage == info.resource && fields::text(object, &["apiVersion"]) == info.api_version() {
        return object.clone();
    }
    let mut out = (**object).clone();
    kinds::from_storage(info, &mut out);
    out["apiVersion"] = json!(info.api_version());
    Arc::new(out)
}

/// 422 with one cause per field.
pub(crate) fn invalid(info: &KindInfo, name: &str, errors: &[FieldError]) -> ApiError {
    let kind = if info.resource.group.is_empty() {
        info.kind.to_string()
    } else {
        format!("{}.{}", info.kind, info.resource.group)
    };
    let list = match errors {
        [one] => one.to_string(),
        many => format!("[{}]", many.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")),
    };
    let causes = errors
        .iter()
        .map(|e| Cause { reason: e.kind.cause().to_owned(), message: e.message(), field: e.field.clone() })
        .collect();
    ApiError {
        reason: Reason::Invalid,
        message: format!("{kind} \"{name}\" is invalid: {list}"),
        details: Some(Box::new(Details {
            name: name.to_owned(),
            group: info.resource.group.clone(),
            kind: info.kind.to_string(),
            causes,
            retry_after_seconds: 0,
        })),
    }
}

/// Creates an object in `namespace` (empty for cluster-scoped kinds).
pub(crate) fn create(
    transaction: &mut Transaction<'_>,
    info: &KindInfo,
    namespace: &str,
    object: Value,
    context: &RequestContext,
) -> Result<Written, ApiError> {
    let (mut object, warnings) = accept(info, object, context)?;
    let now = Timestamp::now();
    name_it(info, &mut object, namespace)?;
    let generated = fields::meta(&object, "name").is_empty();
    let mut key = ObjectKey::new(info.resource.clone(), namespace, fields::meta(&object, "name"));
    if !fields::meta(&object, "resourceVersion").is_empty() {
        return Err(ApiError::bad_request("resourceVersion should not be set on objects to be created"));
    }
    admit_node_labels(&context.user, &key, None, &object)?;
    if let Mode::Replica { node } = &transaction.shared.mode {
        replica::admit(node, WriteOp::Create, &key, None, Some(&object))?;
    } else if info.namespaced {
        check_namespace(transaction, &key)?;
    }
    {
        let metadata = fields::map_in(&mut object, "metadata");
        for server_side in
            ["resourceVersion", "deletionTimestamp", "deletionGracePeriodSeconds", "selfLink", "managedFields"]
        {
            metadata.shift_remove(server_side);
        }
        metadata.insert("uid".to_owned(), json!(uuid::Uuid::new_v4().to_string()));
        metadata.insert("creationTimestamp".to_owned(), json!(seconds(now)));
    }
    kinds::prepare_create(info, &mut object);
    kinds::default_object(info, &mut object);
    for attempt in 0.. {
        if generated {
            let name = generated_name(fields::meta(&object, "generateName"));
            fields::map_in(&mut object, "metadata").insert("name".to_owned(), json!(name));
            key.name = name;
        }
        match transaction.get(&storage_key(info, &key)) {
            None => break,
            Some(_) if generated && attempt < NAME_TRIES => {}
            Some(_) => return Err(ApiError::already_exists(&key)),
        }
    }
    if is_service(info) {
        allocate::service(transaction, info, None, &mut object)?;
    }
    let errors = kinds::validate_create(info, &object);
    if !errors.is_empty() {
        return Err(invalid(info, &key.name, &errors));
    }
    if is_definition(&info.resource) {
        definition::accept(&mut object, now);
    }
    let stored = store(transaction, info, &key, object, None)?;
    if matches!(transaction.shared.mode, Mode::Replica { .. }) {
        transaction.outbox(WriteOp::Create, &key, fields::meta(&stored, "uid"), &stored)?;
    }
    Ok(Written { object: served(info, &stored), warnings })
}

/// Replaces a part of an object by what `change` makes of it (in the served version).
pub(crate) fn modify(
    transaction: &mut Transaction<'_>,
    info: &KindInfo,
    key: &ObjectKey,
    part: Part,
    change: impl FnOnce(&KindInfo, &Arc<Value>) -> Result<Value, ApiError>,
    context: &RequestContext,
) -> Result<Written, ApiError> {
    let place = storage_key(info, key);
    let stored = transaction.get(&place).ok_or_else(|| ApiError::not_found(key))?;
    let old = served(info, &stored.object);
    let (mut new, warnings) = accept(info, change(info, &old)?, context)?;
    same_object(info, key, &old, &mut new)?;
    if let Mode::Replica { node } = &transaction.shared.mode {
        let op = if part == Part::Status { WriteOp::UpdateStatus } else { WriteOp::Update };
        replica::admit(node, op, key, Some(&old), Some(&new))?;
    }
    if part == Part::Main {
        admit_node_labels(&context.user, key, Some(&old), &new)?;
    }
    keep_server_side(&old, &mut new);
    let errors = match part {
        Part::Status => {
            kinds::prepare_status_update(info, &old, &mut new);
            kinds::validate_status_update(info, &old, &new)
        }
        Part::Finalize => {
            let finalizers = fields::at(&new, &["spec", "finalizers"]).cloned().unwrap_or(json!([]));
            new = (*old).clone();
            fields::map_in(&mut new, "spec").insert("finalizers".to_owned(), finalizers);
            Vec::new()
        }
        Part::Main => {
            kinds::prepare_update(info, &old, &mut new);
            kinds::default_object(info, &mut new);
            if is_service(info) {
                allocate::service(transaction, info, Some(&old), &mut new)?;
            }
            let mut errors = kinds::validate_update(info, &old, &new);
            errors.extend(no_new_finalizers(&old, &new));
            errors
        }
    };
    if !errors.is_empty() {
        return Err(invalid(info, &key.name, &errors));
    }
    if is_definition(&info.resource) && part == Part::Main {
        definition::accept(&mut new, Timestamp::now());
    }
    fields::map_in(&mut new, "metadata")
        .insert("resourceVersion".to_owned(), json!(fields::meta(&old, "resourceVersion")));
    if new == *old {
        return Ok(Written { object: old, warnings });
    }
    let now = store(transaction, info, key, new, stored.origin_version.clone())?;
    if matches!(transaction.shared.mode, Mode::Replica { .. }) {
        let op = if part == Part::Status { WriteOp::UpdateStatus } else { WriteOp::Update };
        transaction.outbox(op, key, fields::meta(&now, "uid"), &now)?;
    }
    let out = served(info, &now);
    if may_go(info, &now) {
        transaction.remove(&place)?;
    }
    Ok(Written { object: out, warnings })
}

/// Binds a pod to a node (`pods/binding`): the one way in which `spec.nodeName` gets set.
pub(crate) fn bind(
    transaction: &mut Transaction<'_>,
    info: &KindInfo,
    key: &ObjectKey,
    node: &str,
    annotations: Option<&Value>,
) -> Result<(), ApiError> {
    let stored = transaction.get(&storage_key(info, key)).ok_or_else(|| ApiError::not_found(key))?;
    if fields::is_terminating(&stored.object) {
        return Err(ApiError::conflict(
            key,
            &format!("pod {} is being deleted, cannot be assigned to a host", key.name),
        ));
    }
    let bound = fields::text(&stored.object, &["spec", "nodeName"]);
    if !bound.is_empty() {
        let why = format!("pod {} is already assigned to node \"{bound}\"", key.name);
        return Err(ApiError::conflict(key, &why));
    }
    let mut new = (*stored.object).clone();
    fields::map_in(&mut new, "spec").insert("nodeName".to_owned(), json!(node));
    if let Some(annotations) = annotations.and_then(Value::as_object) {
        let own = fields::as_map(fields::map_in(&mut new, "metadata").entry("annotations").or_insert(Value::Null));
        own.extend(annotations.iter().map(|(k, v)| (k.clone(), v.clone())));
    }
    let condition = json!({"type": "PodScheduled", "status": "True", "lastProbeTime": null,
        "lastTransitionTime": seconds(Timestamp::now())});
    let status = fields::map_in(&mut new, "status");
    let conditions = status.entry("conditions").or_insert(json!([]));
    if let Some(list) = conditions.as_array_mut() {
        list.retain(|c| c["type"] != "PodScheduled");
        list.push(condition);
    }
    store(transaction, info, key, new, stored.origin_version)?;
    Ok(())
}

/// Stores an object of the served version.
pub(crate) fn store(
    transaction: &mut Transaction<'_>,
    info: &KindInfo,
    key: &ObjectKey,
    mut object: Value,
    origin_version: Option<Arc<str>>,
) -> Result<Arc<Value>, ApiError> {
    kinds::to_storage(info, &mut object);
    transaction.put(&storage_key(info, key), object, origin_version)
}

/// Whether an object whose deletion was asked for has nothing left to wait for.
pub(crate) fn may_go(info: &KindInfo, object: &Value) -> bool {
    let waits_for_namespace = is_namespace(info) && fields::strings(object, &["spec", "finalizers"]).next().is_some();
    let grace = fields::at(object, &["metadata", "deletionGracePeriodSeconds"]).and_then(Value::as_u64).unwrap_or(0);
    fields::is_terminating(object)
        && fields::strings(object, &["metadata", "finalizers"]).next().is_none()
        && !waits_for_namespace
        && grace == 0
}

pub(crate) fn is_namespace(info: &KindInfo) -> bool {
    info.resource.group.is_empty() && info.resource.plural == "namespaces"
}

fn is_service(info: &KindInfo) -> bool {
    info.resource.group.is_empty() && info.resource.plural == "services"
}

/// A time as Kubernetes writes it in metadata: whole seconds.
pub(crate) fn seconds(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// The JSON types, and what becomes of unknown fields.
fn accept(info: &KindInfo, object: Value, context: &RequestContext) -> Result<(Value, Vec<String>), ApiError> {
    let decoded = kinds::decode(info, object).map_err(|error| {
        ApiError::bad_request(format!(
            "{} in version \"{}\" cannot be handled as a {}: {error}",
            info.kind, info.resource.version, info.kind
        ))
    })?;
    let mut object = decoded.object;
    if object["apiVersion"].is_null() {
        object["apiVersion"] = json!(info.api_version());
    }
    if object["kind"].is_null() {
        object["kind"] = json!(info.kind);
    }
    let (version, kind) = (fields::text(&object, &["apiVersion"]), fields::text(&object, &["kind"]));
    if kind != info.kind || version != info.api_version() {
        return Err(ApiError::bad_request(format!(
            "{kind} in version \"{version}\" cannot be handled as a {} of {}",
            info.kind,
            info.api_version()
        )));
    }
    let unknown = || decoded.unknown_fields.iter().map(|f| format!("unknown field \"{f}\""));
    let warnings = match context.field_validation {
        FieldValidation::Ignore => Vec::new(),
        FieldValidation::Warn => unknown().collect(),
        FieldValidation::Strict if decoded.unknown_fields.is_empty() => Vec::new(),
        FieldValidation::Strict => {
            let list = unknown().collect::<Vec<_>>().join(", ");
            return Err(ApiError::bad_request(format!(
                "{} in version \"{}\" cannot be handled as a {}: strict decoding error: {list}",
                info.kind, info.resource.version, info.kind
            )));
        }
    };
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.shift_remove("managedFields");
    }
    Ok((object, warnings))
}

/// Checks and fills in the namespace and the name of a new object.
fn name_it(info: &KindInfo, object: &mut Value, namespace: &str) -> Result<(), ApiError> {
    let metadata = fields::map_in(object, "metadata");
    let own = metadata.get("namespace").and_then(Value::as_str).unwrap_or_default();
    if info.namespaced {
        if !own.is_empty() && own != namespace {
            return Err(ApiError::bad_request(
                "the namespace of the provided object does not match the namespace sent on the request",
            ));
        }
        metadata.insert("namespace".to_owned(), json!(namespace));
    }
    let text = |name: &str| metadata.get(name).and_then(Value::as_str).unwrap_or_default();
    if text("name").is_empty() && text("generateName").is_empty() {
        let error = FieldError {
            field: "metadata.name".to_owned(),
            kind: kinds::FieldErrorKind::Required,
            value: Value::Null,
            detail: "name or generateName is required".to_owned(),
        };
        return Err(invalid(info, "", &[error]));
    }
    Ok(())
}

fn generated_name(prefix: &str) -> String {
    let mut random = rand::rng();
    let end = (0..=MAX_GENERATE_NAME.min(prefix.len())).rev().find(|i| prefix.is_char_boundary(*i)).unwrap_or(0);
    let suffix = (0..5).map(|_| char::from(NAME_LETTERS[random.random_range(0..NAME_LETTERS.len())]));
    prefix[..end].chars().chain(suffix).collect()
}

/// New objects need a namespace that exists and stays.
fn check_namespace(transaction: &Transaction<'_>, key: &ObjectKey) -> Result<(), ApiError> {
    let resource = edgemesh_api::ResourceName::new("", "v1", "namespaces");
    let namespace = ObjectKey::new(resource, "", key.namespace.clone());
    let Some(stored) = transaction.get(&namespace) else { return Err(ApiError::not_found(&namespace)) };
    if !fields::is_terminating(&stored.object) {
        return Ok(());
    }
    let why = format!("unable to create new content in namespace {} because it is being terminated", key.namespace);
    let mut error = ApiError::forbidden(key, &why);
    if let Some(details) = &mut error.details {
        details.causes.push(Cause {
            reason: "NamespaceTerminating".to_owned(),
            message: format!("namespace {} is being terminated", key.namespace),
            field: "metadata.namespace".to_owned(),
        });
    }
    Err(error)
}

/// The new state must be of the same object, and made from its present state where it says which one.
fn same_object(info: &KindInfo, key: &ObjectKey, old: &Value, new: &mut Value) -> Result<(), ApiError> {
    let metadata = fields::map_in(new, "metadata");
    let text = |name: &str| metadata.get(name).and_then(Value::as_str).unwrap_or_default();
    match text("name") {
        "" => {}
        name if name == key.name => {}
        name => {
            return Err(ApiError::bad_request(format!(
                "the name of the object ({name}) does not match the name on the URL ({})",
                key.name
            )));
        }
    }
    let namespace = text("namespace");
    if !namespace.is_empty() && namespace != key.namespace {
        return Err(ApiError::bad_request(
            "the namespace of the provided object does not match the namespace sent on the request",
        ));
    }
    let (uid, old_uid) = (text("uid"), fields::meta(old, "uid"));
    if !uid.is_empty() && uid != old_uid {
        let why = format!("Precondition failed: UID in precondition: {uid}, UID in object meta: {old_uid}");
        return Err(ApiError::conflict(key, &why));
    }
    let version = text("resourceVersion");
    if version.is_empty() && info.is_custom() {
        let error = FieldError {
            field: "metadata.resourceVersion".to_owned(),
            kind: kinds::FieldErrorKind::Invalid,
            value: json!(0),
            detail: "must be specified for an update".to_owned(),
        };
        return Err(invalid(info, &key.name, &[error]));
    }
    if !version.is_empty() && version != "0" && version != fields::meta(old, "resourceVersion") {
        return Err(ApiError::stale(key));
    }
    metadata.insert("name".to_owned(), json!(key.name));
    if !key.namespace.is_empty() {
        metadata.insert("namespace".to_owned(), json!(key.namespace));
    }
    Ok(())
}

/// What only the server writes stays as it was.
fn keep_server_side(old: &Value, new: &mut Value) {
    let metadata = fields::map_in(new, "metadata");
    for name in
        ["uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds", "generation", "generateName"]
    {
        match fields::at(old, &["metadata", name]) {
            Some(value) => metadata.insert(name.to_owned(), value.clone()),
            None => metadata.shift_remove(name),
        };
    }
    metadata.shift_remove("selfLink");
}

fn no_new_finalizers(old: &Value, new: &Value) -> Option<FieldError> {
    if !fields::is_terminating(old) {
        return None;
    }
    let had: Vec<_> = fields::strings(old, &["metadata", "finalizers"]).collect();
    let added: Vec<_> = fields::strings(new, &["metadata", "finalizers"]).filter(|f| !had.contains(f)).collect();
    (!added.is_empty()).then(|| FieldError {
        field: "metadata.finalizers".to_owned(),
        kind: kinds::FieldErrorKind::Forbidden,
        value: Value::Null,
        detail: format!(
            "no new finalizers can be added if the object is being deleted, found new finalizers {added:?}"
        ),
    })
}

/// The object under a storage key, or 404 under the key that was asked for.
pub(crate) fn existing(transaction: &Transaction<'_>, info: &KindInfo, key: &ObjectKey) -> Result<Stored, ApiError> {
    transaction.get(&storage_key(info, key)).ok_or_else(|| ApiError::not_found(key))
}
