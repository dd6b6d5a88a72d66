//! DNS on the node: the cluster's names from the catalog, all others from upstream servers through a cache.

mod cache;
mod completion;
mod forward;
mod metrics;
mod reply;
mod resolv_conf;
mod resolver;
mod server;
mod upstream;
mod wire;
mod zone;

pub use server::{DnsError, Server};
