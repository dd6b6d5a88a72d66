//! The `edgemesh-gateway` command.

use std::process::ExitCode;

use clap::Parser;
use edgemesh_gateway::{
    app::{self, Bound},
    config::Config,
};
use edgemesh_telemetry::daemon::{self, SettingFlags};

/// Ingress for edge applications: serves Gateway API on this node.
#[derive(Debug, Parser)]
#[command(version)]
struct Flags {
    #[command(flatten)]
    settings: SettingFlags,
}

fn main() -> ExitCode {
    match Flags::parse().settings.settings::<Config>("EDGEMESH_GATEWAY") {
        Ok(config) => daemon::run(&config.log.clone(), app::build(config), Bound::stop),
        Err(code) => code,
    }
}
