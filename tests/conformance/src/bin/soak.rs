//! `make soak`: endpoints come and go under load in a lab of its own. Exit code 0 only if nothing failed that was healthy and nothing
//! was kept.

use std::{path::Path, process::ExitCode, time::Duration};

use anyhow::{Context, Result};
use edgemesh_conformance::{Field, field::MODES, soak};

/// Ten minutes, unless `SOAK_SECONDS` says otherwise.
const SECONDS: u64 = 600;

#[allow(clippy::print_stdout)]
fn main() -> Result<ExitCode> {
    let seconds = match std::env::var("SOAK_SECONDS") {
        Ok(text) => text.parse().with_context(|| format!("SOAK_SECONDS {text:?}: must be a number of seconds"))?,
        Err(_) => SECONDS,
    };
    let program = std::env::current_exe()?;
    let programs = program.parent().context("this program is in no folder")?;
    let mut good = true;
    for mode in MODES {
        println!("soak: datapath {}, {seconds} s", mode.name);
        let field = Field::up("soak", *mode, programs, Path::new("."))?;
        let report = soak::run(&field, Duration::from_secs(seconds));
        field.down()?;
        let report = report?;
        println!("{}", report.text());
        for violation in report.violations() {
            println!("violated: {violation}");
            good = false;
        }
    }
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
