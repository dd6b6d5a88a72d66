//! What the parts of the mesh say to one another: custom resources, messages and well-known names. No I/O.

pub mod cidr;
pub mod link;
pub mod mesh_node;
pub mod names;
pub mod object;

pub use mesh_node::{MeshNode, MeshNodeSpec, MeshPeer};
pub use object::{ObjectKey, ResourceName};
