//! Cluster DNS without connection tracking. Where the host tracks connections, each question would keep an entry for half a
//! minute (`nf_conntrack_udp_timeout`): the questions of busy pods fill a small node's table, and then nothing new connects there.

use std::{
    fmt::Write as _,
    fs,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use edgemesh_telemetry::Shutdown;

use super::{
    nft::{self, NftError},
    ruleset::Family,
    table_is_present,
    transaction::Kernel,
};
use crate::metrics::DatapathMetrics;

/// The table that belongs to this, in this network namespace.
pub const DNS_TABLE: &str = "edgemesh_dns";
/// How soon is seen that the host has begun to track connections, and that the table is gone, for example with all others.
const LOOK: Duration = Duration::from_secs(5);
/// The pause after the rules could not be written.
const RETRY: Duration = Duration::from_secs(60);
/// How many connections this network namespace tracks. There is no such file where the kernel can't.
const TRACKED: &str = "/proc/sys/net/netfilter/nf_conntrack_count";

/// Keeps what is sent to these listeners, and what they answer, untracked from when the host tracks anything, until the shutdown is
/// forced. The rules stay then. Without listeners, what an earlier agent left is removed.
///
/// Packets to and from them must not be translated on this host, which needs connection tracking: `may_begin` says that they
/// are not any more, as rules of an earlier agent can do.
pub(in super::super) async fn keep(
    listeners: Vec<SocketAddr>,
    may_begin: Arc<AtomicBool>,
    metrics: DatapathMetrics,
    shutdown: Shutdown,
) {
    let mut look = Look { listeners, written: false, failed: false };
    loop {
        if !look.listeners.is_empty() && !may_begin.load(Ordering::Relaxed) {
            tokio::select! {
                () = tokio::time::sleep(LOOK) => continue,
                () = shutdown.forced().cancelled() => return,
            }
        }
        let round = tokio::task::spawn_blocking(move || {
            let in_force = look.round();
            (look, in_force)
        });
        let in_force = match round.await {
            Ok((again, in_force)) => {
                look = again;
                in_force
            }
            Err(error) => return tracing::error!(%error, "cluster DNS without connection tracking: the task failed"),
        };
        metrics.dns_untracked(in_force);
        if look.listeners.is_empty() && !look.failed {
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(if look.failed && !look.listeners.is_empty() { RETRY } else { LOOK }) => {}
            () = shutdown.forced().cancelled() => return,
        }
    }
}

struct Look {
    listeners: Vec<SocketAddr>,
    /// Whether the table is this agent's: an earlier one can have had other listeners.
    written: bool,
    /// Told once.
    failed: bool,
}

impl Look {
    /// Has the rules in force where they are wanted. Returns whether they are.
    fn round(&mut self) -> bool {
        match self.try_round() {
            Ok(in_force) => {
                self.failed = false;
                in_force
            }
            Err(error) => {
                if !std::mem::replace(&mut self.failed, true) {
                    tracing::warn!(table = DNS_TABLE, %error, "can't be written or removed; trying again");
                }
                false
            }
        }
    }

    fn try_round(&mut self) -> Result<bool, NftError> {
        if self.listeners.is_empty() {
            return remove().map(|()| false);
        }
        let is_there = table_is_present(DNS_TABLE)?;
        let is_done = is_there && self.written;
        if is_done || !(is_there || host_tracks()) {
            return Ok(is_done);
        }
        nft::transaction(&script(&self.listeners))?;
        self.written = true;
        Ok(true)
    }
}

/// Removes the table, if it is there.
pub(super) fn remove() -> Result<(), NftError> {
    if table_is_present(DNS_TABLE)? { Kernel::default().remove(&[DNS_TABLE.to_owned()]) } else { Ok(()) }
}

/// Whether this network namespace tracks connections.
fn host_tracks() -> bool {
    fs::read_to_string(TRACKED).is_ok_and(|count| count.trim() != "0")
}

/// The table, in place of what there is. Its chains come before connection tracking (priority `raw`), both for what comes from pods
/// and for the host's own packets.
fn script(listeners: &[SocketAddr]) -> String {
    let (mut questions, mut answers) = (String::new(), String::new());
    for listener in listeners {
        let (family, address, port) = (Family::from(listener.ip()).ip(), listener.ip(), listener.port());
        let _ = writeln!(questions, "{family} daddr {address} meta l4proto {{ tcp, udp }} th dport {port} notrack");
        let _ = writeln!(answers, "{family} saddr {address} meta l4proto {{ tcp, udp }} th sport {port} notrack");
    }
    format!(
        "table inet {DNS_TABLE}\ndelete table inet {DNS_TABLE}\ntable inet {DNS_TABLE} {{\n\
         chain prerouting {{\ntype filter hook prerouting priority raw; policy accept;\n{questions}{answers}}}\n\
         chain output {{\ntype filter hook output priority raw; policy accept;\n{questions}{answers}}}\n}}\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_of_each_listener_pass_untracked() {
        let script = script(&["169.254.64.1:53".parse().unwrap(), "[fd65::1]:53".parse().unwrap()]);
        for rule in [
            "ip daddr 169.254.64.1 meta l4proto { tcp, udp } th dport 53 notrack",
            "ip saddr 169.254.64.1 meta l4proto { tcp, udp } th sport 53 notrack",
            "ip6 daddr fd65::1 meta l4proto { tcp, udp } th dport 53 notrack",
            "ip6 saddr fd65::1 meta l4proto { tcp, udp } th sport 53 notrack",
        ] {
            assert_eq!(script.matches(rule).count(), 2, "{rule}: {script}");
        }
    }
}
