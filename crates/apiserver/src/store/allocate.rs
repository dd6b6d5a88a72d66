//! Service addresses and node ports, in the transaction that writes the Service.

use serde_json::Value;

use super::{transaction::Transaction, write::invalid};
use crate::{
    error::ApiError,
    fields,
    kinds::{
        KindInfo,
        allocation::{Taken, allocate},
    },
};

/// Gives a Service what it has no address or port for yet. Without ranges (a replica) it stays as it is.
pub(crate) fn service(
    transaction: &Transaction<'_>,
    info: &KindInfo,
    old: Option<&Value>,
    object: &mut Value,
) -> Result<(), ApiError> {
    let Some(ranges) = &transaction.shared.options.services else { return Ok(()) };
    let state = transaction.shared.state.read();
    let mut taken = Taken::by(state.allocations());
    for (committed, written) in transaction.written(&state, &info.storage) {
        committed.into_iter().for_each(|service| taken.remove(service));
        written.into_iter().for_each(|service| taken.add(service));
    }
    old.into_iter().for_each(|service| taken.remove(service));
    let name = fields::meta(object, "name").to_owned();
    allocate(ranges, &taken, old, object, rand::random()).map_err(|errors| invalid(info, &name, &errors))
}
