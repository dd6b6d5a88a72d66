//! An open stream to an endpoint on another node: bytes, or the datagrams of one UDP flow.

use std::{
    io,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll, ready},
};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf, ReadHalf, WriteHalf};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt};

use crate::{
    blocks::Blocks,
    connections::{Connection, Place},
    metrics::{Metrics, OpenStream, StreamBytes},
    peer::Path,
};

/// Longest datagram, given by the length's type. UDP's own limit over IPv4 is 65,507 bytes.
pub const MAX_DATAGRAM: usize = u16::MAX as usize;

/// A stream through the tunnel. Shutting it down for writing leaves the other direction open, as with TCP; dropping it
/// closes both. A TCP connection whose stream is dropped before it was shut down is reset at the other side.
#[derive(Debug)]
pub struct TunnelStream {
    inner: Blocks<Compat<libp2p::Stream>>,
    connection: Arc<Connection>,
    path: Path,
    bytes: StreamBytes,
    open: OpenStream,
    /// None if the other side opened it.
    _place: Option<Place>,
}

impl TunnelStream {
    pub(crate) fn new(
        stream: libp2p::Stream,
        connection: Arc<Connection>,
        place: Option<Place>,
        path: Path,
        metrics: &Metrics,
    ) -> Self {
        Self {
            inner: Blocks::new(stream.compat()),
            connection,
            bytes: metrics.stream_bytes(&path),
            path,
            open: metrics.streams.begin(),
            _place: place,
        }
    }

    /// What follows goes in blocks, both ways.
    pub(crate) fn begin_blocks(&mut self) {
        self.inner.begin();
    }

    /// It is refused: nobody waits for more of it.
    pub(crate) fn carries_nothing(&mut self) {
        self.open.carries_nothing();
    }

    /// The path that it took when it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// For a stream that carries UDP: its two directions.
    pub fn into_datagrams(self) -> (DatagramSender, DatagramReceiver) {
        let (reader, writer) = tokio::io::split(self);
        (DatagramSender { writer, frame: BytesMut::new() }, DatagramReceiver { reader, buffer: BytesMut::new() })
    }
}

impl AsyncRead for TunnelStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.inner).poll_read(cx, buf))?;
        let read = (buf.filled().len() - before) as u64;
        self.bytes.received.inc_by(read);
        self.connection.received.fetch_add(read, Ordering::Relaxed);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for TunnelStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.inner).poll_write(cx, buf))?;
        self.bytes.sent.inc_by(written as u64);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// Sends a flow's datagrams.
#[derive(Debug)]
pub struct DatagramSender {
    writer: WriteHalf<TunnelStream>,
    frame: BytesMut,
}

impl DatagramSender {
    /// Sends one datagram. Not cancel safe: a dropped send leaves half a frame, so the flow must end with it.
    ///
    /// # Errors
    /// When it is longer than [`MAX_DATAGRAM`], or the stream broke.
    pub async fn send(&mut self, datagram: &[u8]) -> io::Result<()> {
        let length = u16::try_from(datagram.len()).map_err(|_| {
            io::Error::new(io::ErrorKind::InvalidInput, "the datagram is longer than its length field can say")
        })?;
        self.frame.clear();
        self.frame.extend_from_slice(&length.to_be_bytes());
        self.frame.extend_from_slice(datagram);
        self.writer.write_all(&self.frame).await?;
        self.writer.flush().await
    }
}

/// Receives a flow's datagrams.
#[derive(Debug)]
pub struct DatagramReceiver {
    reader: ReadHalf<TunnelStream>,
    buffer: BytesMut,
}

impl DatagramReceiver {
    /// The next datagram, or `None` when the other side ended the flow. Cancel safe.
    ///
    /// # Errors
    /// When the stream breaks, or ends within a datagram.
    pub async fn recv(&mut self) -> io::Result<Option<Bytes>> {
        loop {
            let mut missing = 2;
            if let Some(&[high, low]) = self.buffer.first_chunk::<2>() {
                let end = 2 + usize::from(u16::from_be_bytes([high, low]));
                if self.buffer.len() >= end {
                    let mut frame = self.buffer.split_to(end);
                    return Ok(Some(frame.split_off(2).freeze()));
                }
                missing = end - self.buffer.len();
            }
            self.buffer.reserve(missing.max(2048));
            if self.reader.read_buf(&mut self.buffer).await? == 0 {
                if self.buffer.is_empty() {
                    return Ok(None);
                }
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}
