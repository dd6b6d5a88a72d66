//! The shape of a built-in kind: its names and the functions that hold its rules.

use std::borrow::Cow;
use std::fmt;

use jiff::Timestamp;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde_json::Value;

use super::decode::DecodeError;
use super::field_error::Errors;
use super::merge_keys::MergeKeys;

/// A column of a built-in kind.
pub(crate) struct ColumnDef {
    pub(crate) name: &'static str,
    pub(crate) r#type: &'static str,
    pub(crate) format: &'static str,
    pub(crate) priority: i32,
    pub(crate) description: &'static str,
}

/// A plain column.
pub(crate) const fn column(name: &'static str, r#type: &'static str, description: &'static str) -> ColumnDef {
    ColumnDef { name, r#type, format: "", priority: 0, description }
}

/// A column of `-o wide`.
pub(crate) const fn wide(name: &'static str, description: &'static str) -> ColumnDef {
    ColumnDef { name, r#type: "string", format: "", priority: 1, description }
}

/// The name of the object.
pub(crate) const NAME: ColumnDef = ColumnDef {
    name: "Name",
    r#type: "string",
    format: "name",
    priority: 0,
    description: "Name must be unique within a namespace.",
};

/// How old the object is.
pub(crate) const AGE: ColumnDef = column("Age", "string", "Time since the object was created.");

/// Names and rules of a built-in kind. One static per kind, in the kind's own file.
pub(crate) struct BuiltIn {
    pub(crate) group: &'static str,
    pub(crate) version: &'static str,
    pub(crate) plural: &'static str,
    pub(crate) singular: &'static str,
    pub(crate) kind: &'static str,
    pub(crate) short_names: &'static [&'static str],
    pub(crate) categories: &'static [&'static str],
    pub(crate) namespaced: bool,
    /// Has `/status`.
    pub(crate) status: bool,
    /// Has `/scale`, with `spec.replicas`, `status.replicas` and `spec.selector`.
    pub(crate) scale: bool,
    /// Counts changes of its spec in `metadata.generation`.
    pub(crate) generation: bool,
    /// Takes the status that a create request brings (Nodes register with one).
    pub(crate) keeps_status_on_create: bool,
    /// A delete waits for its grace period.
    pub(crate) graceful: bool,
    pub(crate) columns: &'static [ColumnDef],
    /// Fields beyond the metadata that fieldSelectors may name.
    pub(crate) selectable: &'static [&'static str],
    pub(crate) merge_keys: MergeKeys,
    /// The object through its typed form and back: wrong types are errors, unknown fields vanish.
    pub(crate) typed: fn(&Value) -> Result<Value, DecodeError>,
    pub(crate) schema: TypeSchema,
    pub(crate) default: fn(&mut Value),
    pub(crate) validate: fn(&Value, &mut Errors),
    /// What an update keeps from the old object (arguments: old, new).
    pub(crate) prepare_update: fn(&Value, &mut Value),
    pub(crate) validate_update: fn(&Value, &Value, &mut Errors),
    pub(crate) cells: fn(&Value, Timestamp) -> Vec<Value>,
}

impl fmt::Debug for BuiltIn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("BuiltIn").field(&self.kind).finish()
    }
}

/// The OpenAPI schema of a kind's Rust type.
pub(crate) struct TypeSchema {
    /// Its name among the definitions.
    pub(crate) name: fn() -> Cow<'static, str>,
    /// Adds it, and all that it refers to, to the generator's definitions.
    pub(crate) generate: fn(&mut SchemaGenerator) -> Schema,
}

/// The schema of the type `T`.
pub(crate) const fn schema<T: JsonSchema>() -> TypeSchema {
    TypeSchema { name: T::schema_name, generate: |generator| generator.subschema_for::<T>() }
}

/// For kinds that have nothing to default.
pub(crate) fn no_default(_: &mut Value) {}

/// For kinds whose updates keep nothing.
pub(crate) fn no_prepare(_: &Value, _: &mut Value) {}

/// For kinds with nothing to validate beyond their types and metadata.
pub(crate) fn no_validate(_: &Value, _: &mut Errors) {}

/// For kinds that have no immutable fields.
pub(crate) fn no_validate_update(_: &Value, _: &Value, _: &mut Errors) {}
