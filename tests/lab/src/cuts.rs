//! Broken links: `cut A B` drops every packet between two places, as a dug-up cable does. Nobody gets an error back.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    fs,
    path::Path,
};

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use crate::{
    network::{ETH, WAN, hardware_address},
    topology::{Host, Role, Topology},
};

/// Two places with no link between them, in alphabetical order.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Cut(String, String);

impl Cut {
    /// A cut between two places of the topology.
    ///
    /// # Errors
    /// When a name is no place, or both are the same.
    pub fn new(topology: &Topology, a: &str, b: &str) -> Result<Self> {
        for name in [a, b] {
            places(topology, name)?;
        }
        if a == b {
            bail!("{a} can't be cut from itself");
        }
        Ok(if a < b { Self(a.to_owned(), b.to_owned()) } else { Self(b.to_owned(), a.to_owned()) })
    }
}

/// The cuts in force.
///
/// # Errors
/// When the saved list can't be read.
pub fn load(folder: &Path) -> Result<BTreeSet<Cut>> {
    match fs::read(folder.join("cuts.json")) {
        Ok(text) => Ok(serde_json::from_slice(&text)?),
        Err(_) => Ok(BTreeSet::new()),
    }
}

/// Saves the cuts in force.
///
/// # Errors
/// When the file can't be written.
pub fn save(folder: &Path, cuts: &BTreeSet<Cut>) -> Result<()> {
    fs::write(folder.join("cuts.json"), serde_json::to_vec(cuts)?)?;
    Ok(())
}

#[derive(Debug, Clone)]
enum Place {
    /// Everything beyond the other side's own network.
    Internet,
    Host(Host),
}

fn places(topology: &Topology, name: &str) -> Result<Vec<Place>> {
    let hosts = topology.hosts();
    let pick = |wanted: &dyn Fn(&Host) -> bool| hosts.iter().filter(|h| wanted(h)).cloned().map(Place::Host).collect();
    let found: Vec<Place> = match name {
        "internet" => vec![Place::Internet],
        "cloud" => pick(&|host| host.role == Role::Hub || (host.role == Role::Node && host.site.is_none())),
        name => pick(&|host| {
            (host.name == name && !matches!(host.role, Role::Router | Role::Internet))
                || (host.site.as_deref() == Some(name) && host.role == Role::Node)
        }),
    };
    if found.is_empty() {
        let sites = topology.sites().into_iter().map(|site| site.name);
        let nodes =
            hosts.iter().filter(|h| matches!(h.role, Role::Node | Role::Hub | Role::Client)).map(|h| h.name.clone());
        let known: Vec<_> = ["internet".to_owned(), "cloud".to_owned()].into_iter().chain(sites).chain(nodes).collect();
        bail!("{name:?} is no place of this lab; there are: {}", known.join(", "));
    }
    Ok(found)
}

/// The nftables script of each host that enforces cuts: the public hosts and the routers.
///
/// # Errors
/// When a cut names a place that the topology doesn't have.
pub fn rules(topology: &Topology, cuts: &BTreeSet<Cut>) -> Result<BTreeMap<String, String>> {
    let mut forward: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut own: BTreeMap<String, BTreeSet<(String, String)>> = BTreeMap::new();
    let mut bridge: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let sites = topology.sites();
    let site_of = |host: &Host| sites.iter().find(|site| Some(&site.name) == host.site.as_ref());
    for Cut(a, b) in cuts {
        for one in places(topology, a)? {
            for other in places(topology, b)? {
                for (here, there) in [(&one, &other), (&other, &one)] {
                    let Place::Host(here) = here else { continue };
                    let far = match there {
                        Place::Internet => None,
                        Place::Host(there) => {
                            if let (Some(site), Some(same)) = (site_of(here), site_of(there))
                                && site == same
                            {
                                let (from, to) = (hardware_address(here.address), hardware_address(there.address));
                                let rules = bridge.entry(site.router.clone()).or_default();
                                rules.insert(format!("ether saddr {from} ether daddr {to} drop"));
                                continue;
                            }
                            Some(site_of(there).map_or(there.address, |site| site.public))
                        }
                    };
                    let near = here.address;
                    match (site_of(here), far) {
                        (Some(site), Some(far)) => {
                            let rules = forward.entry(site.router.clone()).or_default();
                            rules.insert(format!("ip saddr {near} ip daddr {far} drop"));
                            rules.insert(format!("ip saddr {far} ip daddr {near} drop"));
                        }
                        (Some(site), None) => {
                            let rules = forward.entry(site.router.clone()).or_default();
                            rules.insert(format!("ip saddr {near} oifname \"{WAN}\" drop"));
                            rules.insert(format!("iifname \"{WAN}\" ip daddr {near} drop"));
                        }
                        (None, Some(far)) => {
                            let rules = own.entry(here.name.clone()).or_default();
                            rules.insert((format!("ip saddr {far} drop"), format!("ip daddr {far} drop")));
                            // What is at a site is reached by IPv4 only.
                            if let Place::Host(Host { address6: Some(far), site: None, .. }) = there {
                                rules.insert((format!("ip6 saddr {far} drop"), format!("ip6 daddr {far} drop")));
                            }
                        }
                        (None, None) => {
                            let rules = own.entry(here.name.clone()).or_default();
                            rules.insert((format!("iifname \"{ETH}\" drop"), format!("oifname \"{ETH}\" drop")));
                        }
                    }
                }
            }
        }
    }
    let enforcing = topology.hosts().into_iter().filter(|host| {
        matches!(host.role, Role::Router | Role::Hub | Role::Client) || (host.role == Role::Node && host.site.is_none())
    });
    let mut scripts = BTreeMap::new();
    for host in enforcing {
        let mut script = String::new();
        for family in ["inet", "bridge"] {
            writeln!(script, "table {family} lab_cut\ndelete table {family} lab_cut\ntable {family} lab_cut {{")?;
            let mut chain = |hook: &str, rules: &[String]| {
                let head = format!("type filter hook {hook} priority -310; policy accept;");
                writeln!(script, "chain {hook} {{\n{head}\n{}\n}}", rules.join("\n"))
            };
            if family == "bridge" {
                let rules: Vec<_> = bridge.get(&host.name).into_iter().flatten().cloned().collect();
                chain("forward", &rules)?;
            } else {
                let pairs: Vec<_> = own.get(&host.name).into_iter().flatten().cloned().collect();
                let (incoming, outgoing): (Vec<_>, Vec<_>) = pairs.iter().cloned().unzip();
                let routed: Vec<_> = forward.get(&host.name).into_iter().flatten().cloned().collect();
                chain("input", &incoming)?;
                chain("output", &outgoing)?;
                chain("forward", &[incoming, outgoing, routed].concat())?;
            }
            writeln!(script, "}}")?;
        }
        scripts.insert(host.name, script);
    }
    Ok(scripts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scripts(cuts: &[(&str, &str)]) -> BTreeMap<String, String> {
        let topology = Topology::default();
        let cuts = cuts.iter().map(|(a, b)| Cut::new(&topology, a, b).unwrap()).collect();
        rules(&topology, &cuts).unwrap()
    }

    #[test]
    fn a_site_cut_from_the_internet_keeps_its_lan() {
        let scripts = scripts(&[("site-a", "internet")]);
        assert!(scripts["nat1"].contains("ip saddr 192.168.1.11 oifname \"wan\" drop"));
        assert!(!scripts["nat1"].contains("ether"));
        assert!(!scripts["nat2"].contains("drop"));
    }

    #[test]
    fn two_nodes_of_one_lan_are_cut_at_the_switch() {
        let scripts = scripts(&[("edge-a2", "edge-a1")]);
        assert!(scripts["nat1"].contains("ether saddr 02:00:c0:a8:01:0b ether daddr 02:00:c0:a8:01:0c drop"));
        assert!(!scripts["nat1"].contains("ip saddr"));
    }

    #[test]
    fn nodes_of_different_sites_are_cut_by_the_other_sites_public_address() {
        let scripts = scripts(&[("edge-a1", "edge-b1")]);
        assert!(scripts["nat1"].contains("ip saddr 192.168.1.11 ip daddr 203.0.113.42 drop"));
        assert!(scripts["nat2"].contains("ip saddr 192.168.2.11 ip daddr 203.0.113.41 drop"));
    }

    #[test]
    fn public_hosts_of_a_dual_stack_lab_are_cut_in_both_families() {
        let topology = Topology { dual_stack: true, ..Topology::default() };
        let cuts = BTreeSet::from([Cut::new(&topology, "cloud-1", "hub").unwrap()]);
        let script = &rules(&topology, &cuts).unwrap()["cloud-1"];
        assert!(
            script.contains("ip saddr 203.0.113.10 drop") && script.contains("ip6 saddr 2001:db8::a drop"),
            "{script}"
        );
    }

    #[test]
    fn an_unknown_place_is_refused_with_the_known_ones() {
        let error = Cut::new(&Topology::default(), "site-a", "moon").unwrap_err().to_string();
        assert!(error.contains("moon") && error.contains("site-b"), "{error}");
    }
}
