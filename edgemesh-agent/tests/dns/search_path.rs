//! Search path completion: what a pod's resolver asks first, and what it is told instead of walking its whole search path.

use std::{net::IpAddr, sync::Arc};

use hickory_proto::{
    op::{Message, OpCode, ResponseCode},
    rr::{Name, RData, Record, RecordType, rdata},
};
use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::harness::{Dns, Upstream, addresses, apply, eventually, service, slice, sorted};

const POD_OF_SHOP: &str = "127.0.9.1";
const POD_OF_DB: &str = "127.0.9.2";

/// Namespaces `shop` and `db`, each with a pod that the catalog knows.
fn objects() -> Vec<Value> {
    let pod = |ip: &str, namespace: &str| {
        json!([{"addresses": [ip], "conditions": {"ready": true},
            "targetRef": {"kind": "Pod", "namespace": namespace, "name": "p-0"}}])
    };
    vec![
        service("shop/web", json!({"clusterIP": "10.96.0.20", "ports": [{"port": 80}]})),
        slice("shop/web", 1, "IPv4", json!([{"port": 80}]), pod(POD_OF_SHOP, "shop")),
        service("db/sts", json!({"clusterIP": "None", "ports": [{"port": 80}]})),
        slice("db/sts", 1, "IPv4", json!([{"port": 80}]), pod(POD_OF_DB, "db")),
        service(
            "db/dual",
            json!({"clusterIP": "10.96.0.22", "clusterIPs": ["10.96.0.22", "fd00:96::22"], "ports": [{"port": 80}]}),
        ),
        service("db/out", json!({"type": "ExternalName", "externalName": "outside.example"})),
    ]
}

/// An upstream that has an address for some names and denies all others, and notes what it is asked.
struct Internet {
    upstream: Upstream,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Internet {
    async fn with(names: &'static [&'static str]) -> Self {
        let asked: Arc<Mutex<Vec<String>>> = Arc::default();
        let noted = Arc::clone(&asked);
        let upstream = Upstream::start(move |query, _| {
            let name = query.name.to_string();
            noted.lock().push(format!("{name} {}", query.query_type));
            Some(if names.contains(&&*name) { addresses(query, &["192.0.2.1"], 60) } else { denied(&name) })
        })
        .await;
        Self { upstream, asked }
    }

    fn dns(&self) -> Dns {
        Dns::start(&objects(), &[self.upstream.address])
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().clone()
    }
}

/// Names under `nowhere` don't exist because their top-level domain doesn't; those that begin with `dangling` are aliases for such.
fn denied(name: &str) -> Message {
    let mut answer = Message::response(0, OpCode::Query);
    answer.metadata.response_code = ResponseCode::NXDomain;
    let dangling = name.starts_with("dangling.");
    if dangling {
        let alias = RData::CNAME(rdata::CNAME(Name::from_ascii("a.nowhere.").unwrap()));
        answer.add_answer(Record::from_rdata(Name::from_ascii(name).unwrap(), 60, alias));
    }
    let of_root = dangling || name.ends_with("nowhere.");
    let owner = if of_root { Name::root() } else { Name::from_ascii("example.").unwrap() };
    let soa = rdata::SOA::new(owner.clone(), owner.clone(), 1, 1, 1, 1, 30);
    answer.add_authority(Record::from_rdata(owner, 300, RData::SOA(soa)));
    answer
}

impl Dns {
    async fn lookup(&self, from: &str, name: &str, kind: RecordType) -> (ResponseCode, Vec<String>) {
        let answer = self.ask_from(from.parse::<IpAddr>().unwrap(), name, kind).await;
        (answer.metadata.response_code, answer.answers.iter().map(ToString::to_string).collect())
    }
}

#[tokio::test]
async fn an_outside_name_costs_one_query_and_one_upstream_query() {
    let internet = Internet::with(&["outside.example."]).await;
    let dns = internet.dns();
    let name = "outside.example.shop.svc.cluster.local.";
    let expected = vec![format!("{name} 5 IN CNAME outside.example."), "outside.example. 60 IN A 192.0.2.1".to_owned()];
    for _ in 0..3 {
        assert_eq!(dns.lookup(POD_OF_SHOP, name, RecordType::A).await, (ResponseCode::NoError, expected.clone()));
    }
    assert_eq!(internet.asked(), ["outside.example. A"]);
    // The name exists for each type: one that it lacks is no denial.
    let alias = vec![expected[0].clone()];
    assert_eq!(dns.lookup(POD_OF_SHOP, name, RecordType::AAAA).await, (ResponseCode::NoError, alias));
    assert_eq!(internet.asked(), ["outside.example. A", "outside.example. AAAA"]);
    let metrics = dns.metrics();
    assert!(metrics.contains(r#"edgemesh_agent_dns_completions_total{target="outside"} 4"#), "{metrics}");
    assert!(metrics.contains(r#"queries_total{type="A",rcode="NOERROR",source="cache"} 2"#), "{metrics}");
}

#[tokio::test]
async fn a_name_of_another_namespace_is_found_through_the_later_entries() {
    let internet = Internet::with(&["web.shop.", "dual.db."]).await;
    let dns = internet.dns();
    for (asked, target) in [
        ("dual.db", "dual.db.svc.cluster.local."),
        ("dual.db.svc", "dual.db.svc.cluster.local."),
        // Four dots are fewer than five: resolvers extend even a name that is complete.
        ("dual.db.svc.cluster.local", "dual.db.svc.cluster.local."),
    ] {
        let name = format!("{asked}.shop.svc.cluster.local.");
        let (alias, a, aaaa) = (
            format!("{name} 5 IN CNAME {target}"),
            format!("{target} 5 IN A 10.96.0.22"),
            format!("{target} 5 IN AAAA fd00:96::22"),
        );
        let found = dns.lookup(POD_OF_SHOP, &name, RecordType::A).await;
        assert_eq!(found, (ResponseCode::NoError, vec![alias.clone(), a]));
        let found = dns.lookup(POD_OF_SHOP, &name, RecordType::AAAA).await;
        assert_eq!(found, (ResponseCode::NoError, vec![alias, aaaa]));
    }
    // A family that the Service lacks: the name exists.
    let found = dns.lookup(POD_OF_DB, "web.shop.db.svc.cluster.local.", RecordType::AAAA).await;
    let alias = "web.shop.db.svc.cluster.local. 5 IN CNAME web.shop.svc.cluster.local.".to_owned();
    assert_eq!(found, (ResponseCode::NoError, vec![alias]));
    assert_eq!(internet.asked(), [""; 0]);
    assert!(dns.metrics().contains(r#"edgemesh_agent_dns_completions_total{target="cluster"} 7"#));
    // Through an alias of the cluster the answer goes on outside.
    let answer = dns.ask_from(POD_OF_SHOP.parse().unwrap(), "out.db.shop.svc.cluster.local.", RecordType::A).await;
    assert_eq!(answer.answers.len(), 2, "{:?}", sorted(&answer.answers));
    assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain, "outside.example isn't there");
    assert!(
        dns.metrics().contains(r#"edgemesh_agent_dns_completions_total{target="cluster"} 8"#),
        "once for each answer"
    );
}

#[tokio::test]
async fn names_that_may_be_the_clusters_are_denied_and_never_sent_upstream() {
    let internet = Internet::with(&[]).await;
    let dns = internet.dns();
    let denied = [
        // one label: a Service that isn't there
        (POD_OF_SHOP, "redis.shop.svc.cluster.local."),
        // under a Service of the namespace: an endpoint that isn't ready, though `shop` has a Service `web`
        (POD_OF_DB, "sts-9.sts.db.svc.cluster.local."),
        // a namespace, or the way to one
        (POD_OF_SHOP, "gone.db.shop.svc.cluster.local."),
        (POD_OF_SHOP, "sts-9.sts.db.shop.svc.cluster.local."),
        (POD_OF_SHOP, "gone.db.svc.shop.svc.cluster.local."),
        (POD_OF_SHOP, "gone.db.svc.cluster.shop.svc.cluster.local."),
        (POD_OF_SHOP, "gone.db.svc.cluster.local.shop.svc.cluster.local."),
        (POD_OF_SHOP, "a.b.cluster.local.shop.svc.cluster.local."),
        (POD_OF_SHOP, "_http._tcp.elsewhere.shop.svc.cluster.local."),
        (POD_OF_SHOP, "printer.local.shop.svc.cluster.local."),
        // the second and third entries of the search path
        (POD_OF_SHOP, "outside.example.svc.cluster.local."),
        (POD_OF_SHOP, "outside.example.cluster.local."),
        // the search path of a pod of another namespace, and of a namespace that doesn't exist
        (POD_OF_SHOP, "outside.example.db.svc.cluster.local."),
        (POD_OF_SHOP, "outside.example.none.svc.cluster.local."),
        ("127.0.9.77", "outside.example.none.svc.cluster.local."),
    ];
    for (from, name) in denied {
        for kind in [RecordType::A, RecordType::AAAA] {
            assert_eq!(dns.lookup(from, name, kind).await, (ResponseCode::NXDomain, vec![]), "{name}");
        }
    }
    // Types other than addresses are left to the client's own walk.
    let found = dns.lookup(POD_OF_SHOP, "outside.example.shop.svc.cluster.local.", RecordType::TXT).await;
    assert_eq!(found.0, ResponseCode::NXDomain);
    // A step on the way to names has no address: resolvers differ in what they do then.
    let found = dns.lookup(POD_OF_SHOP, "db.svc.shop.svc.cluster.local.", RecordType::A).await;
    assert_eq!(found.0, ResponseCode::NXDomain);
    assert_eq!(internet.asked(), [""; 0]);
}

#[tokio::test]
async fn a_client_that_the_catalog_does_not_know_is_placed_by_its_question() {
    let internet = Internet::with(&["outside.example."]).await;
    let dns = internet.dns();
    for namespace in ["shop", "db"] {
        let name = format!("outside.example.{namespace}.svc.cluster.local.");
        assert_eq!(dns.lookup("127.0.9.77", &name, RecordType::A).await.1.len(), 2);
    }
    assert_eq!(internet.asked(), ["outside.example. A"]);
}

#[tokio::test]
async fn a_name_that_is_nowhere_is_denied_and_its_absent_top_level_domain_is_asked_for_once() {
    let internet = Internet::with(&[]).await;
    let dns = internet.dns();
    for name in [
        "gone.example.shop.svc.cluster.local.",
        "a.nowhere.shop.svc.cluster.local.",
        "b.nowhere.shop.svc.cluster.local.",
    ] {
        for _ in 0..2 {
            let answer = dns.ask_from(POD_OF_SHOP.parse().unwrap(), name, RecordType::A).await;
            assert_eq!((answer.metadata.response_code, answer.answers.len()), (ResponseCode::NXDomain, 0));
            assert_eq!(answer.authorities[0].name.to_string(), "cluster.local.");
        }
    }
    assert_eq!(internet.asked(), ["gone.example. A", "a.nowhere. A"]);
}

#[tokio::test]
async fn an_alias_that_leads_nowhere_says_nothing_about_its_own_top_level_domain() {
    let internet = Internet::with(&["outside.example."]).await;
    let dns = internet.dns();
    let found = dns.lookup(POD_OF_SHOP, "dangling.example.shop.svc.cluster.local.", RecordType::A).await;
    assert_eq!(found, (ResponseCode::NXDomain, vec![]));
    let found = dns.lookup(POD_OF_SHOP, "outside.example.shop.svc.cluster.local.", RecordType::A).await;
    assert_eq!((found.0, found.1.len()), (ResponseCode::NoError, 2));
}

#[tokio::test]
async fn when_upstream_fails_the_client_is_left_to_walk_by_itself() {
    let internet = Internet::with(&[]).await;
    internet.upstream.set_silent(true);
    let dns = internet.dns();
    let name = "outside.example.shop.svc.cluster.local.";
    for _ in 0..2 {
        assert_eq!(dns.lookup(POD_OF_SHOP, name, RecordType::A).await, (ResponseCode::NXDomain, vec![]));
    }
    assert_eq!(dns.lookup(POD_OF_SHOP, "outside.example.", RecordType::A).await.0, ResponseCode::ServFail);
}

#[tokio::test]
async fn the_search_domains_of_the_host_come_before_the_name_itself() {
    let internet = Internet::with(&["intra.host.lan.example.", "www.outside.example."]).await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("resolv.conf");
    std::fs::write(&path, "search lan.example\n").unwrap();
    let dns = Dns::start_with(&objects(), &[internet.upstream.address], |config| config.resolv_conf = path.clone());
    let found = dns.lookup(POD_OF_SHOP, "intra.host.shop.svc.cluster.local.", RecordType::A).await;
    assert_eq!(found.1[0], "intra.host.shop.svc.cluster.local. 5 IN CNAME intra.host.lan.example.");
    let found = dns.lookup(POD_OF_SHOP, "www.outside.example.shop.svc.cluster.local.", RecordType::A).await;
    assert_eq!(found.1[0], "www.outside.example.shop.svc.cluster.local. 5 IN CNAME www.outside.example.");
    // More of them than are worth asking for: the client walks by itself.
    std::fs::write(&path, "search a.example b.example c.example d.example e.example\n").unwrap();
    eventually("the new search list is known", || async {
        let name = "www.outside.example.shop.svc.cluster.local.";
        dns.lookup(POD_OF_SHOP, name, RecordType::A).await.0 == ResponseCode::NXDomain
    })
    .await;
}

#[tokio::test]
async fn a_search_domain_that_only_the_site_knows_is_searched_though_the_root_denies_it() {
    let internet = Internet::with(&["intra.host.lan.nowhere.", "intra.host."]).await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("resolv.conf");
    std::fs::write(&path, "search lan.nowhere\n").unwrap();
    let dns = Dns::start_with(&objects(), &[internet.upstream.address], |config| config.resolv_conf = path.clone());
    let found = dns.lookup(POD_OF_SHOP, "gone.host.shop.svc.cluster.local.", RecordType::A).await;
    assert_eq!(found.0, ResponseCode::NXDomain);
    let found = dns.lookup(POD_OF_SHOP, "intra.host.shop.svc.cluster.local.", RecordType::A).await;
    assert_eq!(found.1[0], "intra.host.shop.svc.cluster.local. 5 IN CNAME intra.host.lan.nowhere.");
}

#[tokio::test]
async fn switched_off_the_first_entry_is_just_denied() {
    let internet = Internet::with(&["outside.example."]).await;
    let dns = Dns::start_with(&objects(), &[internet.upstream.address], |config| config.search_path_completion = false);
    for name in ["outside.example.shop.svc.cluster.local.", "dual.db.shop.svc.cluster.local."] {
        assert_eq!(dns.lookup(POD_OF_SHOP, name, RecordType::A).await.0, ResponseCode::NXDomain);
    }
    assert_eq!(internet.asked(), [""; 0]);
}

/// The C library's own resolver, in a mount namespace with a pod's resolv.conf.
#[tokio::test]
async fn glibc_finds_outside_names_and_names_of_other_namespaces_with_its_first_question() {
    let internet = Internet::with(&["outside.example."]).await;
    let catalog = edgemesh_mesh::CatalogStore::new();
    apply(&catalog, &objects());
    catalog.mark_synced();
    catalog.publish();
    // resolv.conf can't name a port.
    let server = "127.53.72.1";
    let address = format!("{server}:53").parse().unwrap();
    let dns = Dns::start_at(address, catalog, &[internet.upstream.address], |_| {});
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("resolv.conf");
    let text = "search shop.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5 timeout:10\n";
    std::fs::write(&path, format!("nameserver {server}\n{text}")).unwrap();
    let place = std::fs::canonicalize("/etc/resolv.conf").unwrap();
    for (name, ip) in [("outside.example", "192.0.2.1"), ("dual.db", "10.96.0.22"), ("web", "10.96.0.20")] {
        let script = format!("mount --bind {} {} && getent ahosts {name}", path.display(), place.display());
        let mut command = tokio::process::Command::new("unshare");
        let said = command.args(["--mount", "--propagation", "private", "sh", "-c", &script]).output().await.unwrap();
        let text = String::from_utf8_lossy(&said.stdout).into_owned();
        assert!(said.status.success() && text.contains(ip), "{name}: {text} {}", String::from_utf8_lossy(&said.stderr));
    }
    // One question for each name and family.
    let answers: u64 = dns
        .metrics()
        .lines()
        .filter(|line| line.starts_with("edgemesh_agent_dns_queries_total{"))
        .filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok())
        .sum();
    assert_eq!(answers, 6, "{}", dns.metrics());
    let mut asked = internet.asked();
    asked.sort();
    assert_eq!(asked, ["outside.example. A", "outside.example. AAAA"]);
}
