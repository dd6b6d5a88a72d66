//! What the commands of all daemons share: the flags that bring settings, the settings that each has, and a life from the
//! start to the signal to stop.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    process::ExitCode,
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    config::{self, Validate},
    descriptors, drain, footprint,
    logging::{self, LogFormat},
};

/// The flags that bring settings.
#[derive(Debug, Default, clap::Args)]
pub struct SettingFlags {
    /// YAML file with settings.
    #[arg(long, value_name = "FILE", global = true)]
    pub config: Option<PathBuf>,
    /// One setting, for example `--set log.level=debug`. May be repeated; wins over the file and the environment.
    #[arg(long = "set", value_name = "SETTING=VALUE", global = true)]
    pub sets: Vec<String>,
    /// Prints the settings in force and ends.
    #[arg(long)]
    pub print_config: bool,
}

impl SettingFlags {
    /// The settings in force.
    ///
    /// # Errors
    /// The code with which the process ends: the settings can't be used, which is said on standard error, or were asked for
    /// and printed.
    #[allow(clippy::print_stdout, clippy::print_stderr, reason = "the command's own output")]
    pub fn settings<T>(&self, env_prefix: &str) -> Result<T, ExitCode>
    where
        T: DeserializeOwned + Serialize + Validate,
    {
        let loaded = config::load::<T>(self.config.as_deref(), env_prefix, &self.sets);
        match loaded.and_then(|settings| Ok((config::to_yaml(&settings)?, settings))) {
            Ok((yaml, _)) if self.print_config => {
                print!("{yaml}");
                Err(ExitCode::SUCCESS)
            }
            Ok((_, settings)) => Ok(settings),
            Err(error) => {
                eprintln!("{error}");
                Err(usage())
            }
        }
    }
}

/// The exit code of a command that was called wrongly.
pub fn usage() -> ExitCode {
    ExitCode::from(config::EXIT_USAGE)
}

/// The admin endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct AdminConfig {
    /// Where it listens.
    pub listen: SocketAddr,
}

impl AdminConfig {
    /// On a port of loopback.
    pub fn on(port: u16) -> Self {
        Self { listen: SocketAddr::from((Ipv4Addr::LOCALHOST, port)) }
    }
}

/// Logging.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct LogConfig {
    /// Level, or a filter such as `info,edgemesh_tunnel=debug`. `EDGEMESH_LOG` wins.
    pub level: String,
    /// `text` or `json`.
    pub format: LogFormat,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { level: "info".to_owned(), format: LogFormat::Text }
    }
}

/// Makes *ring* the process' provider of cryptography for TLS, unless there is one.
pub fn install_tls_provider() {
    if rustls::crypto::ring::default_provider().install_default().is_err() {
        tracing::debug!("a TLS provider was already installed");
    }
}

/// Runs a daemon: starts logging, builds it, waits for the signal to stop, and stops it in order.
pub fn run<B>(log: &LogConfig, build: impl Future<Output = anyhow::Result<B>>, stop: impl AsyncFnOnce(B)) -> ExitCode {
    logging::start(&log.level, log.format);
    descriptors::raise_limit();
    install_tls_provider();
    let life = async {
        let bound = build.await?;
        tokio::spawn(footprint::keep_small());
        drain::stop_signal().await?;
        tracing::info!("stopping");
        stop(bound).await;
        anyhow::Ok(())
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    match runtime.map_err(anyhow::Error::from).and_then(|runtime| runtime.block_on(life)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}
