//! Request bodies: JSON, YAML or protobuf, within limits.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request, header};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Incoming;
use serde_json::Value;

use crate::{
    error::{ApiError, Reason},
    protobuf::{self, ProtobufError},
    store::{DeleteOptions, Propagation},
};

use super::request::Query;

/// How long a client may take to send a body.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// Reads the whole body.
pub(crate) async fn read(request: Request<Incoming>, limit: usize) -> Result<Bytes, ApiError> {
    let too_large =
        || ApiError::new(Reason::RequestEntityTooLarge, format!("Request entity too large: limit is {limit}"));
    let announced =
        request.headers().get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()).and_then(|v| v.parse::<u64>().ok());
    if announced.is_some_and(|length| length > limit as u64) {
        return Err(too_large());
    }
    let collected = tokio::time::timeout(BODY_TIMEOUT, Limited::new(request.into_body(), limit).collect()).await;
    match collected {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(error)) => Err(ApiError::bad_request(format!("the body could not be read: {error}"))),
        Err(_) => Err(ApiError::bad_request("the body did not arrive in time")),
    }
}

/// The media type of the body, lower-case and without parameters; JSON when there is none.
pub(crate) fn media_type(headers: &HeaderMap) -> String {
    let value = headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    match value.split(';').next().unwrap_or_default().trim() {
        "" => "application/json".to_owned(),
        name => name.to_ascii_lowercase(),
    }
}

/// An object from a JSON or YAML body.
pub(crate) fn object(media_type: &str, body: &[u8]) -> Result<Value, ApiError> {
    let bad = |error: String| ApiError::bad_request(format!("the object provided is unrecognized: {error}"));
    let value: Value = match media_type {
        "application/json" | "text/json" | "*/*" => {
            serde_json::from_slice(body).map_err(|error| bad(error.to_string()))?
        }
        "application/yaml" | "application/x-yaml" | "text/yaml" => {
            let text = std::str::from_utf8(body).map_err(|error| bad(error.to_string()))?;
            serde_saphyr::from_str(text).map_err(|error| bad(error.to_string()))?
        }
        protobuf::MEDIA_TYPE => protobuf::object(body).map_err(|error| match error {
            ProtobufError::Unknown(..) => ApiError::new(Reason::UnsupportedMediaType, error.to_string()),
            other => bad(other.to_string()),
        })?,
        other => {
            return Err(ApiError::new(
                Reason::UnsupportedMediaType,
                format!(
                    "the body of the request was in an unknown format - accepted media types include: \
                     application/json, application/yaml, \
                     application/vnd.kubernetes.protobuf (got {other:?})"
                ),
            ));
        }
    };
    if value.is_object() { Ok(value) } else { Err(bad("expected an object".to_owned())) }
}

/// `DeleteOptions` from the body, where there is one, and the query.
pub(crate) fn delete_options(media_type: &str, body: &[u8], query: &Query) -> Result<(DeleteOptions, bool), ApiError> {
    let sent = if body.is_empty() { Value::Null } else { object(media_type, body)? };
    let text = |path: &[&str]| crate::fields::at(&sent, path).and_then(Value::as_str);
    let grace = match sent.get("gracePeriodSeconds").filter(|v| !v.is_null()) {
        Some(value) => {
            Some(value.as_i64().ok_or_else(|| ApiError::bad_request("gracePeriodSeconds must be a number"))?)
        }
        None => query
            .get("gracePeriodSeconds")
            .map(|v| v.parse().map_err(|_| ApiError::bad_request("gracePeriodSeconds must be a number")))
            .transpose()?,
    };
    let propagation = match text(&["propagationPolicy"]).or_else(|| query.get("propagationPolicy")) {
        Some("Orphan") => Some(Propagation::Orphan),
        Some("Background") => Some(Propagation::Background),
        Some("Foreground") => Some(Propagation::Foreground),
        Some(other) => {
            return Err(ApiError::new(
                Reason::Invalid,
                format!(
                    "DeleteOptions.meta.k8s.io \"\" is invalid: propagationPolicy: Unsupported value: {other:?}: \
                     supported values: \"Foreground\", \"Background\", \"Orphan\""
                ),
            ));
        }
        // The older way to say it.
        None => match sent["orphanDependents"].as_bool() {
            Some(true) => Some(Propagation::Orphan),
            Some(false) => Some(Propagation::Background),
            None => query
                .has("orphanDependents")
                .then(|| if query.flag("orphanDependents") { Propagation::Orphan } else { Propagation::Background }),
        },
    };
    let options = DeleteOptions {
        // A negative grace period is taken as the smallest one (Kubernetes, `BeforeDelete`).
        grace_period_seconds: grace.map(|g: i64| u64::try_from(g).unwrap_or(1)),
        propagation,
        uid: text(&["preconditions", "uid"]).map(str::to_owned),
        resource_version: text(&["preconditions", "resourceVersion"]).map(str::to_owned),
    };
    let in_body = sent["dryRun"].as_array().is_some_and(|d| d.iter().any(|v| v == "All"));
    Ok((options, in_body || dry_run(query)?))
}

/// `dryRun=All`.
pub(crate) fn dry_run(query: &Query) -> Result<bool, ApiError> {
    match query.get("dryRun") {
        None => Ok(false),
        Some("All") => Ok(true),
        Some(other) => {
            Err(ApiError::bad_request(format!("Invalid value: {other:?}: dryRun: supported values: \"All\"")))
        }
    }
}
