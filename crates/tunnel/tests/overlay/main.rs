//! The tunnel over real sockets, on loopback and in network namespaces: several endpoints in one process.

#![allow(clippy::expect_used, clippy::unwrap_used, clippy::print_stderr)]

mod direct;
mod nat;
mod relayed;
mod rig;
