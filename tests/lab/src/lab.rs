//! A lab by its name: where its files are, its hosts, and the calls on what runs in it.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::{
    command,
    cuts::{self, Cut},
    daemons::{CONTAINERD_SOCKET, Daemon},
    host::HostNamespace,
    network,
    topology::{Host, Role, Topology},
};

/// A lab, whether it is up or not.
#[derive(Debug, Clone)]
pub struct Lab {
    /// Name; part of every name that the lab gives to something on the machine.
    pub id: String,
    /// Its files.
    pub folder: PathBuf,
    /// Where the daemons' programs are.
    pub programs: PathBuf,
}

impl Lab {
    /// A lab by name.
    ///
    /// # Errors
    /// When the name can't be part of a namespace's name.
    pub fn new(id: &str, root: &Path, programs: PathBuf) -> Result<Self> {
        let plain = id.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
        ensure!(plain && !id.is_empty() && id.len() <= 20, "lab name {id:?}: 1 to 20 of a-z and 0-9");
        Ok(Self { id: id.to_owned(), folder: root.join(id), programs })
    }

    /// The root of its control groups.
    pub fn cgroup(&self) -> String {
        format!("/edgemesh-lab-{}", self.id)
    }

    /// The network namespace of a host.
    pub fn netns(&self, host: &str) -> String {
        format!("{}{host}", self.netns_prefix())
    }

    /// What the names of all its network namespaces begin with.
    pub fn netns_prefix(&self) -> String {
        format!("lab-{}.", self.id)
    }

    /// `PATH` of commands on hosts: the project's own programs come first.
    pub fn path(&self) -> String {
        format!("{}:{}", self.programs.display(), std::env::var("PATH").unwrap_or_default())
    }

    /// The admin's kubeconfig.
    pub fn kubeconfig(&self) -> PathBuf {
        self.folder.join("hub/hub/admin.kubeconfig")
    }

    /// What it consists of, as it was brought up.
    ///
    /// # Errors
    /// When it isn't up.
    pub fn topology(&self) -> Result<Topology> {
        Topology::saved(&self.folder)
    }

    /// A host by its name.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn host(&self, name: &str) -> Result<Host> {
        let hosts = self.topology()?.hosts();
        let names: Vec<_> = hosts.iter().map(|host| host.name.clone()).collect();
        let found = hosts.into_iter().find(|host| host.name == name);
        found.with_context(|| format!("no host {name:?}; there are: {}", names.join(", ")))
    }

    /// The namespaces of a host.
    pub fn namespace(&self, host: &str) -> HostNamespace {
        HostNamespace {
            name: host.to_owned(),
            netns: self.netns(host),
            cgroup: format!("{}/{host}", self.cgroup()),
            folder: self.folder.join(host),
        }
    }

    /// The command line of a daemon on a host.
    pub fn program(&self, daemon: Daemon, host: &HostNamespace) -> Vec<String> {
        let of = |name: &str, config: &str| -> Vec<String> {
            let program = self.programs.join(name).display().to_string();
            vec![program, "--config".to_owned(), host.folder.join(config).display().to_string()]
        };
        match daemon {
            Daemon::Dns => {
                let config = host.folder.join("dnsmasq.conf").display().to_string();
                vec!["dnsmasq".to_owned(), "--keep-in-foreground".to_owned(), format!("--conf-file={config}")]
            }
            Daemon::Hub => {
                let mut words = of("hub", "hub.yaml");
                words.push("--standalone".to_owned());
                words
            }
            Daemon::Containerd => {
                vec![
                    "containerd".to_owned(),
                    "--config".to_owned(),
                    host.folder.join("containerd.toml").display().to_string(),
                ]
            }
            Daemon::Edgecore => of("edgecore", "edgecore.yaml"),
            Daemon::Agent => of("edgemesh-agent", "agent.yaml"),
            Daemon::Gateway => of("edgemesh-gateway", "gateway.yaml"),
        }
    }

    /// kubectl with the admin's kubeconfig. It runs beside the hub, so that no cut comes between.
    pub fn kubectl(&self, arguments: &[String]) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.netns("hub")));
        command.arg(std::env::var("KUBECTL").unwrap_or_else(|_| "kubectl".to_owned()));
        command.arg(format!("--kubeconfig={}", self.kubeconfig().display()));
        command.arg(format!("--cache-dir={}", self.folder.join("kubectl-cache").display()));
        command.args(arguments);
        command
    }

    /// A command inside the first running container of a pod (`NAMESPACE/NAME`, or `NAME` in `default`), as root and with the
    /// container's environment. It asks the nodes' runtimes, so it works with no hub. The command is not the runtime's own: `ctr
    /// tasks exec` now and then ends before it has passed on what a short command said.
    ///
    /// # Errors
    /// When no node runs that pod.
    pub fn pod_command(&self, pod: &str, program: &[String]) -> Result<Command> {
        self.pod_door(pod)?.command(program)
    }

    /// The way into a pod, as of [`Lab::pod_command`], for those who go in often: it holds while the container runs.
    ///
    /// # Errors
    /// When no node runs that pod.
    pub fn pod_door(&self, pod: &str) -> Result<PodDoor> {
        let (namespace, name) = pod.split_once('/').unwrap_or(("default", pod));
        let labels = [
            ("io.kubernetes.pod.namespace", namespace),
            ("io.kubernetes.pod.name", name),
            ("io.cri-containerd.kind", "container"),
        ];
        let filter: Vec<_> = labels.iter().map(|(key, value)| format!("labels.\"{key}\"=={value}")).collect();
        let ctr = |words: &[&str]| -> Vec<String> {
            let head = ["ctr", "-a", CONTAINERD_SOCKET, "-n", "k8s.io"];
            head.iter().chain(words).map(|word| (*word).to_owned()).collect()
        };
        for node in self.topology()?.nodes() {
            let host = self.namespace(&node.name);
            if host.holder().is_none() || Daemon::Containerd.process(&host)?.is_none() {
                continue;
            }
            let found =
                command::finish(&mut host.command("shell", &ctr(&["containers", "list", "-q", &filter.join(",")]))?)?;
            if found.trim().is_empty() {
                continue;
            }
            let tasks = command::finish(&mut host.command("shell", &ctr(&["tasks", "list"]))?)?;
            // A line is: container, process, state.
            let process_of = |id: &str| {
                let fields = tasks.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
                let running = fields.into_iter().find(|f| f.first() == Some(&id) && f.get(2) == Some(&"RUNNING"));
                running.map(|fields| fields[1].to_owned())
            };
            if let Some(process) = found.split_whitespace().find_map(process_of) {
                let variables = ["cat".to_owned(), format!("/proc/{process}/environ")];
                let variables = command::finish(&mut host.command("shell", &variables)?)?;
                let environment = variables.split_terminator('\0').map(str::to_owned).collect();
                return Ok(PodDoor { host, process, environment });
            }
        }
        bail!("no node runs a container of pod {namespace}/{name}")
    }

    /// Breaks a link.
    ///
    /// # Errors
    /// When a name is no place.
    pub fn cut(&self, a: &str, b: &str) -> Result<()> {
        let topology = self.topology()?;
        let mut cuts = cuts::load(&self.folder)?;
        cuts.insert(Cut::new(&topology, a, b)?);
        cuts::save(&self.folder, &cuts)?;
        self.apply_cuts()
    }

    /// Mends a link, or all of them (`other` is none).
    ///
    /// # Errors
    /// When a name is no place, or the link isn't cut.
    pub fn heal(&self, pair: Option<(&str, &str)>) -> Result<()> {
        let topology = self.topology()?;
        let mut cuts = cuts::load(&self.folder)?;
        match pair {
            None => cuts.clear(),
            Some((a, b)) => ensure!(cuts.remove(&Cut::new(&topology, a, b)?), "there is no cut between {a} and {b}"),
        }
        cuts::save(&self.folder, &cuts)?;
        self.apply_cuts()
    }

    /// Puts the cuts in force on every host that enforces them.
    ///
    /// # Errors
    /// When nftables refuses the rules.
    pub fn apply_cuts(&self) -> Result<()> {
        let topology = self.topology()?;
        for (host, script) in cuts::rules(&topology, &cuts::load(&self.folder)?)? {
            network::nft(&self.netns(&host), &script)?;
        }
        Ok(())
    }

    /// What `./lab status --json` prints.
    ///
    /// # Errors
    /// When the lab isn't up.
    pub fn status(&self) -> Result<Value> {
        let topology = self.topology()?;
        let mut hosts = Vec::new();
        for host in topology.hosts() {
            let namespace = self.namespace(&host.name);
            let mut daemons = BTreeMap::new();
            for daemon in Daemon::of(&host) {
                let process = daemon.process(&namespace)?;
                let ready = process.is_some() && daemon.is_ready(&namespace);
                daemons.insert(daemon.name(), json!({"pid": process, "ready": ready, "log": daemon.log(&namespace)}));
            }
            hosts.push(json!({
                "name": host.name, "role": host.role, "address": host.address, "address6": host.address6, "site": host.site, "gateway": host.gateway,
                "up": namespace.holder().is_some(), "netns": namespace.netns, "cgroup": namespace.cgroup, "daemons": daemons,
            }));
        }
        Ok(json!({
            "lab": self.id, "folder": self.folder, "kubeconfig": self.kubeconfig(), "hosts": hosts, "sites": topology.sites(),
            "cuts": cuts::load(&self.folder)?,
        }))
    }

    /// Checks that the lab's host is one that has daemons or can run commands.
    ///
    /// # Errors
    /// When it is a router or the internet.
    pub fn machine(&self, name: &str) -> Result<Host> {
        let host = self.host(name)?;
        ensure!(!matches!(host.role, Role::Router), "{name} is a router");
        Ok(host)
    }

    /// Reads a daemon's log.
    ///
    /// # Errors
    /// When there is none.
    pub fn log(&self, host: &str, daemon: &str) -> Result<PathBuf> {
        let found = Daemon::named(&self.host(host)?, daemon)?;
        let path = found.log(&self.namespace(host));
        fs::metadata(&path).with_context(|| format!("{daemon} of {host} has no log yet"))?;
        Ok(path)
    }
}

/// The way into a running container.
#[derive(Debug, Clone)]
pub struct PodDoor {
    host: HostNamespace,
    /// Its process, as its host numbers it.
    process: String,
    environment: Vec<String>,
}

impl PodDoor {
    /// A command inside.
    ///
    /// # Errors
    /// When the host is down.
    pub fn command(&self, program: &[String]) -> Result<Command> {
        let mut words = vec!["env".to_owned(), "-i".to_owned()];
        words.extend(self.environment.iter().cloned());
        words.extend(["/usr/bin/nsenter", "--target", &self.process].map(str::to_owned));
        words.extend(["--mount", "--uts", "--ipc", "--net", "--pid", "--root", "--wd", "--"].map(str::to_owned));
        words.extend(program.iter().cloned());
        self.host.command("shell", &words)
    }
}
