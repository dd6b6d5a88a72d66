//! The `edgemesh-agent` command.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use edgemesh_agent::{
    app::{self, Bound},
    config::Config,
};
use edgemesh_telemetry::{
    daemon::{self, SettingFlags},
    logging,
};

/// The mesh's daemon on each node: DNS, Service addresses, and the way through the tunnel.
#[derive(Debug, Parser)]
#[command(version)]
struct Flags {
    #[command(flatten)]
    settings: SettingFlags,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Removes what a stopped agent left in the kernel: new connections to Service addresses are no longer served.
    Uninstall,
}

fn main() -> ExitCode {
    let flags = Flags::parse();
    let config = match flags.settings.settings::<Config>("EDGEMESH_AGENT") {
        Ok(config) => config,
        Err(code) => return code,
    };
    match flags.command {
        Some(Command::Uninstall) => {
            logging::start(&config.log.level, config.log.format);
            match app::uninstall(&config) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    tracing::error!("{error}");
                    ExitCode::FAILURE
                }
            }
        }
        None => daemon::run(&config.log.clone(), app::build(config), Bound::stop),
    }
}
