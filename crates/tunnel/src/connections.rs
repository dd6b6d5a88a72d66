//! The table of live connections, shared by the swarm's task (which writes it) and by everyone who opens a stream.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use libp2p::{Multiaddr, PeerId, Stream, core::ConnectedPoint, multiaddr::Protocol, swarm::ConnectionId};
use parking_lot::{Mutex, RwLock};
use tokio::sync::{mpsc, oneshot};

use crate::{
    behaviour::MAX_STREAMS,
    peer::{DirectTransport, Path},
    wire::Carried,
};

/// Left free of each connection's streams: for libp2p's own, and for those that have ended at one of the two sides only.
const SPARE: usize = 128;
/// With QUIC the streams of each side have a limit of their own.
const OVER_QUIC: Opened = Opened::at_most(MAX_STREAMS - SPARE);
/// With Yamux those of both sides count together, and one too many ends the connection with all the others.
const OVER_YAMUX: Opened = Opened::at_most(MAX_STREAMS / 2 - SPARE);

/// After this time a connection that is still there is known to work: longer than silence is borne on any of them.
const SETTLED: Duration = Duration::from_secs(30);

/// UDP flows that can go to a node at a time, whichever way it is reached.
pub const MAX_FLOWS: usize = OVER_YAMUX.flows;

/// Numbers of streams that one side has opened on a connection.
#[derive(Debug, Clone, Copy, Default)]
struct Opened {
    all: usize,
    /// Those of UDP flows.
    flows: usize,
}

impl Opened {
    /// Limits for both: flows, which stay until they have been idle for long, leave a fifth to connections.
    const fn at_most(all: usize) -> Self {
        Self { all, flows: all / 5 * 4 }
    }
}

/// Asks a connection for a new stream.
pub(crate) type OpenRequest = oneshot::Sender<Result<Stream, String>>;

/// One established connection.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) id: ConnectionId,
    pub(crate) peer: PeerId,
    pub(crate) route: Route,
    pub(crate) opener: mpsc::Sender<OpenRequest>,
    opened: Mutex<Opened>,
    made: Instant,
    /// Bytes that streams received over it: a connection that receives is alive, whatever its pings say.
    pub(crate) received: AtomicU64,
    /// `received` at the last failed ping.
    received_at_failure: AtomicU64,
}

/// How a connection goes. The better one orders first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Route {
    Quic,
    Tcp,
    Relayed(Option<PeerId>),
}

impl Route {
    pub(crate) fn of(endpoint: &ConnectedPoint) -> Self {
        match endpoint {
            ConnectedPoint::Dialer { address, .. } => Self::of_address(address),
            ConnectedPoint::Listener { local_addr, .. } => Self::of_address(local_addr),
        }
    }

    pub(crate) fn of_address(address: &Multiaddr) -> Self {
        let mut relay = None;
        let mut quic = false;
        for part in address {
            match part {
                Protocol::P2p(peer) => relay = Some(peer),
                Protocol::P2pCircuit => return Self::Relayed(relay),
                Protocol::QuicV1 => quic = true,
                _ => {}
            }
        }
        if quic { Self::Quic } else { Self::Tcp }
    }

    pub(crate) fn is_relayed(self) -> bool {
        matches!(self, Self::Relayed(_))
    }

    /// The public form, with the relay's name as `name_of` knows it.
    pub(crate) fn path(self, name_of: impl FnOnce(&PeerId) -> Option<String>) -> Path {
        match self {
            Self::Quic => Path::Direct(DirectTransport::Quic),
            Self::Tcp => Path::Direct(DirectTransport::Tcp),
            Self::Relayed(relay) => Path::Relayed {
                via: relay.map_or_else(|| "unknown".into(), |relay| name_of(&relay).unwrap_or(relay.to_string())),
            },
        }
    }
}

impl Connection {
    pub(crate) fn new(id: ConnectionId, peer: PeerId, route: Route, opener: mpsc::Sender<OpenRequest>) -> Self {
        Self {
            id,
            peer,
            route,
            opener,
            opened: Mutex::default(),
            made: Instant::now(),
            received: AtomicU64::new(0),
            received_at_failure: AtomicU64::new(0),
        }
    }

    /// A place for another stream of this side; none if it has opened as many as it may.
    pub(crate) fn place(self: &Arc<Self>, carried: Carried) -> Option<Place> {
        let most = match self.route {
            Route::Quic => OVER_QUIC,
            Route::Tcp | Route::Relayed(_) => OVER_YAMUX,
        };
        let flow = usize::from(carried == Carried::Udp);
        let mut opened = self.opened.lock();
        if opened.all >= most.all || opened.flows + flow > most.flows {
            return None;
        }
        opened.all += 1;
        opened.flows += flow;
        Some(Place { connection: self.clone(), flow })
    }

    /// Whether streams received anything since the last failed ping; remembers the state for the next one.
    pub(crate) fn received_since_failure(&self) -> bool {
        let now = self.received.load(Ordering::Relaxed);
        self.received_at_failure.swap(now, Ordering::Relaxed) != now
    }
}

/// Counts a stream of this side, from before it is opened until this is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    connection: Arc<Connection>,
    /// 1 for a UDP flow.
    flow: usize,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut opened = self.connection.opened.lock();
        opened.all -= 1;
        opened.flows -= self.flow;
    }
}

/// Connections by peer.
#[derive(Debug, Clone, Default)]
pub(crate) struct Connections {
    by_peer: Arc<RwLock<HashMap<PeerId, Vec<Arc<Connection>>>>>,
}

impl Connections {
    pub(crate) fn add(&self, connection: Arc<Connection>) {
        self.by_peer.write().entry(connection.peer).or_default().push(connection);
    }

    pub(crate) fn remove(&self, peer: &PeerId, id: ConnectionId) -> Option<Arc<Connection>> {
        let mut by_peer = self.by_peer.write();
        let list = by_peer.get_mut(peer)?;
        let at = list.iter().position(|connection| connection.id == id)?;
        let removed = list.swap_remove(at);
        if list.is_empty() {
            by_peer.remove(peer);
        }
        Some(removed)
    }

    pub(crate) fn get(&self, peer: &PeerId, id: ConnectionId) -> Option<Arc<Connection>> {
        self.by_peer.read().get(peer)?.iter().find(|connection| connection.id == id).cloned()
    }

    /// The connection for a new stream: direct before relayed, QUIC before TCP, and of equals the newest, which after a
    /// change of network is the one that still lives.
    pub(crate) fn best(&self, peer: &PeerId) -> Option<Arc<Connection>> {
        best_of(self.by_peer.read().get(peer)?).cloned()
    }

    /// Takes out the relayed connections with a peer that no stream uses and that none will: there is a better one, or a newer one.
    ///
    /// Not one that was made a moment ago beside an older one: the peer made it because it has that one no more, as after a
    /// restart, and here that is noticed only with time.
    pub(crate) fn take_superseded(&self, peer: &PeerId) -> Vec<ConnectionId> {
        let mut by_peer = self.by_peer.write();
        let Some(list) = by_peer.get_mut(peer) else { return Vec::new() };
        let Some(best) = best_of(list).map(|connection| connection.id) else { return Vec::new() };
        // Whoever uses one, or is about to, has it from here.
        let superseded = |connection: &mut Arc<Connection>| {
            let is_settled = connection.id < best || connection.made.elapsed() >= SETTLED;
            connection.route.is_relayed() && connection.id != best && is_settled && Arc::strong_count(connection) == 1
        };
        list.extract_if(.., superseded).map(|connection| connection.id).collect()
    }

    /// How many relayed connections there are with a peer.
    pub(crate) fn relayed(&self, peer: &PeerId) -> usize {
        let by_peer = self.by_peer.read();
        by_peer.get(peer).into_iter().flatten().filter(|connection| connection.route.is_relayed()).count()
    }

    /// The peers with which there are several connections.
    pub(crate) fn peers_with_several(&self) -> Vec<PeerId> {
        let by_peer = self.by_peer.read();
        by_peer.iter().filter(|(_, list)| list.len() > 1).map(|(peer, _)| *peer).collect()
    }

    pub(crate) fn is_direct(&self, peer: &PeerId) -> bool {
        self.best(peer).is_some_and(|connection| !connection.route.is_relayed())
    }
}

fn best_of(list: &[Arc<Connection>]) -> Option<&Arc<Connection>> {
    list.iter()
        .filter(|connection| !connection.opener.is_closed())
        .min_by_key(|connection| (rank(connection.route), std::cmp::Reverse(connection.id)))
}

fn rank(route: Route) -> u8 {
    match route {
        Route::Quic => 0,
        Route::Tcp => 1,
        Route::Relayed(_) => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_route_is_read_from_the_address() {
        let relay = PeerId::random();
        let quic: Multiaddr = "/ip4/192.0.2.1/udp/4001/quic-v1".parse().unwrap();
        let tcp: Multiaddr = "/ip4/192.0.2.1/tcp/4001".parse().unwrap();
        assert_eq!(Route::of_address(&quic), Route::Quic);
        assert_eq!(Route::of_address(&tcp), Route::Tcp);
        let relayed = quic.with(Protocol::P2p(relay)).with(Protocol::P2pCircuit).with(Protocol::P2p(PeerId::random()));
        assert_eq!(Route::of_address(&relayed), Route::Relayed(Some(relay)));
    }

    /// Connections with a peer, and what keeps them open.
    fn table(peer: PeerId, routes: &[(usize, Route)]) -> (Connections, Vec<mpsc::Receiver<OpenRequest>>) {
        let table = Connections::default();
        let open = routes.iter().map(|(id, route)| {
            let (opener, requests) = mpsc::channel(1);
            table.add(Arc::new(Connection::new(ConnectionId::new_unchecked(*id), peer, *route, opener)));
            requests
        });
        let open = open.collect();
        (table, open)
    }

    #[test]
    fn a_direct_connection_is_preferred_to_a_relayed_one() {
        let peer = PeerId::random();
        let (table, _open) = table(peer, &[(1, Route::Relayed(None)), (2, Route::Tcp), (3, Route::Relayed(None))]);
        assert_eq!(table.best(&peer).unwrap().route, Route::Tcp);
        table.remove(&peer, ConnectionId::new_unchecked(2));
        assert_eq!(table.best(&peer).unwrap().id, ConnectionId::new_unchecked(3));
    }

    #[test]
    fn no_more_streams_are_opened_than_the_connection_carries_and_flows_leave_room() {
        for (route, all, flows) in [(Route::Quic, 3968, 3172), (Route::Tcp, 1920, MAX_FLOWS)] {
            let peer = PeerId::random();
            let (table, _open) = table(peer, &[(1, route)]);
            let connection = table.best(&peer).unwrap();
            let taken = |carried| -> Vec<Place> { std::iter::from_fn(|| connection.place(carried)).collect() };
            let mut udp = taken(Carried::Udp);
            let tcp = taken(Carried::Tcp);
            assert_eq!((udp.len(), tcp.len()), (flows, all - flows), "{route:?}");
            drop(tcp);
            assert!(connection.place(Carried::Udp).is_none());
            udp.pop();
            assert!(connection.place(Carried::Udp).is_some());
        }
    }

    #[test]
    fn relayed_connections_that_nothing_uses_give_way_to_better_and_newer_ones() {
        let peer = PeerId::random();
        let ids = |all: &[usize]| all.iter().map(|id| ConnectionId::new_unchecked(*id)).collect::<Vec<_>>();
        let relayed = [1, 2, 3, 4].map(|id| (id, Route::Relayed(None)));
        let (table, _open) = table(peer, &relayed);
        let used = table.get(&peer, ConnectionId::new_unchecked(2));
        assert_eq!(table.take_superseded(&peer), ids(&[1, 3]));
        assert!(table.take_superseded(&peer).is_empty());
        assert_eq!((table.relayed(&peer), table.peers_with_several()), (2, vec![peer]));
        let (opener, _direct) = mpsc::channel(1);
        table.add(Arc::new(Connection::new(ConnectionId::new_unchecked(5), peer, Route::Tcp, opener)));
        assert_eq!(table.take_superseded(&peer), ids(&[4]));
        drop(used);
        assert_eq!(table.take_superseded(&peer), ids(&[2]));
        // The peer has started again, and this side doesn't know yet.
        let (opener, _newer) = mpsc::channel(1);
        table.add(Arc::new(Connection::new(ConnectionId::new_unchecked(6), peer, Route::Relayed(None), opener)));
        assert!(table.take_superseded(&peer).is_empty());
        assert!(table.is_direct(&peer));
    }
}
