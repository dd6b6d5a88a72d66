//! When clients of Services with session affinity called last through the agent: one that has not for the Service's timeout
//! chooses its endpoint anew (Kubernetes, "Virtual IPs and Service Proxies": session affinity).

use std::{
    collections::HashMap,
    net::IpAddr,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use crate::node_local::ServicePortName;

/// Pairs of client and Service port that are remembered, as many as the maps hold for sockets that go to endpoints directly.
const MAX_CLIENTS: usize = 8192;

/// The rounds of all clients.
#[derive(Debug, Default)]
pub(super) struct Affinity {
    clients: Mutex<HashMap<(IpAddr, ServicePortName), Round>>,
}

#[derive(Debug)]
struct Round {
    number: u64,
    last: Instant,
}

impl Affinity {
    /// The round of a client's choice: the same until it has not called for `timeout`. Clients that aren't known have the first
    /// one, so that they keep their endpoint when the agent restarts.
    pub(super) fn round(&self, client: IpAddr, port: &ServicePortName, timeout: Duration, now: Instant) -> u64 {
        let mut clients = self.clients.lock();
        if let Some(round) = clients.get_mut(&(client, port.clone())) {
            if now.saturating_duration_since(round.last) >= timeout {
                round.number = rand::random();
            }
            round.last = now;
            return round.number;
        }
        if clients.len() >= MAX_CLIENTS {
            let oldest = clients.iter().min_by_key(|(_, round)| round.last).map(|(client, _)| client.clone());
            oldest.map(|client| clients.remove(&client));
        }
        clients.insert((client, port.clone()), Round { number: 0, last: now });
        0
    }
}

#[cfg(test)]
mod tests {
    use edgemesh_mesh::model::{Protocol, ServiceName};

    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(10);

    fn port(name: &str) -> ServicePortName {
        let service = ServiceName { namespace: "default".into(), name: name.into() };
        ServicePortName { service, port: "".into(), protocol: Protocol::Tcp }
    }

    #[test]
    fn a_client_that_pauses_longer_than_the_timeout_gets_another_round() {
        let (affinity, mut now, client) = (Affinity::default(), Instant::now(), [10, 244, 0, 5].into());
        let mut call = |pause: Duration| {
            now += pause;
            affinity.round(client, &port("web"), TIMEOUT, now)
        };
        let short = TIMEOUT - Duration::from_secs(1);
        assert_eq!([call(short), call(short), call(short)], [0; 3], "each call begins the time again");
        let second = call(TIMEOUT);
        assert_ne!(second, 0);
        assert_eq!(call(short), second);
        assert_eq!(affinity.round(client, &port("other"), TIMEOUT, now), 0, "each Service port for itself");
    }

    #[test]
    fn the_client_that_is_silent_for_longest_is_forgotten_first() {
        let (affinity, begin) = (Affinity::default(), Instant::now());
        for number in 0..=MAX_CLIENTS as u32 {
            affinity.round(
                IpAddr::V4(number.into()),
                &port("web"),
                TIMEOUT,
                begin + Duration::from_millis(number.into()),
            );
        }
        let clients = affinity.clients.lock();
        assert_eq!(clients.len(), MAX_CLIENTS);
        assert!(!clients.contains_key(&(IpAddr::V4(0.into()), port("web"))));
    }
}
