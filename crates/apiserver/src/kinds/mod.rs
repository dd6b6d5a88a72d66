//! The kinds that the API serves: names, defaults, validation, tables, patch metadata and OpenAPI documents.
//!
//! Everything here is pure: objects in, objects or errors out. The store calls it in the same transaction as the write, in
//! this order: [`decode`], [`prepare_create`] or [`prepare_update`], [`default_object`], allocation, [`validate_create`] or
//! [`validate_update`].

pub mod allocation;
mod built_in;
mod config_map;
mod custom_resource;
mod custom_resource_definition;
mod decode;
mod deployment;
mod endpoint_slice;
mod event;
mod field_error;
mod json_path;
mod lease;
mod merge_keys;
mod metadata;
mod names;
mod namespace;
mod node;
mod openapi;
mod pod;
mod quantity;
mod registry;
mod replica_set;
mod secret;
mod service;
mod service_account;
mod structural;
mod tables;
mod workload;

use std::borrow::Cow;
use std::sync::Arc;

use edgemesh_api::ResourceName;
use jiff::Timestamp;
use serde_json::{Value, json};

pub use decode::{DecodeError, Decoded};
pub use field_error::{FieldError, FieldErrorKind};
pub use merge_keys::{MergeKeys, MergeRule};
pub use openapi::{openapi_v2, openapi_v2_protobuf, openapi_v3, openapi_v3_index};
pub use registry::Registry;
pub use tables::human_duration;

use built_in::BuiltIn;
use custom_resource::CustomVersion;
use field_error::Errors;

/// The Kubernetes version whose behaviour this follows, as `/version` and the OpenAPI documents say it.
pub const VERSION: &str = "v1.32.0";

/// Everything that the API server knows about one kind in one version.
#[derive(Debug, Clone)]
pub struct KindInfo {
    /// Group, version and plural name under which it is served.
    pub resource: ResourceName,
    /// The resource under which its objects are kept. It differs from `resource` for the non-storage versions of a custom
    /// resource and for views of another kind; see [`to_storage`] and [`from_storage`].
    pub storage: ResourceName,
    /// Kind, for example `EndpointSlice`.
    pub kind: Cow<'static, str>,
    /// Kind of a list of them, for example `EndpointSliceList`.
    pub list_kind: Cow<'static, str>,
    /// Singular, lower-case name.
    pub singular: Cow<'static, str>,
    /// Short names that kubectl takes.
    pub short_names: Vec<Cow<'static, str>>,
    /// Categories, for example `all`.
    pub categories: Vec<Cow<'static, str>>,
    /// Whether its objects live in namespaces.
    pub namespaced: bool,
    /// Its subresources.
    pub subresources: Subresources,
    /// What can be done with it.
    pub verbs: &'static [&'static str],
    /// The columns of `kubectl get`; priority 0 always, 1 with `-o wide`.
    pub columns: Vec<Column>,
    pub(crate) behaviour: Behaviour,
}

/// The subresources of a kind.
#[derive(Debug, Clone, Default)]
pub struct Subresources {
    /// `…/status`: spec and status are written apart.
    pub status: bool,
    /// `…/scale`, and where its numbers are.
    pub scale: Option<ScalePaths>,
}

/// Where the scale subresource finds its values: dotted paths without a leading dot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScalePaths {
    /// Wanted replicas.
    pub spec_replicas: Cow<'static, str>,
    /// Observed replicas.
    pub status_replicas: Cow<'static, str>,
    /// The selector (an object, or in custom resources a string); empty when there is none.
    pub label_selector: Cow<'static, str>,
}

/// One column of a table (Kubernetes `TableColumnDefinition`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column {
    /// Header.
    pub name: Cow<'static, str>,
    /// OpenAPI type: string, integer, number, boolean, date.
    pub r#type: Cow<'static, str>,
    /// OpenAPI format; `name` marks the object's name.
    pub format: Cow<'static, str>,
    /// For people.
    pub description: Cow<'static, str>,
    /// 0: always shown; more: only with `-o wide`.
    pub priority: i32,
}

/// Where a kind's rules come from.
#[derive(Debug, Clone)]
pub(crate) enum Behaviour {
    BuiltIn(&'static BuiltIn),
    Custom(Arc<CustomVersion>),
}

impl KindInfo {
    /// `v1` or `apps/v1`.
    pub fn api_version(&self) -> String {
        self.resource.api_version()
    }

    /// Whether it comes from a CustomResourceDefinition.
    pub fn is_custom(&self) -> bool {
        matches!(self.behaviour, Behaviour::Custom(_))
    }

    /// The grace period of a delete that names none, in seconds: a Pod's own (`spec.terminationGracePeriodSeconds`);
    /// `None` for kinds that go at once.
    pub fn default_grace_seconds(&self, object: &Value) -> Option<u64> {
        match self.behaviour {
            Behaviour::BuiltIn(kind) if kind.graceful => {
                Some(object["spec"]["terminationGracePeriodSeconds"].as_u64().unwrap_or(30))
            }
            _ => None,
        }
    }
}

/// Checks an object's JSON types against its kind and drops what the kind doesn't know.
/// Custom resources keep unknown fields only where their schema says so.
///
/// # Errors
/// A [`DecodeError`] that names the first field of a wrong type.
pub fn decode(info: &KindInfo, object: Value) -> Result<Decoded, DecodeError> {
    match &info.behaviour {
        Behaviour::BuiltIn(kind) => decode::built_in(kind, object),
        Behaviour::Custom(version) => version.decode(object),
    }
}

/// What the server decides about a new object before defaults: its status (dropped where only `/status` writes it) and its
/// generation.
pub fn prepare_create(info: &KindInfo, object: &mut Value) {
    let keeps_status = match &info.behaviour {
        Behaviour::BuiltIn(kind) => kind.keeps_status_on_create || !kind.status,
        Behaviour::Custom(_) => !info.subresources.status,
    };
    if let Some(map) = object.as_object_mut()
        && !keeps_status
    {
        map.shift_remove("status");
    }
    if has_generation(info) {
        object["metadata"]["generation"] = json!(1);
    } else if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.shift_remove("generation");
    }
}

/// What the server decides about an update of the main resource: the status stays as it was where it has a subresource,
/// and the generation counts changes of what is wanted.
pub fn prepare_update(info: &KindInfo, old: &Value, new: &mut Value) {
    if info.subresources.status {
        restore(new, old, "status");
    }
    if let Behaviour::BuiltIn(kind) = &info.behaviour {
        (kind.prepare_update)(old, new);
    }
    let generation = old["metadata"]["generation"].as_i64();
    if has_generation(info) {
        let changed = wanted(info, old) != wanted(info, new);
        let first = generation.unwrap_or(1);
        new["metadata"]["generation"] = json!(if changed { first + 1 } else { first });
    } else if let Some(metadata) = new.get_mut("metadata").and_then(Value::as_object_mut) {
        match generation {
            Some(n) => metadata.insert("generation".to_owned(), json!(n)),
            None => metadata.shift_remove("generation"),
        };
    }
}

/// What the server decides about a write to `/status`: everything but the status stays as it was. Nodes may also change
/// labels and annotations this way, as Kubernetes allows it.
pub fn prepare_status_update(info: &KindInfo, old: &Value, new: &mut Value) {
    let mut result = old.clone();
    match new.get_mut("status") {
        Some(status) => result["status"] = status.take(),
        None => {
            if let Some(map) = result.as_object_mut() {
                map.shift_remove("status");
            }
        }
    }
    if info.kind == "Node" && !info.is_custom() {
        for part in ["labels", "annotations"] {
            restore(&mut result["metadata"], &new["metadata"], part);
        }
    }
    restore(&mut result["metadata"], &new["metadata"], "resourceVersion");
    *new = result;
}

/// Makes `field` of `target` what it is in `source`, also when it is missing there.
fn restore(target: &mut Value, source: &Value, field: &str) {
    let Some(map) = target.as_object_mut() else { return };
    match source.get(field) {
        Some(value) => map.insert(field.to_owned(), value.clone()),
        None => map.shift_remove(field),
    };
}

fn has_generation(info: &KindInfo) -> bool {
    match &info.behaviour {
        Behaviour::BuiltIn(kind) => kind.generation,
        Behaviour::Custom(_) => true,
    }
}

/// The part of an object whose changes the generation counts.
fn wanted(info: &KindInfo, object: &Value) -> Value {
    if !info.is_custom() {
        return object["spec"].clone();
    }
    let mut copy = object.clone();
    if let Some(map) = copy.as_object_mut() {
        map.shift_remove("metadata");
        map.shift_remove("apiVersion");
        if info.subresources.status {
            map.shift_remove("status");
        }
    }
    copy
}

/// Fills in what the object leaves open, as the real API server does for its kind.
pub fn default_object(info: &KindInfo, object: &mut Value) {
    match &info.behaviour {
        Behaviour::BuiltIn(kind) => (kind.default)(object),
        Behaviour::Custom(version) => version.default_object(object),
    }
}

/// Everything that is wrong with a new object.
pub fn validate_create(info: &KindInfo, object: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    metadata::validate(info, object, &mut errors);
    match &info.behaviour {
        Behaviour::BuiltIn(kind) => (kind.validate)(object, &mut errors),
        Behaviour::Custom(version) => version.validate(object, &mut errors),
    }
    errors.0
}

/// Everything that is wrong with a changed object, immutable fields included.
pub fn validate_update(info: &KindInfo, old: &Value, new: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    metadata::validate(info, new, &mut errors);
    metadata::validate_update(old, new, &mut errors);
    match &info.behaviour {
        Behaviour::BuiltIn(kind) => {
            (kind.validate)(new, &mut errors);
            (kind.validate_update)(old, new, &mut errors);
        }
        Behaviour::Custom(version) => version.validate(new, &mut errors),
    }
    errors.0
}

/// Everything that is wrong with a write to `/status`. The rest of the object was valid before and didn't change.
pub fn validate_status_update(info: &KindInfo, old: &Value, new: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    metadata::validate_update(old, new, &mut errors);
    if let Behaviour::Custom(version) = &info.behaviour {
        version.validate(new, &mut errors);
    }
    errors.0
}

/// The cells of the object's row in `kubectl get`, one for each of [`KindInfo::columns`].
pub fn table_row(info: &KindInfo, object: &Value, now: Timestamp) -> Vec<Value> {
    match &info.behaviour {
        Behaviour::BuiltIn(kind) => (kind.cells)(object, now),
        Behaviour::Custom(version) => version.cells(object, now),
    }
}

/// The strategic merge patch metadata of a kind.
pub fn merge_keys(info: &KindInfo) -> MergeKeys {
    match &info.behaviour {
        Behaviour::BuiltIn(kind) => kind.merge_keys,
        Behaviour::Custom(_) => merge_keys::CUSTOM,
    }
}

/// The value of a field that a fieldSelector may name; `None` when the kind has no such selectable field (400). A field
/// that is there but not set has the empty value.
pub fn field_value(info: &KindInfo, object: &Value, field: &str) -> Option<String> {
    let text = |v: &Value| match v {
        Value::String(s) => s.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    };
    match field {
        "metadata.name" => return Some(text(&object["metadata"]["name"])),
        "metadata.namespace" => return Some(text(&object["metadata"]["namespace"])),
        _ => {}
    }
    let known = match &info.behaviour {
        Behaviour::BuiltIn(kind) => kind.selectable.contains(&field),
        Behaviour::Custom(version) => version.selectable.iter().any(|f| **f == *field),
    };
    if !known {
        return None;
    }
    if field == "spec.unschedulable" {
        return Some(object["spec"]["unschedulable"].as_bool().unwrap_or(false).to_string());
    }
    Some(text(field.split('.').fold(object, |value, part| &value[part])))
}

/// Turns an object of the served version into what is kept.
pub fn to_storage(info: &KindInfo, object: &mut Value) {
    if info.storage != info.resource {
        if info.resource.group == "events.k8s.io" {
            event::to_core(object);
        }
        object["apiVersion"] = json!(info.storage.api_version());
    }
}

/// Turns a kept object into the served version.
pub fn from_storage(info: &KindInfo, object: &mut Value) {
    if info.storage != info.resource {
        if info.resource.group == "events.k8s.io" {
            event::from_core(object);
        }
        object["apiVersion"] = json!(info.resource.api_version());
    }
}
