//! The `edgemesh-agent` command.

use std::process::ExitCode;

use clap::Parser;
use edgemesh_agent::{
    app::{self, Bound},
    config::Config,
};
use edgemesh_telemetry::daemon::{self, SettingFlags};

/// The mesh's daemon on each node: DNS, Service addresses, and the way through the tunnel.
#[derive(Debug, Parser)]
#[command(version)]
struct Flags {
    #[command(flatten)]
    settings: SettingFlags,
}

fn main() -> ExitCode {
    match Flags::parse().settings.settings::<Config>("EDGEMESH_AGENT") {
        Ok(config) => daemon::run(&config.log.clone(), app::build(config), Bound::stop),
        Err(code) => code,
    }
}
