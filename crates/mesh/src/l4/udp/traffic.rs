//! What a UDP flow has carried, and when.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// What a flow has carried; may be read while it runs.
#[derive(Debug)]
pub struct Traffic {
    begin: Instant,
    /// Milliseconds from the beginning to the last datagram.
    last: AtomicU64,
    pub(super) to_far: AtomicU64,
    pub(super) to_near: AtomicU64,
    /// Cancelled when the flow is to end before its time.
    pub(super) evicted: CancellationToken,
    /// It could not be opened, and only swallows datagrams.
    pub(super) swallows: AtomicBool,
}

impl Default for Traffic {
    fn default() -> Self {
        Self {
            begin: Instant::now(),
            last: AtomicU64::new(0),
            to_far: AtomicU64::new(0),
            to_near: AtomicU64::new(0),
            evicted: CancellationToken::new(),
            swallows: AtomicBool::new(false),
        }
    }
}

impl Traffic {
    /// Bytes of datagrams from the near end (the client) to the far one.
    pub fn to_far(&self) -> u64 {
        self.to_far.load(Ordering::Relaxed)
    }

    /// Bytes of datagrams from the far end to the near one.
    pub fn to_near(&self) -> u64 {
        self.to_near.load(Ordering::Relaxed)
    }

    pub(super) fn count(&self, counter: &AtomicU64, bytes: usize) {
        counter.fetch_add(bytes as u64, Ordering::Relaxed);
        let elapsed = u64::try_from(self.begin.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last.store(elapsed, Ordering::Relaxed);
    }

    /// When the last datagram passed; the beginning if none has.
    pub(super) fn last(&self) -> Instant {
        self.begin + Duration::from_millis(self.last.load(Ordering::Relaxed))
    }
}
