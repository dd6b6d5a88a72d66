//! The soak: endpoints come and go under load, and at the end nothing has failed that was healthy, and nothing was kept.

use std::{
    collections::BTreeMap,
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use edgemesh_lab::{command, daemons::Daemon};
use serde_json::{Value, json};

use crate::{
    Case, Field,
    callers::{From, Stream},
    case::Service,
    field::NODES,
    manifests,
};

/// How long a pod serves on after it was told to end: longer than a change takes to every node.
const LINGER: &str = "6";
/// Failures that a killed pod may leave: what was in flight, and what came until its endpoint was gone everywhere.
const AFTER_A_KILL: Duration = Duration::from_secs(5);
/// How long flows, sockets and remembered peers may take to go after the load has ended; a proxied UDP flow ends after 60 s.
const SETTLE: Duration = Duration::from_secs(90);
/// What an agent's memory may grow by from the middle of the time to its end.
const MEMORY_GROWTH_KIB: u64 = 12 * 1024;
/// What counts of descriptors and connections may differ by: the cluster goes on living.
const COUNT_GROWTH: u64 = 16;

/// What a node holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Held {
    /// Resident memory of its agent, KiB.
    pub rss_kib: u64,
    /// Descriptors that its agent has open.
    pub descriptors: u64,
    /// Frontends in the datapath.
    pub frontends: u64,
    /// Sockets that the datapath remembers.
    pub peers: u64,
    /// Entries of its connection tracking.
    pub conntrack: u64,
}

/// What one load came to.
#[derive(Debug, Clone, Default)]
pub struct Load {
    /// Calls.
    pub calls: usize,
    /// Failed calls that nothing excuses, by reason.
    pub failures: BTreeMap<String, usize>,
    /// Failed calls of the Service whose pods are killed, within the time after a kill.
    pub excused: usize,
}

/// What the soak came to.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// By load.
    pub loads: BTreeMap<String, Load>,
    /// Pods replaced, killed, and slices rewritten.
    pub changes: [usize; 3],
    /// By node: before and after.
    pub held: BTreeMap<String, (Held, Held)>,
    /// By node: the agent's memory at each turn, under load.
    pub memory: BTreeMap<String, Vec<u64>>,
}

impl Report {
    /// What was promised and didn't hold.
    pub fn violations(&self) -> Vec<String> {
        let mut all = Vec::new();
        for (name, load) in &self.loads {
            if load.calls == 0 {
                all.push(format!("{name}: nothing was called"));
            }
            all.extend(
                load.failures
                    .iter()
                    .map(|(reason, count)| format!("{name}: {count} of {} calls failed: {reason}", load.calls)),
            );
        }
        for (node, (before, after)) in &self.held {
            let mut check = |what: &str, before: u64, after: u64, growth: u64| {
                if after > before + growth {
                    all.push(format!("{node}: {what} grew from {before} to {after}"));
                }
            };
            check("agent descriptors", before.descriptors, after.descriptors, COUNT_GROWTH);
            check("frontends", before.frontends, after.frontends, 0);
            check("remembered sockets", before.peers, after.peers, COUNT_GROWTH);
            check("tracked connections", before.conntrack, after.conntrack, 8 * COUNT_GROWTH);
        }
        for (node, samples) in &self.memory {
            // The first third fills caches and starts what is started once; a leak goes on after it.
            let third = samples.len() / 3;
            let most = |part: &[u64]| part.iter().max().copied().unwrap_or_default();
            let (middle, last) = (most(&samples[third..2 * third]), most(&samples[2 * third..]));
            if third > 0 && last > middle + MEMORY_GROWTH_KIB {
                all.push(format!("{node}: agent memory (KiB) under load grew from {middle} to {last}"));
            }
        }
        all
    }

    /// As text.
    pub fn text(&self) -> String {
        let mut out = format!(
            "changes: {} pods replaced, {} killed, {} slices rewritten\n{:<26} {:>8} {:>8} {:>8}\n",
            self.changes[0], self.changes[1], self.changes[2], "LOAD", "CALLS", "FAILED", "EXCUSED"
        );
        for (name, load) in &self.loads {
            let failed: usize = load.failures.values().sum();
            out.push_str(&format!("{name:<26} {:>8} {failed:>8} {:>8}\n", load.calls, load.excused));
        }
        out.push_str(&format!(
            "{:<10} {:>18} {:>14} {:>12} {:>14} {:>14}\n",
            "NODE", "AGENT RSS KiB", "DESCRIPTORS", "FRONTENDS", "REMEMBERED", "CONNTRACK"
        ));
        for (node, (before, after)) in &self.held {
            let pair = |before: u64, after: u64| format!("{before}→{after}");
            out.push_str(&format!(
                "{node:<10} {:>18} {:>14} {:>12} {:>14} {:>14}\n",
                pair(before.rss_kib, after.rss_kib),
                pair(before.descriptors, after.descriptors),
                pair(before.frontends, after.frontends),
                pair(before.peers, after.peers),
                pair(before.conntrack, after.conntrack)
            ));
        }
        out
    }
}

/// Runs it for a time.
///
/// # Errors
/// When the lab fails; what the mesh does wrong is in the report.
pub fn run(field: &Field, duration: Duration) -> Result<Report> {
    let case = Case { field, id: "soak".to_owned() };
    let mut report = Report::default();
    warm_up(&case)?;
    for node in NODES {
        forget_soon(field, node)?;
        report.held.insert(node.to_owned(), (held(field, node)?, Held::default()));
    }
    let replaced = Group::start(&case, "replaced", &[LINGER])?;
    let killed = Group::start(&case, "killed", &["0"])?;
    let rewritten = case.service("rewritten", json!({"selector": null}))?;
    rewrite(&case, &rewritten, 0)?;

    let services = [("replaced", &replaced.service), ("killed", &killed.service), ("rewritten", &rewritten)];
    let mut streams = Vec::new();
    for (name, service) in services {
        for client in ["client-cloud-2", "client-edge-a1"] {
            for port in ["http", "udp"] {
                case.until(&format!("{name} answers"), Duration::from_secs(20), || {
                    let outcomes = case.calls(From::Pod(client), &service.url(port), 10)?;
                    ensure!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
                    Ok(())
                })?;
                let options = ["--every", "10", "--timeout", "4000"];
                let stream = case.stream(From::Pod(client), &options, &service.url(port))?;
                streams.push((name, format!("{name} {port} {client}"), stream));
            }
        }
    }
    let kills = churn(&case, duration, replaced, killed, &rewritten, &mut report)?;
    // Those that are under way when the load ends have their answer by then, or are not counted.
    for (name, load, stream) in streams {
        report.loads.insert(load, count(name, &stream, &kills));
    }
    clean_up(&case)?;
    settle(&case, &mut report)?;
    Ok(report)
}

/// Two pods behind a Service, one in the cloud and one at the edge, that take turns in being replaced.
struct Group {
    of: &'static str,
    linger: &'static str,
    service: Service,
    /// The newest pod of each node, and its number.
    pods: [(&'static str, usize); 2],
}

impl Group {
    fn start(case: &Case<'_>, of: &'static str, linger: &[&'static str]) -> Result<Self> {
        let service = case.service(of, json!({"selector": {"soak": of}}))?;
        let group = Self { of, linger: linger[0], service, pods: [("cloud-1", 0), ("edge-b1", 0)] };
        for (node, number) in group.pods {
            group.create(case, node, number)?;
        }
        Ok(group)
    }

    fn name(&self, case: &Case<'_>, node: &str, number: usize) -> String {
        case.name(&format!("{}-{node}-{number}", self.of))
    }

    /// A pod that becomes an endpoint once it answers. There are no readiness probes yet: a container that runs is ready, though
    /// its server may not listen for some milliseconds more, and a datagram that comes then is lost.
    fn create(&self, case: &Case<'_>, node: &str, number: usize) -> Result<()> {
        let name = self.name(case, node, number);
        let ip = case.pod(manifests::pod(&name, node, &[("case", &case.id)], &["--linger", self.linger]))?;
        for url in [format!("http://{ip}:8080/"), format!("udp://{ip}:7000")] {
            case.until(&format!("{name} listens"), Duration::from_secs(20), || {
                let outcomes = case.calls(From::Node(node), &url, 1)?;
                ensure!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
                Ok(())
            })?;
        }
        case.field.kubectl(&format!("label pod {name} soak={}", self.of), "").map(drop)
    }

    /// A new pod takes the place of the older one on a node.
    fn replace(&mut self, case: &Case<'_>, turn: usize, how: &str) -> Result<()> {
        let (node, number) = self.pods[turn % self.pods.len()];
        self.create(case, node, number + 1)?;
        // The new one is known everywhere before the old one goes, as a rolling update does it.
        let new = self.name(case, node, number + 1);
        case.until(&format!("{new} answers"), Duration::from_secs(20), || {
            let outcomes = case.calls(From::Pod("client-edge-a1"), &self.service.url("http"), 24)?;
            ensure!(outcomes.iter().flatten().any(|answer| answer.pod == new), "not yet");
            Ok(())
        })?;
        case.delete(&format!("pod {} {how}", self.name(case, node, number)))?;
        self.pods[turn % self.pods.len()].1 = number + 1;
        Ok(())
    }
}

/// Puts two of the shared servers into a Service's slice, others at each turn but one.
fn rewrite(case: &Case<'_>, service: &Service, turn: usize) -> Result<()> {
    let mut endpoints = Vec::new();
    for offset in [0, 1] {
        let node = NODES[(turn + offset) % NODES.len()];
        endpoints.push(manifests::endpoint(case.field.pod_ip(&format!("server-{node}"))?, node, true));
    }
    let slice = manifests::slice(&case.name("rewritten"), &service.name, manifests::slice_ports(), endpoints);
    case.field.apply(&[slice]).map(drop)
}

/// Changes endpoints until the time is over; gives when pods were killed.
fn churn(
    case: &Case<'_>,
    duration: Duration,
    mut replaced: Group,
    mut killed: Group,
    rewritten: &Service,
    report: &mut Report,
) -> Result<Vec<Instant>> {
    let begin = Instant::now();
    let mut kills = Vec::new();
    let mut turn = 0;
    while begin.elapsed() < duration {
        turn += 1;
        for step in 0..5 {
            rewrite(case, rewritten, turn * 5 + step)?;
            report.changes[2] += 1;
        }
        replaced.replace(case, turn, "--grace-period=20")?;
        report.changes[0] += 1;
        let at = Instant::now();
        for node in NODES {
            let held = held(case.field, node)?;
            report.memory.entry(node.to_owned()).or_default().push(held.rss_kib);
        }
        killed.replace(case, turn, "--grace-period=0 --force")?;
        kills.extend([at, Instant::now()]);
        report.changes[1] += 1;
    }
    Ok(kills)
}

fn count(name: &str, stream: &Stream, kills: &[Instant]) -> Load {
    let mut load = Load::default();
    for (outcome, at) in stream.timed_outcomes() {
        load.calls += 1;
        let Err(reason) = outcome else { continue };
        // A failed call is seen when its own deadline is over.
        let near_a_kill = kills.iter().any(|kill| at >= *kill && at < *kill + AFTER_A_KILL + Duration::from_secs(4));
        if name == "killed" && near_a_kill {
            load.excused += 1;
        } else {
            *load.failures.entry(reason).or_default() += 1;
        }
    }
    load
}

/// Opens what is opened once: tunnels, caches.
fn warm_up(case: &Case<'_>) -> Result<()> {
    let service = case.service("warm", json!({}))?;
    for client in NODES.map(|node| format!("client-{node}")) {
        for port in ["http", "udp"] {
            case.reaches(
                From::Pod(&client),
                &service.url(port),
                &NODES.map(|node| format!("server-{node}")).each_ref().map(String::as_str),
            )?;
        }
    }
    case.delete(&format!("service {}", service.name))
}

fn clean_up(case: &Case<'_>) -> Result<()> {
    let services = ["replaced", "killed", "rewritten"].map(|of| case.name(of)).join(" ");
    case.field.kubectl(&format!("delete service {services}"), "")?;
    case.field.kubectl(&format!("delete pods -l case={} --grace-period=0 --force", case.id), "")?;
    case.field.kubectl(&format!("delete endpointslice {} --ignore-not-found", case.name("rewritten")), "").map(drop)
}

/// Waits until no node holds more than before, for some time; puts down what they hold then.
fn settle(case: &Case<'_>, report: &mut Report) -> Result<()> {
    let begin = Instant::now();
    loop {
        for (node, (_, after)) in &mut report.held {
            *after = held(case.field, node)?;
        }
        let growth = Report { held: report.held.clone(), ..Report::default() };
        if growth.violations().is_empty() || begin.elapsed() > SETTLE {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(500));
    }
}

/// Lets the kernel forget connections that have ended in seconds, not minutes: what is left later was not let go.
fn forget_soon(field: &Field, node: &str) -> Result<()> {
    let times = [
        "tcp_timeout_time_wait",
        "tcp_timeout_close",
        "tcp_timeout_close_wait",
        "tcp_timeout_fin_wait",
        "tcp_timeout_last_ack",
    ];
    for name in times.into_iter().chain(["udp_timeout", "udp_timeout_stream", "tcp_timeout_syn_sent"]) {
        let line = format!("echo 10 > /proc/sys/net/netfilter/nf_conntrack_{name}");
        let words = ["sh", "-c", &line].map(str::to_owned);
        command::finish(&mut field.lab.namespace(node).command("shell", &words)?)?;
    }
    Ok(())
}

fn held(field: &Field, node: &str) -> Result<Held> {
    let host = field.lab.namespace(node);
    let agent = Daemon::Agent.process(&host)?.context("the agent doesn't run")?;
    let status = fs::read_to_string(format!("/proc/{agent}/status"))?;
    let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
    let on_node = |words: &[&str]| -> Result<String> {
        let words: Vec<_> = words.iter().map(|word| (*word).to_owned()).collect();
        command::finish(&mut host.command("shell", &words)?)
    };
    let page = on_node(&["curl", "-sSf", "--max-time", "5", "http://127.0.0.1:9442/debug/datapath"])?;
    let page: Value = serde_json::from_str(&page)?;
    // A kernel that tracks nothing in this namespace has no such file.
    let conntrack = on_node(&["cat", "/proc/sys/net/netfilter/nf_conntrack_count"]).unwrap_or_default();
    Ok(Held {
        rss_kib: rss.trim().trim_end_matches(" kB").parse()?,
        descriptors: fs::read_dir(format!("/proc/{agent}/fd"))?.count() as u64,
        frontends: page["frontends"].as_array().map_or(0, |frontends| frontends.len() as u64),
        peers: page["rememberedPeers"].as_u64().unwrap_or_default(),
        conntrack: conntrack.trim().parse().unwrap_or_default(),
    })
}
