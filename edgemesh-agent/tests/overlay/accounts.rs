//! The access log and the counters by Service.

use edgemesh_mesh::model::Protocol;
use tokio::{io::AsyncWriteExt, net::TcpStream, net::UdpSocket};

use crate::{
    access_log::{AccessLog, Line, says},
    rig::{Node, service, two_sites, two_sites_with, until, within},
    servers::{call, server, udp_server},
};

/// The lines of a Service; its name must be that of one test.
async fn lines(log: &AccessLog, service: &str, count: usize) -> Vec<Line> {
    until("the lines of the access log", || log.with("service", service).len() >= count).await;
    log.with("service", service)
}

fn of_service(node: &Node, name: &str, service: &str, rest: &str) -> u64 {
    node.metric(&format!("edgemesh_agent_service_{name}_total{{namespace=\"default\",service=\"{service}\",{rest}}}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn each_connection_leaves_a_line_with_where_it_went_and_what_it_carried() {
    let log = AccessLog::start();
    let (a, b) = two_sites().await;
    let (far, near) = (server("b").await, server("a").await);
    service(&[&a, &b], "logged-far", "TCP", &[(far, "b")]);
    service(&[&a, &b], "logged-near", "TCP", &[(near, "a")]);
    assert_eq!(call(&a, "logged-far", &[1; 1000]).await.unwrap(), "b 1000");
    assert_eq!(call(&a, "logged-near", &[1; 2000]).await.unwrap(), "a 2000");
    let line = &lines(log, "logged-far", 1).await[0];
    let endpoint = far.to_string();
    says(line, &[("namespace", "default"), ("port", "80"), ("protocol", "tcp"), ("endpoint", &endpoint)]);
    says(line, &[("node", "b"), ("path", "tunnel"), ("to_endpoint", "1000"), ("to_client", "6"), ("result", "closed")]);
    assert!(line["client"].starts_with("127.0.0.1:") && line["seconds"].parse::<f64>().unwrap() > 0.0, "{line:?}");
    let line = &lines(log, "logged-near", 1).await[0];
    says(line, &[("node", "a"), ("path", "direct"), ("to_endpoint", "2000"), ("to_client", "6"), ("result", "closed")]);
    assert_eq!(of_service(&a, "connections", "logged-far", "path=\"tunnel\""), 1);
    assert_eq!(of_service(&a, "bytes", "logged-far", "direction=\"to_endpoint\""), 1000);
    assert_eq!(of_service(&a, "bytes", "logged-far", "direction=\"to_client\""), 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_have_their_reason_in_the_log_and_in_the_counters() {
    let log = AccessLog::start();
    let (a, b) = two_sites().await;
    service(&[&a, &b], "logged-empty", "TCP", &[]);
    service(&[&a, &b], "logged-gone", "TCP", &[(std::net::SocketAddr::from(([127, 0, 0, 1], 1)), "b")]);
    service(&[&a, &b], "logged-broken", "TCP", &[(server("a").await, "a")]);
    assert!(call(&a, "logged-empty", b"x").await.is_err());
    assert!(call(&a, "logged-gone", b"x").await.is_err());
    let mut broken = TcpStream::connect(a.listener("logged-broken", Protocol::Tcp)).await.unwrap();
    broken.write_all(b"begun").await.unwrap();
    until("the connection", || of_service(&a, "connections", "logged-broken", "path=\"proxied\"") == 1).await;
    socket2::SockRef::from(&broken).set_linger(Some(std::time::Duration::ZERO)).unwrap();
    drop(broken);
    for (service, reason) in [("empty", "no_endpoint"), ("gone", "unreachable"), ("broken", "broken")] {
        let service = format!("logged-{service}");
        let line = &lines(log, &service, 1).await[0];
        let path = if reason == "broken" { "direct" } else { "none" };
        says(line, &[("result", reason), ("path", path)]);
        assert_eq!(of_service(&a, "failures", &service, &format!("reason=\"{reason}\"")), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_udp_flow_leaves_its_line_when_it_has_been_idle() {
    let log = AccessLog::start();
    let (a, b) = two_sites_with(|config| config.proxied.udp_idle_seconds = 1).await;
    service(&[&a, &b], "logged-udp", "UDP", &[(udp_server().await, "b")]);
    let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    client.send_to(b"12345", a.listener("logged-udp", Protocol::Udp)).await.unwrap();
    within("the reply", client.recv(&mut [0; 16])).await.unwrap();
    let line = &lines(log, "logged-udp", 1).await[0];
    says(line, &[("protocol", "udp"), ("node", "b"), ("path", "tunnel"), ("to_endpoint", "5"), ("to_client", "5")]);
    says(line, &[("result", "idle"), ("client", &client.local_addr().unwrap().to_string())]);
    assert_eq!(of_service(&a, "bytes", "logged-udp", "direction=\"to_client\""), 5);
}

/// A resolver that asks again and again, for example.
#[tokio::test(flavor = "multi_thread")]
async fn datagrams_that_go_nowhere_share_a_line_each_second() {
    let log = AccessLog::start();
    let (a, b) = two_sites().await;
    service(&[&a, &b], "logged-nowhere", "UDP", &[]);
    service(&[&a, &b], "logged-echo", "UDP", &[(udp_server().await, "b")]);
    let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let begin = std::time::Instant::now();
    for _ in 0..20 {
        for _ in 0..50 {
            client.send_to(b"anybody?", a.listener("logged-nowhere", Protocol::Udp)).await.unwrap();
        }
        // All come by one socket: once this is answered, those before it have been taken.
        client.send_to(b"done", a.listener("logged-echo", Protocol::Udp)).await.unwrap();
        within("the reply", client.recv(&mut [0; 16])).await.unwrap();
    }
    let seconds = begin.elapsed().as_secs() as usize;
    let lines = lines(log, "logged-nowhere", 1).await;
    says(&lines[0], &[("result", "no_endpoint"), ("path", "none")]);
    assert!(lines.len() <= 2 + seconds, "{} lines in {seconds} s", lines.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_service_loses_its_series_even_if_a_connection_ends_later() {
    let (a, b) = two_sites().await;
    service(&[&a, &b], "counted", "TCP", &[(server("b").await, "b")]);
    service(&[&a, &b], "staying", "TCP", &[(server("b").await, "b")]);
    let mut open = TcpStream::connect(a.listener("counted", Protocol::Tcp)).await.unwrap();
    open.write_all(b"begun").await.unwrap();
    assert_eq!(call(&a, "staying", b"x").await.unwrap(), "b 1");
    until("the connections", || of_service(&a, "connections", "counted", "path=\"tunnel\"") == 1).await;
    a.catalog.delete_service("default", "counted");
    a.catalog.publish();
    until("the series to be removed", || !a.metrics().contains("service=\"counted\"")).await;
    let bytes = "edgemesh_agent_proxied_bytes_total{protocol=\"tcp\",direction=\"to_endpoint\"}";
    drop(open);
    until("the connection to end", || a.metric(bytes) >= 6).await;
    assert!(call(&a, "counted", b"x").await.is_err());
    assert!(!a.metrics().contains("service=\"counted\""));
    assert!(a.metrics().contains("service=\"staying\""));
}
