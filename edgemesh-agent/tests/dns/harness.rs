//! A running DNS server with a catalog, a client for it, and upstream servers that do as told.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use edgemesh_agent::{config::DnsConfig, dns};
use edgemesh_mesh::CatalogStore;
use edgemesh_telemetry::Shutdown;
use hickory_proto::{
    op::{Edns, Message, Query},
    rr::{Name, RData, Record, RecordType, rdata},
};
use parking_lot::RwLock;
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
};

/// Nothing here takes this long.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

/// A running server.
pub(crate) struct Dns {
    pub(crate) address: SocketAddr,
    pub(crate) catalog: Arc<CatalogStore>,
    pub(crate) registry: Arc<RwLock<Registry>>,
    pub(crate) shutdown: Shutdown,
}

impl Drop for Dns {
    fn drop(&mut self) {
        self.shutdown.stopping().cancel();
        self.shutdown.forced().cancel();
    }
}

impl Dns {
    /// A server with the objects in its catalog, synced.
    pub(crate) fn start(objects: &[Value], upstreams: &[SocketAddr]) -> Self {
        Self::start_with(objects, upstreams, |_| {})
    }

    pub(crate) fn start_with(objects: &[Value], upstreams: &[SocketAddr], adjust: impl FnOnce(&mut DnsConfig)) -> Self {
        let catalog = CatalogStore::new();
        apply(&catalog, objects);
        catalog.mark_synced();
        catalog.publish();
        Self::start_on(catalog, upstreams, adjust)
    }

    pub(crate) fn start_on(
        catalog: Arc<CatalogStore>,
        upstreams: &[SocketAddr],
        adjust: impl FnOnce(&mut DnsConfig),
    ) -> Self {
        Self::start_at("127.0.0.1:0".parse().unwrap(), catalog, upstreams, adjust)
    }

    pub(crate) fn start_at(
        address: SocketAddr,
        catalog: Arc<CatalogStore>,
        upstreams: &[SocketAddr],
        adjust: impl FnOnce(&mut DnsConfig),
    ) -> Self {
        let mut config = DnsConfig {
            upstreams: upstreams.iter().map(|address| address.to_string()).collect(),
            // Only read where there are no upstreams.
            resolv_conf: "/nonexistent/resolv.conf".into(),
            ..DnsConfig::default()
        };
        adjust(&mut config);
        let registry = Arc::default();
        let shutdown = Shutdown::default();
        let server = dns::Server::bind(&[address], Arc::clone(&catalog), &config, &registry).unwrap();
        let address = server.addresses().next().unwrap();
        server.serve(&shutdown).unwrap();
        Self { address, catalog, registry, shutdown }
    }

    /// Asks over UDP with EDNS.
    pub(crate) async fn ask(&self, name: &str, kind: RecordType) -> Message {
        let mut message = question(name, kind);
        message.set_edns(Edns::new());
        self.send(&message).await
    }

    /// Asks over UDP with EDNS, from an address of loopback.
    pub(crate) async fn ask_from(&self, client: IpAddr, name: &str, kind: RecordType) -> Message {
        let mut message = question(name, kind);
        message.set_edns(Edns::new());
        let answer = self.send_bytes_from(client, &message.to_vec().unwrap()).await;
        Message::from_vec(&answer).unwrap()
    }

    /// Sends a message over UDP and waits for its answer.
    pub(crate) async fn send(&self, message: &Message) -> Message {
        let answer = self.send_bytes(&message.to_vec().unwrap()).await;
        let answer = Message::from_vec(&answer).unwrap();
        assert_eq!(answer.metadata.id, message.metadata.id);
        assert_eq!(answer.queries, message.queries);
        answer
    }

    pub(crate) async fn send_bytes(&self, message: &[u8]) -> Vec<u8> {
        self.send_bytes_from(IpAddr::from([127, 0, 0, 1]), message).await
    }

    async fn send_bytes_from(&self, client: IpAddr, message: &[u8]) -> Vec<u8> {
        let socket = UdpSocket::bind((client, 0)).await.unwrap();
        socket.connect(self.address).await.unwrap();
        socket.send(message).await.unwrap();
        let mut buffer = vec![0; 65_535];
        let length = tokio::time::timeout(DEADLINE, socket.recv(&mut buffer)).await.expect("no answer").unwrap();
        buffer.truncate(length);
        buffer
    }

    /// Asks over TCP.
    pub(crate) async fn ask_tcp(&self, name: &str, kind: RecordType) -> Message {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        write_framed(&mut stream, &question(name, kind)).await;
        read_framed(&mut stream).await
    }

    /// The metrics as text.
    pub(crate) fn metrics(&self) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry.read()).unwrap();
        text
    }
}

/// Waits until a condition holds.
pub(crate) async fn eventually<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    let started = Instant::now();
    while !condition().await {
        assert!(started.elapsed() < DEADLINE, "never happened: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub(crate) fn question(name: &str, kind: RecordType) -> Message {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
}

pub(crate) async fn write_framed(stream: &mut TcpStream, message: &Message) {
    let bytes = message.to_vec().unwrap();
    stream.write_all(&[&(bytes.len() as u16).to_be_bytes(), &bytes[..]].concat()).await.unwrap();
}

pub(crate) async fn read_framed(stream: &mut TcpStream) -> Message {
    let read = async {
        let length = stream.read_u16().await.unwrap();
        let mut bytes = vec![0; usize::from(length)];
        stream.read_exact(&mut bytes).await.unwrap();
        Message::from_vec(&bytes).unwrap()
    };
    tokio::time::timeout(DEADLINE, read).await.expect("no answer over TCP")
}

/// The records of a section as text, sorted.
pub(crate) fn sorted(records: &[Record]) -> Vec<String> {
    let mut lines: Vec<String> = records.iter().map(ToString::to_string).collect();
    lines.sort();
    lines
}

pub(crate) fn apply(catalog: &CatalogStore, objects: &[Value]) {
    for object in objects {
        let object = object.clone();
        match object["kind"].as_str().unwrap() {
            "Service" => catalog.apply_service(&serde_json::from_value(object).unwrap()),
            "EndpointSlice" => catalog.apply_endpoint_slice(&serde_json::from_value(object).unwrap()),
            "Node" => catalog.apply_node(&serde_json::from_value(object).unwrap()),
            kind => panic!("{kind}"),
        }
    }
}

pub(crate) fn service(name: &str, spec: Value) -> Value {
    let (namespace, name) = name.split_once('/').unwrap();
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": namespace}, "spec": spec})
}

/// A slice of a Service; `endpoints` are objects of the API.
pub(crate) fn slice(service: &str, number: usize, family: &str, ports: Value, endpoints: Value) -> Value {
    let (namespace, service) = service.split_once('/').unwrap();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family,
        "metadata": {
            "name": format!("{service}-{number}"), "namespace": namespace,
            "labels": {"kubernetes.io/service-name": service},
        },
        "ports": ports, "endpoints": endpoints,
    })
}

/// An upstream server on UDP and TCP.
pub(crate) struct Upstream {
    pub(crate) address: SocketAddr,
    inner: Arc<Inner>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

type Answers = Box<dyn Fn(&Query, bool) -> Option<Message> + Send + Sync>;

struct Inner {
    answers: Answers,
    silent: AtomicBool,
    asked: AtomicUsize,
}

impl Drop for Upstream {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl Upstream {
    /// `answers` gets the question and whether it came over TCP.
    pub(crate) async fn start(answers: impl Fn(&Query, bool) -> Option<Message> + Send + Sync + 'static) -> Self {
        Self::start_at("127.0.0.1:0".parse().unwrap(), answers).await
    }

    pub(crate) async fn start_at(
        address: SocketAddr,
        answers: impl Fn(&Query, bool) -> Option<Message> + Send + Sync + 'static,
    ) -> Self {
        let inner =
            Arc::new(Inner { answers: Box::new(answers), silent: AtomicBool::new(false), asked: AtomicUsize::new(0) });
        let (udp, tcp) = bind_both(address).await;
        let address = udp.local_addr().unwrap();
        let tasks =
            vec![tokio::spawn(serve_udp(udp, Arc::clone(&inner))), tokio::spawn(serve_tcp(tcp, Arc::clone(&inner)))];
        Self { address, inner, tasks }
    }

    /// An upstream that has one address for every name, with a TTL.
    pub(crate) async fn fixed(ip: &'static str, ttl: u32) -> Self {
        Self::start(move |query, _| Some(addresses(query, &[ip], ttl))).await
    }

    /// Stops answering, or starts again.
    pub(crate) fn set_silent(&self, silent: bool) {
        self.inner.silent.store(silent, Ordering::SeqCst);
    }

    /// Questions from clients that came so far, probes left out.
    pub(crate) fn asked(&self) -> usize {
        self.inner.asked.load(Ordering::SeqCst)
    }
}

impl Inner {
    fn answer(&self, bytes: &[u8], tcp: bool) -> Option<Vec<u8>> {
        if self.silent.load(Ordering::SeqCst) {
            return None;
        }
        let query = Message::from_vec(bytes).ok()?;
        let question = query.queries.first()?.clone();
        let name = question.name.to_string();
        let own = name == "." || name.ends_with("loop.edgemesh.invalid.");
        if !own {
            self.asked.fetch_add(1, Ordering::SeqCst);
        }
        let mut answer = if own { addresses(&question, &[], 0) } else { (self.answers)(&question, tcp)? };
        answer.metadata.id = query.metadata.id;
        answer.metadata.recursion_available = true;
        answer.queries = query.queries.clone();
        if query.edns.is_some() {
            answer.set_edns(Edns::new());
        }
        answer.to_vec().ok()
    }
}

/// UDP and TCP at one address. A free UDP port may be taken for TCP, by any connection of another test: then another is tried.
async fn bind_both(address: SocketAddr) -> (UdpSocket, TcpListener) {
    loop {
        let udp = UdpSocket::bind(address).await.unwrap();
        match TcpListener::bind(udp.local_addr().unwrap()).await {
            Ok(tcp) => return (udp, tcp),
            Err(error) if address.port() == 0 && error.kind() == std::io::ErrorKind::AddrInUse => {}
            Err(error) => panic!("{address}: {error}"),
        }
    }
}

/// A server on UDP alone, which has bytes of its own for each message, or nothing.
pub(crate) struct RawUpstream {
    pub(crate) address: SocketAddr,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for RawUpstream {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl RawUpstream {
    pub(crate) async fn start(mut answer: impl FnMut(&Message) -> Option<Vec<u8>> + Send + 'static) -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let task = tokio::spawn(async move {
            let mut buffer = vec![0; 4096];
            while let Ok((length, client)) = socket.recv_from(&mut buffer).await {
                if let Some(answer) = answer(&Message::from_vec(&buffer[..length]).unwrap()) {
                    drop(socket.send_to(&answer, client).await);
                }
            }
        });
        Self { address, task }
    }
}

/// The bytes of an answer with an address for the name that is asked for, if it is asked for with type A.
pub(crate) fn address_for(query: &Message, ip: &str) -> Vec<u8> {
    let mut answer = addresses(&query.queries[0], &[ip], 60);
    answer.metadata.id = query.metadata.id;
    answer.queries = query.queries.clone();
    answer.to_vec().unwrap()
}

/// The bytes of an answer that is a header with a response code and no more.
pub(crate) fn header_alone(query: &Message, code: u8) -> Vec<u8> {
    let [high, low] = query.metadata.id.to_be_bytes();
    vec![high, low, 0x81, 0x80 | code, 0, 0, 0, 0, 0, 0, 0, 0]
}

async fn serve_udp(socket: UdpSocket, inner: Arc<Inner>) {
    let mut buffer = vec![0; 4096];
    while let Ok((length, client)) = socket.recv_from(&mut buffer).await {
        if let Some(answer) = inner.answer(&buffer[..length], false) {
            drop(socket.send_to(&answer, client).await);
        }
    }
}

async fn serve_tcp(listener: TcpListener, inner: Arc<Inner>) {
    while let Ok((mut stream, _)) = listener.accept().await {
        let Ok(length) = stream.read_u16().await else { continue };
        let mut bytes = vec![0; usize::from(length)];
        if stream.read_exact(&mut bytes).await.is_ok()
            && let Some(answer) = inner.answer(&bytes, true)
        {
            drop(stream.write_all(&[&(answer.len() as u16).to_be_bytes(), &answer[..]].concat()).await);
        }
    }
}

/// An answer with addresses; the family that was asked for only.
pub(crate) fn addresses(query: &Query, ips: &[&str], ttl: u32) -> Message {
    let mut answer = Message::response(0, hickory_proto::op::OpCode::Query);
    for ip in ips {
        let data = match ip.parse().unwrap() {
            std::net::IpAddr::V4(ip) => RData::A(rdata::A(ip)),
            std::net::IpAddr::V6(ip) => RData::AAAA(rdata::AAAA(ip)),
        };
        if data.record_type() == query.query_type {
            answer.add_answer(Record::from_rdata(query.name.clone(), ttl, data));
        }
    }
    answer
}
