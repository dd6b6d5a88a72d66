//! How soon a new Service answers.

use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use serde_json::json;

use crate::{
    callers::{self, From::Pod},
    case::{Case, Row},
    manifests,
};

/// Upstream allows 20 s in the median and 50 s for the last hundredth, in which it waits for the slice alone. Here a call must be
/// answered: the Services are spread to all nodes by then.
const LIMIT: Duration = Duration::from_secs(10);
const SERVICES: usize = 50;

pub(super) const ROWS: &[Row] =
    &[Row::new("Service endpoints latency should not be very high [Conformance]", all_answer_soon)];

fn all_answer_soon(case: &Case<'_>) -> Result<()> {
    let services: Vec<_> = (0..SERVICES)
        .map(|number| {
            json!({
                "apiVersion": "v1", "kind": "Service", "metadata": {"name": case.name(&format!("s{number}"))},
                "spec": {"selector": {"app": "server"}, "ports": manifests::ports()},
            })
        })
        .collect();
    let begin = Instant::now();
    let applied = case.field.apply(&services)?;
    let taken = begin.elapsed();
    let urls: Vec<_> = applied
        .iter()
        .map(|service| format!("http://{}/", service["spec"]["clusterIP"].as_str().unwrap_or_default()))
        .collect();
    let mut words = vec!["call", "--count", "1", "--timeout", "1000"];
    words.extend(urls.iter().map(String::as_str));
    case.until("every Service answers", LIMIT, || {
        let (_, said) = callers::run(case.field, Pod("client-edge-a1"), &words)?;
        let failed: Vec<_> = said.lines().filter(|line| line.starts_with("error")).collect();
        ensure!(failed.is_empty() && said.lines().count() == SERVICES, "{} failed: {:?}", failed.len(), failed.first());
        Ok(())
    })
    .map_err(|error| anyhow!("{error:#} (kubectl took {taken:?})"))?;
    ensure!(begin.elapsed() < taken + LIMIT, "{:?} after kubectl's {taken:?}", begin.elapsed());
    case.delete(&format!(
        "service {}",
        (0..SERVICES).map(|n| case.name(&format!("s{n}"))).collect::<Vec<_>>().join(" ")
    ))
}
