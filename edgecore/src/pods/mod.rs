//! Pods of this node: run over the container runtime, restored from the store, with no need of the cloud.

mod backoff;
mod container;
mod dns;
mod env;
mod expansion;
mod folders;
mod inputs;
mod quantity;
mod resources;
mod sandbox;
mod volumes;
