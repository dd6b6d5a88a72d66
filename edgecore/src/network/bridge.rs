//! The node's bridge: its addresses of ranges that are no longer the node's go, and with them the routes to those ranges.
//!
//! The bridge outlives edgecore and the Node. The network plugin replaces its IPv4 address, but leaves one of IPv6 beside the new
//! one; the traffic to the node that has the former range now would stay here.

use std::{net::IpAddr, time::Duration};

use edgemesh_api::cidr::Cidr;
use futures::TryStreamExt;
use nix::net::if_::if_nametoindex;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};

use super::{NetworkError, cni::BRIDGE, is_outside};

/// How long the kernel may take.
const DEADLINE: Duration = Duration::from_secs(5);

/// Takes the gateway addresses of former ranges from the bridge, if there is one.
///
/// # Errors
/// When the kernel refuses or does not answer.
pub async fn leave_former_ranges(ranges: &[Cidr]) -> Result<(), NetworkError> {
    // It is made with the first pod.
    let Ok(index) = if_nametoindex(BRIDGE) else { return Ok(()) };
    let work = async {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(|error| error.to_string())?;
        tokio::spawn(connection);
        let present = handle.address().get().set_link_index_filter(index).execute();
        let present: Vec<AddressMessage> = present.try_collect().await.map_err(|error| error.to_string())?;
        for message in present {
            let Some(address) = address_of(&message) else { continue };
            if is_former_gateway(address, message.header.prefix_len, ranges) {
                handle.address().del(message).execute().await.map_err(|error| error.to_string())?;
                tracing::info!(%address, "the bridge gave up the address of a range that this node no longer has");
            }
        }
        Ok(())
    };
    let late = |_| Err(format!("no answer within {DEADLINE:?}"));
    tokio::time::timeout(DEADLINE, work).await.unwrap_or_else(late).map_err(NetworkError::Bridge)
}

fn address_of(message: &AddressMessage) -> Option<IpAddr> {
    message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Address(address) => Some(*address),
        _ => None,
    })
}

/// Whether the address is one that the network plugin gives a bridge, the first of its range, and that range isn't the node's.
fn is_former_gateway(address: IpAddr, prefix: u8, ranges: &[Cidr]) -> bool {
    let link_local = matches!(address, IpAddr::V6(address) if address.is_unicast_link_local());
    let first = Cidr::new(address, prefix).and_then(|range| range.nth(1));
    first == Some(address) && !link_local && is_outside(address, ranges)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_gateways_of_other_ranges_of_a_family_that_the_node_has_go() {
        let both = ["10.244.3.0/24", "fd00:3::/64"].map(|range| Cidr::parse(range).unwrap());
        for (address, prefix, ranges, goes) in [
            ("10.244.1.1", 24, &both[..], true),
            ("fd00:1::1", 64, &both[..], true),
            ("10.244.3.1", 24, &both[..], false),
            ("fd00:3::1", 64, &both[..], false),
            // What somebody else gave it.
            ("192.168.1.7", 24, &both[..], false),
            ("fe80::1", 64, &both[..], false),
            // IPv6 may be off for now.
            ("fd00:1::1", 64, &both[..1], false),
        ] {
            assert_eq!(is_former_gateway(address.parse().unwrap(), prefix, ranges), goes, "{address}");
        }
    }
}
