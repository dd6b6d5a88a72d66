//! All rows, in the order in which they are measured.

mod apply;
mod dns;
mod gateway;
mod l4;
mod many;
mod memory;
mod proxied;
mod tunnel;

use std::{cell::OnceCell, path::PathBuf};

use anyhow::Result;

pub(crate) use many::Many;

use crate::{cluster::Cluster, row::Row};

/// What a row is measured with.
#[derive(Debug)]
pub(crate) struct Bench {
    /// The lab.
    pub(crate) cluster: Cluster,
    /// Fewer samples.
    pub(crate) short: bool,
    /// The checkout.
    pub(crate) root: PathBuf,
    /// The lab with many Services, once a row has asked for it.
    pub(crate) many: OnceCell<Many>,
}

impl Bench {
    /// `full` samples, or a third of them in a short run.
    fn rounds(&self, full: u32) -> u32 {
        if self.short { (full / 3).max(1) } else { full }
    }

    /// The lab with many Services, which comes up with the first row that needs it.
    fn many(&self) -> Result<&Many> {
        if let Some(many) = self.many.get() {
            return Ok(many);
        }
        let many = Many::start(&format!("{}many", self.cluster.name()), &self.root)?;
        Ok(self.many.get_or_init(|| many))
    }
}

/// Measures one row.
pub(crate) type Measure = fn(&Bench) -> Result<Row>;

/// Names and measurements. Memory comes first, while everything is idle; the relay late, since it cuts a link; at the end what has a
/// lab of its own, with ever more Services.
pub(crate) const ALL: &[(&str, Measure)] = &[
    ("rss_agent", memory::agent),
    ("rss_edgecore", memory::edgecore),
    ("rss_hub", memory::hub),
    ("rss_gateway", memory::gateway),
    ("l4_same_node_throughput", l4::same_node_throughput),
    ("l4_same_lan_throughput", l4::same_lan_throughput),
    ("l4_same_lan_rtt64", l4::same_lan_rtt64),
    ("l4_same_lan_connect", l4::same_lan_connect),
    ("l4_udp_rtt64", l4::udp_rtt64),
    ("l4_ipv6_connect", l4::ipv6_connect),
    ("l4_ipv6_rtt64", l4::ipv6_rtt64),
    ("proxied_l4_cpu_per_gbyte", proxied::per_gbyte),
    ("proxied_l4_cpu_per_connection", proxied::per_connection),
    ("dns_answers_per_cpu_second", dns::answers_per_cpu_second),
    ("dns_answers_per_cpu_second_coredns", dns::answers_per_cpu_second_coredns),
    ("dns_p99_us", dns::p99),
    ("gateway_requests_per_cpu_second", gateway::requests_per_cpu_second),
    ("apply_to_first_answer", apply::to_first_answer),
    ("tunnel_direct_throughput", tunnel::direct_throughput),
    ("tunnel_direct_rtt64", tunnel::direct_rtt64),
    ("tunnel_relay_throughput", tunnel::relay_throughput),
    ("l4_connect_services_1", many::connect_1),
    ("agent_rss_5000_endpoints", many::rss_5000_endpoints),
    ("l4_connect_services_1000", many::connect_1000),
    ("l4_connect_services_10000", many::connect_10000),
    ("l4_rtt64_services_10000", many::rtt64_10000),
    ("l4_connect_nftables_10000", many::connect_nftables),
    ("l4_rtt64_nftables_10000", many::rtt64_nftables),
    ("service_change_ms", many::change),
    ("agent_idle_cpu", many::idle_cpu),
    ("services_10000_program_s", many::program),
];

/// Whether the peer of a row is there: CoreDNS needs Go, which Debian 12 doesn't have.
pub(crate) fn can_be_measured(name: &str) -> bool {
    name != "dns_answers_per_cpu_second_coredns" || dns::coredns().is_ok()
}
