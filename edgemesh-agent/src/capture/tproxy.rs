//! The capture by a table of nftables, where the eBPF program can't serve or isn't wanted: `tproxy` hands packets to the agent's
//! listeners. Without them the packets are refused.

use std::{collections::BTreeSet, net::SocketAddr};

use edgemesh_mesh::cidr::Cidr;

use crate::datapath::nftables::{self, NftError};

/// The table that belongs to the capture, in this network namespace.
pub(super) const TABLE: &str = "edgemesh_capture";

/// Switches of br_netfilter, in each network namespace.
const BRIDGE_CALLS: [&str; 2] =
    ["/proc/sys/net/bridge/bridge-nf-call-iptables", "/proc/sys/net/bridge/bridge-nf-call-ip6tables"];

/// The first of all hooks. Packets of a bridge's ports pass the table while they are in the bridge, where br_netfilter is on: the
/// socket that `tproxy` gives them is lost when they leave it, and br_netfilter, which hooks in here too, has them pass no other
/// chain again. Of two hooks in one place the kernel asks the younger first.
const BEFORE_ALL: i32 = i32::MIN;

/// Whether packets in a bridge pass the hooks of IP, so that the table must be younger than what sees to that.
pub(super) fn bridges_call() -> bool {
    BRIDGE_CALLS.into_iter().any(|switch| std::fs::read_to_string(switch).is_ok_and(|value| value.trim() == "1"))
}

/// Captures exactly these ranges, in one transaction.
pub(super) async fn apply(ranges: &BTreeSet<Cidr>, listeners: &[SocketAddr]) -> Result<(), NftError> {
    run(script(ranges, listeners)).await
}

/// Removes the table, if it is there.
pub(super) async fn remove() -> Result<(), NftError> {
    run(format!("table inet {TABLE}\ndelete table inet {TABLE}\n")).await
}

/// The table. Connections that a listener has taken are found by their own sockets first, as `tproxy` does. What it finds no
/// socket for goes on to the last rules.
fn script(ranges: &BTreeSet<Cidr>, listeners: &[SocketAddr]) -> String {
    let mut sets = String::new();
    let (mut rules, mut bridged) = (String::new(), String::new());
    for (family, set, kind, listener) in [
        ("ip", "pods4", "ipv4_addr", listeners.iter().find(|listener| listener.is_ipv4())),
        ("ip6", "pods6", "ipv6_addr", listeners.iter().find(|listener| listener.is_ipv6())),
    ] {
        let of_family = ranges.iter().filter(|range| range.network().is_ipv4() == (family == "ip"));
        let elements: Vec<String> = of_family.map(Cidr::to_string).collect();
        if elements.is_empty() {
            continue;
        }
        let elements = elements.join(", ");
        sets.push_str(&format!(
            "\tset {set} {{\n\t\ttype {kind}\n\t\tflags interval\n\t\tauto-merge\n\t\telements = {{ {elements} }}\n\t}}\n"
        ));
        if let Some(listener) = listener {
            let rule =
                format!("\t\t{family} daddr @{set} meta l4proto {{ tcp, udp }} tproxy {family} to {listener} accept\n");
            bridged.push_str(&rule);
            rules.push_str(&rule);
        }
        rules.push_str(&format!("\t\t{family} daddr @{set} meta l4proto tcp reject with tcp reset\n"));
        rules.push_str(&format!("\t\t{family} daddr @{set} meta l4proto udp reject\n"));
    }
    format!(
        "table inet {TABLE}\ndelete table inet {TABLE}\ntable inet {TABLE} {{\n{sets}\tchain bridged {{\n\
         \t\ttype filter hook prerouting priority {BEFORE_ALL}; policy accept;\n{bridged}\t}}\n\tchain prerouting {{\n\
         \t\ttype filter hook prerouting priority mangle; policy accept;\n{rules}\t}}\n}}\n"
    )
}

/// The program is waited for elsewhere than where tasks run.
async fn run(script: String) -> Result<(), NftError> {
    let done = tokio::task::spawn_blocking(move || nftables::transaction(&script)).await;
    done.unwrap_or_else(|error| Err(NftError::Run(std::io::Error::other(error))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_families_with_ranges_have_rules_and_nothing_passes_them() {
        let ranges = ["10.244.3.0/24", "10.244.4.0/24"].map(|range| Cidr::parse(range).unwrap()).into();
        let script = script(&ranges, &["127.0.0.1:4001".parse().unwrap(), "[::1]:4001".parse().unwrap()]);
        assert!(script.contains("elements = { 10.244.3.0/24, 10.244.4.0/24 }"), "{script}");
        assert!(
            script.contains("ip daddr @pods4 meta l4proto { tcp, udp } tproxy ip to 127.0.0.1:4001 accept"),
            "{script}"
        );
        assert!(script.contains("ip daddr @pods4 meta l4proto tcp reject"), "{script}");
        assert!(!script.contains("ip6"), "{script}");
    }
}
