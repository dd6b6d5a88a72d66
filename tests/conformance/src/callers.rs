//! Who calls, and what they are told: pods, processes of nodes, and the client outside of the cluster.

use std::{
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    sync::Arc,
    thread,
    time::Instant,
};

use anyhow::{Context, Result};
use parking_lot::Mutex;
use serde_json::Value;

use crate::field::Field;

/// Somebody who calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum From<'a> {
    /// A pod.
    Pod(&'a str),
    /// A process in a node's network.
    Node(&'a str),
    /// A machine outside.
    Outside,
}

/// Who answered a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The pod.
    pub pod: String,
    /// Its node.
    pub node: String,
    /// The client's address and port, as the pod saw them.
    pub client: String,
}

impl Answer {
    /// The client's address.
    pub fn client_ip(&self) -> &str {
        self.client.rsplit_once(':').map_or(&*self.client, |(ip, _)| ip.trim_matches(['[', ']']))
    }

    fn read(line: &str) -> Result<Self, String> {
        if let Some(error) = line.strip_prefix("error: ") {
            return Err(error.to_owned());
        }
        if line.starts_with('{') {
            let body: Value = serde_json::from_str(line).map_err(|error| format!("{error}: {line}"))?;
            let text = |key: &str| body[key].as_str().unwrap_or_default().to_owned();
            return Ok(Self { pod: text("pod"), node: text("node"), client: text("client") });
        }
        let words: Vec<_> = line.split(' ').collect();
        match words[..] {
            [pod, node, client] => Ok(Self { pod: pod.to_owned(), node: node.to_owned(), client: client.to_owned() }),
            _ => Err(format!("no answer of the demo server: {line:?}")),
        }
    }
}

/// What came of a call: an answer, or why there was none.
pub type Outcome = Result<Answer, String>;

/// A command of a caller.
///
/// # Errors
/// When it is not there.
pub fn command(field: &Field, from: From<'_>, words: &[&str]) -> Result<Command> {
    let owned = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    let on_host = |host: &str| {
        let mut words = owned(words);
        if words.first().is_some_and(|program| program == "call") {
            words[0] = field.call_program()?.display().to_string();
        }
        field.lab.namespace(host).command("shell", &words)
    };
    match from {
        From::Pod(pod) => field.in_pod(pod, &owned(words)),
        From::Node(node) => on_host(node),
        From::Outside => on_host("client"),
    }
}

/// Runs a command to its end; gives its exit code, if it exited, and what it said.
///
/// # Errors
/// When it can't be started.
pub fn run(field: &Field, from: From<'_>, words: &[&str]) -> Result<(Option<i32>, String)> {
    let output = command(field, from, words)?.stdin(Stdio::null()).output()?;
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    Ok((output.status.code(), text))
}

/// Calls a URL a number of times, with further options of the `call` program.
///
/// # Errors
/// When the program can't be started.
pub fn calls(field: &Field, from: From<'_>, options: &[&str], url: &str, count: usize) -> Result<Vec<Outcome>> {
    let count = count.to_string();
    let words = [&["call", "--count", &count], options, &[url]].concat();
    let (_, text) = run(field, from, &words)?;
    Ok(text.lines().map(Answer::read).collect())
}

/// Calls that go on until this is dropped.
#[derive(Debug)]
pub struct Stream {
    child: Child,
    seen: Arc<Mutex<Vec<(Outcome, Instant)>>>,
}

impl Stream {
    /// Begins to call.
    ///
    /// # Errors
    /// When the program can't be started.
    pub fn start(field: &Field, from: From<'_>, options: &[&str], url: &str) -> Result<Self> {
        let words = [&["call", "--count", "1000000"], options, &[url]].concat();
        let mut child =
            command(field, from, &words)?.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let output = child.stdout.take().context("its output is piped")?;
        let seen = Arc::<Mutex<Vec<(Outcome, Instant)>>>::default();
        let written = seen.clone();
        thread::spawn(move || {
            // When the program's namespace is entered it is a child's child: it ends as nobody reads its output any more.
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if Arc::strong_count(&written) == 1 {
                    return;
                }
                written.lock().push((Answer::read(&line), Instant::now()));
            }
        });
        Ok(Self { child, seen })
    }

    /// All outcomes so far.
    pub fn outcomes(&self) -> Vec<Outcome> {
        self.seen.lock().iter().map(|(outcome, _)| outcome.clone()).collect()
    }

    /// All outcomes so far, and when each was seen.
    pub fn timed_outcomes(&self) -> Vec<(Outcome, Instant)> {
        self.seen.lock().clone()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // It may have ended by itself; either way it is waited for.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
