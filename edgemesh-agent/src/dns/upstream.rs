//! One upstream server: asking it over UDP and TCP or over TLS, and whether it is alive.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures::future::select_ok;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
    time::timeout,
};

use super::{
    address::UpstreamAddress,
    cache::Key,
    dot::DotServer,
    metrics::Metrics,
    reply::MAX_UDP,
    wire::{HEADER, Malformed, counts, kind, rcode, read_record, word},
};

/// How long a probe waits at least. A server in reach answers the probe from what it has at hand.
const PROBE_WAIT: Duration = Duration::from_millis(350);
/// The same over TLS, where a probe opens a connection: three round trips.
const TLS_PROBE_WAIT: Duration = Duration::from_millis(1500);
/// How long a probe of a server that is taken for dead waits: distant ones may come back too.
const REVIVE_WAIT: Duration = Duration::from_secs(2);
/// An answer this young proves that the server is alive.
const RECENT: Duration = Duration::from_millis(500);
/// How long a server that knew no EDNS is asked without it: it may be replaced by one that does.
const NO_EDNS_FOR: Duration = Duration::from_secs(600);
/// Deadline of an exchange over TCP.
const TCP_DEADLINE: Duration = Duration::from_secs(3);

/// How a server is asked.
#[derive(Debug)]
pub(super) enum Link {
    /// Over UDP, and over TCP when an answer is too long for it.
    Plain,
    /// Over TLS.
    Tls(DotServer),
}

/// An upstream server and its health.
#[derive(Debug)]
pub(super) struct Upstream {
    pub(super) address: UpstreamAddress,
    /// No other has it.
    pub(super) number: u32,
    link: Link,
    metrics: Arc<Metrics>,
    /// Counts how often it was lost and how often it came back, and so is odd while it is dead.
    turns: AtomicU32,
    /// Though it is dead, one question may be asked of it.
    on_trial: AtomicBool,
    looped: AtomicBool,
    /// Smoothed time of answers, in microseconds; 0 while unknown.
    round_trip: AtomicU64,
    /// Of the last answer, in milliseconds since `born`; 0 if there was none.
    last_answer: AtomicU64,
    /// Until when it is asked without EDNS, in milliseconds since `born`.
    no_edns_until: AtomicU64,
    born: Instant,
    /// One probe at a time.
    probing: tokio::sync::Mutex<()>,
}

impl Upstream {
    pub(super) fn new(address: UpstreamAddress, number: u32, link: Link, metrics: Arc<Metrics>) -> Self {
        Self {
            address,
            number,
            link,
            metrics,
            turns: AtomicU32::new(0),
            on_trial: AtomicBool::new(false),
            looped: AtomicBool::new(false),
            round_trip: AtomicU64::new(0),
            last_answer: AtomicU64::new(0),
            no_edns_until: AtomicU64::new(0),
            born: Instant::now(),
            probing: tokio::sync::Mutex::new(()),
        }
    }

    /// Whether it is worth asking.
    pub(super) fn is_usable(&self) -> bool {
        !is_dead(self.turns.load(Ordering::Relaxed)) && !self.is_looped()
    }

    /// Whether its queries come back to this server.
    pub(super) fn is_looped(&self) -> bool {
        self.looped.load(Ordering::Relaxed)
    }

    /// Takes it for dead. Returns which of its deaths this is, if it wasn't dead before.
    pub(super) fn set_dead(&self) -> Option<u32> {
        let turn = |turns: u32| (!is_dead(turns)).then(|| turns.wrapping_add(1));
        let before = self.turns.fetch_update(Ordering::Relaxed, Ordering::Relaxed, turn).ok()?;
        self.on_trial.store(false, Ordering::Relaxed);
        Some(before.wrapping_add(1))
    }

    /// Whether it has been dead since then.
    pub(super) fn is_dead_since(&self, death: u32) -> bool {
        self.turns.load(Ordering::Relaxed) == death
    }

    /// Takes it for alive; true if it was dead before.
    pub(super) fn set_alive(&self) -> bool {
        let turn = |turns: u32| is_dead(turns).then(|| turns.wrapping_add(1));
        self.turns.fetch_update(Ordering::Relaxed, Ordering::Relaxed, turn).is_ok()
    }

    /// Lets one question be asked of it while it is dead.
    pub(super) fn put_on_trial(&self) {
        self.on_trial.store(true, Ordering::Relaxed);
    }

    /// Whether one question may be asked of it though it is dead.
    pub(super) fn is_on_trial(&self) -> bool {
        self.on_trial.load(Ordering::Relaxed) && !self.is_looped()
    }

    /// Takes the right to ask it that question.
    pub(super) fn take_trial(&self) -> bool {
        !self.is_looped() && self.on_trial.swap(false, Ordering::Relaxed)
    }

    /// Never asks it again; true if it was asked so far.
    pub(super) fn set_looped(&self) -> bool {
        !self.looped.swap(true, Ordering::Relaxed)
    }

    /// Whether a question may get lost on the way, so that it is worth repeating.
    pub(super) fn may_lose(&self) -> bool {
        matches!(self.link, Link::Plain)
    }

    /// Asks, over UDP first and over TCP if the answer was too long; without EDNS if the server doesn't know it. Waits as long as
    /// the caller lets it.
    pub(super) async fn ask(&self, key: &Key) -> io::Result<Vec<u8>> {
        let question = key.question();
        let flags = RECURSION_DESIRED | if key.checking_disabled() { 0x0010 } else { 0 };
        let mut edns = self.knows_edns().then(|| key.dnssec_ok());
        let started = Instant::now();
        let mut answer = self.exchange(&query(&question, flags, edns)).await?;
        self.answered(started.elapsed());
        if edns.is_some() && is_misunderstood(&answer) && !has_opt(&answer, question.len()) {
            edns = None;
            answer = self.exchange(&query(&question, flags, None)).await?;
            if !is_misunderstood(&answer) {
                let until = self.born.elapsed() + NO_EDNS_FOR;
                self.no_edns_until.store(until.as_millis() as u64, Ordering::Relaxed);
            }
        }
        if word(&answer, 2) & 0x0200 == 0 || !matches!(self.link, Link::Plain) {
            return Ok(answer);
        }
        let again = query(&question, flags, edns);
        match timeout(TCP_DEADLINE, self.exchange_tcp(&again)).await {
            Ok(Ok(answer)) => Ok(answer),
            // The client gets the truncated answer and can try TCP itself.
            Ok(Err(_)) | Err(_) => Ok(answer),
        }
    }

    /// Finds out whether it answers now; if not, `lost` is called. One probe does for all who want to know at a time, and none is
    /// needed if it answered a moment ago.
    pub(super) async fn check(&self, lost: impl FnOnce()) {
        let _one = self.probing.lock().await;
        let last = self.last_answer.load(Ordering::Relaxed);
        let answered_lately = last != 0 && self.born.elapsed() < Duration::from_millis(last) + RECENT;
        if answered_lately || is_dead(self.turns.load(Ordering::Relaxed)) {
            return;
        }
        let usual = Duration::from_micros(self.round_trip.load(Ordering::Relaxed));
        let least = if self.may_lose() { PROBE_WAIT } else { TLS_PROBE_WAIT };
        if !self.probe(least.max(usual * 2)).await {
            lost();
        }
    }

    /// Whether a server that was taken for dead answers again.
    pub(super) async fn is_back(&self) -> bool {
        self.probe(REVIVE_WAIT).await
    }

    /// Asks for the root's servers, without recursion and with it. Any server has an answer, or a refusal, at once: those that drop
    /// the one take the other for an everyday question.
    async fn probe(&self, wait: Duration) -> bool {
        let started = Instant::now();
        let root = [0, 0, 2, 0, 1];
        if let Link::Tls(server) = &self.link {
            server.renew();
        }
        let messages = [0, RECURSION_DESIRED].map(|flags| query(&root, flags, None));
        let answers = messages.iter().map(|message| Box::pin(self.exchange(message)));
        let answered = matches!(timeout(wait, select_ok(answers)).await, Ok(Ok(_)));
        if answered {
            self.answered(started.elapsed());
        }
        answered
    }

    fn knows_edns(&self) -> bool {
        self.born.elapsed() >= Duration::from_millis(self.no_edns_until.load(Ordering::Relaxed))
    }

    fn answered(&self, took: Duration) {
        let took = took.as_micros() as u64;
        let before = self.round_trip.load(Ordering::Relaxed);
        // Recursion makes single answers slow; the smoothing keeps them from mattering much.
        let now = if before == 0 { took } else { before - before / 8 + took / 8 };
        self.round_trip.store(now.max(1), Ordering::Relaxed);
        self.last_answer.store(self.born.elapsed().as_millis().max(1) as u64, Ordering::Relaxed);
    }

    /// Sends a message and waits for the answer that belongs to it.
    async fn exchange(&self, message: &[u8]) -> io::Result<Vec<u8>> {
        match &self.link {
            Link::Plain => self.exchange_udp(message).await,
            Link::Tls(server) => {
                self.metrics.exchanges.tls.inc();
                let mut message = message.to_vec();
                pad(&mut message);
                server.exchange(&message).await
            }
        }
    }

    async fn exchange_udp(&self, message: &[u8]) -> io::Result<Vec<u8>> {
        self.metrics.exchanges.udp.inc();
        let server = self.address.address;
        let any = match server {
            SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        };
        // A new socket gets an unpredictable port from the kernel, and being connected takes only the server's datagrams.
        let socket = UdpSocket::bind((any, 0)).await?;
        socket.connect(server).await?;
        socket.send(message).await?;
        let mut buffer = vec![0; 4096];
        loop {
            let length = socket.recv(&mut buffer).await?;
            if belongs(&buffer[..length], message) {
                buffer.truncate(length);
                return Ok(buffer);
            }
        }
    }

    async fn exchange_tcp(&self, message: &[u8]) -> io::Result<Vec<u8>> {
        self.metrics.exchanges.tcp.inc();
        let mut stream = TcpStream::connect(self.address.address).await?;
        let framed = [&(message.len() as u16).to_be_bytes(), message].concat();
        stream.write_all(&framed).await?;
        let length = usize::from(stream.read_u16().await?);
        let mut answer = vec![0; length];
        stream.read_exact(&mut answer).await?;
        if belongs(&answer, message) {
            Ok(answer)
        } else {
            Err(io::Error::new(io::ErrorKind::InvalidData, "an answer to another question"))
        }
    }
}

/// Whether an upstream with this count of turns is dead.
fn is_dead(turns: u32) -> bool {
    turns % 2 == 1
}

/// Header flag of a question that the server is to find the answer to, not only to look whether it has it.
const RECURSION_DESIRED: u16 = 0x0100;
/// Length of an OPT record without options.
const OPT_LEN: usize = 11;
/// Queries over TLS are padded to a multiple of this, so that their length doesn't tell the name (RFC 8467, section 4.1).
const PADDING_BLOCK: usize = 128;
/// EDNS option for it (RFC 7830).
const PADDING: u8 = 12;

/// A query message. `edns` is whether DNSSEC records are wanted; without it there is no OPT record.
fn query(question: &[u8], flags: u16, edns: Option<bool>) -> Vec<u8> {
    let mut message = Vec::with_capacity(HEADER + question.len() + OPT_LEN);
    message.extend_from_slice(&rand::random::<[u8; 2]>());
    message.extend_from_slice(&flags.to_be_bytes());
    message.extend_from_slice(&[0, 1, 0, 0, 0, 0, 0, u8::from(edns.is_some())]);
    message.extend_from_slice(question);
    if let Some(dnssec_ok) = edns {
        let payload = (MAX_UDP as u16).to_be_bytes();
        let flags = if dnssec_ok { 0x80 } else { 0 };
        message.extend_from_slice(&[0, 0, 41, payload[0], payload[1], 0, 0, flags, 0, 0, 0]);
    }
    message
}

/// Fills the OPT record at the end of a query with padding. A query without one stays as it is: only probes are.
fn pad(message: &mut Vec<u8>) {
    let Some(length_at) = message.len().checked_sub(2).filter(|_| message[11] == 1) else { return };
    let padding = (message.len() + 4).next_multiple_of(PADDING_BLOCK) - message.len() - 4;
    let option = [&[0, PADDING], &(padding as u16).to_be_bytes()[..], &vec![0; padding][..]].concat();
    message[length_at..].copy_from_slice(&(option.len() as u16).to_be_bytes());
    message.extend_from_slice(&option);
}

/// Where in a query of ours the question is: its name isn't compressed.
fn question_of(message: &[u8]) -> std::ops::Range<usize> {
    let mut end = HEADER;
    while let Some(length @ 1..) = message.get(end) {
        end += 1 + usize::from(*length);
    }
    HEADER..end + 5
}

/// Whether an answer says that the server can't read the query, or not do what it asks for. Without an OPT record that is how a
/// server shows that it doesn't know EDNS (RFC 6891, section 7).
fn is_misunderstood(answer: &[u8]) -> bool {
    matches!(word(answer, 2) as u8 & 0x0f, rcode::FORMERR | rcode::NOTIMP)
}

/// Whether an answer has an OPT record. `question` is the length of the question that was asked.
fn has_opt(answer: &[u8], question: usize) -> bool {
    let [questions, answers, authority, additional] = counts(answer);
    let mut at = if questions == 0 { HEADER } else { HEADER + question };
    for _ in 0..u32::from(answers) + u32::from(authority) + u32::from(additional) {
        match read_record(answer, at) {
            Ok(record) if record.kind == kind::OPT => return true,
            Ok(record) => at = record.data.end,
            Err(Malformed) => return false,
        }
    }
    false
}

/// Whether a message answers a query of ours: same id, a response, the same question. Errors may come without the question.
pub(super) fn belongs(answer: &[u8], asked: &[u8]) -> bool {
    if answer.len() < HEADER || answer[..2] != asked[..2] || answer[2] & 0x80 == 0 {
        return false;
    }
    if word(answer, 4) == 0 {
        return answer[3] & 0x0f != 0 && answer.len() == HEADER;
    }
    let question = question_of(asked);
    let (theirs, ours) = (answer.get(question.clone()), asked.get(question));
    word(answer, 4) == 1 && theirs.zip(ours).is_some_and(|(theirs, ours)| theirs.eq_ignore_ascii_case(ours))
}
