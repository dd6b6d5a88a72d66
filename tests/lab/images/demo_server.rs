//! The lab's application: answers HTTP, plain TCP and UDP with the name of the pod and node that answered.
//!
//! usage: demo-server [--http PORT] [--tcp PORT] [--udp PORT] [--linger SECONDS] [--address IP]...
//!        (8080, 7000, 7000, 0 and all IPv4 addresses by default; `--address ::` is all addresses of both families)
//!
//! A UDP server at all addresses of a host answers from the one that is nearest to the client, which need not be the one that was
//! called: give it one there. With `--linger` it serves on after SIGTERM for that long, as servers do that shut down slowly.
//!
//! HTTP: any path gives a line of JSON; `/bytes/N` gives N bytes, `/slow/MS` answers after MS milliseconds. TCP: the first line is the greeting,
//! then everything is echoed. UDP: each datagram comes back behind the greeting. The greeting is `POD NODE CLIENT`, the client as
//! the server sees it.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::Duration,
};

const MAX_BYTES: usize = 1 << 30;
const SIGTERM: i32 = 15;
const SIGALRM: i32 = 14;
/// For how many seconds it serves on after SIGTERM.
static LINGER: AtomicU32 = AtomicU32::new(0);

unsafe extern "C" {
    /// signal(2)
    safe fn signal(number: i32, handler: extern "C" fn(i32)) -> usize;
    /// _exit(2), which a signal handler may call
    safe fn _exit(status: i32) -> !;
    /// alarm(2), which a signal handler may call too
    safe fn alarm(seconds: u32) -> u32;
}

/// The first process of a container has no default action for SIGTERM: without a handler each deletion would take the
/// whole grace period.
extern "C" fn terminate(_signal: i32) {
    match LINGER.load(Ordering::Relaxed) {
        0 => _exit(0),
        seconds => {
            alarm(seconds);
        }
    }
}

extern "C" fn end(_signal: i32) {
    _exit(0)
}

fn main() -> std::io::Result<()> {
    signal(SIGTERM, terminate);
    signal(SIGALRM, end);
    let mut ports = [("--http", 8080_u16), ("--tcp", 7000), ("--udp", 7000), ("--linger", 0)];
    let mut arguments = std::env::args().skip(1);
    let mut addresses = Vec::new();
    while let Some(flag) = arguments.next() {
        if flag == "--address" {
            addresses.extend(arguments.next());
            continue;
        }
        let port = arguments.next().and_then(|value| value.parse().ok());
        match (ports.iter_mut().find(|(name, _)| *name == flag), port) {
            (Some(entry), Some(port)) => entry.1 = port,
            _ => {
                eprintln!("usage: demo-server [--http PORT] [--tcp PORT] [--udp PORT] [--linger SECONDS] [--address IP]...");
                std::process::exit(64);
            }
        }
    }
    LINGER.store(ports[3].1.into(), Ordering::Relaxed);
    if addresses.is_empty() {
        addresses.push("0.0.0.0".to_owned());
    }
    let mut last = None;
    for address in &addresses {
        let http = TcpListener::bind((address.as_str(), ports[0].1))?;
        let tcp = TcpListener::bind((address.as_str(), ports[1].1))?;
        let udp = UdpSocket::bind((address.as_str(), ports[2].1))?;
        thread::spawn(move || serve(http, answer_http));
        thread::spawn(move || serve(tcp, answer_tcp));
        last = Some(thread::spawn(move || answer_udp(&udp)));
    }
    last.map_or(Ok(()), |thread| thread.join().unwrap_or(Ok(())))
}

fn answer_udp(udp: &UdpSocket) -> std::io::Result<()> {
    let mut buffer = vec![0; 65536];
    loop {
        let (length, from) = udp.recv_from(&mut buffer)?;
        let mut answer = greeting(from).into_bytes();
        answer.extend_from_slice(&buffer[..length.min(65507 - answer.len())]);
        // A client that went away is its own matter.
        if let Err(error) = udp.send_to(&answer, from) {
            eprintln!("udp answer to {from}: {error}");
        }
    }
}

fn serve(listener: TcpListener, answer: fn(TcpStream) -> std::io::Result<()>) {
    for stream in listener.incoming() {
        match stream {
            Ok(stream) => {
                thread::spawn(move || answer(stream));
            }
            Err(error) => eprintln!("accept: {error}"),
        }
    }
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_default()
}

fn pod() -> String {
    let name = variable("POD_NAME");
    if name.is_empty() { variable("HOSTNAME") } else { name }
}

/// `POD NODE CLIENT` and a line end.
fn greeting(client: SocketAddr) -> String {
    format!("{} {} {}\n", pod(), variable("NODE_NAME"), plain(client))
}

/// An IPv4 address that came in mapped form is written as one.
fn plain(client: SocketAddr) -> SocketAddr {
    SocketAddr::new(client.ip().to_canonical(), client.port())
}

fn answer_tcp(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    stream.write_all(greeting(stream.peer_addr()?).as_bytes())?;
    let mut from = stream.try_clone()?;
    std::io::copy(&mut from, &mut stream)?;
    stream.shutdown(std::net::Shutdown::Write)
}

fn answer_http(stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let peer = plain(stream.peer_addr()?);
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = String::new();
        if reader.by_ref().take(8192).read_line(&mut line)? == 0 {
            return Ok(());
        }
        let path = line.split(' ').nth(1).unwrap_or("/").to_owned();
        let method = line.split(' ').next().unwrap_or("").to_owned();
        let (mut host, mut length, mut close) = (String::new(), 0_usize, false);
        loop {
            let mut header = String::new();
            if reader.by_ref().take(8192).read_line(&mut header)? <= 2 {
                break;
            }
            let Some((name, value)) = header.trim_end().split_once(':') else { continue };
            match name.to_ascii_lowercase().as_str() {
                "host" => host = value.trim().to_owned(),
                "content-length" => length = value.trim().parse().unwrap_or(0),
                "connection" => close = value.trim().eq_ignore_ascii_case("close"),
                _ => {}
            }
        }
        std::io::copy(&mut reader.by_ref().take(length as u64), &mut std::io::sink())?;
        let mut parts = path.trim_start_matches('/').splitn(2, '/');
        let body = match (parts.next(), parts.next().and_then(|n| n.parse::<usize>().ok())) {
            (Some("bytes"), Some(count)) => vec![b'x'; count.min(MAX_BYTES)],
            (first, second) => {
                if let (Some("slow"), Some(ms)) = (first, second) {
                    thread::sleep(Duration::from_millis(ms.min(60_000) as u64));
                }
                format!(
                    "{{\"pod\":\"{}\",\"node\":\"{}\",\"method\":\"{method}\",\"path\":\"{path}\",\"host\":\"{host}\",\"client\":\"{peer}\"}}\n",
                    pod(),
                    variable("NODE_NAME")
                )
                .into_bytes()
            }
        };
        let head = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\nX-Pod: {}\r\n\r\n",
            body.len(),
            pod()
        );
        let stream = reader.get_mut();
        stream.write_all(&[head.as_bytes(), &body].concat())?;
        if close {
            return stream.shutdown(std::net::Shutdown::Both);
        }
    }
}
