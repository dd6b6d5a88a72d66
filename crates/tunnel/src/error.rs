//! What can go wrong, and whose side it was.

use std::{fmt, io, path::PathBuf};

/// A stream to a node could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    /// No peer of that node is known: its MeshNode is missing.
    #[error("node {node} has no known tunnel endpoint")]
    UnknownNode {
        /// The node asked for.
        node: String,
    },
    /// Every address failed, or there is none.
    #[error("node {node} can't be reached: {detail}")]
    Unreachable {
        /// The node asked for.
        node: String,
        /// What failed, by address.
        detail: String,
    },
    /// This side has as many streams open to it as one connection carries.
    #[error("there are too many streams to node {node}")]
    Busy {
        /// The node asked for.
        node: String,
    },
    /// The node answered, and refuses this stream.
    #[error("node {node} refused the stream: {refusal}")]
    Refused {
        /// The node asked for.
        node: String,
        /// Its answer.
        refusal: Refusal,
    },
    /// The deadline passed.
    #[error("node {node} did not answer in time ({step})")]
    Timeout {
        /// The node asked for.
        node: String,
        /// What was being waited for.
        step: &'static str,
    },
    /// The connection broke while the stream was being opened.
    #[error("the connection to node {node} broke: {source}")]
    Lost {
        /// The node asked for.
        node: String,
        /// The cause.
        source: io::Error,
    },
    /// The header exceeds its limit.
    #[error("the stream's header is {0} bytes long; the limit is {limit}", limit = crate::wire::MAX_FRAME)]
    HeaderTooLong(usize),
    /// This tunnel is stopping.
    #[error("the tunnel is stopping")]
    Stopped,
}

impl TunnelError {
    /// A stable label for metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Self::UnknownNode { .. } => "unknown_node",
            Self::Unreachable { .. } => "unreachable",
            Self::Busy { .. } => "busy",
            Self::Refused { .. } => "refused",
            Self::Timeout { .. } => "timeout",
            Self::Lost { .. } => "lost",
            Self::HeaderTooLong(_) => "header",
            Self::Stopped => "stopped",
        }
    }
}

/// Why the accepting side refuses a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RefusalReason {
    /// The endpoint is not a usable endpoint of that Service on this node.
    NotHere,
    /// The endpoint did not take the connection.
    DialFailed,
    /// Too many streams.
    Busy,
    /// The header makes no sense.
    Malformed,
    /// This endpoint takes no streams, or is stopping.
    NotServing,
}

impl RefusalReason {
    /// A stable label for metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::NotHere => "not_here",
            Self::DialFailed => "dial_failed",
            Self::Busy => "busy",
            Self::Malformed => "malformed",
            Self::NotServing => "not_serving",
        }
    }
}

/// A refused stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The kind.
    pub reason: RefusalReason,
    /// A sentence for the log.
    pub detail: String,
}

impl Refusal {
    /// A refusal with its sentence.
    pub fn new(reason: RefusalReason, detail: impl Into<String>) -> Self {
        Self { reason, detail: detail.into() }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.detail, self.reason.label())
    }
}

/// The tunnel could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The identity file can't be read or written.
    #[error("identity file {path}: {source}")]
    Identity {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The transports could not be set up.
    #[error("transport: {0}")]
    Transport(String),
    /// An address can't be listened on.
    #[error("listening on {address}: {detail}")]
    Listen {
        /// The configured address.
        address: String,
        /// The cause.
        detail: String,
    },
}
