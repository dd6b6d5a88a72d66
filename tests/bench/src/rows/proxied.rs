//! The proxied path on one node against HAProxy: CPU time for bytes and for connections, with the same client and server.

use std::{fs, net::SocketAddr, time::Duration};

use anyhow::{Result, bail};
use serde_json::json;

use super::Bench;
use crate::{
    cluster::{Client, Cluster},
    load::Kind,
    pairs::{Pair, by_turns},
    process::{Background, cpu_seconds},
    row::{Budget, Row},
    workloads::{CONNECT_PORT, STREAM_PORT},
};

const NODE: &str = "edge-a1";
const HAPROXY: &str = "haproxy";
/// Added to a server's port.
const HAPROXY_PORTS: u16 = 2000;
const CONNECTIONS: &str = "edgemesh_agent_service_connections_total";
const EJECTIONS: &str = "edgemesh_agent_proxied_ejections_total";
const TIME: Duration = Duration::from_millis(300);
const ROUNDS: u32 = 20;
/// CPU time for a connection differs by a tenth from sample to sample, whoever's it is.
const CONNECTION_ROUNDS: u32 = 80;
/// Services that are tried. The near endpoint has the same hash in each of them, and a far one must have a lower: with `n` of them all
/// are higher once in `n + 1` clusters, so sixteen were too few.
const TRIED: u16 = 255;

pub(super) fn per_gbyte(bench: &Bench) -> Result<Row> {
    let pairs = measure(bench, Kind::Throughput, 1e9, ROUNDS)?;
    Row::compared("proxied_l4_cpu_per_gbyte", "CPU s/GB", "HAProxy", &pairs, Some(Budget::RatioAtMost(1.0)))
}

pub(super) fn per_connection(bench: &Bench) -> Result<Row> {
    let pairs = measure(bench, Kind::Connect, 1e6, CONNECTION_ROUNDS)?;
    let budget = Some(Budget::RatioAtMost(1.0));
    Row::compared("proxied_l4_cpu_per_connection", "CPU us/connection", "HAProxy", &pairs, budget)
}

/// CPU seconds of the proxy for `unit` bytes or connections.
fn measure(bench: &Bench, kind: Kind, unit: f64, rounds: u32) -> Result<Vec<Pair>> {
    let cluster = &bench.cluster;
    let port = if kind == Kind::Throughput { STREAM_PORT } else { CONNECT_PORT };
    let server = cluster.pod("near", port)?;
    let haproxy = start_haproxy(cluster, kind, server)?;
    let peer = SocketAddr::new(cluster.node_address(NODE)?.into(), port + HAPROXY_PORTS);
    let service = proxied_service(cluster, kind, server)?;
    let agent = cluster.daemon(NODE, "agent")?;
    let probe = Client::Pod("probe");
    let one = |address: SocketAddr, pid: i32| -> Result<f64> {
        let before = cpu_seconds(pid)?;
        let done = cluster.load(probe, kind, address, TIME)?;
        Ok((cpu_seconds(pid)? - before) / done * unit)
    };
    by_turns(bench.rounds(rounds), || one(service, agent), || one(peer, haproxy.pid))
}

fn start_haproxy(cluster: &Cluster, kind: Kind, server: SocketAddr) -> Result<Background> {
    let settings = cluster.folder()?.join("bench-haproxy.cfg");
    let port = server.port() + HAPROXY_PORTS;
    // It writes a line for each connection to its standard output, as the agent does.
    let text = format!(
        "global\n  maxconn 4096\n  log stdout format raw daemon\n\
         defaults\n  mode tcp\n  log global\n  option tcplog\n\
         \x20 timeout connect 5s\n  timeout client 60s\n  timeout server 60s\n\
         listen bench\n  bind 0.0.0.0:{port}\n  server near {server}\n"
    );
    fs::write(&settings, text)?;
    let haproxy = cluster.start(NODE, HAPROXY, &["/usr/sbin/haproxy", "-db", "-f", &settings.display().to_string()])?;
    cluster.served(Client::Pod("probe"), kind, SocketAddr::new(cluster.node_address(NODE)?.into(), port))?;
    Ok(haproxy)
}

/// A Service whose connections from the probe pass the agent and end at the near server. It has a second endpoint in another network, is
/// asked to spread over both, and keeps a client at its endpoint: which of the two that is depends on their ports, so
/// some are tried.
fn proxied_service(cluster: &Cluster, kind: Kind, server: SocketAddr) -> Result<SocketAddr> {
    let far = cluster.pod("web", server.port())?;
    for number in 0..TRIED {
        let name = format!("proxied-{}-{number}", server.port());
        let endpoint = |address: SocketAddr, node: &str| json!({"addresses": [address.ip()], "nodeName": node, "conditions": {"ready": true}});
        let slice = |part: &str, port: u16, endpoint: serde_json::Value| {
            json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
                "metadata": {"name": format!("{name}-{part}"), "labels": {"kubernetes.io/service-name": name}},
                "ports": [{"name": "", "port": port, "protocol": "TCP"}], "endpoints": [endpoint],
            })
        };
        cluster.apply(&json!({"apiVersion": "v1", "kind": "List", "items": [
            {
                "apiVersion": "v1", "kind": "Service",
                "metadata": {"name": name, "annotations": {"edgemesh.dev/endpoint-choice": "kubernetes"}},
                "spec": {"ports": [{"port": server.port()}], "sessionAffinity": "ClientIP"},
            },
            slice("near", server.port(), endpoint(server, NODE)),
            slice("far", server.port() + number, endpoint(far, "edge-b1")),
        ]}))?;
        let service = cluster.service(&name, server.port())?;
        let near = || {
            cluster.agent_sum(NODE, CONNECTIONS, |labels| {
                labels.contains("path=\"proxied\"") && labels.contains(&format!("service=\"{name}\""))
            })
        };
        // Nobody listens at the far one: if that was tried first, it has been put aside for a while.
        let ejected = || cluster.agent_sum(NODE, EJECTIONS, |_| true);
        let before = ejected()?;
        cluster.served(Client::Pod("probe"), kind, service)?;
        if near()? > 0.0 && ejected()? == before {
            return Ok(service);
        }
    }
    bail!("of {TRIED} Services none leads to the near endpoint");
}
