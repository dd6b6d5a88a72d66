//! kube-rs against a whole server: typed and dynamic clients, reflectors, metadata watches.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::{collections::BTreeMap, pin::pin, time::Duration};

use common::TestServer;
use edgemesh_api::MeshNode;
use futures::TryStreamExt;
use k8s_openapi::api::core::v1::{ConfigMap, Service};
use kube::{
    Api, Client, CustomResourceExt, ResourceExt,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
    core::PartialObjectMeta,
    runtime::{WatchStreamExt, watcher},
};
use serde_json::json;

async fn client(server: &TestServer) -> Client {
    let kubeconfig = Kubeconfig::read_from(&server.kubeconfig).unwrap();
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.unwrap();
    Client::try_from(config).unwrap()
}

fn config_map(name: &str) -> ConfigMap {
    let data = BTreeMap::from([("k".to_owned(), "1".to_owned())]);
    let metadata = kube::api::ObjectMeta { name: Some(name.to_owned()), ..Default::default() };
    ConfigMap { metadata, data: Some(data), ..Default::default() }
}

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), future).await.unwrap_or_else(|_| panic!("{what} took too long"))
}

#[tokio::test]
async fn objects_are_created_read_patched_listed_and_deleted() {
    let server = TestServer::start().await;
    let api: Api<ConfigMap> = Api::default_namespaced(client(&server).await);
    let made = api.create(&PostParams::default(), &config_map("a")).await.unwrap();
    assert!(made.uid().is_some() && made.creation_timestamp().is_some());
    let patch = json!({"data": {"k": "2"}});
    let patched = api.patch("a", &PatchParams::default(), &Patch::Merge(&patch)).await.unwrap();
    assert_eq!(patched.data.unwrap()["k"], "2");
    let stale = api.replace("a", &PostParams::default(), &made).await.unwrap_err();
    assert!(matches!(&stale, kube::Error::Api(e) if e.code == 409 && e.reason == "Conflict"), "{stale}");
    let apply = api.patch("a", &PatchParams::apply("me"), &Patch::Apply(&made)).await.unwrap_err();
    assert!(matches!(&apply, kube::Error::Api(e) if e.code == 415), "{apply}");
    for n in 0..7 {
        api.create(&PostParams::default(), &config_map(&format!("p{n}"))).await.unwrap();
    }
    let mut seen = 0;
    let mut params = ListParams::default().limit(3);
    loop {
        let page = api.list(&params).await.unwrap();
        seen += page.items.len();
        match page.metadata.continue_.filter(|c| !c.is_empty()) {
            Some(token) => params = params.continue_token(&token),
            None => break,
        }
    }
    assert_eq!(seen, 8);
    let by_name = ListParams::default().fields("metadata.name=p3");
    assert_eq!(api.list(&by_name).await.unwrap().items.len(), 1);
    api.delete("a", &DeleteParams::default()).await.unwrap();
    assert!(api.get_opt("a").await.unwrap().is_none());
    api.delete_collection(&DeleteParams::default(), &ListParams::default()).await.unwrap();
    assert!(api.list(&ListParams::default()).await.unwrap().items.is_empty());
    server.stop().await;
}

#[tokio::test]
async fn watchers_see_every_change_by_list_and_by_streaming_list_and_metadata_only() {
    let server = TestServer::start().await;
    let client = client(&server).await;
    let api: Api<ConfigMap> = Api::default_namespaced(client.clone());
    api.create(&PostParams::default(), &config_map("before")).await.unwrap();
    let by_list = watcher::Config::default();
    let streaming = watcher::Config::default().streaming_lists();
    let mut listed = pin!(watcher(api.clone(), by_list.clone()).applied_objects().map_ok(|o| o.name_any()));
    let mut streamed = pin!(watcher(api.clone(), streaming).applied_objects().map_ok(|o| o.name_any()));
    let only_metadata: Api<PartialObjectMeta<ConfigMap>> = Api::default_namespaced(client);
    let mut metadata = pin!(watcher(only_metadata, by_list).applied_objects().map_ok(|o| o.name_any()));
    for name in ["before", "after-1", "after-2"] {
        if name != "before" {
            api.create(&PostParams::default(), &config_map(name)).await.unwrap();
        }
        assert_eq!(within("list and watch", listed.try_next()).await.unwrap().unwrap(), name);
        assert_eq!(within("streaming list", streamed.try_next()).await.unwrap().unwrap(), name);
        assert_eq!(within("metadata", metadata.try_next()).await.unwrap().unwrap(), name);
    }
    server.stop().await;
}

#[tokio::test]
async fn the_mesh_s_own_kind_works_once_its_definition_is_there() {
    let server = TestServer::start().await;
    let client = client(&server).await;
    let definitions = Api::all(client.clone());
    definitions.create(&PostParams::default(), &MeshNode::crd()).await.unwrap();
    let api: Api<MeshNode> = Api::all(client);
    let made = api.create(&PostParams::default(), &MeshNode::new("edge-1", Default::default())).await.unwrap();
    let mut changed = made.clone();
    changed.spec.peers.insert("agent".to_owned(), Default::default());
    let changed = api.replace("edge-1", &PostParams::default(), &changed).await.unwrap();
    assert_eq!(changed.metadata.generation, Some(2));
    server.stop().await;
}

#[tokio::test]
async fn nodes_touch_only_what_is_theirs() {
    let server = TestServer::start().await;
    let config = server.kubeconfig_of("system:node:edge-1", &["system:nodes"]);
    let kubeconfig = Kubeconfig::from_yaml(&config.to_yaml()).unwrap();
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.unwrap();
    let node = Client::try_from(config).unwrap();
    let admin = client(&server).await;
    let pod = |name: &str, on: &str, secret: &str| {
        serde_json::from_value(json!({"metadata": {"name": name}, "spec": {"nodeName": on,
            "containers": [{"name": "c", "image": "i", "envFrom": [{"secretRef": {"name": secret}}]}]}}))
        .unwrap()
    };
    let pods: Api<k8s_openapi::api::core::v1::Pod> = Api::default_namespaced(admin.clone());
    pods.create(&PostParams::default(), &pod("mine", "edge-1", "mine")).await.unwrap();
    pods.create(&PostParams::default(), &pod("theirs", "edge-2", "theirs")).await.unwrap();
    let secrets: Api<k8s_openapi::api::core::v1::Secret> = Api::default_namespaced(admin.clone());
    for name in ["mine", "theirs"] {
        let secret = serde_json::from_value(json!({"metadata": {"name": name}, "stringData": {"a": "b"}})).unwrap();
        secrets.create(&PostParams::default(), &secret).await.unwrap();
    }
    let own_pods: Api<k8s_openapi::api::core::v1::Pod> = Api::default_namespaced(node.clone());
    let own_secrets: Api<k8s_openapi::api::core::v1::Secret> = Api::default_namespaced(node.clone());
    assert!(Api::<Service>::all(node.clone()).list(&ListParams::default()).await.is_ok());
    assert!(own_pods.get("mine").await.is_ok());
    assert!(own_secrets.get("mine").await.is_ok());
    assert!(own_pods.list(&ListParams::default().fields("spec.nodeName=edge-1")).await.is_ok());
    let status = json!({"status": {"phase": "Running"}});
    assert!(own_pods.patch_status("mine", &PatchParams::default(), &Patch::Merge(&status)).await.is_ok());
    let refused = |result: Result<(), kube::Error>, words: &str| match result {
        Err(kube::Error::Api(error)) => {
            assert_eq!(error.code, 403);
            assert!(error.message.contains(words), "{}", error.message);
        }
        other => panic!("should be refused: {other:?}"),
    };
    refused(
        own_secrets.get("theirs").await.map(drop),
        "secrets \"theirs\" is forbidden: User \"system:node:edge-1\" cannot get resource \"secrets\" in API group \"\" in the namespace \"default\"",
    );
    refused(own_secrets.list(&ListParams::default()).await.map(drop), "cannot list");
    refused(own_pods.get("theirs").await.map(drop), "cannot get");
    refused(own_pods.list(&ListParams::default()).await.map(drop), "cannot list");
    refused(
        own_pods.patch_status("theirs", &PatchParams::default(), &Patch::Merge(&status)).await.map(drop),
        "pods/status",
    );
    refused(own_pods.patch("mine", &PatchParams::default(), &Patch::Merge(&status)).await.map(drop), "cannot patch");
    let nodes: Api<k8s_openapi::api::core::v1::Node> = Api::all(node.clone());
    let named = |name: &str| serde_json::from_value(json!({"metadata": {"name": name}})).unwrap();
    assert!(nodes.create(&PostParams::default(), &named("edge-1")).await.is_ok());
    refused(nodes.create(&PostParams::default(), &named("edge-2")).await.map(drop), "cannot create");
    refused(nodes.delete("edge-1", &DeleteParams::default()).await.map(drop), "cannot delete");
    let labelled = |value| Patch::Merge(json!({"metadata": {"labels": {"edgemesh.dev/gateway": value}}}));
    let to_itself = nodes.patch("edge-1", &PatchParams::default(), &labelled(json!("true"))).await;
    refused(to_itself.map(drop), "can't set or remove its own label edgemesh.dev/gateway");
    let all_nodes: Api<k8s_openapi::api::core::v1::Node> = Api::all(admin);
    all_nodes.patch("edge-1", &PatchParams::default(), &labelled(json!("true"))).await.unwrap();
    refused(
        nodes.patch("edge-1", &PatchParams::default(), &labelled(json!(null))).await.map(drop),
        "can't set or remove its own label",
    );
    let zone = Patch::Merge(json!({"metadata": {"labels": {"zone": "a"}}}));
    nodes.patch("edge-1", &PatchParams::default(), &zone).await.unwrap();
    server.stop().await;
}
