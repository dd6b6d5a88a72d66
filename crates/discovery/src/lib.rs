//! From a Kubernetes API to the catalog: watches, and a copy on disk for a start with no API.

pub mod client;
pub mod discovery;
pub mod disk_copy;
pub mod follow;
mod slim;

pub use client::{ClientError, api_client};
pub use discovery::{Discovery, DiscoveryConfig};
