//! Who gets in: tokens, certificates, and what the nodes' port does with everything else.

use std::time::Duration;

use bytes::Bytes;
use edgemesh_api::{
    link::{EdgeFrame, Heartbeat, Hello, HubFrame, ObjectRef, RefuseCode, ToEdge, ToHub, Write, WriteVerb, Writes},
    names::{GATEWAY_NODE_LABEL, NODE_LEASE_NAMESPACE},
};
use edgemesh_link::{
    Fault, frames,
    tls::{self, KeyPair},
    transport::{self, Connection, Event},
};
use k8s_openapi::api::core::v1::Node;
use kube::{Api, ResourceExt};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::rig::{DEADLINE, Edge, Hub, eventually};

async fn refusal(hub: &Hub, token: &str, node: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    let error = edgecore::join::join(folder.path(), &hub.url(), token, node).await.unwrap_err();
    assert!(!folder.path().join("join.json").exists(), "a refused join must leave no identity");
    format!("{error:#}")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_admits_its_own_node_once() {
    let hub = Hub::start().await;
    let token = hub.token("edge-1");
    let parts: Vec<_> = token.split('.').collect();
    let (id, secret, pin) = (parts[0], parts[1], parts[2]);

    let wrong = format!("{id}.{}.{pin}", "0".repeat(secret.len()));
    assert!(refusal(&hub, &wrong, "edge-1").await.contains("token's secret is wrong"));
    let unknown = format!("aaaaaaaaaa.{secret}.{pin}");
    assert!(refusal(&hub, &unknown, "edge-1").await.contains("unknown"));
    let other = refusal(&hub, &token, "edge-2").await;
    assert!(other.contains("edge-1") && other.contains("edge-2"), "{other}");
    let impostor = format!("{id}.{secret}.{}", "0".repeat(64));
    assert!(refusal(&hub, &impostor, "edge-1").await.contains("its CA is another"));
    assert!(refusal(&hub, "nonsense", "edge-1").await.contains("malformed"));

    let folder = tempfile::tempdir().unwrap();
    edgecore::join::join(folder.path(), &hub.url(), &token, "edge-1").await.unwrap();
    let key = std::fs::metadata(folder.path().join("pki/node.key")).unwrap();
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&key.permissions()) & 0o777, 0o600);
    assert!(refusal(&hub, &token, "edge-1").await.contains("used already"));

    let short = hub.command(&["token", "create", "--node", "edge-3", "--ttl", "1s"]);
    let short = String::from_utf8(short.stdout).unwrap();
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    assert!(refusal(&hub, short.trim(), "edge-3").await.contains("expired"));
    let bad = hub.command(&["token", "create", "--node", "Not A Node"]);
    assert!(!bad.status.success() && bad.stdout.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_gateways_token_makes_a_gateway_node() {
    let hub = Hub::start().await;
    let client = hub.client().await;
    let nodes: Api<Node> = Api::all(client);
    let made = hub.command(&["token", "create", "--node", "edge-g", "--gateway"]);
    let token = String::from_utf8(made.stdout).unwrap();
    let folder = tempfile::tempdir().unwrap();
    edgecore::join::join(folder.path(), &hub.url(), token.trim(), "edge-g").await.unwrap();
    assert_eq!(nodes.get("edge-g").await.unwrap().labels()[GATEWAY_NODE_LABEL], "true");
    // A node that joins again, with another token, stays what it is.
    edgecore::join::join(folder.path(), &hub.url(), &hub.token("edge-g"), "edge-g").await.unwrap();
    assert_eq!(nodes.get("edge-g").await.unwrap().labels()[GATEWAY_NODE_LABEL], "true");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_that_use_one_token_at_once_one_gets_in() {
    let hub = Hub::start().await;
    let token = hub.token("edge-1");
    let attempts = (0..8).map(|_| async {
        let folder = tempfile::tempdir().unwrap();
        edgecore::join::join(folder.path(), &hub.url(), &token, "edge-1").await.is_ok()
    });
    let joined = futures::future::join_all(attempts).await;
    assert_eq!(joined.iter().filter(|ok| **ok).count(), 1);
}

async fn connect(hub: &Hub, edge: &Edge) -> Connection<tokio_rustls::client::TlsStream<TcpStream>> {
    let read = |name: &str| std::fs::read(edge.folder.path().join("pki").join(name)).unwrap();
    let pair = (read("node.crt"), read("node.key"));
    let tls = tls::client_config(&read("ca.crt"), Some(KeyPair { certificate: &pair.0, key: &pair.1 })).unwrap();
    transport::connect(&hub.link.ip().to_string(), hub.link.port(), tls).await.unwrap()
}

async fn send<S>(connection: &mut Connection<S>, frame: HubFrame)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    while !matches!(connection.next(true).await.unwrap(), Event::Writable) {}
    connection.send(&ToHub::from(frame)).unwrap();
}

async fn receive<S>(connection: &mut Connection<S>) -> Result<EdgeFrame, Fault>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let receive = async {
        loop {
            if let Event::Frame(bytes) = connection.next(false).await?
                && let Some(frame) = frames::decode::<ToEdge>(bytes)?.frame
            {
                return Ok(frame);
            }
        }
    };
    timeout(DEADLINE, receive).await.unwrap()
}

fn hello(node: &str) -> HubFrame {
    HubFrame::Hello(Hello { node: node.to_owned(), min_version: 1, max_version: 9, software: "test".to_owned() })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_is_who_its_certificate_says_and_writes_only_what_is_its_own() {
    let hub = Hub::start().await;
    let mut edge = Edge::join(&hub, "edge-1").await;
    edge.wait_live().await;
    edge.stop().await;

    let mut liar = connect(&hub, &edge).await;
    send(&mut liar, hello("edge-2")).await;
    let EdgeFrame::Refuse(refuse) = receive(&mut liar).await.unwrap() else { panic!("not refused") };
    assert_eq!(refuse.code, RefuseCode::Identity as i32);

    let mut node = connect(&hub, &edge).await;
    send(&mut node, hello("edge-1")).await;
    let EdgeFrame::Welcome(welcome) = receive(&mut node).await.unwrap() else { panic!("not welcome") };
    assert_eq!(welcome.version, 1);
    let write = |seq: u64, group: &str, plural: &str, namespace: &str, name: &str, verb: WriteVerb| Write {
        seq,
        verb: verb as i32,
        key: Some(ObjectRef {
            group: group.to_owned(),
            version: "v1".to_owned(),
            plural: plural.to_owned(),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        }),
        uid: "u".to_owned(),
        body: Bytes::from(json!({"metadata": {"name": name}}).to_string()),
    };
    let writes = vec![
        write(1, "", "nodes", "", "edge-2", WriteVerb::Create),
        write(2, "coordination.k8s.io", "leases", NODE_LEASE_NAMESPACE, "edge-2", WriteVerb::Update),
        write(3, "", "secrets", "default", "edge-1", WriteVerb::Create),
        write(4, "", "nodes", "", "edge-1", WriteVerb::Delete),
        write(5, "", "pods", "default", "other", WriteVerb::UpdateStatus),
        // A gateway's label is taken out of the node's own word about itself.
        Write {
            body: Bytes::from(
                json!({"metadata": {"name": "edge-1", "labels": {GATEWAY_NODE_LABEL: "true", "zone": "a"}}})
                    .to_string(),
            ),
            ..write(6, "", "nodes", "", "edge-1", WriteVerb::Update)
        },
    ];
    let count = writes.len();
    send(&mut node, HubFrame::Writes(Writes { writes })).await;
    let mut results = Vec::new();
    while results.len() < count {
        if let EdgeFrame::WriteResults(some) = receive(&mut node).await.unwrap() {
            results.extend(some.results);
        }
    }
    results.sort_by_key(|result| result.seq);
    let reasons: Vec<_> = results.iter().map(|result| result.reason.as_str()).collect();
    assert_eq!(reasons, ["Forbidden", "Forbidden", "Forbidden", "Forbidden", "NotFound", ""]);
    let itself = Api::<Node>::all(hub.client().await).get("edge-1").await.unwrap();
    assert_eq!(itself.labels()["zone"], "a");
    assert!(!itself.labels().contains_key(GATEWAY_NODE_LABEL));

    // A newer connection of the node ends the older one.
    let mut newer = connect(&hub, &edge).await;
    send(&mut newer, hello("edge-1")).await;
    let EdgeFrame::Welcome(second) = receive(&mut newer).await.unwrap() else { panic!("not welcome") };
    assert!(second.epoch > welcome.epoch);
    let ended = loop {
        match receive(&mut node).await {
            Ok(EdgeFrame::Refuse(refuse)) => break refuse.code,
            Ok(_) => {}
            Err(fault) => panic!("ended without a word: {fault}"),
        }
    };
    assert_eq!(ended, RefuseCode::Replaced as i32);
    send(&mut newer, HubFrame::Heartbeat(Heartbeat {})).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_nodes_port_survives_garbage_and_says_what_is_wrong() {
    let hub = Hub::start().await;
    let edge = Edge::join(&hub, "edge-1").await;
    edge.wait_live().await;

    for size in [1, 300, 70_000] {
        let mut stream = TcpStream::connect(hub.link).await.unwrap();
        let garbage: Vec<u8> = (0..size).map(|_| rand::random()).collect();
        // The hub may close before all is sent.
        let _ = stream.write_all(&garbage).await;
        let _ = stream.shutdown().await;
        let mut rest = Vec::new();
        let _ = timeout(DEADLINE, stream.read_to_end(&mut rest)).await.expect("the hub closes the connection");
    }

    let ca = std::fs::read(edge.folder.path().join("pki/ca.crt")).unwrap();
    let http = async |request: String| {
        let stream = transport::dial(&hub.link.ip().to_string(), hub.link.port()).await.unwrap();
        let tls = tls::client_config(&ca, None).unwrap();
        let mut stream = transport::secure(stream, &hub.link.ip().to_string(), tls).await.unwrap();
        let _ = stream.write_all(request.as_bytes()).await;
        let mut answer = vec![0; 16 << 10];
        let length = timeout(DEADLINE, stream.read(&mut answer)).await.unwrap().unwrap_or(0);
        String::from_utf8_lossy(&answer[..length]).into_owned()
    };
    let body = "x".repeat(100_000);
    let large = format!("POST /v1/join HTTP/1.1\r\nHost: h\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    assert!(http(large).await.starts_with("HTTP/1.1 413"));
    let malformed = http("POST /v1/join HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n{}".to_owned()).await;
    assert!(malformed.starts_with("HTTP/1.1 400") && malformed.contains("token"), "{malformed}");
    let anonymous = http("GET /v1/link HTTP/1.1\r\nHost: h\r\n\r\n".to_owned()).await;
    assert!(anonymous.starts_with("HTTP/1.1 401") && anonymous.contains("certificate"), "{anonymous}");
    assert!(http("GET /etc/passwd HTTP/1.1\r\nHost: h\r\n\r\n".to_owned()).await.starts_with("HTTP/1.1 404"));

    let mut node = connect(&hub, &edge).await;
    send(&mut node, HubFrame::Heartbeat(Heartbeat {})).await;
    send(&mut node, hello("edge-1")).await;
    send(&mut node, hello("edge-1")).await;
    let code = loop {
        if let EdgeFrame::Refuse(refuse) = receive(&mut node).await.unwrap() {
            break refuse.code;
        }
    };
    assert_eq!(code, RefuseCode::Protocol as i32);
    // The node's own edgecore was replaced by that connection, and comes back by itself.
    eventually("the node is back", || async {
        let state = edge.bound().link.describe();
        if state["state"] == "live" { Ok(()) } else { Err(state.to_string()) }
    })
    .await;
}
