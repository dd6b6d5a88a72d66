//! The bytes of a TCP connection in blocks, each after its length, with an empty one as the mark of its end. So a connection that
//! was cut off is told from one that ended: a QUIC stream that is dropped ends like one that is shut down, and libp2p can't
//! reset it.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Bytes of a length, big endian.
const LENGTH: usize = 4;
/// Up to this size a block is copied behind its length, so that both are in one packet. Larger ones are not copied.
const COPIED: usize = 4096;

/// A stream that carries blocks from [`Blocks::begin`] on; until then bytes pass as they are. One that is dropped before it is
/// shut down reads as a reset at the other side.
#[derive(Debug)]
pub(crate) struct Blocks<S> {
    stream: S,
    begun: bool,
    incoming: Incoming,
    outgoing: Outgoing,
}

/// The state of reading.
#[derive(Debug, Default)]
struct Incoming {
    length: [u8; LENGTH],
    /// Bytes of the length that are there.
    known: usize,
    /// What is still to come of the block.
    left: usize,
    ended: bool,
}

/// The state of writing.
#[derive(Debug, Default)]
struct Outgoing {
    /// What goes first.
    staged: BytesMut,
    /// What is still to be given of a block whose length has been staged.
    left: usize,
    ended: bool,
}

impl<S> Blocks<S> {
    pub(crate) fn new(stream: S) -> Self {
        Self { stream, begun: false, incoming: Incoming::default(), outgoing: Outgoing::default() }
    }

    /// What follows comes and goes in blocks.
    pub(crate) fn begin(&mut self) {
        self.begun = true;
    }
}

impl Incoming {
    /// Takes the lengths out of bytes that have arrived, moves what they announce to the front, and gives its size.
    fn unpack(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let (mut from, mut to) = (0, 0);
        while from < bytes.len() {
            if self.ended {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "bytes after the end"));
            }
            if self.left == 0 {
                self.length[self.known] = bytes[from];
                self.known += 1;
                from += 1;
                if self.known == LENGTH {
                    self.known = 0;
                    self.left = u32::from_be_bytes(self.length) as usize;
                    self.ended = self.left == 0;
                }
            } else {
                let size = self.left.min(bytes.len() - from);
                bytes.copy_within(from..from + size, to);
                self.left -= size;
                from += size;
                to += size;
            }
        }
        Ok(to)
    }
}

impl Outgoing {
    fn poll_drain<S: AsyncWrite + Unpin>(&mut self, stream: &mut S, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.staged.is_empty() {
            let written = ready!(Pin::new(&mut *stream).poll_write(cx, &self.staged))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.staged.advance(written);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Blocks<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.begun {
            return Pin::new(&mut this.stream).poll_read(cx, buf);
        }
        let before = buf.filled().len();
        while !this.incoming.ended && buf.remaining() > 0 {
            ready!(Pin::new(&mut this.stream).poll_read(cx, buf))?;
            let arrived = &mut buf.filled_mut()[before..];
            if arrived.is_empty() {
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::ConnectionReset, "cut off by the other side")));
            }
            let size = this.incoming.unpack(arrived);
            // Nothing of it has been read when there is an error.
            buf.set_filled(before + size.as_ref().copied().unwrap_or(0));
            if size? > 0 {
                break;
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Blocks<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let Self { stream, begun, outgoing, .. } = self.get_mut();
        if !*begun {
            return Pin::new(stream).poll_write(cx, buf);
        }
        ready!(outgoing.poll_drain(stream, cx))?;
        if buf.is_empty() {
            return Poll::Ready(Ok(0));
        }
        if outgoing.left == 0 {
            let length = u32::try_from(buf.len()).unwrap_or(u32::MAX);
            outgoing.staged.extend_from_slice(&length.to_be_bytes());
            if buf.len() <= COPIED {
                outgoing.staged.extend_from_slice(buf);
                // What the stream doesn't take yet goes before anything else.
                return match outgoing.poll_drain(stream, cx) {
                    Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
                    Poll::Ready(Ok(())) | Poll::Pending => Poll::Ready(Ok(buf.len())),
                };
            }
            outgoing.left = length as usize;
            ready!(outgoing.poll_drain(stream, cx))?;
        }
        let part = &buf[..buf.len().min(outgoing.left)];
        let written = ready!(Pin::new(stream).poll_write(cx, part))?;
        outgoing.left -= written;
        Poll::Ready(Ok(written))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self { stream, outgoing, .. } = self.get_mut();
        ready!(outgoing.poll_drain(stream, cx))?;
        Pin::new(stream).poll_flush(cx)
    }

    /// # Errors
    /// When a write has been given up in the middle of its block, whose rest would be missing.
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self { stream, begun, outgoing, .. } = self.get_mut();
        if !*begun {
            return Pin::new(stream).poll_shutdown(cx);
        }
        if outgoing.left > 0 {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidInput, "a block has not been written whole")));
        }
        if !outgoing.ended {
            outgoing.ended = true;
            outgoing.staged.extend_from_slice(&[0; LENGTH]);
        }
        ready!(outgoing.poll_drain(stream, cx))?;
        // The other side may have read the mark and dropped its stream before this one is closed: that is no failure.
        drop(ready!(Pin::new(stream).poll_shutdown(cx)));
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, RngCore, SeedableRng, rngs::StdRng};
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    use super::*;

    /// Two ends with a stream of this buffer between them.
    fn ends(buffer: usize) -> (Blocks<DuplexStream>, Blocks<DuplexStream>) {
        let (one, other) = duplex(buffer);
        let (mut one, mut other) = (Blocks::new(one), Blocks::new(other));
        one.begin();
        other.begin();
        (one, other)
    }

    #[tokio::test]
    async fn writes_of_any_size_arrive_whole_through_streams_that_take_and_give_parts() {
        let mut random = StdRng::seed_from_u64(7);
        for buffer in [1, 3, 4, 5, 64, 5000, 100_000] {
            let (mut writer, mut reader) = ends(buffer);
            let mut data = vec![0; 60_000];
            random.fill_bytes(&mut data);
            let sent = data.clone();
            let mut sizes = random.clone();
            let writing = tokio::spawn(async move {
                let mut rest = sent.as_slice();
                while !rest.is_empty() {
                    let size = sizes.random_range(1..=[1, 10, 2 * COPIED][rest.len() % 3]).min(rest.len());
                    writer.write_all(&rest[..size]).await.unwrap();
                    rest = &rest[size..];
                    if size % 5 == 0 {
                        writer.flush().await.unwrap();
                    }
                }
                writer.shutdown().await.unwrap();
                writer
            });
            let mut received = Vec::new();
            let mut part = vec![0; 3000];
            loop {
                let wanted = random.random_range(1..part.len());
                match reader.read(&mut part[..wanted]).await.unwrap() {
                    0 => break,
                    size => received.extend_from_slice(&part[..size]),
                }
            }
            assert!(received == data, "{buffer}");
            assert_eq!(reader.read(&mut part).await.unwrap(), 0, "it stays at its end");
            // The other direction is open still.
            let mut writer = writing.await.unwrap();
            let answering = async {
                reader.write_all(b"answer").await.unwrap();
                reader.shutdown().await.unwrap();
            };
            let mut answer = String::new();
            let (read, ()) = tokio::join!(writer.read_to_string(&mut answer), answering);
            assert_eq!((read.unwrap(), answer.as_str()), (6, "answer"));
        }
    }

    #[tokio::test]
    async fn a_stream_that_is_dropped_before_its_end_reads_as_a_reset_after_what_it_has_sent() {
        for size in [0, 10, 2 * COPIED] {
            let (mut writer, mut reader) = ends(100_000);
            writer.write_all(&vec![7; size]).await.unwrap();
            drop(writer);
            let mut received = Vec::new();
            let error = reader.read_to_end(&mut received).await.unwrap_err();
            assert_eq!((error.kind(), received.len()), (io::ErrorKind::ConnectionReset, size));
        }
    }

    #[tokio::test]
    async fn a_block_that_was_not_written_whole_can_not_be_ended() {
        let (mut writer, mut reader) = ends(64);
        let block = vec![7; 2 * COPIED];
        assert!(tokio::time::timeout(std::time::Duration::ZERO, writer.write_all(&block)).await.is_err());
        assert_eq!(writer.shutdown().await.unwrap_err().kind(), io::ErrorKind::InvalidInput);
        drop(writer);
        assert_eq!(reader.read_to_end(&mut Vec::new()).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn bytes_after_the_end_are_an_error_and_before_the_beginning_there_are_no_blocks() {
        let (mut raw, stream) = duplex(64);
        let mut reader = Blocks::new(stream);
        raw.write_all(b"header").await.unwrap();
        reader.read_exact(&mut [0; 6]).await.unwrap();
        reader.write_all(b"answer").await.unwrap();
        let mut answer = [0; 6];
        raw.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"answer");
        reader.begin();
        raw.write_all(&[0, 0, 0, 1, b'x', 0, 0, 0, 0, b'y']).await.unwrap();
        let error = reader.read_to_end(&mut Vec::new()).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
