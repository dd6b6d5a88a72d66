//! The datapath with real sockets, real eBPF programs and a real kernel. Needs root; each test has a cgroup and a network
//! namespace of its own.

mod host_routes;
mod sandbox;
mod sockets;
mod whole_agent;
