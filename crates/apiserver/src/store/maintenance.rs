//! What the store removes by itself: events past their time.

use edgemesh_api::{ObjectKey, ResourceName};
use jiff::{SignedDuration, Timestamp};

use super::transaction::Transaction;
use crate::{error::ApiError, fields};

/// How long events are kept, as the API server's `--event-ttl`.
const EVENT_TTL: SignedDuration = SignedDuration::from_hours(1);
/// How many events are kept at most.
const MAX_EVENTS: usize = 10_000;

/// Removes events that nobody updated for an hour, and the oldest ones when there are very many.
pub(crate) fn remove_old_events(transaction: &mut Transaction<'_>) -> Result<(), ApiError> {
    let events = ResourceName::new("", "v1", "events");
    let oldest_kept = Timestamp::now() - EVENT_TTL;
    let mut all: Vec<_> = transaction
        .list(&events)
        .into_iter()
        .map(|(slot, stored)| {
            let object = &stored.object;
            let seen = [
                fields::text(object, &["series", "lastObservedTime"]),
                fields::text(object, &["lastTimestamp"]),
                fields::text(object, &["eventTime"]),
                fields::meta(object, "creationTimestamp"),
            ]
            .into_iter()
            .find_map(|t| t.parse::<Timestamp>().ok())
            .unwrap_or(Timestamp::UNIX_EPOCH);
            (seen, slot)
        })
        .collect();
    all.sort();
    let surplus = all.len().saturating_sub(MAX_EVENTS);
    for (index, (seen, (namespace, name))) in all.into_iter().enumerate() {
        if index < surplus || seen < oldest_kept {
            transaction.remove(&ObjectKey::new(events.clone(), namespace, name))?;
        }
    }
    Ok(())
}
