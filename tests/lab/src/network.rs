//! Links, addresses and NAT: virtual Ethernet pairs between the hosts' namespaces, never in the machine's own.

use std::{net::Ipv4Addr, path::Path, process::Command, thread, time::Duration};

use anyhow::{Context, Result};

use crate::{
    command::{feed, ip},
    host::HostNamespace,
    topology::{Host, INTERNET_DNS, INTERNET_GATEWAY, Role, Topology},
};

/// The interface that a router has to the internet, and every other host to its switch.
pub const WAN: &str = "wan";
/// The interface of a host that is no router.
pub const ETH: &str = "eth0";
const LAN_BRIDGE: &str = "lan";
const INTERNET_BRIDGE: &str = "inet";

/// The hardware address that the lab gives to the host with this address.
pub fn hardware_address(address: Ipv4Addr) -> String {
    let [a, b, c, d] = address.octets();
    format!("02:00:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
}

/// Runs a script of nftables commands in a host's network namespace.
///
/// # Errors
/// When nft refuses it.
pub fn nft(netns: &str, script: &str) -> Result<()> {
    let namespace = format!("--net=/run/netns/{netns}");
    feed(Command::new("nsenter").args([&namespace, "nft", "-f", "-"]), script)
        .map(drop)
        .with_context(|| format!("nftables in {netns}:\n{script}"))
}

fn sysctl(netns: &str, name: &str, value: &str) -> Result<()> {
    let namespace = format!("--net=/run/netns/{netns}");
    let path = format!("/proc/sys/{name}");
    feed(Command::new("nsenter").args([&namespace, "tee", &path]), value).map(drop)
}

/// Creates a host's network namespace and connects it. The switch that it hangs on must be there: the internet
/// first, then public hosts and routers, then the nodes of sites.
///
/// # Errors
/// When the kernel refuses a step.
pub fn connect(
    topology: &Topology,
    host: &Host,
    namespace: &HostNamespace,
    netns_of: &dyn Fn(&str) -> String,
) -> Result<()> {
    let netns = &namespace.netns;
    ip(&format!("netns add {netns}"))?;
    ip(&format!("-n {netns} link set lo up"))?;
    match host.role {
        Role::Internet => {
            add_bridge(netns, INTERNET_BRIDGE, INTERNET_GATEWAY)?;
            ip(&format!("-n {netns} addr add {INTERNET_GATEWAY}/24 dev {INTERNET_BRIDGE}"))?;
            ip(&format!("-n {netns} addr add {INTERNET_DNS}/24 dev {INTERNET_BRIDGE}"))?;
            ip(&format!("-n {netns} link set {INTERNET_BRIDGE} up"))?;
        }
        Role::Client | Role::Hub => {
            attach(host, netns, ETH, &netns_of("internet"), INTERNET_BRIDGE, INTERNET_GATEWAY)?;
            // A node that is called at a load balancer's address before it serves it forwards the packet back into the same
            // network and says so: the client would then call the wrong host for minutes, which balancers don't.
            for interface in ["all", ETH] {
                sysctl(netns, &format!("net/ipv4/conf/{interface}/accept_redirects"), "0")?;
            }
        }
        Role::Router => {
            attach(host, netns, WAN, &netns_of("internet"), INTERNET_BRIDGE, INTERNET_GATEWAY)?;
            let site =
                topology.sites().into_iter().find(|site| site.router == host.name).context("router of no site")?;
            add_bridge(netns, LAN_BRIDGE, site.gateway())?;
            ip(&format!("-n {netns} addr add {}/24 dev {LAN_BRIDGE}", site.gateway()))?;
            ip(&format!("-n {netns} link set {LAN_BRIDGE} up"))?;
            sysctl(netns, "net/ipv4/ip_forward", "1")?;
            nft(netns, &nat_rules(topology, &site.name))?;
        }
        Role::Node => {
            let site = topology.sites().into_iter().find(|site| Some(&site.name) == host.site.as_ref());
            match site {
                Some(site) => attach(host, netns, ETH, &netns_of(&site.router), LAN_BRIDGE, site.gateway())?,
                None => attach(host, netns, ETH, &netns_of("internet"), INTERNET_BRIDGE, INTERNET_GATEWAY)?,
            }
        }
    }
    Ok(())
}

/// A bridge with a hardware address of its own. Without one it takes the lowest of its ports': it changed when a host was
/// rebooted, and the others sent to the old one until their neighbour entries were given up, half a minute later.
fn add_bridge(netns: &str, bridge: &str, address: Ipv4Addr) -> Result<()> {
    ip(&format!("-n {netns} link add {bridge} address {} type bridge", hardware_address(address)))
}

/// A cable from `interface` of the host to a port of the switch's bridge.
fn attach(host: &Host, netns: &str, interface: &str, switch: &str, bridge: &str, gateway: Ipv4Addr) -> Result<()> {
    let port = format!("p-{}", host.name);
    if Path::new("/run/netns").join(switch).exists() && port_exists(switch, &port) {
        // What is left of the host before a reboot: the kernel removes it a moment after its namespace.
        ip(&format!("-n {switch} link del {port}"))
            .or_else(|error| if port_exists(switch, &port) { Err(error) } else { Ok(()) })?;
        while port_exists(switch, &port) {
            thread::sleep(Duration::from_millis(5));
        }
    }
    let hardware = hardware_address(host.address);
    ip(&format!(
        "link add name {interface} address {hardware} netns {netns} type veth peer name {port} netns {switch}"
    ))?;
    ip(&format!("-n {switch} link set {port} master {bridge} up"))?;
    ip(&format!("-n {netns} addr add {}/24 dev {interface}", host.address))?;
    if let Some(address) = host.address6 {
        // The lab's addresses are unique: nobody need wait for a second until the kernel knows.
        ip(&format!("-n {netns} addr add {address}/64 dev {interface} nodad"))?;
    }
    ip(&format!("-n {netns} link set {interface} up"))?;
    ip(&format!("-n {netns} route add default via {gateway}"))
}

fn port_exists(netns: &str, port: &str) -> bool {
    ip(&format!("-n {netns} link show {port}")).is_ok()
}

/// A home router: hides the LAN behind its address, lets answers in, and forwards 80 and 443 to the site's gateway.
/// It drops what comes to itself unasked, as such routers do. Answered packets would be remembered as connections, and keep their
/// addresses and ports from the LAN's hosts: no hole could be punched.
fn nat_rules(topology: &Topology, site: &str) -> String {
    let gateway = topology.nodes().into_iter().find(|node| node.site.as_deref() == Some(site) && node.gateway);
    let forward = gateway.map(|node| format!("iifname \"{WAN}\" tcp dport {{ 80, 443 }} dnat ip to {}", node.address));
    format!(
        "table inet lab_nat {{
            chain prerouting {{ type nat hook prerouting priority dstnat; policy accept; {} ; }}
            chain postrouting {{ type nat hook postrouting priority srcnat; policy accept; oifname \"{WAN}\" masquerade; }}
            chain forward {{
                type filter hook forward priority filter; policy accept;
                iifname \"{WAN}\" ct state established,related accept
                iifname \"{WAN}\" ct status dnat accept
                iifname \"{WAN}\" drop
            }}
            chain input {{
                type filter hook input priority filter; policy accept;
                iifname \"{WAN}\" ct state established,related accept
                iifname \"{WAN}\" drop
            }}
        }}\n",
        forward.unwrap_or_default()
    )
    .replace("accept;  ;", "accept;")
}
