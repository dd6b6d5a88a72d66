//! The datapath with real sockets, real eBPF programs and a real kernel. Needs root; each test has a cgroup and a network
//! namespace of its own.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test ends where something fails")]

#[path = "../overlay/access_log.rs"]
mod access_log;
mod affinity;
mod host_routes;
mod ipv6;
mod island;
mod pinned;
mod pods;
mod sandbox;
mod scale;
mod sites;
mod sockets;
mod stale;
mod whole_agent;
