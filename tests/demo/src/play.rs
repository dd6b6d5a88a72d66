//! Runs scenes one after the other and counts.

use std::time::Instant;

use anyhow::Result;

use crate::{Stage, scenes::Scene};

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
                outcome.failed.push((scene.name, format!("{error:#}")));
            }
        }
    }
    outcome
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
