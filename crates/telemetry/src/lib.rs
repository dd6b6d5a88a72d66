//! The scaffolding of every daemon: configuration, logging, metrics, the admin endpoints, readiness and draining.

pub mod admin;
pub mod config;
pub mod daemon;
mod descriptors;
pub mod drain;
mod footprint;
pub mod logging;
pub mod readiness;

pub use admin::{Admin, AdminRoutes, PageError, Parameters};
pub use config::{ConfigError, Problems, Validate};
pub use daemon::{AdminConfig, LogConfig};
pub use drain::{DrainToken, Shutdown};
pub use readiness::{Done, Readiness, ReadinessTask};
