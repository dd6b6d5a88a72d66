//! When a peer that is reached through a relay is tried again in the ways that are better. An attempt may have failed for a reason that
//! passes: the NATs' mappings weren't known yet, packets were lost, the other side had just changed its network.

use std::{collections::HashMap, time::Duration};

use libp2p::PeerId;
use tokio::time::Instant;

#[derive(Debug, Clone, Copy)]
struct Attempt {
    at: Instant,
    pause: Duration,
}

/// The peers whose relayed connections this endpoint has made.
#[derive(Debug)]
pub(crate) struct Upgrades {
    first_pause: Duration,
    longest_pause: Duration,
    attempts: HashMap<PeerId, Attempt>,
}

impl Upgrades {
    /// Pauses double from the first one up to the longest.
    pub(crate) fn new(first_pause: Duration, longest_pause: Duration) -> Self {
        Self { first_pause, longest_pause, attempts: HashMap::new() }
    }

    /// A relayed connection was made. One that an attempt made itself changes nothing.
    pub(crate) fn relayed(&mut self, peer: PeerId, now: Instant) {
        let pause = self.first_pause;
        self.attempts.entry(peer).or_insert(Attempt { at: now + pause, pause });
    }

    /// There is nothing to be tried any more: the peer is reached directly, or not at all.
    pub(crate) fn forget(&mut self, peer: &PeerId) {
        self.attempts.remove(peer);
    }

    /// The peers to be tried now; each comes again after its next pause.
    pub(crate) fn due(&mut self, now: Instant) -> Vec<PeerId> {
        let longest = self.longest_pause;
        let due = self.attempts.iter_mut().filter(|(_, attempt)| attempt.at <= now);
        due.map(|(peer, attempt)| {
            attempt.pause = (attempt.pause * 2).min(longest);
            attempt.at = now + attempt.pause;
            *peer
        })
        .collect()
    }

    /// When the next one is due.
    pub(crate) fn next_at(&self) -> Option<Instant> {
        self.attempts.values().map(|attempt| attempt.at).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn pauses_grow_until_the_peer_is_reached_directly() {
        let (peer, begin, second) = (PeerId::random(), Instant::now(), Duration::from_secs(1));
        let mut upgrades = Upgrades::new(15 * second, 600 * second);
        upgrades.relayed(peer, begin);
        let mut pauses = Vec::new();
        let mut now = begin;
        for _ in 0..8 {
            let next = upgrades.next_at().unwrap();
            assert!(upgrades.due(next - second).is_empty());
            assert_eq!(upgrades.due(next), [peer]);
            upgrades.relayed(peer, next);
            pauses.push((next - now).as_secs());
            now = next;
        }
        assert_eq!(pauses, [15, 30, 60, 120, 240, 480, 600, 600]);
        upgrades.forget(&peer);
        assert_eq!(upgrades.next_at(), None);
    }
}
