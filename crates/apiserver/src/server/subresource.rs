//! Subresources: status, scale, binding, eviction and finalize.

use std::sync::Arc;

use edgemesh_api::ObjectKey;
use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use serde_json::{Value, json};

use super::{
    api::{Api, Call},
    body, read,
    respond::{self, Body},
    write,
};
use crate::{
    error::ApiError,
    fields,
    kinds::{KindInfo, ScalePaths},
    patch::Patch,
    store::{DeleteOptions, Part},
};

pub(crate) async fn serve(api: &Arc<Api>, call: Call, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    let core = call.info.resource.group.is_empty();
    match (call.place.subresource.as_str(), call.info.resource.plural.as_str(), call.verb) {
        ("status", _, verb) if call.info.subresources.status => match verb {
            "get" => read::get(api, &call),
            "update" => write::update(api, call, request).await,
            "patch" => write::patch(api, call, request).await,
            _ => Err(ApiError::method_not_allowed(&call.place.resource)),
        },
        ("scale", ..) => match call.info.subresources.scale.clone() {
            Some(paths) => scale(api, call, request, paths).await,
            None => Err(ApiError::no_such_path()),
        },
        ("finalize", "namespaces", "update") if core => write::update(api, call, request).await,
        ("binding", "pods", "create") if core => bind(api, call, request).await,
        ("eviction", "pods", "create") if core => evict(api, call, request).await,
        _ => Err(ApiError::no_such_path()),
    }
}

/// `pods/binding`: decides on which node a pod runs.
async fn bind(api: &Arc<Api>, call: Call, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    api.allow(&call, "create", &call.place.name)?;
    let context = call.context()?;
    let binding = body::object(&body::media_type(&call.headers), &body::read(request, api.body_limit).await?)?;
    let node = fields::text(&binding, &["target", "name"]);
    let kind = fields::text(&binding, &["target", "kind"]);
    if node.is_empty() || !(kind.is_empty() || kind == "Node") {
        return Err(ApiError::bad_request("a binding needs a target of kind Node with a name"));
    }
    let annotations = fields::at(&binding, &["metadata", "annotations"]).cloned();
    api.store.bind(&call.key(), node, annotations, &context).await?;
    let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201});
    Ok(respond::json(StatusCode::CREATED, &status))
}

/// `pods/eviction`: a delete; there are no disruption budgets to ask.
async fn evict(api: &Arc<Api>, call: Call, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    api.allow(&call, "create", &call.place.name)?;
    let context = call.context()?;
    let eviction = body::object(&body::media_type(&call.headers), &body::read(request, api.body_limit).await?)?;
    let wanted = eviction.get("deleteOptions").cloned().unwrap_or_else(|| json!({}));
    let (options, dry_run) = body::delete_options("application/json", wanted.to_string().as_bytes(), &call.query)?;
    let context = crate::context::RequestContext { dry_run: dry_run || context.dry_run, ..context };
    let options = DeleteOptions { propagation: None, ..options };
    api.store.delete(&call.key(), options, &context).await?;
    let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201});
    Ok(respond::json(StatusCode::CREATED, &status))
}

/// `…/scale`: the number of replicas, in the same form for every kind that has one.
async fn scale(
    api: &Arc<Api>,
    call: Call,
    request: Request<Incoming>,
    paths: ScalePaths,
) -> Result<Response<Body>, ApiError> {
    let key = call.key();
    match call.verb {
        "get" => {
            api.allow(&call, "get", &call.place.name)?;
            let object = api.store.read(&key)?;
            Ok(respond::json(StatusCode::OK, &scale_of(&object, &paths)))
        }
        verb @ ("update" | "patch") => {
            api.allow(&call, verb, &call.place.name)?;
            let context = call.context()?;
            let media_type = body::media_type(&call.headers);
            let sent = body::read(request, api.body_limit).await?;
            let change = Change::parse(verb, &media_type, &sent)?;
            let place = paths.clone();
            let of = key.clone();
            let written = api
                .store
                .modify(&key, Part::Main, &context, move |info, old| change.apply(info, &of, old, &place))
                .await?;
            let mut response = respond::json(StatusCode::OK, &scale_of(&written.object, &paths));
            respond::warn(&mut response, &written.warnings);
            Ok(response)
        }
        _ => Err(ApiError::method_not_allowed(&call.place.resource)),
    }
}

/// A write to a scale.
enum Change {
    Replace(Value),
    Patch(Patch),
}

impl Change {
    fn parse(verb: &str, media_type: &str, sent: &[u8]) -> Result<Self, ApiError> {
        if verb == "patch" {
            // A scale has no lists, so a strategic merge of it is a plain one.
            let media_type = match media_type {
                "application/strategic-merge-patch+json" => "application/merge-patch+json",
                other => other,
            };
            return Patch::parse(media_type, sent).map(Self::Patch);
        }
        body::object(media_type, sent).map(Self::Replace)
    }

    fn apply(&self, info: &KindInfo, key: &ObjectKey, old: &Value, paths: &ScalePaths) -> Result<Value, ApiError> {
        let wanted = match self {
            Self::Replace(scale) => scale.clone(),
            Self::Patch(patch) => patch.apply(info, &scale_of(old, paths))?,
        };
        let version = fields::meta(&wanted, "resourceVersion");
        if !version.is_empty() && version != fields::meta(old, "resourceVersion") {
            return Err(ApiError::stale(key));
        }
        let replicas = match fields::at(&wanted, &["spec", "replicas"]) {
            None | Some(Value::Null) => 0,
            Some(value) => value.as_i64().filter(|n| (0..=i64::from(i32::MAX)).contains(n)).ok_or_else(|| {
                ApiError::bad_request(format!("spec.replicas: Invalid value: {value}: must be a number from 0"))
            })?,
        };
        let mut new = old.clone();
        let mut target = &mut new;
        let steps: Vec<&str> = paths.spec_replicas.split('.').collect();
        if let [path @ .., last] = steps.as_slice() {
            for step in path {
                target = fields::as_map(target).entry(*step).or_insert(Value::Null);
            }
            fields::as_map(target).insert((*last).to_owned(), json!(replicas));
        }
        Ok(new)
    }
}

/// The `autoscaling/v1` `Scale` of an object.
fn scale_of(object: &Value, paths: &ScalePaths) -> Value {
    let at = |path: &str| fields::at(object, &path.split('.').collect::<Vec<_>>()).cloned();
    let mut metadata = json!({"name": fields::meta(object, "name")});
    for name in ["namespace", "uid", "resourceVersion", "creationTimestamp"] {
        let value = fields::meta(object, name);
        if !value.is_empty() {
            metadata[name] = json!(value);
        }
    }
    let mut status = json!({"replicas": at(&paths.status_replicas).and_then(|v| v.as_i64()).unwrap_or(0)});
    if !paths.label_selector.is_empty()
        && let Some(selector) = at(&paths.label_selector)
    {
        status["selector"] = json!(selector_text(&selector));
    }
    json!({
        "kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": metadata,
        "spec": {"replicas": at(&paths.spec_replicas).and_then(|v| v.as_i64()).unwrap_or(0)},
        "status": status,
    })
}

/// A label selector object in the form of the `labelSelector` parameter.
fn selector_text(selector: &Value) -> String {
    if let Some(text) = selector.as_str() {
        return text.to_owned();
    }
    let labels = selector.get("matchLabels").and_then(Value::as_object).into_iter().flatten();
    let mut parts: Vec<String> = labels.map(|(k, v)| format!("{k}={}", v.as_str().unwrap_or_default())).collect();
    for expression in selector.get("matchExpressions").and_then(Value::as_array).into_iter().flatten() {
        let key = fields::text(expression, &["key"]);
        let values = fields::strings(expression, &["values"]).collect::<Vec<_>>().join(",");
        parts.push(match fields::text(expression, &["operator"]) {
            "In" => format!("{key} in ({values})"),
            "NotIn" => format!("{key} notin ({values})"),
            "Exists" => key.to_owned(),
            _ => format!("!{key}"),
        });
    }
    parts.sort();
    parts.join(",")
}
