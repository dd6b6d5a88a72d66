//! A pod's link address follows from its IP address: a pod that keeps its address in a new sandbox keeps this one, too.
//!
//! Otherwise the neighbours (the node, and the pods on it) send to the old sandbox's link address for up to a minute, until
//! their ARP entries are given up. The network plugin takes a random one for each sandbox and announces nothing.

use std::{fs::File, net::Ipv4Addr, path::Path, thread, time::Duration};

use futures::TryStreamExt;
use nix::sched::{CloneFlags, setns};
use rtnetlink::LinkUnspec;
use tokio::sync::oneshot;

/// The interface that the runtime makes in a sandbox.
const INTERFACE: &str = "eth0";
/// How long the kernel may take.
const DEADLINE: Duration = Duration::from_secs(5);

/// Why the link address could not be set.
#[derive(Debug, thiserror::Error)]
pub enum LinkAddressError {
    /// The namespace can't be entered, or has no netlink.
    #[error("the sandbox's network namespace: {0}")]
    Namespace(#[from] std::io::Error),
    /// The kernel refuses.
    #[error("{INTERFACE}: {0}")]
    Link(#[from] rtnetlink::Error),
    /// The sandbox has no such interface.
    #[error("the sandbox has no {INTERFACE}")]
    Missing,
    /// The kernel did not answer.
    #[error("no answer within {DEADLINE:?}")]
    Deadline,
}

/// The link address of an IP address: locally administered, and the same on every start (as the CNI plugins did once).
pub fn of(address: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = address.octets();
    [0x0a, 0x58, a, b, c, d]
}

/// Gives the sandbox's interface the link address of its IP address. The kernel tells the neighbours by ARP, because the network
/// plugin sets `arp_notify`. It tells none by IPv6 (`ndisc_notify` is 0): from the pod's sandbox before they have this address already.
///
/// # Errors
/// When the namespace can't be entered, or the kernel refuses. The sandbox works then, too, with the address that it has.
pub async fn set(namespace: &Path, address: Ipv4Addr) -> Result<(), LinkAddressError> {
    let namespace = File::open(namespace)?;
    let (done, answer) = oneshot::channel();
    // A thread of its own, which ends with the work: a thread that has entered a namespace is of no use for anything else.
    thread::Builder::new().name("link-address".to_owned()).spawn(move || {
        // Nobody waits any longer when this fails.
        let _ = done.send(set_in(&namespace, address));
    })?;
    answer.await.unwrap_or(Err(LinkAddressError::Deadline))
}

fn set_in(namespace: &File, address: Ipv4Addr) -> Result<(), LinkAddressError> {
    setns(namespace, CloneFlags::CLONE_NEWNET).map_err(std::io::Error::from)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let work = async {
            let (connection, handle, _) = rtnetlink::new_connection()?;
            tokio::spawn(connection);
            let mut found = handle.link().get().match_name(INTERFACE.to_owned()).execute();
            let link = found.try_next().await?.ok_or(LinkAddressError::Missing)?;
            let change = LinkUnspec::new_with_index(link.header.index).address(of(address).to_vec()).build();
            Ok(handle.link().set(change).execute().await?)
        };
        tokio::time::timeout(DEADLINE, work).await.unwrap_or(Err(LinkAddressError::Deadline))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_link_address_is_unicast_locally_administered_and_follows_from_the_address() {
        let address = of("10.244.1.3".parse().unwrap());
        assert_eq!(address, [0x0a, 0x58, 10, 244, 1, 3]);
        assert_eq!(address[0] & 0b11, 0b10);
    }
}
