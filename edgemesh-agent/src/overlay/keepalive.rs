//! Probes of TCP connections on which nothing is said (RFC 9293, 3.8.4). A host answers probes for its connections while it is alive, so two ends
//! can find out about one another. An agent in between answers both of them, and so has to ask both.

use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;

/// Shortest time that the kernel takes.
const SECOND: Duration = Duration::from_secs(1);

/// When a connection is probed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Keepalive {
    idle: Duration,
}

impl Keepalive {
    /// After this time without a word; none for zero.
    pub(super) fn after(idle: Duration) -> Option<Self> {
        (idle >= SECOND).then_some(Self { idle })
    }

    /// The kernel's settings: after the first probe one each quarter of the time, and the end after as many as the host's
    /// `net.ipv4.tcp_keepalive_probes` (9) have not been answered.
    pub(super) fn settings(self) -> TcpKeepalive {
        TcpKeepalive::new().with_time(self.idle).with_interval((self.idle / 4).max(SECOND))
    }

    /// Has a connection probed.
    pub(super) fn probe(self, connection: &TcpStream) {
        if let Err(error) = SockRef::from(connection).set_tcp_keepalive(&self.settings()) {
            tracing::debug!(%error, "an idle connection will not be probed");
        }
    }
}
