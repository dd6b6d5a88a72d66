//! The `edgecore` command.

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use edgecore::{app, config::Config, join};
use edgemesh_telemetry::{config, drain, logging};

/// The daemon of a node: keeps it in step with the cloud, serves the Kubernetes API on it, and runs its pods.
#[derive(Debug, Parser)]
#[command(version)]
struct Flags {
    /// YAML file with settings.
    #[arg(long, value_name = "FILE", global = true)]
    config: Option<PathBuf>,
    /// One setting, for example `--set network=site-a`. May be repeated; wins over the file and the environment.
    #[arg(long = "set", value_name = "SETTING=VALUE", global = true)]
    sets: Vec<String>,
    /// Prints the settings in force and ends.
    #[arg(long)]
    print_config: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Gets the node's certificate from the hub, with a token from `hub token create`.
    Join {
        /// The hub's address, for example `https://203.0.113.10:10443`.
        #[arg(long)]
        hub: String,
        /// The token.
        #[arg(long)]
        token: String,
        /// The node's name, for which the token was made; `nodeName` of the settings if left out.
        #[arg(long)]
        node: Option<String>,
    },
}

#[allow(clippy::print_stdout, clippy::print_stderr)]
fn main() -> ExitCode {
    let flags = Flags::parse();
    let loaded = config::load::<Config>(flags.config.as_deref(), "EDGEMESH_EDGECORE", &flags.sets);
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
    if rustls::crypto::ring::default_provider().install_default().is_err() {
        tracing::debug!("a TLS provider was already installed");
    }
    match flags.command {
        Some(Command::Join { hub, token, node }) => {
            let Some(node) = node.or_else(|| settings.node_name.clone()) else {
                eprintln!("--node is missing, and the settings have no nodeName");
                return ExitCode::from(u8::try_from(config::EXIT_USAGE).unwrap_or(u8::MAX));
            };
            match join_hub(&settings, &hub, &token, &node) {
                Ok(()) => {
                    println!("node {node} has joined {hub}");
                    ExitCode::SUCCESS
                }
                Err(error) => {
                    eprintln!("{error:#}");
                    ExitCode::FAILURE
                }
            }
        }
        None => {
            logging::start(&settings.log.level, settings.log.format);
            match run(settings) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    tracing::error!("{error:#}");
                    ExitCode::FAILURE
                }
            }
        }
    }
}

#[tokio::main(flavor = "current_thread")]
async fn join_hub(settings: &Config, hub: &str, token: &str, node: &str) -> anyhow::Result<()> {
    join::join(&settings.data_dir, hub, token, node).await
}

#[tokio::main]
async fn run(settings: Config) -> anyhow::Result<()> {
    let bound = app::build(settings).await?;
    drain::stop_signal().await?;
    tracing::info!("stopping");
    bound.stop().await;
    Ok(())
}
