//! UDP flows: one for each client address and Service port, with an idle limit, a limit of their number, and a bounded
//! queue each. What a flow's remote end is (a socket, a tunnel stream) is the caller's business.

use std::{
    collections::HashMap,
    hash::Hash,
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Takes datagrams.
pub trait DatagramSink: Send {
    /// Sends one; waits while the other side can't take it.
    fn send<'a>(&'a mut self, datagram: &'a [u8]) -> BoxFuture<'a, io::Result<()>>;
}

/// Gives datagrams.
pub trait DatagramSource: Send {
    /// The next one, or `None` when the flow has ended. Must be cancel safe.
    fn recv(&mut self) -> BoxFuture<'_, io::Result<Option<Bytes>>>;
}

/// One end of a flow.
pub struct FlowEnd {
    /// Towards that end.
    pub sink: Box<dyn DatagramSink>,
    /// From that end.
    pub source: Box<dyn DatagramSource>,
}

/// Limits of a flow table.
#[derive(Debug, Clone, Copy)]
pub struct FlowLimits {
    /// Most flows at a time; datagrams that would begin another are dropped.
    pub flows: usize,
    /// Datagrams that may wait in one flow; more are dropped, as a full socket buffer would.
    pub queue: usize,
    /// A flow without datagrams in either direction ends after this time.
    pub idle: Duration,
    /// Time to open a flow's remote end.
    pub open: Duration,
}

impl Default for FlowLimits {
    fn default() -> Self {
        Self { flows: 4096, queue: 64, idle: Duration::from_secs(60), open: Duration::from_secs(15) }
    }
}

/// What became of a client's datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// It belongs to a flow that was there.
    Queued,
    /// It began a flow.
    Began,
    /// Its flow's queue is full.
    QueueFull,
    /// There are too many flows.
    TableFull,
}

/// Why a flow ended.
#[derive(Debug)]
pub enum FlowEnded {
    /// Nothing moved for the idle time.
    Idle,
    /// One end closed.
    Closed,
    /// The remote end could not be opened.
    NotOpened(io::Error),
    /// An end failed.
    Failed(io::Error),
    /// The table was closed.
    Stopped,
}

/// The flows of one listener, by key: the client's address and whatever tells the Service.
#[derive(Debug)]
pub struct FlowTable<K> {
    limits: FlowLimits,
    shared: Arc<Flows<K>>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

#[derive(Debug)]
struct Flows<K> {
    by_key: Mutex<HashMap<K, (u64, mpsc::Sender<Bytes>)>>,
    next: AtomicU64,
}

impl<K: Clone + Eq + Hash + Send + 'static> FlowTable<K> {
    /// An empty table.
    pub fn new(limits: FlowLimits) -> Self {
        let shared = Flows { by_key: Mutex::default(), next: AtomicU64::new(0) };
        Self { limits, shared: Arc::new(shared), tasks: TaskTracker::new(), stop: CancellationToken::new() }
    }

    /// How many flows there are.
    pub fn len(&self) -> usize {
        self.shared.by_key.lock().len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Hands a client's datagram to its flow. If it has none, one begins: `open` gives its remote end, `client` takes the
    /// replies, and `ended` hears how it ended. Never waits.
    pub fn deliver<Open, Opening, Ended>(
        &self,
        key: K,
        datagram: Bytes,
        client: impl FnOnce() -> Box<dyn DatagramSink>,
        open: Open,
        ended: Ended,
    ) -> Delivery
    where
        Open: FnOnce() -> Opening,
        Opening: Future<Output = io::Result<FlowEnd>> + Send + 'static,
        Ended: FnOnce(FlowEnded) + Send + 'static,
    {
        let mut flows = self.shared.by_key.lock();
        let datagram = match flows.get(&key) {
            None => datagram,
            Some((_, queue)) => match queue.try_send(datagram) {
                Ok(()) => return Delivery::Queued,
                Err(mpsc::error::TrySendError::Full(_)) => return Delivery::QueueFull,
                // The flow is just ending; this datagram begins the next one.
                Err(mpsc::error::TrySendError::Closed(datagram)) => datagram,
            },
        };
        if flows.len() >= self.limits.flows && !flows.contains_key(&key) {
            return Delivery::TableFull;
        }
        let (queue, datagrams) = mpsc::channel(self.limits.queue.max(1));
        // The queue is empty and has room for one.
        let _ = queue.try_send(datagram);
        let id = self.shared.next.fetch_add(1, Ordering::Relaxed);
        flows.insert(key.clone(), (id, queue));
        drop(flows);

        let place = Place { key, id, flows: self.shared.clone() };
        let (opening, client, limits, stop) = (open(), client(), self.limits, self.stop.clone());
        self.tasks.spawn(async move {
            let end = tokio::select! {
                end = run(opening, client, datagrams, limits) => end,
                () = stop.cancelled() => FlowEnded::Stopped,
            };
            drop(place);
            ended(end);
        });
        Delivery::Began
    }

    /// Ends all flows and waits for them.
    pub async fn close(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

impl<K> Drop for FlowTable<K> {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// A flow's entry in the table; leaves it when the flow ends, however that happens.
struct Place<K: Eq + Hash> {
    key: K,
    id: u64,
    flows: Arc<Flows<K>>,
}

impl<K: Eq + Hash> Drop for Place<K> {
    fn drop(&mut self) {
        let mut flows = self.flows.by_key.lock();
        // A newer flow of the same key may have taken the place.
        if flows.get(&self.key).is_some_and(|(id, _)| *id == self.id) {
            flows.remove(&self.key);
        }
    }
}

async fn run(
    opening: impl Future<Output = io::Result<FlowEnd>>,
    client: Box<dyn DatagramSink>,
    datagrams: mpsc::Receiver<Bytes>,
    limits: FlowLimits,
) -> FlowEnded {
    let remote = match timeout(limits.open, opening).await {
        Ok(Ok(remote)) => remote,
        Ok(Err(error)) => return FlowEnded::NotOpened(error),
        Err(_) => return FlowEnded::NotOpened(io::ErrorKind::TimedOut.into()),
    };
    pump(FlowEnd { sink: client, source: Box::new(Queue(datagrams)) }, remote, limits.idle).await
}

struct Queue(mpsc::Receiver<Bytes>);

impl DatagramSource for Queue {
    fn recv(&mut self) -> BoxFuture<'_, io::Result<Option<Bytes>>> {
        Box::pin(async { Ok(self.0.recv().await) })
    }
}

/// Carries datagrams between two ends until one ends, or nothing moves for the idle time.
pub async fn pump(near: FlowEnd, far: FlowEnd, idle: Duration) -> FlowEnded {
    let begin = Instant::now();
    // Milliseconds since the beginning.
    let last = AtomicU64::new(0);
    let moved = || last.store(elapsed(begin), Ordering::Relaxed);
    let (mut near, mut far) = (near, far);
    // Each direction runs by itself: one that waits must not stop the other.
    let forward = carry(near.source.as_mut(), far.sink.as_mut(), &moved);
    let backward = carry(far.source.as_mut(), near.sink.as_mut(), &moved);
    let quiet = async {
        loop {
            let until = begin + Duration::from_millis(last.load(Ordering::Relaxed)) + idle;
            if Instant::now() >= until {
                return;
            }
            sleep_until(until).await;
        }
    };
    let result = tokio::select! {
        result = forward => result,
        result = backward => result,
        () = quiet => return FlowEnded::Idle,
    };
    match result {
        Ok(()) => FlowEnded::Closed,
        Err(error) => FlowEnded::Failed(error),
    }
}

async fn carry(from: &mut dyn DatagramSource, to: &mut dyn DatagramSink, moved: &(dyn Fn() + Sync)) -> io::Result<()> {
    while let Some(datagram) = from.recv().await? {
        moved();
        to.send(&datagram).await?;
    }
    Ok(())
}

fn elapsed(begin: Instant) -> u64 {
    u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// A connected socket as one end of a flow.
pub mod socket {
    use std::{cell::RefCell, io, sync::Arc};

    use bytes::Bytes;
    use futures::future::BoxFuture;
    use tokio::net::UdpSocket;

    use super::{DatagramSink, DatagramSource, FlowEnd};

    /// Longest datagram over IPv4 and IPv6 without jumbograms.
    const MAX_DATAGRAM: usize = 65_535;

    thread_local! {
        /// Flows are many and datagrams short: room for the longest is shared, and each datagram gets what it needs.
        static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; MAX_DATAGRAM]);
    }

    struct Half(Arc<UdpSocket>);

    /// Both halves of a connected socket.
    pub fn flow_end(socket: UdpSocket) -> FlowEnd {
        let socket = Arc::new(socket);
        FlowEnd { sink: Box::new(Half(socket.clone())), source: Box::new(Half(socket)) }
    }

    /// Receives with a function that fills a buffer, and copies what arrived.
    ///
    /// # Errors
    /// Those of the function.
    pub fn receive_whole<T>(receive: impl FnOnce(&mut [u8]) -> io::Result<(usize, T)>) -> io::Result<(Bytes, T)> {
        SCRATCH.with_borrow_mut(|scratch| {
            let (length, rest) = receive(scratch)?;
            Ok((Bytes::copy_from_slice(scratch.get(..length).unwrap_or_default()), rest))
        })
    }

    impl DatagramSink for Half {
        fn send<'a>(&'a mut self, datagram: &'a [u8]) -> BoxFuture<'a, io::Result<()>> {
            Box::pin(async move { self.0.send(datagram).await.map(|_| ()) })
        }
    }

    impl DatagramSource for Half {
        fn recv(&mut self) -> BoxFuture<'_, io::Result<Option<Bytes>>> {
            Box::pin(async move {
                loop {
                    self.0.readable().await?;
                    match receive_whole(|buffer| Ok((self.0.try_recv(buffer)?, ()))) {
                        Ok((datagram, ())) => return Ok(Some(datagram)),
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                        Err(error) => return Err(error),
                    }
                }
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::{net::UdpSocket, sync::oneshot};

    use super::*;

    /// A client that keeps what it gets.
    struct Client(mpsc::Sender<Bytes>);

    impl DatagramSink for Client {
        fn send<'a>(&'a mut self, datagram: &'a [u8]) -> BoxFuture<'a, io::Result<()>> {
            Box::pin(async move {
                self.0.send(Bytes::copy_from_slice(datagram)).await.map_err(|_| io::ErrorKind::BrokenPipe.into())
            })
        }
    }

    async fn echo() -> std::net::SocketAddr {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        tokio::spawn(async move {
            let mut buffer = vec![0; 65_536];
            while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
                let _ = socket.send_to(&buffer[..length], from).await;
            }
        });
        address
    }

    async fn open(to: std::net::SocketAddr) -> io::Result<FlowEnd> {
        let socket = UdpSocket::bind("127.0.0.1:0").await?;
        socket.connect(to).await?;
        Ok(socket::flow_end(socket))
    }

    #[tokio::test]
    async fn datagrams_of_a_client_share_a_flow_and_come_back_whole() {
        let table = FlowTable::new(FlowLimits::default());
        let server = echo().await;
        let (client, mut replies) = mpsc::channel(8);
        for (size, delivery) in [(65_507, Delivery::Began), (0, Delivery::Queued), (4097, Delivery::Queued)] {
            let sink = client.clone();
            let sent = Bytes::from(vec![7; size]);
            let outcome = table.deliver(1, sent.clone(), || Box::new(Client(sink)), || open(server), |_| {});
            assert_eq!(outcome, delivery);
            assert_eq!(replies.recv().await.unwrap(), sent);
        }
        assert_eq!(table.len(), 1);
        table.close().await;
        assert!(table.is_empty());
    }

    #[tokio::test]
    async fn a_flow_leaves_the_table_after_its_idle_time() {
        let limits = FlowLimits { idle: Duration::from_millis(50), ..FlowLimits::default() };
        let table = FlowTable::new(limits);
        let server = echo().await;
        let (client, _replies) = mpsc::channel(8);
        let (tell, ended) = oneshot::channel();
        table.deliver(
            1,
            Bytes::from_static(b"x"),
            || Box::new(Client(client)),
            || open(server),
            |end| {
                let _ = tell.send(end);
            },
        );
        assert!(matches!(ended.await.unwrap(), FlowEnded::Idle));
        assert!(table.is_empty());
    }

    #[tokio::test]
    async fn a_full_table_drops_new_flows_and_keeps_the_old() {
        let table = FlowTable::new(FlowLimits { flows: 2, ..FlowLimits::default() });
        let server = echo().await;
        let (client, _replies) = mpsc::channel(8);
        let deliver = |key| {
            let sink = client.clone();
            table.deliver(key, Bytes::from_static(b"x"), || Box::new(Client(sink)), || open(server), |_| {})
        };
        assert_eq!(
            [deliver(1), deliver(2), deliver(3), deliver(1)],
            [Delivery::Began, Delivery::Began, Delivery::TableFull, Delivery::Queued]
        );
    }

    #[tokio::test]
    async fn a_flow_that_cannot_be_opened_leaves_no_trace() {
        let table = FlowTable::new(FlowLimits { queue: 1, ..FlowLimits::default() });
        let (client, _replies) = mpsc::channel(8);
        let (fail, failing) = oneshot::channel::<()>();
        let (tell, ended) = oneshot::channel();
        let opening = async {
            let _ = failing.await;
            Err(io::ErrorKind::ConnectionRefused.into())
        };
        let sink = client.clone();
        table.deliver(
            1,
            Bytes::new(),
            || Box::new(Client(sink)),
            || opening,
            |end| {
                let _ = tell.send(end);
            },
        );
        let more =
            table.deliver(1, Bytes::new(), || Box::new(Client(client)), || open(([127, 0, 0, 1], 1).into()), |_| {});
        assert_eq!(more, Delivery::QueueFull);
        fail.send(()).unwrap();
        assert!(matches!(ended.await.unwrap(), FlowEnded::NotOpened(_)));
        assert!(table.is_empty());
    }
}
