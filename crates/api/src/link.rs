//! The messages of the link between hub and edgecore, as protobuf. `docs/link-protocol.md` says what they mean.
//!
//! The messages are declared here by hand, so that no protocol compiler is needed. A field's number never changes its
//! meaning; a new field gets a new number, and both ends ignore numbers that they don't know.

use prost::{Enumeration, Message, Oneof, bytes::Bytes};

use crate::object::{ObjectKey, ResourceName};

/// The lowest version of the protocol that this build speaks.
pub const MIN_PROTOCOL_VERSION: u32 = 1;
/// The highest version of the protocol that this build speaks.
pub const MAX_PROTOCOL_VERSION: u32 = 1;

/// Largest frame on the link, in bytes. Room for one object of [`crate::names::MAX_OBJECT_BYTES`] and its envelope.
pub const MAX_FRAME_BYTES: usize = 4 << 20;

/// A frame from a node to the hub.
#[derive(Clone, PartialEq, Message)]
pub struct ToHub {
    /// What it carries; a frame of an unknown kind has none and is ignored.
    #[prost(oneof = "HubFrame", tags = "1, 2, 3, 4, 5")]
    pub frame: Option<HubFrame>,
}

/// What a node says to the hub.
#[derive(Clone, PartialEq, Oneof)]
pub enum HubFrame {
    /// Opens the session.
    #[prost(message, tag = "1")]
    Hello(Hello),
    /// A part of what the node holds.
    #[prost(message, tag = "2")]
    Digest(Digest),
    /// What the node has made durable.
    #[prost(message, tag = "3")]
    Ack(Ack),
    /// Writes of the node for the cluster's API.
    #[prost(message, tag = "4")]
    Writes(Writes),
    /// Nothing but a sign of life.
    #[prost(message, tag = "5")]
    Heartbeat(Heartbeat),
}

/// A frame from the hub to a node.
#[derive(Clone, PartialEq, Message)]
pub struct ToEdge {
    /// What it carries; a frame of an unknown kind has none and is ignored.
    #[prost(oneof = "EdgeFrame", tags = "1, 2, 3, 4, 5, 6")]
    pub frame: Option<EdgeFrame>,
}

/// What the hub says to a node.
#[derive(Clone, PartialEq, Oneof)]
pub enum EdgeFrame {
    /// Answers [`Hello`].
    #[prost(message, tag = "1")]
    Welcome(Welcome),
    /// Ends the session; the connection closes after it.
    #[prost(message, tag = "2")]
    Refuse(Refuse),
    /// Changes to apply in one transaction.
    #[prost(message, tag = "3")]
    Batch(Batch),
    /// All that differed when the session began has been sent.
    #[prost(message, tag = "4")]
    SyncDone(SyncDone),
    /// What became of the node's writes.
    #[prost(message, tag = "5")]
    WriteResults(WriteResults),
    /// Nothing but a sign of life.
    #[prost(message, tag = "6")]
    Heartbeat(Heartbeat),
}

/// First frame of a session, from the node.
#[derive(Clone, PartialEq, Message)]
pub struct Hello {
    /// The node's name; must be the one in its certificate.
    #[prost(string, tag = "1")]
    pub node: String,
    /// Lowest protocol version that the node speaks.
    #[prost(uint32, tag = "2")]
    pub min_version: u32,
    /// Highest protocol version that the node speaks.
    #[prost(uint32, tag = "3")]
    pub max_version: u32,
    /// The build, for people.
    #[prost(string, tag = "4")]
    pub software: String,
}

/// The hub's answer to [`Hello`].
#[derive(Clone, PartialEq, Message)]
pub struct Welcome {
    /// The protocol version of the session.
    #[prost(uint32, tag = "1")]
    pub version: u32,
    /// Number of the session; a session with a higher one replaces it.
    #[prost(uint64, tag = "2")]
    pub epoch: u64,
    /// Each end says something at least this often, in milliseconds.
    #[prost(uint32, tag = "3")]
    pub heartbeat_ms: u32,
    /// An end that heard nothing for so long drops the connection, in milliseconds.
    #[prost(uint32, tag = "4")]
    pub dead_after_ms: u32,
    /// How many writes of the node may await their result.
    #[prost(uint32, tag = "5")]
    pub write_window: u32,
}

/// Why a session ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub enum RefuseCode {
    /// No reason was given.
    Unspecified = 0,
    /// No common protocol version.
    Version = 1,
    /// The certificate does not allow this node name.
    Identity = 2,
    /// A newer session of the same node took over.
    Replaced = 3,
    /// The hub stops or is not ready yet.
    Unavailable = 4,
    /// The peer broke the protocol.
    Protocol = 5,
}

/// The hub ends the session.
#[derive(Clone, PartialEq, Message)]
pub struct Refuse {
    /// Why, for programs.
    #[prost(enumeration = "RefuseCode", tag = "1")]
    pub code: i32,
    /// Why, for people.
    #[prost(string, tag = "2")]
    pub message: String,
}

/// Which object.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct ObjectRef {
    /// API group; empty for the core group.
    #[prost(string, tag = "1")]
    pub group: String,
    /// API version.
    #[prost(string, tag = "2")]
    pub version: String,
    /// Plural resource name.
    #[prost(string, tag = "3")]
    pub plural: String,
    /// Namespace; empty for cluster-scoped objects.
    #[prost(string, tag = "4")]
    pub namespace: String,
    /// Name.
    #[prost(string, tag = "5")]
    pub name: String,
}

impl From<&ObjectKey> for ObjectRef {
    fn from(key: &ObjectKey) -> Self {
        Self {
            group: key.resource.group.clone(),
            version: key.resource.version.clone(),
            plural: key.resource.plural.clone(),
            namespace: key.namespace.clone(),
            name: key.name.clone(),
        }
    }
}

impl From<ObjectRef> for ObjectKey {
    fn from(key: ObjectRef) -> Self {
        Self {
            resource: ResourceName { group: key.group, version: key.version, plural: key.plural },
            namespace: key.namespace,
            name: key.name,
        }
    }
}

/// A part of the list of objects from the cloud that a node holds.
#[derive(Clone, PartialEq, Message)]
pub struct Digest {
    /// Some of what it holds.
    #[prost(message, repeated, tag = "1")]
    pub entries: Vec<DigestEntry>,
    /// Whether this is the last part.
    #[prost(bool, tag = "2")]
    pub last: bool,
}

/// One object that a node holds.
#[derive(Clone, PartialEq, Message)]
pub struct DigestEntry {
    /// Which object.
    #[prost(message, optional, tag = "1")]
    pub key: Option<ObjectRef>,
    /// Its uid.
    #[prost(string, tag = "2")]
    pub uid: String,
    /// The cluster's resourceVersion of what the node holds.
    #[prost(string, tag = "3")]
    pub origin_version: String,
}

/// Changes that the node applies in one transaction.
#[derive(Clone, PartialEq, Message)]
pub struct Batch {
    /// Number of the batch in its session, from 1, without gaps.
    #[prost(uint64, tag = "1")]
    pub seq: u64,
    /// The changes, in order.
    #[prost(message, repeated, tag = "2")]
    pub changes: Vec<Change>,
}

/// One change: an upsert where `object` is there, else a delete.
#[derive(Clone, PartialEq, Message)]
pub struct Change {
    /// Which object.
    #[prost(message, optional, tag = "1")]
    pub key: Option<ObjectRef>,
    /// The object's uid; of a delete: only an object of this uid is meant, any where it is empty.
    #[prost(string, tag = "2")]
    pub uid: String,
    /// The cluster's resourceVersion of an upsert.
    #[prost(string, tag = "3")]
    pub origin_version: String,
    /// The whole object as JSON, of an upsert.
    #[prost(bytes = "bytes", optional, tag = "4")]
    pub object: Option<Bytes>,
}

/// All that differed at the start has been sent.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct SyncDone {
    /// The last batch that belongs to it; 0 where nothing differed.
    #[prost(uint64, tag = "1")]
    pub seq: u64,
}

/// The node has made everything up to a batch durable.
#[derive(Clone, PartialEq, Message)]
pub struct Ack {
    /// The highest batch of which, as of all before it, every change is committed or listed in a `rejected`.
    #[prost(uint64, tag = "1")]
    pub seq: u64,
    /// Changes that the node's store refused.
    #[prost(message, repeated, tag = "2")]
    pub rejected: Vec<Rejected>,
}

/// A change that was refused by the node.
#[derive(Clone, PartialEq, Message)]
pub struct Rejected {
    /// The batch that held it.
    #[prost(uint64, tag = "1")]
    pub seq: u64,
    /// Which object.
    #[prost(message, optional, tag = "2")]
    pub key: Option<ObjectRef>,
    /// Why, for programs: a Kubernetes status reason such as `Invalid`.
    #[prost(string, tag = "3")]
    pub reason: String,
    /// Why, for people.
    #[prost(string, tag = "4")]
    pub message: String,
}

/// What a write does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub enum WriteVerb {
    /// Not said; refused.
    Unspecified = 0,
    /// Creates the object, or brings an existing one of the same name up to date.
    Create = 1,
    /// Replaces all but the status.
    Update = 2,
    /// Replaces the status.
    UpdateStatus = 3,
    /// Deletes; the body is Kubernetes DeleteOptions.
    Delete = 4,
}

/// Writes of the node, in the order of its outbox.
#[derive(Clone, PartialEq, Message)]
pub struct Writes {
    /// The writes.
    #[prost(message, repeated, tag = "1")]
    pub writes: Vec<Write>,
}

/// One write of the node.
#[derive(Clone, PartialEq, Message)]
pub struct Write {
    /// Its number in the node's outbox.
    #[prost(uint64, tag = "1")]
    pub seq: u64,
    /// What it does.
    #[prost(enumeration = "WriteVerb", tag = "2")]
    pub verb: i32,
    /// To which object.
    #[prost(message, optional, tag = "3")]
    pub key: Option<ObjectRef>,
    /// The uid that the object had at the node.
    #[prost(string, tag = "4")]
    pub uid: String,
    /// The object as written at the node, or the DeleteOptions, as JSON.
    #[prost(bytes = "bytes", tag = "5")]
    pub body: Bytes,
}

/// What became of writes.
#[derive(Clone, PartialEq, Message)]
pub struct WriteResults {
    /// One for each write that is finished.
    #[prost(message, repeated, tag = "1")]
    pub results: Vec<WriteResult>,
}

/// What became of one write: the API took it, or, with a `reason`, it never will.
#[derive(Clone, PartialEq, Message)]
pub struct WriteResult {
    /// The write's number.
    #[prost(uint64, tag = "1")]
    pub seq: u64,
    /// Empty when the API took it; else a Kubernetes status reason such as `Forbidden`.
    #[prost(string, tag = "2")]
    pub reason: String,
    /// Why it was refused, for people.
    #[prost(string, tag = "3")]
    pub message: String,
}

/// A sign of life.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Heartbeat {}

impl From<HubFrame> for ToHub {
    fn from(frame: HubFrame) -> Self {
        Self { frame: Some(frame) }
    }
}

impl From<EdgeFrame> for ToEdge {
    fn from(frame: EdgeFrame) -> Self {
        Self { frame: Some(frame) }
    }
}
