//! Sizes, windows and deadlines of a session.

use crate::Millis;

/// Sizes, windows and deadlines of a session. Both ends start from these; the hub tells the node its heartbeat and write window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Each end says something at least this often.
    pub heartbeat: Millis,
    /// An end that heard nothing for so long drops the connection.
    pub dead_after: Millis,
    /// How long the greeting (Hello, Welcome) and each part of the digest may take.
    pub greeting: Millis,
    /// How long the oldest batch may wait for its acknowledgement.
    pub ack_deadline: Millis,
    /// Most changes in one batch.
    pub batch_changes: usize,
    /// A batch is closed once it holds so many bytes; one larger object still travels, alone.
    pub batch_bytes: usize,
    /// Most batches without acknowledgement.
    pub window_batches: usize,
    /// Most bytes without acknowledgement; one larger object still travels, alone.
    pub window_bytes: usize,
    /// Most entries in one part of the digest.
    pub digest_chunk: usize,
    /// Most entries in a digest.
    pub digest_entries: usize,
    /// Most writes of a node that await their result.
    pub write_window: usize,
    /// First delay before a reconnect.
    pub backoff_first: Millis,
    /// Longest delay before a reconnect. Short, because a node must be in step again within 5 s of the link's return.
    pub backoff_cap: Millis,
    /// Delay after the hub refused the node for a reason that time alone rarely mends.
    pub backoff_refused: Millis,
    /// A connection that was in step for so long lets the delays start again from the first.
    pub stable_after: Millis,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            heartbeat: 5_000,
            dead_after: 12_000,
            greeting: 10_000,
            ack_deadline: 60_000,
            batch_changes: 256,
            batch_bytes: 256 << 10,
            window_batches: 16,
            window_bytes: 4 << 20,
            digest_chunk: 1_000,
            digest_entries: 200_000,
            write_window: 64,
            backoff_first: 200,
            backoff_cap: 2_000,
            backoff_refused: 10_000,
            stable_after: 5_000,
        }
    }
}
