//! The swarm behaviour of the tunnel's own protocol: it keeps the table of connections, opens streams on the connection
//! that the caller chose, and hands inbound streams over.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    task::{Context, Poll},
};

use libp2p::{
    Multiaddr, PeerId, Stream, StreamProtocol,
    core::{Endpoint, transport::PortUse, upgrade::ReadyUpgrade},
    swarm::{
        ConnectionDenied, ConnectionHandler, ConnectionHandlerEvent, ConnectionId, FromSwarm, NetworkBehaviour,
        StreamUpgradeError, SubstreamProtocol, THandler, THandlerInEvent, THandlerOutEvent, ToSwarm,
        behaviour::ConnectionEstablished,
        handler::{ConnectionEvent, DialUpgradeError, FullyNegotiatedInbound, FullyNegotiatedOutbound},
    },
};
use tokio::sync::mpsc;

use crate::connections::{Connection, Connections, OpenRequest, Route};

const PROTOCOL: StreamProtocol = StreamProtocol::new("/edgemesh/tunnel/1");
/// Requests that may wait at one connection; further openers wait for a place.
const OPEN_QUEUE: usize = 256;

/// A stream that a peer opened.
#[derive(Debug)]
pub(crate) struct Inbound {
    pub(crate) connection: Arc<Connection>,
    pub(crate) stream: Stream,
}

/// The behaviour.
pub(crate) struct Streams {
    connections: Connections,
    /// Connections whose handlers exist but that no event has confirmed yet: another behaviour may still deny them.
    unconfirmed: HashMap<ConnectionId, mpsc::Sender<OpenRequest>>,
    inbound: VecDeque<Inbound>,
}

impl Streams {
    pub(crate) fn new(connections: Connections) -> Self {
        Self { connections, unconfirmed: HashMap::new(), inbound: VecDeque::new() }
    }

    fn handler(&mut self, id: ConnectionId) -> Handler {
        let (opener, requests) = mpsc::channel(OPEN_QUEUE);
        self.unconfirmed.insert(id, opener);
        Handler { requests, inbound: VecDeque::new() }
    }
}

impl NetworkBehaviour for Streams {
    type ConnectionHandler = Handler;
    type ToSwarm = Inbound;

    fn handle_established_inbound_connection(
        &mut self,
        id: ConnectionId,
        _: PeerId,
        _: &Multiaddr,
        _: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(self.handler(id))
    }

    fn handle_established_outbound_connection(
        &mut self,
        id: ConnectionId,
        _: PeerId,
        _: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(self.handler(id))
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        match event {
            FromSwarm::ConnectionEstablished(ConnectionEstablished { peer_id, connection_id, endpoint, .. }) => {
                if let Some(opener) = self.unconfirmed.remove(&connection_id) {
                    let route = Route::of(endpoint);
                    self.connections.add(Arc::new(Connection::new(connection_id, peer_id, route, opener)));
                }
            }
            FromSwarm::ConnectionClosed(closed) => {
                self.connections.remove(&closed.peer_id, closed.connection_id);
            }
            FromSwarm::DialFailure(failure) => {
                self.unconfirmed.remove(&failure.connection_id);
            }
            FromSwarm::ListenFailure(failure) => {
                self.unconfirmed.remove(&failure.connection_id);
            }
            _ => {}
        }
    }

    fn on_connection_handler_event(&mut self, peer: PeerId, id: ConnectionId, stream: THandlerOutEvent<Self>) {
        if let Some(connection) = self.connections.get(&peer, id) {
            self.inbound.push_back(Inbound { connection, stream });
        }
    }

    fn poll(&mut self, _: &mut Context<'_>) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        match self.inbound.pop_front() {
            Some(inbound) => Poll::Ready(ToSwarm::GenerateEvent(inbound)),
            None => Poll::Pending,
        }
    }
}

/// The handler of one connection.
pub(crate) struct Handler {
    requests: mpsc::Receiver<OpenRequest>,
    inbound: VecDeque<Stream>,
}

impl ConnectionHandler for Handler {
    type FromBehaviour = std::convert::Infallible;
    type ToBehaviour = Stream;
    type InboundProtocol = ReadyUpgrade<StreamProtocol>;
    type OutboundProtocol = ReadyUpgrade<StreamProtocol>;
    type InboundOpenInfo = ();
    type OutboundOpenInfo = OpenRequest;

    fn listen_protocol(&self) -> SubstreamProtocol<Self::InboundProtocol> {
        SubstreamProtocol::new(ReadyUpgrade::new(PROTOCOL), ())
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<ConnectionHandlerEvent<Self::OutboundProtocol, Self::OutboundOpenInfo, Self::ToBehaviour>> {
        if let Some(stream) = self.inbound.pop_front() {
            return Poll::Ready(ConnectionHandlerEvent::NotifyBehaviour(stream));
        }
        while let Poll::Ready(Some(request)) = self.requests.poll_recv(cx) {
            if request.is_closed() {
                continue;
            }
            return Poll::Ready(ConnectionHandlerEvent::OutboundSubstreamRequest {
                protocol: SubstreamProtocol::new(ReadyUpgrade::new(PROTOCOL), request),
            });
        }
        Poll::Pending
    }

    fn on_behaviour_event(&mut self, event: Self::FromBehaviour) {
        match event {}
    }

    fn on_connection_event(
        &mut self,
        event: ConnectionEvent<'_, Self::InboundProtocol, Self::OutboundProtocol, (), Self::OutboundOpenInfo>,
    ) {
        match event {
            ConnectionEvent::FullyNegotiatedInbound(FullyNegotiatedInbound { protocol, .. }) => {
                self.inbound.push_back(protocol);
            }
            ConnectionEvent::FullyNegotiatedOutbound(FullyNegotiatedOutbound { protocol, info }) => {
                // The caller may have given up meanwhile; then the stream is dropped here.
                let _ = info.send(Ok(protocol));
            }
            ConnectionEvent::DialUpgradeError(DialUpgradeError { info, error }) => {
                let _ = info.send(Err(match error {
                    StreamUpgradeError::Timeout => "opening the stream timed out".into(),
                    StreamUpgradeError::NegotiationFailed => "the peer doesn't speak this protocol".into(),
                    StreamUpgradeError::Io(error) => error.to_string(),
                    StreamUpgradeError::Apply(never) => match never {},
                }));
            }
            _ => {}
        }
    }
}
