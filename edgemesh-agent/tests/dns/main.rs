//! DNS as a client sees it: the whole server on a free port, asked over UDP and TCP.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test ends where something fails")]

mod cluster;
mod forwarding;
mod harness;
mod kubernetes_plugin;
mod resolvers;
mod robustness;
mod search_path;
mod tls;
mod upstreams;
