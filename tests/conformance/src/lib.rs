//! What Kubernetes' own end-to-end tests ask of Services, EndpointSlices and DNS, asked of the mesh in the lab.
//!
//! Every row has the name of the upstream test that it follows; `docs/conformance.md` lists them with their outcome.

pub mod callers;
pub mod case;
pub mod field;
pub mod manifests;
pub mod rows;
pub mod soak;

pub use case::Case;
pub use field::Field;
