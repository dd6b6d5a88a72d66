//! The servers behind the Services, and a client.

use std::net::{Ipv4Addr, SocketAddr};

use edgemesh_mesh::model::Protocol;
use socket2::{Domain, Socket, Type};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
};

use crate::rig::{Node, within};

/// A TCP server that reads all, then answers with its name and the number of bytes.
pub(crate) async fn server(name: &'static str) -> SocketAddr {
    server_at(SocketAddr::from(([127, 0, 0, 1], 0)), name).await
}

/// The same at a given address.
pub(crate) async fn server_at(address: SocketAddr, name: &'static str) -> SocketAddr {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_reuseaddr(true).unwrap();
    socket.bind(address).unwrap();
    let listener = socket.listen(1024).unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut connection, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut all = Vec::new();
                let _ = connection.read_to_end(&mut all).await;
                let _ = connection.write_all(format!("{name} {}", all.len()).as_bytes()).await;
            });
        }
    });
    address
}

/// An address at which nothing listens.
pub(crate) async fn nobody() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

/// A UDP server that sends back what it gets.
pub(crate) async fn udp_server() -> SocketAddr {
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

/// Sends `body`, ends the sending side, and reads the answer to its end.
pub(crate) async fn call(node: &Node, name: &str, body: &[u8]) -> std::io::Result<String> {
    call_from(Ipv4Addr::LOCALHOST, node, name, body).await
}

/// The same from a given address.
pub(crate) async fn call_from(client: Ipv4Addr, node: &Node, name: &str, body: &[u8]) -> std::io::Result<String> {
    let socket = tokio::net::TcpSocket::new_v4()?;
    socket.bind(SocketAddr::from((client, 0)))?;
    let mut connection = socket.connect(node.listener(name, Protocol::Tcp)).await?;
    connection.write_all(body).await?;
    connection.shutdown().await?;
    let mut answer = String::new();
    within("the answer", connection.read_to_string(&mut answer)).await?;
    Ok(answer)
}

/// An address at which connections are neither taken nor refused, while it is kept.
pub(crate) struct BlackHole {
    pub(crate) address: SocketAddr,
    _sockets: Vec<Socket>,
}

/// A server whose backlog is full: further connections hang, as when packets are dropped.
pub(crate) fn black_hole() -> BlackHole {
    let hole = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    hole.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    hole.listen(0).unwrap();
    let address = hole.local_addr().unwrap();
    let fillers = (0..4).map(|_| {
        let filler = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        filler.set_nonblocking(true).unwrap();
        let _ = filler.connect(&address);
        filler
    });
    let sockets: Vec<_> = fillers.collect();
    let address = address.as_socket().unwrap();
    BlackHole { address, _sockets: sockets.into_iter().chain([hole]).collect() }
}

/// A TCP server that greets and ends its sending side at once, and answers nothing; it tells how many bytes each client sent.
pub(crate) async fn greeting_server(greeting: &'static str) -> (SocketAddr, tokio::sync::mpsc::Receiver<usize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (tell, told) = tokio::sync::mpsc::channel(8);
    tokio::spawn(async move {
        while let Ok((mut connection, _)) = listener.accept().await {
            let tell = tell.clone();
            tokio::spawn(async move {
                let _ = connection.write_all(greeting.as_bytes()).await;
                let _ = connection.shutdown().await;
                let mut all = Vec::new();
                if connection.read_to_end(&mut all).await.is_ok() {
                    let _ = tell.send(all.len()).await;
                }
            });
        }
    });
    (address, told)
}

/// Closes a connection without a word to the other side, as a host does that loses its power.
pub(crate) fn vanish(connection: TcpStream) {
    nix::sys::socket::setsockopt(&connection, nix::sys::socket::sockopt::TcpRepair, &1).unwrap();
    drop(connection);
}
