//! The datapath with real sockets, real eBPF programs and a real kernel. Needs root; each test has a cgroup and a network
//! namespace of its own.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test ends where something fails")]
#![allow(clippy::print_stdout, reason = "what was measured is for who runs a test by hand")]

mod affinity;
mod health_check;
mod host_routes;
mod hosts;
mod ipv6;
mod nftables;
mod outside;
mod pinned;
mod process;
mod sandbox;
mod scale;
mod sockets;
mod stale;
mod whole_agent;
