//! The overlay of two agents in one process: a client's connection to a node-local address of one, through the tunnel, to an
//! endpoint that the catalog places on the other. Node-local addresses are taken from the loopback range here.

#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod access_log;
mod accounts;
mod faults;
mod proxied;
mod rig;
mod servers;
mod udp;
