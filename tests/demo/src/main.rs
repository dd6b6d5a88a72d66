//! `make demo`: the scenes, narrated. Exit code 0 only if all hold.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result};
use clap::Parser;
use edgemesh_demo::{Stage, play, scenes};

/// Shows every scene in a lab.
#[derive(Parser)]
struct Arguments {
    /// Only scenes whose name contains this.
    #[arg(long)]
    only: Option<String>,
    /// Use the lab that is up, and leave it.
    #[arg(long)]
    here: bool,
    /// Leave the lab up at the end.
    #[arg(long)]
    keep: bool,
    /// Name of the lab.
    #[arg(long, env = "EDGEMESH_LAB", default_value = "demo")]
    lab: String,
    /// The checkout.
    #[arg(long, default_value = ".")]
    root: PathBuf,
}

#[allow(clippy::print_stdout)]
fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let program = std::env::current_exe()?;
    let programs = program.parent().context("this program is in no folder")?;
    let stage = Stage::new(&Path::canonicalize(&arguments.root)?, programs, &arguments.lab);
    let mut chosen = scenes::all();
    if let Some(part) = &arguments.only {
        chosen.retain(|scene| scene.name.contains(part.as_str()));
    }
    let outcome = if arguments.here {
        play::run(&stage, &chosen)
    } else {
        play::run_in_a_new_lab(&stage, &chosen, arguments.keep)?
    };
    println!();
    for (name, reason) in &outcome.failed {
        println!("failed: {name}: {reason}");
    }
    println!("demo: {} passed, {} failed", outcome.passed, outcome.failed.len());
    Ok(if outcome.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
