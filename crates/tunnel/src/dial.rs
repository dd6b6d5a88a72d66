//! The order in which a peer's addresses are tried: QUIC, then TCP, then relays, each after a short head start of the one
//! before, so that a dead direct address doesn't hold up the relay, and the relay doesn't win over a live direct address.

use std::{
    collections::{HashSet, VecDeque},
    time::Duration,
};

use libp2p::{Multiaddr, swarm::ConnectionId};
use tokio::{sync::oneshot, time::Instant};

use crate::directory::{Directory, KnownPeer};

/// Head start of QUIC before TCP.
const TCP_AFTER: Duration = Duration::from_millis(200);
/// Head start of direct addresses before relays.
const RELAY_AFTER: Duration = Duration::from_millis(300);
/// Failures that are kept for the error.
const MAX_FAILURES: usize = 8;
/// Callers that may wait for one peer; more are told that it can't be reached.
const MAX_WAITERS: usize = 4096;

/// Answer to a caller that waits for a connection.
pub(crate) type Connected = oneshot::Sender<Result<(), String>>;

/// The attempt to reach one peer.
#[derive(Debug)]
pub(crate) struct DialPlan {
    stages: VecDeque<(Instant, Vec<Multiaddr>)>,
    pending: HashSet<ConnectionId>,
    waiters: Vec<Connected>,
    failures: Vec<String>,
}

impl DialPlan {
    /// All ways to a peer, or only the direct ones.
    pub(crate) fn new(peer: &KnownPeer, directory: &Directory, circuits: bool, now: Instant) -> Self {
        let mut stages = VecDeque::new();
        let mut add = |after: Duration, addresses: Vec<Multiaddr>| {
            if !addresses.is_empty() {
                // The first stage that has addresses begins at once.
                let begin = if stages.is_empty() { now } else { now + after };
                stages.push_back((begin, addresses));
            }
        };
        add(Duration::ZERO, peer.quic.clone());
        add(TCP_AFTER, peer.tcp.clone());
        if circuits {
            add(RELAY_AFTER, directory.circuits_to(peer));
        }
        Self { stages, pending: HashSet::new(), waiters: Vec::new(), failures: Vec::new() }
    }

    /// When the next stage begins.
    pub(crate) fn next_stage_at(&self) -> Option<Instant> {
        self.stages.front().map(|(at, _)| *at)
    }

    /// The addresses to dial now, if a stage is due.
    pub(crate) fn due(&mut self, now: Instant) -> Option<Vec<Multiaddr>> {
        let (at, _) = self.stages.front()?;
        if *at > now { None } else { self.stages.pop_front().map(|(_, addresses)| addresses) }
    }

    pub(crate) fn wait(&mut self, waiter: Connected) {
        self.waiters.retain(|waiter| !waiter.is_closed());
        if self.waiters.len() < MAX_WAITERS {
            self.waiters.push(waiter);
        } else {
            let _ = waiter.send(Err("too many streams are waiting for a connection to it".into()));
        }
    }

    pub(crate) fn dialing(&mut self, id: ConnectionId) {
        self.pending.insert(id);
    }

    /// Notes a failure; when nothing else is in flight the next stage begins at once.
    pub(crate) fn failed(&mut self, id: ConnectionId, failure: String, now: Instant) {
        if self.pending.remove(&id) {
            if self.failures.len() < MAX_FAILURES {
                self.failures.push(failure);
            }
            if self.pending.is_empty()
                && let Some(stage) = self.stages.front_mut()
            {
                stage.0 = now;
            }
        }
    }

    /// Whether every way was tried and failed.
    pub(crate) fn is_exhausted(&self) -> bool {
        self.stages.is_empty() && self.pending.is_empty()
    }

    /// Ends the attempt and tells those who wait.
    pub(crate) fn finish(self, connected: bool) {
        let detail = if self.failures.is_empty() { "no address is known".into() } else { self.failures.join("; ") };
        for waiter in self.waiters {
            let _ = waiter.send(if connected { Ok(()) } else { Err(detail.clone()) });
        }
    }
}

#[cfg(test)]
mod tests {
    use libp2p::PeerId;

    use super::*;
    use crate::peer::TunnelPeer;

    fn plan(addresses: &[&str], now: Instant) -> DialPlan {
        let id = PeerId::random();
        let peer = TunnelPeer {
            node: "edge".into(),
            component: "agent".into(),
            peer_id: id.to_string(),
            addresses: addresses.iter().map(ToString::to_string).collect(),
            relay: false,
        };
        let directory = Directory::new(&[peer], &PeerId::random());
        DialPlan::new(directory.get(&id).unwrap(), &directory, true, now)
    }

    #[tokio::test(start_paused = true)]
    async fn quic_has_a_head_start_and_tcp_follows_when_it_fails() {
        let now = Instant::now();
        let mut plan = plan(&["/ip4/192.0.2.1/tcp/1", "/ip4/192.0.2.1/udp/1/quic-v1"], now);
        assert_eq!(plan.due(now).unwrap()[0].to_string(), "/ip4/192.0.2.1/udp/1/quic-v1");
        plan.dialing(ConnectionId::new_unchecked(1));
        assert!(plan.due(now).is_none());
        plan.failed(ConnectionId::new_unchecked(1), "refused".into(), now);
        assert_eq!(plan.due(now).unwrap()[0].to_string(), "/ip4/192.0.2.1/tcp/1");
        assert!(plan.is_exhausted());
    }

    #[tokio::test]
    async fn those_who_wait_hear_why_it_failed() {
        let mut plan = plan(&[], Instant::now());
        let (waiter, answer) = oneshot::channel();
        plan.wait(waiter);
        assert!(plan.is_exhausted());
        plan.finish(false);
        assert_eq!(answer.await.unwrap(), Err("no address is known".into()));
    }
}
