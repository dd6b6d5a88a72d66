//! Nodes and cluster agree: at once, after the node was away, and after the hub was killed again and again.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use edgemesh_api::{ObjectKey, ResourceName};
use edgemesh_apiserver::{Identity, ListOptions, RequestContext, store::Part};
use k8s_openapi::api::{
    coordination::v1::Lease,
    core::v1::{ConfigMap, Node, Pod, Service},
};
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams},
    discovery::ApiResource,
};
use serde_json::{Value, json};

use crate::rig::{Edge, Hub, eventually, http_get};

fn from<K: serde::de::DeserializeOwned>(value: Value) -> K {
    serde_json::from_value(value).unwrap()
}

fn service(name: &str, port: u16) -> Service {
    from(json!({"metadata": {"name": name}, "spec": {"selector": {"app": name}, "ports": [{"port": port}]}}))
}

fn pod(name: &str, node: &str, config_map: &str) -> Pod {
    from(json!({
        "metadata": {"name": name},
        "spec": {
            "nodeName": node,
            "containers": [{"name": "c", "image": "edgemesh.dev/demo:1"}],
            "volumes": [{"name": "v", "configMap": {"name": config_map}}],
        },
    }))
}

/// What the cluster holds of a resource, by namespace and name: without the parts that are each side's own.
async fn objects(client: &Client, resource: &ResourceName, kind: &str) -> Result<BTreeMap<String, Value>, String> {
    let resource = ApiResource {
        group: resource.group.clone(),
        version: resource.version.clone(),
        api_version: resource.api_version(),
        kind: kind.to_owned(),
        plural: resource.plural.clone(),
    };
    let list = Api::<DynamicObject>::all_with(client.clone(), &resource).list(&ListParams::default()).await;
    let list = list.map_err(|error| error.to_string())?;
    Ok(list.items.into_iter().map(|object| comparable(serde_json::to_value(object).unwrap())).collect())
}

fn comparable(mut object: Value) -> (String, Value) {
    for field in ["resourceVersion", "managedFields"] {
        object["metadata"].as_object_mut().unwrap().remove(field);
    }
    for field in ["apiVersion", "kind"] {
        object.as_object_mut().unwrap().remove(field);
    }
    let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
    (format!("{}/{}", text("namespace"), text("name")), object)
}

/// The resources of which every node holds everything.
const SHARED: [(&str, &str, &str, &str); 5] = [
    ("", "v1", "services", "Service"),
    ("", "v1", "nodes", "Node"),
    ("", "v1", "namespaces", "Namespace"),
    ("discovery.k8s.io", "v1", "endpointslices", "EndpointSlice"),
    ("apiextensions.k8s.io", "v1", "customresourcedefinitions", "CustomResourceDefinition"),
];

/// Says where node and cluster differ, object by object.
async fn difference(cluster: &Client, edge: &Edge) -> Result<(), String> {
    for (group, version, plural, kind) in SHARED {
        let resource = ResourceName::new(group, version, plural);
        let wanted = objects(cluster, &resource, kind).await?;
        compare(plural, &wanted, &held(edge, &resource).await?)?;
    }
    let pods = objects(cluster, &ResourceName::new("", "v1", "pods"), "Pod").await?;
    let own: BTreeMap<_, _> = pods.into_iter().filter(|(_, pod)| pod["spec"]["nodeName"] == *edge.name).collect();
    compare("pods", &own, &held(edge, &ResourceName::new("", "v1", "pods")).await?)?;
    let named: Vec<String> = own
        .values()
        .flat_map(|pod| pod["spec"]["volumes"].as_array().into_iter().flatten())
        .filter_map(|volume| Some(format!("default/{}", volume["configMap"]["name"].as_str()?)))
        .collect();
    let maps = ResourceName::new("", "v1", "configmaps");
    let mut wanted = objects(cluster, &maps, "ConfigMap").await?;
    wanted.retain(|name, _| named.contains(name));
    compare("configmaps", &wanted, &held(edge, &maps).await?)
}

async fn held(edge: &Edge, resource: &ResourceName) -> Result<BTreeMap<String, Value>, String> {
    match edge.bound().store.list(resource, &ListOptions::default()).await {
        Ok(page) => Ok(page.items.iter().map(|object| comparable((**object).clone())).collect()),
        Err(error) => Err(error.to_string()),
    }
}

fn compare(what: &str, wanted: &BTreeMap<String, Value>, held: &BTreeMap<String, Value>) -> Result<(), String> {
    for (name, object) in wanted {
        match held.get(name) {
            None => return Err(format!("{what} {name} is missing")),
            Some(here) if here != object => return Err(format!("{what} {name} differs: {here} for {object}")),
            Some(_) => {}
        }
    }
    match held.keys().find(|name| !wanted.contains_key(*name)) {
        Some(name) => Err(format!("{what} {name} should not be there")),
        None => Ok(()),
    }
}

async fn agree(cluster: &Client, edge: &Edge) {
    eventually(&format!("{} agrees with the cluster", edge.name), || difference(cluster, edge)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_registers_itself_and_holds_what_concerns_it() {
    let hub = Hub::start().await;
    let edge = Edge::join(&hub, "edge-1").await;
    edge.wait_live().await;
    let client = hub.client().await;

    let node: Node = eventually("the node is registered with its pod range", || async {
        let node = Api::<Node>::all(client.clone()).get("edge-1").await.map_err(|error| error.to_string())?;
        let complete = node.spec.as_ref().is_some_and(|spec| spec.pod_cidr.is_some())
            && node.status.as_ref().is_some_and(|status| status.node_info.is_some());
        if complete { Ok(node) } else { Err(format!("{node:?}")) }
    })
    .await;
    assert_eq!(node.labels()["edgemesh.dev/network"], "lan");
    assert!(node.labels().contains_key("node-role.kubernetes.io/edge"));
    let ready = node.status.unwrap().conditions.unwrap().into_iter().find(|c| c.type_ == "Ready").unwrap();
    assert_eq!((ready.status.as_str(), ready.reason.as_deref()), ("False", Some("NoRuntime")));
    let leases: Api<Lease> = Api::namespaced(client.clone(), "kube-node-lease");
    eventually("the node renews its Lease", || async {
        let lease = leases.get("edge-1").await.map_err(|error| error.to_string())?;
        lease.spec.and_then(|spec| spec.renew_time).map(drop).ok_or("no renewTime".to_owned())
    })
    .await;

    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), "default");
    for name in ["needed", "unneeded"] {
        maps.create(&PostParams::default(), &from(json!({"metadata": {"name": name}, "data": {"k": "v"}})))
            .await
            .unwrap();
    }
    let services: Api<Service> = Api::namespaced(client.clone(), "default");
    services.create(&PostParams::default(), &service("web", 80)).await.unwrap();
    let pods: Api<Pod> = Api::namespaced(client.clone(), "default");
    pods.create(&PostParams::default(), &pod("mine", "edge-1", "needed")).await.unwrap();
    pods.create(&PostParams::default(), &pod("elsewhere", "edge-9", "unneeded")).await.unwrap();
    agree(&client, &edge).await;

    // The same through the node's own API.
    let local = edge.client();
    let seen = Api::<Service>::namespaced(local.clone(), "default").get("web").await.unwrap();
    let there = services.get("web").await.unwrap();
    assert_eq!(seen.spec, there.spec);
    assert!(Api::<ConfigMap>::namespaced(local.clone(), "default").get_opt("unneeded").await.unwrap().is_none());
    let refused =
        Api::<Service>::namespaced(local.clone(), "default").create(&PostParams::default(), &service("x", 1)).await;
    assert!(refused.unwrap_err().to_string().contains("write to the cluster's API"));

    // A pod's status goes up; a pod's end takes what it needed with it.
    let status = json!({"status": {"phase": "Running", "podIP": "10.244.0.9"}});
    Api::<Pod>::namespaced(local, "default")
        .patch_status("mine", &PatchParams::default(), &Patch::Merge(status))
        .await
        .unwrap();
    eventually("the pod's status reaches the cluster", || async {
        let pod = pods.get("mine").await.map_err(|error| error.to_string())?;
        let phase = pod.status.and_then(|status| status.phase);
        if phase.as_deref() == Some("Running") { Ok(()) } else { Err(format!("{phase:?}")) }
    })
    .await;
    // What runs at the node is the node's to say: another opinion in the cluster is overwritten.
    let opinion = json!({"status": {"phase": "Failed"}});
    pods.patch_status("mine", &PatchParams::default(), &Patch::Merge(opinion)).await.unwrap();
    eventually("the node says again what is true", || async {
        let phase = pods.get("mine").await.map_err(|error| error.to_string())?.status.and_then(|status| status.phase);
        if phase.as_deref() == Some("Running") { Ok(()) } else { Err(format!("{phase:?}")) }
    })
    .await;
    pods.delete("mine", &DeleteParams::default().grace_period(0)).await.unwrap();
    agree(&client, &edge).await;
    let metrics = http_get(edge.bound().admin, "/metrics").await.unwrap();
    assert!(metrics.contains("edgemesh_edgecore_link_connected 1"), "{metrics}");
    let metrics = http_get(hub.admin, "/metrics").await.unwrap();
    assert!(metrics.contains("edgemesh_hub_sessions 1"), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hub_serves_nodes_from_any_kubernetes_api_by_kubeconfig() {
    let api = Hub::start().await;
    let hub = Hub::beside(&api).await;
    let edge = Edge::join(&hub, "edge-1").await;
    edge.wait_live().await;
    let client = api.client().await;
    let services: Api<Service> = Api::namespaced(client.clone(), "default");
    services.create(&PostParams::default(), &service("web", 80)).await.unwrap();
    agree(&client, &edge).await;
    // Its authority is in the cluster, so it is the same after it lost its own disk.
    let secrets: Api<k8s_openapi::api::core::v1::Secret> = Api::namespaced(client, "edgemesh-system");
    assert!(secrets.get("edgemesh-ca").await.unwrap().data.unwrap().contains_key("tls.key"));
    let again = Hub::beside(&api).await;
    Edge::join(&again, "edge-2").await.wait_live().await;
    let ca = |edge: &Edge| std::fs::read(edge.folder.path().join("pki/ca.crt")).unwrap();
    assert_eq!(ca(&edge), ca(&Edge::join(&again, "edge-3").await));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_changed_while_a_node_was_away_arrives_and_nothing_deleted_comes_back() {
    let mut hub = Hub::start().await;
    let mut edge = Edge::join(&hub, "edge-1").await;
    let client = hub.client().await;
    let services: Api<Service> = Api::namespaced(client.clone(), "default");
    for name in ["changed", "deleted", "recreated"] {
        services.create(&PostParams::default(), &service(name, 80)).await.unwrap();
    }
    let pods: Api<Pod> = Api::namespaced(client.clone(), "default");
    pods.create(&PostParams::default(), &pod("ends", "edge-1", "none")).await.unwrap();
    agree(&client, &edge).await;
    edge.stop().await;

    let ports = json!({"spec": {"ports": [{"port": 8080}]}});
    services.patch("changed", &PatchParams::default(), &Patch::Merge(ports)).await.unwrap();
    for name in ["deleted", "recreated"] {
        services.delete(name, &DeleteParams::default()).await.unwrap();
    }
    services.create(&PostParams::default(), &service("recreated", 81)).await.unwrap();
    services.create(&PostParams::default(), &service("added", 82)).await.unwrap();
    pods.delete("ends", &DeleteParams::default().grace_period(0)).await.unwrap();
    edge.start().await;
    agree(&client, &edge).await;

    // With the hub gone, the node serves what it has and keeps what it wants to say.
    hub.kill();
    let local = edge.client();
    assert_eq!(Api::<Service>::namespaced(local, "default").get("added").await.unwrap().name_any(), "added");
    let key = ObjectKey::new(ResourceName::new("", "v1", "nodes"), "", "edge-1");
    let context = RequestContext::new(Identity::node("edge-1"));
    let label = |_: &_, node: &std::sync::Arc<Value>| {
        let mut node = (**node).clone();
        node["metadata"]["labels"]["said-offline"] = json!("yes");
        Ok(node)
    };
    edge.bound().store.modify(&key, Part::Main, &context, label).await.unwrap();
    // Across a restart of its own, too.
    edge.stop().await;
    edge.start().await;
    hub.restart();
    let began = Instant::now();
    eventually("what was said offline reaches the cluster", || async {
        let node = Api::<Node>::all(client.clone()).get("edge-1").await.map_err(|error| error.to_string())?;
        node.labels().get("said-offline").map(drop).ok_or_else(|| format!("{:?}", node.labels()))
    })
    .await;
    agree(&client, &edge).await;
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_metaserver_says_whether_it_is_in_step_with_the_cloud() {
    let mut hub = Hub::start().await;
    let edge = Edge::join(&hub, "edge-1").await;
    let says = |connected: bool| {
        let metaserver = edge.bound().metaserver;
        move || async move {
            let answer = http_get(metaserver, edgemesh_api::names::CLOUD_STATUS_PATH).await?;
            let body = answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default();
            let value: Value = serde_json::from_str(&body).map_err(|error| format!("{error}: {answer}"))?;
            if value == json!({"connected": connected}) { Ok(()) } else { Err(answer) }
        }
    };
    eventually("it is in step", says(true)).await;
    hub.kill();
    eventually("it is not", says(false)).await;
    hub.restart();
    eventually("it is again", says(true)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hub_killed_twenty_times_while_objects_change_leaves_every_node_equal_to_the_api() {
    let mut hub = Hub::start().await;
    let edges = [Edge::join(&hub, "edge-1").await, Edge::join(&hub, "edge-2").await];
    let client = hub.client().await;
    for edge in &edges {
        edge.wait_live().await;
    }
    let (stop, mut stopped) = tokio::sync::watch::channel(false);
    let writer = tokio::spawn({
        let client = client.clone();
        async move {
            let mut done = 0_u64;
            while !*stopped.borrow_and_update() {
                // Errors are the point: the API dies under it.
                match change(&client, done).await {
                    Ok(()) => done += 1,
                    Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
                }
            }
            done
        }
    });
    for round in 0..20_u64 {
        tokio::time::sleep(Duration::from_millis(100 + 37 * (round % 7))).await;
        hub.kill();
        hub.restart();
        if round % 4 == 3 {
            hub.wait_ready().await;
        }
    }
    hub.wait_ready().await;
    // A last stretch with the hub alive, so that the end is not only what the digest finds.
    tokio::time::sleep(Duration::from_millis(500)).await;
    stop.send_replace(true);
    let done = writer.await.unwrap();
    assert!(done > 50, "only {done} changes were made");
    let began = Instant::now();
    for edge in &edges {
        agree(&client, edge).await;
    }
    println!("{done} changes, 20 kills; agreed {:?} after the last", began.elapsed());
}

/// One of a mix of changes to 200 objects.
async fn change(client: &Client, number: u64) -> Result<(), kube::Error> {
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), "default");
    let services: Api<Service> = Api::namespaced(client.clone(), "default");
    let pods: Api<Pod> = Api::namespaced(client.clone(), "default");
    let slot = number % 50;
    let name = format!("o{slot}");
    let create = PostParams::default();
    match number % 7 {
        0 | 1 => {
            let port = 1 + u16::try_from(number % 60_000).unwrap();
            if services.get_opt(&name).await?.is_none() {
                services.create(&create, &service(&name, port)).await?;
            } else {
                let ports = json!({"spec": {"ports": [{"port": port}]}});
                services.patch(&name, &PatchParams::default(), &Patch::Merge(ports)).await?;
            }
        }
        2 => drop(services.delete(&name, &DeleteParams::default()).await),
        3 | 4 => {
            let data = json!({"metadata": {"name": name}, "data": {"n": number.to_string()}});
            if maps.get_opt(&name).await?.is_none() {
                maps.create(&create, &from(data)).await?;
            } else {
                maps.patch(&name, &PatchParams::default(), &Patch::Merge(data)).await?;
            }
        }
        5 => {
            let node = if slot.is_multiple_of(2) { "edge-1" } else { "edge-2" };
            if pods.get_opt(&name).await?.is_none() {
                pods.create(&create, &pod(&name, node, &name)).await?;
            }
        }
        _ => drop(pods.delete(&format!("o{}", (slot + 25) % 50), &DeleteParams::default().grace_period(0)).await),
    }
    Ok(())
}
