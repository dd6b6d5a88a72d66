//! Pods keep their address when their sandbox is made again, as after a reboot. With the cloud away nobody could tell the other
//! nodes of the site a new one: their EndpointSlices would name addresses that are gone.
//!
//! The host-local IPAM plugin begins its search behind the address in `last_reserved_ip.0` (its documented round robin), so
//! that file decides which free address comes next. Sandboxes must be made one at a time between [`Addresses::prepare`] and the plugin's run.

use std::{
    fs,
    io::{self, ErrorKind},
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

use super::cni::NETWORK;

/// A pod's file with its address.
const FILE: &str = "address";

/// The file with the address that the newest pod got. New pods go on from there: an address that was just given up is still in
/// the neighbours' tables with its old hardware address, and a pod that got it at once would be unreachable for up to a minute.
const NEWEST: &str = "newest-address";

/// The addresses of this node's pods.
#[derive(Debug, Clone)]
pub struct Addresses {
    last_reserved: PathBuf,
    newest: PathBuf,
    pods: PathBuf,
}

impl Addresses {
    /// `ipam_dir` is the plugin's data folder, `pods` holds a folder a pod.
    pub fn new(ipam_dir: &Path, pods: &Path) -> Self {
        Self {
            last_reserved: ipam_dir.join(NETWORK).join("last_reserved_ip.0"),
            newest: ipam_dir.join(NEWEST),
            pods: pods.to_owned(),
        }
    }

    /// Makes the plugin give the pod its former address, or, to a new pod, one that no other pod waits for.
    ///
    /// # Errors
    /// When a file can't be read or written. The pod then gets any free address.
    pub fn prepare(&self, pod: &Path) -> io::Result<()> {
        let last = match read(&pod.join(FILE))? {
            Some(own) => Some(Ipv4Addr::from_bits(own.to_bits().wrapping_sub(1))),
            None => match read(&self.newest)? {
                Some(newest) => Some(newest),
                None => self.highest()?,
            },
        };
        let Some(last) = last else { return Ok(()) };
        if let Some(folder) = self.last_reserved.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::write(&self.last_reserved, last.to_string())
    }

    /// Keeps the address that a pod got. A pod without volumes has no folder before.
    ///
    /// # Errors
    /// When its file can't be written.
    pub fn remember(&self, pod: &Path, address: &str) -> io::Result<()> {
        fs::create_dir_all(pod)?;
        if read(&pod.join(FILE))?.is_none() {
            if let Some(folder) = self.newest.parent() {
                fs::create_dir_all(folder)?;
            }
            fs::write(&self.newest, address)?;
        }
        fs::write(pod.join(FILE), address)
    }

    fn highest(&self) -> io::Result<Option<Ipv4Addr>> {
        let mut highest = None;
        for entry in fs::read_dir(&self.pods)? {
            highest = highest.max(read(&entry?.path().join(FILE))?);
        }
        Ok(highest)
    }
}

fn read(file: &Path) -> io::Result<Option<Ipv4Addr>> {
    match fs::read_to_string(file) {
        Ok(text) => Ok(text.trim().parse().ok()),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
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
            addresses.remember(&pods.join(name), address).unwrap();
        }
        let next_after = || fs::read_to_string(ipam.join(NETWORK).join("last_reserved_ip.0")).unwrap();
        addresses.prepare(&pods.join("old")).unwrap();
        assert_eq!(next_after(), "10.244.2.3");
        addresses.prepare(&pods.join("new")).unwrap();
        assert_eq!(next_after(), "10.244.2.11");
    }

    #[test]
    fn an_address_that_was_given_up_is_not_given_to_the_next_pod() {
        let dir = tempfile::tempdir().unwrap();
        let (ipam, pods) = (dir.path().join("ipam"), dir.path().join("pods"));
        let addresses = Addresses::new(&ipam, &pods);
        addresses.remember(&pods.join("short-lived"), "10.244.2.12").unwrap();
        fs::remove_dir_all(pods.join("short-lived")).unwrap();
        addresses.remember(&pods.join("stays"), "10.244.2.13").unwrap();
        // Its sandbox is made again: the newest pod's address is still that of another.
        addresses.remember(&pods.join("stays"), "10.244.2.13").unwrap();
        fs::remove_dir_all(pods.join("stays")).unwrap();
        addresses.prepare(&pods.join("new")).unwrap();
        assert_eq!(fs::read_to_string(ipam.join(NETWORK).join("last_reserved_ip.0")).unwrap(), "10.244.2.13");
    }
}
