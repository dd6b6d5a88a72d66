//! What no well-behaved client sends, and clients that stay too long.

use std::time::Duration;

use hickory_proto::{
    op::{Edns, Message, OpCode, ResponseCode},
    rr::{DNSClass, RecordType},
};
use rand::{Rng, RngCore, SeedableRng};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
};

use crate::harness::{DEADLINE, Dns, Upstream, eventually, question, read_framed, service, slice, write_framed};

const VERSION: &str = "dns-version.cluster.local.";
/// From one try of a question to the next, as resolvers have it: datagrams may be dropped.
const RETRY: Duration = Duration::from_millis(100);

#[tokio::test]
async fn queries_that_are_none_of_ours_are_refused_by_the_right_code() {
    let dns = Dns::start(&[], &[]);
    let mut update = question(VERSION, RecordType::TXT);
    update.metadata.op_code = OpCode::Notify;
    assert_eq!(dns.send(&update).await.metadata.response_code, ResponseCode::NotImp);
    let mut chaos = question("version.bind.", RecordType::TXT);
    chaos.queries[0].query_class = DNSClass::CH;
    assert_eq!(dns.send(&chaos).await.metadata.response_code, ResponseCode::Refused);
    let transfer = question("cluster.local.", RecordType::AXFR);
    assert_eq!(dns.send(&transfer).await.metadata.response_code, ResponseCode::Refused);
    let mut future = question(VERSION, RecordType::TXT);
    future.set_edns(Edns::new().set_version(1).clone());
    // 16 is BADVERS; the number has another meaning elsewhere, and the library that meaning's name.
    assert_eq!(u16::from(dns.send(&future).await.metadata.response_code), 16);
    let mut two = question(VERSION, RecordType::TXT);
    two.add_query(two.queries[0].clone());
    let answer = Message::from_vec(&dns.send_bytes(&two.to_vec().unwrap()).await).unwrap();
    assert_eq!(answer.metadata.response_code, ResponseCode::FormErr);
}

#[tokio::test]
async fn garbage_is_survived_and_responses_are_never_answered() {
    let dns = Dns::start(&[], &[]);
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(dns.address).await.unwrap();
    let mut random = rand::rngs::StdRng::seed_from_u64(7);
    let valid = question(VERSION, RecordType::TXT).to_vec().unwrap();
    for i in 0..20_000 {
        let mut bytes = if i % 2 == 0 {
            let mut bytes = vec![0; random.random_range(0..600)];
            random.fill_bytes(&mut bytes);
            bytes
        } else {
            valid.clone()
        };
        for _ in 0..random.random_range(0..6) {
            if let Some(last) = bytes.len().checked_sub(1) {
                bytes[random.random_range(0..=last)] = random.random();
            }
        }
        // Nothing may make it fall over; most need no answer, and the socket's queue may drop some.
        drop(socket.try_send(&bytes));
        if i % 64 == 0 {
            tokio::task::yield_now().await;
        }
    }
    // Asked again and again, as its queue drops what comes while it is full: when this is answered the garbage has been read.
    let drained = async {
        let probe = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        probe.connect(dns.address).await.unwrap();
        loop {
            probe.send(&valid).await.unwrap();
            if tokio::time::timeout(RETRY, probe.recv(&mut [0; 4096])).await.is_ok() {
                return;
            }
        }
    };
    tokio::time::timeout(DEADLINE, drained).await.unwrap();
    let echo = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    echo.connect(dns.address).await.unwrap();
    let mut response = question(VERSION, RecordType::TXT);
    response.metadata.message_type = hickory_proto::op::MessageType::Response;
    echo.send(&response.to_vec().unwrap()).await.unwrap();
    // Asked after it, from the same socket: only this gets an answer.
    let proper = question(VERSION, RecordType::TXT);
    echo.send(&proper.to_vec().unwrap()).await.unwrap();
    let mut buffer = vec![0; 4096];
    let length = tokio::time::timeout(DEADLINE, echo.recv(&mut buffer)).await.unwrap().unwrap();
    let answer = Message::from_vec(&buffer[..length]).unwrap();
    assert_eq!(answer.metadata.id, proper.metadata.id);
    assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
}

#[tokio::test]
async fn pipelined_queries_are_answered_as_they_become_ready() {
    let upstream = Upstream::start(|_, _| None).await;
    let dns = Dns::start(&[], &[upstream.address]);
    let mut stream = TcpStream::connect(dns.address).await.unwrap();
    // The first waits for its upstream in vain; the others needn't wait for it.
    let slow = question("slow.example.", RecordType::A);
    write_framed(&mut stream, &slow).await;
    let fast: Vec<Message> = (0..10).map(|_| question(VERSION, RecordType::TXT)).collect();
    for message in &fast {
        write_framed(&mut stream, message).await;
    }
    for message in &fast {
        let answer = read_framed(&mut stream).await;
        assert_eq!((answer.metadata.id, answer.answers.len()), (message.metadata.id, 1));
    }
    // The client half-closes; what is under way still comes.
    stream.shutdown().await.unwrap();
    let answer = read_framed(&mut stream).await;
    assert_eq!((answer.metadata.id, answer.metadata.response_code), (slow.metadata.id, ResponseCode::ServFail));
    assert_eq!(stream.read(&mut [0; 1]).await.unwrap(), 0);
}

#[tokio::test]
async fn connections_that_say_nothing_or_nonsense_are_closed() {
    let dns = Dns::start(&[], &[]);
    let mut silent = TcpStream::connect(dns.address).await.unwrap();
    let mut slow = TcpStream::connect(dns.address).await.unwrap();
    slow.write_all(&[0, 40, 1, 2, 3]).await.unwrap();
    let mut huge = TcpStream::connect(dns.address).await.unwrap();
    huge.write_all(&[0xff; 4098]).await.unwrap();
    for (what, stream) in [("huge", &mut huge), ("silent", &mut silent), ("slow", &mut slow)] {
        let mut rest = Vec::new();
        let closed = tokio::time::timeout(DEADLINE, stream.read_to_end(&mut rest)).await;
        assert!(closed.is_ok(), "{what} is still open");
        assert!(rest.is_empty(), "{what}");
    }
}

#[tokio::test]
async fn connections_whose_clients_leave_without_their_answers_end() {
    let dns = Dns::start(&[], &[]);
    let message = question(VERSION, RecordType::TXT).to_vec().unwrap();
    let queries = [&(message.len() as u16).to_be_bytes(), &message[..]].concat().repeat(200);
    for _ in 0..70 {
        let mut stream = TcpStream::connect(dns.address).await.unwrap();
        // Those beyond what one client may have are closed meanwhile.
        drop(stream.write_all(&queries).await);
    }
    // Accepted behind them, so when it is answered they have all been counted.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.9.9:0".parse().unwrap()).unwrap();
    let mut other = socket.connect(dns.address).await.unwrap();
    write_framed(&mut other, &question(VERSION, RecordType::TXT)).await;
    assert_eq!(read_framed(&mut other).await.answers.len(), 1);
    drop(other);
    eventually("they end", || async { dns.metrics().contains("edgemesh_agent_dns_connections 0\n") }).await;
    assert_eq!(dns.ask_tcp(VERSION, RecordType::TXT).await.answers.len(), 1);
    assert!(dns.shutdown.drain(DEADLINE).await, "something of them goes on");
}

#[tokio::test]
async fn beyond_its_limit_the_server_says_so_at_once() {
    let upstream = Upstream::start(|_, _| None).await;
    let dns = Dns::start_with(&[], &[upstream.address], |config| config.max_queries = 4);
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(dns.address).await.unwrap();
    for i in 0..5 {
        let message = question(&format!("n{i}.example."), RecordType::A);
        socket.send(&message.to_vec().unwrap()).await.unwrap();
    }
    let mut buffer = vec![0; 4096];
    let answer = tokio::time::timeout(Duration::from_secs(2), socket.recv(&mut buffer)).await.unwrap().unwrap();
    let answer = Message::from_vec(&buffer[..answer]).unwrap();
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    assert_eq!(answer.queries[0].name.to_string(), "n4.example.");
}

#[tokio::test]
async fn what_is_answered_cut_ignored_and_waited_for_is_counted() {
    let upstream = Upstream::start(|_, _| None).await;
    let endpoints: Vec<_> = (0..100).map(|i| json!({"addresses": [format!("10.244.3.{i}")]})).collect();
    let objects = [
        service("default/many", json!({"clusterIP": "None", "ports": [{"port": 80}]})),
        slice("default/many", 1, "IPv4", json!([{"port": 80}]), json!(endpoints)),
    ];
    let dns = Dns::start(&objects, &[upstream.address]);
    assert!(dns.ask("many.default.svc.cluster.local.", RecordType::A).await.metadata.truncation);
    assert!(!dns.ask_tcp("many.default.svc.cluster.local.", RecordType::A).await.metadata.truncation);
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(dns.address).await.unwrap();
    socket.send(b"no query").await.unwrap();
    let mut open = TcpStream::connect(dns.address).await.unwrap();
    write_framed(&mut open, &question(VERSION, RecordType::TXT)).await;
    read_framed(&mut open).await;
    let expected = ["cluster_seconds_count 3", "truncated_total 1", "ignored_total 1", "connections 1"];
    eventually("everything is counted", || async {
        socket.send(&question("slow.example.", RecordType::A).to_vec().unwrap()).await.unwrap();
        let metrics = dns.metrics();
        !metrics.contains("edgemesh_agent_dns_waiting 0\n")
            && expected.iter().all(|line| metrics.contains(&format!("edgemesh_agent_dns_{line}\n")))
    })
    .await;
    drop(open);
    let after = ["waiting 0", "connections 0"];
    eventually("what ended is no longer counted", || async {
        let metrics = dns.metrics();
        after.iter().all(|line| metrics.contains(&format!("edgemesh_agent_dns_{line}\n")))
    })
    .await;
}

#[tokio::test]
async fn a_client_with_too_many_connections_is_turned_away_and_others_are_not() {
    let dns = Dns::start(&[], &[]);
    let mut open = Vec::new();
    // Each is known to be counted before the next one comes.
    for _ in 0..64 {
        let mut stream = TcpStream::connect(dns.address).await.unwrap();
        write_framed(&mut stream, &question(VERSION, RecordType::TXT)).await;
        read_framed(&mut stream).await;
        open.push(stream);
    }
    let mut beyond = TcpStream::connect(dns.address).await.unwrap();
    let closed = tokio::time::timeout(DEADLINE, beyond.read_u8()).await.unwrap();
    assert!(closed.is_err());
    let metrics = dns.metrics();
    assert!(metrics.contains(r#"edgemesh_agent_dns_limited_total{limit="connections"} 1"#), "{metrics}");
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.9.9:0".parse().unwrap()).unwrap();
    let mut other = socket.connect(dns.address).await.unwrap();
    write_framed(&mut other, &question(VERSION, RecordType::TXT)).await;
    assert_eq!(read_framed(&mut other).await.answers.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_query_is_forgotten_when_clients_ask_one_thing_after_the_other() {
    let dns = Dns::start(&[], &[]);
    let (server, query) = (dns.address, question(VERSION, RecordType::TXT).to_vec().unwrap());
    // Threads of their own, so that the server's are idle again and again between two queries.
    let clients: Vec<_> = (0..3)
        .map(|_| {
            let query = query.clone();
            std::thread::spawn(move || {
                let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
                socket.connect(server).unwrap();
                socket.set_read_timeout(Some(DEADLINE)).unwrap();
                for number in 0..20_000 {
                    socket.send(&query).unwrap();
                    let answered = socket.recv(&mut [0; 512]);
                    assert!(answered.is_ok(), "query {number}: {answered:?}");
                }
            })
        })
        .collect();
    tokio::task::spawn_blocking(|| clients.into_iter().for_each(|client| client.join().unwrap())).await.unwrap();
}

/// Whether nobody else has the address, nor shares it.
fn is_free(address: std::net::SocketAddr) -> bool {
    std::net::UdpSocket::bind(address).is_ok()
}

#[tokio::test]
async fn a_server_that_stopped_has_left_its_address() {
    let dns = Dns::start(&[], &[]);
    assert_eq!(dns.ask(VERSION, RecordType::TXT).await.answers.len(), 1);
    assert!(!is_free(dns.address));
    assert!(dns.shutdown.drain(DEADLINE).await, "something of it goes on");
    assert!(is_free(dns.address));
}

#[test]
fn a_server_ends_with_its_runtime() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let dns = {
        let _entered = runtime.enter();
        Dns::start(&[], &[])
    };
    assert!(!is_free(dns.address));
    drop(runtime);
    let started = std::time::Instant::now();
    while !is_free(dns.address) {
        assert!(started.elapsed() < DEADLINE, "its thread still receives");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}
