//! Service addresses and node ports, in the transaction that writes the Service.

use serde_json::Value;

use super::{transaction::Transaction, write::invalid};
use crate::{
    error::ApiError,
    fields,
    kinds::{
        KindInfo,
        allocation::{ServiceRanges, Taken, allocate},
    },
};

/// Gives a Service what it has no address or port for yet. Without ranges (a replica) it stays as it is.
pub(crate) fn service(
    transaction: &Transaction<'_>,
    info: &KindInfo,
    old: Option<&Value>,
    object: &mut Value,
) -> Result<(), ApiError> {
    let Some(cluster) = &transaction.shared.options.cluster else { return Ok(()) };
    let (first, last) = cluster.node_port_range;
    let ranges = ServiceRanges::new(&cluster.service_cidr, first..=last).map_err(ApiError::internal)?;
    let own = old.map(|o| (fields::meta(o, "namespace"), fields::meta(o, "name")));
    let services = transaction.list(&info.storage);
    let others = services
        .iter()
        .filter(|((namespace, name), _)| own != Some((namespace, name)))
        .map(|(_, stored)| &*stored.object);
    let taken = Taken::by(others);
    let name = fields::meta(object, "name").to_owned();
    allocate(&ranges, &taken, object, rand::random()).map_err(|errors| invalid(info, &name, &errors))
}
