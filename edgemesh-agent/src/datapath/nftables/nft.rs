//! Runs the `nft` program, which makes tables, maps and chains: a script is one transaction, in force as a whole or not at
//! all (nft(8)).

use std::{
    io::{self, Write},
    process::{Command, Output, Stdio},
    sync::mpsc::{RecvTimeoutError, channel},
    thread,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// Even the whole table takes a small machine a fraction of a second.
const DEADLINE: Duration = Duration::from_secs(60);
/// How much of what `nft` complains about is passed on, in bytes: it repeats the line, which can be long.
const MAX_COMPLAINT: usize = 400;

/// Why rules can't be read or written.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    /// The program can't be run.
    #[error("nft (Debian: package nftables) can't be run: {0}")]
    Run(#[from] io::Error),
    /// It gave no answer in time.
    #[error("nft gave no answer within {0:?}")]
    Deadline(Duration),
    /// It refuses, or the kernel does.
    #[error("nft: {0}")]
    Refused(String),
    /// The kernel refuses what is asked of it without the program.
    #[error("nftables: {what}: {error}")]
    Kernel {
        /// The table or map that it is about.
        what: String,
        /// What the kernel says.
        error: io::Error,
    },
}

impl NftError {
    /// Whether the kernel lacks memory, so that it says nothing of what is in it.
    pub(super) fn is_shortage(&self) -> bool {
        let Self::Kernel { error, .. } = self else { return false };
        matches!(error.raw_os_error(), Some(libc::ENOMEM | libc::ENOBUFS | libc::EMSGSIZE))
    }
}

/// Runs a script as one transaction, in the network namespace of the calling thread.
///
/// # Errors
/// When it is not in force.
pub(crate) fn transaction(script: &str) -> Result<(), NftError> {
    run(&["-f", "-"], script)
}

/// Tries whether the program runs and the kernel would take a script. What there is isn't listed: that reads all elements.
///
/// # Errors
/// When not.
pub(super) fn check(script: &str) -> Result<(), NftError> {
    run(&["-c", "-f", "-"], script)
}

fn run(arguments: &[&str], input: &str) -> Result<(), NftError> {
    let mut child = Command::new("nft")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let pid = Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?);
    let stdin = child.stdin.take();
    let (done, wait) = channel::<()>();
    let (output, in_time) = thread::scope(|scope| {
        let watchdog = scope.spawn(move || {
            let late = matches!(wait.recv_timeout(DEADLINE), Err(RecvTimeoutError::Timeout));
            // It is not reaped before `done` is dropped, so the number is still its own.
            late && kill(pid, Signal::SIGKILL).is_ok()
        });
        // A program that complains before it has read all ends the pipe: its answer says more.
        let writer = scope.spawn(move || stdin.is_some_and(|mut stdin| stdin.write_all(input.as_bytes()).is_ok()));
        let output: io::Result<Output> = child.wait_with_output();
        drop(done);
        let _ = writer.join();
        (output, !watchdog.join().unwrap_or(false))
    });
    let output = output?;
    if !in_time {
        return Err(NftError::Deadline(DEADLINE));
    }
    if output.status.success() {
        return Ok(());
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    let mut complaint = complaint.trim().to_owned();
    let end = (0..=MAX_COMPLAINT.min(complaint.len())).rev().find(|&at| complaint.is_char_boundary(at)).unwrap_or(0);
    complaint.truncate(end);
    Err(NftError::Refused(complaint))
}
