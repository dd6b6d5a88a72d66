//! `get` and `list`.

use http::{Response, StatusCode};

use super::{
    accept,
    api::{Api, Call},
    respond::{self, Body, Include},
};
use crate::{auth::Decision, error::ApiError, store::ListOptions};

pub(crate) fn get(api: &Api, call: &Call) -> Result<Response<Body>, ApiError> {
    api.allow(call, "get", &call.place.name)?;
    let form = accept::form(call.accept())?;
    let include = Include::parse(call.query.get("includeObject"))?;
    let object = api.store.read(&call.key())?;
    Ok(respond::json(StatusCode::OK, &respond::object(&call.info, &object, form, include)))
}

pub(crate) fn list(api: &Api, call: &Call) -> Result<Response<Body>, ApiError> {
    let decision = api.allow(call, "list", "")?;
    let form = accept::form(call.accept())?;
    let include = Include::parse(call.query.get("includeObject"))?;
    let mut page = api.store.read_list(&call.place.resource, &options(call)?)?;
    if let Decision::AllowVisible(visible) = decision {
        page.items.retain(|object| visible(object));
        page.remaining = None;
    }
    respond::list(&call.info, &page, form, include)
}

/// The query as list options (Kubernetes, "Resource versions").
pub(crate) fn options(call: &Call) -> Result<ListOptions, ApiError> {
    let query = &call.query;
    let text = |name: &str| query.get(name).map(str::to_owned);
    let resource_version = query.number("resourceVersion")?;
    let exact = match (query.get("resourceVersionMatch"), resource_version) {
        (None | Some("NotOlderThan"), _) => false,
        (Some("Exact"), Some(version)) if version > 0 => true,
        (Some("Exact"), _) => {
            return Err(ApiError::bad_request(
                "resourceVersionMatch: Forbidden: resourceVersionMatch \"Exact\" is forbidden without a resourceVersion",
            ));
        }
        (Some(other), _) => {
            return Err(ApiError::bad_request(format!(
                "resourceVersionMatch: Unsupported value: {other:?}: supported values: \"Exact\", \"NotOlderThan\""
            )));
        }
    };
    Ok(ListOptions {
        namespace: Some(call.place.namespace.clone()).filter(|n| !n.is_empty()),
        label_selector: text("labelSelector"),
        field_selector: text("fieldSelector"),
        limit: query.number("limit")?.and_then(|l| usize::try_from(l).ok()),
        continue_token: text("continue"),
        resource_version: resource_version.filter(|v| *v > 0),
        exact,
    })
}
