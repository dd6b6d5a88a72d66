//! `./lab`: the commands of a person, a test or another program on a lab.

use std::{
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use edgemesh_lab::{Lab, Topology, cleanup, cluster, daemons::Daemon, host, topology::Datapath};

/// A cluster with a cloud, sites behind NAT and links that break, made of network namespaces on this machine.
#[derive(Parser)]
#[command(name = "lab")]
struct Arguments {
    /// Name of the lab; several can be up at a time.
    #[arg(long, env = "EDGEMESH_LAB", default_value = "main", global = true)]
    lab: String,
    /// Where labs keep their files.
    #[arg(long, env = "EDGEMESH_LAB_ROOT", default_value = "/var/lib/edgemesh-lab", global = true)]
    root: PathBuf,
    /// Folder with the daemons' programs; by default, where this program is.
    #[arg(long, env = "EDGEMESH_BIN", global = true)]
    programs: Option<PathBuf>,
    /// Script that builds the container images.
    #[arg(long, env = "EDGEMESH_IMAGES_SCRIPT", default_value = "scripts/build-images.sh", global = true)]
    images_script: PathBuf,
    /// Where the built images are kept.
    #[arg(long, env = "EDGEMESH_IMAGES", global = true)]
    images: Option<PathBuf>,
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Bring it up (removing what is left of an earlier one) and wait until every node is Ready.
    Up {
        /// Topology file; by default the one of the documentation.
        #[arg(long)]
        file: Option<PathBuf>,
        /// How the agents translate Service addresses; goes before the topology file's.
        #[arg(long)]
        datapath: Option<Datapath>,
    },
    /// Show hosts, daemons and cuts.
    Status {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Run kubectl as the cluster's admin.
    Kubectl {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Run a command on a host: a node, `hub`, `client` or `internet`.
    Node {
        name: String,
        #[arg(last = true, required = true)]
        program: Vec<String>,
    },
    /// Run a command in a pod (NAMESPACE/NAME, or NAME in `default`).
    Pod {
        name: String,
        #[arg(last = true, required = true)]
        program: Vec<String>,
    },
    /// Break the link between two places: a node, a site, `cloud`, `hub`, `client` or `internet`.
    Cut { a: String, b: String },
    /// Mend a link, or `all`.
    Heal { a: String, b: Option<String> },
    /// Kill a daemon, or everything on a host, with SIGKILL.
    Kill { host: String, daemon: Option<String> },
    /// Start a daemon, or a host with all its daemons.
    Start { host: String, daemon: Option<String> },
    /// Kill everything on a host and start it again from its disk.
    Reboot { host: String },
    /// Print a daemon's log.
    Logs {
        host: String,
        daemon: String,
        /// Go on as it grows.
        #[arg(short, long)]
        follow: bool,
    },
    /// Remove it.
    Down,
    /// The first process of a host.
    #[command(hide = true)]
    InitHost { name: String, folder: PathBuf },
}

#[allow(clippy::print_stderr)]
fn say(text: &str) {
    eprintln!("lab: {text}");
}

#[allow(clippy::print_stdout)]
fn print(text: &str) {
    println!("{text}");
}

fn main() -> ExitCode {
    match act(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn act(arguments: Arguments) -> Result<()> {
    if let Action::InitHost { name, folder } = &arguments.action {
        host::run_as_first_process(name, folder)?;
    }
    let programs = match arguments.programs {
        Some(folder) => folder,
        None => std::env::current_exe()?.parent().map(Path::to_owned).context("this program is in no folder")?,
    };
    let images = arguments.images.unwrap_or_else(|| arguments.root.join("images"));
    let lab = Lab::new(&arguments.lab, &arguments.root, programs)?;
    match arguments.action {
        Action::Up { file, datapath } => {
            let mut topology = Topology::load(file.as_ref())?;
            topology.datapath = datapath.or(topology.datapath);
            let images = cluster::build_images(&arguments.images_script, &images)?;
            cluster::up(&lab, &topology, &images, &say)?;
        }
        Action::Status { json } => {
            let status = lab.status()?;
            print(&if json { format!("{status:#}") } else { table(&status) });
        }
        Action::Kubectl { arguments } => return Err(host::become_command(lab.kubectl(&arguments))),
        Action::Node { name, program } => {
            lab.machine(&name)?;
            let mut command = lab.namespace(&name).command("shell", &program)?;
            command.env("PATH", lab.path());
            return Err(host::become_command(command));
        }
        Action::Pod { name, program } => return Err(host::become_command(lab.pod_command(&name, &program)?)),
        Action::Cut { a, b } => lab.cut(&a, &b)?,
        Action::Heal { a, b } => match (a.as_str(), b) {
            ("all", None) => lab.heal(None)?,
            (a, Some(b)) => lab.heal(Some((a, &b)))?,
            (_, None) => bail!("heal takes two places, or all"),
        },
        Action::Kill { host, daemon } => {
            let host = lab.machine(&host)?;
            let daemon = daemon.map(|name| Daemon::named(&host, &name)).transpose()?;
            cluster::kill(&lab, &host, daemon)?;
        }
        Action::Start { host, daemon } => {
            let host = lab.machine(&host)?;
            let daemon = daemon.map(|name| Daemon::named(&host, &name)).transpose()?;
            cluster::start(&lab, &host, daemon)?;
        }
        Action::Reboot { host } => cluster::reboot(&lab, &host)?,
        Action::Logs { host, daemon, follow } => {
            let mut command = Command::new("tail");
            command.args(if follow { ["-n", "+1", "-F"].as_slice() } else { ["-n", "+1"].as_slice() });
            command.arg(lab.log(&host, &daemon)?);
            return Err(host::become_command(command));
        }
        Action::Down => cleanup::remove(&lab)?,
        Action::InitHost { .. } => {}
    }
    Ok(())
}

fn table(status: &serde_json::Value) -> String {
    let mut lines = vec![format!("{:<10} {:<9} {:<8} {:<15} {:<5} DAEMONS", "HOST", "ROLE", "SITE", "ADDRESS", "UP")];
    for host in status["hosts"].as_array().into_iter().flatten() {
        let text = |key: &str| host[key].as_str().unwrap_or("-").to_owned();
        let daemons = host["daemons"].as_object().into_iter().flatten().map(|(name, daemon)| {
            let state = match (daemon["pid"].is_null(), daemon["ready"].as_bool().unwrap_or(false)) {
                (true, _) => "down",
                (false, true) => "ready",
                (false, false) => "not ready",
            };
            format!("{name}: {state}")
        });
        let daemons: Vec<_> = daemons.collect();
        let up = if host["role"] == "router" || host["up"] == true { "yes" } else { "no" };
        let (name, role, site, address) = (text("name"), text("role"), text("site"), text("address"));
        lines.push(format!("{name:<10} {role:<9} {site:<8} {address:<15} {up:<5} {}", daemons.join(", ")));
    }
    for cut in status["cuts"].as_array().into_iter().flatten() {
        lines.push(format!("cut: {} | {}", cut[0].as_str().unwrap_or(""), cut[1].as_str().unwrap_or("")));
    }
    lines.push(format!("KUBECONFIG={}", status["kubeconfig"].as_str().unwrap_or("")));
    lines.join("\n")
}
