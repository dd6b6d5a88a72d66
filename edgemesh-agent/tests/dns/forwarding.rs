//! Names outside the cluster: the cache, several upstreams, and upstreams that are slow, wrong or gone.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use hickory_proto::{
    op::{Edns, Message, OpCode, ResponseCode},
    rr::{Name, RData, Record, RecordType, rdata},
};
use serde_json::json;

use crate::harness::{
    Dns, RawUpstream, Upstream, address_for, addresses, eventually, header_alone, question, service, sorted,
};

fn code(answer: &Message) -> ResponseCode {
    answer.metadata.response_code
}

#[tokio::test]
async fn an_answer_is_asked_once_and_ages_in_the_cache() {
    let upstream = Upstream::fixed("192.0.2.1", 60).await;
    let dns = Dns::start(&[], &[upstream.address]);
    for _ in 0..5 {
        let answer = dns.ask("www.example.com.", RecordType::A).await;
        assert_eq!(code(&answer), ResponseCode::NoError);
        assert!(!answer.metadata.authoritative);
        assert_eq!(answer.answers[0].data.to_string(), "192.0.2.1");
        assert!((55..=60).contains(&answer.answers[0].ttl));
    }
    // Clients that spell names in random case (0x20) share the entry and get their own spelling.
    let mut message = question("x.", RecordType::A);
    message.queries[0].name = Name::from_ascii("wWw.ExAmple.com.").unwrap();
    let answer = dns.send(&message).await;
    assert!(answer.answers[0].name.eq_case(&message.queries[0].name));
    assert_eq!(upstream.asked(), 1);
    assert!(dns.metrics().contains(r#"edgemesh_agent_dns_queries_total{type="A",rcode="NOERROR",source="cache"} 5"#));
}

#[tokio::test]
async fn a_crowd_with_one_question_asks_upstream_once() {
    let upstream = Upstream::fixed("192.0.2.1", 60).await;
    let dns = Arc::new(Dns::start(&[], &[upstream.address]));
    let crowd: Vec<_> = (0..50)
        .map(|_| {
            let dns = Arc::clone(&dns);
            tokio::spawn(async move { dns.ask("crowd.example.", RecordType::A).await })
        })
        .collect();
    for answer in crowd {
        assert_eq!(answer.await.unwrap().answers.len(), 1);
    }
    assert_eq!(upstream.asked(), 1);
}

#[tokio::test]
async fn negative_answers_are_kept_as_long_as_their_soa_says() {
    let upstream = Upstream::start(|query, _| {
        let mut answer = Message::response(0, OpCode::Query);
        let name = query.name.to_string();
        if !name.starts_with("nodata") {
            answer.metadata.response_code = ResponseCode::NXDomain;
        }
        if !name.starts_with("nosoa") {
            let root = Name::root();
            let soa = rdata::SOA::new(root.clone(), root.clone(), 1, 1, 1, 1, 30);
            answer.add_authority(Record::from_rdata(root, 300, RData::SOA(soa)));
        }
        Some(answer)
    })
    .await;
    let dns = Dns::start(&[], &[upstream.address]);
    for (name, expected, asked) in [
        ("gone.example.", ResponseCode::NXDomain, 1),
        ("nodata.example.", ResponseCode::NoError, 1),
        ("nosoa.example.", ResponseCode::NXDomain, 3),
    ] {
        let before = upstream.asked();
        for _ in 0..3 {
            assert_eq!(code(&dns.ask(name, RecordType::A).await), expected, "{name}");
        }
        assert_eq!(upstream.asked() - before, asked, "{name}");
    }
}

#[tokio::test]
async fn an_answer_too_long_for_udp_is_fetched_over_tcp() {
    let ips: Vec<String> = (0..100).map(|i| format!("192.0.2.{i}")).collect();
    let ips: &'static [&'static str] = ips.into_iter().map(|ip| &*ip.leak()).collect::<Vec<_>>().leak();
    let upstream = Upstream::start(move |query, tcp| {
        let mut answer = addresses(query, if tcp { ips } else { &[] }, 60);
        answer.metadata.truncation = !tcp;
        Some(answer)
    })
    .await;
    let dns = Dns::start(&[], &[upstream.address]);
    let over_udp = dns.ask("big.example.", RecordType::A).await;
    assert!(over_udp.metadata.truncation);
    let whole = dns.ask_tcp("big.example.", RecordType::A).await;
    assert_eq!((whole.answers.len(), whole.metadata.truncation), (100, false));
}

#[tokio::test]
async fn a_cut_answer_is_never_taken_for_the_whole() {
    // This upstream closes every TCP connection.
    let upstream = Upstream::start(|query, tcp| {
        let mut answer = addresses(query, &["192.0.2.1"], 60);
        answer.metadata.truncation = true;
        (!tcp).then_some(answer)
    })
    .await;
    let dns = Dns::start(&[], &[upstream.address]);
    for _ in 0..2 {
        assert!(dns.ask("big.example.", RecordType::A).await.metadata.truncation);
        assert_eq!(code(&dns.ask_tcp("big.example.", RecordType::A).await), ResponseCode::ServFail);
    }
    assert!(dns.metrics().contains("edgemesh_agent_dns_upstreams_alive 1"), "it answers, if not in full");
}

#[tokio::test]
async fn past_its_time_an_answer_is_served_when_upstream_is_gone() {
    let upstream = Upstream::fixed("192.0.2.1", 1).await;
    let dns = Dns::start(&[], &[upstream.address]);
    assert_eq!(code(&dns.ask("www.example.com.", RecordType::A).await), ResponseCode::NoError);
    upstream.set_silent(true);
    eventually("its time is over", || async {
        assert_eq!(dns.ask("www.example.com.", RecordType::A).await.answers.len(), 1);
        dns.metrics().contains(r#"source="stale"} 1"#)
    })
    .await;
    for _ in 0..2 {
        let started = Instant::now();
        let answer = dns.ask("www.example.com.", RecordType::A).await;
        assert_eq!(answer.answers.len(), 1);
        assert_eq!(answer.answers[0].ttl, 30, "RFC 8767, section 4");
        assert!(started.elapsed() < Duration::from_millis(1500));
    }
    assert!(dns.metrics().contains(r#"source="stale"} 3"#), "{}", dns.metrics());
}

#[tokio::test]
async fn what_is_not_to_be_kept_is_not_served_when_upstream_is_gone() {
    let upstream = Upstream::start(|query, _| {
        let mut answer = addresses(query, &["192.0.2.1"], 0);
        if query.name.to_string().starts_with("nosoa") {
            answer = Message::response(0, OpCode::Query);
            answer.metadata.response_code = ResponseCode::NXDomain;
        }
        Some(answer)
    })
    .await;
    let dns = Dns::start(&[], &[upstream.address]);
    for (name, expected) in [("once.example.", ResponseCode::NoError), ("nosoa.example.", ResponseCode::NXDomain)] {
        assert_eq!(code(&dns.ask(name, RecordType::A).await), expected);
    }
    upstream.set_silent(true);
    for name in ["once.example.", "nosoa.example."] {
        assert_eq!(code(&dns.ask(name, RecordType::A).await), ResponseCode::ServFail, "{name}");
    }
}

#[tokio::test]
async fn with_all_upstreams_dead_failures_come_within_a_second_and_then_at_once() {
    // Silent as behind a cut link: nothing comes back, no error either.
    let (one, two) = (Upstream::fixed("192.0.2.1", 60).await, Upstream::fixed("192.0.2.1", 60).await);
    one.set_silent(true);
    two.set_silent(true);
    let dns = Dns::start(&[], &[one.address, two.address]);
    let started = Instant::now();
    assert_eq!(code(&dns.ask("first.example.", RecordType::A).await), ResponseCode::ServFail);
    assert!(started.elapsed() < Duration::from_millis(1300), "{:?}", started.elapsed());
    let mut slow = Vec::new();
    for i in 0..20 {
        let started = Instant::now();
        assert_eq!(code(&dns.ask(&format!("n{i}.example."), RecordType::A).await), ResponseCode::ServFail);
        // One that is asked waits for the probe, after 600 ms.
        slow.extend(Some(started.elapsed()).filter(|took| *took > Duration::from_millis(200)));
    }
    assert!(slow.len() <= 2, "a question is asked all the same now and then, but not most: {slow:?}");
    // Cluster names don't care.
    let web = "dns-version.cluster.local.";
    assert_eq!(code(&dns.ask(web, RecordType::TXT).await), ResponseCode::NoError);
    // Back again, it is found by itself.
    two.set_silent(false);
    eventually("the upstream is used again", || async {
        code(&dns.ask("back.example.", RecordType::A).await) == ResponseCode::NoError
    })
    .await;
}

#[tokio::test]
async fn a_server_that_answers_no_probes_is_found_alive_by_the_questions_of_clients() {
    let upstream = RawUpstream::start(|query| {
        let name = query.queries[0].name.to_string();
        (name != "." && name != "lost.example.").then(|| address_for(query, "192.0.2.1"))
    })
    .await;
    let dns = Dns::start(&[], &[upstream.address]);
    assert_eq!(code(&dns.ask("lost.example.", RecordType::A).await), ResponseCode::ServFail);
    assert!(dns.metrics().contains("edgemesh_agent_dns_upstreams_alive 0"));
    let mut number = 0;
    eventually("a question is asked of it all the same", || {
        number += 1;
        let (dns, name) = (&dns, format!("n{number}.example."));
        async move { code(&dns.ask(&name, RecordType::A).await) == ResponseCode::NoError }
    })
    .await;
    assert!(dns.metrics().contains("edgemesh_agent_dns_upstreams_alive 1"));
    assert_eq!(code(&dns.ask("next.example.", RecordType::A).await), ResponseCode::NoError);
}

#[tokio::test]
async fn a_server_that_answers_no_probes_is_found_alive_behind_one_that_is_gone() {
    let site = RawUpstream::start(|query| {
        let name = query.queries[0].name.to_string();
        (name != "." && name != "lost.example.").then(|| address_for(query, "192.0.2.1"))
    })
    .await;
    let gone = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let dns = Dns::start(&[], &[gone.local_addr().unwrap(), site.address]);
    assert_eq!(code(&dns.ask("lost.example.", RecordType::A).await), ResponseCode::ServFail);
    let mut number = 0;
    eventually("the other is asked", || {
        number += 1;
        let (dns, name) = (&dns, format!("n{number}.example."));
        async move { code(&dns.ask(&name, RecordType::A).await) == ResponseCode::NoError }
    })
    .await;
}

#[tokio::test]
async fn a_first_server_that_answers_no_probes_comes_first_again() {
    let site = RawUpstream::start(|query| {
        let name = query.queries[0].name.to_string();
        (name != "." && name != "lost.example.").then(|| address_for(query, "192.0.2.1"))
    })
    .await;
    let other = Upstream::start(|query, _| {
        (query.name.to_string() != "lost.example.").then(|| addresses(query, &["192.0.2.2"], 60))
    })
    .await;
    let dns = Arc::new(Dns::start(&[], &[site.address, other.address]));
    let lost = {
        let dns = Arc::clone(&dns);
        tokio::spawn(async move { dns.ask("lost.example.", RecordType::A).await })
    };
    eventually("it is passed over", || async { dns.metrics().contains("edgemesh_agent_dns_upstreams_alive 1") }).await;
    let mut number = 0;
    eventually("it is asked first", || {
        number += 1;
        let (dns, name) = (&dns, format!("n{number}.example."));
        async move { dns.ask(&name, RecordType::A).await.answers[0].data.to_string() == "192.0.2.1" }
    })
    .await;
    lost.abort();
}

#[tokio::test]
async fn an_answer_that_comes_too_late_still_shows_that_its_server_is_alive() {
    let socket = Arc::new(tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap());
    let address = socket.local_addr().unwrap();
    let first = Arc::new(parking_lot::Mutex::new(None));
    let (serving, keep) = (Arc::clone(&socket), Arc::clone(&first));
    // It has this one answer, and nothing for probes.
    let task = tokio::spawn(async move {
        let mut buffer = vec![0; 4096];
        while let Ok((length, client)) = serving.recv_from(&mut buffer).await {
            let query = Message::from_vec(&buffer[..length]).unwrap();
            if query.queries[0].name.to_string() == "slow.example." {
                keep.lock().get_or_insert((query, client));
            }
        }
    });
    let dns = Dns::start(&[], &[address]);
    assert_eq!(code(&dns.ask("slow.example.", RecordType::A).await), ResponseCode::ServFail);
    assert!(dns.metrics().contains("edgemesh_agent_dns_upstreams_alive 0"));
    let (query, client) = first.lock().take().unwrap();
    socket.send_to(&address_for(&query, "192.0.2.1"), client).await.unwrap();
    eventually("it is in use again", || async { dns.metrics().contains("edgemesh_agent_dns_upstreams_alive 1") }).await;
    task.abort();
}

#[tokio::test]
async fn a_crowd_with_many_questions_learns_at_once_that_all_upstreams_are_dead() {
    let upstream = Upstream::fixed("192.0.2.1", 60).await;
    upstream.set_silent(true);
    let dns = Arc::new(Dns::start(&[], &[upstream.address]));
    let started = Instant::now();
    let crowd: Vec<_> = (0..20)
        .map(|i| {
            let dns = Arc::clone(&dns);
            tokio::spawn(async move { dns.ask(&format!("n{i}.example."), RecordType::A).await })
        })
        .collect();
    for answer in crowd {
        assert_eq!(code(&answer.await.unwrap()), ResponseCode::ServFail);
    }
    // One probe after the other would make the last wait for the longest time of a question, four seconds.
    assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
}

#[tokio::test]
async fn a_dead_upstream_is_passed_over() {
    let (dead, alive) = (Upstream::fixed("192.0.2.1", 60).await, Upstream::fixed("192.0.2.2", 60).await);
    dead.set_silent(true);
    let dns = Dns::start(&[], &[dead.address, alive.address]);
    let started = Instant::now();
    let answer = dns.ask("a.example.", RecordType::A).await;
    assert_eq!(answer.answers[0].data.to_string(), "192.0.2.2");
    assert!(started.elapsed() < Duration::from_millis(600), "the next is asked soon: {:?}", started.elapsed());
    // A server that isn't there at all says so, and costs nothing.
    let closed = Upstream::fixed("192.0.2.1", 60).await.address;
    let dns = Dns::start(&[], &[closed, alive.address]);
    let started = Instant::now();
    assert_eq!(code(&dns.ask("b.example.", RecordType::A).await), ResponseCode::NoError);
    assert!(started.elapsed() < Duration::from_millis(200), "{:?}", started.elapsed());
}

#[tokio::test]
async fn a_slow_name_does_not_make_its_server_dead() {
    let upstream = Upstream::start(|query, _| {
        (!query.name.to_string().starts_with("slow")).then(|| addresses(query, &["192.0.2.1"], 60))
    })
    .await;
    let dns = Arc::new(Dns::start(&[], &[upstream.address]));
    let slow = {
        let dns = Arc::clone(&dns);
        tokio::spawn(async move { dns.ask("slow.example.", RecordType::A).await })
    };
    while !slow.is_finished() {
        let started = Instant::now();
        let name = format!("n{}.example.", rand::random::<u32>());
        assert_eq!(code(&dns.ask(&name, RecordType::A).await), ResponseCode::NoError);
        assert!(started.elapsed() < Duration::from_millis(300), "{:?}", started.elapsed());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(code(&slow.await.unwrap()), ResponseCode::ServFail);
}

#[tokio::test]
async fn a_server_that_fails_is_followed_by_the_next() {
    let failing = Upstream::start(|_, _| {
        let mut answer = Message::response(0, OpCode::Query);
        answer.metadata.response_code = ResponseCode::Refused;
        Some(answer)
    })
    .await;
    let working = Upstream::fixed("192.0.2.2", 60).await;
    let dns = Dns::start(&[], &[failing.address, working.address]);
    assert_eq!(code(&dns.ask("a.example.", RecordType::A).await), ResponseCode::NoError);
    let dns = Dns::start(&[], &[failing.address]);
    assert_eq!(code(&dns.ask("a.example.", RecordType::A).await), ResponseCode::Refused);
}

#[tokio::test]
async fn a_refusal_without_the_question_is_handed_on_and_takes_no_place() {
    // As unbound refuses whom its `access-control` doesn't name.
    let asked = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&asked);
    let refusing = RawUpstream::start(move |query| {
        count.fetch_add(u32::from(query.queries[0].name.to_string().ends_with(".example.")), Ordering::SeqCst);
        Some(header_alone(query, 5))
    })
    .await;
    let working = Upstream::fixed("192.0.2.2", 60).await;
    let dns = Dns::start_with(&[], &[refusing.address], |config| {
        config.max_queries = 2;
        config.zones = [("works.example".to_owned(), vec![working.address.to_string()])].into();
    });
    for name in ["a.example.", "a.example.", "b.example.", "c.example.", "d.example."] {
        assert_eq!(code(&dns.ask(name, RecordType::A).await), ResponseCode::Refused, "{name}");
    }
    assert_eq!(asked.load(Ordering::SeqCst), 5, "each question anew");
    assert_eq!(code(&dns.ask("a.works.example.", RecordType::A).await), ResponseCode::NoError);
    let dns = Dns::start(&[], &[refusing.address, working.address]);
    assert_eq!(code(&dns.ask("a.example.", RecordType::A).await), ResponseCode::NoError);
}

#[tokio::test]
async fn a_server_that_knows_no_edns_is_asked_without_it_from_then_on() {
    for without_question in [true, false] {
        let with_edns = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&with_edns);
        let old = RawUpstream::start(move |query| {
            if query.edns.is_none() {
                return Some(address_for(query, "192.0.2.1"));
            }
            count.fetch_add(1, Ordering::SeqCst);
            if without_question {
                return Some(header_alone(query, 1));
            }
            let mut answer = Message::response(query.metadata.id, OpCode::Query);
            answer.metadata.response_code = ResponseCode::NotImp;
            answer.queries = query.queries.clone();
            Some(answer.to_vec().unwrap())
        })
        .await;
        let dns = Dns::start(&[], &[old.address]);
        for i in 0..5 {
            let answer = dns.ask(&format!("n{i}.example."), RecordType::A).await;
            assert_eq!((code(&answer), answer.answers.len()), (ResponseCode::NoError, 1));
            assert!(answer.edns.is_some(), "the client's own EDNS has nothing to do with it");
        }
        let with_edns = with_edns.load(Ordering::SeqCst);
        assert!((1..=2).contains(&with_edns), "the first of a client's and the search for loops, not {with_edns}");
    }
}

#[tokio::test]
async fn a_format_error_of_a_server_that_knows_edns_is_handed_on() {
    let asked = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&asked);
    let upstream = RawUpstream::start(move |query| {
        let ours = query.queries[0].name.to_string() == "odd.example.";
        count.fetch_add(u32::from(ours), Ordering::SeqCst);
        let mut answer = Message::response(query.metadata.id, OpCode::Query);
        answer.metadata.response_code = ResponseCode::FormErr;
        answer.queries = query.queries.clone();
        answer.set_edns(Edns::new());
        Some(answer.to_vec().unwrap())
    })
    .await;
    let dns = Dns::start(&[], &[upstream.address]);
    assert_eq!(code(&dns.ask("odd.example.", RecordType::A).await), ResponseCode::FormErr);
    assert_eq!(asked.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn an_alias_to_an_outside_name_comes_with_its_addresses() {
    let upstream = Upstream::start(|query, _| {
        let mut answer = Message::response(0, OpCode::Query);
        let real = Name::from_ascii("edge.cdn.example.").unwrap();
        let cname = RData::CNAME(rdata::CNAME(real.clone()));
        answer.add_answer(Record::from_rdata(query.name.clone(), 60, cname));
        if query.query_type == RecordType::A {
            answer.add_answer(Record::from_rdata(real, 60, RData::A("192.0.2.9".parse().unwrap())));
        }
        Some(answer)
    })
    .await;
    let alias = service("default/out", json!({"type": "ExternalName", "externalName": "www.example.com"}));
    let dns = Dns::start(&[alias], &[upstream.address]);
    for _ in 0..2 {
        let answer = dns.ask("out.default.svc.cluster.local.", RecordType::A).await;
        assert_eq!(
            sorted(&answer.answers),
            [
                "edge.cdn.example. 60 IN A 192.0.2.9",
                "out.default.svc.cluster.local. 5 IN CNAME www.example.com.",
                "www.example.com. 60 IN CNAME edge.cdn.example.",
            ]
        );
    }
    assert_eq!(upstream.asked(), 1);
    upstream.set_silent(true);
    let answer = dns.ask("out.default.svc.cluster.local.", RecordType::MX).await;
    assert_eq!(sorted(&answer.answers), ["out.default.svc.cluster.local. 5 IN CNAME www.example.com."]);
}

#[tokio::test]
async fn resolv_conf_is_followed_as_it_changes() {
    // resolv.conf can't name a port, so both servers are at 53 of addresses of loopback that nobody else has.
    let (one, two) = ("127.53.71.1", "127.53.71.2");
    let first =
        Upstream::start_at(format!("{one}:53").parse().unwrap(), |q, _| Some(addresses(q, &["192.0.2.1"], 0))).await;
    let second =
        Upstream::start_at(format!("{two}:53").parse().unwrap(), |q, _| Some(addresses(q, &["192.0.2.2"], 0))).await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("resolv.conf");
    std::fs::write(&path, format!("nameserver {one}\n")).unwrap();
    let dns = Dns::start_with(&[], &[], |config| config.resolv_conf = path.clone());
    assert_eq!(dns.ask("a.example.", RecordType::A).await.answers[0].data.to_string(), "192.0.2.1");
    std::fs::write(&path, format!("nameserver {two}\n")).unwrap();
    eventually("the new upstream is used", || async {
        dns.ask("a.example.", RecordType::A).await.answers[0].data.to_string() == "192.0.2.2"
    })
    .await;
    drop((first, second));
}

#[tokio::test]
async fn an_upstream_that_sends_queries_back_is_found_and_left() {
    // A forwarder whose upstream is the server under test, as in a wrong resolv.conf.
    let target = Arc::new(parking_lot::Mutex::new(None::<std::net::SocketAddr>));
    let bounced = Arc::new(AtomicU32::new(0));
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let looping = socket.local_addr().unwrap();
    let (to, count) = (Arc::clone(&target), Arc::clone(&bounced));
    let task = tokio::spawn(async move {
        let mut buffer = vec![0; 4096];
        while let Ok((length, _)) = socket.recv_from(&mut buffer).await {
            count.fetch_add(1, Ordering::SeqCst);
            let to = *to.lock();
            if let Some(to) = to {
                drop(socket.send_to(&buffer[..length], to).await);
            }
        }
    });
    let dns = Dns::start(&[], &[looping]);
    *target.lock() = Some(dns.address);
    // The first queries may come before the target is known here; a lost upstream is probed again.
    eventually("the loop is found", || async {
        dns.ask("a.example.", RecordType::A).await;
        dns.metrics().contains("edgemesh_agent_dns_upstreams_alive 0")
    })
    .await;
    task.abort();
}

#[tokio::test]
async fn answers_to_other_questions_are_not_taken() {
    // The right id, another name: as a forger would send it.
    let upstream = Upstream::start(|query, _| Some(addresses(query, &["192.0.2.1"], 60))).await;
    let forger = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = forger.local_addr().unwrap();
    let task = tokio::spawn(async move {
        let mut buffer = vec![0; 4096];
        while let Ok((length, client)) = forger.recv_from(&mut buffer).await {
            let query = Message::from_vec(&buffer[..length]).unwrap();
            let mut other = query.queries[0].clone();
            other.name = Name::from_ascii("other.example.").unwrap();
            let mut answer = addresses(&other, &["203.0.113.66"], 60);
            answer.metadata.id = query.metadata.id;
            answer.queries = vec![other];
            forger.send_to(&answer.to_vec().unwrap(), client).await.unwrap();
        }
    });
    let dns = Dns::start(&[], &[address, upstream.address]);
    let answer = dns.ask("real.example.", RecordType::A).await;
    assert_eq!(answer.answers[0].data.to_string(), "192.0.2.1");
    task.abort();
}
