//! What the rules count by frontend.

use std::collections::HashMap;

use parking_lot::Mutex;

use super::{
    super::{
        frontend_counts::{CountsFrontends, FrontendCounts},
        mode::DatapathError,
        plan::Frontend,
    },
    ruleset::Map,
    transaction::Kernel,
};

/// Reads what the rules of this network namespace have counted.
#[derive(Debug, Default)]
pub struct RuleCounts(Mutex<Kernel>);

impl CountsFrontends for RuleCounts {
    fn read(&self) -> Result<HashMap<Frontend, FrontendCounts>, DatapathError> {
        let mut kernel = self.0.lock();
        let mut read: HashMap<Frontend, FrontendCounts> = HashMap::new();
        for map in Map::all_that_count() {
            for (key, packets) in kernel.counted(map)? {
                let Some(frontend) = key.counted_at(map).filter(|_| packets > 0) else { continue };
                // An address can be served to this node and to callers from outside.
                let counts = read.entry(frontend).or_default();
                match map {
                    Map::Sent(..) => counts.flows += packets,
                    Map::Refused(..) => counts.no_endpoint += packets,
                    _ => counts.no_such_port += packets,
                }
            }
        }
        Ok(read)
    }
}
