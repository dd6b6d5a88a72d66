//! `watch`: a JSON document per line, for as long as the client listens (Kubernetes, "Efficient detection of changes").

use std::{convert::Infallible, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::StreamExt;
use http::{Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use serde_json::{Value, json};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    accept::{self, Form},
    api::{Api, Call, too_many},
    respond::{self, Body, Include},
};
use crate::{
    auth::{Decision, Visible},
    error::{ApiError, Cause, Details, Reason},
    fields,
    kinds::KindInfo,
    store::{EventKind, WatchEvent, WatchOptions, WatchStream},
};

/// How long a watch lasts that names no time; half of it at least, so that not all come back at once.
const DEFAULT_TIMEOUT: u64 = 3600;

struct Lines {
    events: WatchStream,
    info: Arc<KindInfo>,
    form: Form,
    include: Include,
    visible: Option<Visible>,
    /// A table's columns stand in its first event only.
    first: bool,
    /// Whether the end of the initial objects is announced.
    announce: bool,
    until: Instant,
    stopping: CancellationToken,
    _turn: OwnedSemaphorePermit,
}

pub(crate) fn watch(api: &Arc<Api>, call: &Call) -> Result<Response<Body>, ApiError> {
    let decision = api.allow(call, "watch", &call.place.name)?;
    let form = accept::form(call.accept())?;
    let include = Include::parse(call.query.get("includeObject"))?;
    let query = &call.query;
    let since = query.number("resourceVersion")?.filter(|v| *v > 0);
    let bookmarks = query.flag("allowWatchBookmarks");
    let initial = query.get("sendInitialEvents").is_some().then(|| query.flag("sendInitialEvents"));
    check_initial(call, initial)?;
    let announce = initial == Some(true) && bookmarks;
    let mut field_selector = query.get("fieldSelector").map(str::to_owned);
    if !call.place.name.is_empty() {
        // A watch of one object by its path, as old clients do it.
        let by_name = format!("metadata.name={}", call.place.name);
        field_selector = Some(field_selector.map_or(by_name.clone(), |f| format!("{f},{by_name}")));
    }
    let options = WatchOptions {
        namespace: Some(call.place.namespace.clone()).filter(|n| !n.is_empty()),
        label_selector: query.get("labelSelector").map(str::to_owned),
        field_selector,
        since: match (initial, since) {
            // The initial objects are wanted, at least as new as the version.
            (Some(true), _) => None,
            (Some(false), None) => Some(api.store.resource_version()),
            (_, since) => since,
        },
        bookmarks,
    };
    let turn = api.watches.clone().try_acquire_owned().map_err(|_| too_many())?;
    let events = match api.store.watch(&call.place.resource, &options) {
        Ok(events) => events,
        // Clients expect this one as an event, after 200 (client-go handles both).
        Err(error) if error.is_expired() => Box::pin(futures::stream::once(async move { Err(error) })),
        Err(error) => return Err(error),
    };
    let timeout = match query.number("timeoutSeconds")?.filter(|t| *t > 0) {
        Some(seconds) => Duration::from_secs(seconds.min(DEFAULT_TIMEOUT * 24)),
        None => Duration::from_secs(rand::random_range(DEFAULT_TIMEOUT / 2..DEFAULT_TIMEOUT)),
    };
    let lines = Lines {
        events,
        info: call.info.clone(),
        form,
        include,
        visible: match decision {
            Decision::Allow => None,
            Decision::AllowVisible(visible) => Some(visible),
        },
        first: true,
        announce,
        until: Instant::now() + timeout,
        stopping: api.stopping.clone(),
        _turn: turn,
    };
    let stream = futures::stream::unfold(lines, |mut lines| async move {
        let line = lines.next().await?;
        Some((Ok::<_, Infallible>(Frame::data(line)), lines))
    });
    let mut response = respond::bytes(StatusCode::OK, "application/json", "");
    *response.body_mut() = StreamBody::new(stream).boxed_unsync();
    Ok(response)
}

/// The rules for `sendInitialEvents` (Kubernetes, `ValidateListOptions`).
fn check_initial(call: &Call, initial: Option<bool>) -> Result<(), ApiError> {
    let matching = call.query.get("resourceVersionMatch");
    let wrong = match (initial, matching) {
        (None, None) | (Some(_), Some("NotOlderThan")) => return Ok(()),
        (None, Some(_)) => {
            "resourceVersionMatch: Forbidden: resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided"
        }
        (Some(_), _) => {
            "sendInitialEvents: Forbidden: sendInitialEvents requires setting resourceVersionMatch to NotOlderThan"
        }
    };
    let (field, message) = wrong.split_once(": ").unwrap_or(("", wrong));
    Err(ApiError {
        reason: Reason::Invalid,
        message: format!("ListOptions.meta.k8s.io \"\" is invalid: {wrong}"),
        details: Some(Box::new(Details {
            group: "meta.k8s.io".to_owned(),
            kind: "ListOptions".to_owned(),
            causes: vec![Cause {
                reason: "FieldValueForbidden".to_owned(),
                message: message.to_owned(),
                field: field.to_owned(),
            }],
            ..Details::default()
        })),
    })
}

impl Lines {
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            let event = tokio::select! {
                event = self.events.next() => event?,
                () = tokio::time::sleep_until(self.until) => return None,
                () = self.stopping.cancelled() => return None,
            };
            match event {
                Ok(event) => {
                    if let Some(line) = self.line(&event) {
                        return Some(line);
                    }
                }
                Err(error) => return line("ERROR", &error.to_status()),
            }
        }
    }

    /// The line of an event; `None` when the client isn't to see it.
    fn line(&mut self, event: &WatchEvent) -> Option<Bytes> {
        let kind = match event.kind {
            EventKind::Added => "ADDED",
            EventKind::Modified => "MODIFIED",
            EventKind::Deleted => "DELETED",
            EventKind::Bookmark => return self.bookmark(event),
        };
        if self.visible.as_ref().is_some_and(|visible| !visible(&event.object)) {
            return None;
        }
        match self.form {
            Form::Plain => line(kind, &event.object),
            Form::Metadata(_) => line(kind, &respond::object(&self.info, &event.object, self.form, self.include)),
            Form::Table(version) => {
                let metadata = json!({"resourceVersion": fields::meta(&event.object, "resourceVersion")});
                let columns = std::mem::replace(&mut self.first, false);
                let rows = std::iter::once(&*event.object);
                line(kind, &respond::table(&self.info, rows, metadata, version, self.include, columns))
            }
        }
    }

    fn bookmark(&mut self, event: &WatchEvent) -> Option<Bytes> {
        let ends_initial = fields::at(&event.object, &["metadata", "annotations"]).is_some();
        if ends_initial && !self.announce {
            return None;
        }
        match self.form {
            Form::Plain => line("BOOKMARK", &event.object),
            Form::Metadata(_) => line("BOOKMARK", &respond::object(&self.info, &event.object, self.form, self.include)),
            Form::Table(version) => {
                let metadata = event.object.get("metadata").cloned().unwrap_or_default();
                let table = respond::table(&self.info, std::iter::empty(), metadata, version, self.include, false);
                line("BOOKMARK", &table)
            }
        }
    }
}

fn line(kind: &str, object: &Value) -> Option<Bytes> {
    let mut out = format!("{{\"type\":\"{kind}\",\"object\":").into_bytes();
    serde_json::to_writer(&mut out, object).ok()?;
    out.extend_from_slice(b"}\n");
    Some(out.into())
}
