//! Service addresses of pods that are reached directly, against the pods' own addresses.

use std::time::Duration;

use anyhow::Result;

use super::Bench;
use crate::{
    cluster::Client,
    load::Kind,
    row::{Budget, Row},
    workloads::{CONNECT_PORT, STREAM_PORT},
};

/// Short and many, so that other work on the machine falls on both sides alike.
const EACH: Duration = Duration::from_millis(200);
const ROUNDS: u32 = 45;

pub(super) fn same_node_throughput(bench: &Bench) -> Result<Row> {
    measure(bench, "l4_same_node_throughput", "near", Kind::Throughput)
}

pub(super) fn same_lan_throughput(bench: &Bench) -> Result<Row> {
    measure(bench, "l4_same_lan_throughput", "lan", Kind::Throughput)
}

pub(super) fn same_lan_rtt64(bench: &Bench) -> Result<Row> {
    measure(bench, "l4_same_lan_rtt64", "lan", Kind::RoundTrips)
}

pub(super) fn same_lan_connect(bench: &Bench) -> Result<Row> {
    measure(bench, "l4_same_lan_connect", "lan", Kind::Connect)
}

fn measure(bench: &Bench, name: &str, server: &str, kind: Kind) -> Result<Row> {
    let (port, unit, budget) = match kind {
        Kind::Throughput => (STREAM_PORT, "Gbit/s", Budget::RatioAtLeast(0.98)),
        Kind::RoundTrips => (STREAM_PORT, "round trips/s", Budget::RatioAtLeast(0.98)),
        Kind::Connect => (CONNECT_PORT, "us/connection", Budget::RatioAtMost(1.10)),
    };
    let cluster = &bench.cluster;
    let probe = Client::Pod("probe");
    cluster.pod("probe", STREAM_PORT)?;
    let (direct, service) = (cluster.pod(server, port)?, cluster.service(server, port)?);
    cluster.answered(probe, cluster.service(server, STREAM_PORT)?)?;
    let pairs = cluster.measure(probe, kind, (service, direct), bench.rounds(ROUNDS), EACH)?;
    Row::compared(name, unit, "pod address", &pairs, Some(budget))
}
