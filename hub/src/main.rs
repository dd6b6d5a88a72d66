//! The `hub` command.

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use edgemesh_telemetry::daemon::{self, SettingFlags};
use hub::{
    app::{self, Bound},
    config::Config,
    tokens,
};

/// The cloud side of the mesh.
#[derive(Debug, Parser)]
#[command(version)]
struct Flags {
    #[command(flatten)]
    settings: SettingFlags,
    /// Serve the Kubernetes API and run its controllers, too: no cluster is needed.
    #[arg(long)]
    standalone: bool,
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
        flags.settings.sets.push("standalone=true".to_owned());
    }
    let settings = match flags.settings.settings::<Config>("EDGEMESH_HUB") {
        Ok(settings) => settings,
        Err(code) => return code,
    };
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
        None => daemon::run(&settings.log.clone(), app::build(settings), Bound::stop),
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
    daemon::install_tls_provider();
    app::create_token(settings, kubeconfig, node, gateway, ttl).await
}
