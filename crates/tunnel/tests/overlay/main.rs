//! The tunnel over real sockets on loopback: several endpoints in one process.

#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod direct;
mod relayed;
mod rig;
