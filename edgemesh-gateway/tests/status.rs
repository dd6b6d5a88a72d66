//! Several gateways, which all serve the same Gateways and write the status of each, against the real API.
#![allow(clippy::unwrap_used, reason = "a test ends where something fails")]

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use edgemesh_api::{MeshNode, MeshNodeSpec, MeshPeer, names::GATEWAY_NODE_LABEL};
use edgemesh_apiserver::{
    Identity, Mode, Store, StoreOptions,
    auth::{Authenticator, Authorizer},
    server::{Server, ServerOptions},
};
use edgemesh_gateway::{app, config::Config};
use futures::{StreamExt as _, TryStreamExt as _};
use gateway_api::apis::standard::{
    gatewayclasses::GatewayClass, gateways::Gateway, httproutes::HttpRoute, referencegrants::ReferenceGrant,
};
use k8s_openapi::{
    api::core::v1::Node, apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api, Client, CustomResourceExt as _,
    api::{DeleteParams, Patch, PatchParams, PostParams, WatchEvent, WatchParams},
};
use serde_json::json;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

const DEADLINE: Duration = Duration::from_secs(30);

/// The Kubernetes API, without credentials, with the definitions of the mesh.
async fn cluster(folder: &TempDir) -> (String, Client) {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let path = folder.path().join("state.db");
    let store = Store::open(&path, Mode::Authoritative, StoreOptions::default()).await.unwrap();
    let options = ServerOptions {
        authenticator: Authenticator::everyone_is(Identity::new("admin", ["system:masters"])),
        authorizer: Authorizer::Cluster,
        ..ServerOptions::default()
    };
    let server = Server::bind("127.0.0.1:0".parse().unwrap(), None, store, options).await.unwrap();
    let url = format!("http://{}", server.address);
    tokio::spawn(server.serve(CancellationToken::new()));
    let client = edgemesh_discovery::api_client(None, Some(&url)).await.unwrap();
    let definitions: Api<CustomResourceDefinition> = Api::all(client.clone());
    for definition in [MeshNode::crd(), GatewayClass::crd(), Gateway::crd(), HttpRoute::crd(), ReferenceGrant::crd()] {
        definitions.create(&PostParams::default(), &definition).await.unwrap();
    }
    (url, client)
}

fn from<K: serde::de::DeserializeOwned>(value: serde_json::Value) -> K {
    serde_json::from_value(value).unwrap()
}

/// A Node that is to run a gateway. It has run one if it has a `peer`.
async fn node(client: &Client, name: &str, address: &str, peer: bool) {
    let nodes: Api<Node> = Api::all(client.clone());
    let labels = json!({GATEWAY_NODE_LABEL: "true"});
    nodes.create(&PostParams::default(), &from(json!({"metadata": {"name": name, "labels": labels}}))).await.unwrap();
    let status = json!({"status": {"addresses": [{"type": "InternalIP", "address": address}]}});
    nodes.patch_status(name, &PatchParams::default(), &Patch::Merge(&status)).await.unwrap();
    if peer {
        let peer = MeshPeer { peer_id: name.to_owned(), addresses: Vec::new(), relay: false };
        let spec = MeshNodeSpec { peers: [("gateway".to_owned(), peer)].into() };
        let mesh_nodes: Api<MeshNode> = Api::all(client.clone());
        mesh_nodes.create(&PostParams::default(), &MeshNode::new(name, spec)).await.unwrap();
    }
}

/// Waits until the Gateway's status has these addresses, and gives its resourceVersion then.
async fn until(gateways: &Api<Gateway>, wanted: &[&str]) -> String {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let gateway = gateways.get("public").await.unwrap();
        let status = gateway.status.unwrap_or_default();
        let addresses: Vec<_> = status.addresses.into_iter().flatten().map(|address| address.value).collect();
        if addresses == wanted {
            return gateway.metadata.resource_version.unwrap();
        }
        assert!(Instant::now() < deadline, "{wanted:?}: not within {DEADLINE:?}: {addresses:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn all_gateways_write_the_addresses_of_all_and_none_undoes_what_another_wrote() {
    let folder = tempfile::tempdir().unwrap();
    let (url, client) = cluster(&folder).await;
    for (name, address, peer) in [
        ("gw-a", "192.0.2.10", false),
        ("gw-b", "192.0.2.9", false),
        ("gw-c", "192.0.2.7", true),
        ("gw-d", "192.0.2.8", true),
        ("gw-e", "192.0.2.11", true),
        ("new", "192.0.2.12", false),
    ] {
        node(&client, name, address, peer).await;
    }
    let class = json!({"metadata": {"name": "mesh"}, "spec": {"controllerName": "edgemesh.dev/gateway-controller"}});
    Api::<GatewayClass>::all(client.clone()).create(&PostParams::default(), &from(class)).await.unwrap();
    let port = SocketAddr::from(([127, 0, 0, 1], 0));
    let port = std::net::TcpListener::bind(port).unwrap().local_addr().unwrap().port();
    let gateways: Api<Gateway> = Api::default_namespaced(client.clone());
    let listener = json!({"name": "http", "port": port, "protocol": "HTTP"});
    let gateway =
        json!({"metadata": {"name": "public"}, "spec": {"gatewayClassName": "mesh", "listeners": [listener]}});
    gateways.create(&PostParams::default(), &from(gateway)).await.unwrap();

    let mut running = Vec::new();
    for (name, listen) in [("gw-a", [127, 0, 0, 1]), ("gw-b", [127, 0, 0, 2])] {
        let mut config = Config {
            data_dir: folder.path().join(name),
            node_name: name.to_owned(),
            api_server: Some(url.clone()),
            listen: listen.into(),
            ..Config::default()
        };
        config.admin.listen = SocketAddr::from(([127, 0, 0, 1], 0));
        config.tunnel.port = 0;
        running.push(app::build(config).await.unwrap());
    }
    until(&gateways, &["192.0.2.7", "192.0.2.8", "192.0.2.9", "192.0.2.10", "192.0.2.11"]).await;

    // Each change is written once, or by both in the same moment; else one would undo what the other wrote, again and again.
    let nodes: Api<Node> = Api::all(client.clone());
    let unlabelled = json!({"metadata": {"labels": {GATEWAY_NODE_LABEL: null}}});
    nodes.patch("gw-d", &PatchParams::default(), &Patch::Merge(&unlabelled)).await.unwrap();
    let begin = until(&gateways, &["192.0.2.7", "192.0.2.9", "192.0.2.10", "192.0.2.11"]).await;
    let mut events = gateways.watch(&WatchParams::default(), &begin).await.unwrap().boxed();
    nodes.delete("gw-c", &DeleteParams::default()).await.unwrap();
    until(&gateways, &["192.0.2.9", "192.0.2.10", "192.0.2.11"]).await;
    node(&client, "gw-f", "192.0.2.20", true).await;
    let end = until(&gateways, &["192.0.2.9", "192.0.2.10", "192.0.2.11", "192.0.2.20"]).await;
    let mut count = 0;
    loop {
        let event = tokio::time::timeout(DEADLINE, events.try_next()).await.unwrap().unwrap().unwrap();
        let WatchEvent::Modified(gateway) = event else { panic!("{event:?}") };
        count += 1;
        if gateway.metadata.resource_version.as_deref() == Some(&*end) {
            break;
        }
    }
    assert!(count <= 4, "{count} changes of the status for two changes of the nodes");
    drop(running);
}
