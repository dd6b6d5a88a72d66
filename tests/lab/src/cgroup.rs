//! The lab's control groups: one tree a lab, one branch a host. They hold the hosts' processes together, so that
//! a host can be killed as a whole, and carry the nodes' eBPF programs.

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

const KILL_DEADLINE: Duration = Duration::from_secs(20);

/// Where cgroup hierarchies are mounted: version 2 first, then each version 1 controller.
///
/// # Errors
/// When there is no version 2 hierarchy.
pub fn mounts() -> Result<Vec<PathBuf>> {
    let table = fs::read_to_string("/proc/self/mounts")?;
    let of = |kind: &str| -> Vec<PathBuf> {
        let fields = table.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        fields.filter(|f| f.get(2) == Some(&kind)).map(|f| PathBuf::from(f[1])).collect()
    };
    let (mut all, old) = (of("cgroup2"), of("cgroup"));
    if all.is_empty() {
        bail!("no cgroup2 hierarchy is mounted: mount -t cgroup2 none /sys/fs/cgroup/unified");
    }
    all.truncate(1);
    all.extend(old);
    Ok(all)
}

/// The folder of `path` (absolute, as in `/proc/PID/cgroup`) in the version 2 hierarchy.
///
/// # Errors
/// When there is no such hierarchy.
pub fn folder(path: &str) -> Result<PathBuf> {
    let mounts = mounts()?;
    let root = mounts.first().context("no cgroup2 hierarchy")?;
    Ok(root.join(path.trim_start_matches('/')))
}

/// The processes below `path`, as this process sees their ids.
///
/// # Errors
/// When the hierarchy can't be read.
pub fn processes(path: &str) -> Result<Vec<i32>> {
    fn collect(folder: &Path, pids: &mut Vec<i32>) {
        if let Ok(text) = fs::read_to_string(folder.join("cgroup.procs")) {
            pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
        }
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            if entry.path().is_dir() {
                collect(&entry.path(), pids);
            }
        }
    }
    let mut pids = Vec::new();
    collect(&folder(path)?, &mut pids);
    Ok(pids)
}

/// Kills every process below `path` with SIGKILL and waits until they are gone.
///
/// # Errors
/// When some outlive the deadline.
pub fn kill(path: &str) -> Result<()> {
    let root = folder(path)?;
    let deadline = Instant::now() + KILL_DEADLINE;
    loop {
        match fs::write(root.join("cgroup.kill"), "1") {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error).context(format!("{}/cgroup.kill", root.display())),
        }
        let left = processes(path)?;
        if left.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("processes {left:?} in {} can't be killed", root.display());
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Removes `path` with everything below, in all hierarchies. The processes must be gone.
///
/// # Errors
/// When a group stays busy past the deadline.
pub fn remove(path: &str) -> Result<()> {
    for mount in mounts()? {
        let root = mount.join(path.trim_start_matches('/'));
        let deadline = Instant::now() + KILL_DEADLINE;
        while root.exists() {
            remove_tree(&root);
            if root.exists() {
                if Instant::now() > deadline {
                    bail!("{} is still in use", root.display());
                }
                thread::sleep(Duration::from_millis(10));
            }
        }
    }
    Ok(())
}

/// Removes what it can; a group whose last process is still being reaped stays for the next round.
fn remove_tree(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            remove_tree(&entry.path());
        }
    }
    if let Err(error) = fs::remove_dir(folder)
        && !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ResourceBusy | ErrorKind::DirectoryNotEmpty)
    {
        eprint_once(folder, &error);
    }
}

#[allow(clippy::print_stderr)]
fn eprint_once(folder: &Path, error: &std::io::Error) {
    eprintln!("lab: {}: {error}", folder.display());
}
