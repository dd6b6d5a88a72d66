//! The accepting side: reads a stream's header, asks the daemon, answers, and lets the daemon's session carry it.

use std::{sync::Arc, time::Duration};

use futures::future::BoxFuture;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::{
    error::{Refusal, RefusalReason},
    metrics::Metrics,
    peer::PeerName,
    stream::TunnelStream,
    wire::{self, StreamHeader},
};

/// Time for a peer to send its header.
const HEADER_DEADLINE: Duration = Duration::from_secs(5);
/// Time for the daemon to reach the endpoint; its own deadline is shorter.
const ACCEPT_DEADLINE: Duration = Duration::from_secs(8);

/// Carries an accepted stream until it ends. The endpoint is connected already.
pub struct Session(Box<dyn FnOnce(TunnelStream) -> BoxFuture<'static, ()> + Send>);

impl Session {
    /// A session that runs `carry` with the accepted stream.
    pub fn new<F, Carrying>(carry: F) -> Self
    where
        F: FnOnce(TunnelStream) -> Carrying + Send + 'static,
        Carrying: Future<Output = ()> + Send + 'static,
    {
        Self(Box::new(move |stream| Box::pin(carry(stream))))
    }
}

/// Decides about the streams that other nodes open.
pub trait Accept: Send + Sync + 'static {
    /// Checks the header against what runs on this node and connects to the endpoint. The peer gets its answer when this
    /// returns, and the session is run with the stream.
    ///
    /// # Errors
    /// The refusal that is sent to the peer.
    fn accept<'a>(&'a self, peer: &'a PeerName, header: &'a StreamHeader) -> BoxFuture<'a, Result<Session, Refusal>>;
}

/// Takes no streams, for a component that only opens them.
#[derive(Debug, Clone, Copy, Default)]
pub struct RefuseAll;

impl Accept for RefuseAll {
    fn accept<'a>(&'a self, _: &'a PeerName, _: &'a StreamHeader) -> BoxFuture<'a, Result<Session, Refusal>> {
        Box::pin(async { Err(Refusal::new(RefusalReason::NotServing, "this endpoint takes no streams")) })
    }
}

/// Stands in for the daemon while all its places are taken.
pub(crate) struct RefuseBusy;

impl Accept for RefuseBusy {
    fn accept<'a>(&'a self, _: &'a PeerName, _: &'a StreamHeader) -> BoxFuture<'a, Result<Session, Refusal>> {
        Box::pin(async { Err(Refusal::new(RefusalReason::Busy, "the node has no place for another stream")) })
    }
}

/// Serves one inbound stream to its end.
pub(crate) async fn serve(
    mut stream: TunnelStream,
    peer: PeerName,
    acceptor: Arc<dyn Accept>,
    metrics: Metrics,
    stopping: CancellationToken,
) {
    let (header, in_blocks) = match timeout(HEADER_DEADLINE, StreamHeader::read(&mut stream)).await {
        Ok(Ok(read)) => read,
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::UnexpectedEof => return,
        Ok(Err(error)) => {
            tracing::debug!(%peer, %error, "a stream's header makes no sense");
            return refuse(stream, &Refusal::new(RefusalReason::Malformed, error.to_string()), &metrics).await;
        }
        Err(_) => {
            return refuse(stream, &Refusal::new(RefusalReason::Malformed, "no header in time"), &metrics).await;
        }
    };
    if stopping.is_cancelled() {
        return refuse(stream, &Refusal::new(RefusalReason::NotServing, "the node is stopping"), &metrics).await;
    }
    let session = match timeout(ACCEPT_DEADLINE, acceptor.accept(&peer, &header)).await {
        Ok(Ok(session)) => session,
        Ok(Err(refusal)) => {
            tracing::debug!(%peer, ?header, %refusal, "refused a stream");
            return refuse(stream, &refusal, &metrics).await;
        }
        Err(_) => {
            return refuse(stream, &Refusal::new(RefusalReason::DialFailed, "no answer in time"), &metrics).await;
        }
    };
    metrics.accepted(stream.path());
    if wire::write_answer(&mut stream, Ok(in_blocks)).await.is_ok() {
        if in_blocks {
            stream.begin_blocks();
        }
        session.0(stream).await;
    }
}

async fn refuse(mut stream: TunnelStream, refusal: &Refusal, metrics: &Metrics) {
    metrics.refused(refusal.reason.label());
    stream.carries_nothing();
    let answer = async {
        wire::write_answer(&mut stream, Err(refusal)).await?;
        tokio::io::AsyncWriteExt::shutdown(&mut stream).await
    };
    // The peer may be gone; then nobody waits for the answer.
    let _ = timeout(HEADER_DEADLINE, answer).await;
}
