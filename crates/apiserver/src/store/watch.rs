//! Watches: the present objects, then every change, in order and without gaps.
//!
//! A watch keeps no queue. It reads the table's history from where it stands, so it costs nothing while it is slow; one that
//! falls behind the history ends with 410 and starts anew.

use std::{collections::VecDeque, pin::Pin, sync::Arc, time::Duration};

use futures::Stream;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::{
    Shared,
    options::{EventKind, WatchEvent, WatchOptions},
    selector::Filter,
    state::Change,
    write::served,
};
use crate::{error::ApiError, fields, kinds::KindInfo};

/// How often a quiet watch says how far it is.
const BOOKMARK_INTERVAL: Duration = Duration::from_secs(60);
/// How many changes are taken from the history at once.
const TAKE: usize = 64;

/// The events of a watch. It ends after its first error.
pub type WatchStream = Pin<Box<dyn Stream<Item = Result<WatchEvent, ApiError>> + Send>>;

struct Watch {
    shared: Arc<Shared>,
    info: Arc<KindInfo>,
    filter: Filter,
    /// Changes up to here were delivered or are in `ready`.
    cursor: u64,
    ready: VecDeque<WatchEvent>,
    changed: watch::Receiver<u64>,
    bookmarks: bool,
    bookmark_at: tokio::time::Instant,
    ended: bool,
}

pub(crate) fn watch(
    shared: &Arc<Shared>,
    info: Arc<KindInfo>,
    options: &WatchOptions,
) -> Result<WatchStream, ApiError> {
    let filter = Filter::new(
        &info,
        options.namespace.as_deref(),
        options.label_selector.as_deref(),
        options.field_selector.as_deref(),
    )?;
    let mut ready = VecDeque::new();
    let (cursor, changed) = {
        let mut state = shared.state.write();
        let rv = state.rv;
        let table = state.table_mut(&info.storage);
        let cursor = match options.since {
            Some(since) if since > rv || !table.remembers(since) => return Err(too_old(since)),
            Some(since) => since,
            None => {
                for (slot, stored) in &table.objects {
                    if filter.matches(&info, &slot.0, &stored.object) {
                        ready.push_back(WatchEvent { kind: EventKind::Added, object: served(&info, &stored.object) });
                    }
                }
                if options.bookmarks {
                    ready.push_back(bookmark(&info, rv, true));
                }
                rv
            }
        };
        (cursor, table.subscribe())
    };
    let watch = Watch {
        shared: shared.clone(),
        info,
        filter,
        cursor,
        ready,
        changed,
        bookmarks: options.bookmarks,
        bookmark_at: tokio::time::Instant::now() + BOOKMARK_INTERVAL,
        ended: false,
    };
    Ok(Box::pin(futures::stream::unfold(watch, |mut watch| async move {
        let event = watch.next().await?;
        Some((event, watch))
    })))
}

fn too_old(since: u64) -> ApiError {
    ApiError::expired(format!("too old resource version: {since}"))
}

impl Watch {
    async fn next(&mut self) -> Option<Result<WatchEvent, ApiError>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(Ok(event));
            }
            if self.ended {
                return None;
            }
            self.changed.borrow_and_update();
            match self.take() {
                Ok(true) => continue,
                Ok(false) => {}
                Err(error) => {
                    self.ended = true;
                    return Some(Err(error));
                }
            }
            tokio::select! {
                changed = self.changed.changed() => if changed.is_err() {
                    return None;
                },
                () = tokio::time::sleep_until(self.bookmark_at), if self.bookmarks => {
                    self.bookmark_at = tokio::time::Instant::now() + BOOKMARK_INTERVAL;
                    let rv = self.cursor;
                    self.ready.push_back(bookmark(&self.info, rv, false));
                }
            }
        }
    }

    /// Takes the next changes from the history; says whether there were any.
    fn take(&mut self) -> Result<bool, ApiError> {
        let state = self.shared.state.read();
        let Some(table) = state.table(&self.info.storage) else { return Ok(false) };
        if !table.remembers(self.cursor) {
            return Err(too_old(self.cursor));
        }
        let mut taken = 0;
        for change in table.after(self.cursor, TAKE) {
            taken += 1;
            self.cursor = change.rv;
            if let Some(event) = event(&self.info, &self.filter, change) {
                self.ready.push_back(event);
            }
        }
        if taken < TAKE {
            self.cursor = state.rv;
        }
        Ok(taken > 0)
    }
}

/// What a change is to a watcher with this filter.
fn event(info: &KindInfo, filter: &Filter, change: &Change) -> Option<WatchEvent> {
    let namespace = change.slot.0.as_str();
    let matched = change.previous.as_ref().is_some_and(|p| filter.matches(info, namespace, p));
    let matches = change.kind != EventKind::Deleted && filter.matches(info, namespace, &change.object);
    let kind = match (matched, matches) {
        (false, true) => EventKind::Added,
        (true, true) => EventKind::Modified,
        (true, false) => EventKind::Deleted,
        (false, false) => return None,
    };
    let object = match (&change.previous, kind, change.kind) {
        // It still exists but left the selection: its last selected state, with the version at which it left.
        (Some(previous), EventKind::Deleted, EventKind::Modified) => {
            let mut last = (**previous).clone();
            fields::map_in(&mut last, "metadata").insert("resourceVersion".to_owned(), json!(change.rv.to_string()));
            Arc::new(last)
        }
        _ => change.object.clone(),
    };
    Some(WatchEvent { kind, object: served(info, &object) })
}

fn bookmark(info: &KindInfo, rv: u64, initial_events_end: bool) -> WatchEvent {
    let mut metadata = json!({"resourceVersion": rv.to_string()});
    if initial_events_end {
        metadata["annotations"] = json!({"k8s.io/initial-events-end": "true"});
    }
    let object: Value = json!({"kind": info.kind, "apiVersion": info.api_version(), "metadata": metadata});
    WatchEvent { kind: EventKind::Bookmark, object: Arc::new(object) }
}
