//! Lists and their pages. All pages of one list show the same state of the store.

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use serde::{Deserialize, Serialize};

use super::{
    Shared,
    options::{ListOptions, ListPage},
    selector::Filter,
    state::Slot,
    write::served,
};
use crate::{
    error::{ApiError, Reason},
    kinds::KindInfo,
};

/// What a continue token holds.
#[derive(Serialize, Deserialize)]
struct Continue {
    /// The state that the first page showed.
    rv: u64,
    /// The last object of the page before.
    after: Slot,
}

pub(crate) fn list(shared: &Shared, info: &KindInfo, options: &ListOptions) -> Result<ListPage, ApiError> {
    let filter = Filter::new(
        info,
        options.namespace.as_deref(),
        options.label_selector.as_deref(),
        options.field_selector.as_deref(),
    )?;
    let token = options.continue_token.as_deref().filter(|t| !t.is_empty()).map(decode).transpose()?;
    let state = shared.state.read();
    let wanted = match &token {
        Some(token) => Some(token.rv),
        None => options.resource_version.filter(|_| options.exact),
    };
    if let Some(version) = wanted.or(options.resource_version)
        && version > state.rv
    {
        return Err(ApiError::new(
            Reason::Timeout,
            format!("Too large resource version: {version}, current: {}", state.rv),
        ));
    }
    let shown = wanted.unwrap_or(state.rv);
    let mut page = ListPage { items: Vec::new(), resource_version: shown, continue_token: None, remaining: None };
    let Some(table) = state.table(&info.storage) else { return Ok(page) };
    let limit = options.limit.filter(|l| *l > 0).unwrap_or(usize::MAX);
    let mut last: Option<Slot> = None;
    let mut left = 0_usize;
    let after = token.as_ref().map(|t| &t.after);
    let mut visit = |slot: &Slot, object: &std::sync::Arc<serde_json::Value>| {
        if page.items.len() >= limit {
            left += 1;
            return;
        }
        page.items.push(served(info, object));
        last = Some(slot.clone());
    };
    let passes = |slot: &Slot| after.is_none_or(|a| slot > a);
    if wanted.is_some() && (table.changed_since(shown) || !table.remembers(shown)) {
        let objects = table.at(shown).ok_or_else(|| {
            ApiError::expired(
                "The provided continue parameter is too old to display a consistent list result. You must start a new \
                 list without the continue parameter.",
            )
        })?;
        for (slot, object) in objects {
            if passes(slot) && filter.matches(info, &slot.0, object) {
                visit(slot, object);
            }
        }
    } else {
        let start = match filter.namespace() {
            Some(namespace) => std::ops::Bound::Included((namespace.to_owned(), String::new())),
            None => std::ops::Bound::Unbounded,
        };
        for (slot, stored) in table.objects.range((start, std::ops::Bound::Unbounded)) {
            if filter.namespace().is_some_and(|n| n != slot.0) {
                break;
            }
            if passes(slot) && filter.matches(info, &slot.0, &stored.object) {
                visit(slot, &stored.object);
            }
        }
    }
    if left > 0
        && let Some(after) = last
    {
        page.continue_token = Some(encode(&Continue { rv: shown, after })?);
        page.remaining = filter.is_everything().then_some(left);
    }
    Ok(page)
}

fn encode(token: &Continue) -> Result<String, ApiError> {
    Ok(BASE64_URL_SAFE_NO_PAD.encode(serde_json::to_vec(token).map_err(ApiError::internal)?))
}

fn decode(token: &str) -> Result<Continue, ApiError> {
    BASE64_URL_SAFE_NO_PAD
        .decode(token)
        .ok()
        .and_then(|bytes| serde_json::from_slice(&bytes).ok())
        .ok_or_else(|| ApiError::bad_request("continue key is not valid"))
}
