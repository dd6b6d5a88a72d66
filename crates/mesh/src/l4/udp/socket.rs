//! A connected socket as one end of a flow.

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
