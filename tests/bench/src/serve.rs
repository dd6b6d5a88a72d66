//! The servers at the far end of measurements: streams (discarded or echoed), short connections, HTTP; and a plain
//! TCP forwarder, which is what a relay is without a tunnel.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
};

use anyhow::{Context, Result, bail};

use crate::process::stay_on_first_cpu;

/// First byte of a connection that only sends: the server counts, and answers with the count at the end.
pub(crate) const DISCARD: u8 = b'D';
/// As [`DISCARD`], on the first CPU.
pub(crate) const DISCARD_ON_FIRST_CPU: u8 = b'O';
/// First byte of a connection on which every message of [`MESSAGE`] bytes comes back.
pub(crate) const ECHO: u8 = b'E';
/// Size of a message of the round-trip measurements.
pub(crate) const MESSAGE: usize = 64;
/// Size of the buffers of stream measurements.
pub(crate) const BUFFER: usize = 256 * 1024;

const HTTP_ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 13\r\n\r\nedgemesh mesh";

/// Serves until it is killed; `None` leaves a server out.
///
/// # Errors
/// When a port is taken, or none is given.
pub(crate) fn run(stream: Option<u16>, connect: Option<u16>, http: Option<u16>, datagrams: Option<u16>) -> Result<()> {
    let mut servers = Vec::new();
    if let Some(port) = datagrams {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).with_context(|| format!("UDP port {port}"))?;
        servers.push(thread::spawn(move || echo(&socket)));
    }
    for (port, serve) in [(stream, streams as fn(&TcpListener)), (connect, connections), (http, web)] {
        if let Some(port) = port {
            let listener = listen(port)?;
            servers.push(thread::spawn(move || serve(&listener)));
        }
    }
    match servers.pop() {
        Some(last) => drop(last.join()),
        None => bail!("nothing to serve"),
    }
    Ok(())
}

/// On all addresses of both families, where there are two.
fn listen(port: u16) -> Result<TcpListener> {
    let both = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port));
    both.or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))).with_context(|| format!("port {port}"))
}

/// Sends every datagram back.
fn echo(socket: &UdpSocket) {
    if stay_on_first_cpu().is_err() {
        return;
    }
    let mut message = [0; 2048];
    while let Ok((length, from)) = socket.recv_from(&mut message) {
        // A client that is gone needs no answer.
        drop(socket.send_to(&message[..length], from));
    }
}

/// Runs `answer` on a thread for each connection. A connection that breaks is the client's to report.
fn on_threads(listener: &TcpListener, answer: fn(TcpStream) -> io::Result<()>) {
    for stream in listener.incoming().flatten() {
        thread::spawn(move || answer(stream));
    }
}

fn streams(listener: &TcpListener) {
    on_threads(listener, answer_stream);
}

fn web(listener: &TcpListener) {
    on_threads(listener, answer_http);
}

/// One connection after the other on one thread, so that little but the connection itself costs anything.
fn connections(listener: &TcpListener) {
    if stay_on_first_cpu().is_err() {
        return;
    }
    for mut stream in listener.incoming().flatten() {
        let mut message = [0; MESSAGE];
        let answered = stream.read_exact(&mut message).and_then(|()| stream.write_all(&message));
        if answered.is_ok() {
            // The client ends it, with a reset.
            drop(stream.read(&mut message));
        }
    }
}

fn answer_stream(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut kind = [0];
    stream.read_exact(&mut kind)?;
    if kind[0] != DISCARD {
        stay_on_first_cpu().map_err(io::Error::other)?;
    }
    if kind[0] == ECHO {
        let mut message = [0; MESSAGE];
        loop {
            stream.read_exact(&mut message)?;
            stream.write_all(&message)?;
        }
    }
    let mut buffer = vec![0; BUFFER];
    let mut total = 0_u64;
    loop {
        match stream.read(&mut buffer)? {
            0 => break,
            count => total += count as u64,
        }
    }
    stream.write_all(&total.to_be_bytes())
}

fn answer_http(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = Vec::new();
    loop {
        line.clear();
        if reader.by_ref().take(16 * 1024).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        if line == b"\r\n" {
            stream.write_all(HTTP_ANSWER)?;
        }
    }
}

/// Copies every connection to `port` to a connection of its own to `target`, until it is killed.
///
/// # Errors
/// When the port is taken.
pub(crate) fn forward(port: u16, target: SocketAddr) -> Result<()> {
    for from in listen(port)?.incoming().flatten() {
        thread::spawn(move || {
            let to = TcpStream::connect(target)?;
            from.set_nodelay(true)?;
            to.set_nodelay(true)?;
            let (back_from, back_to) = (to.try_clone()?, from.try_clone()?);
            let back = thread::spawn(move || copy(back_from, back_to));
            copy(from, to)?;
            back.join().unwrap_or(Ok(()))
        });
    }
    Ok(())
}

fn copy(mut from: TcpStream, mut to: TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        match from.read(&mut buffer)? {
            0 => return to.shutdown(Shutdown::Write),
            count => to.write_all(&buffer[..count])?,
        }
    }
}
