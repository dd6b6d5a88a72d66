//! Names of the cluster: the records of the Kubernetes DNS specification 1.1.0, and what clients expect beyond it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use hickory_proto::{
    op::{Edns, Message, OpCode, ResponseCode},
    rr::{Name, RData, Record, RecordType, rdata},
};
use serde_json::{Value, json};

use crate::harness::{Dns, Upstream, apply, question, service, slice, sorted};

fn objects() -> Vec<Value> {
    let http = json!([{"name": "http", "port": 8080, "protocol": "TCP"}]);
    vec![
        json!({
            "kind": "Node", "metadata": {"name": "edge-a1"}, "spec": {"podCIDR": "10.244.1.0/24"},
            "status": {"addresses": [{"type": "InternalIP", "address": "192.168.1.11"}]},
        }),
        service(
            "default/web",
            json!({
                "clusterIP": "10.96.0.20", "clusterIPs": ["10.96.0.20"],
                "ports": [{"name": "http", "port": 80}, {"name": "dns", "port": 53, "protocol": "UDP"}],
            }),
        ),
        slice(
            "default/web",
            1,
            "IPv4",
            http.clone(),
            json!([
                {"addresses": ["10.244.1.5"], "conditions": {"ready": true}},
                {"addresses": ["10.244.1.6"], "conditions": {"ready": false}},
            ]),
        ),
        service("default/unnamed", json!({"clusterIP": "10.96.0.21", "ports": [{"port": 80}]})),
        service(
            "default/dual",
            json!({
                "clusterIP": "10.96.0.22", "clusterIPs": ["10.96.0.22", "fd00:96::22"], "ports": [{"name": "http", "port": 80}],
            }),
        ),
        service("db/sts", json!({"clusterIP": "None", "ports": [{"name": "http", "port": 8080}]})),
        slice(
            "db/sts",
            1,
            "IPv4",
            http.clone(),
            json!([
                {"addresses": ["10.244.1.7"], "hostname": "sts-0", "conditions": {"ready": true}},
                {"addresses": ["10.244.1.8"], "hostname": "sts-1", "conditions": {"ready": false}},
            ]),
        ),
        slice("db/sts", 2, "IPv4", http.clone(), json!([{"addresses": ["10.244.2.9"]}])),
        slice("db/sts", 3, "IPv6", http.clone(), json!([{"addresses": ["fd00::9"]}])),
        service("db/unready", json!({"clusterIP": "None", "publishNotReadyAddresses": true, "ports": []})),
        slice(
            "db/unready",
            1,
            "IPv4",
            json!([]),
            json!([
                {"addresses": ["10.244.1.30"], "hostname": "early", "conditions": {"ready": false}},
            ]),
        ),
        service("db/nobody", json!({"clusterIP": "None", "ports": [{"name": "http", "port": 80}]})),
        slice("db/nobody", 1, "IPv4", http, json!([{"addresses": ["10.244.1.31"], "conditions": {"ready": false}}])),
        service("default/inside", json!({"type": "ExternalName", "externalName": "web.default.svc.cluster.local"})),
        service("default/twice", json!({"type": "ExternalName", "externalName": "inside.default.svc.cluster.local"})),
        service("default/dangling", json!({"type": "ExternalName", "externalName": "no.default.svc.cluster.local"})),
        service("default/round", json!({"type": "ExternalName", "externalName": "round.default.svc.cluster.local"})),
    ]
}

/// Name, type, code, answers (sorted; `@` is the name).
type Case = (&'static str, RecordType, ResponseCode, &'static [&'static str]);

#[rustfmt::skip]
const CASES: &[Case] = {
    use RecordType::{A, AAAA, ANY, CNAME, MX, NS, PTR, SOA, SRV, TXT};
    use ResponseCode::{NXDomain, NoError, ServFail};
    &[
    // 2.2 schema version
    ("dns-version.cluster.local.", TXT, NoError, &["@ 5 IN TXT 1.1.0"]),
    ("dns-version.cluster.local.", A, NoError, &[]),
    // 2.3.1 cluster addresses
    ("web.default.svc.cluster.local.", A, NoError, &["@ 5 IN A 10.96.0.20"]),
    ("web.default.svc.cluster.local.", ANY, NoError, &["@ 5 IN A 10.96.0.20"]),
    ("web.default.svc.cluster.local.", AAAA, NoError, &[]),
    ("web.default.svc.cluster.local.", MX, NoError, &[]),
    ("wEb.DEFAULT.svc.Cluster.Local.", A, NoError, &["@ 5 IN A 10.96.0.20"]),
    ("dual.default.svc.cluster.local.", AAAA, NoError, &["@ 5 IN AAAA fd00:96::22"]),
    ("dual.default.svc.cluster.local.", A, NoError, &["@ 5 IN A 10.96.0.22"]),
    ("no.default.svc.cluster.local.", A, NXDomain, &[]),
    ("web.no.svc.cluster.local.", A, NXDomain, &[]),
    ("web.default.cluster.local.", A, NXDomain, &[]),
    ("a.b.c.d.e.f.cluster.local.", A, NXDomain, &[]),
    // names on the way
    ("svc.cluster.local.", A, NoError, &[]),
    ("default.svc.cluster.local.", A, NoError, &[]),
    ("nobody-here.svc.cluster.local.", A, NXDomain, &[]),
    ("_tcp.web.default.svc.cluster.local.", SRV, NoError, &[]),
    ("_tcp.unnamed.default.svc.cluster.local.", SRV, NXDomain, &[]),
    // 2.3.2 ports
    ("_http._tcp.web.default.svc.cluster.local.", SRV, NoError, &["@ 5 IN SRV 0 100 80 web.default.svc.cluster.local."]),
    ("_dns._udp.web.default.svc.cluster.local.", SRV, NoError, &["@ 5 IN SRV 0 100 53 web.default.svc.cluster.local."]),
    ("_http._udp.web.default.svc.cluster.local.", SRV, NXDomain, &[]),
    ("_http._tcp.web.default.svc.cluster.local.", A, NoError, &[]),
    ("_._tcp.unnamed.default.svc.cluster.local.", SRV, NXDomain, &[]),
    ("web.default.svc.cluster.local.", SRV, NoError, &[
        "@ 5 IN SRV 0 50 53 web.default.svc.cluster.local.", "@ 5 IN SRV 0 50 80 web.default.svc.cluster.local."]),
    // 2.3.3 addresses of Services
    ("20.0.96.10.in-addr.arpa.", PTR, NoError, &["@ 5 IN PTR web.default.svc.cluster.local."]),
    ("20.0.96.10.in-addr.arpa.", A, NoError, &[]),
    ("2.2.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.6.9.0.0.0.0.d.f.ip6.arpa.", PTR, NoError,
        &["@ 5 IN PTR dual.default.svc.cluster.local."]),
    // 2.4.1 headless Services and their hosts
    ("sts.db.svc.cluster.local.", A, NoError, &["@ 5 IN A 10.244.1.7", "@ 5 IN A 10.244.2.9"]),
    ("sts.db.svc.cluster.local.", AAAA, NoError, &["@ 5 IN AAAA fd00::9"]),
    ("sts-0.sts.db.svc.cluster.local.", A, NoError, &["@ 5 IN A 10.244.1.7"]),
    ("STS-0.sts.db.svc.cluster.local.", A, NoError, &["@ 5 IN A 10.244.1.7"]),
    ("sts-0.sts.db.svc.cluster.local.", AAAA, NoError, &[]),
    ("sts-1.sts.db.svc.cluster.local.", A, NXDomain, &[]),
    ("10-244-2-9.sts.db.svc.cluster.local.", A, NoError, &["@ 5 IN A 10.244.2.9"]),
    ("10-244-1-7.sts.db.svc.cluster.local.", A, NXDomain, &[]),
    ("fd00--9.sts.db.svc.cluster.local.", AAAA, NoError, &["@ 5 IN AAAA fd00::9"]),
    ("10-244-1-5.web.default.svc.cluster.local.", A, NoError, &["@ 5 IN A 10.244.1.5"]),
    ("nobody.db.svc.cluster.local.", A, NXDomain, &[]),
    ("unready.db.svc.cluster.local.", A, NoError, &["@ 5 IN A 10.244.1.30"]),
    ("early.unready.db.svc.cluster.local.", A, NoError, &["@ 5 IN A 10.244.1.30"]),
    // 2.4.2 their ports
    ("_http._tcp.sts.db.svc.cluster.local.", SRV, NoError, &[
        "@ 5 IN SRV 0 33 8080 10-244-2-9.sts.db.svc.cluster.local.",
        "@ 5 IN SRV 0 33 8080 fd00--9.sts.db.svc.cluster.local.",
        "@ 5 IN SRV 0 33 8080 sts-0.sts.db.svc.cluster.local."]),
    ("_http._tcp.nobody.db.svc.cluster.local.", SRV, NXDomain, &[]),
    ("sts-0.sts.db.svc.cluster.local.", SRV, NoError, &["@ 5 IN SRV 0 100 8080 sts-0.sts.db.svc.cluster.local."]),
    // 2.4.3 their addresses
    ("7.1.244.10.in-addr.arpa.", PTR, NoError, &["@ 5 IN PTR sts-0.sts.db.svc.cluster.local."]),
    ("9.2.244.10.in-addr.arpa.", PTR, NoError, &["@ 5 IN PTR 10-244-2-9.sts.db.svc.cluster.local."]),
    ("5.1.244.10.in-addr.arpa.", PTR, NoError, &["@ 5 IN PTR 10-244-1-5.web.default.svc.cluster.local."]),
    ("77.1.244.10.in-addr.arpa.", PTR, NXDomain, &[]),
    ("6.1.244.10.in-addr.arpa.", PTR, NXDomain, &[]),
    // 2.5 aliases
    ("inside.default.svc.cluster.local.", A, NoError, &[
        "@ 5 IN CNAME web.default.svc.cluster.local.", "web.default.svc.cluster.local. 5 IN A 10.96.0.20"]),
    ("inside.default.svc.cluster.local.", CNAME, NoError, &["@ 5 IN CNAME web.default.svc.cluster.local."]),
    ("inside.default.svc.cluster.local.", AAAA, NoError, &["@ 5 IN CNAME web.default.svc.cluster.local."]),
    ("twice.default.svc.cluster.local.", A, NoError, &[
        "@ 5 IN CNAME inside.default.svc.cluster.local.",
        "inside.default.svc.cluster.local. 5 IN CNAME web.default.svc.cluster.local.",
        "web.default.svc.cluster.local. 5 IN A 10.96.0.20"]),
    ("dangling.default.svc.cluster.local.", A, NXDomain, &["@ 5 IN CNAME no.default.svc.cluster.local."]),
    // pods, as other cluster DNS servers offer them
    ("10-244-1-99.default.pod.cluster.local.", A, NoError, &["@ 5 IN A 10.244.1.99"]),
    ("192-168-1-11.default.pod.cluster.local.", A, NoError, &["@ 5 IN A 192.168.1.11"]),
    ("8-8-8-8.default.pod.cluster.local.", A, NXDomain, &[]),
    // the zone itself
    ("cluster.local.", NS, NoError, &["@ 5 IN NS ns.dns.cluster.local."]),
    ("cluster.local.", A, NoError, &[]),
    ("ns.dns.cluster.local.", A, NoError, &["@ 5 IN A 127.0.0.1"]),
    // nobody to ask about the rest
    ("example.com.", A, ServFail, &[]),
    ("4.3.2.1.in-addr.arpa.", PTR, ServFail, &[]),
    ("11.1.168.192.in-addr.arpa.", PTR, ServFail, &[]),
    ("xcluster.local.", SOA, ServFail, &[]),
    ]
};

#[tokio::test]
async fn every_record_of_the_specification_is_answered_over_udp_and_tcp() {
    let dns = Dns::start(&objects(), &[]);
    let mut wrong = Vec::new();
    for (name, kind, code, expected) in CASES {
        // The name comes back as it was asked, in its very case.
        let mut expected: Vec<String> = expected.iter().map(|line| line.replace('@', name)).collect();
        expected.sort();
        for answer in [dns.ask(name, *kind).await, dns.ask_tcp(name, *kind).await] {
            let got = sorted(&answer.answers);
            if answer.metadata.response_code != *code || got != expected {
                wrong.push(format!("{name} {kind}: {} {got:?}", answer.metadata.response_code));
            }
            let authoritative = *code != ResponseCode::ServFail;
            assert_eq!(answer.metadata.authoritative, authoritative, "{name}");
            assert!(answer.metadata.recursion_available && answer.metadata.recursion_desired, "{name}");
            // Whoever caches that a name has no such record must know for how long (RFC 2308).
            let needs_soa = authoritative && (expected.is_empty() || *code == ResponseCode::NXDomain);
            let soa = answer.authorities.iter().any(|record| record.record_type() == RecordType::SOA);
            assert_eq!(soa, needs_soa, "{name} {kind}");
        }
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

/// An upstream with one name for every address.
async fn naming(target: &'static str) -> Upstream {
    Upstream::start(move |query, _| {
        let mut answer = Message::response(0, OpCode::Query);
        let ptr = RData::PTR(rdata::PTR(Name::from_ascii(target).unwrap()));
        answer.add_answer(Record::from_rdata(query.name.clone(), 60, ptr));
        Some(answer)
    })
    .await
}

#[tokio::test]
async fn only_pod_addresses_are_denied_and_only_where_nobody_else_is_to_be_asked() {
    let (site, corp) = (naming("site.example.").await, naming("corp.example.").await);
    let by_hand = [
        service("default/printer", json!({"clusterIP": "10.96.0.30", "ports": [{"port": 80}]})),
        slice(
            "default/printer",
            1,
            "IPv4",
            json!([{"port": 80}]),
            json!([{"addresses": ["192.168.5.5"], "conditions": {"ready": false}}]),
        ),
    ];
    let all = [&objects()[..], &by_hand].concat();
    let dns = Dns::start(&all, &[site.address]);
    let name_of = async |dns: &Dns, name: &str| {
        let answer = dns.ask(name, RecordType::PTR).await;
        answer
            .answers
            .first()
            .map_or_else(|| answer.metadata.response_code.to_string(), |record| record.data.to_string())
    };
    let denied = ResponseCode::NXDomain.to_string();
    assert_eq!(name_of(&dns, "11.1.168.192.in-addr.arpa.").await, "site.example.", "a node's own address");
    assert_eq!(name_of(&dns, "5.5.168.192.in-addr.arpa.").await, "site.example.", "an endpoint of the site");
    assert_eq!(name_of(&dns, "77.1.244.10.in-addr.arpa.").await, denied, "a pod's");
    assert_eq!(site.asked(), 2);
    let zones = [("10.in-addr.arpa".to_owned(), vec![corp.address.to_string()])];
    let dns = Dns::start_with(&all, &[site.address], |config| config.zones = zones.into());
    assert_eq!(name_of(&dns, "77.1.244.10.in-addr.arpa.").await, "corp.example.");
    assert_eq!(name_of(&dns, "7.1.244.10.in-addr.arpa.").await, "sts-0.sts.db.svc.cluster.local.");
}

#[tokio::test]
async fn pods_in_the_network_of_one_node_have_a_name_each() {
    let pod = |port: u16, name: &str| {
        let endpoint = json!([{"addresses": ["192.168.1.11"], "hostname": name}]);
        slice(
            "db/ceph",
            usize::from(port),
            "IPv4",
            json!([{"name": "http", "port": port, "protocol": "TCP"}]),
            endpoint,
        )
    };
    let own = [
        service("db/ceph", json!({"clusterIP": "None", "ports": [{"name": "http", "port": 8080}]})),
        pod(8080, "mon-a"),
        pod(8081, "mon-b"),
    ];
    let dns = Dns::start(&[&objects()[..], &own].concat(), &[]);
    let all = "ceph.db.svc.cluster.local.";
    assert_eq!(sorted(&dns.ask(all, RecordType::A).await.answers), [format!("{all} 5 IN A 192.168.1.11")]);
    for (name, port) in [("mon-a", 8080), ("mon-b", 8081)] {
        let name = format!("{name}.{all}");
        let a = dns.ask(&name, RecordType::A).await;
        assert_eq!(sorted(&a.answers), [format!("{name} 5 IN A 192.168.1.11")]);
        let srv = dns.ask(&name, RecordType::SRV).await;
        assert_eq!(sorted(&srv.answers), [format!("{name} 5 IN SRV 0 100 {port} {name}")]);
    }
    let ptr = dns.ask("11.1.168.192.in-addr.arpa.", RecordType::PTR).await;
    let names = ["mon-a", "mon-b"].map(|name| format!("11.1.168.192.in-addr.arpa. 5 IN PTR {name}.{all}"));
    assert_eq!(sorted(&ptr.answers), names);
}

#[tokio::test]
async fn a_host_name_that_endpoints_with_several_ports_share_has_each_address_once() {
    let ports = json!([{"name": "http", "port": 80}, {"name": "metrics", "port": 81}]);
    let pair = json!([
        {"addresses": ["10.244.1.40"], "hostname": "pair"},
        {"addresses": ["10.244.1.41"], "hostname": "pair"},
    ]);
    let objects = [
        service("db/twins", json!({"clusterIP": "10.96.0.40", "ports": ports})),
        slice("db/twins", 1, "IPv4", ports, pair),
    ];
    let dns = Dns::start(&objects, &[]);
    let name = "pair.twins.db.svc.cluster.local.";
    let records = ["10.244.1.40", "10.244.1.41"].map(|ip| format!("{name} 5 IN A {ip}"));
    assert_eq!(sorted(&dns.ask(name, RecordType::A).await.answers), records);
    assert_eq!(sorted(&dns.ask(name, RecordType::SRV).await.additionals), records);
}

#[tokio::test]
async fn srv_answers_carry_the_addresses_of_their_targets() {
    let dns = Dns::start(&objects(), &[]);
    let answer = dns.ask("_http._tcp.sts.db.svc.cluster.local.", RecordType::SRV).await;
    assert_eq!(
        sorted(&answer.additionals),
        [
            "10-244-2-9.sts.db.svc.cluster.local. 5 IN A 10.244.2.9",
            "fd00--9.sts.db.svc.cluster.local. 5 IN AAAA fd00::9",
            "sts-0.sts.db.svc.cluster.local. 5 IN A 10.244.1.7",
        ]
    );
    let answer = dns.ask("cluster.local.", RecordType::NS).await;
    assert_eq!(sorted(&answer.additionals), ["ns.dns.cluster.local. 5 IN A 127.0.0.1"]);
}

#[tokio::test]
async fn an_alias_that_leads_to_itself_ends_with_a_failure() {
    let dns = Dns::start(&objects(), &[]);
    let answer = dns.ask("round.default.svc.cluster.local.", RecordType::A).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
}

#[tokio::test]
async fn a_change_of_the_catalog_is_in_the_next_answer() {
    let dns = Dns::start(&objects(), &[]);
    let name = "new.default.svc.cluster.local.";
    assert_eq!(dns.ask(name, RecordType::A).await.metadata.response_code, ResponseCode::NXDomain);
    apply(&dns.catalog, &[service("default/new", json!({"clusterIP": "10.96.1.1", "ports": [{"port": 80}]}))]);
    dns.catalog.publish();
    assert_eq!(sorted(&dns.ask(name, RecordType::A).await.answers), [format!("{name} 5 IN A 10.96.1.1")]);
    dns.catalog.delete_service("default", "new");
    dns.catalog.publish();
    assert_eq!(dns.ask(name, RecordType::A).await.metadata.response_code, ResponseCode::NXDomain);
}

/// The number of an address that [`moving`] gave out.
fn number(data: &RData) -> Option<usize> {
    let RData::A(address) = data else { return None };
    let [_, _, high, low] = address.octets();
    (high >= 128).then(|| usize::from(high - 128) << 8 | usize::from(low))
}

fn moving(number: usize) -> String {
    format!("10.244.{}.{}", 128 + (number >> 8), number & 255)
}

/// In each round a headless Service gets a new endpoint in a new slice and loses the old one, a Service gets other ports and labels,
/// and another comes and goes.
#[tokio::test(flavor = "multi_thread")]
async fn while_everything_changes_no_name_is_denied_and_nobody_is_led_to_what_was_gone() {
    const ROUNDS: usize = 1000;
    let ports = || json!([{"name": "http", "port": 8080, "protocol": "TCP"}]);
    let one_more =
        move |round: usize| slice("db/sts", 9 + round % 2, "IPv4", ports(), json!([{"addresses": [moving(round)]}]));
    let dns = Dns::start(&[&objects()[..], &[one_more(0)]].concat(), &[]);
    // Rounds that have begun, and that are over.
    let (begun, over) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let catalog = Arc::clone(&dns.catalog);
    let (begin, end) = (Arc::clone(&begun), Arc::clone(&over));
    let changes = tokio::task::spawn_blocking(move || {
        for round in 1..=ROUNDS {
            begin.store(round, Ordering::SeqCst);
            let all = json!([{"name": "http", "port": 80}, {"name": format!("port-{round}"), "port": 1000 + round}]);
            let mut web = service("default/web", json!({"clusterIP": "10.96.0.20", "ports": all}));
            web["metadata"]["labels"] = json!({"round": round.to_string()});
            let other = service("default/other", json!({"clusterIP": "10.96.1.1", "ports": [{"port": 80}]}));
            apply(&catalog, &[one_more(round), web, other]);
            catalog.publish();
            catalog.delete_endpoint_slice("db", &format!("sts-{}", 9 + (round - 1) % 2));
            catalog.delete_service("default", "other");
            catalog.publish();
            end.store(round, Ordering::SeqCst);
        }
    });
    let mut questions = 0;
    while !changes.is_finished() || questions < 100 {
        let web = dns.ask("web.default.svc.cluster.local.", RecordType::A).await;
        assert_eq!(sorted(&web.answers), ["web.default.svc.cluster.local. 5 IN A 10.96.0.20"]);
        let before = over.load(Ordering::SeqCst);
        let headless = dns.ask("sts.db.svc.cluster.local.", RecordType::A).await;
        let after = begun.load(Ordering::SeqCst);
        assert_eq!(headless.metadata.response_code, ResponseCode::NoError);
        let moved: Vec<_> = headless.answers.iter().filter_map(|record| number(&record.data)).collect();
        assert!(
            !moved.is_empty() && moved.iter().all(|round| (before..=after).contains(round)),
            "{moved:?} in rounds {before} to {after}"
        );
        assert_eq!(headless.answers.len() - moved.len(), 2, "those that stay: {:?}", headless.answers);
        questions += 1;
    }
    changes.await.unwrap();
    println!("{questions} questions of each name in {ROUNDS} rounds");
}

#[tokio::test]
async fn each_of_ten_thousand_services_is_answered_by_its_name_without_delay() {
    let name = |number: usize| format!("service-{number}.default.svc.cluster.local.");
    let ip = |number: usize| format!("10.97.{}.{}", number >> 8, number & 255);
    let services: Vec<_> = (0..10_000)
        .map(|number| {
            let spec = json!({"clusterIP": ip(number), "ports": [{"name": "http", "port": 80}]});
            service(&format!("default/service-{number}"), spec)
        })
        .collect();
    let dns = Dns::start(&services, &[]);
    let mut took = Vec::with_capacity(services.len());
    for number in 0..services.len() {
        let started = Instant::now();
        let answer = dns.ask(&name(number), RecordType::A).await;
        took.push(started.elapsed());
        assert_eq!(sorted(&answer.answers), [format!("{} 5 IN A {}", name(number), ip(number))]);
    }
    took.sort();
    let p99 = took[took.len() * 99 / 100];
    println!("p50 {:?}, p99 {p99:?}", took[took.len() / 2]);
    assert!(p99 < Duration::from_millis(100), "{p99:?}");
}

#[tokio::test]
async fn before_the_first_sync_cluster_names_fail_and_are_not_denied() {
    let catalog = edgemesh_mesh::CatalogStore::new();
    let dns = Dns::start_on(catalog, &[], |_| {});
    let name = "web.default.svc.cluster.local.";
    assert_eq!(dns.ask(name, RecordType::A).await.metadata.response_code, ResponseCode::ServFail);
    apply(&dns.catalog, &objects());
    dns.catalog.mark_synced();
    dns.catalog.publish();
    assert_eq!(dns.ask(name, RecordType::A).await.metadata.response_code, ResponseCode::NoError);
}

#[tokio::test]
async fn a_large_answer_is_cut_over_udp_and_whole_over_tcp() {
    let endpoints: Vec<Value> =
        (0..200).map(|i| json!({"addresses": [format!("10.244.3.{i}")], "conditions": {"ready": true}})).collect();
    let objects = [
        service("default/many", json!({"clusterIP": "None", "ports": [{"port": 80}]})),
        slice("default/many", 1, "IPv4", json!([{"port": 80}]), json!(endpoints)),
    ];
    let dns = Dns::start(&objects, &[]);
    let name = "many.default.svc.cluster.local.";
    let plain = dns.send(&question(name, RecordType::A)).await;
    assert!(plain.metadata.truncation);
    assert!((25..32).contains(&plain.answers.len()), "{} in 512 bytes", plain.answers.len());
    for (offered, least, most) in [(4096, 70, 76), (100, 25, 32)] {
        let mut message = question(name, RecordType::A);
        message.set_edns(Edns::new().set_max_payload(offered).clone());
        let answer = dns.send(&message).await;
        assert!(answer.metadata.truncation);
        assert!((least..most).contains(&answer.answers.len()), "{} for {offered}", answer.answers.len());
        assert_eq!(answer.edns.unwrap().max_payload(), 1232);
    }
    let whole = dns.ask_tcp(name, RecordType::A).await;
    assert!(!whole.metadata.truncation);
    assert_eq!(whole.answers.len(), 200);
    // Clients that take the first address spread over all of them.
    let mut firsts = std::collections::HashSet::new();
    for _ in 0..20 {
        firsts.insert(dns.ask(name, RecordType::A).await.answers[0].to_string());
    }
    assert_eq!(firsts.len(), 20);
}

#[tokio::test]
async fn clients_that_ask_for_both_families_at_once_are_spread_too() {
    let dns = Dns::start(&objects(), &[]);
    let mut firsts = std::collections::HashSet::new();
    for _ in 0..4 {
        firsts.insert(dns.ask("sts.db.svc.cluster.local.", RecordType::A).await.answers[0].to_string());
        dns.ask("sts.db.svc.cluster.local.", RecordType::AAAA).await;
    }
    assert_eq!(firsts.len(), 2, "{firsts:?}");
}

#[tokio::test]
async fn endpoints_of_both_families_are_first_equally_often() {
    let endpoints = |prefix: &str| {
        let each = |number: usize| json!({"addresses": [format!("{prefix}{number}")]});
        json!((1..=4).map(each).collect::<Vec<_>>())
    };
    let objects = [
        service("db/both", json!({"clusterIP": "None", "ports": [{"port": 80}]})),
        slice("db/both", 1, "IPv4", json!([{"port": 80}]), endpoints("10.244.1.")),
        slice("db/both", 2, "IPv6", json!([{"port": 80}]), endpoints("fd00:244::")),
    ];
    let dns = Dns::start(&objects, &[]);
    for kind in [RecordType::A, RecordType::AAAA] {
        let mut firsts = std::collections::BTreeMap::<String, usize>::new();
        for _ in 0..80 {
            let answer = dns.ask("both.db.svc.cluster.local.", kind).await;
            assert_eq!(answer.answers.len(), 4);
            *firsts.entry(answer.answers[0].data.to_string()).or_default() += 1;
        }
        assert_eq!(firsts.into_values().collect::<Vec<_>>(), [20; 4]);
    }
}

#[tokio::test]
async fn case_in_the_question_is_kept_in_the_bytes() {
    let dns = Dns::start(&objects(), &[]);
    let mut message = question("x.", RecordType::A);
    message.queries[0].name = Name::from_ascii("WeB.dEfault.svc.cluster.LOCAL.").unwrap();
    let bytes = message.to_vec().unwrap();
    let answer = dns.send_bytes(&bytes).await;
    assert_eq!(answer[12..bytes.len()], bytes[12..]);
    let answer = Message::from_vec(&answer).unwrap();
    assert!(answer.answers[0].name.eq_case(&message.queries[0].name));
}
