//! The durable object store with Kubernetes semantics.

mod options;

pub use options::{
    ClusterRanges, DeleteOptions, DeleteOutcome, EventKind, ListOptions, ListPage, Mode, OutboxEntry, Propagation,
    ReplicaChange, ReplicaVersion, StoreOptions, WatchEvent, WatchOptions, WriteOp,
};
