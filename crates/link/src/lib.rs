//! The link between hub and edgecore: the protocol as two state machines without I/O, and the transport that carries it.
//! `docs/link-protocol.md` is the specification.

pub mod backoff;
pub mod edge_effect;
pub mod edge_session;
pub mod fault;
pub mod frames;
pub mod hub_session;
pub mod limits;
pub mod tls;
pub mod transport;

pub use edge_effect::{EdgeEffect, EdgePhase};
pub use edge_session::EdgeSession;
pub use fault::Fault;
pub use hub_session::{HeldObject, HubEvent, HubNode, View};
pub use limits::Limits;

/// A point in time in milliseconds since an origin that the caller chooses; it must never go back.
pub type Millis = u64;
