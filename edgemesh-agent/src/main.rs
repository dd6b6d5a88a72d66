//! The `edgemesh-agent` command.

use std::{path::PathBuf, process::ExitCode};

use clap::Parser;
use edgemesh_agent::{app, config::Config};
use edgemesh_telemetry::{config, drain, logging};

/// The mesh's daemon on each node: DNS, Service addresses, and the way through the tunnel.
#[derive(Debug, Parser)]
#[command(version)]
struct Flags {
    /// YAML file with settings.
    #[arg(long, value_name = "FILE", global = true)]
    config: Option<PathBuf>,
    /// One setting, for example `--set dns.port=5353`. May be repeated; wins over the file and the environment.
    #[arg(long = "set", value_name = "SETTING=VALUE", global = true)]
    sets: Vec<String>,
    /// Prints the settings in force and ends.
    #[arg(long)]
    print_config: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Removes what a stopped agent left in the kernel: new connections to Service addresses are no longer served.
    Uninstall,
}

#[allow(clippy::print_stdout, clippy::print_stderr)]
fn main() -> ExitCode {
    let flags = Flags::parse();
    let loaded = config::load::<Config>(flags.config.as_deref(), "EDGEMESH_AGENT", &flags.sets);
    let shown = loaded.and_then(|config| Ok((config::to_yaml(&config)?, config)));
    let settings = match shown {
        Ok((yaml, _)) if flags.print_config => {
            print!("{yaml}");
            return ExitCode::SUCCESS;
        }
        Ok((_, settings)) => settings,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(u8::try_from(config::EXIT_USAGE).unwrap_or(u8::MAX));
        }
    };
    logging::start(&settings.log.level, settings.log.format);
    if rustls::crypto::ring::default_provider().install_default().is_err() {
        tracing::debug!("a TLS provider was already installed");
    }
    let done = match flags.command {
        Some(Command::Uninstall) => app::uninstall(&settings).map_err(anyhow::Error::from),
        None => run(settings),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

#[tokio::main]
async fn run(settings: Config) -> anyhow::Result<()> {
    let bound = app::build(settings).await?;
    tracing::info!(admin = %bound.admin, "agent started");
    drain::stop_signal().await?;
    tracing::info!("stopping");
    bound.stop().await;
    Ok(())
}
