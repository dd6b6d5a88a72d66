//! The Kubernetes API over an embedded SQLite store: discovery, CRUD, list and watch, patch, tables.
//!
//! `hub --standalone` serves it as the cluster's API ([`store::Mode::Authoritative`]), edgecore's metaserver as the node's
//! view of the cluster ([`store::Mode::Replica`]).

pub mod auth;
pub mod context;
pub mod error;
mod fields;
pub mod kinds;
pub mod kubeconfig;
pub mod patch;
pub mod pki;
mod protobuf;
pub mod server;
pub mod store;

pub use context::{FieldValidation, Identity, RequestContext};
pub use error::{ApiError, Reason};
pub use kinds::allocation::{BadServiceRange, ServiceRange, ServiceRanges};
pub use store::{
    DeleteOptions, DeleteOutcome, EventKind, ListOptions, ListPage, Mode, OutboxEntry, Part, Propagation,
    ReplicaChange, ReplicaVersion, Store, StoreOptions, WatchEvent, WatchOptions, WatchStream, WriteOp, Written,
};
