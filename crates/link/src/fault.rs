//! Why a session ends.

use edgemesh_api::link::RefuseCode;
use thiserror::Error;

/// Why a session ends. Each maps to one metric label.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Fault {
    /// Nothing was heard from the peer for the agreed time: the connection is half-open or the peer hangs.
    #[error("nothing was heard from the peer for {0} ms")]
    Silent(u64),
    /// The peer did not finish the greeting or the digest in time.
    #[error("the session did not start within {0} ms")]
    SlowStart(u64),
    /// The peer lives but acknowledged nothing for too long.
    #[error("the node acknowledged nothing for {0} ms")]
    Stalled(u64),
    /// The two builds have no protocol version in common.
    #[error("no common protocol version: the node speaks {node_min} to {node_max}, the hub {hub_min} to {hub_max}")]
    Version {
        /// Lowest version of the node.
        node_min: u32,
        /// Highest version of the node.
        node_max: u32,
        /// Lowest version of the hub.
        hub_min: u32,
        /// Highest version of the hub.
        hub_max: u32,
    },
    /// The node said another name than its certificate.
    #[error("the certificate is for node {certificate:?}, the session says {said:?}")]
    Identity {
        /// The name in the certificate.
        certificate: String,
        /// The name in Hello.
        said: String,
    },
    /// A newer session of the same node took over.
    #[error("a newer session of the node took over")]
    Replaced,
    /// The peer broke the protocol.
    #[error("the peer broke the protocol: {0}")]
    Protocol(String),
    /// The hub ended the session.
    #[error("the hub refused the session: {message}")]
    Refused {
        /// Why, for programs.
        code: RefuseCode,
        /// Why, for people.
        message: String,
    },
    /// The connection broke or could not be made.
    #[error("{0}")]
    Transport(String),
    /// The node's store failed; the session starts anew from what is durable.
    #[error("the node's store failed: {0}")]
    Store(String),
}

impl Fault {
    /// A stable word for metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Silent(_) => "silent",
            Self::SlowStart(_) => "slow_start",
            Self::Stalled(_) => "stalled",
            Self::Version { .. } => "version",
            Self::Identity { .. } => "identity",
            Self::Replaced => "replaced",
            Self::Protocol(_) => "protocol",
            Self::Refused { .. } => "refused",
            Self::Transport(_) => "transport",
            Self::Store(_) => "store",
        }
    }

    /// What the hub tells the node before it closes for this reason.
    pub fn refuse_code(&self) -> RefuseCode {
        match self {
            Self::Version { .. } => RefuseCode::Version,
            Self::Identity { .. } => RefuseCode::Identity,
            Self::Replaced => RefuseCode::Replaced,
            Self::Refused { code, .. } => *code,
            Self::Silent(_) | Self::SlowStart(_) | Self::Stalled(_) | Self::Transport(_) | Self::Store(_) => {
                RefuseCode::Unavailable
            }
            Self::Protocol(_) => RefuseCode::Protocol,
        }
    }

    pub(crate) fn protocol(what: impl Into<String>) -> Self {
        Self::Protocol(what.into())
    }
}
