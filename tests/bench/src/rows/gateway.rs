//! HTTP/1.1 requests per second of the proxy's CPU time: the gateway against Envoy, on the same node with the same backend.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::Bench;
use crate::{
    cluster::{Cluster, until},
    pairs::by_turns,
    process::cpu_seconds,
    row::{Budget, Row},
    workloads::{self, GATEWAY_PORT, HTTP_PORT},
};

const NODE: &str = "edge-b1";
const ENVOY_PORT: u16 = GATEWAY_PORT + 1;
const ROUNDS: u32 = 7;

pub(super) fn requests_per_cpu_second(bench: &Bench) -> Result<Row> {
    let cluster = &bench.cluster;
    cluster.apply(&workloads::gateway())?;
    let backend = cluster.pod("web", HTTP_PORT)?;
    let address = cluster.node_address(NODE)?;
    let settings = cluster.folder()?.join("bench-envoy.yaml");
    fs::write(&settings, envoy_settings(&backend.ip().to_string()).to_string())?;
    let program = envoy()?.display().to_string();
    let settings = settings.display().to_string();
    let words = [
        &program,
        "-c",
        &settings,
        "--concurrency",
        "2",
        "--log-level",
        "error",
        "--base-id",
        "77",
        "--disable-hot-restart",
    ];
    let envoy = cluster.start(NODE, "envoy", &words)?;
    let gateway = cluster.daemon(NODE, "gateway")?;

    let url = |port: u16| format!("http://{address}:{port}/");
    for port in [GATEWAY_PORT, ENVOY_PORT] {
        until(&format!("{} answers", url(port)), Duration::from_secs(30), || {
            cluster.on(NODE, &["curl", "-sSf", "--max-time", "5", &url(port)]).map(drop)
        })?;
    }
    let one = |port: u16, pid: i32| -> Result<f64> {
        let before = cpu_seconds(pid)?;
        let answers = load(cluster, &url(port))?;
        Ok(answers / (cpu_seconds(pid)? - before))
    };
    let pairs = by_turns(bench.rounds(ROUNDS), || one(GATEWAY_PORT, gateway), || one(ENVOY_PORT, envoy.pid))?;
    Row::compared("gateway_requests_per_cpu_second", "requests/CPU s", "Envoy", &pairs, Some(Budget::RatioAtLeast(1.0)))
}

/// Runs h2load over 16 kept connections and gives the number of requests that were answered with 2xx.
fn load(cluster: &Cluster, url: &str) -> Result<f64> {
    let said = cluster.on(NODE, &["h2load", "--h1", "-c", "16", "-t", "1", "-D", "2", url])?;
    let line = said.lines().find_map(|line| line.strip_prefix("status codes: "));
    let codes: Vec<f64> = line
        .with_context(|| format!("h2load: {said}"))?
        .split(", ")
        .filter_map(|part| part.split(' ').next()?.parse().ok())
        .collect();
    ensure!(codes.len() == 4 && codes[0] > 0.0 && codes[1..].iter().all(|n| *n == 0.0), "{url}: {line:?}");
    Ok(codes[0])
}

/// Envoy's own program, inside the Python package that brings it.
fn envoy() -> Result<PathBuf> {
    let home = std::env::var_os("HOME").map(PathBuf::from).context("HOME is not set")?;
    let libraries = home.join(".cache/edgemesh/envoy/lib");
    let versions =
        fs::read_dir(&libraries).with_context(|| format!("{}: run scripts/setup.sh --bench", libraries.display()))?;
    let mut programs = versions.flatten().map(|version| version.path().join("site-packages/envoy/_bin/envoy"));
    programs.find(|program| program.is_file()).with_context(|| format!("no Envoy below {}", libraries.display()))
}

fn envoy_settings(backend: &str) -> Value {
    let socket = |address: &str, port: u16| json!({"socket_address": {"address": address, "port_value": port}});
    json!({"static_resources": {
        "listeners": [{"name": "http", "address": socket("0.0.0.0", ENVOY_PORT), "filter_chains": [{"filters": [{
            "name": "envoy.filters.network.http_connection_manager",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
                "stat_prefix": "bench", "use_remote_address": true,
                "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "web"}}]}]},
                "http_filters": [{"name": "envoy.filters.http.router", "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router",
                }}],
            },
        }]}]}],
        "clusters": [{"name": "web", "type": "STATIC", "connect_timeout": "5s", "load_assignment": {
            "cluster_name": "web", "endpoints": [{"lb_endpoints": [{"endpoint": {"address": socket(backend, HTTP_PORT)}}]}],
        }}],
    }})
}
