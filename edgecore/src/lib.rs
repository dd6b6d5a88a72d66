//! The node's daemon as a library, so that tests start its parts.

pub mod network;
pub mod pods;
pub mod runtime;
