//! Pings where the transport doesn't notice a dead path by itself: TCP and relayed connections. QUIC has its own
//! keep-alive and idle timeout, and pinging it too would only cost metered links.

use std::{
    task::{Context, Poll},
    time::Duration,
};

use libp2p::{
    Multiaddr, PeerId,
    core::{Endpoint, transport::PortUse},
    ping,
    swarm::{
        ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, THandler, THandlerInEvent, THandlerOutEvent,
        ToSwarm, derive_prelude::Either, dummy,
    },
};

use crate::connections::Route;

/// Time between pings.
const INTERVAL: Duration = Duration::from_secs(4);
/// Time for an answer. The ping behaviour reports the second failure in a row, so a dead path is found within 14 s.
const TIMEOUT: Duration = Duration::from_secs(3);

/// The behaviour; a failed ping is its event, and the owner closes the connection.
pub(crate) struct Liveness {
    ping: ping::Behaviour,
}

impl Default for Liveness {
    fn default() -> Self {
        Self { ping: ping::Behaviour::new(ping::Config::new().with_interval(INTERVAL).with_timeout(TIMEOUT)) }
    }
}

type PingHandler = THandler<ping::Behaviour>;

impl NetworkBehaviour for Liveness {
    type ConnectionHandler = Either<PingHandler, dummy::ConnectionHandler>;
    type ToSwarm = ping::Event;

    fn handle_established_inbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        match Route::of_address(local) {
            Route::Quic => Ok(Either::Right(dummy::ConnectionHandler)),
            _ => self.ping.handle_established_inbound_connection(id, peer, local, remote).map(Either::Left),
        }
    }

    fn handle_established_outbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        address: &Multiaddr,
        role: Endpoint,
        port: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        match Route::of_address(address) {
            Route::Quic => Ok(Either::Right(dummy::ConnectionHandler)),
            _ => self.ping.handle_established_outbound_connection(id, peer, address, role, port).map(Either::Left),
        }
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        self.ping.on_swarm_event(event);
    }

    fn on_connection_handler_event(&mut self, peer: PeerId, id: ConnectionId, event: THandlerOutEvent<Self>) {
        match event {
            Either::Left(event) => self.ping.on_connection_handler_event(peer, id, event),
            Either::Right(never) => match never {},
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        self.ping.poll(cx).map(|action| action.map_in(Either::Left))
    }
}
