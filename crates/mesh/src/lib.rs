//! The mesh's own knowledge and work: the Service catalog, endpoint choice, and L4 proxying.
//! It knows no Kubernetes client and no libp2p.

pub mod model;
