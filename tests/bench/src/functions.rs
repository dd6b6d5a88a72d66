//! Which functions a process runs: each has a breakpoint where it begins, which is taken away when it is met. For processes of the
//! lab: one whose recorder is killed ends at its next breakpoint.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io,
    os::unix::fs::FileExt as _,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

const BREAKPOINT: u8 = 0xcc;
/// Pause when nothing has stopped.
const PAUSE: Duration = Duration::from_micros(200);

/// Where a function begins in memory, and what is there.
struct Function {
    /// All of its names.
    names: Vec<String>,
    /// The byte under the breakpoint, until that is met.
    under: Option<u8>,
}

/// Names of the Rust functions of a process.
pub(crate) struct Recorded {
    /// Those that it began, in the order in which it first did so.
    pub(crate) begun: Vec<String>,
    pub(crate) others: Vec<String>,
}

/// Watches which functions a process begins within a time.
///
/// # Errors
/// When its symbols can't be read or it can't be traced.
pub(crate) fn record(pid: i32, time: Duration) -> Result<Recorded> {
    let mut functions = functions(pid)?;
    let memory = File::options().read(true).write(true).open(format!("/proc/{pid}/mem"))?;
    let threads = stop_all(pid)?;
    for (address, function) in &mut functions {
        let mut byte = [0];
        memory.read_exact_at(&mut byte, *address)?;
        memory.write_all_at(&[BREAKPOINT], *address)?;
        function.under = Some(byte[0]);
    }
    for thread in threads {
        request(libc::PTRACE_SETOPTIONS, thread, libc::PTRACE_O_TRACECLONE as usize)?;
        request(libc::PTRACE_CONT, thread, 0)?;
    }
    let (mut begun, end) = (Vec::new(), Instant::now() + time);
    while Instant::now() < end {
        let Some((thread, status)) = stopped(-1, libc::WNOHANG)? else {
            thread::sleep(PAUSE);
            continue;
        };
        ensure!(libc::WIFSTOPPED(status) || thread != pid, "process {pid} has ended");
        if !libc::WIFSTOPPED(status) {
            continue;
        }
        let mut signal = signal(status);
        if signal == libc::SIGTRAP
            && let Some((address, function)) = at_breakpoint(thread, &mut functions)?
        {
            signal = 0;
            if let Some(byte) = function.under.take() {
                memory.write_all_at(&[byte], address)?;
                begun.append(&mut function.names);
            }
        }
        request(libc::PTRACE_CONT, thread, usize::try_from(signal)?)?;
    }
    let mut left = Vec::new();
    for thread in threads_of(pid)? {
        let Some(signal) = stop(thread)? else { continue };
        if signal == libc::SIGTRAP {
            at_breakpoint(thread, &mut functions)?;
        }
        left.push(thread);
    }
    for (address, function) in &functions {
        if let Some(byte) = function.under {
            memory.write_all_at(&[byte], *address)?;
        }
    }
    for thread in left {
        request(libc::PTRACE_DETACH, thread, 0)?;
    }
    Ok(Recorded { begun, others: functions.into_values().flat_map(|function| function.names).collect() })
}

/// The Rust functions of a process by their addresses in its memory. Others are left out: between the symbols of assembly there
/// can be data.
fn functions(pid: i32) -> Result<BTreeMap<u64, Function>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let (base, _) = maps.split_once('-').context("the process has no memory")?;
    let base = u64::from_str_radix(base, 16)?;
    let listed = Command::new("nm").arg("--defined-only").arg(format!("/proc/{pid}/exe")).output().context("nm")?;
    ensure!(listed.status.success(), "nm: {}", String::from_utf8_lossy(&listed.stderr));
    let mut functions = BTreeMap::new();
    for line in String::from_utf8(listed.stdout)?.lines() {
        let [address, "t" | "T", name] = line.split(' ').collect::<Vec<_>>()[..] else { continue };
        if name.starts_with("_ZN") || name.starts_with("_R") {
            let address = base + u64::from_str_radix(address, 16)?;
            let function = functions.entry(address).or_insert(Function { names: Vec::new(), under: None });
            function.names.push(name.to_owned());
        }
    }
    ensure!(!functions.is_empty(), "the program of process {pid} has no symbols");
    Ok(functions)
}

/// The function at whose breakpoint a thread has stopped; the thread is put back to its begin.
fn at_breakpoint(thread: i32, functions: &mut BTreeMap<u64, Function>) -> Result<Option<(u64, &mut Function)>> {
    let mut registers = std::mem::MaybeUninit::<libc::user_regs_struct>::uninit();
    request(libc::PTRACE_GETREGS, thread, registers.as_mut_ptr().expose_provenance())?;
    // SAFETY: the call succeeded, so the kernel has written all of it.
    let mut registers = unsafe { registers.assume_init() };
    registers.rip -= 1;
    let Some(function) = functions.get_mut(&registers.rip) else { return Ok(None) };
    request(libc::PTRACE_SETREGS, thread, (&raw const registers).expose_provenance())?;
    Ok(Some((registers.rip, function)))
}

fn threads_of(pid: i32) -> Result<Vec<i32>> {
    let entries = fs::read_dir(format!("/proc/{pid}/task")).with_context(|| format!("process {pid}"))?;
    entries.map(|entry| Ok(entry?.file_name().to_string_lossy().parse()?)).collect()
}

/// Stops all threads of a process, which is traced from then on. There can be new ones until the last has stopped.
fn stop_all(pid: i32) -> Result<BTreeSet<i32>> {
    let mut all = BTreeSet::new();
    loop {
        let stopped = all.len();
        for thread in threads_of(pid)? {
            if all.contains(&thread) || !if_there(request(libc::PTRACE_SEIZE, thread, 0))? {
                continue;
            }
            if stop(thread)?.is_some() {
                all.insert(thread);
            }
        }
        if all.len() == stopped {
            return Ok(all);
        }
    }
}

/// Stops a thread that is traced. Returns the signal that came first, 0 if there was none; nothing if the thread has ended.
fn stop(thread: i32) -> Result<Option<i32>> {
    if !if_there(request(libc::PTRACE_INTERRUPT, thread, 0))? {
        return Ok(None);
    }
    let (_, status) = stopped(thread, 0)?.context("a thread doesn't stop")?;
    Ok(libc::WIFSTOPPED(status).then(|| signal(status)))
}

/// Whether the thread of a request was still there.
fn if_there(done: io::Result<()>) -> io::Result<bool> {
    match done {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(false),
        done => done.map(|()| true),
    }
}

/// The signal that stopped a thread; none if that was an event, such as a new thread, which is traced from its begin.
fn signal(status: i32) -> i32 {
    if status >> 16 == 0 { libc::WSTOPSIG(status) } else { 0 }
}

/// A thread whose state has changed, with its new state; nothing if none has and `flags` say not to wait.
fn stopped(thread: i32, flags: i32) -> io::Result<Option<(i32, i32)>> {
    let mut status = 0;
    // SAFETY: the kernel writes one number, to where there is one.
    match unsafe { libc::waitpid(thread, &raw mut status, flags | libc::__WALL | libc::__WNOTHREAD) } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(None),
        thread => Ok(Some((thread, status))),
    }
}

fn request(request: libc::c_uint, thread: i32, data: usize) -> io::Result<()> {
    // SAFETY: none of the requests used here touches memory of this process but the registers' structures, whose addresses are given as
    // data and which live until it has returned.
    match unsafe { libc::ptrace(request, thread, 0, data) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Set in the process that is recorded, which runs the same test as the recorder.
    const RECORDED: &str = "EDGEMESH_BENCH_RECORDED";

    #[inline(never)]
    fn nap() {
        thread::sleep(Duration::from_millis(10));
    }

    #[inline(never)]
    fn is_never_called() {
        std::process::abort();
    }

    #[test]
    fn what_a_process_runs_is_told_from_what_it_does_not_and_it_goes_on() {
        let never: fn() = std::hint::black_box(is_never_called);
        if std::env::var_os(RECORDED).is_some() {
            // Longer than it is recorded; it is killed then.
            return (0..30_000).for_each(|_| nap());
        }
        let this = std::env::current_exe().unwrap();
        let test = "functions::tests::what_a_process_runs_is_told_from_what_it_does_not_and_it_goes_on";
        let mut process = Command::new(this)
            .args(["--exact", test])
            .env(RECORDED, "")
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let pid = i32::try_from(process.id()).unwrap();
        // Its program is mapped before its libraries are.
        while !fs::read_to_string(format!("/proc/{pid}/maps")).unwrap().contains("libc.so") {
            assert!(process.try_wait().unwrap().is_none(), "it did not start");
            thread::sleep(PAUSE);
        }
        let count = |names: &[String], part| names.iter().filter(|name| name.contains(part)).count();
        let mut recorded = record(pid, Duration::from_millis(300)).unwrap();
        // It begins to nap when it has started.
        while count(&recorded.begun, "3nap") == 0 {
            recorded = record(pid, Duration::from_millis(300)).unwrap();
        }
        let Recorded { begun, others } = recorded;
        assert_eq!((count(&begun, "3nap"), count(&others, "3nap")), (1, 0), "{begun:?}");
        assert_eq!(count(&begun, "is_never_called"), 0, "{never:?} was called");
        assert_eq!(count(&others, "is_never_called"), 1);
        assert!(process.try_wait().unwrap().is_none(), "it ended");
        process.kill().unwrap();
        process.wait().unwrap();
    }
}
