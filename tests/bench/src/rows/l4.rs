//! Service addresses of pods that are reached directly, against the pods' own addresses.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Result, ensure};
use serde_json::json;

use super::Bench;
use crate::{
    cluster::{Client, until},
    load::Kind,
    pairs::Pair,
    row::{Budget, Row},
    workloads::{CONNECT_PORT, DATAGRAM_PORT, STREAM_PORT},
};

/// Short and many: in as much time, six hundred pairs of 15 ms tell a ratio three to six times as exactly as 45 of 200 ms, because
/// both sides of a pair meet the machine in the same state.
pub(super) const EACH: Duration = Duration::from_millis(15);
pub(super) const ROUNDS: u32 = 600;
/// A connection's way to its full speed takes a part of so short a time.
const THROUGHPUT_EACH: Duration = Duration::from_millis(30);
const THROUGHPUT_ROUNDS: u32 = 400;

pub(super) fn same_node_throughput(bench: &Bench) -> Result<Row> {
    measure(bench, "l4_same_node_throughput", "near", Kind::ThroughputOnOneCpu)
}

pub(super) fn same_lan_throughput(bench: &Bench) -> Result<Row> {
    measure(bench, "l4_same_lan_throughput", "lan", Kind::ThroughputOnOneCpu)
}

pub(super) fn same_lan_rtt64(bench: &Bench) -> Result<Row> {
    measure(bench, "l4_same_lan_rtt64", "lan", Kind::RoundTrips)
}

pub(super) fn same_lan_connect(bench: &Bench) -> Result<Row> {
    measure(bench, "l4_same_lan_connect", "lan", Kind::Connect)
}

/// From a socket that is not connected, so that the programs look at every datagram, both ways.
pub(super) fn udp_rtt64(bench: &Bench) -> Result<Row> {
    measure(bench, "l4_udp_rtt64", "lan", Kind::Datagrams)
}

pub(super) fn ipv6_connect(bench: &Bench) -> Result<Row> {
    let budget = Some(Budget::RatioAtMost(1.10));
    Row::compared("l4_ipv6_connect", "us/connection", "endpoint's address", &ipv6(bench, Kind::Connect)?, budget)
}

pub(super) fn ipv6_rtt64(bench: &Bench) -> Result<Row> {
    let budget = Some(Budget::RatioAtLeast(0.98));
    Row::compared("l4_ipv6_rtt64", "round trips/s", "endpoint's address", &ipv6(bench, Kind::RoundTrips)?, budget)
}

/// Pods of the lab have IPv4 addresses only: client and server are processes of a node, and the Service is called at an external
/// address of the node's own.
fn ipv6(bench: &Bench, kind: Kind) -> Result<Vec<Pair>> {
    const NODE: &str = "cloud-1";
    const PORTS: (u16, u16) = (7300, 7301);
    let (service, endpoint) = ("fd00:be::1", "fd00:be::2");
    let cluster = &bench.cluster;
    for address in [service, endpoint] {
        cluster.on(NODE, &["ip", "-6", "address", "replace", &format!("{address}/128"), "dev", "lo"])?;
    }
    let ports = [("stream", PORTS.0), ("connect", PORTS.1)];
    let ports = |port: &str| ports.map(|(name, number)| json!({"name": name, (port): number, "protocol": "TCP"}));
    cluster.apply(&json!({"apiVersion": "v1", "kind": "List", "items": [
        {
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "six"},
            "spec": {"ports": ports("port"), "externalIPs": [service]},
        },
        {
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv6",
            "metadata": {"name": "six", "labels": {"kubernetes.io/service-name": "six"}},
            "ports": ports("port"), "endpoints": [{"addresses": [endpoint], "nodeName": NODE, "conditions": {"ready": true}}],
        },
    ]}))?;
    let (stream, connect) = (PORTS.0.to_string(), PORTS.1.to_string());
    let words = [&cluster.bench(), "serve", "--stream", &stream, "--connect", &connect];
    let _server = cluster.start(NODE, "bench", &words)?;
    let client = Client::Node(NODE);
    let port = if kind == Kind::Connect { PORTS.1 } else { PORTS.0 };
    let at = |address: &str, port| -> Result<SocketAddr> { Ok(SocketAddr::new(address.parse()?, port)) };
    // The server listens at the Service's address, too: only the answer's way tells whether it is translated.
    let programmed = || -> Result<()> {
        let page = cluster.on(NODE, &["curl", "-sSf", "--max-time", "5", "http://127.0.0.1:9442/debug/datapath"])?;
        ensure!(page.contains(&format!("[{service}]:{port}")), "[{service}]:{port} is no frontend yet");
        Ok(())
    };
    until("the agent serves the node's new address", Duration::from_secs(40), programmed)?;
    cluster.answered(client, at(endpoint, PORTS.0)?)?;
    cluster.measure(client, kind, (at(service, port)?, at(endpoint, port)?), bench.rounds(ROUNDS), EACH)
}

fn measure(bench: &Bench, name: &str, server: &str, kind: Kind) -> Result<Row> {
    let (port, unit, budget) = match kind {
        Kind::Throughput | Kind::ThroughputOnOneCpu => (STREAM_PORT, "Gbit/s", Budget::RatioAtLeast(0.98)),
        Kind::RoundTrips => (STREAM_PORT, "round trips/s", Budget::RatioAtLeast(0.98)),
        Kind::Connect => (CONNECT_PORT, "us/connection", Budget::RatioAtMost(1.10)),
        Kind::Datagrams => (DATAGRAM_PORT, "round trips/s", Budget::RatioAtLeast(0.98)),
    };
    let cluster = &bench.cluster;
    let probe = Client::Pod("probe");
    cluster.pod("probe", STREAM_PORT)?;
    let (direct, service) = (cluster.pod(server, port)?, cluster.service(server, port)?);
    cluster.served(probe, kind, service)?;
    let (rounds, each) = match kind {
        Kind::Throughput | Kind::ThroughputOnOneCpu => (THROUGHPUT_ROUNDS, THROUGHPUT_EACH),
        _ => (ROUNDS, EACH),
    };
    let pairs = cluster.measure(probe, kind, (service, direct), bench.rounds(rounds), each)?;
    Row::compared(name, unit, "pod address", &pairs, Some(budget))
}
