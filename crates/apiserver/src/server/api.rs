//! From a request to its answer: who asks, what for, may they, and which part answers.

use std::{sync::Arc, time::Duration};

use edgemesh_api::ObjectKey;
use http::{HeaderMap, Method, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::{
    accept, discovery, openapi, read,
    request::{Place, Query, Target, verb},
    respond::{self, Body},
    subresource, watch, write,
};
use crate::{
    auth::{Attributes, Authenticator, Authorizer, Decision},
    context::{FieldValidation, Identity, RequestContext},
    error::{ApiError, Reason},
    kinds::KindInfo,
    store::Store,
};

/// How long a request other than a watch may wait for its turn.
const QUEUE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a request other than a watch may take.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);

/// What all connections share.
pub(crate) struct Api {
    pub(crate) store: Store,
    pub(crate) authenticator: Authenticator,
    pub(crate) authorizer: Authorizer,
    pub(crate) body_limit: usize,
    pub(crate) cloud: Option<tokio::sync::watch::Receiver<bool>>,
    /// Turns of requests other than watches.
    pub(crate) turns: Semaphore,
    /// Turns of watches.
    pub(crate) watches: Arc<Semaphore>,
    pub(crate) stopping: CancellationToken,
}

/// A request for objects that may be answered.
pub(crate) struct Call {
    pub(crate) info: Arc<KindInfo>,
    pub(crate) place: Place,
    pub(crate) query: Query,
    pub(crate) headers: HeaderMap,
    pub(crate) user: Identity,
    pub(crate) verb: &'static str,
}

impl Call {
    pub(crate) fn key(&self) -> ObjectKey {
        ObjectKey::new(self.place.resource.clone(), self.place.namespace.clone(), self.place.name.clone())
    }

    pub(crate) fn accept(&self) -> Option<&str> {
        text(&self.headers, &header::ACCEPT)
    }

    /// How the write wants to be done.
    pub(crate) fn context(&self) -> Result<RequestContext, ApiError> {
        let field_validation = match self.query.get("fieldValidation") {
            None | Some("Warn") => FieldValidation::Warn,
            Some("Ignore") => FieldValidation::Ignore,
            Some("Strict") => FieldValidation::Strict,
            Some(other) => {
                return Err(ApiError::bad_request(format!(
                    "Invalid value: {other:?}: fieldValidation: supported values: \"Ignore\", \"Warn\", \"Strict\""
                )));
            }
        };
        Ok(RequestContext { user: self.user.clone(), dry_run: super::body::dry_run(&self.query)?, field_validation })
    }

    /// What it wants to do, for the authorizer.
    pub(crate) fn attributes<'a>(&'a self, verb: &'a str, name: &'a str) -> Attributes<'a> {
        Attributes {
            verb,
            resource: &self.place.resource,
            subresource: &self.place.subresource,
            namespace: &self.place.namespace,
            name,
            field_selector: self.query.get("fieldSelector").unwrap_or_default(),
        }
    }
}

impl Api {
    /// Answers a request, whatever it is.
    pub(crate) async fn answer(self: Arc<Self>, request: Request<Incoming>, peer: Option<&Identity>) -> Response<Body> {
        let head = request.method() == Method::HEAD;
        let mut response = match self.dispatch(request, peer).await {
            Ok(response) => response,
            Err(error) => {
                if error.code() >= 500 {
                    tracing::warn!(%error, "a request failed");
                }
                respond::error(&error)
            }
        };
        if head {
            *response.body_mut() = respond::bytes(StatusCode::OK, "", "").into_body();
        }
        response
    }

    async fn dispatch(
        self: &Arc<Self>,
        request: Request<Incoming>,
        peer: Option<&Identity>,
    ) -> Result<Response<Body>, ApiError> {
        let target = Target::parse(request.uri().path()).ok_or_else(ApiError::no_such_path);
        let user = self.user(request.headers(), peer)?;
        if let Ok(target @ (Target::Health | Target::Version)) = &target {
            return Ok(discovery::public(target, request.uri().query()));
        }
        let Some(user) = user else {
            return Err(ApiError::new(Reason::Unauthorized, "Unauthorized"));
        };
        let target = target?;
        let query = Query::parse(request.uri().query().unwrap_or_default())?;
        if !matches!(target, Target::Resource(_)) && !matches!(*request.method(), Method::GET | Method::HEAD) {
            return Err(ApiError::new(
                Reason::MethodNotAllowed,
                "the server does not allow this method on the requested resource",
            ));
        }
        let registry = self.store.registry();
        let accept = text(request.headers(), &header::ACCEPT);
        match target {
            Target::Health | Target::Version => Err(ApiError::no_such_path()),
            Target::Cloud => {
                let cloud = self.cloud.as_ref().ok_or_else(ApiError::no_such_path)?;
                Ok(respond::json(StatusCode::OK, &serde_json::json!({"connected": *cloud.borrow()})))
            }
            Target::CoreVersions => Ok(discovery::core(&registry, accept::discovery(accept))),
            Target::Groups => Ok(discovery::groups(&registry, accept::discovery(accept))),
            Target::Group(group) => discovery::group(&registry, &group),
            Target::GroupVersion(group, version) => discovery::group_version(&registry, &group, &version),
            Target::OpenApiV2 => openapi::v2(&self.store, accept),
            Target::OpenApiV3 => openapi::index(&self.store),
            Target::OpenApiV3Of(group, version) => openapi::v3(&self.store, &group, &version),
            Target::Resource(place) => {
                let info = self.store.kind(&place.resource)?;
                let verb = verb(request.method(), &place, &query)
                    .ok_or_else(|| ApiError::method_not_allowed(&place.resource))?;
                let call = Call { info, place, query, headers: request.headers().clone(), user, verb };
                self.objects(call, request).await
            }
        }
    }

    async fn objects(self: &Arc<Self>, call: Call, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
        let has_namespace = !call.place.namespace.is_empty();
        let across = matches!(call.verb, "list" | "watch" | "deletecollection") && call.place.name.is_empty();
        if has_namespace != call.info.namespaced && !(call.info.namespaced && across) {
            return Err(ApiError::no_such_path());
        }
        if call.verb == "watch" {
            return watch::watch(self, &call);
        }
        let Ok(Ok(_turn)) = tokio::time::timeout(QUEUE_TIMEOUT, self.turns.acquire()).await else {
            return Err(too_many());
        };
        let work = async {
            if !call.place.subresource.is_empty() {
                return subresource::serve(self, call, request).await;
            }
            match call.verb {
                "get" => read::get(self, &call),
                "list" => read::list(self, &call),
                "create" => write::create(self, call, request).await,
                "update" => write::update(self, call, request).await,
                "patch" => write::patch(self, call, request).await,
                "delete" => write::delete(self, call, request).await,
                "deletecollection" => write::delete_collection(self, call, request).await,
                _ => Err(ApiError::method_not_allowed(&call.place.resource)),
            }
        };
        match tokio::time::timeout(REQUEST_TIMEOUT, work).await {
            Ok(response) => response,
            Err(_) => Err(ApiError::new(Reason::Timeout, "the request took too long")),
        }
    }

    /// Whether the call may go on, under the verb and name that it turned out to have.
    pub(crate) fn allow(&self, call: &Call, verb: &str, name: &str) -> Result<Decision, ApiError> {
        self.authorizer.authorize(&self.store, &call.user, &call.attributes(verb, name))
    }

    fn user(&self, headers: &HeaderMap, peer: Option<&Identity>) -> Result<Option<Identity>, ApiError> {
        let bearer = text(headers, &header::AUTHORIZATION)
            .and_then(|v| v.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
            .map(|(_, token)| token.trim());
        self.authenticator.user(bearer, peer).map_err(|()| ApiError::new(Reason::Unauthorized, "Unauthorized"))
    }
}

/// 429, with the advice to come back.
pub(crate) fn too_many() -> ApiError {
    let mut error = ApiError::new(
        Reason::TooManyRequests,
        "The server is currently unable to handle the request: too many requests",
    );
    error.details = Some(Box::new(crate::error::Details { retry_after_seconds: 1, ..Default::default() }));
    error
}

fn text<'a>(headers: &'a HeaderMap, name: &http::HeaderName) -> Option<&'a str> {
    headers.get(name).and_then(|v| v.to_str().ok())
}
