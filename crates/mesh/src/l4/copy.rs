//! Copies the bytes of a connection both ways and keeps half-close: when one side ends its sending, the other side's end is
//! passed on, and the opposite direction goes on.

use std::{
    future::poll_fn,
    io,
    pin::Pin,
    sync::atomic::{AtomicU64, Ordering},
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::sync::CancellationToken;

/// A direction starts small, since most connections carry little, and grows when reads fill its buffer.
const BUFFER_SIZES: [usize; 3] = [1024, 16 * 1024, 64 * 1024];
/// Blocks copied before others get their turn, for streams that are always ready.
const BLOCKS_PER_TURN: usize = 32;

/// Bytes copied so far; may be read while the copy runs.
#[derive(Debug, Default)]
pub struct Copied {
    forward: AtomicU64,
    backward: AtomicU64,
}

impl Copied {
    /// Bytes from the first to the second stream.
    pub fn forward(&self) -> u64 {
        self.forward.load(Ordering::Relaxed)
    }

    /// Bytes from the second to the first stream.
    pub fn backward(&self) -> u64 {
        self.backward.load(Ordering::Relaxed)
    }
}

/// One of the two streams of a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The first.
    First,
    /// The second.
    Second,
}

/// How a copy ended.
#[derive(Debug)]
pub enum CopyEnd {
    /// Both sides closed.
    Closed,
    /// It was told to stop.
    Stopped,
    /// A stream failed.
    Broken {
        /// Which.
        side: Side,
        /// How.
        error: io::Error,
    },
}

impl Side {
    fn other(self) -> Self {
        match self {
            Self::First => Self::Second,
            Self::Second => Self::First,
        }
    }

    fn broken(self) -> impl Fn(io::Error) -> CopyEnd {
        move |error| CopyEnd::Broken { side: self, error }
    }
}

impl CopyEnd {
    /// Whether the stream of a side has to be reset, so that its peer doesn't take a part for the whole: it was cut off by this
    /// end, and its peer hasn't reset it itself.
    pub fn cuts_off(&self, side: Side) -> bool {
        match self {
            Self::Closed => false,
            Self::Stopped => true,
            Self::Broken { side: broken, error } => {
                side != *broken || !matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
            }
        }
    }
}

/// Copies between two streams until both directions have ended, either stream fails, or `stop` is cancelled. The caller should then reset those that
/// are [cut off](CopyEnd::cuts_off).
pub async fn copy_both<A, B>(a: &mut A, b: &mut B, copied: &Copied, stop: &CancellationToken) -> CopyEnd
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let (mut forward, mut backward) = (Direction::from(Side::First), Direction::from(Side::Second));
    let copying = poll_fn(|cx| {
        let to_b = forward.poll(cx, a, b, &copied.forward)?;
        let to_a = backward.poll(cx, b, a, &copied.backward)?;
        if to_b.is_ready() && to_a.is_ready() { Poll::Ready(Ok(())) } else { Poll::Pending }
    });
    tokio::select! {
        result = copying => result.err().unwrap_or(CopyEnd::Closed),
        () = stop.cancelled() => CopyEnd::Stopped,
    }
}

/// One direction: what was read and not yet written.
#[derive(Debug)]
struct Direction {
    from: Side,
    buffer: Vec<u8>,
    size: usize,
    start: usize,
    end: usize,
    ended: bool,
    closed: bool,
    unflushed: bool,
}

impl Direction {
    fn from(from: Side) -> Self {
        Self { from, buffer: Vec::new(), size: 0, start: 0, end: 0, ended: false, closed: false, unflushed: false }
    }

    fn poll<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut R,
        to: &mut W,
        copied: &AtomicU64,
    ) -> Poll<Result<(), CopyEnd>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        if self.closed {
            return Poll::Ready(Ok(()));
        }
        let (reading, writing) = (self.from.broken(), self.from.other().broken());
        for _ in 0..BLOCKS_PER_TURN {
            if self.start == self.end && !self.ended {
                match self.poll_fill(cx, from) {
                    Poll::Ready(result) => result.map_err(&reading)?,
                    Poll::Pending => {
                        if self.unflushed {
                            ready!(Pin::new(&mut *to).poll_flush(cx)).map_err(&writing)?;
                            self.unflushed = false;
                        }
                        return Poll::Pending;
                    }
                }
            }
            while self.start < self.end {
                let written = ready!(Pin::new(&mut *to).poll_write(cx, &self.buffer[self.start..self.end]));
                let written = written.map_err(&writing)?;
                if written == 0 {
                    return Poll::Ready(Err(writing(io::ErrorKind::WriteZero.into())));
                }
                self.start += written;
                self.unflushed = true;
                copied.fetch_add(written as u64, Ordering::Relaxed);
            }
            if self.ended {
                ready!(Pin::new(&mut *to).poll_shutdown(cx)).map_err(&writing)?;
                self.closed = true;
                self.buffer = Vec::new();
                return Poll::Ready(Ok(()));
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn poll_fill<R: AsyncRead + Unpin>(&mut self, cx: &mut Context<'_>, from: &mut R) -> Poll<io::Result<()>> {
        let full = self.end == self.buffer.len();
        if full && let Some(larger) = BUFFER_SIZES.get(self.size) {
            self.size += 1;
            self.buffer.resize(*larger, 0);
        }
        let mut space = ReadBuf::new(&mut self.buffer);
        ready!(Pin::new(from).poll_read(cx, &mut space))?;
        self.start = 0;
        self.end = space.filled().len();
        self.ended = self.end == 0;
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    use super::*;

    type Copying = tokio::task::JoinHandle<(CopyEnd, u64, u64)>;

    /// A client and a server with a copy between them.
    fn proxied(stop: CancellationToken) -> (DuplexStream, DuplexStream, Copying) {
        let (client, mut near) = duplex(8 * 1024);
        let (mut far, server) = duplex(8 * 1024);
        let copy = tokio::spawn(async move {
            let copied = Copied::default();
            let end = copy_both(&mut near, &mut far, &copied, &stop).await;
            (end, copied.forward(), copied.backward())
        });
        (client, server, copy)
    }

    #[tokio::test]
    async fn the_answer_arrives_after_the_client_closed_its_side() {
        let (mut client, mut server, copy) = proxied(CancellationToken::new());
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        let mut question = Vec::new();
        server.read_to_end(&mut question).await.unwrap();
        assert_eq!(question, b"question");
        server.write_all(b"the answer").await.unwrap();
        drop(server);
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"the answer");
        let (end, forward, backward) = copy.await.unwrap();
        assert!(matches!(end, CopyEnd::Closed), "{end:?}");
        assert_eq!((forward, backward), (8, 10));
    }

    #[tokio::test]
    async fn much_data_in_both_directions_at_once_arrives_whole() {
        let (client, server, copy) = proxied(CancellationToken::new());
        let data: Vec<u8> = (0..3_000_000u32).map(|at| at.to_le_bytes()[at as usize % 4]).collect();
        let exchange = |stream: DuplexStream| {
            let data = data.clone();
            async move {
                let (mut reader, mut writer) = tokio::io::split(stream);
                let sent = data.clone();
                let sending = tokio::spawn(async move {
                    writer.write_all(&sent).await.unwrap();
                    writer.shutdown().await.unwrap();
                });
                let mut received = Vec::new();
                reader.read_to_end(&mut received).await.unwrap();
                sending.await.unwrap();
                assert!(received == data);
            }
        };
        tokio::join!(exchange(client), exchange(server));
        let (end, forward, backward) = copy.await.unwrap();
        assert!(matches!(end, CopyEnd::Closed), "{end:?}");
        assert_eq!((forward, backward), (3_000_000, 3_000_000));
    }

    #[tokio::test]
    async fn a_copy_stops_when_it_is_told_to() {
        let stop = CancellationToken::new();
        let (_client, _server, copy) = proxied(stop.clone());
        stop.cancel();
        assert!(matches!(copy.await.unwrap().0, CopyEnd::Stopped));
    }

    #[tokio::test]
    async fn a_failing_stream_fails_the_copy() {
        let (client, server, copy) = proxied(CancellationToken::new());
        drop(client);
        drop(server);
        // One side has ended and the other can't be written to, or both have ended: it must not hang.
        let _ = copy.await.unwrap();
    }

    /// A stream that can't be read, or only not be written.
    struct Broken {
        reads: bool,
        kind: io::ErrorKind,
    }

    impl AsyncRead for Broken {
        fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            if self.reads { Poll::Pending } else { Poll::Ready(Err(self.kind.into())) }
        }
    }

    impl AsyncWrite for Broken {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
            Poll::Ready(Err(self.kind.into()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn a_stream_that_its_peer_reset_is_told_from_the_one_that_is_still_open() {
        use io::ErrorKind::{BrokenPipe, ConnectionReset, TimedOut};
        let (copied, stop) = (Copied::default(), CancellationToken::new());
        for (reads, kind, was_reset) in
            [(false, ConnectionReset, true), (true, BrokenPipe, true), (false, TimedOut, false)]
        {
            for side in [Side::First, Side::Second] {
                let mut broken = Broken { reads, kind };
                let (mut peer, mut whole) = duplex(64);
                peer.write_all(b"to the broken one").await.unwrap();
                let end = match side {
                    Side::First => copy_both(&mut broken, &mut whole, &copied, &stop).await,
                    Side::Second => copy_both(&mut whole, &mut broken, &copied, &stop).await,
                };
                assert_eq!((end.cuts_off(side), end.cuts_off(side.other())), (!was_reset, true), "{end:?}");
            }
        }
    }
}
