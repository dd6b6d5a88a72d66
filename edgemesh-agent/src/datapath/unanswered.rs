//! Where it is seen that a SYN stays unanswered: the programs tell of sockets that send theirs again, and the rules remember the
//! endpoints of such flows for some seconds.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use aya::maps::{MapData, RingBuf};
use edgemesh_ebpf_abi::SocketAddress6;
use tokio::{io::unix::AsyncFd, time::MissedTickBehavior};

use super::{nftables::UnansweredFlows, silent::Suspicions};

/// How often it is looked what the rules remember.
const LOOK: Duration = Duration::from_secs(1);

/// Passes on what the programs tell, until nobody listens any more.
pub(super) async fn of_sockets(ring: RingBuf<MapData>, suspicions: Suspicions) {
    // SAFETY: the ring keeps its descriptor open, and the same one, until it is dropped.
    let mut ring = match unsafe { AsyncFd::register(ring) } {
        Ok(ring) => ring,
        Err(error) => {
            tracing::error!(%error, "endpoints that take no connections will not be noticed");
            return;
        }
    };
    loop {
        let ready = tokio::select! {
            ready = ring.readable_mut() => ready,
            () = suspicions.closed() => return,
        };
        let Ok(mut ready) = ready else { return };
        while let Some(told) = ready.get_inner_mut().next() {
            if let Some(backend) = backend(&told) {
                // While it is full there is enough to look at.
                let _ = suspicions.try_send(backend);
            }
        }
        ready.clear_ready();
    }
}

/// Passes on what the rules of this network namespace have seen while they lead flows, until nobody listens any more.
pub(super) async fn of_flows(are_led: Arc<AtomicBool>, suspicions: Suspicions) {
    let mut flows = UnansweredFlows::default();
    let mut looks = tokio::time::interval(LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = looks.tick() => {}
            () = suspicions.closed() => return,
        }
        if !are_led.load(Ordering::Relaxed) {
            continue;
        }
        // From the kernel's memory, and nearly always nothing: not worth another thread.
        match flows.read() {
            Ok(endpoints) => {
                for endpoint in endpoints {
                    let _ = suspicions.try_send(endpoint);
                }
            }
            Err(error) => tracing::debug!(%error, "what the rules have seen can't be read; trying again"),
        }
    }
}

/// The address in a record.
fn backend(record: &[u8]) -> Option<SocketAddr> {
    let (words, []) = record.as_chunks() else { return None };
    let words: [[u8; 8]; 3] = words.try_into().ok()?;
    let address = SocketAddress6::from_words(words.map(u64::from_ne_bytes));
    Some(SocketAddr::new(IpAddr::from(address.octets()).to_canonical(), address.port()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_read_as_the_addresses_that_they_are() {
        let record = |ip: &str, port| {
            let ip: std::net::Ipv6Addr = ip.parse().unwrap();
            SocketAddress6::new(ip.octets(), port).to_words().map(u64::to_ne_bytes).concat()
        };
        assert_eq!(backend(&record("::ffff:10.244.1.5", 80)), Some("10.244.1.5:80".parse().unwrap()));
        assert_eq!(backend(&record("fd00::5", 8080)), Some("[fd00::5]:8080".parse().unwrap()));
        assert_eq!(backend(&record("fd00::5", 8080)[..16]), None);
    }
}
