//! The node's daemon: keeps the node in step with the cloud, serves the Kubernetes API on it, and runs its pods.
//! A library, so that tests start its parts.

pub mod app;
pub mod config;
pub mod join;
pub mod link;
mod machine;
pub mod metrics;
pub mod network;
pub mod node;
pub mod pods;
pub mod runtime;
