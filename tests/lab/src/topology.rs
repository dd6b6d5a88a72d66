//! What a lab consists of: the internet, a cloud, and sites behind NAT, each with its nodes; and every host's addresses.

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

/// Address of the internet's own host: default gateway of the public hosts.
pub const INTERNET_GATEWAY: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
/// Address of the internet's DNS server.
pub const INTERNET_DNS: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 53);
const HUB: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
const CLIENT: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 100);
const FIRST_CLOUD_NODE: u8 = 11;
const FIRST_ROUTER: u8 = 41;
const FIRST_SITE_NODE: u8 = 11;
const MAX_NODES: usize = 24;

/// The file format of `./lab up --file`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Topology {
    /// Nodes in the cloud, with public addresses.
    #[serde(default)]
    pub cloud: Vec<NodeSpec>,
    /// Networks behind NAT.
    #[serde(default)]
    pub sites: Vec<SiteSpec>,
    /// How the agents translate Service addresses; their own default if left out.
    #[serde(default)]
    pub datapath: Option<Datapath>,
    /// Hosts, pods and Services have IPv6 addresses, too. Those of a site reach no farther than its LAN, as at many of them.
    #[serde(default)]
    pub dual_stack: bool,
}

/// The agents' setting `datapath`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Datapath {
    /// What the kernel offers.
    Auto,
    /// eBPF programs.
    Ebpf,
    /// Rules of nftables.
    Nftables,
}

/// A site: one LAN behind a NAT router.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct SiteSpec {
    /// Name; also the mesh network of its nodes.
    pub name: String,
    /// Its nodes.
    pub nodes: Vec<NodeSpec>,
}

/// A node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct NodeSpec {
    /// Name of the host and of the Node.
    pub name: String,
    /// Runs edgemesh-gateway; a site's router forwards ports 80 and 443 to its first gateway node.
    #[serde(default)]
    pub gateway: bool,
    /// Relays tunnels for others.
    #[serde(default)]
    pub relay: bool,
    /// The Node's zone.
    #[serde(default)]
    pub zone: Option<String>,
}

/// What a host is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The switch between all public addresses, with a DNS server.
    Internet,
    /// An outside machine.
    Client,
    /// The hub.
    Hub,
    /// A site's NAT router.
    Router,
    /// A node.
    Node,
}

/// A host of the lab.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Host {
    /// Name.
    pub name: String,
    /// What it is for.
    pub role: Role,
    /// Its address: public, or of its site's LAN.
    pub address: Ipv4Addr,
    /// Its IPv6 address there (/64), in a dual-stack lab.
    pub address6: Option<Ipv6Addr>,
    /// The site it belongs to; none for public hosts.
    pub site: Option<String>,
    /// Runs edgemesh-gateway.
    pub gateway: bool,
    /// Relays tunnels.
    pub relay: bool,
    /// Its Node's zone.
    pub zone: Option<String>,
}

/// A site's addresses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Site {
    /// Name.
    pub name: String,
    /// First address of the LAN (/24).
    pub lan: Ipv4Addr,
    /// The router's host name.
    pub router: String,
    /// The router's public address.
    pub public: Ipv4Addr,
}

impl Site {
    /// The router's address in the LAN.
    pub fn gateway(&self) -> Ipv4Addr {
        with_last_octet(self.lan, 1)
    }
}

impl Default for Topology {
    /// The lab of the documentation: a cloud node that relays, two nodes at site a, one (the gateway) at site b.
    fn default() -> Self {
        let node = |name: &str| NodeSpec { name: name.to_owned(), gateway: false, relay: false, zone: None };
        Self {
            cloud: vec![NodeSpec { relay: true, ..node("cloud-1") }],
            sites: vec![
                SiteSpec { name: "site-a".to_owned(), nodes: vec![node("edge-a1"), node("edge-a2")] },
                SiteSpec { name: "site-b".to_owned(), nodes: vec![NodeSpec { gateway: true, ..node("edge-b1") }] },
            ],
            datapath: None,
            dual_stack: false,
        }
    }
}

impl Topology {
    /// Reads a topology file, or gives the default.
    ///
    /// # Errors
    /// When the file can't be read, is no topology, or names can't be used.
    pub fn load(file: Option<&PathBuf>) -> Result<Self> {
        let topology = match file {
            None => Self::default(),
            Some(path) => {
                let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
                serde_saphyr::from_str(&text).with_context(|| path.display().to_string())?
            }
        };
        topology.check()?;
        Ok(topology)
    }

    /// Reads back what `up` saved.
    ///
    /// # Errors
    /// When it isn't there.
    pub fn saved(folder: &Path) -> Result<Self> {
        let path = folder.join("topology.json");
        let text = std::fs::read(&path).context("no such lab: run `./lab up` first")?;
        Ok(serde_json::from_slice(&text)?)
    }

    fn check(&self) -> Result<()> {
        let hosts = self.hosts();
        for (index, host) in hosts.iter().enumerate() {
            let name = &host.name;
            let plain = name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
            // Interface names carry the host's name behind a prefix; the kernel allows 15 bytes.
            ensure!(plain && !name.is_empty() && name.len() <= 13, "name {name:?}: up to 13 of a-z, 0-9 and '-'");
            let taken = hosts[..index].iter().any(|other| other.name == *name);
            ensure!(
                !taken,
                "name {name:?} is used twice (internet, client, hub, cloud and NAME of each router are taken)"
            );
        }
        for site in &self.sites {
            ensure!(hosts.iter().all(|host| host.name != site.name), "site {:?} has the name of a host", site.name);
            ensure!(site.nodes.len() <= MAX_NODES, "site {:?}: more than {MAX_NODES} nodes", site.name);
        }
        ensure!(
            self.sites.len() <= MAX_NODES && self.cloud.len() <= MAX_NODES,
            "more than {MAX_NODES} sites or cloud nodes"
        );
        Ok(())
    }

    /// The sites with their addresses.
    pub fn sites(&self) -> Vec<Site> {
        let numbered = (1_u8..).zip(&self.sites);
        numbered
            .map(|(number, site)| Site {
                name: site.name.clone(),
                lan: Ipv4Addr::new(192, 168, number, 0),
                router: format!("nat{number}"),
                public: with_last_octet(HUB, FIRST_ROUTER + number - 1),
            })
            .collect()
    }

    /// All hosts: the internet, the public ones, then each site's router and nodes.
    pub fn hosts(&self) -> Vec<Host> {
        let plain = |name: &str, role, address| Host {
            name: name.to_owned(),
            role,
            address,
            address6: self.dual_stack.then(|| ipv6_of(address)),
            site: None,
            gateway: false,
            relay: false,
            zone: None,
        };
        let mut hosts = vec![
            plain("internet", Role::Internet, INTERNET_GATEWAY),
            plain("client", Role::Client, CLIENT),
            plain("hub", Role::Hub, HUB),
        ];
        for (number, node) in (FIRST_CLOUD_NODE..).zip(&self.cloud) {
            let host = plain(&node.name, Role::Node, with_last_octet(HUB, number));
            hosts.push(Host { gateway: node.gateway, relay: node.relay, zone: node.zone.clone(), ..host });
        }
        for (site, spec) in self.sites().into_iter().zip(&self.sites) {
            let router = plain(&site.router, Role::Router, site.public);
            hosts.push(Host { site: Some(site.name.clone()), ..router });
            for (number, node) in (FIRST_SITE_NODE..).zip(&spec.nodes) {
                let host = plain(&node.name, Role::Node, with_last_octet(site.lan, number));
                let (gateway, relay, zone) = (node.gateway, node.relay, node.zone.clone());
                hosts.push(Host { site: Some(site.name.clone()), gateway, relay, zone, ..host });
            }
        }
        hosts
    }

    /// The nodes.
    pub fn nodes(&self) -> Vec<Host> {
        self.hosts().into_iter().filter(|host| host.role == Role::Node).collect()
    }
}

/// The IPv6 address of a host: of the range for documentation in the internet, of a local one in a site's LAN.
fn ipv6_of(address: Ipv4Addr) -> Ipv6Addr {
    let [a, b, site, host] = address.octets();
    match a {
        192 => Ipv6Addr::new(0xfd00, u16::from_be_bytes([a, b]), site.into(), 0, 0, 0, 0, host.into()),
        _ => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, host.into()),
    }
}

fn with_last_octet(address: Ipv4Addr, last: u8) -> Ipv4Addr {
    let [a, b, c, _] = address.octets();
    Ipv4Addr::new(a, b, c, last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_topology_is_valid_and_has_the_documented_addresses() {
        let topology = Topology::default();
        topology.check().unwrap();
        let address = |name: &str| topology.hosts().into_iter().find(|h| h.name == name).unwrap().address.to_string();
        assert_eq!(address("hub"), "203.0.113.10");
        assert_eq!(address("cloud-1"), "203.0.113.11");
        assert_eq!(address("edge-a2"), "192.168.1.12");
        assert_eq!(address("edge-b1"), "192.168.2.11");
        let topology = Topology { dual_stack: true, ..topology };
        let address6 = |name: &str| topology.hosts().into_iter().find(|h| h.name == name).unwrap().address6;
        assert_eq!(address6("cloud-1"), "2001:db8::b".parse().ok());
        assert_eq!(address6("edge-b1"), "fd00:c0a8:2::b".parse().ok());
    }

    #[test]
    fn a_name_used_twice_or_too_long_is_refused() {
        let mut topology = Topology::default();
        topology.cloud[0].name = "edge-a1".to_owned();
        assert!(topology.check().unwrap_err().to_string().contains("edge-a1"));
        topology.cloud[0].name = "a-name-that-is-too-long".to_owned();
        assert!(topology.check().is_err());
    }

    #[test]
    fn an_unknown_field_in_a_topology_file_is_refused() {
        assert!(serde_saphyr::from_str::<Topology>("cloud: [{name: a, relays: true}]").is_err());
    }
}
