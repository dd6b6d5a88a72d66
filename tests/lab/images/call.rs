//! The lab's client: one call over HTTP, TCP or UDP, and what came back. The demo image's busybox can't be used for it: its wget
//! asks the static C library for service names, which ends it, and its nc knows no UDP.
//!
//! usage: call http://HOST[:PORT]/PATH     prints the body; succeeds with status 200
//!        call tcp://HOST:PORT             says hello and prints the first line of the answer
//!        call udp://HOST:PORT             says hello and prints the answer

use std::{
    error::Error,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream, ToSocketAddrs, UdpSocket},
    time::Duration,
};

const DEADLINE: Duration = Duration::from_secs(5);
const MAX_ANSWER: u64 = 64 << 20;

fn main() -> Result<(), Box<dyn Error>> {
    let url = std::env::args().nth(1).ok_or("usage: call http://HOST[:PORT]/PATH | tcp://HOST:PORT | udp://HOST:PORT")?;
    let (scheme, rest) = url.split_once("://").ok_or("a URL begins with http://, tcp:// or udp://")?;
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let (host, port) = authority.rsplit_once(':').unwrap_or((authority, "80"));
    let address = (host, port.parse::<u16>()?).to_socket_addrs()?.find(SocketAddr::is_ipv4).ok_or("no address")?;
    match scheme {
        "http" => http(address, authority, path),
        "tcp" => tcp(address),
        "udp" => udp(address),
        _ => Err("only http://, tcp:// and udp:// are spoken here".into()),
    }
}

fn connect(address: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, DEADLINE)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    Ok(stream)
}

fn http(address: SocketAddr, authority: &str, path: &str) -> Result<(), Box<dyn Error>> {
    let mut stream = connect(address)?;
    write!(stream, "GET /{path} HTTP/1.1\r\nHost: {authority}\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.take(MAX_ANSWER).read_to_end(&mut answer)?;
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n").ok_or("the answer has no head")?;
    let status = String::from_utf8_lossy(&answer[..end]).lines().next().unwrap_or_default().to_owned();
    std::io::stdout().write_all(&answer[end + 4..])?;
    if status.split(' ').nth(1) == Some("200") { Ok(()) } else { Err(status.into()) }
}

fn tcp(address: SocketAddr) -> Result<(), Box<dyn Error>> {
    let mut stream = connect(address)?;
    stream.write_all(b"hello\n")?;
    let mut line = String::new();
    BufReader::new(stream.take(MAX_ANSWER)).read_line(&mut line)?;
    print!("{line}");
    if line.is_empty() { Err("no answer".into()) } else { Ok(()) }
}

fn udp(address: SocketAddr) -> Result<(), Box<dyn Error>> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_read_timeout(Some(DEADLINE / 4))?;
    socket.connect(address)?;
    let mut answer = [0; 65536];
    // Datagrams may be lost: who needs an answer asks again.
    for _ in 0..4 {
        socket.send(b"hello\n")?;
        if let Ok(length) = socket.recv(&mut answer) {
            std::io::stdout().write_all(&answer[..length])?;
            return Ok(());
        }
    }
    Err("no answer".into())
}
