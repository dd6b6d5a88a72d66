//! `make bench`: measures the mesh against direct paths and against peers, in a lab of its own.

mod cluster;
mod fill;
#[cfg(target_arch = "x86_64")]
mod function_patterns;
#[cfg(target_arch = "x86_64")]
mod functions;
mod latency;
mod load;
mod nftables;
mod pairs;
mod process;
mod row;
mod rows;
mod serve;
mod workloads;

use std::{
    cell::OnceCell,
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use clap::{Parser, Subcommand};

use crate::{cluster::Cluster, load::Kind, rows::Bench};

/// Longest wait for the first answer of a Service that was just applied.
const ANSWER_DEADLINE: Duration = Duration::from_secs(60);

/// Measures ratios to direct paths and to peers, by turns in one run; prints a table and writes a JSON file a row.
#[derive(Parser)]
#[command(name = "bench")]
struct Arguments {
    /// Only rows whose name contains this; repeatable.
    #[arg(long)]
    only: Vec<String>,
    /// A third of the samples.
    #[arg(long)]
    short: bool,
    /// Use the lab that is up, and leave it.
    #[arg(long)]
    here: bool,
    /// Leave the lab up at the end.
    #[arg(long)]
    keep: bool,
    /// Name of the lab.
    #[arg(long, env = "EDGEMESH_LAB", default_value = "bench")]
    lab: String,
    /// The checkout.
    #[arg(long, default_value = ".")]
    root: PathBuf,
    /// Where the JSON files go.
    #[arg(long, default_value = "bench-results")]
    results: PathBuf,
    #[command(subcommand)]
    part: Option<Part>,
}

/// The parts that run inside the lab.
#[derive(Subcommand)]
enum Part {
    #[command(hide = true)]
    Serve {
        #[arg(long)]
        stream: Option<u16>,
        #[arg(long)]
        connect: Option<u16>,
        #[arg(long)]
        http: Option<u16>,
        #[arg(long)]
        datagrams: Option<u16>,
    },
    #[command(hide = true)]
    Forward {
        #[arg(long)]
        port: u16,
        target: SocketAddr,
    },
    #[command(hide = true)]
    Measure {
        kind: Kind,
        #[arg(long)]
        subject: SocketAddr,
        #[arg(long)]
        baseline: SocketAddr,
        #[arg(long)]
        rounds: u32,
        #[arg(long)]
        milliseconds: u64,
    },
    #[command(hide = true)]
    Load {
        kind: Kind,
        address: SocketAddr,
        #[arg(long)]
        milliseconds: u64,
    },
    #[command(hide = true)]
    Latency {
        server: SocketAddr,
        #[arg(long)]
        names: PathBuf,
        #[arg(long)]
        per_second: u32,
        #[arg(long)]
        milliseconds: u64,
    },
    #[command(hide = true)]
    Fill {
        #[arg(long)]
        kubeconfig: PathBuf,
        #[arg(long)]
        from: u32,
        #[arg(long)]
        to: u32,
        #[arg(long)]
        endpoints: u32,
    },
    #[command(hide = true)]
    Change {
        #[arg(long)]
        kubeconfig: PathBuf,
        #[arg(long)]
        endpoints: u32,
        #[arg(long)]
        times: u32,
        #[arg(long)]
        milliseconds: u64,
    },
    #[command(hide = true)]
    Ask { server: SocketAddr },
    #[command(hide = true)]
    Await { target: String },
    #[cfg(target_arch = "x86_64")]
    #[command(hide = true)]
    Functions {
        host: String,
        daemon: String,
        #[arg(long)]
        seconds: u64,
    },
}

#[allow(clippy::print_stdout)]
fn say(text: &str) {
    println!("{text}");
}

#[allow(clippy::print_stderr)]
fn main() -> ExitCode {
    act().unwrap_or_else(|error| {
        eprintln!("bench: {error:#}");
        ExitCode::FAILURE
    })
}

fn act() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    match arguments.part {
        None => return run(&arguments),
        Some(Part::Serve { stream, connect, http, datagrams }) => serve::run(stream, connect, http, datagrams)?,
        Some(Part::Forward { port, target }) => serve::forward(port, target)?,
        Some(Part::Measure { kind, subject, baseline, rounds, milliseconds }) => {
            let pairs = load::measure(kind, subject, baseline, rounds, Duration::from_millis(milliseconds))?;
            say(&serde_json::to_string(&pairs)?);
        }
        Some(Part::Load { kind, address, milliseconds }) => {
            say(&load::apply(kind, address, Duration::from_millis(milliseconds))?.to_string());
        }
        Some(Part::Latency { server, names, per_second, milliseconds }) => {
            say(&latency::p99_microseconds(server, &names, per_second, Duration::from_millis(milliseconds))?
                .to_string());
        }
        Some(Part::Fill { kubeconfig, from, to, endpoints }) => fill::create(&kubeconfig, from, to, endpoints)?,
        Some(Part::Change { kubeconfig, endpoints, times, milliseconds }) => {
            fill::change(&kubeconfig, endpoints, times, milliseconds)?;
        }
        Some(Part::Ask { server }) => load::ask(server)?,
        #[cfg(target_arch = "x86_64")]
        Some(Part::Functions { host, daemon, seconds }) => {
            let pid = Cluster::new(&arguments.lab, &arguments.root)?.daemon(&host, &daemon)?;
            let recorded = functions::record(pid, Duration::from_secs(seconds))?;
            say(&function_patterns::patterns(&recorded.begun, &recorded.others).join("\n"));
        }
        Some(Part::Await { target }) => {
            say("waiting");
            load::await_answer(&target, ANSWER_DEADLINE)?;
            say("answered");
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn run(arguments: &Arguments) -> Result<ExitCode> {
    let chosen =
        |name: &str| arguments.only.is_empty() || arguments.only.iter().any(|part| name.contains(part.as_str()));
    let rows: Vec<_> = rows::ALL.iter().filter(|(name, _)| chosen(name) && rows::can_be_measured(name)).collect();
    let names: Vec<_> = rows::ALL.iter().map(|(name, _)| *name).collect();
    ensure!(!rows.is_empty(), "no such row; there are: {}", names.join(", "));
    for (name, _) in &rows {
        row::forget(&arguments.results, name)?;
    }
    let cluster = Cluster::new(&arguments.lab, &arguments.root)?;
    let begin = Instant::now();
    if !arguments.here {
        say("bench: bringing the lab up");
        if let Err(error) = cluster.run(&["up"]) {
            return Err(error.context("the lab doesn't come up (it is left for a look: ./lab --lab NAME status, down)"));
        }
    }
    cluster.apply(&workloads::servers(cluster.programs()))?;
    let bench = Bench { cluster, short: arguments.short, root: arguments.root.clone(), many: OnceCell::new() };
    // All of them, whatever is chosen: rows are measured beside the same idle pods.
    for pod in workloads::pod_names() {
        bench.cluster.pod(&pod, workloads::STREAM_PORT)?;
    }
    say(&format!("bench: the lab is up and its pods run, after {:.0} s", begin.elapsed().as_secs_f64()));

    let (mut measured, mut failed) = (Vec::new(), Vec::new());
    for (name, measure) in rows {
        let begin = Instant::now();
        match measure(&bench).and_then(|row| row.save(&arguments.results).map(|()| row)) {
            Ok(row) => {
                say(&format!("bench: {name} measured in {:.0} s", begin.elapsed().as_secs_f64()));
                measured.push(row);
            }
            Err(error) => {
                say(&format!("bench: {name} could not be measured: {error:#}"));
                failed.push((name, error));
            }
        }
    }
    if !arguments.keep
        && let Some(many) = bench.many.get()
    {
        many.cluster.run(&["down"])?;
    }
    if !arguments.here && !arguments.keep {
        bench.cluster.run(&["down"])?;
    }
    say(&format!("\n{}\n", row::table(&measured)));
    for (name, error) in &failed {
        say(&format!("not measured: {name}: {error:#}"));
    }
    let (results, took) = (arguments.results.display(), begin.elapsed().as_secs_f64());
    say(&format!("bench: {} rows in {results}/, {} not measured, {took:.0} s", measured.len(), failed.len()));
    Ok(if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
