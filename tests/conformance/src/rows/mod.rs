//! The rows, by what they are about.

mod affinity;
mod conntrack;
mod dns;
mod explained;
mod granular;
mod latency;
mod node_ports;
mod pods;
mod services;
mod slices;
mod topology;
mod traffic_policy;
mod types;

use crate::case::Row;

/// All rows.
pub fn all() -> Vec<Row> {
    [
        services::ROWS,
        node_ports::ROWS,
        types::ROWS,
        affinity::ROWS,
        traffic_policy::ROWS,
        topology::ROWS,
        conntrack::ROWS,
        granular::ROWS,
        slices::ROWS,
        pods::ROWS,
        latency::ROWS,
        dns::ROWS,
        explained::ROWS,
    ]
    .concat()
}
