//! All rows, in the order in which they are measured.

mod apply;
mod dns;
mod gateway;
mod l4;
mod memory;
mod tunnel;

use anyhow::Result;

use crate::{cluster::Cluster, row::Row};

/// What a row is measured with.
#[derive(Debug)]
pub(crate) struct Bench {
    /// The lab.
    pub(crate) cluster: Cluster,
    /// Fewer samples.
    pub(crate) short: bool,
}

impl Bench {
    /// `full` samples, or a third of them in a short run.
    fn rounds(&self, full: u32) -> u32 {
        if self.short { (full / 3).max(1) } else { full }
    }
}

/// Measures one row.
pub(crate) type Measure = fn(&Bench) -> Result<Row>;

/// Names and measurements. Memory comes first, while everything is idle; the relay last, since it cuts a link.
pub(crate) const ALL: &[(&str, Measure)] = &[
    ("rss_agent", memory::agent),
    ("rss_edgecore", memory::edgecore),
    ("rss_hub", memory::hub),
    ("rss_gateway", memory::gateway),
    ("l4_same_node_throughput", l4::same_node_throughput),
    ("l4_same_lan_throughput", l4::same_lan_throughput),
    ("l4_same_lan_rtt64", l4::same_lan_rtt64),
    ("l4_same_lan_connect", l4::same_lan_connect),
    ("dns_answers_per_cpu_second", dns::answers_per_cpu_second),
    ("gateway_requests_per_cpu_second", gateway::requests_per_cpu_second),
    ("apply_to_first_answer", apply::to_first_answer),
    ("tunnel_direct_throughput", tunnel::direct_throughput),
    ("tunnel_direct_rtt64", tunnel::direct_rtt64),
    ("tunnel_relay_throughput", tunnel::relay_throughput),
];
