//! `healthCheckNodePort`, as a load balancer asks there.

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

use edgemesh_agent::health_check;
use edgemesh_mesh::CatalogStore;
use edgemesh_telemetry::Shutdown;
use serde_json::{Value, json};

use crate::sandbox::Sandbox;

fn ask(port: u16, request: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Asks until the answer is what it should become.
fn becomes(port: u16, expected: impl Fn(&std::io::Result<String>) -> bool) -> String {
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        let answer = ask(port, "GET /healthz HTTP/1.1\r\nHost: node\r\n\r\n");
        if expected(&answer) {
            return answer.unwrap_or_default();
        }
        assert!(Instant::now() < until, "{answer:?}");
    }
}

fn service(store: &CatalogStore, port: u16, policy: &str) {
    let object = json!({"metadata": {"name": "web", "namespace": "d"},
        "spec": {"clusterIP": "10.96.0.20", "type": "LoadBalancer", "externalTrafficPolicy": policy,
                 "healthCheckNodePort": port, "ports": [{"name": "a", "port": 80}, {"name": "b", "port": 81}]}});
    store.apply_service(&serde_json::from_value(object).unwrap());
    store.publish();
}

fn endpoints(store: &CatalogStore, endpoints: &Value) {
    let slice = json!({"metadata": {"name": "web", "namespace": "d", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4", "ports": [{"name": "a", "port": 8080}, {"name": "b", "port": 8081}], "endpoints": endpoints});
    store.apply_endpoint_slice(&serde_json::from_value(slice).unwrap());
    store.publish();
}

#[test]
fn a_load_balancer_is_told_whether_endpoints_are_ready_on_this_node() {
    let _sandbox = Sandbox::new(&[]);
    let netns = std::fs::File::open("/proc/thread-self/ns/net").unwrap();
    let store = CatalogStore::new();
    service(&store, 32_000, "Local");
    let remote = json!({"addresses": ["10.244.2.5"], "nodeName": "a2"});
    let local = |address: &str| json!({"addresses": [address], "nodeName": "a1"});
    let terminating = json!({"addresses": ["10.244.1.5"], "nodeName": "a1",
        "conditions": {"ready": false, "serving": true, "terminating": true}});
    endpoints(&store, &json!([remote, local("10.244.1.5"), local("10.244.1.6")]));
    store.mark_synced();
    store.publish();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .on_thread_start(move || nix::sched::setns(&netns, nix::sched::CloneFlags::CLONE_NEWNET).unwrap())
        .build()
        .unwrap();
    let shutdown = Shutdown::default();
    let task = runtime.spawn(health_check::keep("a1".to_owned(), store.clone(), shutdown.clone()));

    let answer = becomes(32_000, Result::is_ok);
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(head.contains("\r\nX-Load-Balancing-Endpoint-Weight: 2\r\n"), "{head}");
    let body: Value = serde_json::from_str(body).unwrap();
    assert_eq!(body["service"], json!({"namespace": "d", "name": "web"}));
    assert_eq!(body["localEndpoints"], 2, "addresses, whatever number of ports they have");

    // Who connects and asks nothing keeps nobody waiting.
    let idle: Vec<TcpStream> = (0..128).map(|_| TcpStream::connect(("127.0.0.1", 32_000)).unwrap()).collect();
    assert!(ask(32_000, "GET / HTTP/1.1\r\n\r\n").unwrap().starts_with("HTTP/1.1 200"));
    drop(idle);

    let begins = |status: &'static str| move |answer: &std::io::Result<String>| matches!(answer, Ok(text) if text.starts_with(status));
    endpoints(&store, &json!([remote, terminating]));
    becomes(32_000, begins("HTTP/1.1 503"));
    endpoints(&store, &json!([local("10.244.1.5")]));
    becomes(32_000, begins("HTTP/1.1 200"));
    // What is no request is not answered, and takes no place for ever.
    assert_eq!(ask(32_000, &"x".repeat(9000)).unwrap_or_default(), "");
    // Another port, and the policy without one.
    service(&store, 32_001, "Local");
    becomes(32_001, begins("HTTP/1.1 200"));
    becomes(32_000, Result::is_err);
    service(&store, 32_001, "Cluster");
    becomes(32_001, Result::is_err);
    service(&store, 32_001, "Local");
    becomes(32_001, begins("HTTP/1.1 200"));
    store.delete_service("d", "web");
    store.publish();
    becomes(32_001, Result::is_err);
    drop(std::net::TcpListener::bind(("0.0.0.0", 32_001)).unwrap());
    runtime.block_on(async {
        shutdown.drain(Duration::from_secs(1)).await;
        task.await.unwrap();
    });
}
