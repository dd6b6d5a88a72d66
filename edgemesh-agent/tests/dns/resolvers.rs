//! Resolvers that walk a pod's search path as musl and glibc do: completion spares them questions and never changes what they find.

use hickory_proto::{
    op::{Message, OpCode, ResponseCode},
    rr::{Name, RData, Record, RecordType, rdata},
};
use serde_json::{Value, json};

use crate::harness::{Dns, Upstream, addresses, service, slice};

/// How a C library walks (resolv.conf(5); musl's and glibc's `getaddrinfo`).
#[derive(Debug, Clone, Copy, PartialEq)]
enum Library {
    /// Ends at the first name that isn't denied, and doesn't search for names with `ndots` dots.
    Musl,
    /// Ends at the first name with an address, and tries all others afterwards.
    Glibc,
}

const SEARCHES: [&str; 4] = ["shop.svc.cluster.local", "svc.cluster.local", "cluster.local", "lan.example"];

impl Library {
    /// The names that it asks for, in order.
    fn walk(self, name: &str, ndots: usize) -> Vec<String> {
        let bare = format!("{}.", name.trim_end_matches('.'));
        if name.ends_with('.') {
            return vec![bare];
        }
        let extended = SEARCHES.iter().map(|domain| format!("{name}.{domain}."));
        let many_dots = name.matches('.').count() >= ndots;
        match (self, many_dots) {
            (_, false) => extended.chain([bare.clone()]).collect(),
            (Self::Musl, true) => vec![bare],
            (Self::Glibc, true) => [bare.clone()].into_iter().chain(extended).collect(),
        }
    }

    /// The addresses that it finds, and how many questions it asked.
    async fn find(self, dns: &Dns, name: &str, ndots: usize) -> (Vec<String>, usize) {
        let mut asked = 0;
        for name in self.walk(name, ndots) {
            let answers = [dns.ask(&name, RecordType::A).await, dns.ask(&name, RecordType::AAAA).await];
            asked += 2;
            let is_address = |record: &&Record| matches!(record.data, RData::A(_) | RData::AAAA(_));
            let mut found: Vec<String> = answers
                .iter()
                .flat_map(|answer| answer.answers.iter().filter(is_address).map(|record| record.data.to_string()))
                .collect();
            found.sort();
            let denied = answers[0].metadata.response_code == ResponseCode::NXDomain;
            if !found.is_empty() || self == Self::Musl && !denied {
                return (found, asked);
            }
        }
        (Vec::new(), asked)
    }
}

fn objects() -> Vec<Value> {
    let http = json!([{"name": "http", "port": 80}]);
    let endpoint = json!([{"addresses": ["10.244.1.7"], "hostname": "sts-0", "conditions": {"ready": true}}]);
    vec![
        service("shop/web", json!({"clusterIP": "10.96.0.20", "ports": http})),
        service("shop/sts", json!({"clusterIP": "None", "ports": http})),
        slice("shop/sts", 1, "IPv4", http.clone(), endpoint),
        service(
            "db/dual",
            json!({"clusterIP": "10.96.0.22", "clusterIPs": ["10.96.0.22", "fd00:96::22"], "ports": http}),
        ),
        service("db/six", json!({"clusterIP": "fd00:96::6", "ports": http})),
        service("db/out", json!({"type": "ExternalName", "externalName": "www.outside.example"})),
        // A namespace that has the name of a top-level domain.
        service("example/web", json!({"clusterIP": "10.96.0.30", "ports": http})),
    ]
}

/// Upstream has hosts with addresses of both families or of one, one that fails, one without addresses, and those of the search domain.
async fn internet() -> Upstream {
    Upstream::start(|query, _| {
        let name = query.name.to_string();
        Some(match name.as_str() {
            "outside.test." | "www.outside.example." | "a.b.c.d.e.outside.test." | "intra.host.lan.example." => {
                addresses(query, &["192.0.2.1", "2001:db8::1"], 60)
            }
            "four.outside.test." => addresses(query, &["192.0.2.4"], 60),
            "six.outside.test." | "box.lan.example." => addresses(query, &["2001:db8::6"], 60),
            "empty.outside.test." => addresses(query, &[], 60),
            "broken.outside.test." => refused(ResponseCode::ServFail),
            _ => refused(ResponseCode::NXDomain),
        })
    })
    .await
}

fn refused(code: ResponseCode) -> Message {
    let mut answer = Message::response(0, OpCode::Query);
    answer.metadata.response_code = code;
    let owner = Name::from_ascii("test.").unwrap();
    let soa = rdata::SOA::new(owner.clone(), owner.clone(), 1, 1, 1, 1, 30);
    answer.add_authority(Record::from_rdata(owner, 300, RData::SOA(soa)));
    answer
}

/// Name, and how many questions musl and glibc ask for it at most with completion and `ndots:5`.
const NAMES: [(&str, usize); 24] = [
    ("outside.test", 2),
    ("four.outside.test", 2),
    ("six.outside.test", 2),
    ("intra.host", 2),
    ("a.b.c.d.e.outside.test", 2),
    ("outside.test.", 2),
    ("web", 2),
    ("web.shop", 2),
    ("dual.db", 2),
    ("six.db", 2),
    ("out.db", 2),
    ("dual.db.svc", 2),
    ("dual.db.svc.cluster.local", 2),
    ("dual.db.svc.cluster.local.", 2),
    ("sts-0.sts", 2),
    ("sts-1.sts", 10),
    ("sts-1.sts.shop", 10),
    ("box", 8),
    ("gone", 10),
    ("gone.db", 10),
    ("gone.outside.test", 10),
    ("empty.outside.test", 10),
    ("broken.outside.test", 10),
    // Its last label is a namespace, so it is left to the walk.
    ("www.outside.example", 10),
];

#[tokio::test]
async fn completion_spares_questions_and_never_changes_what_is_found() {
    let internet = internet().await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("resolv.conf");
    std::fs::write(&path, "search lan.example\n").unwrap();
    let start = |on| {
        Dns::start_with(&objects(), &[internet.address], |config| {
            config.search_path_completion = on;
            config.resolv_conf = path.clone();
        })
    };
    let (with, without) = (start(true), start(false));
    for library in [Library::Musl, Library::Glibc] {
        for ndots in [1, 2, 5] {
            for (name, most) in NAMES {
                let (found, asked) = library.find(&with, name, ndots).await;
                let (expected, walked) = library.find(&without, name, ndots).await;
                assert_eq!(found, expected, "{library:?} {name} ndots:{ndots}");
                assert!(asked <= walked, "{library:?} {name} ndots:{ndots}: {asked} instead of {walked}");
                assert!(ndots < 5 || asked <= most, "{library:?} {name}: {asked} questions");
            }
        }
        assert_eq!(library.find(&without, "outside.test", 5).await.1, 10, "without completion");
    }
}
