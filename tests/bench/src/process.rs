//! Processes: finding one on the lab's nodes, what CPU time and memory it has used, those that the bench starts itself, and
//! the CPU on which a thread stays.

use std::{
    fs::{self, File},
    io::{self, Read},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// Unit of the times in /proc/PID/stat: `USER_HZ`, which Linux keeps at 100 for programs.
const TICKS_PER_SECOND: f64 = 100.0;
/// Number of the start time in /proc/PID/stat, counted from behind the name.
const STARTED: usize = 19;
const START_DEADLINE: Duration = Duration::from_secs(10);

/// Keeps the calling thread on the first CPU that is allowed. A client and a server that take turns do it both: left to the
/// scheduler they share a CPU in some measurements and not in others, and waking another CPU costs more than what is measured.
///
/// # Errors
/// When the kernel refuses.
pub(crate) fn stay_on_first_cpu() -> Result<()> {
    let this = Pid::from_raw(0);
    let allowed = sched_getaffinity(this)?;
    let first = (0..CpuSet::count()).find(|cpu| allowed.is_set(*cpu).unwrap_or(false));
    let mut one = CpuSet::new();
    one.set(first.context("no CPU is allowed")?)?;
    Ok(sched_setaffinity(this, &one)?)
}

/// CPU seconds (user and system) that a process has used, from the clock that the kernel keeps for it (clock_getcpuclockid(3)): in
/// nanoseconds, where /proc/PID/stat counts hundredths of a second.
///
/// # Errors
/// When it is gone.
pub(crate) fn cpu_seconds(pid: i32) -> Result<f64> {
    let (mut clock, mut time) = (0, libc::timespec { tv_sec: 0, tv_nsec: 0 });
    // SAFETY: the call writes one number, to where there is one.
    let error = unsafe { libc::clock_getcpuclockid(pid, &raw mut clock) };
    ensure!(error == 0, "process {pid}: {}", io::Error::from_raw_os_error(error));
    // SAFETY: the call writes one time, to where there is one.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return Err(io::Error::last_os_error()).with_context(|| format!("process {pid}"));
    }
    Ok(time.tv_sec as f64 + time.tv_nsec as f64 / 1e9)
}

/// For how many seconds a process has run.
///
/// # Errors
/// When it is gone.
pub(crate) fn age_seconds(pid: i32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("process {pid}"))?;
    // The name, in parentheses, may hold spaces.
    let (_, rest) = stat.rsplit_once(')').context("/proc/PID/stat has a name")?;
    let started = rest.split_whitespace().nth(STARTED).context("/proc/PID/stat has times")?;
    let started = started.parse::<f64>()? / TICKS_PER_SECOND;
    let uptime = fs::read_to_string("/proc/uptime")?;
    let now: f64 = uptime.split(' ').next().context("/proc/uptime is empty")?.parse()?;
    Ok(now - started)
}

/// Resident memory of a process in MB (10^6 bytes).
///
/// # Errors
/// When it is gone.
pub(crate) fn resident_megabytes(pid: i32) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).with_context(|| format!("process {pid}"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("/proc/PID/status has VmRSS")?;
    let kibibytes: f64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kibibytes * 1024.0 / 1e6)
}

/// The process called `name` below the control group `group`.
pub(crate) fn find_process(name: &str, group: &str) -> Option<i32> {
    let pids =
        fs::read_dir("/proc").ok()?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let mut found = pids.filter(|pid| {
        let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
        read("comm").trim() == name && read("cgroup").contains(&format!("{group}/"))
    });
    found.next()
}

/// A program that runs on a node until this is dropped.
#[derive(Debug)]
pub(crate) struct Background {
    child: Child,
    /// Its process.
    pub(crate) pid: i32,
}

impl Background {
    /// Starts `command`, which becomes a process called `name` in the control group `group` and writes its standard output to the file `log`.
    ///
    /// # Errors
    /// When it ends at once; the message is what it said.
    pub(crate) fn start(mut command: Command, name: &str, group: &str, log: &Path) -> Result<Self> {
        if let Some(pid) = find_process(name, group) {
            bail!("a process {name} ({pid}) runs there already");
        }
        let mut child = command.stdout(File::create(log)?).stderr(Stdio::piped()).spawn()?;
        let deadline = Instant::now() + START_DEADLINE;
        loop {
            if let Some(pid) = find_process(name, group) {
                // Nobody may fill the pipe of a program that talks.
                if let Some(mut errors) = child.stderr.take() {
                    thread::spawn(move || std::io::copy(&mut errors, &mut std::io::sink()));
                }
                return Ok(Self { child, pid });
            }
            if child.try_wait()?.is_some() || Instant::now() > deadline {
                let mut said = String::new();
                child.kill()?;
                if let Some(errors) = child.stderr.as_mut() {
                    errors.take(4096).read_to_string(&mut said)?;
                }
                bail!("{name} doesn't start: {}", said.trim());
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        // Gone already is what is wanted.
        let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
        drop(self.child.wait());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_uses_memory_and_time() {
        let pid = i32::try_from(std::process::id()).unwrap();
        assert!(resident_megabytes(pid).unwrap() > 0.5);
        assert!((0.0..600.0).contains(&age_seconds(pid).unwrap()));
        let begin = Instant::now();
        while cpu_seconds(pid).unwrap() < 0.02 {
            assert!(begin.elapsed() < Duration::from_secs(20), "no CPU time is counted");
        }
    }

    #[test]
    fn a_process_that_is_gone_is_an_error() {
        // Linux gives no number above 4 Mi.
        let gone = 5 << 20;
        assert!(cpu_seconds(gone).is_err());
        assert!(resident_megabytes(gone).is_err());
    }
}
