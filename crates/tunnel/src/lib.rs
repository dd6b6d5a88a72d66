//! The overlay: finds other nodes' tunnels, keeps paths to them (direct QUIC, direct TCP, relayed), and carries one
//! stream per connection or UDP flow to a Service's endpoint on another node. `docs/tunnel.md` describes it.

mod accept;
mod addresses;
mod behaviour;
mod blocks;
mod config;
mod connections;
mod dial;
mod directory;
mod error;
mod identity;
mod liveness;
mod metrics;
mod owner;
mod peer;
mod reservations;
mod stream;
mod streams;
mod tunnel;
mod upgrades;
mod wire;

pub use accept::{Accept, RefuseAll, Session};
pub use config::TunnelConfig;
pub use connections::MAX_FLOWS;
pub use error::{Refusal, RefusalReason, StartError, TunnelError};
pub use libp2p::{Multiaddr, PeerId};
pub use peer::{DirectTransport, Path, PeerName, TunnelPeer};
pub use stream::{DatagramReceiver, DatagramSender, MAX_DATAGRAM, TunnelStream};
pub use tunnel::Tunnel;
pub use wire::{Carried, NO_ENDPOINT, StreamHeader, StreamTarget};
