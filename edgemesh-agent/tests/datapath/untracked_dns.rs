//! Questions to cluster DNS on a host that tracks connections.

use edgemesh_agent::{config::DatapathMode, datapath::nftables::DNS_TABLE};
use hickory_proto::rr::RecordType;

use crate::{
    cluster_dns6::over_tcp,
    outside::{nft, shown},
    sites::{CLUSTER_DNS, Site, Sites, addresses_of, until},
};

const CLUSTER_DNS6: &str = "fd00:96::a";
const NAME: &str = "ns.dns.cluster.local.";
/// A firewall, for which the host tracks connections. It counts the DNS messages that it tracks.
const FIREWALL: &str = "table inet firewall { counter tracked { }; counter untracked { }; \
                        chain count { ct state untracked counter name untracked return; counter name tracked; }; \
                        chain messages { meta l4proto { tcp, udp } th dport 53 goto count; meta l4proto { tcp, udp } th sport 53 goto count; }; \
                        chain input { type filter hook input priority filter; jump messages; }; \
                        chain output { type filter hook output priority filter; jump messages; }; }";

/// How many messages were tracked, and how many not, since the last time.
fn messages(site: &Site) -> [u64; 2] {
    site.host.run(|| {
        ["tracked", "untracked"].map(|name| {
            let text = shown("nft", &["reset", "counter", "inet", "firewall", name]);
            text.split("packets ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap()
        })
    })
}

/// Has a pod and the host ask in every way.
fn ask(site: &Site) {
    for from in [&site.pod, &site.host] {
        for server in [CLUSTER_DNS, CLUSTER_DNS6] {
            assert_eq!(addresses_of(from, server, NAME, RecordType::A), ["169.254.64.1"]);
            assert_eq!(over_tcp(from, server, NAME, RecordType::A), ["169.254.64.1"]);
        }
    }
}

fn is_present(site: &Site) -> bool {
    site.host.run(|| shown("nft", &["list", "tables"])).contains(DNS_TABLE)
}

#[test]
fn a_host_that_tracks_connections_does_not_track_questions_to_cluster_dns() {
    let mut sites = Sites::start(&[], |config| {
        config.datapath = DatapathMode::Ebpf;
        config.detach_on_stop = false;
        config.dns.cluster_address6 = Some(CLUSTER_DNS6.parse().unwrap());
    });
    let site = &sites.a;
    ask(site);
    assert!(!is_present(site), "nothing is tracked there that it could be for");

    site.host.run(|| nft(FIREWALL));
    ask(site);
    assert!(messages(site)[0] > 0, "without the agent's rules they are tracked");
    // What is asked meanwhile is tracked, and so seen.
    let is_untracked = |site: &Site| {
        ask(site);
        site.metric("edgemesh_agent_datapath_dns_untracked") == 1
    };
    until("the agent sees that", || is_untracked(site));
    messages(site);
    ask(site);
    let [tracked, untracked] = messages(site);
    assert!(tracked == 0 && untracked >= 16, "{tracked} {untracked}");

    // As a firewall does that is loaded anew, with all that there is.
    site.host.run(|| nft(&format!("delete table inet {DNS_TABLE}")));
    until("the rules are back", || {
        ask(site);
        is_present(site)
    });

    sites.a.stop();
    assert!(is_present(&sites.a), "the next agent's");
    sites.a.configure(|config| config.dns.untracked = false);
    sites.a.start();
    until("an agent that shall not have them removes them", || !is_present(&sites.a));
    sites.a.stop();
    sites.a.configure(|config| (config.dns.untracked, config.detach_on_stop) = (true, true));
    sites.a.start();
    until("they are there once more", || is_untracked(&sites.a));
    sites.a.stop();
    assert!(!is_present(&sites.a));
}
