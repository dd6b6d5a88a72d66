//! The lab that is measured: its commands, the workloads in it, its daemons.

use std::{
    io::Write,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;

use crate::{load::Kind, pairs::Pair, process::Background};

/// Longest that one command of the lab may take.
const COMMAND_SECONDS: &str = "120";
const POLL: Duration = Duration::from_millis(100);

/// Where a measurement's client runs.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Client {
    /// In a pod.
    Pod(&'static str),
    /// On a node, as one of its processes.
    Node(&'static str),
}

/// A lab by name, driven by the program `lab`.
#[derive(Debug)]
pub(crate) struct Cluster {
    name: String,
    root: PathBuf,
    /// Folder of the bench's own programs.
    own: PathBuf,
    /// Folder of the daemons' programs.
    daemons: PathBuf,
}

impl Cluster {
    /// A lab by name; `root` is the checkout.
    ///
    /// # Errors
    /// When this program can't tell where it is.
    pub(crate) fn new(name: &str, root: &Path) -> Result<Self> {
        let program = std::env::current_exe()?.canonicalize()?;
        let own = program.parent().context("this program is in no folder")?.to_owned();
        let daemons = std::env::var_os("EDGEMESH_BIN").map_or_else(|| own.clone(), PathBuf::from);
        Ok(Self { name: name.to_owned(), root: root.canonicalize()?, own, daemons })
    }

    /// Its name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Folder of the daemons' programs.
    pub(crate) fn daemons(&self) -> &Path {
        &self.daemons
    }

    /// Folder of this program, which pods mount at the same place.
    pub(crate) fn programs(&self) -> &Path {
        &self.own
    }

    /// This program's path, on nodes and in pods.
    pub(crate) fn bench(&self) -> String {
        self.own.join("bench").display().to_string()
    }

    /// A command of the lab, not yet started.
    pub(crate) fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(self.own.join("lab"));
        command
            .args(words)
            .env("EDGEMESH_LAB", &self.name)
            .env("EDGEMESH_BIN", &self.daemons)
            .env("EDGEMESH_IMAGES_SCRIPT", self.root.join("scripts/build-images.sh"))
            .current_dir(&self.root)
            .stdin(Stdio::null());
        command
    }

    fn timed(&self, words: &[&str]) -> Command {
        let plain = self.command(words);
        let mut command = Command::new("timeout");
        command.arg(COMMAND_SECONDS).arg(plain.get_program()).args(plain.get_args()).stdin(Stdio::null());
        for (name, value) in plain.get_envs() {
            command.env(name, value.unwrap_or_default());
        }
        command.current_dir(&self.root);
        command
    }

    /// Runs a command of the lab and gives its standard output.
    ///
    /// # Errors
    /// When it fails; the message holds its standard error.
    pub(crate) fn run(&self, words: &[&str]) -> Result<String> {
        let output = self.timed(words).output().context("lab")?;
        text(words, &output)
    }

    /// [`Cluster::run`] with `input` on its standard input.
    ///
    /// # Errors
    /// As [`Cluster::run`].
    pub(crate) fn feed(&self, words: &[&str], input: &str) -> Result<String> {
        let mut command = self.timed(words);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(input.as_bytes())?;
        }
        text(words, &child.wait_with_output()?)
    }

    /// Applies a manifest.
    ///
    /// # Errors
    /// When kubectl fails.
    pub(crate) fn apply(&self, manifest: &Value) -> Result<()> {
        self.feed(&["kubectl", "apply", "-f", "-"], &manifest.to_string()).map(drop)
    }

    /// An object of the default namespace.
    ///
    /// # Errors
    /// When kubectl fails.
    pub(crate) fn object(&self, kind: &str, name: &str) -> Result<Value> {
        Ok(serde_json::from_str(&self.run(&["kubectl", "get", kind, name, "-o", "json"])?)?)
    }

    /// Runs a command on a node.
    ///
    /// # Errors
    /// When it fails.
    pub(crate) fn on(&self, node: &str, program: &[&str]) -> Result<String> {
        self.run(&[&["node", node, "--"], program].concat())
    }

    /// Starts a program on a node that runs until the handle is dropped; `name` is its name as the kernel knows it. What it
    /// logs goes to a file, as with the lab's daemons: it costs a proxy as much as it costs them.
    ///
    /// # Errors
    /// When it doesn't start.
    pub(crate) fn start(&self, node: &str, name: &str, program: &[&str]) -> Result<Background> {
        let group = self.host(node)?["cgroup"].as_str().context("a host has a control group")?.to_owned();
        let command = self.command(&[&["node", node, "--"], program].concat());
        Background::start(command, name, &group, &self.folder()?.join(format!("bench-{name}.log")))
    }

    /// Measures a subject and its baseline by turns.
    ///
    /// # Errors
    /// When the client fails.
    pub(crate) fn measure(
        &self,
        client: Client,
        kind: Kind,
        ends: (SocketAddr, SocketAddr),
        rounds: u32,
        each: Duration,
    ) -> Result<Vec<Pair>> {
        let (subject, baseline) = (ends.0.to_string(), ends.1.to_string());
        let (rounds, each) = (rounds.to_string(), each.as_millis().to_string());
        let words = ["measure", kind.word(), "--subject", &subject, "--baseline", &baseline, "--rounds", &rounds];
        let words = [&words, ["--milliseconds", &each].as_slice()].concat();
        Ok(serde_json::from_str(&self.bench_at(client, &words)?)?)
    }

    /// Loads an address for a time and gives how many bytes, connections or messages that were.
    ///
    /// # Errors
    /// When the client fails.
    pub(crate) fn load(&self, client: Client, kind: Kind, address: SocketAddr, time: Duration) -> Result<f64> {
        let (address, time) = (address.to_string(), time.as_millis().to_string());
        let said = self.bench_at(client, &["load", kind.word(), &address, "--milliseconds", &time])?;
        said.trim().parse().with_context(|| format!("bench load: {said}"))
    }

    /// Runs this program in the lab.
    ///
    /// # Errors
    /// When it fails.
    pub(crate) fn bench_at(&self, client: Client, words: &[&str]) -> Result<String> {
        let bench = self.bench();
        let place = match client {
            Client::Pod(name) => ["pod", name, "--", &bench],
            Client::Node(name) => ["node", name, "--", &bench],
        };
        self.run(&[&place, words].concat())
    }

    /// The admin's kubeconfig, good beside the hub.
    ///
    /// # Errors
    /// When the lab isn't up.
    pub(crate) fn kubeconfig(&self) -> Result<String> {
        Ok(self.status()?["kubeconfig"].as_str().context("a lab has a kubeconfig")?.to_owned())
    }

    fn status(&self) -> Result<Value> {
        Ok(serde_json::from_str(&self.run(&["status", "--json"])?)?)
    }

    /// The lab's folder, which all nodes see and `down` removes.
    ///
    /// # Errors
    /// When it isn't up.
    pub(crate) fn folder(&self) -> Result<PathBuf> {
        Ok(self.status()?["folder"].as_str().context("a lab has a folder")?.into())
    }

    fn host(&self, name: &str) -> Result<Value> {
        let status = self.status()?;
        let hosts = status["hosts"].as_array().cloned().unwrap_or_default();
        hosts.into_iter().find(|host| host["name"] == name).with_context(|| format!("no host {name}"))
    }

    /// The process of a daemon.
    ///
    /// # Errors
    /// When it doesn't run.
    pub(crate) fn daemon(&self, host: &str, daemon: &str) -> Result<i32> {
        let pid = self.host(host)?["daemons"][daemon]["pid"].as_i64();
        let pid = pid.with_context(|| format!("{daemon} of {host} doesn't run"))?;
        Ok(i32::try_from(pid)?)
    }

    /// A node's own address.
    ///
    /// # Errors
    /// When there is no such host.
    pub(crate) fn node_address(&self, node: &str) -> Result<Ipv4Addr> {
        Ok(self.host(node)?["address"].as_str().context("a host has an address")?.parse()?)
    }

    /// The public address of a site.
    ///
    /// # Errors
    /// When there is no such site.
    pub(crate) fn public_address(&self, site: &str) -> Result<Ipv4Addr> {
        let status = self.status()?;
        let mut sites = status["sites"].as_array().into_iter().flatten();
        let site = sites.find(|one| one["name"] == site).with_context(|| format!("no site {site}"))?;
        Ok(site["public"].as_str().context("a site has an address")?.parse()?)
    }

    /// Address of a pod, once it is ready.
    ///
    /// # Errors
    /// When it doesn't get ready.
    pub(crate) fn pod(&self, name: &str, port: u16) -> Result<SocketAddr> {
        until(&format!("pod {name} is Ready"), Duration::from_secs(60), || {
            let status = self.object("pod", name)?["status"].take();
            let mut conditions = status["conditions"].as_array().into_iter().flatten();
            ensure!(conditions.any(|c| c["type"] == "Ready" && c["status"] == "True"), "{status}");
            address(&status["podIP"], port)
        })
    }

    /// Address of a Service.
    ///
    /// # Errors
    /// When it has none.
    pub(crate) fn service(&self, name: &str, port: u16) -> Result<SocketAddr> {
        address(&self.object("service", name)?["spec"]["clusterIP"], port)
    }

    /// Names and addresses of the Services whose names begin with `prefix`.
    ///
    /// # Errors
    /// When kubectl fails.
    pub(crate) fn service_addresses(&self, prefix: &str) -> Result<Vec<(String, Ipv4Addr)>> {
        let all: Value = serde_json::from_str(&self.run(&["kubectl", "get", "services", "-o", "json"])?)?;
        let mut found = Vec::new();
        for service in all["items"].as_array().into_iter().flatten() {
            if let Some(name) = service["metadata"]["name"].as_str().filter(|name| name.starts_with(prefix)) {
                let address =
                    service["spec"]["clusterIP"].as_str().with_context(|| format!("{name} has no address"))?;
                found.push((name.to_owned(), address.parse()?));
            }
        }
        Ok(found)
    }

    /// Waits until a client is answered by an echo server.
    ///
    /// # Errors
    /// When it isn't.
    pub(crate) fn answered(&self, client: Client, server: SocketAddr) -> Result<()> {
        let server = server.to_string();
        until(&format!("{server} answers {client:?}"), Duration::from_secs(30), || {
            self.bench_at(client, &["ask", &server]).map(drop)
        })
    }

    /// Waits until an address answers in the way in which it will be measured.
    ///
    /// # Errors
    /// When it doesn't.
    pub(crate) fn served(&self, client: Client, kind: Kind, address: SocketAddr) -> Result<()> {
        until(&format!("{address} answers {client:?}"), Duration::from_secs(30), || {
            self.load(client, kind, address, Duration::from_millis(10)).map(drop)
        })
    }

    /// A sum of the agent's counters: those called `name` with the label `path="…"` of one of `paths`.
    ///
    /// # Errors
    /// When the agent doesn't answer.
    pub(crate) fn agent_counter(&self, node: &str, name: &str, paths: &[&str]) -> Result<f64> {
        self.agent_sum(node, name, |labels| paths.iter().any(|path| labels.contains(&format!("path=\"{path}\""))))
    }

    /// A sum of the agent's metrics called `name` whose labels (`{…}`, or nothing) are wanted.
    ///
    /// # Errors
    /// When the agent doesn't answer.
    pub(crate) fn agent_sum(&self, node: &str, name: &str, wanted: impl Fn(&str) -> bool) -> Result<f64> {
        let text = self.on(node, &["curl", "-sSf", "--max-time", "5", "http://127.0.0.1:9442/metrics"])?;
        let wanted = |line: &&str| {
            line.strip_prefix(name)
                .and_then(|rest| rest.rsplit_once(' '))
                .is_some_and(|(labels, _)| (labels.is_empty() || labels.starts_with('{')) && wanted(labels))
        };
        Ok(text.lines().filter(wanted).filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum())
    }
}

fn address(ip: &Value, port: u16) -> Result<SocketAddr> {
    let ip: Ipv4Addr = ip.as_str().context("no address yet")?.parse()?;
    Ok(SocketAddr::V4(SocketAddrV4::new(ip, port)))
}

fn text(words: &[&str], output: &Output) -> Result<String> {
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("lab {}: {}: {}", words.join(" "), output.status, said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Tries until it succeeds.
///
/// # Errors
/// The last failure, once the deadline passed.
pub(crate) fn until<T>(what: &str, deadline: Duration, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let begin = Instant::now();
    loop {
        match attempt() {
            Ok(value) => return Ok(value),
            Err(error) if begin.elapsed() > deadline => {
                return Err(error.context(anyhow!("not within {} s: {what}", deadline.as_secs())));
            }
            Err(_) => thread::sleep(POLL),
        }
    }
}
