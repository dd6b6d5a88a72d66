//! The soak: endpoints come and go under load, and at the end nothing has failed that was healthy, and nothing was kept.

use std::{
    collections::{BTreeMap, BTreeSet},
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
    field::{NAMESPACE, NODES},
    manifests,
};

/// How long a pod serves on after it was told to end: longer than a change takes to every node.
const LINGER: &str = "6";
/// By when after a kill its endpoint must be gone everywhere: calls that began later may not fail.
const AFTER_A_KILL: Duration = Duration::from_secs(1);
/// How many calls of a load may fail for each kill.
const MOST_EXCUSED: usize = 5;
/// How long flows, sockets and remembered peers may take to go after the load has ended; a proxied UDP flow ends after 60 s.
const SETTLE: Duration = Duration::from_secs(90);
/// From when an agent's memory is looked at: UDP flows through it end after this time without a datagram, so that it grows until then.
const FULL_LOAD: Duration = Duration::from_secs(60);
/// What an agent's memory may grow by from the first half of the time under full load to the second.
const MEMORY_GROWTH_KIB: u64 = 4 * 1024;
/// What counts of descriptors and connections may differ by: the cluster goes on living.
const COUNT_GROWTH: u64 = 16;

/// From where is called: straight to endpoints, and through the tunnel.
const CLIENTS: [&str; 2] = ["client-cloud-2", "client-edge-a1"];
/// The node of the endpoint that the steady Service keeps.
const STEADY: &str = "cloud-1";

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
    /// All gauges among the agent's metrics, by name and labels.
    pub gauges: BTreeMap<String, u64>,
}

/// What one load came to.
#[derive(Debug, Clone, Default)]
pub struct Load {
    /// Calls.
    pub calls: usize,
    /// Failed calls that nothing excuses, by reason.
    pub failures: BTreeMap<String, usize>,
    /// Failed calls of the Service whose pods are killed, of those that began before a kill or shortly after it.
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
    /// By node: the agent's memory at each turn under full load.
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
            if load.excused > MOST_EXCUSED * self.changes[1] {
                all.push(format!("{name}: {} calls failed for {} kills", load.excused, self.changes[1]));
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
            for (name, value) in &after.gauges {
                check(name, before.gauges.get(name).copied().unwrap_or_default(), *value, COUNT_GROWTH);
            }
        }
        for (node, samples) in &self.memory {
            let (first, second) = samples.split_at(samples.len() / 2);
            if let (Some(before), Some(after)) = (first.iter().max(), second.iter().max())
                && *after > before + MEMORY_GROWTH_KIB
            {
                all.push(format!("{node}: agent memory (KiB) under load grew from {before} to {after}"));
            }
        }
        all
    }

    /// As text.
    pub fn text(&self) -> String {
        let mut out = format!(
            "changes: {} pods replaced, {} killed, {} slices rewritten\n{:<34} {:>8} {:>8} {:>8}\n",
            self.changes[0], self.changes[1], self.changes[2], "LOAD", "CALLS", "FAILED", "EXCUSED"
        );
        for (name, load) in &self.loads {
            let failed: usize = load.failures.values().sum();
            out.push_str(&format!("{name:<34} {:>8} {failed:>8} {:>8}\n", load.calls, load.excused));
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
        for (node, samples) in &self.memory {
            let (first, last) = (samples.first().unwrap_or(&0), samples.last().unwrap_or(&0));
            out.push_str(&format!("{node:<10} under full load {first}→{last} KiB in {} turns\n", samples.len()));
        }
        for (node, (before, after)) in &self.held {
            let other = |gauge: &&String| before.gauges.get(*gauge) != after.gauges.get(*gauge);
            for gauge in after.gauges.keys().filter(other) {
                let value = before.gauges.get(gauge).copied().unwrap_or_default();
                out.push_str(&format!("{node:<10} {gauge} {value}→{}\n", after.gauges[gauge]));
            }
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
    endpoints(&case, "rewritten", &NODES[..2])?;

    let services = [("replaced", &replaced.service), ("killed", &killed.service), ("rewritten", &rewritten)];
    let mut streams = steady(&case)?;
    for client in CLIENTS {
        let url = format!("http://{}.{}/", rewritten.name, NAMESPACE);
        streams.push(("rewritten", format!("rewritten by name {client}"), begin(&case, client, &[], &url)?));
    }
    for (name, service) in services {
        for client in CLIENTS {
            for port in ["http", "udp"] {
                let stream = begin(&case, client, &[], &service.url(port))?;
                streams.push((name, format!("{name} {port} {client}"), stream));
            }
        }
    }
    let kills = churn(&case, duration, replaced, killed, &mut report)?;
    // Those that are under way when the load ends have their answer by then, or are not counted.
    for (name, load, stream) in streams {
        report.loads.insert(load, count(name, &stream, &kills));
    }
    clean_up(&case)?;
    settle(&case, &mut report)?;
    Ok(report)
}

/// Calls a URL again and again from the time that it is answered.
fn begin(case: &Case<'_>, client: &str, options: &[&str], url: &str) -> Result<Stream> {
    case.until(&format!("{url} answers"), Duration::from_secs(20), || {
        let outcomes = case.calls(From::Pod(client), url, 10)?;
        ensure!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
        Ok(())
    })?;
    case.stream(From::Pod(client), &[&["--every", "10", "--timeout", "4000"], options].concat(), url)
}

/// Connections and UDP sockets that are kept all the time, with a Service that has one endpoint so far.
fn steady(case: &Case<'_>) -> Result<Vec<(&'static str, String, Stream)>> {
    let service = case.service("steady", json!({"selector": null}))?;
    endpoints(case, "steady", &[STEADY])?;
    let mut streams = Vec::new();
    for client in CLIENTS {
        for port in ["tcp", "udp"] {
            let stream = begin(case, client, &["--keep"], &service.url(port))?;
            case.until("it has an endpoint", Duration::from_secs(10), || {
                ensure!(stream.outcomes().iter().any(Result::is_ok), "no answer yet");
                Ok(())
            })?;
            streams.push(("steady", format!("steady {port} {client}"), stream));
        }
    }
    Ok(streams)
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

    /// A new pod takes the place of the older one on a node; gives when that was deleted.
    fn replace(&mut self, case: &Case<'_>, turn: usize, how: &str) -> Result<Kill> {
        let (node, number) = self.pods[turn % self.pods.len()];
        self.create(case, node, number + 1)?;
        // The new one is known everywhere before the old one goes, as a rolling update does it.
        let new = self.name(case, node, number + 1);
        case.until(&format!("{new} answers"), Duration::from_secs(20), || {
            let outcomes = case.calls(From::Pod("client-edge-a1"), &self.service.url("http"), 24)?;
            ensure!(outcomes.iter().flatten().any(|answer| answer.pod == new), "not yet");
            Ok(())
        })?;
        let begin = Instant::now();
        case.delete(&format!("pod {} {how}", self.name(case, node, number)))?;
        self.pods[turn % self.pods.len()].1 = number + 1;
        Ok(Kill { begin, end: Instant::now() })
    }
}

/// When a pod was deleted: between these.
struct Kill {
    begin: Instant,
    end: Instant,
}

/// Puts two of the shared servers into a Service's slice, others at each turn but one; and one beside the steady Service's.
fn rewrite(case: &Case<'_>, turn: usize) -> Result<()> {
    let node = |offset: usize| NODES[(turn + offset) % NODES.len()];
    endpoints(case, "rewritten", &[node(0), node(1)])?;
    endpoints(case, "steady", &[STEADY, node(0)])
}

/// Makes the shared servers of these nodes a Service's endpoints.
fn endpoints(case: &Case<'_>, of: &str, nodes: &[&str]) -> Result<()> {
    let nodes = BTreeSet::from_iter(nodes);
    let endpoint = |node: &&&str| -> Result<Value> {
        Ok(manifests::endpoint(case.field.pod_ip(&format!("server-{node}"))?, node, true))
    };
    let endpoints = nodes.iter().map(endpoint).collect::<Result<_>>()?;
    let slice = manifests::slice(&case.name(of), &case.name(of), manifests::slice_ports(), endpoints);
    case.field.apply(&[slice]).map(drop)
}

/// Changes endpoints until the time is over; gives when pods were killed.
fn churn(
    case: &Case<'_>,
    duration: Duration,
    mut replaced: Group,
    mut killed: Group,
    report: &mut Report,
) -> Result<Vec<Kill>> {
    let begin = Instant::now();
    let mut kills = Vec::new();
    let mut turn = 0;
    while begin.elapsed() < duration {
        turn += 1;
        for step in 0..5 {
            rewrite(case, turn * 5 + step)?;
            report.changes[2] += 1;
        }
        replaced.replace(case, turn, "--grace-period=20")?;
        report.changes[0] += 1;
        for node in NODES.iter().filter(|_| begin.elapsed() > FULL_LOAD) {
            let held = held(case.field, node)?;
            report.memory.entry((*node).to_owned()).or_default().push(held.rss_kib);
        }
        kills.push(killed.replace(case, turn, "--grace-period=0 --force")?);
        report.changes[1] += 1;
    }
    Ok(kills)
}

fn count(name: &str, stream: &Stream, kills: &[Kill]) -> Load {
    let mut load = Load::default();
    let mut began = None;
    for (outcome, at) in stream.timed_outcomes() {
        load.calls += 1;
        // One call begins when the one before it has ended.
        let began = began.replace(at).unwrap_or(at);
        let reason = match outcome {
            Ok(answer) if name == "steady" && answer.node != STEADY => "another pod answered".to_owned(),
            Ok(_) => continue,
            Err(reason) => reason,
        };
        let by_a_kill = kills.iter().any(|kill| began <= kill.end + AFTER_A_KILL && at >= kill.begin);
        if name == "killed" && by_a_kill {
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
    let services = ["replaced", "killed", "rewritten", "steady"].map(|of| case.name(of)).join(" ");
    case.field.kubectl(&format!("delete service {services}"), "")?;
    case.field.kubectl(&format!("delete pods -l case={} --grace-period=0 --force", case.id), "")?;
    let slices = ["rewritten", "steady"].map(|of| case.name(of)).join(" ");
    case.field.kubectl(&format!("delete endpointslice {slices} --ignore-not-found"), "").map(drop)
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
    let metrics = on_node(&["curl", "-sSf", "--max-time", "5", "http://127.0.0.1:9442/metrics"])?;
    // A kernel that tracks nothing in this namespace has no such file.
    let conntrack = on_node(&["cat", "/proc/sys/net/netfilter/nf_conntrack_count"]).unwrap_or_default();
    Ok(Held {
        rss_kib: rss.trim().trim_end_matches(" kB").parse()?,
        descriptors: fs::read_dir(format!("/proc/{agent}/fd"))?.count() as u64,
        frontends: page["frontends"].as_array().map_or(0, |frontends| frontends.len() as u64),
        peers: page["rememberedPeers"].as_u64().unwrap_or_default(),
        conntrack: conntrack.trim().parse().unwrap_or_default(),
        gauges: gauges(&metrics),
    })
}

/// The gauges on a page of metrics.
fn gauges(page: &str) -> BTreeMap<String, u64> {
    let types = page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" gauge"));
    let names: BTreeSet<_> = types.collect();
    let samples = page.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.rsplit_once(' '));
    samples
        .filter(|(sample, _)| names.contains(sample.split('{').next().unwrap_or_default()))
        .filter_map(|(sample, value)| Some((sample.to_owned(), value.parse().ok()?)))
        .collect()
}
