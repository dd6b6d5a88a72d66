//! What is wrong with a field, in Kubernetes' words (apimachinery `field.Error`).

use std::fmt;

use serde_json::Value;

/// The kinds of field errors; [`FieldErrorKind::cause`] is what goes into `Status.details.causes[].reason`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum FieldErrorKind {
    Required,
    Invalid,
    TypeInvalid,
    NotSupported,
    NotFound,
    Duplicate,
    Forbidden,
    TooLong,
    TooMany,
}

impl FieldErrorKind {
    /// The machine-readable cause, for example `FieldValueRequired`.
    pub fn cause(self) -> &'static str {
        match self {
            Self::Required => "FieldValueRequired",
            Self::Invalid => "FieldValueInvalid",
            Self::TypeInvalid => "FieldValueTypeInvalid",
            Self::NotSupported => "FieldValueNotSupported",
            Self::NotFound => "FieldValueNotFound",
            Self::Duplicate => "FieldValueDuplicate",
            Self::Forbidden => "FieldValueForbidden",
            Self::TooLong => "FieldValueTooLong",
            Self::TooMany => "FieldValueTooMany",
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::Required => "Required value",
            Self::Invalid | Self::TypeInvalid => "Invalid value",
            Self::NotSupported => "Unsupported value",
            Self::NotFound => "Not found",
            Self::Duplicate => "Duplicate value",
            Self::Forbidden => "Forbidden",
            Self::TooLong => "Too long",
            Self::TooMany => "Too many",
        }
    }
}

/// One field and what is wrong with it. Displayed as `spec.ports: Required value`.
#[derive(Debug, Clone, PartialEq)]
pub struct FieldError {
    /// Path from the object's root, for example `spec.ports[0].port`.
    pub field: String,
    /// What is wrong.
    pub kind: FieldErrorKind,
    /// The offending value; `Null` where the message doesn't show one.
    pub value: Value,
    /// More words; may be empty.
    pub detail: String,
}

impl FieldError {
    /// The message without the field, as it stands in `Status.details.causes[].message`.
    pub fn message(&self) -> String {
        use FieldErrorKind as K;
        let mut out = self.kind.words().to_owned();
        match self.kind {
            K::Required | K::Forbidden | K::TooLong => {}
            _ => {
                out.push_str(": ");
                out.push_str(&shown(&self.value));
            }
        }
        if !self.detail.is_empty() {
            out.push_str(": ");
            out.push_str(&self.detail);
        }
        out
    }
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.field.is_empty() {
            f.write_str(&self.message())
        } else {
            write!(f, "{}: {}", self.field, self.message())
        }
    }
}

/// A value as an error message shows it, cut where it gets long: the client has the whole one.
fn shown(value: &Value) -> String {
    const LONGEST: usize = 2048;
    let mut text = value.to_string();
    if text.len() > LONGEST {
        let mut end = LONGEST;
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        text.push('…');
    }
    text
}

/// How many errors are told about one object: a large object that is wrong all over must not become a larger answer.
const MOST_ERRORS: usize = 100;

/// A growing list of field errors, up to [`MOST_ERRORS`].
#[derive(Debug, Default)]
pub(crate) struct Errors(pub(crate) Vec<FieldError>);

impl Errors {
    pub(crate) fn push(
        &mut self,
        kind: FieldErrorKind,
        field: impl Into<String>,
        value: Value,
        detail: impl Into<String>,
    ) {
        if self.0.len() < MOST_ERRORS {
            self.0.push(FieldError { field: field.into(), kind, value, detail: detail.into() });
        }
    }

    pub(crate) fn required(&mut self, field: impl Into<String>, detail: impl Into<String>) {
        self.push(FieldErrorKind::Required, field, Value::Null, detail);
    }

    pub(crate) fn invalid(&mut self, field: impl Into<String>, value: impl Into<Value>, detail: impl Into<String>) {
        self.push(FieldErrorKind::Invalid, field, value.into(), detail);
    }

    pub(crate) fn type_invalid(
        &mut self,
        field: impl Into<String>,
        value: impl Into<Value>,
        detail: impl Into<String>,
    ) {
        self.push(FieldErrorKind::TypeInvalid, field, value.into(), detail);
    }

    pub(crate) fn not_supported(&mut self, field: impl Into<String>, value: impl Into<Value>, supported: &[&str]) {
        let list: Vec<String> = supported.iter().map(|s| format!("{s:?}")).collect();
        let detail = format!("supported values: {}", list.join(", "));
        self.push(FieldErrorKind::NotSupported, field, value.into(), detail);
    }

    pub(crate) fn not_found(&mut self, field: impl Into<String>, value: impl Into<Value>) {
        self.push(FieldErrorKind::NotFound, field, value.into(), "");
    }

    pub(crate) fn duplicate(&mut self, field: impl Into<String>, value: impl Into<Value>) {
        self.push(FieldErrorKind::Duplicate, field, value.into(), "");
    }

    pub(crate) fn forbidden(&mut self, field: impl Into<String>, detail: impl Into<String>) {
        self.push(FieldErrorKind::Forbidden, field, Value::Null, detail);
    }

    pub(crate) fn too_long(&mut self, field: impl Into<String>, max: usize) {
        self.push(FieldErrorKind::TooLong, field, Value::Null, format!("may not be more than {max} bytes"));
    }

    pub(crate) fn too_many(&mut self, field: impl Into<String>, actual: usize, max: usize) {
        self.push(FieldErrorKind::TooMany, field, actual.into(), format!("must have at most {max} items"));
    }

    /// Checks a string against a closed set; an empty or missing one is fine (defaults and `required` see to it).
    pub(crate) fn one_of(&mut self, field: impl Into<String>, value: &Value, supported: &[&str]) {
        if let Some(text) = value.as_str()
            && !text.is_empty()
            && !supported.contains(&text)
        {
            self.not_supported(field, text, supported);
        }
    }

    /// Says that the field may not change, when it did.
    pub(crate) fn immutable(&mut self, field: impl Into<String>, old: &Value, new: &Value) {
        if old != new {
            self.invalid(field, new.clone(), "field is immutable");
        }
    }
}
