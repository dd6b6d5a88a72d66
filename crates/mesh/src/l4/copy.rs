//! Copies the bytes of a connection both ways and keeps half-close: when one side ends its sending, the other side's end is
//! passed on, and the opposite direction goes on.

use std::{
    future::poll_fn,
    io,
    pin::Pin,
    sync::atomic::{AtomicU64, Ordering},
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, sleep_until},
};
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

/// When a copy ends though both streams are still open.
#[derive(Debug, Clone, Default)]
pub struct CopyLimits {
    /// After this time without a byte in either direction.
    pub idle: Option<Duration>,
    /// When this is cancelled.
    pub stop: CancellationToken,
}

/// How a copy ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyEnd {
    /// Both sides closed.
    Closed,
    /// Nothing moved for the idle time.
    Idle,
    /// It was told to stop.
    Stopped,
}

/// Copies between two streams until both directions have ended.
///
/// # Errors
/// When either stream fails. The caller should then reset both, so that neither peer takes a part for the whole.
pub async fn copy_both<A, B>(a: &mut A, b: &mut B, copied: &Copied, limits: &CopyLimits) -> io::Result<CopyEnd>
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let (mut forward, mut backward) = (Direction::default(), Direction::default());
    let copying = poll_fn(|cx| {
        let to_b = forward.poll(cx, a, b, &copied.forward)?;
        let to_a = backward.poll(cx, b, a, &copied.backward)?;
        if to_b.is_ready() && to_a.is_ready() { Poll::Ready(Ok(())) } else { Poll::Pending }
    });
    tokio::select! {
        result = copying => result.map(|()| CopyEnd::Closed),
        () = idle(copied, limits.idle) => Ok(CopyEnd::Idle),
        () = limits.stop.cancelled() => Ok(CopyEnd::Stopped),
    }
}

/// Returns when the counters stood still for the limit.
async fn idle(copied: &Copied, limit: Option<Duration>) {
    let Some(limit) = limit else { return std::future::pending().await };
    let total = || copied.forward() + copied.backward();
    let mut before = total();
    loop {
        sleep_until(Instant::now() + limit).await;
        let now = total();
        if now == before {
            return;
        }
        before = now;
    }
}

/// One direction: what was read and not yet written.
#[derive(Debug, Default)]
struct Direction {
    buffer: Vec<u8>,
    size: usize,
    start: usize,
    end: usize,
    ended: bool,
    closed: bool,
    unflushed: bool,
}

impl Direction {
    fn poll<R, W>(&mut self, cx: &mut Context<'_>, from: &mut R, to: &mut W, copied: &AtomicU64) -> Poll<io::Result<()>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        if self.closed {
            return Poll::Ready(Ok(()));
        }
        for _ in 0..BLOCKS_PER_TURN {
            if self.start == self.end && !self.ended {
                match self.poll_fill(cx, from) {
                    Poll::Ready(result) => result?,
                    Poll::Pending => {
                        if self.unflushed {
                            ready!(Pin::new(&mut *to).poll_flush(cx))?;
                            self.unflushed = false;
                        }
                        return Poll::Pending;
                    }
                }
            }
            while self.start < self.end {
                let written = ready!(Pin::new(&mut *to).poll_write(cx, &self.buffer[self.start..self.end]))?;
                if written == 0 {
                    return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
                }
                self.start += written;
                self.unflushed = true;
                copied.fetch_add(written as u64, Ordering::Relaxed);
            }
            if self.ended {
                ready!(Pin::new(&mut *to).poll_shutdown(cx))?;
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

    type Copying = tokio::task::JoinHandle<(io::Result<CopyEnd>, u64, u64)>;

    /// A client and a server with a copy between them.
    fn proxied(limits: CopyLimits) -> (DuplexStream, DuplexStream, Copying) {
        let (client, mut near) = duplex(8 * 1024);
        let (mut far, server) = duplex(8 * 1024);
        let copy = tokio::spawn(async move {
            let copied = Copied::default();
            let end = copy_both(&mut near, &mut far, &copied, &limits).await;
            (end, copied.forward(), copied.backward())
        });
        (client, server, copy)
    }

    #[tokio::test]
    async fn the_answer_arrives_after_the_client_closed_its_side() {
        let (mut client, mut server, copy) = proxied(CopyLimits::default());
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
        assert_eq!((end.unwrap(), forward, backward), (CopyEnd::Closed, 8, 10));
    }

    #[tokio::test]
    async fn much_data_in_both_directions_at_once_arrives_whole() {
        let (client, server, copy) = proxied(CopyLimits::default());
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
        assert_eq!((end.unwrap(), forward, backward), (CopyEnd::Closed, 3_000_000, 3_000_000));
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_connection_ends_at_the_idle_limit_and_a_busy_one_does_not() {
        let idle = CopyLimits { idle: Some(Duration::from_secs(60)), ..CopyLimits::default() };
        let (mut client, mut server, copy) = proxied(idle);
        for _ in 0..10 {
            tokio::time::sleep(Duration::from_secs(30)).await;
            client.write_all(b"x").await.unwrap();
            server.read_u8().await.unwrap();
            assert!(!copy.is_finished());
        }
        assert_eq!(copy.await.unwrap().0.unwrap(), CopyEnd::Idle);
    }

    #[tokio::test]
    async fn a_copy_stops_when_it_is_told_to() {
        let limits = CopyLimits::default();
        let (_client, _server, copy) = proxied(limits.clone());
        limits.stop.cancel();
        assert_eq!(copy.await.unwrap().0.unwrap(), CopyEnd::Stopped);
    }

    #[tokio::test]
    async fn a_failing_stream_fails_the_copy() {
        let (client, server, copy) = proxied(CopyLimits::default());
        drop(client);
        drop(server);
        // One side has ended and the other can't be written to, or both have ended: it must not hang.
        let _ = copy.await.unwrap();
    }
}
