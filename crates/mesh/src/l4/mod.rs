//! Proxying of TCP connections and UDP flows.

pub mod copy;
pub mod proxy_protocol;
pub mod udp;
