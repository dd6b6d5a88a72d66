//! Runs the `nft` program: a script is one transaction, in force as a whole or not at all (nft(8)).

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

/// A hundred thousand elements take about a second on a small machine.
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
}

/// Runs a script as one transaction, in the network namespace of the calling thread.
///
/// # Errors
/// When it is not in force.
pub(super) fn transaction(script: &str) -> Result<(), NftError> {
    run(&["-f", "-"], script).map(drop)
}

/// Whether something can be listed: `["chain", "inet", TABLE, NAME]`.
///
/// # Errors
/// When `nft` can't be run.
pub(super) fn exists(what: &[&str]) -> Result<bool, NftError> {
    let arguments: Vec<&str> = ["-t", "list"].into_iter().chain(what.iter().copied()).collect();
    match run(&arguments, "") {
        Ok(_) => Ok(true),
        Err(NftError::Refused(_)) => Ok(false),
        Err(error) => Err(error),
    }
}

fn run(arguments: &[&str], input: &str) -> Result<String, NftError> {
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
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    let mut complaint = complaint.trim().to_owned();
    let end = (0..=MAX_COMPLAINT.min(complaint.len())).rev().find(|&at| complaint.is_char_boundary(at)).unwrap_or(0);
    complaint.truncate(end);
    Err(NftError::Refused(complaint))
}
