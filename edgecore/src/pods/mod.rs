//! Pods of this node: run over the container runtime, restored from the store, with no need of the cloud.

mod actual;
mod backoff;
mod container;
mod dns;
mod env;
mod expansion;
mod folders;
mod images;
mod inputs;
mod plan;
mod quantity;
mod resources;
mod sandbox;
mod status;
mod volumes;
