//! The lab: network namespaces as hosts, so that a whole cluster with its NATs and its broken links runs on one machine.

pub mod cgroup;
pub mod cleanup;
pub mod cluster;
pub mod command;
pub mod cuts;
pub mod daemons;
pub mod host;
pub mod lab;
pub mod network;
pub mod settings;
pub mod topology;

pub use lab::Lab;
pub use topology::Topology;
