//! The cloud side of the mesh: joins nodes, keeps each in step with the cluster over the link, and executes their writes;
//! with `--standalone` also the cluster's API and its controllers.

pub mod app;
pub mod config;
pub mod controllers;
mod custom_resources;
mod desired;
mod endpoint;
mod identity;
mod join;
mod metrics;
mod nodes;
mod references;
mod session;
mod standalone;
pub mod tokens;
mod watch;
mod writes;
