//! Answers about cluster names: the agent against unbound with the same names as local data, and against CoreDNS.

use std::{fmt::Write, fs, net::Ipv4Addr, path::PathBuf, time::Duration};

use anyhow::{Context, Result, ensure};

use super::Bench;
use crate::{
    cluster::{Client, Cluster, until},
    pairs::by_turns,
    process::{Background, cpu_seconds},
    row::{Budget, Row},
    workloads,
};

const NODE: &str = "edge-a1";
const AGENT: (&str, u16) = ("169.254.64.1", 53);
const UNBOUND: (&str, u16) = ("127.0.0.1", 5533);
const COREDNS: (&str, u16) = ("127.0.0.1", 5534);
const NAMES: usize = 50;
const ROUNDS: u32 = 7;

pub(super) fn answers_per_cpu_second(bench: &Bench) -> Result<Row> {
    let questions = Questions::ask_for(&bench.cluster)?;
    let unbound = questions.unbound(&bench.cluster)?;
    answers_against(bench, &questions, "dns_answers_per_cpu_second", ("unbound", UNBOUND, &unbound))
}

/// CoreDNS with its kubernetes plugin on the same API.
pub(super) fn answers_per_cpu_second_coredns(bench: &Bench) -> Result<Row> {
    let questions = Questions::ask_for(&bench.cluster)?;
    let coredns = questions.coredns(&bench.cluster)?;
    answers_against(bench, &questions, "dns_answers_per_cpu_second_coredns", ("CoreDNS", COREDNS, &coredns))
}

/// How long an answer takes while 1,000 are asked for each second.
pub(super) fn p99(bench: &Bench) -> Result<Row> {
    let cluster = &bench.cluster;
    let questions = Questions::ask_for(cluster)?;
    let _unbound = questions.unbound(cluster)?;
    let one = |server: (&str, u16)| -> Result<f64> {
        let server = format!("{}:{}", server.0, server.1);
        let words = ["latency", &server, "--names", &questions.file, "--per-second", "1000", "--milliseconds", "2000"];
        Ok(cluster.bench_at(Client::Node(NODE), &words)?.trim().parse()?)
    };
    let pairs = by_turns(bench.rounds(ROUNDS), || one(AGENT), || one(UNBOUND))?;
    Row::compared("dns_p99_us", "us", "unbound", &pairs, Some(Budget::ValueAtMost(1000.0)))
}

fn answers_against(
    bench: &Bench,
    questions: &Questions,
    row: &str,
    (name, server, peer): (&str, (&str, u16), &Background),
) -> Result<Row> {
    let cluster = &bench.cluster;
    let agent = cluster.daemon(NODE, "agent")?;
    let one = |server: (&str, u16), pid: i32| -> Result<f64> {
        let before = cpu_seconds(pid)?;
        let answers = ask(cluster, server, &questions.file, &["-l", "2"])?;
        Ok(answers / (cpu_seconds(pid)? - before))
    };
    let pairs = by_turns(bench.rounds(ROUNDS), || one(AGENT, agent), || one(server, peer.pid))?;
    Row::compared(row, "answers/CPU s", name, &pairs, Some(Budget::RatioAtLeast(1.0)))
}

/// The names of [`NAMES`] Services with their addresses.
struct Questions {
    names: Vec<(String, Ipv4Addr)>,
    /// dnsperf's file.
    file: String,
}

impl Questions {
    fn ask_for(cluster: &Cluster) -> Result<Self> {
        cluster.apply(&workloads::names(NAMES))?;
        let mut names = cluster.service_addresses("name-")?;
        let mut queries = String::new();
        for (name, _) in &mut names {
            *name = format!("{name}.default.svc.cluster.local");
            writeln!(queries, "{name} A")?;
        }
        let file = cluster.folder()?.join("bench-queries");
        fs::write(&file, queries)?;
        let questions = Self { names, file: file.display().to_string() };
        questions.answered_by(cluster, AGENT)?;
        Ok(questions)
    }

    fn answered_by(&self, cluster: &Cluster, server: (&str, u16)) -> Result<()> {
        until(&format!("{} answers all names", server.0), Duration::from_secs(20), || {
            let answers = ask(cluster, server, &self.file, &["-n", "1"])?;
            ensure!(answers == NAMES as f64, "{answers} of {NAMES} names");
            Ok(())
        })
    }

    fn unbound(&self, cluster: &Cluster) -> Result<Background> {
        let mut data = String::new();
        for (name, address) in &self.names {
            writeln!(data, "  local-data: \"{name}. 5 IN A {address}\"")?;
        }
        let settings = cluster.folder()?.join("bench-unbound.conf");
        fs::write(&settings, unbound_settings(&data))?;
        let words = ["/usr/sbin/unbound", "-d", "-c", &settings.display().to_string()];
        let unbound = cluster.start(NODE, "unbound", &words)?;
        self.answered_by(cluster, UNBOUND)?;
        Ok(unbound)
    }

    fn coredns(&self, cluster: &Cluster) -> Result<Background> {
        let program = coredns()?.display().to_string();
        let settings = cluster.folder()?.join("bench-corefile");
        let kubeconfig = cluster.kubeconfig()?;
        let (address, port) = COREDNS;
        // The agent serves the cluster's names without waiting for anything else; neither do these settings.
        let text = format!(
            ".:{port} {{\n  bind {address}\n  kubernetes cluster.local {{\n    kubeconfig {kubeconfig}\n  }}\n}}\n"
        );
        fs::write(&settings, text)?;
        let words = [&program, "-conf", &settings.display().to_string()];
        let coredns = cluster.start(NODE, "coredns", &words)?;
        self.answered_by(cluster, COREDNS)?;
        Ok(coredns)
    }
}

/// Where the set-up puts CoreDNS, which it builds where Go is.
///
/// # Errors
/// When it isn't there.
pub(super) fn coredns() -> Result<PathBuf> {
    let home = std::env::var_os("HOME").map(PathBuf::from).context("HOME is not set")?;
    let program = home.join(".cache/edgemesh/coredns/coredns");
    ensure!(
        program.is_file(),
        "no {}: scripts/setup.sh --bench builds it where Go 1.23 or newer is",
        program.display()
    );
    Ok(program)
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
