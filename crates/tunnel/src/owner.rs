//! The one task that owns the swarm: it dials, keeps the relays, enforces the list of known peers, and hands streams over.

use std::{collections::HashMap, sync::Arc, time::Duration};

use edgemesh_telemetry::Shutdown;
use futures::StreamExt as _;
use libp2p::{
    Multiaddr, PeerId, Swarm, allow_block_list, dcutr, identify,
    multiaddr::Protocol,
    ping, relay,
    swarm::{DialError, ListenError, SwarmEvent, dial_opts::DialOpts, dial_opts::PeerCondition},
};
use tokio::{
    sync::{Semaphore, mpsc, watch},
    time::{Instant, sleep_until},
};

use crate::{
    accept::{self, Accept, RefuseBusy},
    addresses::OwnAddresses,
    behaviour::{Overlay, OverlayEvent},
    config::TunnelConfig,
    connections::{Connections, Route},
    dial::{Connected, DialPlan},
    directory::{Directory, KnownPeer},
    error::{RefusalReason, StartError},
    metrics::Metrics,
    reservations::Reservations,
    stream::TunnelStream,
    streams::Inbound,
    upgrades::Upgrades,
};

/// How often a draining owner looks whether the last stream has ended.
const DRAIN_CHECK: Duration = Duration::from_millis(50);
/// Streams at a time that are told that there is no place for them; further ones are dropped.
const MAX_REFUSED: usize = 256;
/// How long a draining owner stays when the last stream has ended: what such a stream has sent may still be under way, and a QUIC
/// connection that is closed discards it.
const LINGER: Duration = Duration::from_secs(1);
/// Time for closing connections in order.
const GOODBYE: Duration = Duration::from_millis(500);
/// How often relayed connections are looked for whose last stream has ended after a direct one had taken their place.
const SWEEP_PAUSE: Duration = Duration::from_secs(10);
/// No more relayed connections are made for the sake of hole punching while streams hold so many with the peer: direct ones must find
/// room below the limit of all.
const MAX_RELAYED: usize = 8;

/// A request to the owner.
pub(crate) enum Command {
    /// Connect to a known peer, by whatever way works.
    Connect(PeerId, Connected),
}

/// The owner's state.
pub(crate) struct Owner {
    pub(crate) swarm: Swarm<Overlay>,
    pub(crate) commands: mpsc::Receiver<Command>,
    pub(crate) directories: watch::Receiver<Arc<Directory>>,
    pub(crate) connections: Connections,
    pub(crate) addresses: OwnAddresses,
    pub(crate) published: watch::Sender<Vec<String>>,
    pub(crate) acceptor: Arc<dyn Accept>,
    pub(crate) inbound_places: Arc<Semaphore>,
    refusal_places: Arc<Semaphore>,
    pub(crate) metrics: Metrics,
    pub(crate) shutdown: Shutdown,
    pub(crate) relay_server: bool,
    directory: Arc<Directory>,
    plans: HashMap<PeerId, DialPlan>,
    reservations: Reservations,
    upgrades: Upgrades,
    hole_punching: bool,
    next_sweep: Instant,
}

/// The parts of an owner that its maker provides.
pub(crate) struct OwnerParts {
    pub(crate) swarm: Swarm<Overlay>,
    pub(crate) commands: mpsc::Receiver<Command>,
    pub(crate) directories: watch::Receiver<Arc<Directory>>,
    pub(crate) connections: Connections,
    pub(crate) published: watch::Sender<Vec<String>>,
    pub(crate) acceptor: Arc<dyn Accept>,
    pub(crate) metrics: Metrics,
    pub(crate) shutdown: Shutdown,
}

impl Owner {
    /// Starts to listen.
    pub(crate) fn new(config: &TunnelConfig, mut parts: OwnerParts) -> Result<Self, StartError> {
        for address in &config.listen {
            parts
                .swarm
                .listen_on(address.clone())
                .map_err(|error| StartError::Listen { address: address.to_string(), detail: error.to_string() })?;
        }
        let own = *parts.swarm.local_peer_id();
        Ok(Self {
            swarm: parts.swarm,
            commands: parts.commands,
            directories: parts.directories,
            connections: parts.connections,
            addresses: OwnAddresses::new(config, own),
            published: parts.published,
            acceptor: parts.acceptor,
            inbound_places: Arc::new(Semaphore::new(config.max_inbound_streams)),
            refusal_places: Arc::new(Semaphore::new(MAX_REFUSED)),
            metrics: parts.metrics,
            shutdown: parts.shutdown,
            relay_server: config.relay_server,
            directory: Arc::default(),
            plans: HashMap::new(),
            reservations: Reservations::default(),
            upgrades: Upgrades::new(config.upgrade_pause, config.longest_upgrade_pause),
            hole_punching: config.hole_punching,
            next_sweep: Instant::now() + SWEEP_PAUSE,
        })
    }

    /// Runs until the daemon has drained.
    pub(crate) async fn run(mut self) {
        let stopping = self.shutdown.stopping().clone();
        let mut commands_open = true;
        loop {
            if stopping.is_cancelled() && self.metrics.streams.none_for(LINGER) {
                break;
            }
            let wake = self.advance(Instant::now(), stopping.is_cancelled());
            tokio::select! {
                biased;
                Ok(()) = self.directories.changed() => self.apply_directory(),
                command = self.commands.recv(), if commands_open => match command {
                    Some(Command::Connect(peer, connected)) => self.connect(peer, connected),
                    None => commands_open = false,
                },
                event = self.swarm.select_next_some() => self.on_event(event),
                () = sleep_until(wake) => {}
                () = stopping.cancelled(), if !stopping.is_cancelled() => {}
            }
        }
        self.say_goodbye().await;
    }

    /// Closes every connection in order, so that the peers know at once and the sockets are free when this returns.
    async fn say_goodbye(&mut self) {
        let peers: Vec<PeerId> = self.swarm.connected_peers().copied().collect();
        for peer in peers {
            // An error means that it is gone already.
            let _ = self.swarm.disconnect_peer_id(peer);
        }
        let closing = async {
            while self.swarm.network_info().num_peers() > 0 {
                let _ = self.swarm.select_next_some().await;
            }
        };
        let _ = tokio::time::timeout(GOODBYE, closing).await;
        tracing::debug!("the tunnel has drained");
    }

    fn apply_directory(&mut self) {
        let new = self.directories.borrow_and_update().clone();
        let old = std::mem::replace(&mut self.directory, new.clone());
        let allowed = &mut self.swarm.behaviour_mut().allowed;
        for id in old.ids().filter(|id| new.get(id).is_none()) {
            allowed.disallow_peer(*id);
            self.upgrades.forget(id);
            if let Some(plan) = self.plans.remove(id) {
                plan.finish(false);
            }
        }
        for id in new.ids() {
            allowed.allow_peer(*id);
        }
        if self.relay_server {
            return;
        }
        let now = Instant::now();
        let relays: Vec<PeerId> = new.relays().map(|relay| relay.id).collect();
        for listener in self.reservations.set(&relays, now) {
            self.swarm.remove_listener(listener);
        }
        for relay in new.relays().filter(|relay| old.get(&relay.id) != Some(relay)) {
            self.reservations.hurry(&relay.id, now);
        }
    }

    fn connect(&mut self, peer: PeerId, connected: Connected) {
        if self.connections.best(&peer).is_some() {
            let _ = connected.send(Ok(()));
            return;
        }
        let Some(known) = self.directory.get(&peer).cloned() else {
            let _ = connected.send(Err("it is no longer a known peer".into()));
            return;
        };
        let plan = self.plan(&known, true);
        plan.wait(connected);
    }

    fn plan(&mut self, peer: &KnownPeer, circuits: bool) -> &mut DialPlan {
        let directory = &self.directory;
        self.plans.entry(peer.id).or_insert_with(|| DialPlan::new(peer, directory, circuits, Instant::now()))
    }

    /// Does what is due, and says when to come back.
    fn advance(&mut self, now: Instant, stopping: bool) -> Instant {
        if !stopping {
            self.advance_reservations(now);
            self.advance_upgrades(now);
        }
        self.advance_plans(now);
        if now >= self.next_sweep {
            self.next_sweep = now + SWEEP_PAUSE;
            for peer in self.connections.peers_with_several() {
                self.close_replaced(&peer);
            }
        }
        let mut wake = if stopping { now + DRAIN_CHECK } else { self.next_sweep };
        for at in self.plans.values().filter_map(DialPlan::next_stage_at) {
            wake = wake.min(at);
        }
        for at in [self.reservations.next_at(), self.upgrades.next_at()].into_iter().flatten().filter(|_| !stopping) {
            wake = wake.min(at);
        }
        wake
    }

    fn advance_plans(&mut self, now: Instant) {
        let mut ended = Vec::new();
        for (peer, plan) in &mut self.plans {
            while let Some(addresses) = plan.due(now) {
                let options = DialOpts::peer_id(*peer).addresses(addresses).condition(PeerCondition::Always).build();
                let id = options.connection_id();
                plan.dialing(id);
                if let Err(error) = self.swarm.dial(options) {
                    plan.failed(id, describe(&error), now);
                }
            }
            if plan.is_exhausted() {
                ended.push(*peer);
            }
        }
        for peer in ended {
            if let Some(plan) = self.plans.remove(&peer) {
                plan.finish(false);
            }
            self.reservations.failed(&peer, now);
        }
    }

    /// Dials peers that are reached through a relay once more. A further relayed connection is made for the sake of the hole
    /// punching that begins with it, and takes the place of the one before.
    fn advance_upgrades(&mut self, now: Instant) {
        for peer in self.upgrades.due(now) {
            let known = self.directory.get(&peer).cloned();
            match known {
                Some(known) if self.connections.best(&peer).is_some_and(|best| best.route.is_relayed()) => {
                    self.metrics.upgrade_retries.inc();
                    self.close_superseded(&peer);
                    let circuits = self.hole_punching && self.connections.relayed(&peer) < MAX_RELAYED;
                    self.plan(&known, circuits);
                }
                _ => self.upgrades.forget(&peer),
            }
        }
    }

    /// Closes relayed connections that nothing uses, if there is a direct one. Not as soon as there is a newer relayed one: both sides may
    /// make one at once, and each take that of the other for the newer.
    fn close_replaced(&mut self, peer: &PeerId) {
        if self.connections.is_direct(peer) {
            self.close_superseded(peer);
        }
    }

    /// Closes what `Connections::take_superseded` finds: the hole punching keeps such connections open, even after it has succeeded.
    fn close_superseded(&mut self, peer: &PeerId) {
        for connection in self.connections.take_superseded(peer) {
            self.swarm.close_connection(connection);
        }
    }

    fn advance_reservations(&mut self, now: Instant) {
        for relay in self.reservations.due(now) {
            let Some(known) = self.directory.get(&relay).cloned() else { continue };
            if !self.connections.is_direct(&relay) {
                self.reservations.trying(&relay, now);
                self.plan(&known, false);
                continue;
            }
            let Some(address) = known.direct().next() else { continue };
            let circuit = address.clone().with(Protocol::P2p(relay)).with(Protocol::P2pCircuit);
            match self.swarm.listen_on(circuit) {
                Ok(listener) => self.reservations.requested(&relay, listener),
                Err(error) => {
                    tracing::warn!(relay = %known.name.node, %error, "can't ask the relay for a place");
                    self.reservations.failed(&relay, now);
                }
            }
        }
    }

    fn on_event(&mut self, event: SwarmEvent<OverlayEvent>) {
        let now = Instant::now();
        match event {
            SwarmEvent::Behaviour(event) => self.on_behaviour(event),
            SwarmEvent::ConnectionEstablished { peer_id, endpoint, established_in, .. } => {
                let route = Route::of(&endpoint);
                let path = route.path(|relay| self.directory.node_of(relay));
                tracing::info!(
                    peer = %self.name_of(&peer_id), %path, outbound = endpoint.is_dialer(),
                    took = ?established_in, "connected"
                );
                self.metrics.connection(&path, 1);
                if let Some(plan) = self.plans.remove(&peer_id) {
                    plan.finish(true);
                }
                if !route.is_relayed() {
                    self.reservations.hurry(&peer_id, now);
                    self.upgrades.forget(&peer_id);
                } else if endpoint.is_dialer() {
                    self.upgrades.relayed(peer_id, now);
                }
                self.close_replaced(&peer_id);
            }
            SwarmEvent::ConnectionClosed { peer_id, endpoint, num_established, cause, .. } => {
                let path = Route::of(&endpoint).path(|relay| self.directory.node_of(relay));
                let cause = cause.map_or_else(|| "closed".into(), |cause| cause.to_string());
                tracing::info!(peer = %self.name_of(&peer_id), %path, left = num_established, cause, "disconnected");
                self.metrics.connection(&path, -1);
                if self.connections.best(&peer_id).is_some_and(|left| left.route.is_relayed()) {
                    self.upgrades.relayed(peer_id, now);
                }
            }
            SwarmEvent::OutgoingConnectionError { connection_id, peer_id: Some(peer), error } => {
                tracing::debug!(peer = %self.name_of(&peer), error = describe(&error), "dialling failed");
                if let Some(plan) = self.plans.get_mut(&peer) {
                    plan.failed(connection_id, describe(&error), now);
                }
            }
            SwarmEvent::IncomingConnectionError { send_back_addr, error, peer_id, .. } => {
                if let ListenError::Denied { cause } = &error
                    && cause.downcast_ref::<allow_block_list::NotAllowed>().is_some()
                {
                    self.metrics.strangers.inc();
                }
                tracing::debug!(from = %send_back_addr, peer = ?peer_id, %error, "refused an incoming connection");
            }
            SwarmEvent::NewListenAddr { address, .. } => {
                self.addresses.add(address);
                self.publish();
            }
            SwarmEvent::ExpiredListenAddr { address, .. } => {
                self.addresses.remove(&address);
                self.publish();
            }
            SwarmEvent::ListenerClosed { listener_id, addresses, reason } => {
                for address in &addresses {
                    self.addresses.remove(address);
                }
                self.publish();
                let reason = reason.err().map_or_else(|| "closed".into(), |error| error.to_string());
                match self.reservations.closed(listener_id, now) {
                    Some(relay) => {
                        tracing::info!(relay = %self.name_of(&relay), reason, "the place with a relay is gone");
                    }
                    None => tracing::warn!(?addresses, reason, "a listener closed"),
                }
                self.count_reservations();
            }
            SwarmEvent::ListenerError { error, .. } => tracing::debug!(%error, "a listener reported an error"),
            _ => {}
        }
    }

    fn on_behaviour(&mut self, event: OverlayEvent) {
        match event {
            OverlayEvent::Streams(inbound) => self.on_inbound(inbound),
            OverlayEvent::Liveness(ping::Event { peer, connection, result: Err(failure) }) => {
                let dead = !matches!(failure, ping::Failure::Unsupported)
                    && self.connections.get(&peer, connection).is_some_and(|c| !c.received_since_failure());
                if dead {
                    tracing::info!(peer = %self.name_of(&peer), %failure, "the connection is dead");
                    self.swarm.close_connection(connection);
                }
            }
            OverlayEvent::RelayClient(relay::client::Event::ReservationReqAccepted {
                relay_peer_id, renewal, ..
            }) => {
                self.reservations.accepted(&relay_peer_id);
                self.count_reservations();
                if !renewal {
                    tracing::info!(relay = %self.name_of(&relay_peer_id), "holding a place with a relay");
                }
            }
            OverlayEvent::Identify(identify::Event::Received { info, .. }) => {
                self.swarm.behaviour_mut().offer_observed(&info.observed_addr);
            }
            OverlayEvent::RelayServer(event) => tracing::debug!(?event, "relaying"),
            OverlayEvent::Dcutr(dcutr::Event { remote_peer_id, result }) => match result {
                Ok(_) => {
                    self.metrics.upgrades.inc();
                    tracing::info!(peer = %self.name_of(&remote_peer_id), "upgraded to a direct connection");
                }
                Err(error) => {
                    tracing::info!(peer = %self.name_of(&remote_peer_id), %error, "no direct connection: staying on the relay");
                }
            },
            _ => {}
        }
    }

    fn on_inbound(&mut self, Inbound { connection, stream }: Inbound) {
        let Some(peer) = self.directory.get(&connection.peer).map(|peer| peer.name.clone()) else { return };
        let (place, acceptor): (_, Arc<dyn Accept>) = match self.inbound_places.clone().try_acquire_owned() {
            Ok(place) => (place, self.acceptor.clone()),
            Err(_) => match self.refusal_places.clone().try_acquire_owned() {
                Ok(place) => (place, Arc::new(RefuseBusy)),
                Err(_) => return self.metrics.refused(RefusalReason::Busy.label()),
            },
        };
        let path = connection.route.path(|relay| self.directory.node_of(relay));
        let stream = TunnelStream::new(stream, connection, None, path, &self.metrics);
        let serving = accept::serve(stream, peer, acceptor, self.metrics.clone(), self.shutdown.stopping().clone());
        self.shutdown.spawn(async move {
            serving.await;
            drop(place);
        });
    }

    fn publish(&mut self) {
        if self.relay_server {
            // The relay tells its clients these addresses; without any it grants no places.
            let direct = self.addresses.direct();
            let known: Vec<Multiaddr> = self.swarm.external_addresses().cloned().collect();
            for gone in known.iter().filter(|address| !direct.contains(address)) {
                self.swarm.remove_external_address(gone);
            }
            for new in direct.into_iter().filter(|address| !known.contains(address)) {
                self.swarm.add_external_address(new);
            }
        }
        let published = self.addresses.published();
        self.published.send_if_modified(|current| {
            let changed = *current != published;
            if changed {
                *current = published;
            }
            changed
        });
    }

    fn count_reservations(&self) {
        self.metrics.reservations.set(i64::try_from(self.reservations.held()).unwrap_or(i64::MAX));
    }

    fn name_of(&self, peer: &PeerId) -> String {
        self.directory.get(peer).map_or_else(|| peer.to_string(), |peer| peer.name.to_string())
    }
}

/// A dial error in one line: the addresses and what each said.
fn describe(error: &DialError) -> String {
    match error {
        DialError::Transport(failures) => {
            let all: Vec<String> =
                failures.iter().map(|(address, error)| format!("{address}: {}", root_cause(error))).collect();
            all.join(", ")
        }
        error => error.to_string(),
    }
}

fn root_cause(error: &dyn std::error::Error) -> String {
    let mut deepest = error;
    while let Some(source) = deepest.source() {
        deepest = source;
    }
    deepest.to_string()
}
