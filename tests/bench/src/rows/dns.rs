//! Answers about cluster names per second of CPU time: the agent against unbound with the same names as local data.

use std::{fmt::Write, fs, time::Duration};

use anyhow::{Context, Result, ensure};

use super::Bench;
use crate::{
    cluster::{Cluster, until},
    load::Pair,
    process::cpu_seconds,
    row::{Budget, Row},
    workloads,
};

const NODE: &str = "edge-a1";
const AGENT: (&str, u16) = ("169.254.64.1", 53);
const UNBOUND: (&str, u16) = ("127.0.0.1", 5533);
const NAMES: usize = 50;
const ROUNDS: u32 = 7;

pub(super) fn answers_per_cpu_second(bench: &Bench) -> Result<Row> {
    let cluster = &bench.cluster;
    cluster.apply(&workloads::names(NAMES))?;
    let folder = cluster.folder()?;
    let (mut queries, mut data) = (String::new(), String::new());
    for (service, address) in cluster.service_addresses("name-")? {
        let name = format!("{service}.default.svc.cluster.local");
        writeln!(queries, "{name} A")?;
        writeln!(data, "  local-data: \"{name}. 5 IN A {address}\"")?;
    }
    let (asked, settings) = (folder.join("bench-queries"), folder.join("bench-unbound.conf"));
    fs::write(&asked, queries)?;
    fs::write(&settings, unbound_settings(&data))?;
    let (asked, settings) = (asked.display().to_string(), settings.display().to_string());

    let unbound = cluster.start(NODE, "unbound", &["/usr/sbin/unbound", "-d", "-c", &settings])?;
    let agent = cluster.daemon(NODE, "agent")?;
    for server in [AGENT, UNBOUND] {
        until(&format!("{} answers all names", server.0), Duration::from_secs(20), || {
            let answers = ask(cluster, server, &asked, &["-n", "1"])?;
            ensure!(answers == NAMES as f64, "{answers} of {NAMES} names");
            Ok(())
        })?;
    }
    let one = |server: (&str, u16), pid: i32| -> Result<f64> {
        let before = cpu_seconds(pid)?;
        let answers = ask(cluster, server, &asked, &["-l", "2"])?;
        Ok(answers / (cpu_seconds(pid)? - before))
    };
    let mut pairs = Vec::new();
    for round in 0..bench.rounds(ROUNDS) {
        pairs.push(if round % 2 == 0 {
            let value = one(AGENT, agent)?;
            Pair { value, baseline: one(UNBOUND, unbound.pid)? }
        } else {
            let baseline = one(UNBOUND, unbound.pid)?;
            Pair { value: one(AGENT, agent)?, baseline }
        });
    }
    Row::compared("dns_answers_per_cpu_second", "answers/CPU s", "unbound", &pairs, Some(Budget::RatioAtLeast(1.0)))
}

/// Runs dnsperf and gives the number of good answers; any other is an error.
fn ask(cluster: &Cluster, (server, port): (&str, u16), queries: &str, limit: &[&str]) -> Result<f64> {
    let port = port.to_string();
    let words = ["dnsperf", "-s", server, "-p", &port, "-d", queries, "-c", "10", "-q", "50", "-t", "2"];
    let said = cluster.on(NODE, &[words.as_slice(), limit].concat())?;
    let line = |title: &str| said.lines().find_map(|line| line.trim().strip_prefix(title)).map(str::trim);
    let codes = line("Response codes:").with_context(|| format!("dnsperf: {said}"))?;
    let good: f64 = codes.strip_prefix("NOERROR ").and_then(|rest| rest.split(' ').next()).unwrap_or("0").parse()?;
    ensure!(codes.contains("(100.00%)") && good > 0.0, "answers of {server}: {codes}");
    let lost = line("Queries lost:").unwrap_or_default();
    ensure!(lost.starts_with("0 "), "{server}: queries lost: {lost}");
    Ok(good)
}

fn unbound_settings(data: &str) -> String {
    format!(
        "server:
  interface: {}@{}
  access-control: 127.0.0.0/8 allow
  do-daemonize: no
  username: \"\"
  chroot: \"\"
  pidfile: \"\"
  use-syslog: no
  module-config: \"iterator\"
  num-threads: 1
  local-zone: \"cluster.local.\" static
{data}remote-control:
  control-enable: no
",
        UNBOUND.0, UNBOUND.1
    )
}
