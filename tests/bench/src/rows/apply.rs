//! From `kubectl apply` of a Deployment and a Service to the first answer that a pod on another node gets by the Service's name.

use std::{
    io::{BufRead, BufReader},
    process::Stdio,
    time::Instant,
};

use anyhow::{Context, Result, ensure};

use super::Bench;
use crate::{
    row::Row,
    workloads::{self, HTTP_PORT, STREAM_PORT},
};

pub(super) fn to_first_answer(bench: &Bench) -> Result<Row> {
    bench.cluster.pod("probe", STREAM_PORT)?;
    let samples: Vec<_> = (0..bench.rounds(7)).map(|number| one(bench, number)).collect::<Result<_>>()?;
    Row::alone("apply_to_first_answer", "s", &samples, None)
}

fn one(bench: &Bench, number: u32) -> Result<f64> {
    let cluster = &bench.cluster;
    let name = format!("fresh-{number}");
    let target = format!("{name}.default.svc.cluster.local:{HTTP_PORT}");
    let words = ["pod", "probe", "--", &cluster.bench(), "await", &target];
    let mut client = cluster.command(&words).stdout(Stdio::piped()).spawn()?;
    let mut lines = BufReader::new(client.stdout.take().context("the client's output is piped")?).lines();
    // It is asking already when the objects come.
    let started = lines.next().context("the client doesn't start")??;
    ensure!(started == "waiting", "{started}");
    let begin = Instant::now();
    let applied = cluster.apply(&workloads::fresh(&name));
    let answer = lines.next();
    let took = begin.elapsed().as_secs_f64();
    client.wait()?;
    applied?;
    let answer = answer.with_context(|| format!("no answer of {name}"))??;
    ensure!(answer == "answered", "{answer}");
    cluster.run(&["kubectl", "delete", "--wait=false", &format!("deployment/{name}"), &format!("service/{name}")])?;
    Ok(took)
}
