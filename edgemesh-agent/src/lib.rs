//! The per-node daemon: the catalog, DNS, socket load balancing in eBPF, and the way through the tunnel.

pub mod config;
pub mod dns;
pub mod node_local;
pub mod overlay;
