//! The per-node daemon: the catalog, DNS, socket load balancing in eBPF, and the way through the tunnel.

pub mod app;
pub mod config;
pub mod datapath;
pub mod dns;
pub mod explain;
pub mod metrics;
pub mod node_local;
pub mod overlay;
pub mod routes;
