//! How much may be under way at one time: of all clients together, and of each.

use std::{collections::HashMap, net::IpAddr, sync::Arc};

use parking_lot::Mutex;
use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Which limit was met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reached {
    /// That of all clients together.
    All,
    /// That of this client.
    Client,
}

/// Counts what is under way.
#[derive(Debug)]
pub(super) struct Limits {
    all: Arc<Semaphore>,
    /// 0 for no limit.
    each: usize,
    /// Clients with something under way: not more of them than `all` has places.
    clients: Mutex<HashMap<IpAddr, usize>>,
    /// How many there are.
    taken: Gauge,
}

/// A place among what is under way; dropping it leaves it.
#[derive(Debug)]
pub(super) struct Place {
    limits: Arc<Limits>,
    client: IpAddr,
    _permit: OwnedSemaphorePermit,
}

impl Limits {
    /// At most `all` in all, and `each` of one client; 0 for as many as there are. `taken` shows how many there are.
    pub(super) fn new(all: usize, each: usize, taken: Gauge) -> Arc<Self> {
        Arc::new(Self { all: Arc::new(Semaphore::new(all)), each, clients: Mutex::default(), taken })
    }

    /// Takes a place.
    ///
    /// # Errors
    /// The limit that was met.
    pub(super) fn enter(self: &Arc<Self>, client: IpAddr) -> Result<Place, Reached> {
        let mut clients = self.clients.lock();
        if self.each != 0 && clients.get(&client).is_some_and(|count| *count >= self.each) {
            return Err(Reached::Client);
        }
        let permit = Arc::clone(&self.all).try_acquire_owned().map_err(|_| Reached::All)?;
        *clients.entry(client).or_default() += 1;
        self.taken.inc();
        Ok(Place { limits: Arc::clone(self), client, _permit: permit })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.limits.taken.dec();
        let mut clients = self.limits.clients.lock();
        if let Some(count) = clients.get_mut(&self.client) {
            *count -= 1;
            if *count == 0 {
                clients.remove(&self.client);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_at_its_limit_leaves_room_for_others_and_places_come_back() {
        let limits = Limits::new(3, 2, Gauge::default());
        let [one, two]: [IpAddr; 2] = ["10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap()];
        let first = limits.enter(one).unwrap();
        let _second = limits.enter(one).unwrap();
        assert_eq!(limits.enter(one).unwrap_err(), Reached::Client);
        let third = limits.enter(two).unwrap();
        assert_eq!(limits.enter(two).unwrap_err(), Reached::All);
        drop(first);
        let _fourth = limits.enter(one).unwrap();
        drop(third);
        assert_eq!(limits.taken.get(), 2);
        assert_eq!(limits.clients.lock().len(), 1, "clients with nothing under way are forgotten");
        let unlimited = Limits::new(3, 0, Gauge::default());
        let _all: Vec<Place> = (0..3).map(|_| unlimited.enter(one).unwrap()).collect();
    }
}
