//! The tunnel between two sites, against TCP on the same path: through the port that site b's router forwards, and for the
//! relay through a plain forwarder on the relay's node. Client and server are the same processes on both sides of a pair.

use std::{
    net::{SocketAddr, SocketAddrV4},
    time::Duration,
};

use anyhow::{Result, ensure};

use super::Bench;
use crate::{
    cluster::{Client, Cluster, until},
    load::Kind,
    pairs::Pair,
    row::Row,
    workloads::FORWARDED_PORT,
};

const EACH: Duration = Duration::from_millis(1500);
const ROUNDS: u32 = 7;
/// Hole punching, or finding out that a direct connection is dead, takes its time.
const PATH_DEADLINE: Duration = Duration::from_secs(60);
const STREAMS: &str = "edgemesh_tunnel_streams_opened_total";
const DIRECT: &[&str] = &["quic", "tcp"];
const RELAY: &[&str] = &["relay"];
const FORWARDER_PORT: u16 = 20_000;

pub(super) fn direct_throughput(bench: &Bench) -> Result<Row> {
    let pairs = direct(bench, Kind::Throughput)?;
    Row::compared("tunnel_direct_throughput", "Gbit/s", "TCP through a forwarded port", &pairs, None)
}

pub(super) fn direct_rtt64(bench: &Bench) -> Result<Row> {
    let pairs = direct(bench, Kind::RoundTrips)?;
    Row::compared("tunnel_direct_rtt64", "round trips/s", "TCP through a forwarded port", &pairs, None)
}

fn direct(bench: &Bench, kind: Kind) -> Result<Vec<Pair>> {
    let cluster = &bench.cluster;
    let ends = (service(cluster)?, forwarded(cluster)?);
    measure(bench, kind, ends, DIRECT, RELAY)
}

/// Cuts what is direct between the two nodes for the time of the measurement.
pub(super) fn relay_throughput(bench: &Bench) -> Result<Row> {
    let cluster = &bench.cluster;
    let service = service(cluster)?;
    let target = forwarded(cluster)?.to_string();
    let port = FORWARDER_PORT.to_string();
    let _forwarder = cluster.start("cloud-1", "bench", &[&cluster.bench(), "forward", "--port", &port, &target])?;
    let plain = SocketAddr::V4(SocketAddrV4::new(cluster.node_address("cloud-1")?, FORWARDER_PORT));
    cluster.run(&["cut", "edge-a1", "edge-b1"])?;
    let pairs = measure(bench, Kind::Throughput, (service, plain), RELAY, DIRECT);
    cluster.run(&["heal", "edge-a1", "edge-b1"])?;
    Row::compared("tunnel_relay_throughput", "Gbit/s", "TCP through a forwarder at the relay", &pairs?, None)
}

fn service(cluster: &Cluster) -> Result<SocketAddr> {
    cluster.pod("far", FORWARDED_PORT)?;
    cluster.service("far", FORWARDED_PORT)
}

fn forwarded(cluster: &Cluster) -> Result<SocketAddr> {
    Ok(SocketAddr::V4(SocketAddrV4::new(cluster.public_address("site-b")?, FORWARDED_PORT)))
}

/// Waits until new streams take a path of `wanted`, measures, and makes sure that none took another.
fn measure(
    bench: &Bench,
    kind: Kind,
    ends: (SocketAddr, SocketAddr),
    wanted: &[&str],
    other: &[&str],
) -> Result<Vec<Pair>> {
    let cluster = &bench.cluster;
    let client = Client::Node("edge-a1");
    let streams = |paths: &[&str]| cluster.agent_counter("edge-a1", STREAMS, paths);
    cluster.answered(client, ends.1)?;
    until(&format!("streams to edge-b1 take the path {wanted:?}"), PATH_DEADLINE, || {
        let (right, wrong) = (streams(wanted)?, streams(other)?);
        cluster.on("edge-a1", &[&cluster.bench(), "ask", &ends.0.to_string()])?;
        let (more, less) = (streams(wanted)? - right, streams(other)? - wrong);
        ensure!(more > 0.0 && less == 0.0, "{more} streams took it, {less} another");
        Ok(())
    })?;
    let (right, wrong) = (streams(wanted)?, streams(other)?);
    let pairs = cluster.measure(client, kind, ends, bench.rounds(ROUNDS), EACH)?;
    let (more, less) = (streams(wanted)? - right, streams(other)? - wrong);
    ensure!(
        more > pairs.len() as f64 && less == 0.0,
        "of the streams measured, {more} took {wanted:?}, {less} {other:?}"
    );
    Ok(pairs)
}
