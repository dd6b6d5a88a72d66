//! `create`, `update`, `patch`, `delete` and `deletecollection`.

use std::sync::Arc;

use http::{Request, Response, StatusCode};
use hyper::body::Incoming;

use super::{
    accept,
    api::{Api, Call},
    body, read,
    respond::{self, Body, Include},
};
use crate::{
    auth::Decision,
    error::ApiError,
    fields,
    patch::Patch,
    store::{ListPage, Part, Written},
};

pub(crate) async fn create(api: &Arc<Api>, call: Call, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    if !call.place.name.is_empty() {
        return Err(ApiError::method_not_allowed(&call.place.resource));
    }
    let context = call.context()?;
    let object = body::object(&body::media_type(&call.headers), &body::read(request, api.body_limit).await?)?;
    api.allow(&call, "create", fields::meta(&object, "name"))?;
    let written = api.store.create_written(&call.place.resource, &call.place.namespace, object, &context).await?;
    answer(&call, StatusCode::CREATED, &written)
}

pub(crate) async fn update(api: &Arc<Api>, call: Call, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    api.allow(&call, "update", &call.place.name)?;
    let context = call.context()?;
    let object = body::object(&body::media_type(&call.headers), &body::read(request, api.body_limit).await?)?;
    let written = api.store.modify(&call.key(), part(&call)?, &context, move |_, _| Ok(object)).await?;
    answer(&call, StatusCode::OK, &written)
}

pub(crate) async fn patch(api: &Arc<Api>, call: Call, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    api.allow(&call, "patch", &call.place.name)?;
    let context = call.context()?;
    let media_type = body::media_type(&call.headers);
    let patch = Patch::parse(&media_type, &body::read(request, api.body_limit).await?)?;
    let change = move |info: &crate::kinds::KindInfo, old: &Arc<serde_json::Value>| patch.apply(info, old);
    let written = api.store.modify(&call.key(), part(&call)?, &context, change).await?;
    answer(&call, StatusCode::OK, &written)
}

pub(crate) async fn delete(api: &Arc<Api>, call: Call, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    api.allow(&call, "delete", &call.place.name)?;
    let mut context = call.context()?;
    let sent = body::read(request, api.body_limit).await?;
    let (options, dry_run) = body::delete_options(&body::media_type(&call.headers), &sent, &call.query)?;
    context.dry_run = dry_run;
    let outcome = api.store.delete(&call.key(), options, &context).await?;
    if outcome.removed && call.info.default_grace_seconds(&outcome.object).is_none() {
        return Ok(respond::json(StatusCode::OK, &respond::deleted(&call.info, &outcome.object)));
    }
    answer(&call, StatusCode::OK, &Written { object: outcome.object, warnings: Vec::new() })
}

pub(crate) async fn delete_collection(
    api: &Arc<Api>,
    call: Call,
    request: Request<Incoming>,
) -> Result<Response<Body>, ApiError> {
    let decision = api.allow(&call, "deletecollection", "")?;
    if matches!(decision, Decision::AllowVisible(_)) {
        return Err(ApiError::method_not_allowed(&call.place.resource));
    }
    let mut context = call.context()?;
    let sent = body::read(request, api.body_limit).await?;
    let (options, dry_run) = body::delete_options(&body::media_type(&call.headers), &sent, &call.query)?;
    context.dry_run = dry_run;
    let mut page = api.store.read_list(&call.place.resource, &read::options(&call)?)?;
    let mut items = Vec::with_capacity(page.items.len());
    for object in std::mem::take(&mut page.items) {
        let mut key = call.key();
        key.name = fields::meta(&object, "name").to_owned();
        key.namespace = fields::meta(&object, "namespace").to_owned();
        match api.store.delete(&key, options.clone(), &context).await {
            Ok(outcome) => items.push(outcome.object),
            // Somebody else was faster.
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
    }
    let page = ListPage {
        items,
        resource_version: api.store.resource_version(),
        continue_token: page.continue_token,
        remaining: page.remaining,
    };
    respond::list(&call.info, &page, accept::form(call.accept())?, Include::Metadata)
}

/// The written object in the form that was asked for.
pub(crate) fn answer(call: &Call, status: StatusCode, written: &Written) -> Result<Response<Body>, ApiError> {
    let form = accept::form(call.accept())?;
    let include = Include::parse(call.query.get("includeObject"))?;
    let mut response = respond::json(status, &respond::object(&call.info, &written.object, form, include));
    respond::warn(&mut response, &written.warnings);
    Ok(response)
}

/// Which part of the object the path names.
fn part(call: &Call) -> Result<Part, ApiError> {
    match call.place.subresource.as_str() {
        "" => Ok(Part::Main),
        "status" => Ok(Part::Status),
        "finalize" => Ok(Part::Finalize),
        _ => Err(ApiError::no_such_path()),
    }
}
