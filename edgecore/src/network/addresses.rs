//! Pods keep their addresses when their sandbox is made again, as after a reboot. With the cloud away nobody could tell the other
//! nodes of the site new ones: their EndpointSlices would name addresses that are gone.
//!
//! The host-local IPAM plugin begins its search behind the address in `last_reserved_ip.N` (its documented round robin; N is the
//! number of the range in the configuration: 0 for IPv4, 1 for IPv6), so that these files decide which free addresses come next.
//! Sandboxes must be made one at a time between [`Addresses::prepare`] and the plugin's run.

use std::{
    fs,
    io::{self, ErrorKind},
    net::IpAddr,
    path::{Path, PathBuf},
};

use edgemesh_api::cidr::Cidr;

use super::{cni::NETWORK, is_outside};

/// A pod's file with its addresses, one a line.
const FILE: &str = "address";

/// The file with the addresses that the newest pod got. New pods go on from there: an address that was just given up is still in
/// the neighbours' tables with its old hardware address, and a pod that got it at once would be unreachable for up to a minute.
const NEWEST: &str = "newest-address";

/// The addresses of this node's pods.
#[derive(Debug, Clone)]
pub struct Addresses {
    ipam: PathBuf,
    pods: PathBuf,
}

impl Addresses {
    /// `ipam_dir` is the plugin's data folder, `pods` holds a folder a pod.
    pub fn new(ipam_dir: &Path, pods: &Path) -> Self {
        Self { ipam: ipam_dir.to_owned(), pods: pods.to_owned() }
    }

    /// Makes the plugin give the pod its former addresses, or, to a new pod, some that no other pod waits for.
    ///
    /// # Errors
    /// When a file can't be read or written. The pod then gets any free addresses.
    pub fn prepare(&self, pod: &Path) -> io::Result<()> {
        let own = read(&pod.join(FILE))?;
        let newest = read(&self.ipam.join(NEWEST))?;
        for (number, is_family) in [IpAddr::is_ipv4 as fn(&IpAddr) -> bool, IpAddr::is_ipv6].into_iter().enumerate() {
            let of_family = |list: &[IpAddr]| list.iter().copied().find(is_family);
            let last = match (of_family(&own).and_then(before), of_family(&newest)) {
                (Some(last), _) | (None, Some(last)) => Some(last),
                (None, None) => self.highest(is_family)?,
            };
            let Some(last) = last else { continue };
            let folder = self.ipam.join(NETWORK);
            fs::create_dir_all(&folder)?;
            fs::write(folder.join(format!("last_reserved_ip.{number}")), last.to_string())?;
        }
        Ok(())
    }

    /// Keeps the addresses that a pod got. A pod without volumes has no folder before.
    ///
    /// # Errors
    /// When its file can't be written.
    pub fn remember(&self, pod: &Path, addresses: &[IpAddr]) -> io::Result<()> {
        fs::create_dir_all(pod)?;
        let text: String = addresses.iter().map(|address| format!("{address}\n")).collect();
        if read(&pod.join(FILE))?.is_empty() {
            fs::create_dir_all(&self.ipam)?;
            fs::write(self.ipam.join(NEWEST), &text)?;
        }
        fs::write(pod.join(FILE), text)
    }

    /// Whether the plugin gave this address out of a range that is no longer the node's: `ranges` are those that it has now. The
    /// plugin has a file for each address in use.
    pub fn is_stray(&self, address: IpAddr, ranges: &[Cidr]) -> bool {
        is_outside(address, ranges) && self.ipam.join(NETWORK).join(address.to_string()).exists()
    }

    fn highest(&self, is_family: fn(&IpAddr) -> bool) -> io::Result<Option<IpAddr>> {
        let mut highest = None;
        for entry in fs::read_dir(&self.pods)? {
            highest = highest.max(read(&entry?.path().join(FILE))?.into_iter().find(is_family));
        }
        Ok(highest)
    }
}

/// The address before an address.
fn before(address: IpAddr) -> Option<IpAddr> {
    Some(match address {
        IpAddr::V4(address) => IpAddr::V4(address.to_bits().checked_sub(1)?.into()),
        IpAddr::V6(address) => IpAddr::V6(address.to_bits().checked_sub(1)?.into()),
    })
}

fn read(file: &Path) -> io::Result<Vec<IpAddr>> {
    match fs::read_to_string(file) {
        Ok(text) => Ok(text.lines().filter_map(|line| line.trim().parse().ok()).collect()),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_known_pod_gets_its_address_again_and_a_new_one_none_that_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let (ipam, pods) = (dir.path().join("ipam"), dir.path().join("pods"));
        let addresses = Addresses::new(&ipam, &pods);
        for (name, address) in [("old", "10.244.2.4"), ("other", "10.244.2.11")] {
            addresses.remember(&pods.join(name), &[address.parse().unwrap()]).unwrap();
        }
        let next_after = || fs::read_to_string(ipam.join(NETWORK).join("last_reserved_ip.0")).unwrap();
        addresses.prepare(&pods.join("old")).unwrap();
        assert_eq!(next_after(), "10.244.2.3");
        addresses.prepare(&pods.join("new")).unwrap();
        assert_eq!(next_after(), "10.244.2.11");
    }

    #[test]
    fn a_pod_gets_its_addresses_of_both_families_again() {
        let dir = tempfile::tempdir().unwrap();
        let (ipam, pods) = (dir.path().join("ipam"), dir.path().join("pods"));
        let addresses = Addresses::new(&ipam, &pods);
        for (name, number) in [("old", 4), ("other", 11)] {
            let own = [format!("10.244.2.{number}"), format!("fd00::{number:x}")].map(|text| text.parse().unwrap());
            addresses.remember(&pods.join(name), &own).unwrap();
        }
        let next_after = || {
            let file = |number| fs::read_to_string(ipam.join(NETWORK).join(format!("last_reserved_ip.{number}")));
            [file(0).unwrap(), file(1).unwrap()]
        };
        addresses.prepare(&pods.join("old")).unwrap();
        assert_eq!(next_after(), ["10.244.2.3", "fd00::3"]);
        addresses.prepare(&pods.join("new")).unwrap();
        assert_eq!(next_after(), ["10.244.2.11", "fd00::b"]);
    }

    #[test]
    fn an_address_is_stray_when_the_plugin_gave_it_and_the_node_has_another_range_of_its_family() {
        let dir = tempfile::tempdir().unwrap();
        let addresses = Addresses::new(&dir.path().join("ipam"), &dir.path().join("pods"));
        fs::create_dir_all(dir.path().join("ipam").join(NETWORK)).unwrap();
        for given in ["10.244.2.4", "fd00:2::4"] {
            fs::write(dir.path().join("ipam").join(NETWORK).join(given), "sandbox").unwrap();
        }
        let range = |text| Cidr::parse(text).unwrap();
        for (address, ranges, stray) in [
            ("10.244.2.4", vec![range("10.244.2.0/24")], false),
            ("10.244.2.4", vec![range("10.244.3.0/24")], true),
            ("fd00:2::4", vec![range("10.244.3.0/24"), range("fd00:3::/64")], true),
            // IPv6 may be off for now, and another plugin may give addresses of its own.
            ("fd00:2::4", vec![range("10.244.2.0/24")], false),
            ("10.99.0.1", vec![range("10.244.2.0/24")], false),
            ("10.244.2.4", vec![], false),
        ] {
            assert_eq!(addresses.is_stray(address.parse().unwrap(), &ranges), stray, "{address} {ranges:?}");
        }
    }

    #[test]
    fn an_address_that_was_given_up_is_not_given_to_the_next_pod() {
        let dir = tempfile::tempdir().unwrap();
        let (ipam, pods) = (dir.path().join("ipam"), dir.path().join("pods"));
        let addresses = Addresses::new(&ipam, &pods);
        addresses.remember(&pods.join("short-lived"), &[[10, 244, 2, 12].into()]).unwrap();
        fs::remove_dir_all(pods.join("short-lived")).unwrap();
        addresses.remember(&pods.join("stays"), &[[10, 244, 2, 13].into()]).unwrap();
        // Its sandbox is made again: the newest pod's address is still that of another.
        addresses.remember(&pods.join("stays"), &[[10, 244, 2, 13].into()]).unwrap();
        fs::remove_dir_all(pods.join("stays")).unwrap();
        addresses.prepare(&pods.join("new")).unwrap();
        assert_eq!(fs::read_to_string(ipam.join(NETWORK).join("last_reserved_ip.0")).unwrap(), "10.244.2.13");
    }
}
