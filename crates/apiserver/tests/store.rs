//! The store by itself: semantics of writes, lists, watches, deletes and the replica.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{sync::Arc, time::Duration};

use edgemesh_api::{ObjectKey, ResourceName};
use edgemesh_apiserver::{
    ApiError, DeleteOptions, EventKind, ListOptions, Mode, OutboxEntry, Part, Propagation, Reason, ReplicaChange,
    RequestContext, ServiceRanges, Store, StoreOptions, WatchEvent, WatchOptions, WatchStream, WriteOp,
};
use futures::StreamExt;
use serde_json::{Value, json};

fn system() -> RequestContext {
    RequestContext::system()
}

fn core(plural: &str) -> ResourceName {
    ResourceName::new("", "v1", plural)
}

fn config_map(name: &str, value: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "labels": {"v": value}}, "data": {"k": value}})
}

fn pod(name: &str, node: &str) -> Value {
    let mut pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "default"},
        "spec": {"containers": [{"name": "c", "image": "i"}]}});
    if !node.is_empty() {
        pod["spec"]["nodeName"] = json!(node);
    }
    pod
}

fn key(plural: &str, name: &str) -> ObjectKey {
    ObjectKey::new(core(plural), "default", name)
}

async fn open(folder: &tempfile::TempDir) -> Store {
    open_with(folder, &["10.96.0.0/16"]).await
}

async fn open_with(folder: &tempfile::TempDir, ranges: &[&str]) -> Store {
    let addresses = ranges.iter().map(|range| range.parse().unwrap()).collect();
    let services = Some(ServiceRanges { addresses, node_ports: 30000..=32767 });
    let options = StoreOptions { services, ..StoreOptions::default() };
    Store::open(&folder.path().join("state.db"), Mode::Authoritative, options).await.unwrap()
}

async fn replica(folder: &tempfile::TempDir) -> Store {
    let mode = Mode::Replica { node: "edge-1".to_owned() };
    Store::open(&folder.path().join("store.db"), mode, StoreOptions::small()).await.unwrap()
}

async fn next(watch: &mut WatchStream) -> Result<WatchEvent, ApiError> {
    tokio::time::timeout(Duration::from_secs(10), watch.next())
        .await
        .expect("no event in 10 s")
        .expect("the watch ended")
}

async fn pending(store: &Store) -> Vec<OutboxEntry> {
    store.outbox_pending(0, 100).await.unwrap()
}

#[tokio::test]
async fn writes_survive_a_restart_and_versions_never_go_back() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let created = store.create(&core("configmaps"), "default", config_map("a", "1"), &system()).await.unwrap();
    store.create(&core("configmaps"), "default", config_map("b", "1"), &system()).await.unwrap();
    store.delete(&key("configmaps", "b"), DeleteOptions::default(), &system()).await.unwrap();
    let version = store.resource_version();
    drop(store);
    let store = open(&folder).await;
    assert_eq!(*store.get(&key("configmaps", "a")).await.unwrap(), *created);
    assert!(store.get(&key("configmaps", "b")).await.unwrap_err().is_not_found());
    assert_eq!(store.resource_version(), version);
}

#[tokio::test]
async fn a_stale_update_is_a_conflict_and_an_equal_one_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let first = store.create(&core("configmaps"), "default", config_map("a", "1"), &system()).await.unwrap();
    let same = store.update(&key("configmaps", "a"), (*first).clone(), &system()).await.unwrap();
    assert_eq!(first["metadata"]["resourceVersion"], same["metadata"]["resourceVersion"]);
    let mut second = (*first).clone();
    second["data"]["k"] = json!("2");
    let second = store.update(&key("configmaps", "a"), second, &system()).await.unwrap();
    assert_ne!(first["metadata"]["resourceVersion"], second["metadata"]["resourceVersion"]);
    let mut stale = (*first).clone();
    stale["data"]["k"] = json!("3");
    let error = store.update(&key("configmaps", "a"), stale, &system()).await.unwrap_err();
    assert_eq!(error.reason, Reason::Conflict);
    assert_eq!(
        error.message,
        "Operation cannot be fulfilled on configmaps \"a\": the object has been modified; please apply your changes to the latest version and try again"
    );
}

#[tokio::test]
async fn invalid_objects_name_every_wrong_field() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let service =
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"}, "spec": {"selector": {"a": "b"}}});
    let error = store.create(&core("services"), "default", service, &system()).await.unwrap_err();
    assert_eq!(error.code(), 422);
    let status = error.to_status();
    assert_eq!(status["details"]["causes"][0]["field"], "spec.ports");
    assert!(error.message.starts_with("Service \"web\" is invalid: spec.ports: Required value"), "{error}");
}

#[tokio::test]
async fn services_get_addresses_that_are_not_given_twice() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let mut seen = std::collections::HashSet::new();
    for n in 0..20 {
        let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": format!("s{n}")},
            "spec": {"type": "NodePort", "ports": [{"port": 80}]}});
        let made = store.create(&core("services"), "default", service, &system()).await.unwrap();
        assert!(seen.insert(made["spec"]["clusterIP"].as_str().unwrap().to_owned()));
        assert!(seen.insert(made["spec"]["ports"][0]["nodePort"].to_string()));
    }
    let wanted = seen.iter().find(|s| s.starts_with("10.")).unwrap();
    let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "again"},
        "spec": {"clusterIP": wanted, "ports": [{"port": 80}]}});
    let error = store.create(&core("services"), "default", service, &system()).await.unwrap_err();
    assert!(error.message.contains("provided IP is already allocated"), "{error}");
}

#[tokio::test]
async fn a_service_that_is_dual_stack_no_more_gives_its_second_address_back() {
    let folder = tempfile::tempdir().unwrap();
    let store = open_with(&folder, &["10.96.0.0/16", "fd00:10:96::/126"]).await;
    let dual = |name: &str| {
        let spec = json!({"ipFamilyPolicy": "RequireDualStack", "ports": [{"port": 80}]});
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec})
    };
    // The range has two addresses.
    for name in ["a", "b"] {
        let made = store.create(&core("services"), "default", dual(name), &system()).await.unwrap();
        assert_eq!(made["spec"]["clusterIPs"].as_array().unwrap().len(), 2, "{made}");
    }
    let error = store.create(&core("services"), "default", dual("c"), &system()).await.unwrap_err();
    assert!(error.message.contains("spec.clusterIPs[1]") && error.message.contains("range is full"), "{error}");
    let key = key("services", "a");
    let before = store.get(&key).await.unwrap();
    let to_single = |_: &_, now: &std::sync::Arc<Value>| {
        let mut service = (**now).clone();
        service["spec"]["ipFamilyPolicy"] = json!("SingleStack");
        Ok(service)
    };
    let single = store.modify(&key, Part::Main, &system(), to_single).await.unwrap().object;
    assert_eq!(single["spec"]["clusterIPs"], json!([before["spec"]["clusterIP"]]));
    assert_eq!(single["spec"]["ipFamilies"], json!(["IPv4"]));
    let third = store.create(&core("services"), "default", dual("c"), &system()).await.unwrap();
    assert_eq!(third["spec"]["clusterIPs"][1], before["spec"]["clusterIPs"][1]);
}

#[tokio::test]
async fn creating_needs_a_namespace_that_exists_and_stays() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let error = store.create(&core("configmaps"), "nowhere", config_map("a", "1"), &system()).await.unwrap_err();
    assert_eq!((error.code(), error.message.as_str()), (404, "namespaces \"nowhere\" not found"));
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "x"}});
    store.create(&core("namespaces"), "", namespace, &system()).await.unwrap();
    let x = ObjectKey::new(core("namespaces"), "", "x");
    let outcome = store.delete(&x, DeleteOptions::default(), &system()).await.unwrap();
    assert!(!outcome.removed);
    assert_eq!(outcome.object["status"]["phase"], "Terminating");
    let error = store.create(&core("configmaps"), "x", config_map("a", "1"), &system()).await.unwrap_err();
    assert_eq!(error.code(), 403);
    assert_eq!(error.to_status()["details"]["causes"][0]["reason"], "NamespaceTerminating");
    store
        .modify(&x, Part::Finalize, &system(), |_, old| {
            let mut new = (**old).clone();
            new["spec"]["finalizers"] = json!([]);
            Ok(new)
        })
        .await
        .unwrap();
    assert!(store.get(&x).await.unwrap_err().is_not_found());
}

#[tokio::test]
async fn a_watch_resumes_without_gaps_and_says_when_it_cannot() {
    let folder = tempfile::tempdir().unwrap();
    let options = StoreOptions { history: 8, ..StoreOptions::default() };
    let store = Store::open(&folder.path().join("s.db"), Mode::Authoritative, options).await.unwrap();
    let first = store.create(&core("configmaps"), "default", config_map("a", "1"), &system()).await.unwrap();
    let since: u64 = first["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap();
    for n in 0..5 {
        let object = config_map("a", &format!("x{n}"));
        store.update(&key("configmaps", "a"), object, &system()).await.unwrap();
    }
    let from = WatchOptions { since: Some(since), ..WatchOptions::default() };
    let mut watch = store.watch(&core("configmaps"), &from).unwrap();
    for n in 0..5 {
        let event = next(&mut watch).await.unwrap();
        assert_eq!(
            (event.kind, event.object["data"]["k"].as_str()),
            (EventKind::Modified, Some(format!("x{n}").as_str()))
        );
    }
    store.delete(&key("configmaps", "a"), DeleteOptions::default(), &system()).await.unwrap();
    assert_eq!(next(&mut watch).await.unwrap().kind, EventKind::Deleted);
    // Nobody reads this one while more happens than is remembered.
    let mut slow = store
        .watch(&core("configmaps"), &WatchOptions { since: Some(store.resource_version()), ..from.clone() })
        .unwrap();
    for n in 0..20 {
        store.create(&core("configmaps"), "default", config_map(&format!("c{n}"), "1"), &system()).await.unwrap();
    }
    assert!(next(&mut slow).await.unwrap_err().is_expired());
    assert!(slow.next().await.is_none());
    assert!(store.watch(&core("configmaps"), &from).err().unwrap().is_expired());
    let future = WatchOptions { since: Some(u64::MAX / 4), ..WatchOptions::default() };
    assert!(store.watch(&core("configmaps"), &future).err().unwrap().is_expired());
}

#[tokio::test]
async fn a_selecting_watch_sees_objects_come_and_go() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let options = WatchOptions { label_selector: Some("v=1".to_owned()), bookmarks: true, ..WatchOptions::default() };
    let mut watch = store.watch(&core("configmaps"), &options).unwrap();
    assert_eq!(next(&mut watch).await.unwrap().kind, EventKind::Bookmark);
    store.create(&core("configmaps"), "default", config_map("a", "0"), &system()).await.unwrap();
    store.update(&key("configmaps", "a"), config_map("a", "1"), &system()).await.unwrap();
    store.update(&key("configmaps", "a"), config_map("a", "2"), &system()).await.unwrap();
    assert_eq!(next(&mut watch).await.unwrap().kind, EventKind::Added);
    let gone = next(&mut watch).await.unwrap();
    assert_eq!((gone.kind, gone.object["data"]["k"].as_str()), (EventKind::Deleted, Some("1")));
    assert_eq!(gone.object["metadata"]["resourceVersion"], store.resource_version().to_string());
}

#[tokio::test]
async fn a_quiet_watch_says_how_far_it_is_once_a_minute() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let version = store.resource_version();
    store.create(&core("configmaps"), "default", config_map("a", "1"), &system()).await.unwrap();
    let options = WatchOptions { since: Some(version), bookmarks: true, ..WatchOptions::default() };
    let mut watch = store.watch(&core("secrets"), &options).unwrap();
    tokio::time::pause();
    let begin = tokio::time::Instant::now();
    let event = watch.next().await.unwrap().unwrap();
    assert_eq!(event.kind, EventKind::Bookmark);
    assert_eq!(event.object["metadata"]["resourceVersion"], store.resource_version().to_string());
    assert!(begin.elapsed() >= Duration::from_secs(59), "{:?}", begin.elapsed());
}

#[tokio::test]
async fn pages_of_a_list_show_one_state() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    for n in 0..10 {
        store.create(&core("configmaps"), "default", config_map(&format!("c{n}"), "1"), &system()).await.unwrap();
    }
    let mut options = ListOptions { limit: Some(4), ..ListOptions::namespace("default") };
    let first = store.list(&core("configmaps"), &options).await.unwrap();
    assert_eq!((first.items.len(), first.remaining), (4, Some(6)));
    store.delete(&key("configmaps", "c5"), DeleteOptions::default(), &system()).await.unwrap();
    store.update(&key("configmaps", "c6"), config_map("c6", "2"), &system()).await.unwrap();
    store.create(&core("configmaps"), "default", config_map("c55", "1"), &system()).await.unwrap();
    let mut names = Vec::new();
    options.continue_token = first.continue_token;
    while options.continue_token.is_some() {
        let page = store.list(&core("configmaps"), &options).await.unwrap();
        assert_eq!(page.resource_version, first.resource_version);
        names.extend(
            page.items
                .iter()
                .map(|o| format!("{}={}", o["metadata"]["name"].as_str().unwrap(), o["data"]["k"].as_str().unwrap())),
        );
        options.continue_token = page.continue_token;
    }
    assert_eq!(names, ["c4=1", "c5=1", "c6=1", "c7=1", "c8=1", "c9=1"]);
    let bad = ListOptions { continue_token: Some("garbage".to_owned()), ..ListOptions::default() };
    assert_eq!(store.list(&core("configmaps"), &bad).await.unwrap_err().code(), 400);
}

#[tokio::test]
async fn pods_end_gracefully_when_they_run_somewhere_and_at_once_when_not() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    store.create(&core("pods"), "default", pod("idle", ""), &system()).await.unwrap();
    assert!(store.delete(&key("pods", "idle"), DeleteOptions::default(), &system()).await.unwrap().removed);
    store.create(&core("pods"), "default", pod("busy", ""), &system()).await.unwrap();
    store.bind(&key("pods", "busy"), "node-1", None, &system()).await.unwrap();
    assert!(store.bind(&key("pods", "busy"), "node-2", None, &system()).await.unwrap_err().is_conflict());
    let outcome = store.delete(&key("pods", "busy"), DeleteOptions::default(), &system()).await.unwrap();
    assert!(!outcome.removed);
    assert_eq!(outcome.object["metadata"]["deletionGracePeriodSeconds"], 30);
    let shorter = DeleteOptions { grace_period_seconds: Some(5), ..DeleteOptions::default() };
    let outcome = store.delete(&key("pods", "busy"), shorter, &system()).await.unwrap();
    assert_eq!(outcome.object["metadata"]["deletionGracePeriodSeconds"], 5);
    let wrong =
        DeleteOptions { grace_period_seconds: Some(0), uid: Some("other".to_owned()), ..DeleteOptions::default() };
    assert!(store.delete(&key("pods", "busy"), wrong, &system()).await.unwrap_err().is_conflict());
    let now = DeleteOptions { grace_period_seconds: Some(0), ..DeleteOptions::default() };
    assert!(store.delete(&key("pods", "busy"), now, &system()).await.unwrap().removed);
}

#[tokio::test]
async fn finalizers_keep_an_object_until_they_are_gone() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    store.create(&core("configmaps"), "default", config_map("a", "1"), &system()).await.unwrap();
    let foreground = DeleteOptions { propagation: Some(Propagation::Foreground), ..DeleteOptions::default() };
    let outcome = store.delete(&key("configmaps", "a"), foreground, &system()).await.unwrap();
    assert!(!outcome.removed);
    assert_eq!(outcome.object["metadata"]["finalizers"], json!(["foregroundDeletion"]));
    let mut without = (*outcome.object).clone();
    without["metadata"]["finalizers"] = json!([]);
    store.update(&key("configmaps", "a"), without, &system()).await.unwrap();
    assert!(store.get(&key("configmaps", "a")).await.unwrap_err().is_not_found());
}

#[tokio::test]
async fn a_definition_serves_its_kind_at_once_and_takes_its_objects_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let definition = json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": "widgets.example.com"},
        "spec": {"group": "example.com", "scope": "Namespaced",
            "names": {"plural": "widgets", "singular": "widget", "kind": "Widget", "listKind": "WidgetList"},
            "versions": [{"name": "v1", "served": true, "storage": true,
                "schema": {"openAPIV3Schema": {"type": "object", "properties": {"spec": {"type": "object", "properties": {"size": {"type": "integer"}}}}}}}]}});
    let definitions = ResourceName::new("apiextensions.k8s.io", "v1", "customresourcedefinitions");
    let widgets = ResourceName::new("example.com", "v1", "widgets");
    let widget =
        json!({"apiVersion": "example.com/v1", "kind": "Widget", "metadata": {"name": "w"}, "spec": {"size": 1}});
    assert_eq!(store.create(&widgets, "default", widget.clone(), &system()).await.unwrap_err().code(), 404);
    let made = store.create(&definitions, "", definition, &system()).await.unwrap();
    let established = made["status"]["conditions"]
        .as_array()
        .unwrap()
        .iter()
        .any(|c| c["type"] == "Established" && c["status"] == "True");
    assert!(established, "{made}");
    store.create(&widgets, "default", widget.clone(), &system()).await.unwrap();
    drop(store);
    let store = open(&folder).await;
    assert_eq!(store.list(&widgets, &ListOptions::default()).await.unwrap().items.len(), 1);
    let of_definition = ObjectKey::new(definitions, "", "widgets.example.com");
    store.delete(&of_definition, DeleteOptions::default(), &system()).await.unwrap();
    assert_eq!(store.list(&widgets, &ListOptions::default()).await.unwrap_err().code(), 404);
}

#[tokio::test]
async fn a_dry_run_keeps_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let before = store.resource_version();
    let context = RequestContext { dry_run: true, ..system() };
    let made = store.create(&core("configmaps"), "default", config_map("a", "1"), &context).await.unwrap();
    assert!(made["metadata"]["uid"].is_string());
    assert!(store.get(&key("configmaps", "a")).await.unwrap_err().is_not_found());
    assert_eq!(store.resource_version(), before);
    let named = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"generateName": "gen-"}});
    let made = store.create(&core("configmaps"), "default", named, &system()).await.unwrap();
    assert_eq!(made["metadata"]["name"].as_str().unwrap().len(), "gen-".len() + 5);
}

#[tokio::test]
async fn writers_at_the_same_time_all_get_their_own_version() {
    let folder = tempfile::tempdir().unwrap();
    let store = Arc::new(open(&folder).await);
    let tasks: Vec<_> = (0..200)
        .map(|n| {
            let store = store.clone();
            tokio::spawn(async move {
                let made = store
                    .create(&core("configmaps"), "default", config_map(&format!("c{n}"), "1"), &system())
                    .await
                    .unwrap();
                made["metadata"]["resourceVersion"].as_str().unwrap().to_owned()
            })
        })
        .collect();
    let mut versions = std::collections::HashSet::new();
    for task in tasks {
        assert!(versions.insert(task.await.unwrap()));
    }
    assert_eq!(store.list(&core("configmaps"), &ListOptions::default()).await.unwrap().items.len(), 200);
}

fn upsert(plural: &str, version: &str, object: Value) -> ReplicaChange {
    let name = object["metadata"]["name"].as_str().unwrap().to_owned();
    let namespace = object["metadata"]["namespace"].as_str().unwrap_or_default().to_owned();
    ReplicaChange::Upsert {
        key: ObjectKey::new(core(plural), namespace, name),
        origin_version: version.to_owned(),
        object,
    }
}

fn cloud_pod(uid: &str) -> Value {
    let mut pod = pod("p", "edge-1");
    pod["metadata"]["uid"] = json!(uid);
    pod["status"] = json!({"phase": "Pending"});
    pod
}

#[tokio::test]
async fn a_replica_keeps_the_status_of_its_pods_and_sends_only_the_latest() {
    let folder = tempfile::tempdir().unwrap();
    let store = replica(&folder).await;
    store.apply_replica(vec![upsert("pods", "7", cloud_pod("u1"))]).await.unwrap();
    let outbox = store.outbox_watch();
    for phase in ["Pending", "Running"] {
        let mut new = (*store.get(&key("pods", "p")).await.unwrap()).clone();
        new["status"] = json!({"phase": phase, "podIP": "10.0.0.1"});
        store.update_status(&key("pods", "p"), new, &system()).await.unwrap();
    }
    assert!(outbox.has_changed().unwrap());
    let entries = pending(&store).await;
    assert_eq!(entries.len(), 1, "{entries:?}");
    assert_eq!(
        (entries[0].op, entries[0].object["status"]["phase"].as_str()),
        (WriteOp::UpdateStatus, Some("Running"))
    );
    // The cloud's newer copy must not turn the clock back, acknowledged or not.
    store.outbox_done(entries[0].seq).await.unwrap();
    let mut newer = cloud_pod("u1");
    newer["metadata"]["labels"] = json!({"new": "label"});
    store.apply_replica(vec![upsert("pods", "8", newer)]).await.unwrap();
    let now = store.get(&key("pods", "p")).await.unwrap();
    assert_eq!(
        (now["status"]["phase"].as_str(), now["metadata"]["labels"]["new"].as_str()),
        (Some("Running"), Some("label"))
    );
    let versions = store.replica_versions().await.unwrap();
    assert_eq!((versions.len(), versions[0].origin_version.as_str(), versions[0].uid.as_str()), (1, "8", "u1"));
    // Another pod of the same name starts from nothing.
    store.apply_replica(vec![upsert("pods", "9", cloud_pod("u2"))]).await.unwrap();
    assert_eq!(store.get(&key("pods", "p")).await.unwrap()["status"]["phase"], "Pending");
}

#[tokio::test]
async fn a_pod_that_ended_here_does_not_come_back_from_the_cloud() {
    let folder = tempfile::tempdir().unwrap();
    let store = replica(&folder).await;
    store.apply_replica(vec![upsert("pods", "7", cloud_pod("u1"))]).await.unwrap();
    let slow = store.delete(&key("pods", "p"), DeleteOptions::default(), &system()).await.unwrap_err();
    assert_eq!(slow.code(), 403);
    let end = DeleteOptions { grace_period_seconds: Some(0), ..DeleteOptions::default() };
    store.delete(&key("pods", "p"), end, &system()).await.unwrap();
    store.apply_replica(vec![upsert("pods", "8", cloud_pod("u1"))]).await.unwrap();
    assert!(store.get(&key("pods", "p")).await.unwrap_err().is_not_found());
    let entries = pending(&store).await;
    assert_eq!((entries.len(), entries[0].op, entries[0].uid.as_str()), (1, WriteOp::Delete, "u1"));
    assert_eq!(entries[0].object["gracePeriodSeconds"], 0);
    store.apply_replica(vec![upsert("pods", "9", cloud_pod("u2"))]).await.unwrap();
    assert!(store.get(&key("pods", "p")).await.is_ok());
}

#[tokio::test]
async fn a_replica_writes_only_what_is_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let store = replica(&folder).await;
    let error = store.create(&core("configmaps"), "default", config_map("a", "1"), &system()).await.unwrap_err();
    assert_eq!(error.code(), 403);
    assert!(error.message.contains("write to the cluster's API"), "{error}");
    let node = |name: &str| json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "status": {"addresses": []}});
    assert_eq!(store.create(&core("nodes"), "", node("edge-2"), &system()).await.unwrap_err().code(), 403);
    store.create(&core("nodes"), "", node("edge-1"), &system()).await.unwrap();
    let lease = |name: &str| json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": name}, "spec": {}});
    let leases = ResourceName::new("coordination.k8s.io", "v1", "leases");
    store.create(&leases, "kube-node-lease", lease("edge-1"), &system()).await.unwrap();
    assert_eq!(store.create(&leases, "kube-node-lease", lease("edge-2"), &system()).await.unwrap_err().code(), 403);
    assert_eq!(pending(&store).await.iter().map(|e| e.op).collect::<Vec<_>>(), [WriteOp::Create, WriteOp::Create]);
    // What the cloud makes of it comes back with the cloud's identity; the local status stays.
    let mut status = (*store.get(&ObjectKey::new(core("nodes"), "", "edge-1")).await.unwrap()).clone();
    status["status"]["conditions"] = json!([{"type": "Ready", "status": "True"}]);
    store.update_status(&ObjectKey::new(core("nodes"), "", "edge-1"), status, &system()).await.unwrap();
    let mut cloud = node("edge-1");
    cloud["metadata"]["uid"] = json!("cloud-uid");
    cloud["spec"] = json!({"podCIDR": "10.244.3.0/24"});
    store.apply_replica(vec![upsert("nodes", "3", cloud)]).await.unwrap();
    let now = store.get(&ObjectKey::new(core("nodes"), "", "edge-1")).await.unwrap();
    assert_eq!(now["metadata"]["uid"], "cloud-uid");
    assert_eq!(now["spec"]["podCIDR"], "10.244.3.0/24");
    assert_eq!(now["status"]["conditions"][0]["type"], "Ready");
}

#[tokio::test]
async fn a_replica_keeps_objects_under_the_names_that_the_cloud_uses() {
    let folder = tempfile::tempdir().unwrap();
    let store = replica(&folder).await;
    // As an item of a list: no kind, no version; and with what nobody needs on a node.
    let service = json!({"metadata": {"name": "web", "namespace": "default", "uid": "u", "managedFields": [{"manager": "x"}]},
        "spec": {"clusterIP": "10.96.0.9"}});
    // Its definition may come later, or never.
    let route = json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": {"name": "r", "namespace": "default", "uid": "v"}});
    let routes = ResourceName::new("gateway.networking.k8s.io", "v1", "httproutes");
    let of_route = ObjectKey::new(routes, "default", "r");
    let upsert_route = ReplicaChange::Upsert { key: of_route.clone(), origin_version: "2".to_owned(), object: route };
    store.apply_replica(vec![upsert("services", "1", service), upsert_route]).await.unwrap();
    let kept = store.get(&key("services", "web")).await.unwrap();
    assert_eq!((kept["apiVersion"].as_str(), kept["kind"].as_str()), (Some("v1"), Some("Service")));
    assert!(kept["metadata"]["managedFields"].is_null());
    let mut keys: Vec<_> = store.replica_versions().await.unwrap().into_iter().map(|v| v.key).collect();
    keys.sort();
    assert_eq!(keys, [key("services", "web"), of_route.clone()]);
    drop(store);
    let store = replica(&folder).await;
    assert!(store.replica_versions().await.unwrap().iter().any(|v| v.key == of_route));
}

#[tokio::test]
async fn the_outbox_survives_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let store = replica(&folder).await;
    store.apply_replica(vec![upsert("pods", "7", cloud_pod("u1"))]).await.unwrap();
    let mut new = (*store.get(&key("pods", "p")).await.unwrap()).clone();
    new["status"]["phase"] = json!("Running");
    store.update_status(&key("pods", "p"), new, &system()).await.unwrap();
    let before = pending(&store).await;
    drop(store);
    let store = replica(&folder).await;
    assert_eq!(pending(&store).await, before);
    assert_eq!(*store.outbox_watch().borrow(), before[0].seq);
    let changes = vec![ReplicaChange::Delete { key: key("pods", "p"), uid: Some("other".to_owned()) }];
    store.apply_replica(changes).await.unwrap();
    assert!(store.get(&key("pods", "p")).await.is_ok(), "another uid is another pod");
    store
        .apply_replica(vec![ReplicaChange::Delete { key: key("pods", "p"), uid: Some("u1".to_owned()) }])
        .await
        .unwrap();
    assert!(store.get(&key("pods", "p")).await.is_err());
    assert!(pending(&store).await.is_empty(), "the status of what is gone is of no use");
}
