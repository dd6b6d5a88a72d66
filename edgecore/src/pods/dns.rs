//! A pod's resolv.conf (Kubernetes, "DNS for Services and Pods", "Pod's DNS Policy").

use std::net::IpAddr;

use k8s_cri::v1::DnsConfig;
use k8s_openapi::api::core::v1::{Pod, PodSpec};

/// What the C library and Kubernetes allow.
const MAX_SERVERS: usize = 3;
const MAX_SEARCHES: usize = 32;
const MAX_SEARCH_CHARS: usize = 2048;

/// The host's own resolver settings.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct HostResolver {
    servers: Vec<String>,
    searches: Vec<String>,
    options: Vec<String>,
}

impl HostResolver {
    /// Parses a resolv.conf (resolv.conf(5)): the last `search` or `domain` counts.
    pub(crate) fn parse(text: &str) -> Self {
        let mut found = Self::default();
        for line in text.lines() {
            let mut words = line.split_whitespace().map(str::to_owned);
            match words.next().as_deref() {
                Some("nameserver") => found.servers.extend(words.next()),
                Some("search" | "domain") => found.searches = words.filter(|word| word != ".").collect(),
                Some("options") => found.options.extend(words),
                _ => {}
            }
        }
        found
    }
}

/// The cluster's DNS: its addresses and its domain.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ClusterDns<'a> {
    pub(crate) servers: &'a [IpAddr],
    pub(crate) domain: &'a str,
}

/// The resolver settings of a pod.
pub(crate) fn dns_config(pod: &Pod, cluster: ClusterDns<'_>, host: &HostResolver) -> DnsConfig {
    let spec = pod.spec.as_ref();
    let policy = spec.and_then(|s| s.dns_policy.as_deref()).unwrap_or("ClusterFirst");
    let host_network = spec.is_some_and(is_host_network);
    let mut config = match policy {
        "None" => DnsConfig::default(),
        "ClusterFirst" if !host_network => cluster_first(pod, cluster, host),
        "ClusterFirstWithHostNet" => cluster_first(pod, cluster, host),
        _ => host_config(host),
    };
    if let Some(own) = spec.and_then(|s| s.dns_config.as_ref()) {
        append_unique(&mut config.servers, own.nameservers.iter().flatten().cloned());
        append_unique(&mut config.searches, own.searches.iter().flatten().cloned());
        for option in own.options.iter().flatten() {
            let Some(name) = &option.name else { continue };
            config.options.retain(|set| set.split(':').next() != Some(name));
            config.options.push(match &option.value {
                Some(value) => format!("{name}:{value}"),
                None => name.clone(),
            });
        }
    }
    config.servers.truncate(MAX_SERVERS);
    config.searches.truncate(MAX_SEARCHES);
    while config.searches.iter().map(|s| s.len() + 1).sum::<usize>() > MAX_SEARCH_CHARS {
        config.searches.pop();
    }
    config
}

/// Whether the pod lives in the node's network.
pub(crate) fn is_host_network(spec: &PodSpec) -> bool {
    spec.host_network == Some(true)
}

fn host_config(host: &HostResolver) -> DnsConfig {
    DnsConfig { servers: host.servers.clone(), searches: host.searches.clone(), options: host.options.clone() }
}

fn cluster_first(pod: &Pod, cluster: ClusterDns<'_>, host: &HostResolver) -> DnsConfig {
    if cluster.servers.is_empty() {
        return host_config(host);
    }
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
    let domain = cluster.domain;
    let mut searches = vec![format!("{namespace}.svc.{domain}"), format!("svc.{domain}"), domain.to_owned()];
    append_unique(&mut searches, host.searches.iter().cloned());
    DnsConfig {
        servers: cluster.servers.iter().map(ToString::to_string).collect(),
        searches,
        options: vec!["ndots:5".to_owned()],
    }
}

fn append_unique(list: &mut Vec<String>, more: impl Iterator<Item = String>) {
    for item in more {
        if !list.contains(&item) {
            list.push(item);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn config(spec: serde_json::Value) -> DnsConfig {
        let mut spec = spec;
        spec["containers"] = json!([]);
        let pod = serde_json::from_value(json!({"metadata": {"namespace": "shop"}, "spec": spec})).unwrap();
        let host = HostResolver::parse("# c\nnameserver 192.168.1.1\nsearch lan.example .\noptions timeout:2 rotate\n");
        let servers = ["10.96.0.10".parse().unwrap()];
        dns_config(&pod, ClusterDns { servers: &servers, domain: "cluster.local" }, &host)
    }

    #[test]
    fn cluster_first_asks_the_cluster_and_keeps_the_host_search() {
        for spec in [json!({}), json!({"dnsPolicy": "ClusterFirstWithHostNet", "hostNetwork": true})] {
            let config = config(spec);
            assert_eq!(config.servers, ["10.96.0.10"]);
            assert_eq!(
                config.searches,
                ["shop.svc.cluster.local", "svc.cluster.local", "cluster.local", "lan.example"]
            );
            assert_eq!(config.options, ["ndots:5"]);
        }
    }

    #[test]
    fn host_network_pods_and_default_use_the_host_resolver() {
        for spec in [json!({"dnsPolicy": "Default"}), json!({"hostNetwork": true})] {
            let config = config(spec);
            assert_eq!(
                (config.servers, config.searches),
                (vec!["192.168.1.1".to_owned()], vec!["lan.example".to_owned()])
            );
            assert_eq!(config.options, ["timeout:2", "rotate"]);
        }
    }

    #[test]
    fn none_takes_only_the_pods_own_settings_and_options_replace_by_name() {
        let own = json!({"nameservers": ["1.1.1.1", "1.1.1.1", "2.2.2.2", "3.3.3.3", "4.4.4.4"], "searches": ["a"],
            "options": [{"name": "ndots", "value": "2"}, {"name": "edns0"}]});
        let none = config(json!({"dnsPolicy": "None", "dnsConfig": own}));
        assert_eq!(none.servers, ["1.1.1.1", "2.2.2.2", "3.3.3.3"]);
        assert_eq!(none.options, ["ndots:2", "edns0"]);
        let merged = config(json!({"dnsConfig": own}));
        assert_eq!(merged.servers, ["10.96.0.10", "1.1.1.1", "2.2.2.2"]);
        assert_eq!(merged.options, ["ndots:2", "edns0"]);
    }
}
