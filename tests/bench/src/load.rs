//! The load generators: each measures a subject and its baseline by turns, in one process, and gives every pair.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream, ToSocketAddrs, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use socket2::SockRef;

use crate::{
    pairs::{Pair, by_turns},
    process::stay_on_first_cpu,
    serve::{BUFFER, DISCARD, DISCARD_ON_FIRST_CPU, ECHO, MESSAGE},
};

const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
const ANSWER_DEADLINE: Duration = Duration::from_secs(20);
const RETRY: Duration = Duration::from_millis(5);

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// One connection that sends as fast as it can, in Gbit/s until the server has counted everything.
    Throughput,
    /// The same with client and server on one CPU. Where nothing else takes part in it, this is what their bytes cost, with half
    /// the scatter that the scheduler's choice of CPUs brings.
    ThroughputOnOneCpu,
    /// Messages of 64 bytes, one at a time on one connection, in round trips per second.
    RoundTrips,
    /// Connect, 64 bytes there and back, close; one at a time, in microseconds each.
    Connect,
    /// As round trips, but over UDP from a socket that is not connected.
    Datagrams,
}

impl Kind {
    /// Its word on the command line.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Throughput => "throughput",
            Self::ThroughputOnOneCpu => "throughput-on-one-cpu",
            Self::RoundTrips => "round-trips",
            Self::Connect => "connect",
            Self::Datagrams => "datagrams",
        }
    }
}

/// Measures `rounds` pairs, for `each` per side.
///
/// # Errors
/// When a connection fails.
pub(crate) fn measure(
    kind: Kind,
    subject: SocketAddr,
    baseline: SocketAddr,
    rounds: u32,
    each: Duration,
) -> Result<Vec<Pair>> {
    if kind != Kind::Throughput {
        stay_on_first_cpu()?;
    }
    let one = |side: &str, address: SocketAddr| -> Result<f64> {
        let per_second = per_second(kind, address, each).with_context(|| format!("{side} at {address}"))?;
        Ok(match kind {
            Kind::Throughput | Kind::ThroughputOnOneCpu => per_second * 8.0 / 1e9,
            Kind::Connect => 1e6 / per_second,
            Kind::RoundTrips | Kind::Datagrams => per_second,
        })
    };
    by_turns(rounds, || one("subject", subject), || one("baseline", baseline))
}

/// Loads one address for a time and gives the bytes (throughput) or connections and messages that went there.
///
/// # Errors
/// When a connection fails.
pub(crate) fn apply(kind: Kind, address: SocketAddr, time: Duration) -> Result<f64> {
    let begin = Instant::now();
    let per_second = per_second(kind, address, time)?;
    Ok(per_second * begin.elapsed().as_secs_f64())
}

/// Bytes, connections or messages a second.
fn per_second(kind: Kind, address: SocketAddr, time: Duration) -> Result<f64> {
    match kind {
        Kind::Throughput => throughput(address, DISCARD, time),
        Kind::ThroughputOnOneCpu => throughput(address, DISCARD_ON_FIRST_CPU, time),
        Kind::RoundTrips => round_trips(address, time),
        Kind::Connect => connections(address, time),
        Kind::Datagrams => datagrams(address, time),
    }
}

fn open(address: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, CONNECT_DEADLINE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(ANSWER_DEADLINE))?;
    stream.set_write_timeout(Some(ANSWER_DEADLINE))?;
    Ok(stream)
}

fn throughput(address: SocketAddr, kind: u8, each: Duration) -> Result<f64> {
    let mut stream = open(address)?;
    let block = vec![0x5a; BUFFER];
    let begin = Instant::now();
    let mut sent = 0_u64;
    stream.write_all(&[kind])?;
    while begin.elapsed() < each {
        stream.write_all(&block)?;
        sent += block.len() as u64;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut counted = [0; 8];
    stream.read_exact(&mut counted)?;
    let took = begin.elapsed();
    let counted = u64::from_be_bytes(counted);
    ensure!(counted == sent, "{counted} of {sent} bytes arrived");
    Ok(sent as f64 / took.as_secs_f64())
}

fn round_trips(address: SocketAddr, each: Duration) -> Result<f64> {
    let mut stream = open(address)?;
    stream.write_all(&[ECHO])?;
    let mut count = 0_u32;
    let begin = Instant::now();
    while begin.elapsed() < each {
        round_trip(&mut stream, count)?;
        count += 1;
    }
    Ok(f64::from(count) / begin.elapsed().as_secs_f64())
}

/// One message there and back; it must be the same.
fn round_trip(stream: &mut TcpStream, number: u32) -> Result<()> {
    let mut message = [0x2a; MESSAGE];
    message[..4].copy_from_slice(&number.to_be_bytes());
    stream.write_all(&message)?;
    let mut answer = [0; MESSAGE];
    stream.read_exact(&mut answer)?;
    ensure!(answer == message, "another message came back");
    Ok(())
}

fn connections(address: SocketAddr, each: Duration) -> Result<f64> {
    let mut count = 0_u32;
    let begin = Instant::now();
    while begin.elapsed() < each {
        let mut stream = TcpStream::connect_timeout(&address, CONNECT_DEADLINE)?;
        stream.set_read_timeout(Some(ANSWER_DEADLINE))?;
        round_trip(&mut stream, count)?;
        // Closed by a reset: thousands of ports in TIME_WAIT would change what is measured.
        SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
        count += 1;
    }
    Ok(f64::from(count) / begin.elapsed().as_secs_f64())
}

fn datagrams(address: SocketAddr, each: Duration) -> Result<f64> {
    let any: SocketAddr = if address.is_ipv4() { ([0; 4], 0).into() } else { ([0_u16; 8], 0).into() };
    let socket = UdpSocket::bind(any)?;
    socket.set_read_timeout(Some(CONNECT_DEADLINE))?;
    let (mut count, begin) = (0_u32, Instant::now());
    while begin.elapsed() < each {
        let mut message = [0x2a; MESSAGE];
        message[..4].copy_from_slice(&count.to_be_bytes());
        socket.send_to(&message, address)?;
        let mut answer = [0; MESSAGE];
        let (length, from) = socket.recv_from(&mut answer)?;
        ensure!(from == address && answer[..length] == message, "another message came back, from {from}");
        count += 1;
    }
    Ok(f64::from(count) / begin.elapsed().as_secs_f64())
}

/// One echoed message over a new connection.
///
/// # Errors
/// When it isn't answered.
pub(crate) fn ask(address: SocketAddr) -> Result<()> {
    let mut stream = open(address)?;
    stream.write_all(&[ECHO])?;
    round_trip(&mut stream, 0)
}

/// Asks for `/` at `HOST:PORT` over HTTP until the first answer, looking the name up each time.
///
/// # Errors
/// When there is none within the deadline; the message is that of the last attempt.
pub(crate) fn await_answer(target: &str, deadline: Duration) -> Result<()> {
    let begin = Instant::now();
    loop {
        match first_answer(target) {
            Ok(()) => return Ok(()),
            Err(error) if begin.elapsed() > deadline => return Err(error),
            Err(_) => thread::sleep(RETRY),
        }
    }
}

fn first_answer(target: &str) -> Result<()> {
    let address = target.to_socket_addrs()?.next().context("the name has no address")?;
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(1))?;
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    stream.write_all(format!("GET / HTTP/1.1\r\nHost: {target}\r\nConnection: close\r\n\r\n").as_bytes())?;
    let mut head = [0; 12];
    stream.read_exact(&mut head)?;
    if !head.starts_with(b"HTTP/1.1 200") {
        bail!("{}", String::from_utf8_lossy(&head));
    }
    Ok(())
}
