//! What a tunnel is started with.

use std::{net::IpAddr, path::PathBuf, time::Duration};

use libp2p::Multiaddr;

/// Settings of one tunnel endpoint.
#[derive(Debug, Clone)]
pub struct TunnelConfig {
    /// File of the Ed25519 identity; created with mode 0600 when it doesn't exist.
    pub identity_file: PathBuf,
    /// Name of the node that this endpoint belongs to.
    pub node: String,
    /// `agent` or `gateway`.
    pub component: String,
    /// Where to listen, for example `/ip4/0.0.0.0/udp/4001/quic-v1` and `/ip4/0.0.0.0/tcp/4001`.
    pub listen: Vec<Multiaddr>,
    /// Further addresses to publish, for example of a public address in front of the node.
    pub advertise: Vec<Multiaddr>,
    /// Ranges whose addresses are never published (address, prefix length), such as pod networks. Loopback and link-local
    /// addresses found on interfaces are never published either.
    pub exclude: Vec<(IpAddr, u8)>,
    /// Whether to relay for other nodes. A relay must be reachable by them, and keeps no reservations itself.
    pub relay_server: bool,
    /// Whether relayed connections are upgraded to direct ones by hole punching (DCUtR).
    pub hole_punching: bool,
    /// When a peer that is reached through a relay is tried again by the better ways, first; each further pause is twice as long.
    pub upgrade_pause: Duration,
    /// The longest of these pauses.
    pub longest_upgrade_pause: Duration,
    /// Overall limit for [`crate::Tunnel::open`].
    pub open_deadline: Duration,
    /// Connections that carry no stream are closed after this time, except those to relays.
    pub idle_timeout: Duration,
    /// Most inbound streams at a time; more are refused as busy.
    pub max_inbound_streams: usize,
}

impl TunnelConfig {
    /// The defaults: QUIC and TCP on all IPv4 addresses at `port`, no relay.
    pub fn new(
        identity_file: impl Into<PathBuf>,
        node: impl Into<String>,
        component: impl Into<String>,
        port: u16,
    ) -> Self {
        Self {
            identity_file: identity_file.into(),
            node: node.into(),
            component: component.into(),
            listen: listen_on_all(port),
            advertise: Vec::new(),
            exclude: Vec::new(),
            relay_server: false,
            hole_punching: true,
            upgrade_pause: Duration::from_secs(15),
            longest_upgrade_pause: Duration::from_secs(600),
            open_deadline: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(600),
            max_inbound_streams: 16 * 1024,
        }
    }
}

fn listen_on_all(port: u16) -> Vec<Multiaddr> {
    use libp2p::multiaddr::Protocol;
    let all = Multiaddr::from(std::net::Ipv4Addr::UNSPECIFIED);
    vec![all.clone().with(Protocol::Udp(port)).with(Protocol::QuicV1), all.with(Protocol::Tcp(port))]
}
