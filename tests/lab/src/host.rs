//! One host: a network namespace, and a first process that holds a mount, PID and UTS namespace of its own.

use std::{
    convert::Infallible,
    fs,
    io::ErrorKind,
    net::Ipv4Addr,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    mount::{MsFlags, mount},
    sys::wait::{WaitStatus, waitpid},
    unistd::{Pid, sethostname},
};

use crate::{cgroup, command};

const START_DEADLINE: Duration = Duration::from_secs(10);

/// A host's names and folders.
#[derive(Debug, Clone)]
pub struct HostNamespace {
    /// Host name.
    pub name: String,
    /// Name of the network namespace.
    pub netns: String,
    /// Its branch of the control groups.
    pub cgroup: String,
    /// Its files.
    pub folder: PathBuf,
}

impl HostNamespace {
    fn holder_file(&self) -> PathBuf {
        self.folder.join("holder.pid")
    }

    /// The first process's id, if the host is up.
    pub fn holder(&self) -> Option<i32> {
        let pid: i32 = fs::read_to_string(self.holder_file()).ok()?.trim().parse().ok()?;
        // A recycled process id is in another control group.
        let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        groups.contains(&self.cgroup).then_some(pid)
    }

    /// Starts the first process; the network namespace must exist.
    ///
    /// # Errors
    /// When it doesn't come up.
    pub fn boot(&self, nameserver: Ipv4Addr) -> Result<()> {
        fs::create_dir_all(&self.folder)?;
        let ready = self.folder.join("booted");
        remove_if_there(&ready)?;
        fs::write(self.folder.join("resolv.conf"), format!("nameserver {nameserver}\noptions timeout:1 attempts:2\n"))?;
        let group = cgroup::folder(&format!("{}/host", self.cgroup))?;
        fs::create_dir_all(&group)?;
        let this = std::env::current_exe()?;
        let script = "echo 0 > \"$1/cgroup.procs\"; shift; exec \"$@\"";
        let mut child = Command::new("setsid")
            .args(["sh", "-c", script, "sh"])
            .arg(&group)
            .args(["nsenter", &format!("--net=/run/netns/{}", self.netns)])
            .args(["unshare", "--pid", "--fork", "--kill-child", "--mount", "--uts", "--mount-proc", "--"])
            .arg(this)
            .args(["init-host", &self.name])
            .arg(&self.folder)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(self.folder.join("host.log"))?)
            .spawn()?;
        let deadline = Instant::now() + START_DEADLINE;
        loop {
            if ready.exists() {
                break;
            }
            if child.try_wait()?.is_some() || Instant::now() > deadline {
                let said = fs::read_to_string(self.folder.join("host.log")).unwrap_or_default();
                bail!("host {} doesn't start: {said}", self.name);
            }
            thread::sleep(Duration::from_millis(5));
        }
        let holder = cgroup::processes(&self.cgroup)?
            .into_iter()
            .find(|pid| is_first_of_its_namespace(*pid))
            .context("the host's first process is gone")?;
        fs::write(self.holder_file(), holder.to_string())?;
        Ok(())
    }

    /// A command that runs `program` on this host, in the control group `leaf` below the host's.
    ///
    /// # Errors
    /// When the host is down.
    pub fn command(&self, leaf: &str, program: &[String]) -> Result<Command> {
        let holder = self.holder().with_context(|| format!("host {} is down", self.name))?;
        let group = cgroup::folder(&format!("{}/{leaf}", self.cgroup))?;
        fs::create_dir_all(&group)?;
        let mut command = Command::new("nsenter");
        command
            .args(["-t", &holder.to_string(), "--net", "--mount", "--pid", "--uts", "--"])
            .args(["sh", "-c", "echo 0 > \"$1/cgroup.procs\"; shift; exec \"$@\"", "sh"])
            .arg(group)
            .args(program);
        Ok(command)
    }

    /// Starts a program on this host that outlives the caller, with its output appended to `log`.
    ///
    /// # Errors
    /// When the host is down or the program can't be started.
    pub fn spawn(&self, leaf: &str, program: &[String], log: &Path) -> Result<()> {
        let output = fs::OpenOptions::new().create(true).append(true).open(log)?;
        let errors = output.try_clone()?;
        let mut command = self.command(leaf, program)?;
        command.stdin(Stdio::null()).stdout(output).stderr(errors).process_group(0).spawn()?;
        Ok(())
    }

    /// Kills everything on the host and removes its network namespace.
    ///
    /// # Errors
    /// When something can't be killed or removed.
    pub fn destroy(&self) -> Result<()> {
        cgroup::kill(&self.cgroup)?;
        cgroup::remove(&self.cgroup)?;
        remove_if_there(&self.holder_file())?;
        if Path::new("/run/netns").join(&self.netns).exists() {
            command::ip(&format!("netns del {}", self.netns))?;
        }
        Ok(())
    }
}

/// Removes a file that may not exist.
///
/// # Errors
/// When it exists and can't be removed.
pub fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error).context(path.display().to_string()),
        _ => Ok(()),
    }
}

fn is_first_of_its_namespace(pid: i32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let ids = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
    let ids: Vec<_> = ids.split_whitespace().collect();
    ids.len() > 1 && ids.last() == Some(&"1")
}

/// The host's first process: prepares its namespaces, then reaps whatever is orphaned, for ever.
///
/// # Errors
/// When the namespaces can't be prepared.
pub fn run_as_first_process(name: &str, folder: &Path) -> Result<Infallible> {
    sethostname(name)?;
    // A fresh /run, as after a boot: containerd's state and sockets, CNI's network namespaces.
    let none: Option<&str> = None;
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), Some("mode=755")).context("mount /run")?;
    fs::create_dir_all("/run/netns")?;
    let resolv = fs::canonicalize("/etc/resolv.conf").unwrap_or_else(|_| PathBuf::from("/etc/resolv.conf"));
    mount(Some(&folder.join("resolv.conf")), &resolv, none, MsFlags::MS_BIND, none).context("bind /etc/resolv.conf")?;
    command::ip("link set lo up")?;
    fs::write(folder.join("booted"), "")?;
    // Orphans come to this process; a child of its own keeps waitpid from returning at once while there are none.
    let idle = Command::new("sleep").arg("infinity").stdin(Stdio::null()).spawn()?;
    let keep = Pid::from_raw(i32::try_from(idle.id())?);
    loop {
        match waitpid(None, None) {
            Ok(WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, ..)) if pid == keep => {
                bail!("the host's idle process ended");
            }
            _ => {}
        }
    }
}

/// Replaces this process with `command`, so that its exit code and terminal are the caller's.
pub fn become_command(mut command: Command) -> anyhow::Error {
    anyhow::Error::from(command.exec()).context(format!("{command:?}"))
}
