//! The datapath with real sockets, real eBPF programs and a real kernel. Needs root; each test has a cgroup and a network
//! namespace of its own.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test ends where something fails")]
#![allow(clippy::print_stdout, reason = "what was measured is for who runs a test by hand")]

#[path = "../overlay/access_log.rs"]
mod access_log;
mod affinity;
mod cluster_dns6;
mod frontend_counts;
mod health_check;
mod host_routes;
mod hosts;
mod ipv6;
mod island;
mod nftables;
mod out_of_window;
mod outside;
mod passed_on;
mod pinned;
mod pods;
mod process;
mod rule_counts;
mod sandbox;
mod scale;
mod silent;
mod sites;
mod sockets;
mod stale;
mod untracked_dns;
mod whole_agent;
