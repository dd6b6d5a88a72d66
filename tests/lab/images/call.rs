//! The lab's client: calls over HTTP, TCP or UDP, and what came back. The demo image's busybox can't be used for it: its wget
//! asks the static C library for service names, which ends it, and its nc knows no UDP.
//!
//! usage: call [OPTIONS] URL...
//!        HOST is a name, of which IPv4 addresses come first, an address, or an IPv6 address in brackets
//!        http://HOST[:PORT]/PATH     prints the body; succeeds with status 200
//!        tcp://HOST:PORT             says hello and prints the first line of the answer
//!        udp://HOST:PORT             says hello and prints the answer
//!
//!   --count N       calls each URL N times and prints one line a call: the first of the answer, or `error: REASON`
//!   --every MS      waits between two calls
//!   --from PORT     local port of UDP sockets
//!   --keep          one connection for all calls (TCP and UDP). A UDP socket is kept whatever happens to its datagrams, as programs
//!                   do, until the system ends it
//!   --size BYTES    sends that many bytes in place of a greeting, and checks that all came back (TCP and UDP)
//!   --timeout MS    how long a call may take (5000)

use std::{
    error::Error,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream, ToSocketAddrs, UdpSocket},
    process::ExitCode,
    thread,
    time::Duration,
};

const MAX_ANSWER: u64 = 64 << 20;
const USAGE: &str =
    "usage: call [--count N] [--every MS] [--from PORT] [--keep] [--size BYTES] [--timeout MS] http://HOST[:PORT]/PATH | tcp://HOST:PORT | udp://HOST:PORT ...";

type Answer = Result<Vec<u8>, Box<dyn Error>>;

struct Options {
    count: Option<u64>,
    every: Duration,
    from: u16,
    keep: bool,
    size: usize,
    deadline: Duration,
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether all calls succeeded.
fn run() -> Result<bool, Box<dyn Error>> {
    let mut options =
        Options { count: None, every: Duration::ZERO, from: 0, keep: false, size: 0, deadline: Duration::from_secs(5) };
    let mut urls = Vec::new();
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut number = || words.next().and_then(|value| value.parse::<u64>().ok()).ok_or(USAGE);
        match word.as_str() {
            "--count" => options.count = Some(number()?),
            "--every" => options.every = Duration::from_millis(number()?),
            "--from" => options.from = u16::try_from(number()?)?,
            "--keep" => options.keep = true,
            "--size" => options.size = usize::try_from(number()?)?,
            "--timeout" => options.deadline = Duration::from_millis(number()?),
            _ => urls.push(word),
        }
    }
    if urls.is_empty() {
        return Err(USAGE.into());
    }
    let mut kept = Kept::default();
    let mut all_good = true;
    let rounds = options.count.unwrap_or(1);
    for round in 0..rounds {
        for (index, url) in urls.iter().enumerate() {
            if round + index as u64 > 0 {
                thread::sleep(options.every);
            }
            let answer = call(url, &options, &mut kept);
            let mut out = std::io::stdout().lock();
            match (answer, options.count) {
                (Ok(body), None) => out.write_all(&body)?,
                (Ok(body), Some(_)) => {
                    let line = body.split(|byte| *byte == b'\n').next().unwrap_or_default();
                    out.write_all(&[line, b"\n"].concat())?;
                }
                (Err(error), None) => return Err(error),
                (Err(error), Some(_)) => {
                    all_good = false;
                    writeln!(out, "error: {error}")?;
                }
            }
            out.flush()?;
        }
    }
    Ok(all_good)
}

/// What goes on from call to call.
#[derive(Default)]
struct Kept {
    /// With the greeting that began it.
    tcp: Option<(BufReader<TcpStream>, Vec<u8>)>,
    udp: Option<UdpSocket>,
}

fn call(url: &str, options: &Options, kept: &mut Kept) -> Answer {
    let (scheme, rest) = url.split_once("://").ok_or("a URL begins with http://, tcp:// or udp://")?;
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, port),
        _ => (authority, "80"),
    };
    let found: Vec<_> = (host.trim_matches(['[', ']']), port.parse::<u16>()?).to_socket_addrs()?.collect();
    let address = *found.iter().find(|address| address.is_ipv4()).or(found.first()).ok_or("no address")?;
    match scheme {
        "http" => http(address, authority, path, options),
        "tcp" => tcp(address, options, &mut kept.tcp),
        "udp" => udp(address, options, &mut kept.udp),
        _ => Err("only http://, tcp:// and udp:// are spoken here".into()),
    }
}

fn connect(address: SocketAddr, options: &Options) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, options.deadline)?;
    stream.set_read_timeout(Some(options.deadline))?;
    Ok(stream)
}

fn http(address: SocketAddr, authority: &str, path: &str, options: &Options) -> Answer {
    let mut stream = connect(address, options)?;
    write!(stream, "GET /{path} HTTP/1.1\r\nHost: {authority}\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.take(MAX_ANSWER).read_to_end(&mut answer)?;
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n").ok_or("the answer has no head")?;
    let status = String::from_utf8_lossy(&answer[..end]).lines().next().unwrap_or_default().to_owned();
    let body = answer.split_off(end + 4);
    if status.split(' ').nth(1) == Some("200") { Ok(body) } else { Err(status.into()) }
}

/// What is sent, and whether it must come back.
fn message(options: &Options) -> Vec<u8> {
    if options.size > 0 { vec![b'x'; options.size] } else { b"hello\n".to_vec() }
}

fn tcp(address: SocketAddr, options: &Options, kept: &mut Option<(BufReader<TcpStream>, Vec<u8>)>) -> Answer {
    let (mut reader, mut greeting) = match kept.take() {
        Some(connection) => connection,
        None => (BufReader::new(connect(address, options)?), Vec::new()),
    };
    let message = message(options);
    reader.get_mut().write_all(&message)?;
    if greeting.is_empty() {
        reader.by_ref().take(MAX_ANSWER).read_until(b'\n', &mut greeting)?;
    }
    let mut back = vec![0; message.len()];
    reader.read_exact(&mut back)?;
    if back != message {
        return Err("something else came back".into());
    }
    if options.keep {
        *kept = Some((reader, greeting.clone()));
    }
    Ok(greeting)
}

fn udp(address: SocketAddr, options: &Options, kept: &mut Option<UdpSocket>) -> Answer {
    let socket = match kept.take() {
        Some(socket) => socket,
        None => {
            let any = if address.is_ipv4() { "0.0.0.0" } else { "::" };
            let socket = UdpSocket::bind((any, options.from))?;
            socket.set_read_timeout(Some(options.deadline / 4))?;
            socket.connect(address)?;
            socket
        }
    };
    let answer = ask(&socket, options);
    // One that the system ended has no peer any more.
    if options.keep && socket.peer_addr().is_ok() {
        *kept = Some(socket);
    }
    answer
}

fn ask(socket: &UdpSocket, options: &Options) -> Answer {
    let message = message(options);
    let mut answer = vec![0; 65536];
    let mut refused = None;
    // Datagrams may be lost: who needs an answer asks again.
    for _ in 0..4 {
        socket.send(&message)?;
        match socket.recv(&mut answer) {
            Ok(length) => {
                answer.truncate(length);
                if options.size > 0 && !answer.ends_with(&message) {
                    return Err(format!("{length} bytes came back of {}", message.len()).into());
                }
                return Ok(answer);
            }
            Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {}
            // Said about an earlier datagram, perhaps: the next one finds out.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused && refused.is_none() => {
                thread::sleep(options.deadline / 16);
                refused = Some(error);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Err(refused.map_or_else(|| "no answer".into(), Into::into))
}
