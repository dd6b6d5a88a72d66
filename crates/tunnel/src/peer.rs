//! The other tunnel endpoints: who they are, and by which path they are reached.

use std::fmt;

/// A tunnel endpoint as its node publishes it in its MeshNode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TunnelPeer {
    /// Node.
    pub node: String,
    /// `agent` or `gateway`.
    pub component: String,
    /// libp2p PeerId in base58.
    pub peer_id: String,
    /// Multiaddrs, direct and circuit ones.
    pub addresses: Vec<String>,
    /// Whether it relays for others.
    pub relay: bool,
}

/// Which endpoint of which node is at the other end.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerName {
    /// Node.
    pub node: String,
    /// `agent` or `gateway`.
    pub component: String,
}

impl fmt::Display for PeerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.node, self.component)
    }
}

/// Transport of a direct connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DirectTransport {
    /// QUIC over UDP.
    Quic,
    /// TCP with Noise and Yamux.
    Tcp,
}

/// How a node is reached now.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Path {
    /// Without another node between.
    Direct(DirectTransport),
    /// Through a relay.
    Relayed {
        /// Node name of the relay, or its PeerId if it is not a known peer.
        via: String,
    },
    /// No connection at the moment; the next stream makes one.
    None,
}

impl Path {
    /// The value of the `path` label in metrics: `quic`, `tcp`, `relay` or `none`.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Direct(DirectTransport::Quic) => "quic",
            Self::Direct(DirectTransport::Tcp) => "tcp",
            Self::Relayed { .. } => "relay",
            Self::None => "none",
        }
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Relayed { via } => write!(f, "relay via {via}"),
            path => f.write_str(path.label()),
        }
    }
}
