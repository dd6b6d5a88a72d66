//! DNS over TLS (RFC 7858): one connection for each server, shared by all who ask, closed when it is idle.

use std::{
    collections::HashMap,
    fs,
    io::{self, ErrorKind},
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::Duration,
};

use bytes::{Buf, BytesMut};
use edgemesh_telemetry::Shutdown;
use parking_lot::Mutex;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::{mpsc, oneshot},
    time::{Instant, sleep_until, timeout},
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{metrics::Metrics, upstream::belongs};

/// Deadline of the TCP and TLS handshakes together.
const CONNECT_DEADLINE: Duration = Duration::from_secs(3);
/// Deadline of writing a query.
const WRITE_DEADLINE: Duration = Duration::from_secs(2);
/// A connection over which nothing is asked for this long is closed.
const IDLE: Duration = Duration::from_secs(10);
/// A connection over which nothing comes for this long, though there are questions, is given up.
const NO_ANSWER: Duration = Duration::from_secs(5);
/// Questions of one connection at one time.
const MAX_PENDING: usize = 64;
/// Largest file of CA certificates.
const MAX_CA_BYTES: u64 = 4 << 20;

/// What makes TLS connections that trust the CAs of a PEM file.
///
/// # Errors
/// When the file can't be read or holds no certificate.
pub(super) fn connector(ca: &Path) -> io::Result<TlsConnector> {
    let size = fs::metadata(ca)?.len();
    if size > MAX_CA_BYTES {
        return Err(io::Error::other(format!("{size} bytes, the limit is {MAX_CA_BYTES}")));
    }
    let mut roots = RootCertStore::empty();
    // A bundle of many may hold one that can't be read; it is just not trusted.
    roots.add_parsable_certificates(CertificateDer::pem_slice_iter(&fs::read(ca)?).flatten());
    if roots.is_empty() {
        return Err(io::Error::new(ErrorKind::InvalidData, "no certificate in it"));
    }
    let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

/// One question, and where its answer goes. Who asked can give up by dropping the other end.
struct Exchange {
    message: Vec<u8>,
    answer: oneshot::Sender<io::Result<Vec<u8>>>,
}

/// A server that is asked over TLS.
pub(super) struct DotServer {
    address: SocketAddr,
    name: ServerName<'static>,
    connector: TlsConnector,
    metrics: Arc<Metrics>,
    shutdown: Shutdown,
    /// The way into the connection in use.
    current: Mutex<Option<mpsc::Sender<Exchange>>>,
}

impl std::fmt::Debug for DotServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DotServer").field("address", &self.address).field("name", &self.name).finish_non_exhaustive()
    }
}

impl DotServer {
    pub(super) fn new(
        address: SocketAddr,
        name: ServerName<'static>,
        connector: TlsConnector,
        metrics: Arc<Metrics>,
        shutdown: Shutdown,
    ) -> Self {
        Self { address, name, connector, metrics, shutdown, current: Mutex::default() }
    }

    /// Sends a message and waits for its answer, as long as the caller lets it.
    pub(super) async fn exchange(&self, message: &[u8]) -> io::Result<Vec<u8>> {
        // A server may close a connection just as a question comes: that is asked once more, on a new one (RFC 7766, section 6.2.4).
        for _ in 0..2 {
            let (answer, answered) = oneshot::channel();
            let exchange = Exchange { message: message.to_vec(), answer };
            if self.connection().send(exchange).await.is_err() {
                continue;
            }
            if let Ok(result) = answered.await {
                return result;
            }
        }
        Err(io::Error::new(ErrorKind::ConnectionReset, "closed without an answer"))
    }

    /// Lets the next question open a new connection: this one may be cut. What is under way on it may still end.
    pub(super) fn renew(&self) {
        *self.current.lock() = None;
    }

    fn connection(&self) -> mpsc::Sender<Exchange> {
        let mut current = self.current.lock();
        if let Some(sender) = current.as_ref().filter(|sender| !sender.is_closed()) {
            return sender.clone();
        }
        let (sender, queue) = mpsc::channel(MAX_PENDING);
        *current = Some(sender.clone());
        self.metrics.tls_connections.inc();
        let (connector, name, address) = (self.connector.clone(), self.name.clone(), self.address);
        let shutdown = self.shutdown.clone();
        self.shutdown.spawn(async move {
            let connection = Connection { queue, pending: HashMap::new(), next_id: rand::random() };
            let run = connection.run(connector, name, address);
            shutdown.stopping().run_until_cancelled(run).await;
        });
        sender
    }
}

/// A question that was sent.
struct Waiting {
    /// As it was sent, with the connection's own id.
    sent: Vec<u8>,
    /// The id that the caller chose.
    id: [u8; 2],
    answer: oneshot::Sender<io::Result<Vec<u8>>>,
}

/// A connection and the questions on it; owned by its task. Questions that are dropped unanswered are asked anew by their callers.
struct Connection {
    queue: mpsc::Receiver<Exchange>,
    pending: HashMap<u16, Waiting>,
    next_id: u16,
}

impl Connection {
    async fn run(mut self, connector: TlsConnector, name: ServerName<'static>, address: SocketAddr) {
        let connecting = async {
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            connector.connect(name, stream).await
        };
        let stream = match timeout(CONNECT_DEADLINE, connecting).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return self.fail(&error),
            Err(_) => return self.fail(&io::Error::new(ErrorKind::TimedOut, "no connection within 3 s")),
        };
        self.serve(stream).await;
    }

    /// All who asked so far learn why it didn't come to a connection.
    fn fail(&mut self, error: &io::Error) {
        self.queue.close();
        while let Ok(exchange) = self.queue.try_recv() {
            // Whoever gave up meanwhile needs no answer.
            drop(exchange.answer.send(Err(io::Error::new(error.kind(), error.to_string()))));
        }
    }

    async fn serve(&mut self, stream: TlsStream<TcpStream>) {
        let (mut reading, mut writing) = tokio::io::split(stream);
        let mut incoming = BytesMut::with_capacity(1024);
        let (mut quiet_since, mut wanted) = (Instant::now(), true);
        while wanted || !self.pending.is_empty() {
            let limit = if self.pending.is_empty() { IDLE } else { NO_ANSWER };
            tokio::select! {
                exchange = self.queue.recv(), if wanted && self.pending.len() < MAX_PENDING => {
                    let Some(exchange) = exchange else { wanted = false; continue };
                    if self.pending.is_empty() {
                        quiet_since = Instant::now();
                    }
                    let framed = self.prepare(exchange);
                    let write = async {
                        writing.write_all(&framed).await?;
                        writing.flush().await
                    };
                    if !matches!(timeout(WRITE_DEADLINE, write).await, Ok(Ok(()))) {
                        return;
                    }
                }
                read = reading.read_buf(&mut incoming) => {
                    if !matches!(read, Ok(1..)) {
                        return;
                    }
                    quiet_since = Instant::now();
                    while let Some(answer) = take_frame(&mut incoming) {
                        self.answered(answer);
                    }
                }
                () = sleep_until(quiet_since + limit) => return,
            }
        }
    }

    /// Gives a question an id that no other has, and notes it.
    fn prepare(&mut self, exchange: Exchange) -> Vec<u8> {
        self.pending.retain(|_, waiting| !waiting.answer.is_closed());
        while self.pending.contains_key(&self.next_id) {
            self.next_id = self.next_id.wrapping_add(1);
        }
        let (number, mut sent) = (self.next_id, exchange.message);
        // Ids needn't be secret here: nobody else can write to the connection.
        self.next_id = self.next_id.wrapping_add(1);
        let id = [sent[0], sent[1]];
        sent[..2].copy_from_slice(&number.to_be_bytes());
        let framed = [&(sent.len() as u16).to_be_bytes(), &sent[..]].concat();
        self.pending.insert(number, Waiting { sent, id, answer: exchange.answer });
        framed
    }

    fn answered(&mut self, mut answer: Vec<u8>) {
        let Some(number) = answer.first_chunk().map(|id| u16::from_be_bytes(*id)) else { return };
        let Some(waiting) = self.pending.remove(&number) else { return };
        if !belongs(&answer, &waiting.sent) {
            // Not its answer; there won't be another with its number.
            let error = io::Error::new(ErrorKind::InvalidData, "an answer to another question");
            return drop(waiting.answer.send(Err(error)));
        }
        answer[..2].copy_from_slice(&waiting.id);
        drop(waiting.answer.send(Ok(answer)));
    }
}

/// The next whole message, after its length (RFC 1035, section 4.2.2).
fn take_frame(incoming: &mut BytesMut) -> Option<Vec<u8>> {
    let length = usize::from(u16::from_be_bytes(*incoming.first_chunk()?));
    let frame = incoming.get(2..2 + length)?.to_vec();
    incoming.advance(2 + length);
    Some(frame)
}
