//! edgemesh-gateway's command line.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Context;
use clap::Parser;
use edgemesh_gateway::{app, config::Config};
use edgemesh_telemetry::{config, drain, logging};

/// Ingress for edge applications: serves Gateway API on this node.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Configuration file (YAML).
    #[arg(long)]
    config: Option<PathBuf>,
    /// A setting in place of the file's: `some.setting=value`.
    #[arg(long = "set", value_name = "SETTING=VALUE")]
    sets: Vec<String>,
    /// Print the configuration in force and end.
    #[arg(long)]
    print_config: bool,
}

#[allow(clippy::print_stdout, clippy::print_stderr)]
fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let config: Config = match config::load(arguments.config.as_deref(), "EDGEMESH_GATEWAY", &arguments.sets) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("edgemesh-gateway: {error}");
            return Ok(ExitCode::from(u8::try_from(config::EXIT_USAGE)?));
        }
    };
    if arguments.print_config {
        print!("{}", config::to_yaml(&config)?);
        return Ok(ExitCode::SUCCESS);
    }
    logging::start(&config.log.level, config.log.format);
    rustls::crypto::ring::default_provider()
        .install_default()
        .map_err(|_| anyhow::anyhow!("a TLS provider is installed already"))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let deadline = Duration::from_secs(config.drain_seconds);
        let bound = app::build(config).await.context("edgemesh-gateway can't start")?;
        drain::stop_signal().await?;
        tracing::info!("stopping");
        bound.shutdown.drain(deadline).await;
        Ok(ExitCode::SUCCESS)
    })
}
