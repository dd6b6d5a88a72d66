//! The `edgecore` command.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use edgecore::{
    app::{self, Bound},
    config::Config,
    join,
};
use edgemesh_telemetry::daemon::{self, SettingFlags};

/// The daemon of a node: keeps it in step with the cloud, serves the Kubernetes API on it, and runs its pods.
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
    let settings = match flags.settings.settings::<Config>("EDGEMESH_EDGECORE") {
        Ok(settings) => settings,
        Err(code) => return code,
    };
    match flags.command {
        Some(Command::Join { hub, token, node }) => {
            let Some(node) = node.or_else(|| settings.node_name.clone()) else {
                eprintln!("--node is missing, and the settings have no nodeName");
                return daemon::usage();
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
        None => daemon::run(&settings.log.clone(), app::build(settings), Bound::stop),
    }
}

#[tokio::main(flavor = "current_thread")]
async fn join_hub(settings: &Config, hub: &str, token: &str, node: &str) -> anyhow::Result<()> {
    daemon::install_tls_provider();
    join::join(&settings.data_dir, hub, token, node).await
}
