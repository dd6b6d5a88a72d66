//! The mesh's own knowledge and work: the Service catalog, endpoint choice, and L4 proxying.
//! It knows no Kubernetes client and no libp2p.

pub mod catalog;
pub mod choice;
pub mod debug;
pub mod from_kubernetes;
pub mod health;
pub mod l4;
pub mod model;
mod shards;
pub mod store;

pub use catalog::Catalog;
pub use choice::{Call, Candidates, IpFamily, Reach, Tier, Viewpoint};
pub use edgemesh_api::cidr;
pub use store::{CatalogStore, Observed};
