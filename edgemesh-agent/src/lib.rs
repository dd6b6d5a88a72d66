//! The per-node daemon: the catalog, DNS, Service addresses, and the way through the tunnel.

pub mod app;
pub mod capture;
pub mod config;
pub mod datapath;
pub mod dns;
pub mod explain;
pub mod health_check;
pub mod island;
pub mod metrics;
pub mod node_local;
pub mod overlay;
pub mod routes;
