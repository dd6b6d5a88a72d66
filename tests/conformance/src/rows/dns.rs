//! DNS as pods see it.

use std::{net::Ipv6Addr, time::Duration};

use anyhow::{Result, ensure};
use edgemesh_lab::{
    command,
    settings::{STUB_DOMAIN, STUB_DOMAIN_PORT},
    topology::INTERNET_GATEWAY,
};
use serde_json::{Value, json};

use crate::{
    callers::{self, From::Pod},
    case::{Case, Row},
    manifests,
};

const CLIENTS: [&str; 2] = ["client-cloud-2", "client-edge-a1"];
pub(super) const ZONE: &str = "conformance.svc.cluster.local";

pub(super) const ROWS: &[Row] = &[
    Row::new("DNS should provide DNS for the cluster [Conformance]", cluster),
    Row::new("DNS should provide DNS for services [Conformance]", services),
    Row::new("DNS should resolve DNS of partial qualified names for services [Conformance]", partial_services),
    Row::new("DNS should resolve DNS of partial qualified names for the cluster [Conformance]", partial_cluster),
    Row::new("DNS should provide DNS for pods for Hostname [Conformance]", hostname),
    Row::new("DNS should provide DNS for pods for Subdomain [Conformance]", subdomain),
    Row::new("DNS should provide DNS for ExternalName services [Conformance]", external_name),
    Row::new("DNS should provide /etc/hosts entries for the cluster [Conformance]", hosts_file),
    Row::new("DNS should support configurable pod DNS nameservers [Conformance]", nameservers),
    Row::new("DNS should support configurable pod resolv.conf", resolv_conf),
    Row::new(
        "DNS should work with the pod containing more than 6 DNS search paths and longer than 256 search list characters",
        many_searches,
    ),
    Row::new("DNS should work with a service name that starts with a digit", digit),
    Row::new("DNS HostNetwork should provide DNS for pods with ClusterFirstWithHostNet", host_network),
    Row::new(
        "DNS configMap forward external name lookup should forward externalname lookup to upstream nameserver",
        forwards_external_name,
    ),
    Row::new(
        "DNS configMap nameserver should be able to forward names outside of the cluster to the upstream nameserver",
        forwards,
    ),
    Row::new("DNS configMap forward PTR lookup should forward PTR records lookup to upstream nameserver", forwards_ptr),
    Row::new(
        "DNS configMap nameserver should be able to change stubDomain configuration (the agents' setting)",
        stub_domain,
    ),
    Row::new("DNS should answer reverse names of Services and headless endpoints (PTR)", reverse),
];

/// Asks in pods, until the answer has all of the given words.
pub(super) fn answers(case: &Case<'_>, pods: &[&str], kind: &str, name: &str, words: &[&str]) -> Result<()> {
    for pod in pods {
        case.until(&format!("{pod} asks for {name} ({kind})"), Duration::from_secs(15), || {
            // It also fails where one step of a search does.
            let (_, said) = callers::run(case.field, Pod(pod), &["nslookup", &format!("-type={kind}"), name])?;
            // Behind the first empty line: the server's own address is before it.
            let answer = said.split_once("\n\n").map_or(said.as_str(), |(_, answer)| answer);
            ensure!(words.iter().all(|word| answer.contains(word)), "{said}");
            Ok(())
        })?;
    }
    Ok(())
}

/// Looks a short name up as programs do, through the C library and its search path.
fn finds(case: &Case<'_>, pods: &[&str], name: &str, ip: &str) -> Result<()> {
    for pod in pods {
        case.until(&format!("{pod} finds {name}"), Duration::from_secs(15), || {
            // It says the address, whether that answers or not.
            let (_, said) = callers::run(case.field, Pod(pod), &["ping", "-c", "1", "-W", "1", name])?;
            ensure!(said.contains(&format!("({ip})")), "{said}");
            Ok(())
        })?;
    }
    Ok(())
}

/// The name under which an address is asked for.
pub(super) fn arpa(ip: &str) -> String {
    if let Ok(ip) = ip.parse::<Ipv6Addr>() {
        let digits = ip.octets().into_iter().rev().flat_map(|octet| [octet & 15, octet >> 4]);
        return digits.map(|digit| format!("{digit:x}.")).collect::<String>() + "ip6.arpa";
    }
    let octets: Vec<_> = ip.split('.').rev().collect();
    format!("{}.in-addr.arpa", octets.join("."))
}

fn cluster(case: &Case<'_>) -> Result<()> {
    let service = case.field.get("service kubernetes --namespace default")?;
    let ip = service["spec"]["clusterIP"].as_str().unwrap_or_default();
    answers(case, &CLIENTS, "a", "kubernetes.default.svc.cluster.local", &[ip])
}

/// The headless Service over the shared servers, and a plain one.
fn services(case: &Case<'_>) -> Result<()> {
    let plain = case.service("plain", json!({}))?;
    let headless = case.service("headless", json!({"clusterIP": "None"}))?;
    let (plain_name, headless_name) = (format!("{}.{ZONE}", plain.name), format!("{}.{ZONE}", headless.name));
    answers(case, &CLIENTS, "a", &plain_name, &[plain.ip()])?;
    let mut ips = Vec::new();
    for node in crate::field::NODES {
        ips.push(case.field.pod_ip(&format!("server-{node}"))?);
    }
    answers(case, &CLIENTS, "a", &headless_name, &ips)?;
    answers(case, &CLIENTS, "srv", &format!("_http._tcp.{plain_name}"), &[&plain_name, "80"])?;
    answers(case, &CLIENTS, "srv", &format!("_http._tcp.{headless_name}"), &[&headless_name, "8080"])?;
    answers(case, &CLIENTS, "ptr", &arpa(plain.ip()), &[&plain_name])
}

fn partial_services(case: &Case<'_>) -> Result<()> {
    let service = case.service("svc", json!({}))?;
    for end in ["", ".conformance", ".conformance.svc"] {
        for client in CLIENTS {
            // The C library walks the search path; nslookup is not needed for it.
            case.until(&format!("{client} calls {}{end}", service.name), Duration::from_secs(15), || {
                case.shell(client, &format!("call http://{}{end}/", service.name)).map(drop)
            })?;
        }
        finds(case, &CLIENTS, &format!("{}{end}", service.name), service.ip())?;
    }
    Ok(())
}

fn partial_cluster(case: &Case<'_>) -> Result<()> {
    let service = case.field.get("service kubernetes --namespace default")?;
    let ip = service["spec"]["clusterIP"].as_str().unwrap_or_default();
    for name in ["kubernetes.default", "kubernetes.default.svc"] {
        finds(case, &CLIENTS, name, ip)?;
    }
    Ok(())
}

/// A pod with a host name in a headless Service of the same name as its subdomain: its name, its full DNS name and its address.
fn named_pod(case: &Case<'_>) -> Result<(String, String, String)> {
    let service = case.service("headless", json!({"clusterIP": "None", "selector": {"case": case.id}}))?;
    let name = case.name("pod");
    let mut pod = manifests::pod(&name, "edge-b1", &[("case", &case.id)], &[]);
    pod["spec"]["hostname"] = json!("some-host");
    pod["spec"]["subdomain"] = json!(service.name);
    let ip = case.pod(pod)?;
    let full = format!("some-host.{}.{ZONE}", service.name);
    answers(case, &CLIENTS, "a", &full, &[&ip])?;
    Ok((name, full, ip))
}

fn hostname(case: &Case<'_>) -> Result<()> {
    let (pod, full, _) = named_pod(case)?;
    let said = case.shell(&pod, "hostname; hostname -f; cat /etc/hosts")?;
    ensure!(said.starts_with("some-host\n") && said.contains(&full), "{said}");
    Ok(())
}

/// The name leads to the pod itself, from the pod and from other networks.
fn subdomain(case: &Case<'_>) -> Result<()> {
    let (pod, full, ip) = named_pod(case)?;
    let short = full.trim_end_matches(&format!(".{ZONE}")).to_owned();
    for client in CLIENTS {
        case.reaches(Pod(client), &format!("http://{short}:8080/"), &[&pod])?;
    }
    answers(case, &[&pod], "a", &full, &[&ip])
}

fn external_name(case: &Case<'_>) -> Result<()> {
    let alias = |target: &str| {
        case.service("svc", json!({"type": "ExternalName", "externalName": target, "selector": null, "ports": null}))
    };
    let name = format!("{}.{ZONE}", alias("outside.example")?.name);
    answers(case, &CLIENTS, "cname", &name, &["outside.example"])?;
    answers(case, &CLIENTS, "a", &name, &["outside.example", "198.51.100.7"])?;
    alias("other.example")?;
    answers(case, &CLIENTS, "cname", &name, &["other.example"])?;
    let service = case.service("svc", json!({"type": "ClusterIP", "externalName": null}))?;
    answers(case, &CLIENTS, "a", &name, &[service.ip()])
}

fn hosts_file(case: &Case<'_>) -> Result<()> {
    for client in CLIENTS {
        let said = case.shell(client, "cat /etc/hosts; ping -c 1 -W 2 $(hostname)")?;
        let ip = case.field.pod_ip(client)?;
        ensure!(said.contains(&format!("{ip}\t{client}")) || said.contains(&format!("{ip} {client}")), "{said}");
        ensure!(said.contains("127.0.0.1\tlocalhost") || said.contains("127.0.0.1 localhost"), "{said}");
    }
    Ok(())
}

fn with_dns(case: &Case<'_>, policy: &str, config: Value) -> Result<(String, String)> {
    let name = case.name("pod");
    let mut pod = manifests::pod(&name, "cloud-1", &[], &[]);
    pod["spec"]["dnsPolicy"] = json!(policy);
    pod["spec"]["dnsConfig"] = config;
    case.pod(pod)?;
    let file = case.shell(&name, "cat /etc/resolv.conf")?;
    Ok((name, file))
}

fn nameservers(case: &Case<'_>) -> Result<()> {
    let config = json!({"nameservers": ["1.1.1.1"], "searches": ["resolv.conf.local"]});
    let (_, file) = with_dns(case, "None", config)?;
    ensure!(file.contains("nameserver 1.1.1.1") && file.contains("search resolv.conf.local"), "{file}");
    ensure!(!file.contains("cluster.local"), "{file}");
    Ok(())
}

fn resolv_conf(case: &Case<'_>) -> Result<()> {
    let config = json!({
        "nameservers": ["203.0.113.53"], "searches": ["example"], "options": [{"name": "ndots", "value": "2"}],
    });
    let (pod, file) = with_dns(case, "None", config)?;
    ensure!(file.contains("nameserver 203.0.113.53") && file.contains("ndots:2"), "{file}");
    answers(case, &[&pod], "a", "outside", &["198.51.100.7"])
}

fn many_searches(case: &Case<'_>) -> Result<()> {
    let searches: Vec<_> = (0..9).map(|n| format!("search-{n}-{}.example", "x".repeat(30))).collect();
    let (pod, file) = with_dns(case, "ClusterFirst", json!({"searches": searches}))?;
    ensure!(searches.iter().all(|search| file.contains(search)), "{file}");
    let service = case.service("svc", json!({}))?;
    finds(case, &[&pod], &service.name, service.ip())
}

/// Names that begin with a digit are DNS labels, if not of old: upstream allows them since 1.34, and this API serves 1.32.
fn digit(case: &Case<'_>) -> Result<()> {
    let refused = case.field.kubectl("create service clusterip 1svc --tcp=80", "");
    let error = format!("{:#}", refused.err().unwrap_or_else(|| anyhow::anyhow!("1svc was taken")));
    ensure!(error.contains("metadata.name"), "{error}");
    Ok(())
}

fn host_network(case: &Case<'_>) -> Result<()> {
    let service = case.service("svc", json!({}))?;
    for pod in ["host-cloud-2", "host-edge-a1"] {
        let file = case.shell(pod, "cat /etc/resolv.conf")?;
        ensure!(file.contains("nameserver 10.96.0.10") && file.contains("conformance.svc.cluster.local"), "{file}");
        finds(case, &[pod], &service.name, service.ip())?;
        answers(case, &[pod], "a", "outside.example", &["198.51.100.7"])?;
    }
    Ok(())
}

fn forwards_external_name(case: &Case<'_>) -> Result<()> {
    let service = case.service(
        "svc",
        json!({"type": "ExternalName", "externalName": "other.example", "selector": null, "ports": null}),
    )?;
    answers(case, &CLIENTS, "a", &format!("{}.{ZONE}", service.name), &["198.51.100.8"])
}

fn forwards(case: &Case<'_>) -> Result<()> {
    answers(case, &CLIENTS, "a", "outside.example", &["198.51.100.7"])
}

fn forwards_ptr(case: &Case<'_>) -> Result<()> {
    answers(case, &CLIENTS, "ptr", &arpa("198.51.100.7"), &["outside.example"])
}

/// The server for other names knows nothing of the domain.
fn stub_domain(case: &Case<'_>) -> Result<()> {
    let internet = case.field.lab.namespace("internet");
    let words = format!(
        "dnsmasq --conf-file=/dev/null --no-resolv --no-hosts --user=root --bind-interfaces --listen-address={INTERNET_GATEWAY} --port={STUB_DOMAIN_PORT} --pid-file={} --address=/{STUB_DOMAIN}/198.51.100.9",
        internet.folder.join("stub-domain.pid").display()
    );
    let words: Vec<_> = words.split(' ').map(str::to_owned).collect();
    // It goes to the background, and ends with the lab.
    command::finish(&mut internet.command("shell", &words)?)?;
    answers(case, &CLIENTS, "a", &format!("some.{STUB_DOMAIN}"), &["198.51.100.9"])?;
    answers(case, &CLIENTS, "a", "outside.example", &["198.51.100.7"])
}

fn reverse(case: &Case<'_>) -> Result<()> {
    let service = case.service("svc", json!({}))?;
    answers(case, &CLIENTS, "ptr", &arpa(service.ip()), &[&format!("{}.{ZONE}", service.name)])?;
    let (_, full, ip) = named_pod(case)?;
    answers(case, &CLIENTS, "ptr", &arpa(&ip), &[&full])
}
