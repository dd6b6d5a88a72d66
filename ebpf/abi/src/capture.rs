//! The maps of the program that captures what is sent to pods of other networks.

/// Name of the map of captured IPv4 ranges (LPM trie; the value means nothing).
pub const CAPTURED: &str = "CAPTURED";
/// Name of the map of captured IPv6 ranges.
pub const CAPTURED6: &str = "CAPTURED6";
/// Name of the map of the agent's listeners, by [`CaptureSocket`] (sockmap).
pub const LISTENERS: &str = "LISTENERS";

/// How many ranges of each family can be captured; memory is taken for those that are.
pub const MAX_CAPTURED: u32 = 16_384;

/// The agent's listeners, by their index in the map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum CaptureSocket {
    /// TCP over IPv4.
    Tcp4 = 0,
    /// UDP over IPv4.
    Udp4 = 1,
    /// TCP over IPv6.
    Tcp6 = 2,
    /// UDP over IPv6.
    Udp6 = 3,
}

impl CaptureSocket {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Tcp4, Self::Udp4, Self::Tcp6, Self::Udp6];
}
