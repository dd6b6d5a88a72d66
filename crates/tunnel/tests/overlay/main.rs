//! The tunnel over real sockets on loopback: several endpoints in one process.

mod direct;
mod relayed;
mod rig;
