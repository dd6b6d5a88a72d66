//! The daemons of a host: how each is started, killed, and asked whether it is ready.

use std::{
    fs,
    path::PathBuf,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    cgroup,
    host::HostNamespace,
    topology::{Host, Role},
};

const READY_DEADLINE: Duration = Duration::from_secs(60);
const END_DEADLINE: Duration = Duration::from_secs(15);
/// Where every host's containerd listens; `/run` is each host's own.
pub const CONTAINERD_SOCKET: &str = "/run/containerd/containerd.sock";

/// A daemon of the lab.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Daemon {
    /// The internet's DNS server.
    Dns,
    /// The hub with its embedded API.
    Hub,
    /// The container runtime.
    Containerd,
    /// edgecore.
    Edgecore,
    /// edgemesh-agent.
    Agent,
    /// edgemesh-gateway.
    Gateway,
}

impl Daemon {
    /// The name in the lab's commands.
    pub fn name(self) -> &'static str {
        match self {
            Self::Dns => "dns",
            Self::Hub => "hub",
            Self::Containerd => "containerd",
            Self::Edgecore => "edgecore",
            Self::Agent => "agent",
            Self::Gateway => "gateway",
        }
    }

    /// The program's file name, as the kernel shows it (cut to 15 bytes).
    fn program(self) -> &'static str {
        match self {
            Self::Dns => "dnsmasq",
            Self::Hub => "hub",
            Self::Containerd => "containerd",
            Self::Edgecore => "edgecore",
            Self::Agent => "edgemesh-agent",
            Self::Gateway => "edgemesh-gateway",
        }
    }

    fn admin_port(self) -> Option<u16> {
        match self {
            Self::Dns | Self::Containerd => None,
            Self::Hub => Some(9440),
            Self::Edgecore => Some(9441),
            Self::Agent => Some(9442),
            Self::Gateway => Some(9443),
        }
    }

    /// The daemons of a host, in the order in which they start.
    pub fn of(host: &Host) -> Vec<Self> {
        match host.role {
            Role::Internet => vec![Self::Dns],
            Role::Hub => vec![Self::Hub],
            Role::Client | Role::Router => Vec::new(),
            Role::Node => {
                let mut all = vec![Self::Containerd, Self::Edgecore, Self::Agent];
                if host.gateway {
                    all.push(Self::Gateway);
                }
                all
            }
        }
    }

    /// The daemon of `host` with this name.
    ///
    /// # Errors
    /// When the host has none of that name.
    pub fn named(host: &Host, name: &str) -> Result<Self> {
        let all = Self::of(host);
        all.iter().copied().find(|daemon| daemon.name() == name).with_context(|| {
            let names: Vec<_> = all.iter().map(|daemon| daemon.name()).collect();
            format!("{} runs no daemon {name:?}; it runs: {}", host.name, names.join(", "))
        })
    }

    fn leaf(self) -> String {
        format!("daemon-{}", self.name())
    }

    /// Its log on this host.
    pub fn log(self, host: &HostNamespace) -> PathBuf {
        host.folder.join(format!("{}.log", self.name()))
    }

    /// Its process, if it runs.
    ///
    /// # Errors
    /// When the control groups can't be read.
    pub fn process(self, host: &HostNamespace) -> Result<Option<i32>> {
        let pids = cgroup::processes(&format!("{}/{}", host.cgroup, self.leaf()))?;
        let name: String = self.program().chars().take(15).collect();
        let is_daemon =
            |pid: &i32| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == name);
        Ok(pids.into_iter().find(is_daemon))
    }

    /// Starts it, unless it runs.
    ///
    /// # Errors
    /// When the host is down or the program can't be started.
    pub fn start(self, host: &HostNamespace, program: &[String]) -> Result<()> {
        if self.process(host)?.is_some() {
            return Ok(());
        }
        host.spawn(&self.leaf(), program, &self.log(host))
    }

    /// Kills it with SIGKILL and waits until it is gone, with its sockets and locks. What it started (containers) stays.
    ///
    /// # Errors
    /// When it can't be killed.
    pub fn kill(self, host: &HostNamespace) -> Result<()> {
        let deadline = Instant::now() + END_DEADLINE;
        while let Some(pid) = self.process(host)? {
            // Gone in between is what is wanted.
            if let Err(error) = kill(Pid::from_raw(pid), Signal::SIGKILL)
                && error != nix::errno::Errno::ESRCH
            {
                return Err(error).context(format!("kill {} of {}", self.name(), host.name));
            }
            while !has_ended(pid) {
                if Instant::now() > deadline {
                    bail!("{} of {} can't be killed", self.name(), host.name);
                }
                thread::sleep(Duration::from_millis(5));
            }
        }
        Ok(())
    }

    /// Whether it says that it is ready.
    pub fn is_ready(self, host: &HostNamespace) -> bool {
        match self.admin_port() {
            Some(port) => {
                let url = format!("http://127.0.0.1:{port}/readyz");
                let namespace = format!("--net=/run/netns/{}", host.netns);
                let arguments = [&namespace, "curl", "-sf", "-o", "/dev/null", "--max-time", "2", &url];
                Command::new("nsenter").args(arguments).status().is_ok_and(|status| status.success())
            }
            None if self == Self::Containerd => {
                let words = ["ctr", "-a", CONTAINERD_SOCKET, "--connect-timeout", "1s", "version"].map(str::to_owned);
                host.command("shell", &words).and_then(|mut command| crate::command::finish(&mut command)).is_ok()
            }
            None => self.process(host).is_ok_and(|pid| pid.is_some()),
        }
    }

    /// Waits until it is ready.
    ///
    /// # Errors
    /// When it ends or the deadline passes; the message shows the end of its log.
    pub fn wait_ready(self, host: &HostNamespace) -> Result<()> {
        let deadline = Instant::now() + READY_DEADLINE;
        let started = Instant::now();
        while !self.is_ready(host) {
            // The shell that becomes the daemon needs a moment to do so.
            let ended = started.elapsed() > Duration::from_secs(2) && self.process(host)?.is_none();
            if ended || Instant::now() > deadline {
                let log = fs::read_to_string(self.log(host)).unwrap_or_default();
                let lines: Vec<_> = log.lines().collect();
                let tail = lines[lines.len().saturating_sub(15)..].join("\n  ");
                let what = if ended { "ended" } else { "isn't ready" };
                bail!("{} of {} {what}; its log ends with:\n  {tail}", self.name(), host.name);
            }
            thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }
}

/// Whether all threads of a process have ended. A killed process leaves its control group when its threads begin to end, and
/// keeps its sockets and file locks until the last one has: one that is started in between finds its port taken.
fn has_ended(pid: i32) -> bool {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return true };
    let ended = |stat: String| {
        stat.rsplit(')').next().is_some_and(|rest| matches!(rest.trim_start().chars().next(), Some('Z' | 'X')))
    };
    // A thread whose file can't be read has gone in between.
    threads.flatten().all(|thread| fs::read_to_string(thread.path().join("stat")).map_or(true, ended))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_has_ended_when_all_its_threads_have() {
        assert!(!has_ended(i32::try_from(std::process::id()).unwrap()));
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        assert!(!has_ended(pid));
        child.kill().unwrap();
        let deadline = Instant::now() + END_DEADLINE;
        while !has_ended(pid) {
            assert!(Instant::now() < deadline, "a killed process that nobody has waited for yet counts as ended");
            thread::sleep(Duration::from_millis(5));
        }
        child.wait().unwrap();
        assert!(has_ended(pid));
    }
}
