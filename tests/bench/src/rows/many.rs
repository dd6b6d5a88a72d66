//! Many Services, in a lab of one node: what they cost connections, how soon they are programmed, what the agent takes.

use std::{fs, net::SocketAddr, thread, time::Duration};

use anyhow::{Context, Result, ensure};

use super::{
    Bench,
    l4::{EACH, ROUNDS},
};
use crate::{
    cluster::{Client, Cluster, until},
    load::Kind,
    nftables,
    process::{cpu_seconds, resident_megabytes},
    row::{Budget, Row},
    workloads::{self, CONNECT_PORT, STREAM_PORT},
};

const NODE: &str = "many-1";
const ENDPOINTS: u32 = 10;
/// As many have those in the rules of the peer: `nft` takes minutes to load a chain for each of 100,000 endpoints, and the
/// number makes no difference to a packet.
const RULES_ENDPOINTS: u32 = 1;
const MOST: u32 = 10_000;
const FILL_DEADLINE: Duration = Duration::from_secs(120);
const IDLE: Duration = Duration::from_secs(20);

/// The lab of one node, and how many Services it has got.
#[derive(Debug)]
pub(crate) struct Many {
    /// The lab.
    pub(crate) cluster: Cluster,
    services: std::cell::Cell<u32>,
}

impl Many {
    /// Brings the lab up.
    ///
    /// # Errors
    /// When it doesn't come up.
    pub(crate) fn start(name: &str, root: &std::path::Path) -> Result<Self> {
        let cluster = Cluster::new(name, root)?;
        let topology = std::env::temp_dir().join(format!("edgemesh-{name}.yaml"));
        fs::write(&topology, format!("cloud: [{{name: {NODE}}}]\n"))?;
        cluster.run(&["up", "--file", &topology.display().to_string()])?;
        fs::remove_file(topology)?;
        cluster.apply(&workloads::pair_on(NODE, cluster.programs()))?;
        for pod in ["probe", "near"] {
            cluster.pod(pod, STREAM_PORT)?;
        }
        Ok(Self { cluster, services: Default::default() })
    }

    /// Makes them `wanted` Services, and waits until the agent serves them.
    fn fill(&self, wanted: u32) -> Result<()> {
        let have = self.services.get();
        ensure!(have <= wanted, "there are {have} Services already");
        let (from, to, endpoints) = (have.to_string(), wanted.to_string(), ENDPOINTS.to_string());
        let kubeconfig = self.cluster.kubeconfig()?;
        let words = ["fill", "--kubeconfig", &kubeconfig, "--from", &from, "--to", &to, "--endpoints", &endpoints];
        self.cluster.bench_at(Client::Node("hub"), &words)?;
        self.services.set(wanted);
        until(&format!("{wanted} Services are programmed"), FILL_DEADLINE, || self.programmed(wanted))
    }

    fn programmed(&self, wanted: u32) -> Result<()> {
        let direct = |labels: &str| labels.contains("target=\"direct\"");
        let programmed = self.cluster.agent_sum(NODE, "edgemesh_agent_datapath_frontends", direct)?;
        ensure!(programmed >= f64::from(wanted), "{programmed} frontends");
        Ok(())
    }

    /// Seconds that the agent has spent in planning and writing.
    fn programming(&self) -> Result<f64> {
        let sum = |name: &str| self.cluster.agent_sum(NODE, name, |_| true);
        Ok(sum("edgemesh_agent_datapath_plan_seconds_sum")? + sum("edgemesh_agent_datapath_write_seconds_sum")?)
    }

    /// Connections or round trips to the Service `near` against another address.
    fn against(
        &self,
        bench: &Bench,
        name: &str,
        kind: Kind,
        (of, baseline): (&str, SocketAddr),
        budget: Budget,
    ) -> Result<Row> {
        let (port, unit) = match kind {
            Kind::Connect => (CONNECT_PORT, "us/connection"),
            _ => (STREAM_PORT, "round trips/s"),
        };
        let probe = Client::Pod("probe");
        let service = self.cluster.service("near", port)?;
        let pairs = self.cluster.measure(probe, kind, (service, baseline), bench.rounds(ROUNDS), EACH)?;
        Row::compared(name, unit, of, &pairs, Some(budget))
    }

    fn against_direct(&self, bench: &Bench, name: &str, kind: Kind) -> Result<Row> {
        let (port, budget) = match kind {
            Kind::Connect => (CONNECT_PORT, Budget::RatioAtMost(1.10)),
            _ => (STREAM_PORT, Budget::RatioAtLeast(0.98)),
        };
        let pod = self.cluster.pod("near", port)?;
        self.against(bench, name, kind, ("pod address", pod), budget)
    }
}

pub(super) fn connect_1(bench: &Bench) -> Result<Row> {
    bench.many()?.against_direct(bench, "l4_connect_services_1", Kind::Connect)
}

pub(super) fn connect_1000(bench: &Bench) -> Result<Row> {
    let many = bench.many()?;
    many.fill(1000)?;
    many.against_direct(bench, "l4_connect_services_1000", Kind::Connect)
}

pub(super) fn connect_10000(bench: &Bench) -> Result<Row> {
    let many = bench.many()?;
    many.fill(MOST)?;
    many.against_direct(bench, "l4_connect_services_10000", Kind::Connect)
}

pub(super) fn rtt64_10000(bench: &Bench) -> Result<Row> {
    let many = bench.many()?;
    many.fill(MOST)?;
    many.against_direct(bench, "l4_rtt64_services_10000", Kind::RoundTrips)
}

pub(super) fn connect_nftables(bench: &Bench) -> Result<Row> {
    nftables_peer(bench, "l4_connect_nftables_10000", Kind::Connect, Budget::RatioAtMost(1.0))
}

pub(super) fn rtt64_nftables(bench: &Bench) -> Result<Row> {
    nftables_peer(bench, "l4_rtt64_nftables_10000", Kind::RoundTrips, Budget::RatioAtLeast(1.0))
}

/// Beside as many Services in rules such as kube-proxy's, on the same node and with the same server.
fn nftables_peer(bench: &Bench, name: &str, kind: Kind, budget: Budget) -> Result<Row> {
    let many = bench.many()?;
    many.fill(MOST)?;
    let port = if kind == Kind::Connect { CONNECT_PORT } else { STREAM_PORT };
    let server = many.cluster.pod("near", port)?;
    let rules = many.cluster.folder()?.join("bench-nftables");
    let address = nftables::write_rules(&rules, MOST, RULES_ENDPOINTS, server)?;
    many.cluster.on(NODE, &["nft", "-f", &rules.display().to_string()])?;
    let row = many.against(bench, name, kind, ("rules such as kube-proxy's", address), budget);
    many.cluster.on(NODE, &["nft", "delete", "table", "ip", nftables::TABLE])?;
    row
}

/// Idle CPU with all of them.
pub(super) fn idle_cpu(bench: &Bench) -> Result<Row> {
    let many = bench.many()?;
    many.fill(MOST)?;
    let agent = many.cluster.daemon(NODE, "agent")?;
    let mut samples = Vec::new();
    for _ in 0..bench.rounds(3) {
        let before = cpu_seconds(agent)?;
        thread::sleep(IDLE);
        samples.push((cpu_seconds(agent)? - before) / IDLE.as_secs_f64() * 100.0);
    }
    Row::alone("agent_idle_cpu", "% of a core", &samples, Some(Budget::ValueAtMost(1.0)))
}

/// 500 Services with ten endpoints each.
pub(super) fn rss_5000_endpoints(bench: &Bench) -> Result<Row> {
    let many = bench.many()?;
    many.fill(500)?;
    let agent = many.cluster.daemon(NODE, "agent")?;
    let mut samples = Vec::new();
    for _ in 0..bench.rounds(9) {
        thread::sleep(Duration::from_millis(500));
        samples.push(resident_megabytes(agent)?);
    }
    Row::alone("agent_rss_5000_endpoints", "MB", &samples, Some(Budget::ValueAtMost(64.0)))
}

/// Planning and writing of one change, which is that of one Service's endpoints.
pub(super) fn change(bench: &Bench) -> Result<Row> {
    let many = bench.many()?;
    many.fill(MOST)?;
    let kubeconfig = many.cluster.kubeconfig()?;
    let (endpoints, times) = (ENDPOINTS.to_string(), 20_u32);
    let mut samples = Vec::new();
    for _ in 0..bench.rounds(5) {
        let before = many.programming()?;
        let changes = || many.cluster.agent_sum(NODE, "edgemesh_agent_datapath_write_seconds_count", |_| true);
        let rounds = changes()?;
        let count = times.to_string();
        let words = ["change", "--kubeconfig", &kubeconfig, "--endpoints", &endpoints, "--times", &count];
        many.cluster.bench_at(Client::Node("hub"), &[&words, ["--milliseconds", "100"].as_slice()].concat())?;
        let rounds = until("all changes are programmed", Duration::from_secs(20), || {
            let more = changes()? - rounds;
            ensure!(more >= f64::from(times), "{more} of {times}");
            Ok(more)
        })?;
        samples.push((many.programming()? - before) / rounds * 1000.0);
    }
    Row::alone("service_change_ms", "ms", &samples, Some(Budget::ValueAtMost(10.0)))
}

/// All of them by an agent that finds nothing of an earlier one.
pub(super) fn program(bench: &Bench) -> Result<Row> {
    let many = bench.many()?;
    many.fill(MOST)?;
    let programs = many.cluster.daemons().join("edgemesh-agent").display().to_string();
    let settings = many.cluster.folder()?.join(NODE).join("agent.yaml").display().to_string();
    let mut samples = Vec::new();
    for _ in 0..bench.rounds(3) {
        many.cluster.run(&["kill", NODE, "agent"])?;
        many.cluster.on(NODE, &[&programs, "--config", &settings, "uninstall"]).context("uninstall")?;
        many.cluster.run(&["start", NODE, "agent"])?;
        until("all Services are programmed again", FILL_DEADLINE, || many.programmed(MOST))?;
        samples.push(many.programming()?);
    }
    Row::alone("services_10000_program_s", "s", &samples, Some(Budget::ValueAtMost(2.0)))
}
