//! Where the UDP flows of a listener lead, so that none stays with an endpoint that is gone: clients use their ports again, and what
//! comes from one within a flow's idle time is taken for more of that flow.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, OnceLock},
    time::Duration,
};

use parking_lot::Mutex;

use super::{
    called::Called,
    upstream::{Dialer, Route, Standing},
};

/// A flow whose endpoint gets no new clients moves on with the first datagram after a pause of this length. One that goes on
/// without such a pause stays as long as the endpoint serves.
pub(super) const PAUSE: Duration = Duration::from_secs(1);

/// A client's address, and the address that it talks to.
pub(super) type FlowKey = (SocketAddr, SocketAddr);

/// What opening a flow has led to, once that is known: where it goes, or why it goes nowhere.
pub(super) type Opened = Arc<OnceLock<Result<Route, &'static str>>>;

/// The flows of one listener.
#[derive(Debug, Clone, Default)]
pub(super) struct Leads(Arc<Mutex<HashMap<FlowKey, (Called, Opened)>>>);

impl Leads {
    /// A flow begins.
    pub(super) fn begin(&self, key: FlowKey, called: Called, opened: Opened) {
        self.0.lock().insert(key, (called, opened));
    }

    /// A flow has ended; a newer one of the same key stays.
    pub(super) fn end(&self, key: &FlowKey, opened: &Opened) {
        let mut flows = self.0.lock();
        if flows.get(key).is_some_and(|(_, newest)| Arc::ptr_eq(newest, opened)) {
            flows.remove(key);
        }
    }

    /// How the endpoint of a flow stands; none if the flow has no endpoint yet.
    pub(super) fn standing(&self, dialer: &Dialer, key: &FlowKey) -> Option<Standing> {
        let flows = self.0.lock();
        let (called, opened) = flows.get(key)?;
        standing(dialer, called, opened)
    }

    /// The flows whose endpoints are gone.
    pub(super) fn gone(&self, dialer: &Dialer) -> Vec<FlowKey> {
        let flows = self.0.lock();
        let gone =
            flows.iter().filter(|(_, (called, opened))| standing(dialer, called, opened) == Some(Standing::Gone));
        gone.map(|(key, _)| *key).collect()
    }
}

fn standing(dialer: &Dialer, called: &Called, opened: &Opened) -> Option<Standing> {
    let route = opened.get()?.as_ref().ok()?;
    Some(dialer.standing(called, route.endpoint))
}
