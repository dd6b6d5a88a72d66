//! Endpoints to which the rules led flows, and that left a SYN unanswered.

use std::net::SocketAddr;

use super::{
    nft::NftError,
    ruleset::{Family, Map},
    transaction::Kernel,
};

/// Reads what the rules of this network namespace have seen in the last seconds.
#[derive(Debug, Default)]
pub(crate) struct UnansweredFlows(Kernel);

impl UnansweredFlows {
    /// The endpoints. None where there is no table.
    pub(crate) fn read(&mut self) -> Result<Vec<SocketAddr>, NftError> {
        let mut endpoints = Vec::new();
        for family in Family::ALL {
            let keys = self.0.keys(Map::Unanswered(family))?;
            endpoints.extend(keys.into_iter().filter_map(|key| key.to_backend(family)));
        }
        Ok(endpoints)
    }
}
