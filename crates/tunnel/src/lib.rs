//! The overlay: finds other nodes' tunnels, keeps paths to them (direct QUIC, direct TCP, relayed), and carries one
//! stream per connection or UDP flow to a Service's endpoint on another node. `docs/tunnel.md` describes it.

mod config;
mod error;
mod peer;
mod wire;

pub use config::TunnelConfig;
pub use error::{RefusalReason, Refusal, StartError, TunnelError};
pub use libp2p::{Multiaddr, PeerId};
pub use peer::{DirectTransport, Path, PeerName, TunnelPeer};
pub use wire::{Carried, StreamHeader};
