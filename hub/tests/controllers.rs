//! The standalone controllers against the real embedded API: from an applied Deployment to ready endpoints, and back to nothing.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod cluster;

use std::time::{Duration, Instant};

use edgemesh_api::{MeshNode, MeshNodeSpec};
use k8s_openapi::{
    api::{
        apps::v1::{Deployment, ReplicaSet},
        core::v1::{ConfigMap, Namespace, Node, Pod, Service, ServiceAccount},
        discovery::v1::EndpointSlice,
    },
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
    core::{CustomResourceExt, params::PropagationPolicy},
};
use serde_json::{Value, json};

use cluster::{Cluster, create, eventually, is_ready, set_ready};

const SOON: Duration = Duration::from_millis(20);

fn deployment(name: &str, replicas: i32, image: &str) -> Value {
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name},
        "spec": {
            "replicas": replicas, "selector": {"matchLabels": {"app": name}},
            "template": {
                "metadata": {"labels": {"app": name}},
                "spec": {"containers": [{"name": "c", "image": image, "ports": [{"name": "http", "containerPort": 8080}]}]}
            }
        }
    })
}

fn service(name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
        "spec": {"selector": {"app": name}, "ports": [{"name": "web", "port": 80, "targetPort": "http"}]}
    })
}

async fn rolled_out(api: &Api<Deployment>, name: &str) -> Deployment {
    eventually("the rollout is complete", || async {
        let deployment = api.get(name).await.ok()?;
        let wanted = deployment.spec.as_ref()?.replicas?;
        let status = deployment.status.clone()?;
        let counts = [status.replicas, status.updated_replicas, status.available_replicas];
        let current = status.observed_generation >= deployment.metadata.generation;
        let complete = status.conditions.iter().flatten().any(|condition| {
            condition.type_ == "Progressing" && condition.reason.as_deref() == Some("NewReplicaSetAvailable")
        });
        (current && complete && counts.iter().all(|count| count.unwrap_or(0) == wanted)).then_some(deployment)
    })
    .await
}

async fn ready_endpoints(cluster: &Cluster, service: &str) -> Vec<String> {
    let labels = ListParams::default().labels(&format!("kubernetes.io/service-name={service}"));
    let slices = cluster.api::<EndpointSlice>().list(&labels).await.unwrap();
    let endpoints = slices.items.into_iter().flat_map(|slice| slice.endpoints);
    let ready = endpoints.filter(|endpoint| endpoint.conditions.as_ref().and_then(|one| one.ready) == Some(true));
    ready.flat_map(|endpoint| endpoint.addresses).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_applied_deployment_and_service_become_spread_pods_and_ready_endpoints() {
    let cluster = Cluster::start().await;
    let mut nodes_at_work = Vec::new();
    for node in ["a", "b", "c"] {
        nodes_at_work.push(cluster.node(node, json!({"topology.kubernetes.io/zone": "z1"}), SOON).await);
    }
    let begin = Instant::now();
    create(&cluster.api::<Deployment>(), deployment("web", 3, "web:1")).await;
    create(&cluster.api::<Service>(), service("web")).await;
    eventually("three ready endpoints", || async { (ready_endpoints(&cluster, "web").await.len() == 3).then_some(()) })
        .await;
    println!("apply to three ready endpoints: {:?}", begin.elapsed());
    rolled_out(&cluster.api(), "web").await;

    let pods = cluster.api::<Pod>().list(&ListParams::default()).await.unwrap();
    let mut nodes: Vec<_> = pods.items.iter().filter_map(|pod| pod.spec.as_ref()?.node_name.clone()).collect();
    nodes.sort();
    assert_eq!(nodes, ["a", "b", "c"]);
    let slices = cluster.api::<EndpointSlice>().list(&ListParams::default()).await.unwrap();
    let slice = slices.items.iter().find(|slice| slice.labels()["kubernetes.io/service-name"] == "web").unwrap();
    assert_eq!(slice.ports.as_ref().unwrap()[0].port, Some(8080), "the named port is resolved");
    assert_eq!(slice.endpoints[0].zone.as_deref(), Some("z1"));
    assert!(slice.endpoints[0].target_ref.as_ref().unwrap().uid.is_some());

    let all: Api<Node> = Api::all(cluster.client.clone());
    let ranges = eventually("every node has a pod range", || async {
        let nodes = all.list(&ListParams::default()).await.unwrap().items;
        let ranges: Option<Vec<_>> = nodes.into_iter().map(|node| node.spec?.pod_cidr).collect();
        ranges
    })
    .await;
    let unique: std::collections::BTreeSet<_> = ranges.iter().collect();
    assert_eq!(unique.len(), 3, "{ranges:?}");

    // From the status of a pod to the slice. The nodes stop working, so that none changes it meanwhile.
    let pods: Api<Pod> = cluster.api();
    let pod = pods.list(&ListParams::default()).await.unwrap().items.remove(0);
    let address = pod.status.as_ref().and_then(|status| status.pod_ip.clone()).unwrap();
    let unready = json!({"status": {"conditions": [{"type": "Ready", "status": "False"}]}});
    for node in nodes_at_work {
        node.cancel();
    }
    for (ready, endpoints) in [(false, 2), (true, 3)] {
        let begin = Instant::now();
        if ready {
            set_ready(&pods, &pod.name_any(), &address).await;
        } else {
            pods.patch_status(&pod.name_any(), &PatchParams::default(), &Patch::Strategic(&unready)).await.unwrap();
        }
        eventually("the slice follows", || async {
            (ready_endpoints(&cluster, "web").await.len() == endpoints).then_some(())
        })
        .await;
        let latency = begin.elapsed();
        println!("pod status to slice: {latency:?}");
        assert!(latency < Duration::from_secs(1), "{latency:?}");
    }
    let mut metrics = String::new();
    prometheus_client::encoding::text::encode(&mut metrics, &cluster.registry.read()).unwrap();
    for metric in
        ["edgemesh_hub_controller_reconciles_total{controller=\"scheduler\"", "edgemesh_hub_controller_queue_depth{"]
    {
        assert!(metrics.contains(metric), "{metric} in {metrics}");
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_registers_again_has_the_pod_range_that_it_had() {
    let cluster = Cluster::start().await;
    let nodes: Api<Node> = Api::all(cluster.client.clone());
    let register = async |name: &str| {
        create(&nodes, json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})).await;
        eventually("the node has a pod range", || async { nodes.get(name).await.ok()?.spec?.pod_cidrs }).await
    };
    let former = register("a").await;
    register("b").await;
    nodes.delete("a", &DeleteParams::default()).await.unwrap();
    assert_ne!(register("c").await, former, "it would be of no use to the node that returns");
    assert_eq!(register("a").await, former);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_update_keeps_its_limits_and_makes_each_pod_once() {
    let cluster = Cluster::start().await;
    for node in ["a", "b"] {
        cluster.node(node, json!({}), Duration::from_millis(100)).await;
    }
    let deployments: Api<Deployment> = cluster.api();
    create(&deployments, deployment("web", 8, "web:1")).await;
    rolled_out(&deployments, "web").await;
    assert_eq!(cluster.observed.lock().unwrap().created.len(), 8, "no pod was made twice");

    cluster.observed.lock().unwrap().reset();
    let image = json!({"spec": {"template": {"spec": {"containers": [{"name": "c", "image": "web:2"}]}}}});
    deployments.patch("web", &PatchParams::default(), &Patch::Strategic(&image)).await.unwrap();
    let after = rolled_out(&deployments, "web").await;
    {
        let observed = cluster.observed.lock().unwrap();
        // 25 % of 8, up and down.
        assert!(observed.most <= 10, "at most 10 pods, saw {}", observed.most);
        assert!(observed.fewest_ready >= 6, "at least 6 ready, saw {}", observed.fewest_ready);
        assert_eq!(observed.created.len(), 16, "8 old, 8 new");
    }
    assert_eq!(after.annotations()["deployment.kubernetes.io/revision"], "2");

    // `kubectl rollout undo` puts the old template back: its ReplicaSet is used again.
    let image = json!({"spec": {"template": {"spec": {"containers": [{"name": "c", "image": "web:1"}]}}}});
    deployments.patch("web", &PatchParams::default(), &Patch::Strategic(&image)).await.unwrap();
    let undone = rolled_out(&deployments, "web").await;
    assert_eq!(undone.annotations()["deployment.kubernetes.io/revision"], "3");
    let sets = cluster.api::<ReplicaSet>().list(&ListParams::default()).await.unwrap().items;
    assert_eq!(sets.len(), 2);

    let history = json!({"spec": {"revisionHistoryLimit": 0}});
    deployments.patch("web", &PatchParams::default(), &Patch::Merge(&history)).await.unwrap();
    eventually("old ReplicaSets are cleaned up", || async {
        (cluster.api::<ReplicaSet>().list(&ListParams::default()).await.unwrap().items.len() == 1).then_some(())
    })
    .await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn recreate_ends_every_old_pod_before_it_starts_a_new_one() {
    let cluster = Cluster::start().await;
    cluster.node("a", json!({}), SOON).await;
    let deployments: Api<Deployment> = cluster.api();
    let mut wanted = deployment("web", 3, "web:1");
    wanted["spec"]["strategy"] = json!({"type": "Recreate"});
    create(&deployments, wanted).await;
    rolled_out(&deployments, "web").await;
    cluster.observed.lock().unwrap().reset();
    let image = json!({"spec": {"template": {"spec": {"containers": [{"name": "c", "image": "web:2"}]}}}});
    deployments.patch("web", &PatchParams::default(), &Patch::Strategic(&image)).await.unwrap();
    rolled_out(&deployments, "web").await;
    {
        let observed = cluster.observed.lock().unwrap();
        assert_eq!((observed.most, observed.fewest_ready), (3, 0));
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scaling_up_and_down_makes_and_ends_exactly_as_many_pods() {
    let cluster = Cluster::start().await;
    for node in ["a", "b"] {
        cluster.node(node, json!({}), SOON).await;
    }
    let deployments: Api<Deployment> = cluster.api();
    create(&deployments, deployment("web", 1, "web:1")).await;
    create(&cluster.api::<Service>(), service("web")).await;
    rolled_out(&deployments, "web").await;
    let begin = Instant::now();
    let scale = json!({"spec": {"replicas": 120}});
    deployments.patch("web", &PatchParams::default(), &Patch::Merge(&scale)).await.unwrap();
    rolled_out(&deployments, "web").await;
    println!("1 to 120 pods available: {:?}", begin.elapsed());
    assert_eq!(cluster.observed.lock().unwrap().created.len(), 120);
    let spread = eventually("all endpoints are in slices of at most 100", || async {
        let slices = cluster.api::<EndpointSlice>().list(&ListParams::default()).await.unwrap().items;
        let sizes: Vec<_> = slices.iter().map(|slice| slice.endpoints.len()).filter(|size| *size > 0).collect();
        (sizes.iter().sum::<usize>() == 120).then_some(sizes)
    })
    .await;
    assert!(spread.iter().all(|size| *size <= 100), "{spread:?}");

    let scale = json!({"spec": {"replicas": 2}});
    deployments.patch("web", &PatchParams::default(), &Patch::Merge(&scale)).await.unwrap();
    rolled_out(&deployments, "web").await;
    eventually("118 pods are gone", || async {
        (cluster.api::<Pod>().list(&ListParams::default()).await.unwrap().items.len() == 2).then_some(())
    })
    .await;
    assert_eq!(cluster.observed.lock().unwrap().created.len(), 120, "none was replaced");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deleting_takes_the_dependents_along_unless_they_are_orphaned() {
    let cluster = Cluster::start().await;
    cluster.node("a", json!({}), SOON).await;
    let deployments: Api<Deployment> = cluster.api();
    let (sets, pods): (Api<ReplicaSet>, Api<Pod>) = (cluster.api(), cluster.api());
    let counts = || async {
        let all = ListParams::default();
        (sets.list(&all).await.unwrap().items.len(), pods.list(&all).await.unwrap().items.len())
    };
    let delete = |policy: PropagationPolicy| {
        let deployments = deployments.clone();
        async move {
            let params = DeleteParams { propagation_policy: Some(policy), ..DeleteParams::default() };
            deployments.delete("web", &params).await.unwrap();
        }
    };

    for policy in [PropagationPolicy::Background, PropagationPolicy::Foreground] {
        create(&deployments, deployment("web", 2, "web:1")).await;
        rolled_out(&deployments, "web").await;
        delete(policy.clone()).await;
        eventually("everything is gone", || async {
            let there = deployments.get_opt("web").await.unwrap().is_some();
            (counts().await == (0, 0) && !there).then_some(())
        })
        .await;
    }

    create(&deployments, deployment("web", 2, "web:1")).await;
    rolled_out(&deployments, "web").await;
    let before: Vec<_> = pods.list(&ListParams::default()).await.unwrap().items.iter().map(|pod| pod.uid()).collect();
    delete(PropagationPolicy::Orphan).await;
    eventually("the ReplicaSet has no owner", || async {
        let gone = deployments.get_opt("web").await.unwrap().is_none();
        let sets = sets.list(&ListParams::default()).await.unwrap().items;
        (gone && sets.len() == 1 && sets[0].owner_references().is_empty()).then_some(())
    })
    .await;
    // A Deployment with the same selector and template adopts it, pods and all.
    create(&deployments, deployment("web", 2, "web:1")).await;
    rolled_out(&deployments, "web").await;
    let after: Vec<_> = pods.list(&ListParams::default()).await.unwrap().items.iter().map(|pod| pod.uid()).collect();
    assert_eq!(before, after);
    assert_eq!(counts().await, (1, 2));

    // A Service takes its slices along.
    create(&cluster.api::<Service>(), service("web")).await;
    eventually("two endpoints", || async { (ready_endpoints(&cluster, "web").await.len() == 2).then_some(()) }).await;
    cluster.api::<Service>().delete("web", &DeleteParams::default()).await.unwrap();
    eventually("no slices", || async {
        cluster.api::<EndpointSlice>().list(&ListParams::default()).await.unwrap().items.is_empty().then_some(())
    })
    .await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_that_fits_nowhere_says_why_and_starts_when_a_node_comes() {
    let cluster = Cluster::start().await;
    cluster.node("a", json!({}), SOON).await;
    let pods: Api<Pod> = cluster.api();
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "picky"}, "spec": {
        "nodeSelector": {"disk": "ssd"}, "containers": [{"name": "c", "image": "c:1"}]}});
    create(&pods, pod).await;
    let message = eventually("a reason", || async {
        let pod = pods.get("picky").await.unwrap();
        let condition = pod.status?.conditions?.into_iter().find(|one| one.type_ == "PodScheduled")?;
        (condition.reason.as_deref() == Some("Unschedulable")).then_some(condition.message)?
    })
    .await;
    assert_eq!(message, "0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector.");
    let events: Api<k8s_openapi::api::core::v1::Event> = cluster.api();
    eventually("an event", || async {
        let events = events.list(&ListParams::default()).await.unwrap().items;
        events.iter().any(|event| event.reason.as_deref() == Some("FailedScheduling")).then_some(())
    })
    .await;
    cluster.node("b", json!({"disk": "ssd"}), SOON).await;
    eventually("it runs", || async { is_ready(&pods.get("picky").await.unwrap()).then_some(()) }).await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_edge_node_keeps_its_pods_and_endpoints_but_gets_no_new_ones() {
    let cluster = Cluster::start().await;
    let edge = json!({"node-role.kubernetes.io/edge": ""});
    let stop = cluster.node("edge", edge, SOON).await;
    cluster.node("cloud", json!({}), SOON).await;
    let deployments: Api<Deployment> = cluster.api();
    create(&deployments, deployment("web", 2, "web:1")).await;
    create(&cluster.api::<Service>(), service("web")).await;
    rolled_out(&deployments, "web").await;
    eventually("two endpoints", || async { (ready_endpoints(&cluster, "web").await.len() == 2).then_some(()) }).await;

    stop.cancel();
    let nodes: Api<Node> = Api::all(cluster.client.clone());
    let ready = |node: &Node| {
        let conditions = node.status.as_ref().and_then(|status| status.conditions.clone()).unwrap_or_default();
        conditions.into_iter().find(|one| one.type_ == "Ready").map(|one| one.status).unwrap_or_default()
    };
    let taints = |node: &Node| -> Vec<(String, String)> {
        let taints = node.spec.as_ref().and_then(|spec| spec.taints.clone()).unwrap_or_default();
        taints.into_iter().map(|taint| (taint.key, taint.effect)).collect()
    };
    eventually("the edge node is unknown and tainted", || async {
        let node = nodes.get("edge").await.unwrap();
        let wanted = [("node.kubernetes.io/unreachable".to_owned(), "NoSchedule".to_owned())];
        (ready(&node) == "Unknown" && taints(&node) == wanted).then_some(())
    })
    .await;
    let scale = json!({"spec": {"replicas": 5}});
    deployments.patch("web", &PatchParams::default(), &Patch::Merge(&scale)).await.unwrap();
    rolled_out(&deployments, "web").await;
    let pods = cluster.api::<Pod>().list(&ListParams::default()).await.unwrap().items;
    let at_edge = pods.iter().filter(|pod| pod.spec.as_ref().unwrap().node_name.as_deref() == Some("edge"));
    let at_edge: Vec<_> = at_edge.collect();
    assert_eq!(at_edge.len(), 1, "it keeps its pod and gets no other");
    assert!(is_ready(at_edge[0]), "as last known");
    eventually("five endpoints", || async { (ready_endpoints(&cluster, "web").await.len() == 5).then_some(()) }).await;

    cluster.run_node("edge", SOON);
    eventually("the edge node is back to normal", || async {
        let node = nodes.get("edge").await.unwrap();
        let forgotten = !node.annotations().contains_key("edgemesh.dev/conditions-last-heard");
        (ready(&node) == "True" && taints(&node).is_empty() && forgotten).then_some(())
    })
    .await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_of_a_deleted_node_are_removed_and_replaced() {
    let cluster = Cluster::start().await;
    let stop = cluster.node("a", json!({}), SOON).await;
    let deployments: Api<Deployment> = cluster.api();
    create(&deployments, deployment("web", 2, "web:1")).await;
    rolled_out(&deployments, "web").await;
    stop.cancel();
    let nodes: Api<Node> = Api::all(cluster.client.clone());
    nodes.delete("a", &DeleteParams::default()).await.unwrap();
    cluster.node("b", json!({}), SOON).await;
    eventually("both pods are on the other node", || async {
        let pods = cluster.api::<Pod>().list(&ListParams::default()).await.unwrap().items;
        let there =
            pods.iter().all(|pod| pod.spec.as_ref().unwrap().node_name.as_deref() == Some("b") && is_ready(pod));
        (pods.len() == 2 && there).then_some(())
    })
    .await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deleted_namespace_is_emptied_and_then_gone() {
    let cluster = Cluster::start().await;
    cluster.node("a", json!({}), SOON).await;
    let namespaces: Api<Namespace> = Api::all(cluster.client.clone());
    for name in ["default", "kube-system", "kube-node-lease", "kube-public", "edgemesh-system"] {
        eventually("a namespace that must exist", || async { namespaces.get_opt(name).await.unwrap() }).await;
    }
    create(&namespaces, json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}})).await;
    let accounts: Api<ServiceAccount> = Api::namespaced(cluster.client.clone(), "shop");
    eventually("its default account", || async { accounts.get_opt("default").await.unwrap() }).await;
    let deployments: Api<Deployment> = Api::namespaced(cluster.client.clone(), "shop");
    create(&deployments, deployment("web", 2, "web:1")).await;
    let maps: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), "shop");
    create(&maps, json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"}})).await;
    rolled_out(&deployments, "web").await;
    namespaces.delete("shop", &DeleteParams::default()).await.unwrap();
    eventually("the namespace is gone", || async { namespaces.get_opt("shop").await.unwrap().is_none().then_some(()) })
        .await;
    let pods: Api<Pod> = Api::all(cluster.client.clone());
    assert!(
        pods.list(&ListParams::default())
            .await
            .unwrap()
            .items
            .iter()
            .all(|pod| pod.namespace().as_deref() != Some("shop"))
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollout_that_gets_nowhere_exceeds_its_deadline() {
    let cluster = Cluster::start().await;
    cluster.node("a", json!({}), SOON).await;
    let deployments: Api<Deployment> = cluster.api();
    let mut stuck = deployment("web", 1, "web:1");
    stuck["spec"]["progressDeadlineSeconds"] = json!(2);
    stuck["spec"]["template"]["spec"]["nodeSelector"] = json!({"nowhere": "yes"});
    create(&deployments, stuck).await;
    eventually("the progress deadline is exceeded", || async {
        let deployment = deployments.get("web").await.unwrap();
        let condition = deployment.status?.conditions?.into_iter().find(|one| one.type_ == "Progressing")?;
        (condition.reason.as_deref() == Some("ProgressDeadlineExceeded")).then_some(())
    })
    .await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hub_that_restarts_at_any_moment_makes_no_pod_twice() {
    let mut cluster = Cluster::start().await;
    for node in ["a", "b"] {
        cluster.node(node, json!({}), SOON).await;
    }
    let deployments: Api<Deployment> = cluster.api();
    create(&deployments, deployment("web", 60, "web:1")).await;
    for cut_at in [1, 9, 20, 33, 47] {
        eventually("some pods", || async { (cluster.observed.lock().unwrap().created.len() >= cut_at).then_some(()) })
            .await;
        cluster.restart().await;
    }
    rolled_out(&deployments, "web").await;
    eventually("the watch has caught up", || async {
        (cluster.observed.lock().unwrap().present.len() == 60).then_some(())
    })
    .await;
    assert_eq!(cluster.observed.lock().unwrap().created.len(), 60);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn objects_of_a_custom_resource_own_as_others_do() {
    let cluster = Cluster::start().await;
    let definitions: Api<CustomResourceDefinition> = Api::all(cluster.client.clone());
    definitions.create(&PostParams::default(), &MeshNode::crd()).await.unwrap();
    let nodes: Api<MeshNode> = Api::all(cluster.client.clone());
    let owner = eventually("the resource is served", || async {
        nodes.create(&PostParams::default(), &MeshNode::new("a", MeshNodeSpec::default())).await.ok()
    })
    .await;
    let maps: Api<ConfigMap> = cluster.api();
    let owned = |name: &str| {
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "ownerReferences": [
            {"apiVersion": "edgemesh.dev/v1alpha1", "kind": "MeshNode", "name": "a", "uid": owner.uid().unwrap()}]}})
    };
    create(&maps, owned("settings")).await;
    nodes.delete("a", &DeleteParams::default()).await.unwrap();
    let gone = |name: &'static str| {
        let maps = maps.clone();
        async move { maps.get_opt(name).await.unwrap().is_none().then_some(()) }
    };
    eventually("it goes with its owner", || gone("settings")).await;
    // An owner of the same name but another uid is another object.
    nodes.create(&PostParams::default(), &MeshNode::new("a", MeshNodeSpec::default())).await.unwrap();
    create(&maps, owned("late")).await;
    eventually("what names an owner that is gone goes too", || gone("late")).await;
    cluster.stop().await;
}
