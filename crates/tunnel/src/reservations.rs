//! The places that this node holds with relays, so that nodes which can't reach it directly can do so through them. A node
//! that is not itself a relay keeps one with every relay that it knows.

use std::{collections::HashMap, time::Duration};

use libp2p::{PeerId, core::transport::ListenerId};
use rand::Rng as _;
use tokio::time::Instant;

/// Pause after each of the first [`QUICK_ATTEMPTS`] failures; then it doubles up to [`LONGEST_PAUSE`].
const SHORTEST_PAUSE: Duration = Duration::from_millis(500);
/// A relay refuses a node that it doesn't know yet. A node that has just joined knows the relay first, so it is refused until
/// its MeshNode has gone through the cloud: some seconds, in which nobody reaches it.
const QUICK_ATTEMPTS: u32 = 20;
/// A node that comes back to the network should be reachable soon, and one more handshake every few seconds is cheap.
const LONGEST_PAUSE: Duration = Duration::from_secs(8);

/// The state of one relay.
#[derive(Debug)]
struct Reservation {
    listener: Option<ListenerId>,
    accepted: bool,
    failures: u32,
    next: Instant,
}

/// All relays, by PeerId.
#[derive(Debug, Default)]
pub(crate) struct Reservations {
    relays: HashMap<PeerId, Reservation>,
}

impl Reservations {
    /// Replaces the set of relays; returns the listeners of those that are no longer relays.
    pub(crate) fn set(&mut self, relays: &[PeerId], now: Instant) -> Vec<ListenerId> {
        let mut gone = Vec::new();
        self.relays.retain(|relay, reservation| {
            let keep = relays.contains(relay);
            if !keep {
                gone.extend(reservation.listener);
            }
            keep
        });
        for relay in relays {
            self.relays.entry(*relay).or_insert(Reservation {
                listener: None,
                accepted: false,
                failures: 0,
                next: now,
            });
        }
        gone
    }

    /// Relays at which something is to be done now.
    pub(crate) fn due(&self, now: Instant) -> Vec<PeerId> {
        self.relays
            .iter()
            .filter(|(_, reservation)| reservation.listener.is_none() && reservation.next <= now)
            .map(|(relay, _)| *relay)
            .collect()
    }

    /// When the next relay is due.
    pub(crate) fn next_at(&self) -> Option<Instant> {
        self.relays.values().filter(|reservation| reservation.listener.is_none()).map(|r| r.next).min()
    }

    /// Something is new (a connection to the relay is up, or its addresses changed): go on at once.
    pub(crate) fn hurry(&mut self, relay: &PeerId, now: Instant) {
        if let Some(reservation) = self.relays.get_mut(relay) {
            reservation.next = now;
        }
    }

    pub(crate) fn requested(&mut self, relay: &PeerId, listener: ListenerId) {
        if let Some(reservation) = self.relays.get_mut(relay) {
            reservation.listener = Some(listener);
            reservation.accepted = false;
        }
    }

    pub(crate) fn accepted(&mut self, relay: &PeerId) {
        if let Some(reservation) = self.relays.get_mut(relay) {
            reservation.accepted = true;
            reservation.failures = 0;
        }
    }

    /// Notes a failure to connect, and backs off.
    pub(crate) fn failed(&mut self, relay: &PeerId, now: Instant) {
        if let Some(reservation) = self.relays.get_mut(relay) {
            reservation.listener = None;
            reservation.accepted = false;
            reservation.failures = reservation.failures.saturating_add(1);
            reservation.next = now + pause(reservation.failures);
        }
    }

    /// Notes that the next attempt is under way, so that it isn't begun twice.
    pub(crate) fn trying(&mut self, relay: &PeerId, now: Instant) {
        if let Some(reservation) = self.relays.get_mut(relay) {
            reservation.next = now + LONGEST_PAUSE;
        }
    }

    /// A listener closed: the place is lost, or was refused. Returns its relay.
    pub(crate) fn closed(&mut self, listener: ListenerId, now: Instant) -> Option<PeerId> {
        let relay = *self.relays.iter().find(|(_, reservation)| reservation.listener == Some(listener))?.0;
        self.failed(&relay, now);
        Some(relay)
    }

    /// How many relays hold a place.
    pub(crate) fn held(&self) -> usize {
        self.relays.values().filter(|reservation| reservation.accepted).count()
    }
}

/// The pause after `failures` failures, with jitter so that nodes don't return to a restarted relay all at once.
fn pause(failures: u32) -> Duration {
    let longest = SHORTEST_PAUSE.saturating_mul(1 << failures.saturating_sub(QUICK_ATTEMPTS).min(8)).min(LONGEST_PAUSE);
    longest.mul_f64(rand::rng().random_range(0.5..1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_lost_place_is_asked_for_again_with_growing_pauses() {
        let relay = PeerId::random();
        let mut now = Instant::now();
        let mut reservations = Reservations::default();
        assert!(reservations.set(&[relay], now).is_empty());
        assert_eq!(reservations.due(now), [relay]);
        for _ in 0..20 {
            let listener = ListenerId::next();
            reservations.requested(&relay, listener);
            assert!(reservations.due(now).is_empty());
            assert_eq!(reservations.closed(listener, now), Some(relay));
            assert!(reservations.due(now).is_empty());
            now += LONGEST_PAUSE;
            assert_eq!(reservations.due(now), [relay]);
        }
        reservations.failed(&relay, now);
        reservations.hurry(&relay, now);
        assert_eq!(reservations.due(now), [relay]);
    }

    #[tokio::test]
    async fn the_place_with_a_node_that_relays_no_more_is_given_up() {
        let relay = PeerId::random();
        let now = Instant::now();
        let mut reservations = Reservations::default();
        reservations.set(&[relay], now);
        let listener = ListenerId::next();
        reservations.requested(&relay, listener);
        reservations.accepted(&relay);
        assert_eq!(reservations.held(), 1);
        assert_eq!(reservations.set(&[], now), [listener]);
        assert_eq!(reservations.held(), 0);
    }
}
