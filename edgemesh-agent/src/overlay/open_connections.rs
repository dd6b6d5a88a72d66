//! The open TCP connections of a listener, so that those whose endpoint was deleted end, as the datapath ends those that it sent
//! to endpoints directly.

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::{called::Called, upstream::Dialer};

/// Changes that come close together are looked at together.
const PAUSE: Duration = Duration::from_millis(100);
/// What is under way in a connection has so long to end by itself: the pod may live on.
const GRACE: Duration = Duration::from_secs(2);

/// They are numbered in their order.
#[derive(Debug, Default)]
pub(super) struct OpenConnections(Mutex<Numbered>);

#[derive(Debug, Default)]
struct Numbered {
    next: u64,
    open: HashMap<u64, Open>,
}

#[derive(Debug)]
struct Open {
    called: Called,
    endpoint: SocketAddr,
    stop: CancellationToken,
}

/// Takes a connection out when it is dropped.
#[derive(Debug)]
pub(super) struct Entry {
    connections: Arc<OpenConnections>,
    number: u64,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.connections.0.lock().open.remove(&self.number);
    }
}

impl OpenConnections {
    /// A connection has reached an endpoint. `stop` is cancelled when that is gone.
    pub(super) fn add(self: &Arc<Self>, called: Called, endpoint: SocketAddr, stop: CancellationToken) -> Entry {
        let mut all = self.0.lock();
        let number = all.next;
        all.next += 1;
        all.open.insert(number, Open { called, endpoint, stop });
        Entry { connections: Arc::clone(self), number }
    }

    /// Ends connections whose endpoints go, until it is dropped.
    pub(super) async fn end_stale(&self, dialer: &Dialer) {
        let mut changes = dialer.changes();
        while changes.changed().await.is_ok() {
            sleep(PAUSE).await;
            changes.mark_unchanged();
            let stale = self.stale(dialer);
            if stale.is_empty() {
                continue;
            }
            sleep(GRACE).await;
            let still = self.stale(dialer);
            let all = self.0.lock();
            for open in still.intersection(&stale).filter_map(|number| all.open.get(number)) {
                tracing::debug!(called = %open.called, endpoint = %open.endpoint, "its endpoint is gone: connection ended");
                open.stop.cancel();
            }
        }
    }

    fn stale(&self, dialer: &Dialer) -> HashSet<u64> {
        let all = self.0.lock();
        let stale = all.open.iter().filter(|(_, open)| dialer.is_deleted(&open.called, open.endpoint));
        stale.map(|(number, _)| *number).collect()
    }
}
