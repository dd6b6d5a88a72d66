//! Brings a lab up: hosts and links, the hub, then all nodes side by side; and reboots a node.

use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};

use crate::{
    cleanup, command,
    daemons::{CONTAINERD_SOCKET, Daemon},
    host::HostNamespace,
    lab::Lab,
    network, settings,
    topology::{Host, INTERNET_DNS, INTERNET_GATEWAY, Role, Topology},
};

const NODES_READY_DEADLINE: Duration = Duration::from_secs(60);
/// Names that the internet's DNS server knows.
const OUTSIDE_NAMES: &[(&str, Ipv4Addr)] =
    &[("outside.example", Ipv4Addr::new(198, 51, 100, 7)), ("other.example", Ipv4Addr::new(198, 51, 100, 8))];

/// Removes what is left of a lab of this name, then brings it up and waits until every node is Ready.
///
/// # Errors
/// When a step fails; what was started stays for a look, until `down` or the next `up`.
pub fn up(lab: &Lab, topology: &Topology, images: &Path, say: &(dyn Fn(&str) + Sync)) -> Result<()> {
    for program in ["hub", "edgecore", "edgemesh-agent", "edgemesh-gateway"] {
        let path = lab.programs.join(program);
        fs::metadata(&path).with_context(|| format!("{}: build first: make build", path.display()))?;
    }
    cleanup::remove(lab)?;
    fs::create_dir_all(&lab.folder)?;
    fs::write(lab.folder.join("topology.json"), serde_json::to_vec_pretty(topology)?)?;
    let hosts = topology.hosts();
    for host in &hosts {
        power_on(lab, topology, host)?;
    }
    lab.apply_cuts()?;
    say("hosts and links are up");

    let internet = lab.namespace("internet");
    fs::write(internet.folder.join("dnsmasq.conf"), dnsmasq_settings(&internet.folder))?;
    Daemon::Dns.start(&internet, &lab.program(Daemon::Dns, &internet))?;
    let hub_host = hosts.iter().find(|host| host.role == Role::Hub).context("a topology has a hub")?;
    let hub = lab.namespace(&hub_host.name);
    settings::write_hub(hub_host, &hub)?;
    Daemon::Hub.start(&hub, &lab.program(Daemon::Hub, &hub))?;

    let nodes = topology.nodes();
    thread::scope(|scope| {
        let starts: Vec<_> = nodes
            .iter()
            .map(|node| {
                scope.spawn(move || {
                    first_start(lab, topology, hub_host, node, images).with_context(|| node.name.clone())
                })
            })
            .collect();
        Daemon::Hub.wait_ready(&hub)?;
        say("hub is ready");
        starts.into_iter().try_for_each(|start| start.join().map_err(|_| anyhow!("a start thread panicked"))?)
    })?;
    say("daemons are started");
    wait_nodes_ready(lab, nodes.len())?;
    for node in &nodes {
        let host = lab.namespace(&node.name);
        for daemon in Daemon::of(node) {
            daemon.wait_ready(&host)?;
        }
    }
    say("every node is Ready");
    Ok(())
}

/// Everything of a host but its daemons.
fn power_on(lab: &Lab, topology: &Topology, host: &Host) -> Result<()> {
    let namespace = lab.namespace(&host.name);
    network::connect(topology, host, &namespace, &|name| lab.netns(name))?;
    // Routers only forward: they need no processes.
    if host.role != Role::Router {
        namespace.boot(INTERNET_DNS)?;
    }
    Ok(())
}

fn dnsmasq_settings(folder: &Path) -> String {
    let mut text = format!(
        "port=53\nlisten-address={INTERNET_DNS},{INTERNET_GATEWAY}\nbind-interfaces\nlocal-ttl=60\nno-resolv\nno-hosts\nuser=root\npid-file={}\nlog-facility=-\n",
        folder.join("dnsmasq.pid").display()
    );
    for (name, address) in OUTSIDE_NAMES {
        let [a, b, c, d] = address.octets();
        text.push_str(&format!("address=/{name}/{address}\nptr-record={d}.{c}.{b}.{a}.in-addr.arpa,{name}\n"));
    }
    text
}

fn first_start(lab: &Lab, topology: &Topology, hub_host: &Host, node: &Host, images: &Path) -> Result<()> {
    let host = lab.namespace(&node.name);
    settings::write_node(node, &host, topology.datapath)?;
    Daemon::Containerd.start(&host, &lab.program(Daemon::Containerd, &host))?;
    Daemon::Containerd.wait_ready(&host)?;
    for image in ["pause.tar", "demo.tar"] {
        let path = images.join(image).display().to_string();
        let words = ["ctr", "-a", CONTAINERD_SOCKET, "-n", "k8s.io", "images", "import", &path].map(str::to_owned);
        command::finish(&mut host.command("shell", &words)?)?;
    }
    let hub = lab.namespace(&hub_host.name);
    Daemon::Hub.wait_ready(&hub)?;
    let token = join_token(lab, &hub, node)?;
    let mut join = lab.program(Daemon::Edgecore, &host);
    let url = format!("https://{}:{}", hub_host.address, settings::LINK_PORT);
    join.insert(1, "join".to_owned());
    join.extend(["--hub", &url, "--token", token.trim(), "--node", &node.name].map(str::to_owned));
    command::finish(&mut host.command("shell", &join)?)?;
    start_daemons(lab, node, &host)
}

/// A join token for a node, as `hub token create` gives it.
///
/// # Errors
/// When the hub refuses.
fn join_token(lab: &Lab, hub: &HostNamespace, node: &Host) -> Result<String> {
    let config = hub.folder.join("hub.yaml").display().to_string();
    let program = lab.programs.join("hub").display().to_string();
    let mut words =
        [&program, "token", "create", "--node", &node.name, "--config", &config].map(str::to_owned).to_vec();
    if node.gateway {
        words.push("--gateway".to_owned());
    }
    command::finish(&mut hub.command("shell", &words)?)
}

fn start_daemons(lab: &Lab, node: &Host, host: &HostNamespace) -> Result<()> {
    for daemon in Daemon::of(node) {
        daemon.start(host, &lab.program(daemon, host))?;
    }
    Ok(())
}

fn wait_nodes_ready(lab: &Lab, count: usize) -> Result<()> {
    let deadline = Instant::now() + NODES_READY_DEADLINE;
    let path =
        "jsonpath={range .items[*]}{.metadata.name}={.status.conditions[?(@.type==\"Ready\")].status}{\"\\n\"}{end}";
    let words = ["get", "nodes", "-o", path].map(str::to_owned);
    loop {
        let seen = command::finish(&mut lab.kubectl(&words));
        if let Ok(text) = &seen
            && text.lines().filter(|line| line.ends_with("=True")).count() == count
        {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("the nodes don't get Ready: {seen:?}");
        }
        thread::sleep(Duration::from_millis(100));
    }
}

/// Kills everything on a host, as a power cut does, and starts it again from its disk.
///
/// # Errors
/// When a step fails.
pub fn reboot(lab: &Lab, name: &str) -> Result<()> {
    let host = lab.machine(name)?;
    let namespace = lab.namespace(name);
    namespace.destroy()?;
    start(lab, &host, None)
}

/// Starts a host that is down, and its daemons (or the one given).
///
/// # Errors
/// When a step fails.
pub fn start(lab: &Lab, host: &Host, daemon: Option<Daemon>) -> Result<()> {
    let namespace = lab.namespace(&host.name);
    if namespace.holder().is_none() {
        namespace.destroy()?;
        power_on(lab, &lab.topology()?, host)?;
        lab.apply_cuts()?;
    }
    let daemons = daemon.map_or_else(|| Daemon::of(host), |one| vec![one]);
    for daemon in &daemons {
        daemon.start(&namespace, &lab.program(*daemon, &namespace))?;
    }
    Ok(())
}

/// Kills a daemon, or the whole host.
///
/// # Errors
/// When it can't be killed.
pub fn kill(lab: &Lab, host: &Host, daemon: Option<Daemon>) -> Result<()> {
    let namespace = lab.namespace(&host.name);
    match daemon {
        Some(daemon) => daemon.kill(&namespace),
        // The hub's host stays: kubectl runs on it.
        None if host.role == Role::Hub => Daemon::Hub.kill(&namespace),
        None => namespace.destroy(),
    }
}

/// Builds the images where they are missing or old.
///
/// # Errors
/// When the script fails.
pub fn build_images(script: &Path, folder: &Path) -> Result<PathBuf> {
    command::finish(Command::new(script).arg(folder))?;
    Ok(folder.to_owned())
}
