//! Runs scenes one after the other and counts.

use std::time::Instant;

use anyhow::Result;

use crate::{Stage, scenes::Scene};

/// Lines of each daemon's log that are shown after a failure. The runtime says much, and little of it matters.
const LOG_LINES: usize = 40;
const RUNTIME_LOG_LINES: usize = 4;

/// What came of the scenes.
#[derive(Debug, Default)]
pub struct Outcome {
    /// How many held.
    pub passed: usize,
    /// Name and reason of each that did not.
    pub failed: Vec<(&'static str, String)>,
}

/// Runs all scenes, and goes on after a failed one.
pub fn run(stage: &Stage, scenes: &[Scene]) -> Outcome {
    let mut outcome = Outcome::default();
    for (number, scene) in (1..).zip(scenes) {
        stage.say(&format!("\n━━ {number}. {} ━━\n   expected: {}", scene.title, scene.expected));
        let begin = Instant::now();
        match (scene.run)(stage) {
            Ok(()) => {
                outcome.passed += 1;
                stage.say(&format!("   ✔ {} ({:.1} s)", scene.name, begin.elapsed().as_secs_f64()));
            }
            Err(error) => {
                stage.say(&format!("   ✘ {} ({:.1} s): {error:#}", scene.name, begin.elapsed().as_secs_f64()));
                if let Err(error) = show_logs(stage) {
                    stage.say(&format!("     the logs can't be shown: {error:#}"));
                }
                outcome.failed.push((scene.name, format!("{error:#}")));
            }
        }
    }
    outcome
}

/// The ends of all daemons' logs: the lab may be gone when somebody wants to know why a scene failed.
fn show_logs(stage: &Stage) -> Result<()> {
    let unseen = stage.unseen();
    let status: serde_json::Value = serde_json::from_str(&unseen.lab(&["status", "--json"])?.ok()?)?;
    for host in status["hosts"].as_array().into_iter().flatten() {
        let name = host["name"].as_str().unwrap_or_default();
        for daemon in host["daemons"].as_object().into_iter().flat_map(|daemons| daemons.keys()) {
            let log = unseen.lab(&["logs", name, daemon])?.text;
            let lines: Vec<_> = log.lines().collect();
            let shown = if daemon == "containerd" { RUNTIME_LOG_LINES } else { LOG_LINES };
            for line in &lines[lines.len().saturating_sub(shown)..] {
                stage.say(&format!("     {name} {daemon}: {line}"));
            }
        }
    }
    Ok(())
}

/// Brings the lab up, runs the scenes, and removes the lab unless `keep`.
///
/// # Errors
/// When the lab can't be brought up or removed.
pub fn run_in_a_new_lab(stage: &Stage, scenes: &[Scene], keep: bool) -> Result<Outcome> {
    stage.say("━━ The lab: a cloud, two sites behind NAT, an outside client ━━");
    stage.lab(&["up"])?.ok()?;
    stage.lab(&["status"])?.ok()?;
    let outcome = run(stage, scenes);
    if !keep {
        stage.lab(&["down"])?.ok()?;
    }
    Ok(outcome)
}
