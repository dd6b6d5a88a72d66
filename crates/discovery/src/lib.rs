//! Between a Kubernetes API and the mesh: watches fill the catalog, with a copy on disk for a start with no API; the catalog's
//! peers go to the tunnel, and the tunnel's addresses to the node's MeshNode.

pub mod client;
pub mod discovery;
pub mod disk_copy;
pub mod follow;
pub mod peers;
pub mod publish;
mod slim;

pub use client::{ClientError, api_client};
pub use discovery::{Discovery, DiscoveryConfig};
