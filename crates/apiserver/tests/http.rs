//! The server at the level of HTTP: forms of answers, watches, limits, and clients that misbehave.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::{sync::Arc, time::Duration};

use common::{TOKEN, TestServer};
use edgemesh_apiserver::{
    Identity, Mode, ReplicaChange, Store, StoreOptions,
    auth::{Authenticator, Authorizer},
    server::{Server, ServerOptions},
};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

async fn connect(server: &TestServer) -> TlsStream<TcpStream> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(server.authority.certificate_pem().as_bytes()).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let stream = TcpStream::connect(server.address).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap()
}

/// Sends a request and reads the answer to its end: status, head, body.
async fn send(server: &TestServer, method: &str, path: &str, headers: &str, body: &str) -> (u16, String, String) {
    let auth = format!("Authorization: Bearer {TOKEN}\r\n");
    send_as(server, &auth, method, path, headers, body).await
}

async fn send_as(
    server: &TestServer,
    auth: &str,
    method: &str,
    path: &str,
    headers: &str,
    body: &str,
) -> (u16, String, String) {
    let mut stream = connect(server).await;
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\n{auth}Connection: close\r\n{headers}Content-Length: {}\r\n\r\n",
        body.len()
    );
    // A server that refuses a body may close before all of it was sent.
    let _ = stream.write_all(format!("{head}{body}").as_bytes()).await;
    let mut out = Vec::new();
    let read =
        tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut out)).await.expect("no answer in 20 s");
    let text = String::from_utf8_lossy(&out).into_owned();
    if text.is_empty() {
        read.unwrap();
    }
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((text.as_str(), ""));
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
    (status, head.to_ascii_lowercase(), body.to_owned())
}

async fn get(server: &TestServer, path: &str, accept: &str) -> (u16, Value) {
    let (status, _, body) = send(server, "GET", path, &format!("Accept: {accept}\r\n"), "").await;
    (status, serde_json::from_str(&body).unwrap_or(Value::Null))
}

const JSON: &str = "Content-Type: application/json\r\n";

#[tokio::test]
async fn strangers_see_health_and_version_only() {
    let server = TestServer::start().await;
    for path in ["/healthz", "/readyz", "/livez", "/version"] {
        assert_eq!(send_as(&server, "", "GET", path, "", "").await.0, 200, "{path}");
    }
    for path in ["/api/v1/pods", "/api", "/apis", "/openapi/v2", "/nothing"] {
        let (status, _, body) = send_as(&server, "", "GET", path, "", "").await;
        assert_eq!(status, 401, "{path}");
        assert!(body.contains("Unauthorized"));
    }
    let wrong = "Authorization: Bearer wrong\r\n";
    assert_eq!(send_as(&server, wrong, "GET", "/version", "", "").await.0, 401);
    server.stop().await;
}

#[tokio::test]
async fn answers_come_in_the_form_that_was_asked_for() {
    let server = TestServer::start().await;
    let (status, table) =
        get(&server, "/api/v1/namespaces", "application/json;as=Table;v=v1;g=meta.k8s.io,application/json").await;
    assert_eq!((status, table["kind"].as_str()), (200, Some("Table")));
    assert_eq!(table["columnDefinitions"][0]["name"], "Name");
    assert_eq!(table["rows"][0]["cells"][0], "default");
    assert_eq!(table["rows"][0]["object"]["kind"], "PartialObjectMetadata");
    let (_, list) =
        get(&server, "/api/v1/namespaces", "application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io").await;
    assert_eq!(list["kind"], "PartialObjectMetadataList");
    assert!(list["items"][0]["spec"].is_null());
    let (_, list) = get(&server, "/api/v1/namespaces", "application/vnd.kubernetes.protobuf,application/json").await;
    assert_eq!((list["kind"].as_str(), list["items"].as_array().unwrap().len()), (Some("NamespaceList"), 4));
    assert_eq!(get(&server, "/api/v1/namespaces", "application/vnd.kubernetes.protobuf").await.0, 406);
    let discovery = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";
    let (_, all) = get(&server, "/apis", discovery).await;
    assert_eq!(all["kind"], "APIGroupDiscoveryList");
    assert!(all["items"].as_array().unwrap().iter().any(|g| g["metadata"]["name"] == "apps"));
    let (_, old) = get(&server, "/apis", "application/json").await;
    assert_eq!(old["kind"], "APIGroupList");
    let (_, resources) = get(&server, "/apis/apps/v1", "*/*").await;
    assert!(
        resources["resources"]
            .as_array()
            .unwrap()
            .iter()
            .any(|r| r["name"] == "deployments/scale" && r["group"] == "autoscaling")
    );
    server.stop().await;
}

#[tokio::test]
async fn errors_are_statuses_in_kubernetes_words() {
    let server = TestServer::start().await;
    let (status, body) = get(&server, "/api/v1/namespaces/default/pods/none", "*/*").await;
    assert_eq!(status, 404);
    assert_eq!(body["reason"], "NotFound");
    assert_eq!(body["details"], json!({"name": "none", "kind": "pods"}));
    assert_eq!(get(&server, "/apis/none/v1/things", "*/*").await.0, 404);
    assert_eq!(get(&server, "/api/v1/pods?labelSelector=a+in+(", "*/*").await.0, 400);
    assert_eq!(
        get(&server, "/api/v1/pods?fieldSelector=spec.nothing%3D1", "*/*").await.1["message"],
        "field label not supported: spec.nothing"
    );
    assert_eq!(get(&server, "/api/v1/namespaces/default/nodes", "*/*").await.0, 404);
    let (status, _, body) = send(&server, "PUT", "/api/v1/pods", JSON, "{}").await;
    assert_eq!(status, 405, "{body}");
    for (kind, expected) in
        [("application/apply-patch+yaml", 415), ("text/plain", 415), ("application/json-patch+json", 400)]
    {
        let headers = format!("Content-Type: {kind}\r\n");
        assert_eq!(send(&server, "PATCH", "/api/v1/namespaces/default", &headers, "{}").await.0, expected, "{kind}");
    }
    let path = "/api/v1/namespaces/default/configmaps";
    assert_eq!(send(&server, "POST", path, JSON, "{not json").await.0, 400);
    assert_eq!(send(&server, "POST", path, JSON, "[]").await.0, 400);
    assert_eq!(send(&server, "POST", path, "Content-Type: application/cbor\r\n", "{}").await.0, 415);
    let wrong_type = r#"{"metadata":{"name":"a"},"data":{"k":1}}"#;
    let (status, _, body) = send(&server, "POST", path, JSON, wrong_type).await;
    assert_eq!(status, 400);
    assert!(body.contains("data"), "{body}");
    let yaml = "metadata:\n  name: from-yaml\ndata:\n  k: v\n";
    assert_eq!(send(&server, "POST", path, "Content-Type: application/yaml\r\n", yaml).await.0, 201);
    let deep = format!("{{\"a\":{}", "[".repeat(100_000));
    assert_eq!(send(&server, "POST", path, JSON, &deep).await.0, 400);
    server.stop().await;
}

#[tokio::test]
async fn oversized_bodies_are_refused_before_they_are_read() {
    let server = TestServer::start().await;
    let path = "/api/v1/namespaces/default/configmaps";
    let mut stream = connect(&server).await;
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nConnection: close\r\nContent-Length: 52428800\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = vec![0; 4096];
    let count = tokio::time::timeout(Duration::from_secs(10), stream.read(&mut answer)).await.unwrap().unwrap();
    let answer = String::from_utf8_lossy(&answer[..count]).into_owned();
    assert!(answer.starts_with("HTTP/1.1 413") && answer.contains("limit is 3145728"), "{answer}");
    server.stop().await;
}

#[tokio::test]
async fn garbage_and_silence_on_the_port_hurt_nobody() {
    let server = TestServer::start().await;
    let mut silent = Vec::new();
    for n in 0..50_u8 {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        if n % 2 == 0 {
            let garbage: Vec<u8> = (0..2000).map(|i| (i * 31 % 251) as u8 ^ n).collect();
            let _ = stream.write_all(&garbage).await;
        }
        silent.push(stream);
    }
    let mut inside = connect(&server).await;
    inside.write_all(b"\x00\x01garbage inside of TLS\r\n\r\n").await.unwrap();
    assert_eq!(get(&server, "/api/v1/pods", "*/*").await.0, 200);
    drop(silent);
    server.stop().await;
}

/// Reads the lines of a watch.
struct Lines {
    stream: TlsStream<TcpStream>,
    buffer: String,
}

impl Lines {
    async fn open(server: &TestServer, path: &str, accept: &str) -> Self {
        let mut stream = connect(server).await;
        let head =
            format!("GET {path} HTTP/1.0\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nAccept: {accept}\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        Self { stream, buffer: String::new() }
    }

    /// The next event; `None` at the end.
    async fn next(&mut self) -> Option<Value> {
        loop {
            if let Some(end) = self.buffer.find('\n') {
                let line: String = self.buffer.drain(..=end).collect();
                if line.starts_with('{') {
                    return Some(serde_json::from_str(&line).unwrap());
                }
                continue;
            }
            let mut bytes = vec![0; 16384];
            let read = tokio::time::timeout(Duration::from_secs(15), self.stream.read(&mut bytes)).await;
            let count = read.expect("no event in 15 s").unwrap_or(0);
            if count == 0 {
                return None;
            }
            self.buffer.push_str(&String::from_utf8_lossy(&bytes[..count]));
        }
    }
}

#[tokio::test]
async fn watches_resume_bookmark_expire_and_end_in_time() {
    let server = TestServer::start().await;
    let path = "/api/v1/namespaces/default/configmaps";
    let make = async |name: &str| {
        let body = json!({"metadata": {"name": name}}).to_string();
        let (status, _, body) = send(&server, "POST", path, JSON, &body).await;
        assert_eq!(status, 201, "{body}");
        serde_json::from_str::<Value>(&body).unwrap()["metadata"]["resourceVersion"].as_str().unwrap().to_owned()
    };
    let first = make("a").await;
    let mut all = Lines::open(&server, &format!("{path}?watch=1&timeoutSeconds=3"), "*/*").await;
    assert_eq!(all.next().await.unwrap()["object"]["metadata"]["name"], "a");
    let mut later = Lines::open(&server, &format!("{path}?watch=1&resourceVersion={first}"), "*/*").await;
    make("b").await;
    let event = later.next().await.unwrap();
    assert_eq!((event["type"].as_str(), event["object"]["metadata"]["name"].as_str()), (Some("ADDED"), Some("b")));
    assert_eq!(all.next().await.unwrap()["object"]["metadata"]["name"], "b");
    assert!(all.next().await.is_none(), "timeoutSeconds ends it");
    let initial = "watch=1&sendInitialEvents=true&allowWatchBookmarks=true&resourceVersionMatch=NotOlderThan";
    let mut streaming = Lines::open(&server, &format!("{path}?{initial}"), "*/*").await;
    for expected in ["ADDED", "ADDED", "BOOKMARK"] {
        let event = streaming.next().await.unwrap();
        assert_eq!(event["type"], expected);
        if expected == "BOOKMARK" {
            assert_eq!(event["object"]["metadata"]["annotations"]["k8s.io/initial-events-end"], "true");
        }
    }
    assert_eq!(get(&server, &format!("{path}?watch=1&sendInitialEvents=true"), "*/*").await.0, 422);
    let mut expired = Lines::open(&server, &format!("{path}?watch=1&resourceVersion=99999999"), "*/*").await;
    let event = expired.next().await.unwrap();
    assert_eq!(
        (event["type"].as_str(), event["object"]["code"].as_i64(), event["object"]["reason"].as_str()),
        (Some("ERROR"), Some(410), Some("Expired"))
    );
    let table = "application/json;as=Table;v=v1;g=meta.k8s.io";
    let mut rows = Lines::open(&server, &format!("{path}?watch=1"), table).await;
    let (one, two) = (rows.next().await.unwrap(), rows.next().await.unwrap());
    assert_eq!(one["object"]["kind"], "Table");
    assert!(!one["object"]["columnDefinitions"].as_array().unwrap().is_empty());
    assert!(two["object"]["columnDefinitions"].as_array().unwrap().is_empty());
    server.stop().await;
    assert!(later.next().await.is_none(), "a stopping server ends watches");
}

#[tokio::test]
async fn a_replica_serves_reads_and_takes_the_node_s_own_writes() {
    let folder = tempfile::tempdir().unwrap();
    let mode = Mode::Replica { node: "edge-1".to_owned() };
    let store = Store::open(&folder.path().join("store.db"), mode, StoreOptions::small()).await.unwrap();
    let options = ServerOptions {
        authenticator: Authenticator::everyone_is(Identity::node("edge-1")),
        authorizer: Authorizer::Copy,
        ..ServerOptions::default()
    };
    let server = Server::bind("127.0.0.1:0".parse().unwrap(), None, store.clone(), options).await.unwrap();
    let address = server.address;
    let stop = tokio_util::sync::CancellationToken::new();
    let task = tokio::spawn(server.serve(stop.clone()));
    let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "default", "uid": "u"},
        "spec": {"clusterIP": "10.96.0.7", "ports": [{"port": 80, "protocol": "TCP", "targetPort": 80}]}});
    let key = edgemesh_api::ObjectKey::new(edgemesh_api::ResourceName::new("", "v1", "services"), "default", "web");
    store
        .apply_replica(vec![ReplicaChange::Upsert { key, origin_version: "5".to_owned(), object: service }])
        .await
        .unwrap();
    let request = async |method: &str, path: &str, body: &str| {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{JSON}Content-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut out = String::new();
        stream.read_to_string(&mut out).await.unwrap();
        out
    };
    assert!(request("GET", "/api/v1/services", "").await.contains("10.96.0.7"));
    let refused = request("DELETE", "/api/v1/namespaces/default/services/web", "").await;
    assert!(refused.starts_with("HTTP/1.1 403") && refused.contains("write to the cluster's API"), "{refused}");
    let event = json!({"metadata": {"generateName": "e-"}, "involvedObject": {"kind": "Service", "name": "web", "namespace": "default"},
        "reason": "Tested", "type": "Normal", "message": "m"});
    let made = request("POST", "/api/v1/namespaces/default/events", &event.to_string()).await;
    assert!(made.starts_with("HTTP/1.1 201"), "{made}");
    assert_eq!(store.outbox_pending(0, 10).await.unwrap().len(), 1);
    stop.cancel();
    task.await.unwrap();
}
