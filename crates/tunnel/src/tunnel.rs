//! The handle of a running tunnel.

use std::{sync::Arc, time::Duration};

use edgemesh_telemetry::Shutdown;
use libp2p::PeerId;
use parking_lot::RwLock;
use prometheus_client::registry::Registry;
use tokio::{
    io::AsyncWriteExt as _,
    sync::{mpsc, oneshot, watch},
    time::{Instant, timeout_at},
};

use crate::{
    accept::Accept,
    behaviour,
    config::TunnelConfig,
    connections::{Connection, Connections, Place},
    directory::{CurrentDirectory, Directory},
    error::{StartError, TunnelError},
    identity,
    metrics::Metrics,
    owner::{Command, Owner, OwnerParts},
    peer::{Path, TunnelPeer},
    stream::TunnelStream,
    wire::{self, StreamHeader},
};

/// Commands that may wait for the owner.
const COMMAND_QUEUE: usize = 1024;
/// How often `open` starts over when the connection that it used broke.
const ATTEMPTS: usize = 4;

/// A running tunnel endpoint. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Tunnel {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    peer_id: PeerId,
    commands: mpsc::Sender<Command>,
    directory: CurrentDirectory,
    directories: watch::Sender<Arc<Directory>>,
    published: watch::Receiver<Vec<String>>,
    connections: Connections,
    metrics: Metrics,
    open_deadline: Duration,
}

impl Tunnel {
    /// Loads or makes the identity, listens, and starts the task that owns the connections. Needs a Tokio runtime. The
    /// tunnel ends with `shutdown`: it stops accepting at once, and stays until its last stream is gone
    /// for a second.
    ///
    /// # Errors
    /// When the identity or an address can't be used.
    pub fn start(
        config: &TunnelConfig,
        acceptor: Arc<dyn Accept>,
        registry: &RwLock<Registry>,
        shutdown: &Shutdown,
    ) -> Result<Self, StartError> {
        let key = identity::load_or_create(&config.identity_file)
            .map_err(|source| StartError::Identity { path: config.identity_file.clone(), source })?;
        let peer_id = key.public().to_peer_id();
        let connections = Connections::default();
        let swarm = behaviour::swarm(key, config, connections.clone())?;
        let metrics = Metrics::register(&mut registry.write());
        let (commands, command_receiver) = mpsc::channel(COMMAND_QUEUE);
        let (directories, directory_receiver) = watch::channel(Arc::default());
        let (publisher, published) = watch::channel(Vec::new());
        let owner = Owner::new(
            config,
            OwnerParts {
                swarm,
                commands: command_receiver,
                directories: directory_receiver,
                connections: connections.clone(),
                published: publisher,
                acceptor,
                metrics: metrics.clone(),
                shutdown: shutdown.clone(),
            },
        )?;
        tracing::info!(%peer_id, node = %config.node, component = %config.component, relay = config.relay_server, "tunnel started");
        shutdown.spawn(owner.run());
        Ok(Self {
            shared: Arc::new(Shared {
                peer_id,
                commands,
                directory: CurrentDirectory::default(),
                directories,
                published,
                connections,
                metrics,
                open_deadline: config.open_deadline,
            }),
        })
    }

    /// This endpoint's PeerId.
    pub fn peer_id(&self) -> PeerId {
        self.shared.peer_id
    }

    /// The addresses to publish in the node's MeshNode, without the `/p2p/` suffix; they change as interfaces and relays do.
    pub fn addresses(&self) -> watch::Receiver<Vec<String>> {
        self.shared.published.clone()
    }

    /// Replaces the known peers: who may connect, where they are, and which of them relay. Connections of peers that are no
    /// longer known are closed.
    pub fn set_peers(&self, peers: &[TunnelPeer]) {
        let directory = self.shared.directory.store(Directory::new(peers, &self.shared.peer_id));
        self.shared.directories.send_replace(directory);
    }

    /// Opens a stream to `header.endpoint` on `node`, making a connection if there is none. When it returns, the other side
    /// has connected to the endpoint.
    ///
    /// # Errors
    /// See [`TunnelError`]; nothing has reached the endpoint's application, so another endpoint can be tried.
    pub async fn open(&self, node: &str, header: &StreamHeader) -> Result<TunnelStream, TunnelError> {
        let opened = self.try_open(node, header).await;
        match &opened {
            Ok(stream) => self.shared.metrics.opened(stream.path()),
            Err(error) => self.shared.metrics.open_failed(error.label()),
        }
        opened
    }

    /// How streams to `node` go at the moment.
    pub fn path(&self, node: &str) -> Path {
        let directory = self.shared.directory.load();
        directory
            .agent_of(node)
            .and_then(|peer| self.shared.connections.best(&peer))
            .map_or(Path::None, |connection| connection.route.path(|relay| directory.node_of(relay)))
    }

    async fn try_open(&self, node: &str, header: &StreamHeader) -> Result<TunnelStream, TunnelError> {
        let deadline = Instant::now() + self.shared.open_deadline;
        let frame = header.encode().map_err(TunnelError::HeaderTooLong)?;
        let peer = self
            .shared
            .directory
            .load()
            .agent_of(node)
            .ok_or_else(|| TunnelError::UnknownNode { node: node.to_owned() })?;
        let mut lost = None;
        for _ in 0..ATTEMPTS {
            let Some(connection) = self.shared.connections.best(&peer) else {
                self.connect(node, peer, deadline).await?;
                continue;
            };
            let Some(place) = connection.place(header.protocol) else {
                return Err(TunnelError::Busy { node: node.to_owned() });
            };
            match self.open_on(node, connection, place, &frame, deadline).await {
                Err(error @ TunnelError::Lost { .. }) => lost = Some(error),
                result => return result,
            }
        }
        Err(lost.unwrap_or_else(|| TunnelError::Unreachable {
            node: node.to_owned(),
            detail: "its connections break as soon as they are made".into(),
        }))
    }

    async fn connect(&self, node: &str, peer: PeerId, deadline: Instant) -> Result<(), TunnelError> {
        let (connected, answer) = oneshot::channel();
        let request = async {
            self.shared.commands.send(Command::Connect(peer, connected)).await.map_err(|_| TunnelError::Stopped)?;
            answer
                .await
                .map_err(|_| TunnelError::Stopped)?
                .map_err(|detail| TunnelError::Unreachable { node: node.to_owned(), detail })
        };
        timeout_at(deadline, request)
            .await
            .map_err(|_| TunnelError::Timeout { node: node.to_owned(), step: "connecting" })?
    }

    async fn open_on(
        &self,
        node: &str,
        connection: Arc<Connection>,
        place: Place,
        frame: &[u8],
        deadline: Instant,
    ) -> Result<TunnelStream, TunnelError> {
        let lost = |source| TunnelError::Lost { node: node.to_owned(), source };
        let directory = self.shared.directory.load();
        let path = connection.route.path(|relay| directory.node_of(relay));
        let handshake = async {
            let (request, opened) = oneshot::channel();
            let gone = || lost(std::io::ErrorKind::ConnectionReset.into());
            connection.opener.send(request).await.map_err(|_| gone())?;
            let stream = opened.await.map_err(|_| gone())?.map_err(|error| lost(std::io::Error::other(error)))?;
            let mut stream = TunnelStream::new(stream, connection.clone(), Some(place), path, &self.shared.metrics);
            stream.write_all(frame).await.map_err(lost)?;
            stream.flush().await.map_err(lost)?;
            match wire::read_answer(&mut stream).await.map_err(lost)? {
                Ok(in_blocks) => {
                    if in_blocks {
                        stream.begin_blocks();
                    }
                    Ok(stream)
                }
                Err(refusal) => Err(TunnelError::Refused { node: node.to_owned(), refusal }),
            }
        };
        timeout_at(deadline, handshake)
            .await
            .map_err(|_| TunnelError::Timeout { node: node.to_owned(), step: "opening a stream" })?
    }
}
