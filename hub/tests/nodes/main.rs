//! Nodes and the hub together: joining, and agreeing with the cluster.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, clippy::print_stderr)]

mod convergence;
mod joining;
mod rig;
