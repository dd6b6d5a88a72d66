//! What the node's end of the link asks of its owner, and what it is given and tells.

use bytes::Bytes;
use edgemesh_api::{ObjectKey, link::WriteVerb};

use crate::{Fault, Millis};

/// Where the link is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EdgePhase {
    /// No connection; the next attempt is at this time.
    Waiting(Millis),
    /// A connection is being made.
    Connecting,
    /// Hello was sent.
    Greeting,
    /// The hub is told what the node holds.
    Digesting,
    /// The difference comes in.
    Syncing,
    /// All that differed at the start is committed.
    Live,
}

impl EdgePhase {
    /// A word for people and metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Waiting(_) => "waiting",
            Self::Connecting => "connecting",
            Self::Greeting => "greeting",
            Self::Digesting => "digesting",
            Self::Syncing => "syncing",
            Self::Live => "live",
        }
    }
}

/// One change from the cloud.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EdgeChange {
    /// The batch that held it.
    pub seq: u64,
    /// Which object.
    pub key: ObjectKey,
    /// Its uid; of a delete: only an object of this uid is meant, any where it is empty.
    pub uid: String,
    /// The cluster's resourceVersion.
    pub origin_version: String,
    /// The object as JSON; none is a delete.
    pub object: Option<Bytes>,
}

/// A change that the node's store refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejection {
    /// The batch that held it.
    pub seq: u64,
    /// Which object.
    pub key: ObjectKey,
    /// A Kubernetes status reason.
    pub reason: String,
    /// Why, for people.
    pub message: String,
}

/// One object that the node holds from the cloud.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldVersion {
    /// Which object.
    pub key: ObjectKey,
    /// Its uid.
    pub uid: String,
    /// The cluster's resourceVersion of it.
    pub origin_version: String,
}

/// An entry of the outbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutboxWrite {
    /// Its number.
    pub seq: u64,
    /// What it does.
    pub verb: WriteVerb,
    /// To which object.
    pub key: ObjectKey,
    /// The uid that the object has at the node.
    pub uid: String,
    /// The object, or DeleteOptions, as JSON.
    pub body: Bytes,
}

/// What the owner must do. Effects are to be carried out in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EdgeEffect {
    /// Connect; answer with [`crate::EdgeSession::connected`] or [`crate::EdgeSession::disconnected`].
    Connect,
    /// Drop the connection (and give up connecting); no answer is expected.
    Disconnect(Fault),
    /// Read what the store holds from the cloud; answer with [`crate::EdgeSession::digest_loaded`].
    LoadDigest,
    /// Commit the changes in one transaction; answer with [`crate::EdgeSession::applied`] once it is durable.
    Apply(Vec<EdgeChange>),
    /// Read the outbox's entries after that number, oldest first; answer with [`crate::EdgeSession::outbox_loaded`].
    LoadOutbox {
        /// Only entries with a higher number.
        after: u64,
        /// At most so many.
        limit: usize,
    },
    /// The write of that number is finished: remove it from the outbox. A `refusal` is to be logged.
    WriteDone {
        /// The write's number.
        seq: u64,
        /// Reason and message, where the cluster will never take it.
        refusal: Option<(String, String)>,
    },
    /// All that differed when the session began is committed.
    Synced {
        /// The session's epoch.
        epoch: u64,
    },
}

/// Counters of the link for metrics and debug pages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EdgeCounts {
    /// The session's epoch; 0 without one.
    pub epoch: u64,
    /// The highest acknowledged batch of this session.
    pub acked: u64,
    /// Changes committed since the daemon started.
    pub applied: u64,
    /// Changes rejected since the daemon started.
    pub rejected: u64,
    /// Writes sent in this session that await their result.
    pub writes_in_flight: usize,
    /// Connections made since the daemon started.
    pub connections: u64,
}
