//! What CoreDNS' kubernetes plugin is tested for, as data: own objects of the same shapes, asked for the same things.
//!
//! docs/conformance-dns.md says where each case comes from, and which ones are left out and why. The whole table runs for
//! two cluster domains with two TTLs.

use hickory_proto::{
    op::{Edns, Message, OpCode, ResponseCode},
    rr::{Name, RData, Record, RecordType, rdata},
};
use serde_json::{Value, json};

use crate::harness::{Dns, Upstream, addresses, question, service, slice};

fn objects(domain: &str) -> Vec<Value> {
    let http = json!([{"name": "http", "port": 80}]);
    let pod = |ip: &str, host: Option<&str>| {
        let mut endpoint = json!({"addresses": [ip], "conditions": {"ready": true}});
        if let Some(host) = host {
            endpoint["hostname"] = json!(host);
        }
        endpoint
    };
    let known = json!([{"addresses": ["10.244.1.61"], "targetRef": {"kind": "Pod", "namespace": "prod", "name": "p"}}]);
    vec![
        json!({
            "kind": "Node", "metadata": {"name": "edge-a1"},
            "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd00:244::/64"]},
        }),
        json!({"kind": "Node", "metadata": {"name": "edge-a2"}, "spec": {"podCIDR": "10.244.2.0/24"}}),
        service(
            "infra/resolver",
            json!({"clusterIP": "10.96.0.10", "ports": [{"name": "dns", "port": 53, "protocol": "UDP"}]}),
        ),
        service("prod/api", json!({"clusterIP": "10.96.1.1", "ports": http})),
        slice("prod/api", 1, "IPv4", http.clone(), json!([pod("10.244.1.11", Some("api-a"))])),
        service("prod/idle", json!({"clusterIP": "10.96.1.2", "ports": http})),
        slice("prod/idle", 1, "IPv4", http.clone(), json!([])),
        service("prod/six", json!({"clusterIP": "fd00:96::6", "ports": http})),
        service(
            "prod/both",
            json!({"clusterIP": "10.96.1.3", "clusterIPs": ["10.96.1.3", "fd00:96::3"], "ports": http}),
        ),
        service("prod/ring", json!({"clusterIP": "None", "ports": http})),
        slice(
            "prod/ring",
            1,
            "IPv4",
            http.clone(),
            json!([
                pod("10.244.1.21", None),
                pod("10.244.1.22", None),
                pod("10.244.1.23", Some("twin")),
                pod("10.244.1.24", Some("twin")),
            ]),
        ),
        slice("prod/ring", 2, "IPv6", http.clone(), json!([pod("fd00:244::1", None), pod("fd00:244::2", None)])),
        service("prod/tail", json!({"clusterIP": "None", "ports": http})),
        slice("prod/tail", 1, "IPv6", http.clone(), json!([pod("fd00:244:0:1::", None)])),
        service("prod/bare", json!({"clusterIP": "None"})),
        slice("prod/bare", 1, "IPv4", json!([]), json!([pod("10.244.1.30", None)])),
        service("prod/out", json!({"type": "ExternalName", "externalName": "ext.web.example", "ports": http})),
        service("prod/large", json!({"type": "ExternalName", "externalName": "large.web.example", "ports": http})),
        service(
            "prod/inner",
            json!({"type": "ExternalName", "externalName": format!("api.prod.svc.{domain}."), "ports": http}),
        ),
        // Reverse: an address that two slices hold, and one that two Services select.
        service("prod/rev", json!({"clusterIP": "10.96.1.100", "ports": http})),
        slice(
            "prod/rev",
            1,
            "IPv4",
            http.clone(),
            json!([pod("10.244.2.100", Some("rev-a")), pod("10.244.2.99", Some("shared"))]),
        ),
        slice("prod/rev", 2, "IPv6", http.clone(), json!([pod("fd00:244::abcd", Some("rev-b"))])),
        slice("prod/rev", 3, "IPv4", http.clone(), json!([pod("10.244.2.100", Some("rev-a"))])),
        service("prod/rev2", json!({"clusterIP": "10.96.1.101", "ports": http})),
        slice("prod/rev2", 1, "IPv4", http.clone(), json!([pod("10.244.2.99", Some("shared"))])),
        service("prod/known", json!({"clusterIP": "10.96.1.102", "ports": http})),
        slice("prod/known", 1, "IPv4", http, known),
    ]
}

/// Where it comes from; name and type; code; answers and additional records without TTL and class, in any order. `@` is
/// the name that is asked for, `~` the cluster domain.
type Case = (&'static str, &'static str, RecordType, ResponseCode, &'static [&'static str], &'static [&'static str]);

#[rustfmt::skip]
const CASES: &[Case] = {
    use RecordType::{A, AAAA, CNAME, HINFO, NS, PTR, SOA, SRV, TXT};
    use ResponseCode::{NXDomain as NX, NoError as OK};
    &[
    // handler: Services
    ("handler", "api.prod.svc.~.", A, OK, &["@ A 10.96.1.1"], &[]),
    ("handler", "idle.prod.svc.~.", A, OK, &["@ A 10.96.1.2"], &[]),
    ("handler", "api.prod.svc.~.", SRV, OK, &["@ SRV 0 100 80 api.prod.svc.~."], &["api.prod.svc.~. A 10.96.1.1"]),
    ("handler", "idle.prod.svc.~.", SRV, OK, &["@ SRV 0 100 80 idle.prod.svc.~."], &["idle.prod.svc.~. A 10.96.1.2"]),
    ("handler", "six.prod.svc.~.", SRV, OK, &["@ SRV 0 100 80 six.prod.svc.~."], &["six.prod.svc.~. AAAA fd00:96::6"]),
    ("handler", "_http._tcp.api.prod.svc.~.", SRV, OK, &["@ SRV 0 100 80 api.prod.svc.~."], &["api.prod.svc.~. A 10.96.1.1"]),
    ("handler", "_http._tcp.idle.prod.svc.~.", SRV, OK, &["@ SRV 0 100 80 idle.prod.svc.~."], &["idle.prod.svc.~. A 10.96.1.2"]),
    ("handler", "_http._tcp.six.prod.svc.~.", SRV, OK, &["@ SRV 0 100 80 six.prod.svc.~."], &["six.prod.svc.~. AAAA fd00:96::6"]),
    ("handler", "six.prod.svc.~.", AAAA, OK, &["@ AAAA fd00:96::6"], &[]),
    ("handler", "both.prod.svc.~.", A, OK, &["@ A 10.96.1.3"], &[]),
    ("handler", "both.prod.svc.~.", AAAA, OK, &["@ AAAA fd00:96::3"], &[]),
    ("handler", "both.prod.svc.~.", SRV, OK, &["@ SRV 0 100 80 both.prod.svc.~."],
        &["both.prod.svc.~. A 10.96.1.3", "both.prod.svc.~. AAAA fd00:96::3"]),
    // handler: what isn't there, and what has no such record
    ("handler", "api.prod.svc.~.", AAAA, OK, &[], &[]),
    ("handler", "none.prod.svc.~.", AAAA, NX, &[], &[]),
    ("handler", "none.prod.svc.~.", A, NX, &[], &[]),
    ("handler", "none.nowhere.svc.~.", A, NX, &[], &[]),
    ("handler", "dns-version.~.", TXT, OK, &["@ TXT 1.1.0"], &[]),
    ("handler", "api.prod.svc.~.", TXT, OK, &[], &[]),
    ("handler", "none.nowhere.svc.~.", TXT, NX, &[], &[]),
    ("handler", "no-such.ring.prod.svc.~.", A, NX, &[], &[]),
    ("handler", "no-such.none.prod.svc.~.", A, NX, &[], &[]),
    ("handler", "svc.~.", A, OK, &[], &[]),
    ("handler", "pod.~.", A, OK, &[], &[]),
    ("handler", "prod.svc.~.", A, OK, &[], &[]),
    ("handler", "svc.~.", NS, OK, &[], &[]),
    ("handler", "prod.svc.~.", NS, OK, &[], &[]),
    ("handler", "nowhere.~.", NS, NX, &[], &[]),
    ("handler", "nowhere.svc.~.", NS, NX, &[], &[]),
    ("handler", "api.prod.svc.~.", SOA, OK, &[], &[]),
    ("handler", "host.out.prod.svc.~.", CNAME, NX, &[], &[]),
    ("handler", "a.host.out.prod.svc.~.", CNAME, NX, &[], &[]),
    // handler: headless Services and their endpoints
    ("handler", "ring.prod.svc.~.", A, OK, &["@ A 10.244.1.21", "@ A 10.244.1.22", "@ A 10.244.1.23", "@ A 10.244.1.24"], &[]),
    ("handler", "ring.prod.svc.~.", AAAA, OK, &["@ AAAA fd00:244::1", "@ AAAA fd00:244::2"], &[]),
    ("handler", "bare.prod.svc.~.", A, OK, &["@ A 10.244.1.30"], &[]),
    ("handler", "_http._tcp.ring.prod.svc.~.", SRV, OK, &[
        "@ SRV 0 16 80 10-244-1-21.ring.prod.svc.~.", "@ SRV 0 16 80 10-244-1-22.ring.prod.svc.~.",
        "@ SRV 0 16 80 fd00-244--1.ring.prod.svc.~.", "@ SRV 0 16 80 fd00-244--2.ring.prod.svc.~.",
        "@ SRV 0 16 80 twin.ring.prod.svc.~."], &[
        "10-244-1-21.ring.prod.svc.~. A 10.244.1.21", "10-244-1-22.ring.prod.svc.~. A 10.244.1.22",
        "fd00-244--1.ring.prod.svc.~. AAAA fd00:244::1", "fd00-244--2.ring.prod.svc.~. AAAA fd00:244::2",
        "twin.ring.prod.svc.~. A 10.244.1.23", "twin.ring.prod.svc.~. A 10.244.1.24"]),
    ("handler", "fd00-244--1.ring.prod.svc.~.", AAAA, OK, &["@ AAAA fd00:244::1"], &[]),
    ("handler", "fd00-244--2.ring.prod.svc.~.", AAAA, OK, &["@ AAAA fd00:244::2"], &[]),
    ("handler", "fd00-244--2.ring.prod.svc.~.", A, OK, &[], &[]),
    // No label ends with a dash.
    ("endpoint names", "fd00-244-0-1--0.tail.prod.svc.~.", AAAA, OK, &["@ AAAA fd00:244:0:1::"], &[]),
    ("handler", "10-244-1-30.bare.prod.svc.~.", A, OK, &["@ A 10.244.1.30"], &[]),
    ("handler", "10-244-1-21.ring.prod.svc.~.", A, OK, &["@ A 10.244.1.21"], &[]),
    ("handler", "10-244-1-22.ring.prod.svc.~.", A, OK, &["@ A 10.244.1.22"], &[]),
    ("handler", "10-244-1-22.ring.prod.svc.~.", AAAA, OK, &[], &[]),
    ("handler", "twin.ring.prod.svc.~.", A, OK, &["@ A 10.244.1.23", "@ A 10.244.1.24"], &[]),
    ("handler", "api-a.api.prod.svc.~.", A, OK, &["@ A 10.244.1.11"], &[]),
    // handler: external names
    ("handler", "out.prod.svc.~.", CNAME, OK, &["@ CNAME ext.web.example."], &[]),
    ("handler", "out.prod.svc.~.", A, OK, &["@ CNAME ext.web.example.", "ext.web.example. A 192.0.2.34"], &[]),
    ("handler", "out.prod.svc.~.", AAAA, OK, &["@ CNAME ext.web.example.", "ext.web.example. AAAA 2001:db8::34"], &[]),
    ("handler", "inner.prod.svc.~.", A, OK, &["@ CNAME api.prod.svc.~.", "api.prod.svc.~. A 10.96.1.1"], &[]),
    ("handler", "inner.prod.svc.~.", AAAA, OK, &["@ CNAME api.prod.svc.~."], &[]),
    // ignore_emptyservice off, as by default
    ("ignore_emptyservice", "out.prod.svc.~.", CNAME, OK, &["@ CNAME ext.web.example."], &[]),
    // parse
    ("parse", "api.prod.pood.~.", A, NX, &[], &[]),
    ("parse", "too.long.for.what.this.is.pod.~.", A, NX, &[], &[]),
    ("parse", "us-west-2a.pin._zone.ring.prod.svc.~.", A, NX, &[], &[]),
    // apex
    ("apex", "~.", HINFO, OK, &[], &[]),
    ("apex", "~.", NS, OK, &["@ NS ns.dns.~."], &["ns.dns.~. A 127.0.0.1"]),
    ("apex", "~.", A, OK, &[], &[]),
    ("apex", "~.", AAAA, OK, &[], &[]),
    ("apex", "~.", SRV, OK, &[], &[]),
    ("ns", "ns.dns.~.", A, OK, &["@ A 127.0.0.1"], &[]),
    ("ns", "ns.dns.~.", AAAA, OK, &[], &[]),
    // case
    ("case", "nOt-a-SerVice.prod.SVC.~.", A, NX, &[], &[]),
    ("case", "aPi.PROD.sVc.~.", A, OK, &["@ A 10.96.1.1"], &[]),
    ("case", "_HtTp._TcP.aPi.Prod.SvC.~.", SRV, OK, &["@ SRV 0 100 80 api.prod.svc.~."], &["api.prod.svc.~. A 10.96.1.1"]),
    // pod records: verified where the catalog knows the pod, else by the nodes' pod ranges
    ("pod_verified", "10-244-1-61.prod.pod.~.", A, OK, &["@ A 10.244.1.61"], &[]),
    ("pod_verified", "10-244-1-61.infra.pod.~.", A, NX, &[], &[]),
    ("pod_verified", "prod.pod.~.", A, OK, &[], &[]),
    ("pod_verified", "infra.svc.~.", A, OK, &[], &[]),
    ("pod_verified", "nowhere.pod.~.", A, NX, &[], &[]),
    ("pod_verified", "172-16-0-2.prod.pod.~.", A, NX, &[], &[]),
    ("pod_insecure", "10-244-1-200.prod.pod.~.", A, OK, &["@ A 10.244.1.200"], &[]),
    ("pod_insecure", "10-244-1-200.prod.pod.~.", AAAA, OK, &[], &[]),
    ("pod_insecure", "fd00-244--77.prod.pod.~.", AAAA, OK, &["@ AAAA fd00:244::77"], &[]),
    ("pod_insecure", "word.prod.pod.~.", A, NX, &[], &[]),
    ("pod_insecure", "word.prod.pod.~.", AAAA, NX, &[], &[]),
    ("pod_insecure", "word.prod.pod.~.", HINFO, NX, &[], &[]),
    ("pod_insecure", "word.nowhere.pod.~.", A, NX, &[], &[]),
    // reverse
    ("reverse", "100.2.244.10.in-addr.arpa.", PTR, OK, &["@ PTR rev-a.rev.prod.svc.~."], &[]),
    ("reverse", "100.1.96.10.in-addr.arpa.", PTR, OK, &["@ PTR rev.prod.svc.~."], &[]),
    ("reverse", "d.c.b.a.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.4.4.2.0.0.0.d.f.ip6.arpa.", PTR, OK,
        &["@ PTR rev-b.rev.prod.svc.~."], &[]),
    ("reverse", "1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.4.4.2.0.0.0.d.f.ip6.arpa.", PTR, OK,
        &["@ PTR fd00-244--1.ring.prod.svc.~."], &[]),
    ("reverse", "6.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.6.9.0.0.0.0.d.f.ip6.arpa.", PTR, OK,
        &["@ PTR six.prod.svc.~."], &[]),
    ("reverse", "101.2.244.10.in-addr.arpa.", PTR, NX, &[], &[]),
    ("reverse", "9.9.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.4.4.2.0.0.0.d.f.ip6.arpa.", PTR, NX, &[], &[]),
    ("reverse", "100.2.244.10.in-addr.arpa.", A, OK, &[], &[]),
    ("reverse", "example.org.~.", PTR, NX, &[], &[]),
    ("reverse", "api.prod.svc.~.", PTR, OK, &[], &[]),
    ("reverse", "100.2.244.10.~.", PTR, NX, &[], &[]),
    ("reverse", "99.2.244.10.in-addr.arpa.", PTR, OK, &["@ PTR shared.rev.prod.svc.~.", "@ PTR shared.rev2.prod.svc.~."], &[]),
    ]
};

/// What upstream knows.
async fn internet(ttl: u32) -> Upstream {
    Upstream::start(move |query, tcp| {
        let name = query.name.to_string();
        let mut answer = addresses(query, &["192.0.2.34", "2001:db8::34"], ttl);
        // This one is never had in full.
        if name == "large.web.example." {
            answer.metadata.truncation = true;
            return (!tcp).then_some(answer);
        }
        Some(answer)
    })
    .await
}

fn lines(records: &[Record]) -> Vec<String> {
    let mut lines: Vec<String> = records.iter().map(ToString::to_string).collect();
    lines.sort();
    lines
}

fn expected(records: &[&str], name: &str, domain: &str, ttl: u32) -> Vec<String> {
    let line = |text: &&str| {
        let text = text.replace('@', name).replace('~', domain);
        let (owner, rest) = text.split_once(' ').unwrap();
        format!("{owner} {ttl} IN {rest}")
    };
    let mut lines: Vec<String> = records.iter().map(line).collect();
    lines.sort();
    lines
}

/// The first alias comes first, and each alias before what it leads to.
fn aliases_lead_on(answer: &Message) -> bool {
    let mut known: Vec<Name> = answer.queries.iter().map(|query| query.name.clone()).collect();
    answer.answers.iter().all(|record| {
        let follows = known.contains(&record.name);
        if let RData::CNAME(target) = &record.data {
            known.push(target.0.clone());
        }
        follows
    })
}

async fn run(domain: &str, ttl: u32) -> Vec<String> {
    let internet = internet(ttl).await;
    let dns = Dns::start_with(&objects(domain), &[internet.address], |config| {
        config.cluster_domain = domain.to_owned();
        config.ttl = ttl;
        // The plugin alone, without autopath.
        config.search_path_completion = false;
    });
    let mut wrong = Vec::new();
    for (origin, name, kind, code, answers, additional) in CASES {
        let name = &name.replace('~', domain);
        let mut message = question(name, *kind);
        message.set_edns(Edns::new().set_max_payload(1232).clone());
        for answer in [dns.send(&message).await, dns.ask_tcp(name, *kind).await] {
            let authority: Vec<String> = answer
                .authorities
                .iter()
                .map(|record| match &record.data {
                    RData::SOA(soa) => {
                        let zone = record.name.to_string();
                        let inside = name.to_lowercase().ends_with(&zone.to_lowercase());
                        assert_eq!((soa.refresh, soa.retry, soa.expire, soa.minimum), (7200, 1800, 86_400, ttl));
                        format!("SOA {} {}", record.ttl, if inside { "of the name's zone" } else { &zone })
                    }
                    other => format!("{other:?}"),
                })
                .collect();
            let negative = answers.is_empty();
            let proper = if negative { vec![format!("SOA {ttl} of the name's zone")] } else { vec![] };
            let right = answer.metadata.response_code == *code
                && lines(&answer.answers) == expected(answers, name, domain, ttl)
                && lines(&answer.additionals).join(" ").to_lowercase()
                    == expected(additional, name, domain, ttl).join(" ").to_lowercase()
                && authority == proper
                && answer.metadata.authoritative
                && !answer.metadata.truncation
                && aliases_lead_on(&answer);
            if !right {
                wrong.push(format!(
                    "{origin}: {name} {kind}: {} {:?} {authority:?} {:?}",
                    answer.metadata.response_code,
                    lines(&answer.answers),
                    lines(&answer.additionals)
                ));
            }
        }
    }
    wrong
}

#[tokio::test]
async fn every_case_of_the_kubernetes_plugin_holds_in_the_usual_domain() {
    let wrong = run("cluster.local", 5).await;
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

#[tokio::test]
async fn every_case_of_the_kubernetes_plugin_holds_in_another_domain_with_another_ttl() {
    let wrong = run("inter.mesh.test", 30).await;
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

#[tokio::test]
async fn the_zone_has_one_start_of_authority_that_grows() {
    let dns = Dns::start(&objects("cluster.local"), &[]);
    let serial = |answer: &Message| match &answer.answers[0].data {
        RData::SOA(soa) => {
            assert_eq!(soa.mname.to_string(), "ns.dns.cluster.local.");
            assert_eq!(soa.rname.to_string(), "hostmaster.cluster.local.");
            soa.serial
        }
        other => panic!("{other:?}"),
    };
    let before = serial(&dns.ask("cluster.local.", RecordType::SOA).await);
    dns.catalog.delete_service("prod", "api");
    dns.catalog.publish();
    assert!(serial(&dns.ask("cluster.local.", RecordType::SOA).await) > before);
}

#[tokio::test]
async fn case_is_kept_in_every_section() {
    let dns = Dns::start(&objects("cluster.local"), &[]);
    let spelled = async |name: &str, kind| {
        let mut message = question("x.", kind);
        message.queries[0].name = Name::from_ascii(name).unwrap();
        dns.send(&message).await
    };
    let denied = spelled("NoT-a-service.prod.svc.ClUsTeR.lOcAl.", RecordType::A).await;
    assert!(denied.authorities[0].name.eq_case(&Name::from_ascii("ClUsTeR.lOcAl.").unwrap()));
    let apex = spelled("Cluster.local.", RecordType::SOA).await;
    assert!(apex.answers[0].name.eq_case(&Name::from_ascii("Cluster.local.").unwrap()));
}

#[tokio::test]
async fn an_alias_whose_target_is_cut_upstream_is_cut_too() {
    let internet = internet(5).await;
    let dns = Dns::start(&objects("cluster.local"), &[internet.address]);
    let name = "large.prod.svc.cluster.local.";
    let answer = dns.ask(name, RecordType::A).await;
    assert!(answer.metadata.truncation);
    assert!(lines(&answer.answers).contains(&format!("{name} 5 IN CNAME large.web.example.")));
    assert_eq!(dns.ask_tcp(name, RecordType::A).await.metadata.response_code, ResponseCode::ServFail);
}

#[tokio::test]
async fn an_alias_fails_when_upstream_does_and_is_denied_when_its_target_is() {
    let internet = Upstream::start(|_, _| {
        let mut answer = Message::response(0, OpCode::Query);
        answer.metadata.response_code = ResponseCode::NXDomain;
        let root = Name::root();
        let soa = rdata::SOA::new(root.clone(), root.clone(), 1, 1, 1, 1, 30);
        answer.add_authority(Record::from_rdata(root, 300, RData::SOA(soa)));
        Some(answer)
    })
    .await;
    let dns = Dns::start(&objects("cluster.local"), &[internet.address]);
    let name = "out.prod.svc.cluster.local.";
    let denied = dns.ask(name, RecordType::A).await;
    assert_eq!((denied.metadata.response_code, denied.answers.len()), (ResponseCode::NXDomain, 1));
    let alone = Dns::start(&objects("cluster.local"), &[]);
    let failed = alone.ask(name, RecordType::A).await;
    assert_eq!((failed.metadata.response_code, failed.answers.len()), (ResponseCode::ServFail, 1));
}

#[tokio::test]
async fn edns_is_answered_with_edns_and_plain_queries_without() {
    let dns = Dns::start(&objects("cluster.local"), &[]);
    for name in ["api.prod.svc.cluster.local.", "none.prod.svc.cluster.local.", "ext.web.example."] {
        let plain = dns.send(&question(name, RecordType::A)).await;
        assert!(plain.edns.is_none(), "{name}");
        let mut message = question(name, RecordType::A);
        message.set_edns(Edns::new().set_max_payload(4096).set_dnssec_ok(true).clone());
        let answer = dns.send(&message).await;
        let edns = answer.edns.as_ref().unwrap();
        assert!(edns.flags().dnssec_ok && edns.version() == 0 && edns.max_payload() == 1232, "{name}");
        assert_eq!(plain.metadata.response_code, answer.metadata.response_code);
    }
}
