//! Errors of the API, as HTTP codes and Kubernetes `Status` objects.

use edgemesh_api::{ObjectKey, ResourceName};
use serde_json::{Value, json};

/// `Status.reason` (Kubernetes API conventions, "Response Status Kind").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Reason {
    AlreadyExists,
    BadRequest,
    Conflict,
    Expired,
    Forbidden,
    InternalError,
    Invalid,
    MethodNotAllowed,
    NotAcceptable,
    NotFound,
    RequestEntityTooLarge,
    ServerTimeout,
    ServiceUnavailable,
    Timeout,
    TooManyRequests,
    Unauthorized,
    UnsupportedMediaType,
}

impl Reason {
    /// The HTTP status code that goes with it.
    pub fn code(self) -> u16 {
        match self {
            Self::BadRequest => 400,
            Self::Unauthorized => 401,
            Self::Forbidden => 403,
            Self::NotFound => 404,
            Self::MethodNotAllowed => 405,
            Self::NotAcceptable => 406,
            Self::AlreadyExists | Self::Conflict => 409,
            Self::Expired => 410,
            Self::RequestEntityTooLarge => 413,
            Self::UnsupportedMediaType => 415,
            Self::Invalid => 422,
            Self::TooManyRequests => 429,
            Self::InternalError | Self::ServerTimeout => 500,
            Self::ServiceUnavailable => 503,
            Self::Timeout => 504,
        }
    }
}

/// One cause in `Status.details.causes`: a field and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cause {
    /// Machine-readable, for example `FieldValueRequired`.
    pub reason: String,
    /// For people.
    pub message: String,
    /// The field's path, for example `spec.ports[0].port`; empty when it isn't about a field.
    pub field: String,
}

/// What an error is about: `Status.details`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Details {
    /// Name of the object; may be empty.
    pub name: String,
    /// API group; empty for the core group.
    pub group: String,
    /// The resource's plural name, or the kind for invalid objects, as Kubernetes does it.
    pub kind: String,
    /// Field by field what is wrong.
    pub causes: Vec<Cause>,
    /// When to try again, in seconds; 0 for unknown.
    pub retry_after_seconds: u32,
}

/// An answer other than success. It carries everything that a Kubernetes client wants to know.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// Why, and with it the HTTP code.
    pub reason: Reason,
    /// For people, in Kubernetes' words.
    pub message: String,
    /// What it is about.
    pub details: Option<Box<Details>>,
}

impl ApiError {
    /// An error with a message only.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), details: None }
    }

    fn about(reason: Reason, message: String, resource: &ResourceName, name: &str) -> Self {
        let details = Details {
            name: name.to_owned(),
            group: resource.group.clone(),
            kind: resource.plural.clone(),
            ..Details::default()
        };
        Self { reason, message, details: Some(Box::new(details)) }
    }

    /// 404: no such object.
    pub fn not_found(key: &ObjectKey) -> Self {
        let message = format!("{} \"{}\" not found", key.resource, key.name);
        Self::about(Reason::NotFound, message, &key.resource, &key.name)
    }

    /// 404: nothing is served at this path.
    pub fn no_such_path() -> Self {
        Self::new(Reason::NotFound, "the server could not find the requested resource")
    }

    /// 409: an object of this name exists.
    pub fn already_exists(key: &ObjectKey) -> Self {
        let message = format!("{} \"{}\" already exists", key.resource, key.name);
        Self::about(Reason::AlreadyExists, message, &key.resource, &key.name)
    }

    /// 409: the object changed since the caller read it, or a precondition failed.
    pub fn conflict(key: &ObjectKey, why: &str) -> Self {
        let message = format!("Operation cannot be fulfilled on {} \"{}\": {why}", key.resource, key.name);
        Self::about(Reason::Conflict, message, &key.resource, &key.name)
    }

    /// 409 for a stale `metadata.resourceVersion`, in Kubernetes' words.
    pub fn stale(key: &ObjectKey) -> Self {
        Self::conflict(
            key,
            "the object has been modified; please apply your changes to the latest version and try again",
        )
    }

    /// 403: the caller may not do this to this object.
    pub fn forbidden(key: &ObjectKey, why: &str) -> Self {
        let message = if key.name.is_empty() {
            format!("{} is forbidden: {why}", key.resource)
        } else {
            format!("{} \"{}\" is forbidden: {why}", key.resource, key.name)
        };
        Self::about(Reason::Forbidden, message, &key.resource, &key.name)
    }

    /// 400: the request makes no sense.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(Reason::BadRequest, message)
    }

    /// 410: the resource version is older than what is still known.
    pub fn expired(message: impl Into<String>) -> Self {
        Self::new(Reason::Expired, message)
    }

    /// 405: the resource doesn't do that.
    pub fn method_not_allowed(resource: &ResourceName) -> Self {
        let message = "the server does not allow this method on the requested resource".to_owned();
        Self::about(Reason::MethodNotAllowed, message, resource, "")
    }

    /// 500: our fault.
    pub fn internal(error: impl std::fmt::Display) -> Self {
        Self::new(Reason::InternalError, format!("Internal error occurred: {error}"))
    }

    /// The HTTP status code.
    pub fn code(&self) -> u16 {
        self.reason.code()
    }

    /// Whether it says that the object isn't there.
    pub fn is_not_found(&self) -> bool {
        self.reason == Reason::NotFound
    }

    /// Whether a new read and another try make sense.
    pub fn is_conflict(&self) -> bool {
        self.reason == Reason::Conflict
    }

    /// Whether an object of that name existed.
    pub fn is_already_exists(&self) -> bool {
        self.reason == Reason::AlreadyExists
    }

    /// Whether the resource version was too old, so that the caller must list again.
    pub fn is_expired(&self) -> bool {
        self.reason == Reason::Expired
    }

    /// The Kubernetes `Status` object.
    pub fn to_status(&self) -> Value {
        let mut status = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": self.message, "reason": format!("{:?}", self.reason),
        });
        if let Some(details) = &self.details {
            let mut out = serde_json::Map::new();
            for (name, value) in [("name", &details.name), ("group", &details.group), ("kind", &details.kind)] {
                if !value.is_empty() {
                    out.insert(name.to_owned(), json!(value));
                }
            }
            if !details.causes.is_empty() {
                let causes = details.causes.iter().map(|c| {
                    let mut cause = json!({"reason": c.reason, "message": c.message});
                    if !c.field.is_empty() {
                        cause["field"] = json!(c.field);
                    }
                    cause
                });
                out.insert("causes".to_owned(), causes.collect());
            }
            if details.retry_after_seconds > 0 {
                out.insert("retryAfterSeconds".to_owned(), json!(details.retry_after_seconds));
            }
            status["details"] = Value::Object(out);
        }
        status["code"] = json!(self.code());
        status
    }
}
