//! The OpenAPI documents: version 2 for old clients, and version 3 by group.

use std::sync::Arc;

use http::{Response, StatusCode};
use serde_json::Value;

use super::{
    accept,
    respond::{self, Body},
};
use crate::{
    error::ApiError,
    kinds,
    store::{ListOptions, Store, definitions},
};

/// `/openapi/v2`.
pub(crate) fn v2(store: &Store, accept: Option<&str>) -> Result<Response<Body>, ApiError> {
    let (registry, definitions) = (store.registry(), custom(store)?);
    if accept::openapi_v2_protobuf(accept) {
        // The name that is asked for has an "@", which isn't allowed in a media type; this is what API servers answer.
        let content_type = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";
        return Ok(respond::bytes(StatusCode::OK, content_type, kinds::openapi_v2_protobuf(&registry, &definitions)));
    }
    Ok(respond::json(StatusCode::OK, &kinds::openapi_v2(&registry, &definitions)))
}

/// `/openapi/v3`: where the documents of the groups are.
pub(crate) fn index(store: &Store) -> Result<Response<Body>, ApiError> {
    Ok(respond::json(StatusCode::OK, &kinds::openapi_v3_index(&store.registry(), &custom(store)?)))
}

/// The document of one group and version.
pub(crate) fn v3(store: &Store, group: &str, version: &str) -> Result<Response<Body>, ApiError> {
    let document = kinds::openapi_v3(&store.registry(), &custom(store)?, group, version);
    Ok(respond::json(StatusCode::OK, &document.ok_or_else(ApiError::no_such_path)?))
}

/// The CustomResourceDefinitions.
fn custom(store: &Store) -> Result<Vec<Arc<Value>>, ApiError> {
    Ok(store.read_list(&definitions(), &ListOptions::default())?.items)
}
