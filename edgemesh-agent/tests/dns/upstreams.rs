//! Which upstreams are asked, how early, and for how many clients: single domains, renewal of popular answers, limits.

use std::net::IpAddr;

use hickory_proto::{
    op::{Message, ResponseCode},
    rr::RecordType,
};
use serde_json::json;
use tokio::net::UdpSocket;

use crate::harness::{DEADLINE, Dns, Upstream, addresses, eventually, question, service};

#[tokio::test]
async fn names_of_a_domain_are_asked_of_its_own_upstreams_only() {
    let default = Upstream::fixed("192.0.2.1", 60).await;
    let corp = Upstream::fixed("192.0.2.2", 60).await;
    let lab = Upstream::fixed("192.0.2.3", 60).await;
    let objects = [
        service("shop/web", json!({"clusterIP": "10.96.0.20", "ports": [{"port": 80}]})),
        service("lab/web", json!({"clusterIP": "10.96.0.21", "ports": [{"port": 80}]})),
    ];
    let dns = Dns::start_with(&objects, &[default.address], |config| {
        let zones = [("Corp.Example.", corp.address), ("lab.corp.example", lab.address), ("lab", lab.address)];
        config.zones = zones.map(|(zone, server)| (zone.to_owned(), vec![server.to_string()])).into();
    });
    for (name, ip) in [
        ("www.example.", "192.0.2.1"),
        ("xcorp.example.", "192.0.2.1"),
        ("corp.example.", "192.0.2.2"),
        ("git.CORP.example.", "192.0.2.2"),
        ("a.lab.corp.example.", "192.0.2.3"),
        // The cluster's own names stay its own.
        ("web.shop.svc.cluster.local.", "10.96.0.20"),
    ] {
        assert_eq!(dns.ask(name, RecordType::A).await.answers[0].data.to_string(), ip, "{name}");
    }
    // A search ends in the domain too, even where its name is that of a namespace.
    let completed = dns.ask("printer.lab.shop.svc.cluster.local.", RecordType::A).await;
    assert_eq!(completed.answers[1].to_string(), "printer.lab. 60 IN A 192.0.2.3");
    // With its upstreams gone a domain fails; the others aren't asked in their place.
    corp.set_silent(true);
    assert_eq!(dns.ask("new.corp.example.", RecordType::A).await.metadata.response_code, ResponseCode::ServFail);
    assert_eq!((default.asked(), corp.asked(), lab.asked()), (2, 2, 2));
    assert!(dns.metrics().contains("edgemesh_agent_dns_upstreams_alive 3"), "of four");
}

#[tokio::test]
async fn a_popular_answer_is_asked_for_anew_before_it_expires() {
    let upstream = Upstream::fixed("192.0.2.1", 2).await;
    let dns = Dns::start(&[], &[upstream.address]);
    eventually("it is asked for anew", || async {
        dns.ask("www.example.", RecordType::A).await;
        !dns.metrics().contains("edgemesh_agent_dns_prefetches_total 0")
    })
    .await;
    let never = Upstream::fixed("192.0.2.1", 2).await;
    let dns = Dns::start_with(&[], &[never.address], |config| config.prefetch = false);
    eventually("it expires", || async {
        dns.ask("www.example.", RecordType::A).await;
        never.asked() > 1
    })
    .await;
    assert!(dns.metrics().contains("edgemesh_agent_dns_prefetches_total 0"));
}

#[tokio::test]
async fn a_client_beyond_its_limit_is_refused_and_others_are_not() {
    let upstream = Upstream::start(|query, _| {
        query.name.to_string().starts_with("fast").then(|| addresses(query, &["192.0.2.1"], 60))
    })
    .await;
    let dns = Dns::start_with(&[], &[upstream.address], |config| config.max_queries_per_client = 2);
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(dns.address).await.unwrap();
    for i in 0..3 {
        let message = question(&format!("n{i}.example."), RecordType::A);
        socket.send(&message.to_vec().unwrap()).await.unwrap();
    }
    let mut buffer = vec![0; 4096];
    let length = tokio::time::timeout(DEADLINE, socket.recv(&mut buffer)).await.unwrap().unwrap();
    let answer = Message::from_vec(&buffer[..length]).unwrap();
    assert_eq!(answer.metadata.response_code, ResponseCode::Refused);
    assert_eq!(answer.queries[0].name.to_string(), "n2.example.");
    // Names that need no upstream are answered all the same, and so is another client.
    let version = dns.ask("dns-version.cluster.local.", RecordType::TXT).await;
    assert_eq!(version.metadata.response_code, ResponseCode::NoError);
    let other = dns.ask_from(IpAddr::from([127, 0, 9, 9]), "fast.example.", RecordType::A).await;
    assert_eq!(other.answers.len(), 1);
    let metrics = dns.metrics();
    assert!(metrics.contains(r#"edgemesh_agent_dns_limited_total{limit="client"} 1"#), "{metrics}");
}
