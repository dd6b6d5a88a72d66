//! Logging: one line an event on standard error, as text or JSON, with the level set by `EDGEMESH_LOG` or the configuration.

use tracing_subscriber::{EnvFilter, fmt, layer::SubscriberExt, util::SubscriberInitExt};

/// How log lines look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One line for people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Starts logging for the whole process. `EDGEMESH_LOG` wins over `level`, in the syntax of
/// [`EnvFilter`] (for example `info,edgemesh_tunnel=debug`). Later calls change nothing, so tests may call it freely.
pub fn start(level: &str, format: LogFormat) {
    let filter = EnvFilter::try_from_env("EDGEMESH_LOG")
        .or_else(|_| EnvFilter::try_new(level))
        .unwrap_or_else(|_| EnvFilter::new("info"));
    let registry = tracing_subscriber::registry().with(filter);
    // A subscriber that is already there is a test's or an embedder's own: it stays.
    let started = match format {
        LogFormat::Text => {
            registry.with(fmt::layer().with_writer(std::io::stderr).with_ansi(false).with_target(true)).try_init()
        }
        LogFormat::Json => registry.with(fmt::layer().json().with_writer(std::io::stderr)).try_init(),
    };
    if started.is_err() {
        tracing::debug!("logging was already started");
    }
}
