//! Answers: objects, lists, tables and errors as HTTP responses.

use std::{convert::Infallible, sync::Arc};

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::accept::Form;
use crate::{
    error::ApiError,
    fields,
    kinds::{self, KindInfo},
    store::ListPage,
};

/// The body of every answer.
pub(crate) type Body = UnsyncBoxBody<Bytes, Infallible>;

/// How much of an object a table's rows carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Include {
    Nothing,
    Metadata,
    Object,
}

impl Include {
    pub(crate) fn parse(value: Option<&str>) -> Result<Self, ApiError> {
        match value {
            None | Some("Metadata") => Ok(Self::Metadata),
            Some("None") => Ok(Self::Nothing),
            Some("Object") => Ok(Self::Object),
            Some(other) => Err(ApiError::bad_request(format!("unrecognized includeObject value: {other:?}"))),
        }
    }
}

pub(crate) fn bytes(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(Full::new(body.into()).boxed_unsync());
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

pub(crate) fn json(status: StatusCode, value: &Value) -> Response<Body> {
    bytes(status, "application/json", value.to_string())
}

pub(crate) fn error(error: &ApiError) -> Response<Body> {
    let status = StatusCode::from_u16(error.code()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = json(status, &error.to_status());
    let retry = error.details.as_ref().map_or(0, |d| d.retry_after_seconds);
    if retry > 0 {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(retry));
    }
    response
}

/// Adds warnings that kubectl shows (RFC 7234 section 5.5, code 299).
pub(crate) fn warn(response: &mut Response<Body>, warnings: &[String]) {
    for warning in warnings {
        let text: String = warning.chars().filter(|c| !c.is_control()).collect();
        let quoted = text.replace('\\', "\\\\").replace('"', "\\\"");
        if let Ok(value) = HeaderValue::from_str(&format!("299 - \"{quoted}\"")) {
            response.headers_mut().append(header::WARNING, value);
        }
    }
}

/// One object in the form that was asked for.
pub(crate) fn object(info: &KindInfo, object: &Value, form: Form, include: Include) -> Value {
    match form {
        Form::Plain => object.clone(),
        Form::Metadata(version) => partial(object, version),
        Form::Table(version) => {
            let metadata = json!({"resourceVersion": fields::meta(object, "resourceVersion")});
            table(info, std::iter::once(object), metadata, version, include, true)
        }
    }
}

/// A list in the form that was asked for.
pub(crate) fn list(info: &KindInfo, page: &ListPage, form: Form, include: Include) -> Result<Response<Body>, ApiError> {
    let mut metadata = json!({"resourceVersion": page.resource_version.to_string()});
    if let Some(token) = &page.continue_token {
        metadata["continue"] = json!(token);
    }
    if let Some(remaining) = page.remaining {
        metadata["remainingItemCount"] = json!(remaining);
    }
    let objects = page.items.iter().map(|o| &**o);
    Ok(match form {
        Form::Plain => {
            // Written piece by piece: a large list is not built a second time in memory.
            let head = json!({"kind": info.list_kind, "apiVersion": info.api_version(), "metadata": metadata});
            let mut out = serde_json::to_vec(&head).map_err(ApiError::internal)?;
            out.pop();
            out.extend_from_slice(b",\"items\":[");
            for (index, object) in objects.enumerate() {
                if index > 0 {
                    out.push(b',');
                }
                serde_json::to_writer(&mut out, object).map_err(ApiError::internal)?;
            }
            out.extend_from_slice(b"]}");
            bytes(StatusCode::OK, "application/json", out)
        }
        Form::Metadata(version) => {
            let items: Vec<Value> = objects.map(|o| partial(o, version)).collect();
            let kind = "PartialObjectMetadataList";
            let value = json!({"kind": kind, "apiVersion": format!("meta.k8s.io/{version}"), "metadata": metadata, "items": items});
            json(StatusCode::OK, &value)
        }
        Form::Table(version) => json(StatusCode::OK, &table(info, objects, metadata, version, include, true)),
    })
}

fn partial(object: &Value, version: &str) -> Value {
    json!({
        "kind": "PartialObjectMetadata",
        "apiVersion": format!("meta.k8s.io/{version}"),
        "metadata": object.get("metadata").cloned().unwrap_or_else(|| json!({})),
    })
}

/// A table (Kubernetes `meta.k8s.io` `Table`). In a watch only the first one needs its columns.
pub(crate) fn table<'a>(
    info: &KindInfo,
    objects: impl Iterator<Item = &'a Value>,
    metadata: Value,
    version: &str,
    include: Include,
    columns: bool,
) -> Value {
    let now = Timestamp::now();
    let columns: Vec<Value> = info
        .columns
        .iter()
        .filter(|_| columns)
        .map(|c| {
            json!({"name": c.name, "type": c.r#type, "format": c.format, "description": c.description, "priority": c.priority})
        })
        .collect();
    let rows: Vec<Value> = objects
        .map(|object| {
            let mut row = Map::new();
            row.insert("cells".to_owned(), Value::Array(kinds::table_row(info, object, now)));
            match include {
                Include::Nothing => {}
                Include::Metadata => {
                    row.insert("object".to_owned(), partial(object, version));
                }
                Include::Object => {
                    row.insert("object".to_owned(), object.clone());
                }
            }
            Value::Object(row)
        })
        .collect();
    json!({
        "kind": "Table",
        "apiVersion": format!("meta.k8s.io/{version}"),
        "metadata": metadata,
        "columnDefinitions": columns,
        "rows": rows,
    })
}

/// `Status` of a success, as deletes answer it.
pub(crate) fn deleted(info: &KindInfo, object: &Arc<Value>) -> Value {
    let mut details = json!({"name": fields::meta(object, "name"), "kind": info.resource.plural,
        "uid": fields::meta(object, "uid")});
    if !info.resource.group.is_empty() {
        details["group"] = json!(info.resource.group);
    }
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details})
}
