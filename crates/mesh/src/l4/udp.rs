//! UDP flows: one for each client address and Service port, with an idle limit, a limit of their number, and a bounded
//! queue each. What a flow's remote end is (a socket, a tunnel stream) is the caller's business.

pub mod socket;
mod traffic;

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
use tokio_util::sync::CancellationToken;

pub use self::traffic::Traffic;

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
    /// Most flows at a time. For another one, those that were idle longest end early; if none has been idle for
    /// [`FlowLimits::spared`], its datagram is dropped.
    pub flows: usize,
    /// Datagrams that may wait in one flow; more are dropped, as a full socket buffer would.
    pub queue: usize,
    /// A flow without datagrams in either direction ends after this time.
    pub idle: Duration,
    /// A flow with datagrams within this time is never ended for another one.
    pub spared: Duration,
    /// Time to open a flow's remote end.
    pub open: Duration,
    /// One whose remote end could not be opened keeps its place for this time and swallows what comes, so that not each datagram of
    /// its client begins another.
    pub respite: Duration,
}

impl Default for FlowLimits {
    fn default() -> Self {
        Self {
            flows: 4096,
            queue: 64,
            idle: Duration::from_secs(60),
            spared: Duration::from_secs(1),
            open: Duration::from_secs(15),
            respite: Duration::from_secs(1),
        }
    }
}

/// What became of a client's datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// It belongs to a flow that was there.
    Queued,
    /// It began a flow.
    Began,
    /// It began a flow, and this many idle ones end early to make room.
    BeganInPlaceOf(usize),
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
    /// It was idle and another flow needed its place, or it was ended because its remote end is of no more use.
    Evicted,
    /// One end closed.
    Closed,
    /// The remote end could not be opened.
    NotOpened(io::Error),
    /// An end failed.
    Failed(io::Error),
    /// The table was dropped.
    Stopped,
}

/// The flows of one listener, by key: the client's address and whatever tells the Service.
#[derive(Debug)]
pub struct FlowTable<K> {
    limits: FlowLimits,
    shared: Arc<Flows<K>>,
    stop: CancellationToken,
}

#[derive(Debug)]
struct Flows<K> {
    by_key: Mutex<HashMap<K, Entry>>,
    next: AtomicU64,
}

#[derive(Debug)]
struct Entry {
    id: u64,
    queue: mpsc::Sender<Bytes>,
    traffic: Arc<Traffic>,
}

/// The share of a full table that is freed at once, so that the search for idle flows is not done for each new one.
const FREED_SHARE: usize = 32;

impl<K: Clone + Eq + Hash + Send + 'static> FlowTable<K> {
    /// An empty table.
    pub fn new(limits: FlowLimits) -> Self {
        let shared = Flows { by_key: Mutex::default(), next: AtomicU64::new(0) };
        Self { limits, shared: Arc::new(shared), stop: CancellationToken::new() }
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
    /// replies, and `ended` hears how it ended and what it carried. Never waits.
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
        Ended: FnOnce(FlowEnded, &Traffic) + Send + 'static,
    {
        let mut flows = self.shared.by_key.lock();
        let datagram = match flows.get(&key) {
            None => datagram,
            Some(entry) => match entry.queue.try_send(datagram) {
                Ok(()) => return Delivery::Queued,
                Err(mpsc::error::TrySendError::Full(_)) => return Delivery::QueueFull,
                // The flow is just ending; this datagram begins the next one.
                Err(mpsc::error::TrySendError::Closed(datagram)) => datagram,
            },
        };
        let mut delivery = Delivery::Began;
        if flows.len() >= self.limits.flows && !flows.contains_key(&key) {
            match evict(&mut flows, self.limits) {
                0 => return Delivery::TableFull,
                evicted => delivery = Delivery::BeganInPlaceOf(evicted),
            }
        }
        let (queue, datagrams) = mpsc::channel(self.limits.queue.max(1));
        // The queue is empty and has room for one.
        let _ = queue.try_send(datagram);
        let id = self.shared.next.fetch_add(1, Ordering::Relaxed);
        let traffic = Arc::<Traffic>::default();
        flows.insert(key.clone(), Entry { id, queue, traffic: traffic.clone() });
        drop(flows);

        let place = Place { key, id, flows: self.shared.clone() };
        let (opening, client, limits, stop) = (open(), client(), self.limits, self.stop.clone());
        let run = async move {
            let stopped = async {
                tokio::select! {
                    () = traffic.evicted.cancelled() => FlowEnded::Evicted,
                    () = stop.cancelled() => FlowEnded::Stopped,
                }
            };
            tokio::pin!(stopped);
            let end = tokio::select! {
                biased;
                end = &mut stopped => end,
                opened = open_remote(opening, limits.open) => match opened {
                    Ok(remote) => {
                        let near = FlowEnd { sink: client, source: Box::new(Queue(datagrams)) };
                        tokio::select! {
                            biased;
                            end = stopped => end,
                            end = pump(near, remote, limits.idle, &traffic) => end,
                        }
                    }
                    Err(error) => {
                        drop(client);
                        traffic.swallows.store(true, Ordering::Relaxed);
                        ended(FlowEnded::NotOpened(error), &traffic);
                        tokio::select! {
                            _ = stopped => {}
                            _ = timeout(limits.respite, swallow(datagrams)) => {}
                        }
                        return drop(place);
                    }
                },
            };
            drop(place);
            ended(end, &traffic);
        };
        // It ends with the table at the latest.
        tokio::spawn(run);
        delivery
    }

    /// For how long nothing has moved on a flow; none if there is no such flow.
    pub fn idle(&self, key: &K) -> Option<Duration> {
        self.shared.by_key.lock().get(key).map(|entry| entry.traffic.last().elapsed())
    }

    /// Ends a flow: the next datagram of its client begins another.
    pub fn end(&self, key: &K) {
        if let Some(entry) = self.shared.by_key.lock().remove(key) {
            entry.traffic.evicted.cancel();
        }
    }
}

/// Takes the flows that were idle longest out of the table and ends them, also those that are still being opened, so that
/// there are never more than the table has places for. Those that only swallow datagrams come first. Returns how many.
fn evict<K: Clone + Eq + Hash>(flows: &mut HashMap<K, Entry>, limits: FlowLimits) -> usize {
    let wanted = (limits.flows / FREED_SHARE).max(1);
    let now = Instant::now();
    let pick = |wanted: &dyn Fn(&Traffic) -> bool| -> Vec<(Instant, K)> {
        let all = flows.iter().filter(|(_, entry)| wanted(&entry.traffic));
        all.map(|(key, entry)| (entry.traffic.last(), key.clone())).collect()
    };
    let mut idle = pick(&|traffic| traffic.swallows.load(Ordering::Relaxed));
    if idle.is_empty() {
        idle = pick(&|traffic| now.saturating_duration_since(traffic.last()) >= limits.spared);
    }
    if idle.len() > wanted {
        idle.select_nth_unstable_by_key(wanted, |(last, _)| *last);
        idle.truncate(wanted);
    }
    for (_, key) in &idle {
        if let Some(entry) = flows.remove(key) {
            entry.traffic.evicted.cancel();
        }
    }
    idle.len()
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
        if flows.get(&self.key).is_some_and(|entry| entry.id == self.id) {
            flows.remove(&self.key);
        }
    }
}

async fn open_remote(opening: impl Future<Output = io::Result<FlowEnd>>, deadline: Duration) -> io::Result<FlowEnd> {
    timeout(deadline, opening).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// Takes datagrams and does nothing with them.
async fn swallow(mut datagrams: mpsc::Receiver<Bytes>) {
    while datagrams.recv().await.is_some() {}
}

struct Queue(mpsc::Receiver<Bytes>);

impl DatagramSource for Queue {
    fn recv(&mut self) -> BoxFuture<'_, io::Result<Option<Bytes>>> {
        Box::pin(async { Ok(self.0.recv().await) })
    }
}

/// Carries datagrams between two ends until one ends, or nothing moves for the idle time.
pub async fn pump(near: FlowEnd, far: FlowEnd, idle: Duration, traffic: &Traffic) -> FlowEnded {
    let (mut near, mut far) = (near, far);
    // Each direction runs by itself: one that waits must not stop the other.
    let forward = carry(near.source.as_mut(), far.sink.as_mut(), |bytes| traffic.count(&traffic.to_far, bytes));
    let backward = carry(far.source.as_mut(), near.sink.as_mut(), |bytes| traffic.count(&traffic.to_near, bytes));
    let quiet = async {
        loop {
            let until = traffic.last() + idle;
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

async fn carry(from: &mut dyn DatagramSource, to: &mut dyn DatagramSink, moved: impl Fn(usize)) -> io::Result<()> {
    while let Some(datagram) = from.recv().await? {
        moved(datagram.len());
        to.send(&datagram).await?;
    }
    Ok(())
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
            let outcome = table.deliver(1, sent.clone(), || Box::new(Client(sink)), || open(server), |_, _| {});
            assert_eq!(outcome, delivery);
            assert_eq!(replies.recv().await.unwrap(), sent);
        }
        assert_eq!(table.len(), 1);
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
            |end, _| {
                let _ = tell.send(end);
            },
        );
        assert!(matches!(ended.await.unwrap(), FlowEnded::Idle));
        assert!(table.is_empty());
    }

    #[tokio::test]
    async fn a_full_table_of_busy_flows_drops_new_ones_and_keeps_the_old() {
        let spared = Duration::from_secs(3600);
        let table = FlowTable::new(FlowLimits { flows: 2, spared, ..FlowLimits::default() });
        let server = echo().await;
        let (client, _replies) = mpsc::channel(8);
        let deliver = |key| {
            let sink = client.clone();
            table.deliver(key, Bytes::from_static(b"x"), || Box::new(Client(sink)), || open(server), |_, _| {})
        };
        assert_eq!(
            [deliver(1), deliver(2), deliver(3), deliver(1)],
            [Delivery::Began, Delivery::Began, Delivery::TableFull, Delivery::Queued]
        );
    }

    #[tokio::test]
    async fn in_a_full_table_the_flow_that_was_idle_longest_makes_room() {
        let table = FlowTable::new(FlowLimits { flows: 2, spared: Duration::ZERO, ..FlowLimits::default() });
        let server = echo().await;
        let (client, mut replies) = mpsc::channel(8);
        let (tell, mut ends) = mpsc::channel(8);
        for (key, delivery) in
            [(1, Delivery::Began), (2, Delivery::Began), (1, Delivery::Queued), (3, Delivery::BeganInPlaceOf(1))]
        {
            let (sink, tell) = (client.clone(), tell.clone());
            // Times have a resolution of a millisecond.
            tokio::time::sleep(Duration::from_millis(5)).await;
            let outcome = table.deliver(
                key,
                Bytes::from_static(b"four"),
                || Box::new(Client(sink)),
                || open(server),
                move |end, traffic| {
                    let _ = tell.try_send((key, format!("{end:?}"), traffic.to_far(), traffic.to_near()));
                },
            );
            assert_eq!(outcome, delivery, "{key}");
            replies.recv().await.unwrap();
        }
        assert_eq!(ends.recv().await.unwrap(), (2, "Evicted".to_owned(), 4, 4));
        assert_eq!(table.len(), 2);
    }

    #[tokio::test]
    async fn a_flow_that_is_still_being_opened_can_make_room() {
        let table = FlowTable::new(FlowLimits { flows: 1, spared: Duration::ZERO, ..FlowLimits::default() });
        let server = echo().await;
        let (client, mut replies) = mpsc::channel(8);
        let (tell, ended) = oneshot::channel();
        let sink = client.clone();
        table.deliver(
            1,
            Bytes::new(),
            || Box::new(Client(sink)),
            std::future::pending,
            |end, _| {
                let _ = tell.send(end);
            },
        );
        let outcome = table.deliver(2, Bytes::new(), || Box::new(Client(client)), || open(server), |_, _| {});
        assert_eq!(outcome, Delivery::BeganInPlaceOf(1));
        assert!(matches!(ended.await.unwrap(), FlowEnded::Evicted));
        replies.recv().await.unwrap();
    }

    #[tokio::test]
    async fn flows_that_could_not_be_opened_make_room_before_others() {
        let (flows, spared) = (4, Duration::from_secs(3600));
        let table = FlowTable::new(FlowLimits { flows, spared, ..FlowLimits::default() });
        let server = echo().await;
        let (client, _replies) = mpsc::channel(8);
        let sink = client.clone();
        table.deliver(0, Bytes::from_static(b"x"), || Box::new(Client(sink)), || open(server), |_, _| {});
        for key in 1..20 {
            let (tell, ended) = oneshot::channel();
            let (sink, fails) = (client.clone(), async { Err(io::ErrorKind::ConnectionRefused.into()) });
            let delivery = table.deliver(
                key,
                Bytes::new(),
                || Box::new(Client(sink)),
                || fails,
                |end, _| {
                    let _ = tell.send(end);
                },
            );
            assert_eq!(delivery, if key < 4 { Delivery::Began } else { Delivery::BeganInPlaceOf(1) }, "{key}");
            assert!(matches!(ended.await.unwrap(), FlowEnded::NotOpened(_)));
        }
        assert!(table.idle(&0).is_some(), "the one that works is still there");
    }

    #[tokio::test(start_paused = true)]
    async fn a_flow_that_cannot_be_opened_swallows_datagrams_for_a_while_and_leaves_no_trace() {
        let table = FlowTable::new(FlowLimits { queue: 1, ..FlowLimits::default() });
        let (client, mut gone) = mpsc::channel(8);
        let (fail, failing) = oneshot::channel::<()>();
        let (tell, ended) = oneshot::channel();
        let opening = async {
            let _ = failing.await;
            Err(io::ErrorKind::ConnectionRefused.into())
        };
        table.deliver(
            1,
            Bytes::new(),
            || Box::new(Client(client)),
            || opening,
            |end, _| {
                let _ = tell.send(end);
            },
        );
        let more = || {
            let never = || -> std::future::Pending<io::Result<FlowEnd>> { panic!("another flow begins") };
            table.deliver(1, Bytes::new(), || panic!("another flow begins"), never, |_, _| {})
        };
        assert_eq!(more(), Delivery::QueueFull);
        fail.send(()).unwrap();
        assert!(matches!(ended.await.unwrap(), FlowEnded::NotOpened(_)));
        assert!(gone.recv().await.is_none(), "nothing is kept of it");
        for _ in 0..100 {
            assert_eq!(more(), Delivery::Queued);
            tokio::task::yield_now().await;
        }
        let emptied = async {
            while !table.is_empty() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(2 * FlowLimits::default().respite, emptied).await.unwrap();
    }
}
