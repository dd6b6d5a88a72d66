//! DNS on the node: the cluster's names from the catalog, all others from upstream servers through a cache.

mod address;
mod asker;
mod cache;
mod completion;
mod datagrams;
mod dot;
mod forward;
mod limits;
mod metrics;
mod reply;
mod resolv_conf;
mod resolver;
mod server;
mod udp;
mod upstream;
mod upstreams;
mod wire;
mod zone;

pub use address::{NoUpstream, UpstreamAddress};
pub use asker::{Asker, Said};
pub use server::{DnsError, Server};
