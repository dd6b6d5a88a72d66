//! The `hub` command.

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use edgemesh_telemetry::{config, drain, logging};
use hub::{app, config::Config, tokens};

/// The cloud side of the mesh.
#[derive(Debug, Parser)]
#[command(version)]
struct Flags {
    /// YAML file with settings.
    #[arg(long, value_name = "FILE", global = true)]
    config: Option<PathBuf>,
    /// One setting, for example `--set link.listen=0.0.0.0:443`. May be repeated; wins over the file and the environment.
    #[arg(long = "set", value_name = "SETTING=VALUE", global = true)]
    sets: Vec<String>,
    /// Serve the Kubernetes API and run its controllers, too: no cluster is needed.
    #[arg(long)]
    standalone: bool,
    /// Prints the settings in force and ends.
    #[arg(long)]
    print_config: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Tokens with which nodes join.
    Token {
        #[command(subcommand)]
        command: TokenCommand,
    },
}

#[derive(Debug, Subcommand)]
enum TokenCommand {
    /// Prints a new token for one node name. It can be used once.
    Create {
        /// The node's name.
        #[arg(long)]
        node: String,
        /// The node may run a gateway: it gets the TLS Secrets that Gateways name.
        #[arg(long)]
        gateway: bool,
        /// How long the token can be used, for example 30m or 2h.
        #[arg(long, default_value = "1h", value_parser = tokens::parse_ttl)]
        ttl: u64,
        /// Kubeconfig of the cluster, in place of the hub's own.
        #[arg(long, value_name = "FILE")]
        kubeconfig: Option<PathBuf>,
    },
}

#[allow(clippy::print_stdout, clippy::print_stderr)]
fn main() -> ExitCode {
    let mut flags = Flags::parse();
    if flags.standalone {
        flags.sets.push("standalone=true".to_owned());
    }
    let loaded = config::load::<Config>(flags.config.as_deref(), "EDGEMESH_HUB", &flags.sets);
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
        Some(Command::Token { command: TokenCommand::Create { node, gateway, ttl, kubeconfig } }) => {
            match create_token(&settings, kubeconfig, &node, gateway, ttl) {
                Ok(token) => {
                    println!("{token}");
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
async fn create_token(
    settings: &Config,
    kubeconfig: Option<PathBuf>,
    node: &str,
    gateway: bool,
    ttl: u64,
) -> anyhow::Result<String> {
    app::create_token(settings, kubeconfig, node, gateway, ttl).await
}

#[tokio::main]
async fn run(settings: Config) -> anyhow::Result<()> {
    let bound = app::build(settings).await?;
    drain::stop_signal().await?;
    tracing::info!("stopping");
    bound.stop().await;
    Ok(())
}
