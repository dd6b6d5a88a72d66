//! Patches: RFC 6902 operations, RFC 7386 merges and Kubernetes' strategic merges.

mod strategic;

use serde_json::Value;

use crate::{
    error::{ApiError, Reason},
    kinds::{self, KindInfo},
};

/// The most operations in one JSON patch (the API server's limit).
const MAX_OPERATIONS: usize = 10_000;

/// A patch as it came in.
#[derive(Debug, Clone)]
pub enum Patch {
    /// `application/json-patch+json` (RFC 6902).
    Json(json_patch::Patch),
    /// `application/merge-patch+json` (RFC 7386).
    Merge(Value),
    /// `application/strategic-merge-patch+json` (Kubernetes, "Strategic merge patch").
    Strategic(Value),
}

impl Patch {
    /// Parses a body by its media type.
    ///
    /// # Errors
    /// 415 for other media types, 400 for bodies that aren't patches.
    pub fn parse(media_type: &str, body: &[u8]) -> Result<Self, ApiError> {
        let bad = |error: serde_json::Error| ApiError::bad_request(format!("error decoding patch: {error}"));
        match media_type {
            "application/json-patch+json" => {
                let patch: json_patch::Patch = serde_json::from_slice(body).map_err(bad)?;
                if patch.0.len() > MAX_OPERATIONS {
                    return Err(ApiError::new(
                        Reason::RequestEntityTooLarge,
                        format!(
                            "The allowed maximum operations in a JSON patch is {MAX_OPERATIONS}, got {}",
                            patch.0.len()
                        ),
                    ));
                }
                Ok(Self::Json(patch))
            }
            "application/merge-patch+json" => Ok(Self::Merge(object(serde_json::from_slice(body).map_err(bad)?)?)),
            "application/strategic-merge-patch+json" => {
                Ok(Self::Strategic(object(serde_json::from_slice(body).map_err(bad)?)?))
            }
            other => Err(ApiError::new(
                Reason::UnsupportedMediaType,
                format!(
                    "the body of the request was in an unknown format - accepted media types include: \
                     application/json-patch+json, application/merge-patch+json, \
                     application/strategic-merge-patch+json (got {other:?})"
                ),
            )),
        }
    }

    /// The object with the patch applied.
    ///
    /// # Errors
    /// 422 when a JSON patch doesn't fit, 415 for strategic merges of custom resources, 400 for malformed directives.
    pub fn apply(&self, info: &KindInfo, object: &Value) -> Result<Value, ApiError> {
        let mut out = object.clone();
        match self {
            Self::Json(patch) => json_patch::patch(&mut out, patch).map_err(|error| {
                ApiError::new(
                    Reason::Invalid,
                    format!("the server rejected our request due to an error in our request: {error}"),
                )
            })?,
            Self::Merge(patch) => json_patch::merge(&mut out, patch),
            Self::Strategic(patch) => {
                let keys = kinds::merge_keys(info);
                if !keys.supports_strategic_merge() {
                    return Err(ApiError::new(
                        Reason::UnsupportedMediaType,
                        "the body of the request was in an unknown format - accepted media types include: \
                         application/json-patch+json, application/merge-patch+json",
                    ));
                }
                strategic::merge(&mut out, patch, &|path: &str| keys.rule(path).and_then(|r| r.merge_key))
                    .map_err(ApiError::bad_request)?;
            }
        }
        Ok(out)
    }
}

fn object(value: Value) -> Result<Value, ApiError> {
    if value.is_object() { Ok(value) } else { Err(ApiError::bad_request("the patch must be a JSON object")) }
}
