//! The swarm: its transports, their limits, and the behaviours that it is made of.

use std::{num::NonZeroU8, time::Duration};

use libp2p::{
    Multiaddr, Swarm, SwarmBuilder, allow_block_list, connection_limits,
    core::upgrade,
    dcutr, identify,
    identity::Keypair,
    noise, quic, relay,
    swarm::{FromSwarm, NetworkBehaviour, NewExternalAddrCandidate, behaviour::toggle::Toggle},
    tcp, yamux,
};

use crate::{config::TunnelConfig, connections::Connections, error::StartError, liveness::Liveness, streams::Streams};

/// Streams at a time in one connection; with QUIC, those of each side. Yamux wants 256 KiB of its 1 GiB window for each; QUIC keeps
/// some hundred bytes for each that may be opened.
pub(crate) const MAX_STREAMS: usize = 4096;
/// Unread data that one stream may hold at the receiver. Enough for 1 Gbit/s at 16 ms.
const STREAM_WINDOW: u32 = 2 << 20;
/// The same for a whole QUIC connection: so many streams may be full before the others stand still. What a stream holds is given back
/// only when it is read, and each carries another client, so one that stops reading mustn't take much of it. It is this node's memory.
const CONNECTION_WINDOW: u32 = 64 * STREAM_WINDOW;
/// QUIC: a silent path is probed this often…
const QUIC_KEEP_ALIVE: Duration = Duration::from_secs(4);
/// … and given up after this time.
const QUIC_IDLE_MILLISECONDS: u32 = 12_000;
/// How often the same peer says again who it is. Only the first time counts; each is a stream, which keeps an unused connection open.
const IDENTIFY_INTERVAL: Duration = Duration::from_secs(24 * 3600);
/// Connections with one peer.
const MAX_CONNECTIONS: u32 = 16;
/// Time to set a connection up, handshakes included.
const CONNECT_DEADLINE: Duration = Duration::from_secs(6);
/// A relay of ours carries whatever its nodes have to say. Zero would not mean unlimited everywhere in libp2p, so these are
/// numbers that nobody reaches; the duration must fit in 32 bits of seconds.
const RELAY_CIRCUIT_DURATION: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
const RELAY_MAX: usize = 1_000_000;

/// What the swarm does. The order matters: the first two may refuse a connection before the others see it.
#[derive(NetworkBehaviour)]
pub(crate) struct Overlay {
    pub(crate) allowed: allow_block_list::Behaviour<allow_block_list::AllowedPeers>,
    limits: connection_limits::Behaviour,
    streams: Streams,
    liveness: Liveness,
    identify: identify::Behaviour,
    relay_client: relay::client::Behaviour,
    relay_server: Toggle<relay::Behaviour>,
    dcutr: Toggle<dcutr::Behaviour>,
}

impl Overlay {
    /// Offers an address at which a peer sees this endpoint to those who punch holes towards it. libp2p's identify offers it with the
    /// port that we listen on, unless both are the same, taking the other for a passing one: but all that we dial comes from the ports
    /// that we listen on, and the router's port for those is the one that a hole can be punched at.
    pub(crate) fn offer_observed(&mut self, address: &Multiaddr) {
        self.dcutr.on_swarm_event(FromSwarm::NewExternalAddrCandidate(NewExternalAddrCandidate { addr: address }));
    }
}

/// Builds the swarm; it listens to nothing yet.
pub(crate) fn swarm(
    key: Keypair,
    config: &TunnelConfig,
    connections: Connections,
) -> Result<Swarm<Overlay>, StartError> {
    let transport = |error: &dyn std::fmt::Display| StartError::Transport(error.to_string());
    Ok(SwarmBuilder::with_existing_identity(key)
        .with_tokio()
        .with_tcp(tcp::Config::default().nodelay(true), noise::Config::new, yamux_config)
        .map_err(|error| transport(&error))?
        .with_quic_config(tune_quic)
        .with_relay_client(noise::Config::new, yamux_config)
        .map_err(|error| transport(&error))?
        .with_behaviour(|key, relay_client| overlay(key, relay_client, config, connections))
        .map_err(|error| transport(&error))?
        .with_swarm_config(|swarm| {
            swarm
                .with_idle_connection_timeout(config.idle_timeout)
                // One round trip less for each stream: the protocol's name travels with the header.
                .with_substream_upgrade_protocol_override(upgrade::Version::V1Lazy)
                .with_max_negotiating_inbound_streams(MAX_STREAMS)
                .with_per_connection_event_buffer_size(64)
                .with_dial_concurrency_factor(NonZeroU8::MAX)
        })
        .with_connection_timeout(CONNECT_DEADLINE)
        .build())
}

fn overlay(
    key: &Keypair,
    relay_client: relay::client::Behaviour,
    config: &TunnelConfig,
    connections: Connections,
) -> Overlay {
    let own = key.public().to_peer_id();
    let limits = connection_limits::ConnectionLimits::default()
        .with_max_pending_incoming(Some(1024))
        .with_max_established_per_peer(Some(MAX_CONNECTIONS));
    let identify = identify::Config::new("/edgemesh/1".into(), key.public())
        .with_agent_version(format!("edgemesh/{}", env!("CARGO_PKG_VERSION")))
        .with_interval(IDENTIFY_INTERVAL)
        // Addresses come from MeshNodes only.
        .with_hide_listen_addrs(true)
        .with_cache_size(0);
    Overlay {
        allowed: allow_block_list::Behaviour::default(),
        limits: connection_limits::Behaviour::new(limits),
        streams: Streams::new(connections),
        liveness: Liveness::default(),
        identify: identify::Behaviour::new(identify),
        relay_client,
        relay_server: Toggle::from(config.relay_server.then(|| relay::Behaviour::new(own, relay_config()))),
        dcutr: Toggle::from(config.hole_punching.then(|| dcutr::Behaviour::new(own))),
    }
}

fn relay_config() -> relay::Config {
    relay::Config {
        max_reservations: RELAY_MAX,
        max_reservations_per_peer: 64,
        reservation_duration: Duration::from_secs(3600),
        reservation_rate_limiters: Vec::new(),
        max_circuits: RELAY_MAX,
        max_circuits_per_peer: RELAY_MAX,
        max_circuit_duration: RELAY_CIRCUIT_DURATION,
        max_circuit_bytes: u64::MAX,
        circuit_src_rate_limiters: Vec::new(),
    }
}

fn yamux_config() -> yamux::Config {
    let mut config = yamux::Config::default();
    config.set_max_num_streams(MAX_STREAMS);
    config
}

fn tune_quic(mut config: quic::Config) -> quic::Config {
    config.max_concurrent_stream_limit = u32::try_from(MAX_STREAMS).unwrap_or(u32::MAX);
    config.max_stream_data = STREAM_WINDOW;
    config.max_connection_data = CONNECTION_WINDOW;
    config.keep_alive_interval = QUIC_KEEP_ALIVE;
    config.max_idle_timeout = QUIC_IDLE_MILLISECONDS;
    config
}
