//! Pods on a real containerd, in a network namespace of its own. Needs root, containerd, runc, the CNI plugins and nft.

// The node's own code runs in tests only, but outside of test functions, where clippy can't see it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::zombie_processes, unreachable_pub)]

mod node;

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

use node::{NODE_ADDRESSES, POD_RANGE, POD_RANGE6, on_node, run, shell};
use serde_json::{Value, json};

fn restarts(pod: &Value) -> i64 {
    pod["status"]["containerStatuses"][0]["restartCount"].as_i64().unwrap_or(-1)
}

fn waiting_reason(pod: &Value) -> &str {
    pod["status"]["containerStatuses"][0]["state"]["waiting"]["reason"].as_str().unwrap_or_default()
}

/// A connection to the pod's server: its container runs a moment before it listens.
async fn connect(ip: &str) -> TcpStream {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        match TcpStream::connect((ip, 8080)) {
            Ok(stream) => return stream,
            Err(error) => assert!(Instant::now() < deadline, "{ip}: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A loop that ends at once when it's asked to.
const FOREVER: &str = "trap 'exit 0' TERM; while true; do sleep 0.1; done";

#[test]
fn a_pod_runs_with_its_environment_volumes_and_network() {
    on_node(|mut node| async {
        let begun = Instant::now();
        node.apply(
            "configmaps",
            json!({"apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": "settings", "namespace": "shop"}, "data": {"color": "blue", "mode": "fast"}}),
        )
        .await;
        node.apply(
            "secrets",
            json!({"apiVersion": "v1", "kind": "Secret", "type": "Opaque",
            "metadata": {"name": "login", "namespace": "shop"}, "data": {"password": "aHVudGVyMg=="}}),
        )
        .await;
        let script = format!(
            "echo node=$NODE ip=$IP color=$COLOR password=$PASSWORD link=$LINK arg=$0; cat /etc/resolv.conf /etc/hosts; \
             echo file=$(cat /cm/color) secret=$(cat /s/password) init=$(cat /scratch/init); hostname; \
             touch /ro/x || echo read-only; df /mem | tail -1; {FOREVER}"
        );
        let mut app = shell("app", &script);
        app["command"] = json!(["/bin/sh", "-c", script, "$(COLOR)"]);
        app["env"] = json!([
            {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
            {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "COLOR", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "color"}}},
            {"name": "PASSWORD", "valueFrom": {"secretKeyRef": {"name": "login", "key": "password"}}},
            {"name": "LINK", "value": "$(NODE)/$(COLOR)"}
        ]);
        app["resources"] = json!({"limits": {"cpu": "500m", "memory": "64Mi"}});
        app["volumeMounts"] = json!([
            {"name": "cm", "mountPath": "/cm"}, {"name": "s", "mountPath": "/s", "readOnly": true},
            {"name": "scratch", "mountPath": "/scratch"}, {"name": "scratch", "mountPath": "/ro", "readOnly": true},
            {"name": "mem", "mountPath": "/mem"}
        ]);
        let mut init = shell("prepare", "echo done > /scratch/init");
        init["volumeMounts"] = json!([{"name": "scratch", "mountPath": "/scratch"}]);
        let server = json!({"name": "server", "image": "edgemesh.dev/demo:1", "ports": [{"containerPort": 8080, "hostPort": 18080}]});
        node.apply_pod("web", "u-web", json!({
            "initContainers": [init], "containers": [app, server],
            "volumes": [{"name": "cm", "configMap": {"name": "settings"}}, {"name": "s", "secret": {"secretName": "login"}},
                {"name": "scratch", "emptyDir": {}}, {"name": "mem", "emptyDir": {"medium": "Memory", "sizeLimit": "4Mi"}}]
        })).await;
        let pod = node.wait_ready("web").await;
        println!("apply to ready, with an init container: {:?}", begun.elapsed());
        let ip = pod["status"]["podIP"].as_str().unwrap().to_owned();
        assert!(ip.starts_with("10.88.7."), "{ip} is not in {POD_RANGE}");
        let second = pod["status"]["podIPs"][1]["ip"].as_str().unwrap().to_owned();
        assert!(second.starts_with("fd00:88:0:7::"), "{second} is not in {POD_RANGE6}");
        assert_eq!(pod["status"]["hostIP"], "192.168.88.7");
        assert_eq!(pod["status"]["qosClass"], "Burstable");
        let statuses = pod["status"]["containerStatuses"].as_array().unwrap();
        assert!(
            statuses
                .iter()
                .all(|s| s["ready"] == true && s["containerID"].as_str().unwrap().starts_with("containerd://"))
        );
        assert_eq!(pod["status"]["initContainerStatuses"][0]["state"]["terminated"]["reason"], "Completed");

        node.until("the container printed everything", || node.log("u-web", "app", 0).contains("tmpfs")).await;
        let log = node.log("u-web", "app", 0);
        assert!(
            log.contains(&format!("node=edge-t ip={ip} color=blue password=hunter2 link=edge-t/blue arg=blue\n")),
            "{log}"
        );
        assert!(log.contains("nameserver 10.96.0.10\n") && log.contains("options ndots:5\n"), "{log}");
        assert!(log.contains("search shop.svc.cluster.local svc.cluster.local cluster.local lan.example\n"), "{log}");
        assert!(log.contains(&format!("{ip}\tweb\n")) && log.contains(&format!("{second}\tweb\n")), "{log}");
        // What goes to standard error comes in between somewhere.
        assert!(log.contains("file=blue secret=hunter2 init=done\n") && log.contains("\nweb\n"), "{log}");
        assert!(log.contains("read-only\n"), "{log}");

        // Straight to the pod, from the node.
        let mut stream = connect(&ip).await;
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        let rules = run(&["nft", "list", "ruleset"]);
        assert!(rules.contains("ip saddr 10.88.7.0/24 ip daddr != @inside masquerade"), "{rules}");
        assert!(rules.contains("ip6 saddr fd00:88:0:7::/64 ip6 daddr != @inside6 masquerade"), "{rules}");
        assert!(rules.contains("18080"), "the host port is not mapped: {rules}");
        // A node that forwards takes router advertisements only where it is told so.
        let setting = |name| std::fs::read_to_string(format!("/proc/sys/net/ipv6/conf/{name}")).unwrap();
        assert_eq!((setting("all/forwarding").trim(), setting("default/accept_ra").trim()), ("1", "2"));

        // The running container sees the new ConfigMap.
        node.apply(
            "configmaps",
            json!({"apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": "settings", "namespace": "shop"}, "data": {"color": "green"}}),
        )
        .await;
        let file = node.folder("u-web").join("volumes/cm/color");
        node.until("the volume follows its ConfigMap", || fs::read_to_string(&file).is_ok_and(|c| c == "green")).await;
        assert!(!file.with_file_name("mode").exists());
        node
    });
}

/// The addresses in a list of a pod's status.
fn addresses<'a>(pod: &'a Value, list: &str) -> Vec<&'a str> {
    pod["status"][list].as_array().into_iter().flatten().filter_map(|item| item["ip"].as_str()).collect()
}

#[test]
fn pods_have_the_addresses_of_their_node_and_follow_them() {
    on_node(|mut node| async {
        let mut container = shell("c", &format!("echo host=$HOST own=$OWN; {FOREVER}"));
        let field = |path: &str| json!({"fieldRef": {"fieldPath": path}});
        container["env"] = json!([{"name": "HOST", "valueFrom": field("status.hostIP")},
            {"name": "OWN", "valueFrom": field("status.podIPs")}]);
        node.apply_pod("shared", "u-shared", json!({"hostNetwork": true, "containers": [container]})).await;
        let pod = node.wait_ready("shared").await;
        for (one, list) in [("hostIP", "hostIPs"), ("podIP", "podIPs")] {
            assert_eq!(pod["status"][one], NODE_ADDRESSES[0]);
            assert_eq!(addresses(&pod, list), NODE_ADDRESSES);
        }
        node.until("the container printed its addresses", || !node.log("u-shared", "c", 0).is_empty()).await;
        let printed = format!("host={} own={}\n", NODE_ADDRESSES[0], NODE_ADDRESSES.join(","));
        assert_eq!(node.log("u-shared", "c", 0), printed);
        node.set_addresses(&["192.168.99.7"]).await;
        let moved = |pod: &Value| ["hostIPs", "podIPs"].iter().all(|list| addresses(pod, list) == ["192.168.99.7"]);
        let pod = node.wait("shared", "at the node's new address", moved).await;
        assert_eq!(restarts(&pod), 0);
        node
    });
}

#[test]
fn pods_move_to_the_pod_range_that_their_node_got_instead_of_its_former_one() {
    on_node(|mut node| async {
        let server = json!({"name": "server", "image": "edgemesh.dev/demo:1"});
        node.apply_pod("stays", "u-stays", json!({"containers": [shell("c", FOREVER)]})).await;
        node.wait_ready("stays").await;
        node.apply_node("n-2", ["10.88.9.0/24", "fd00:88:0:9::/64"]).await;
        node.apply_pod("new", "u-new", json!({"containers": [server]})).await;
        let moved = |pod: &Value| {
            let ips = addresses(pod, "podIPs");
            node::is_ready(pod)
                && ips.len() == 2
                && ips.iter().all(|ip| ip.starts_with("10.88.9.") || ip.starts_with("fd00:88:0:9:"))
        };
        for name in ["new", "stays"] {
            let pod = node.wait(name, "in the new range", moved).await;
            println!("{name}: {}", pod["status"]["podIPs"]);
            if name == "new" {
                connect(pod["status"]["podIP"].as_str().unwrap()).await;
            }
        }
        // What the bridge keeps of the old range would take the traffic to the node that has it now.
        let bridge = || run(&["ip", "-o", "address", "show", "dev", "edgemesh0"]);
        node.until("the bridge is in the new range alone", || {
            let addresses = bridge();
            ["10.88.9.1/24", "fd00:88:0:9::1/64"].iter().all(|own| addresses.contains(own))
                && !["10.88.7.", "fd00:88:0:7:"].iter().any(|former| addresses.contains(former))
        })
        .await;
        node
    });
}

#[test]
fn containers_that_end_follow_the_restart_policy_with_growing_waits() {
    on_node(|mut node| async {
        node.apply_pod(
            "crash",
            "u-crash",
            json!({"containers": [
            shell("c", "echo last words > /dev/termination-log; exit 3")]}),
        )
        .await;
        node.apply_pod("job", "u-job", json!({"restartPolicy": "Never", "containers": [shell("c", "exit 0")]})).await;
        node.apply_pod("broken", "u-broken", json!({"restartPolicy": "Never", "containers": [shell("c", "exit 4")]}))
            .await;
        let crash = node.wait("crash", "in a crash loop", |pod| waiting_reason(pod) == "CrashLoopBackOff").await;
        assert_eq!(restarts(&crash), 1, "once at once, then it waits");
        let last = &crash["status"]["containerStatuses"][0]["lastState"]["terminated"];
        assert_eq!((&last["exitCode"], &last["message"]), (&json!(3), &json!("last words")));
        assert_eq!(crash["status"]["phase"], "Running");
        node.wait_events("crash", &["Pulled", "Created", "Started", "BackOff"]).await;
        let job = node.wait("job", "succeeded", |pod| pod["status"]["phase"] == "Succeeded").await;
        assert_eq!(job["status"]["containerStatuses"][0]["state"]["terminated"]["reason"], "Completed");
        node.wait("broken", "failed", |pod| pod["status"]["phase"] == "Failed").await;
        let again = node.wait("crash", "started again after its wait", |pod| restarts(pod) == 2).await;
        assert_eq!(again["status"]["phase"], "Running");
        node
    });
}

#[test]
fn a_container_waits_for_its_configuration_and_its_image() {
    on_node(|mut node| async {
        let mut container = shell("c", FOREVER);
        container["envFrom"] = json!([{"configMapRef": {"name": "late"}}]);
        node.apply_pod("waits", "u-waits", json!({"containers": [container]})).await;
        let mut missing = shell("c", FOREVER);
        missing["image"] = json!("127.0.0.1:9/none:1");
        node.apply_pod("no-image", "u-no-image", json!({"containers": [missing]})).await;
        let pod = node.wait("waits", "waiting", |pod| waiting_reason(pod) == "CreateContainerConfigError").await;
        assert_eq!(
            pod["status"]["containerStatuses"][0]["state"]["waiting"]["message"],
            "configmap \"late\" not found"
        );
        assert_eq!(pod["status"]["phase"], "Pending");
        let begun = Instant::now();
        node.apply(
            "configmaps",
            json!({"apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": "late", "namespace": "shop"}, "data": {"A": "1"}}),
        )
        .await;
        node.wait_ready("waits").await;
        assert!(begun.elapsed() < Duration::from_secs(10), "it did not start when the ConfigMap appeared");
        node.wait("no-image", "backing off", |pod| waiting_reason(pod) == "ImagePullBackOff").await;
        node
    });
}

#[test]
fn a_deleted_pod_leaves_nothing_behind() {
    on_node(|mut node| async {
        let volumes = json!([{"name": "m", "emptyDir": {"medium": "Memory"}}]);
        let mut app = shell("c", FOREVER);
        app["volumeMounts"] = json!([{"name": "m", "mountPath": "/m"}]);
        for name in ["polite", "forced", "replaced"] {
            let spec = json!({"containers": [app], "volumes": volumes, "terminationGracePeriodSeconds": 30});
            node.apply_pod(name, &format!("u-{name}"), spec).await;
        }
        let stubborn = shell("c", "trap '' TERM; while true; do sleep 0.1; done");
        node.apply_pod("stubborn", "u-stubborn", json!({"containers": [stubborn]})).await;
        for name in ["polite", "forced", "replaced", "stubborn"] {
            node.wait_ready(name).await;
        }
        let begun = Instant::now();
        node.delete_pod("polite", 30).await;
        node.wait_gone("polite").await;
        assert!(begun.elapsed() < Duration::from_secs(15), "SIGTERM was not enough");
        let begun = Instant::now();
        node.delete_pod("stubborn", 2).await;
        node.wait_gone("stubborn").await;
        assert!(begun.elapsed() >= Duration::from_secs(2), "it had no time to end by itself");
        node.forget("pods", "forced").await;
        // Another pod of the same name: the old one must be gone first.
        node.apply_pod("replaced", "u-second", json!({"containers": [app], "volumes": volumes})).await;
        let second = node
            .wait("replaced", "the second one", |pod| pod["metadata"]["uid"] == "u-second" && node::is_ready(pod))
            .await;
        assert_eq!(restarts(&second), 0);
        for uid in ["u-polite", "u-forced", "u-replaced", "u-stubborn"] {
            let folder = node.folder(uid);
            node.until("the folder is removed", || !folder.exists()).await;
            assert!(node.containers(uid).await.is_empty(), "{uid} has containers");
            assert!(!node.has_cgroup(uid), "{uid} has a cgroup");
        }
        assert!(node.has_cgroup("u-second"));
        // The deletion goes back to the cloud.
        let sent = node.store.outbox_pending(0, 1000).await.unwrap();
        let deleted =
            |name: &str| sent.iter().any(|e| e.op == edgemesh_apiserver::WriteOp::Delete && e.key.name == name);
        assert!(deleted("polite") && deleted("stubborn") && !deleted("forced"));
        node
    });
}

#[test]
fn a_new_runner_takes_over_running_pods_and_removes_unknown_ones() {
    on_node(|mut node| async {
        node.apply_pod("kept", "u-kept", json!({"containers": [shell("c", FOREVER)]})).await;
        node.apply_pod("orphan", "u-orphan", json!({"containers": [shell("c", FOREVER)]})).await;
        let before = node.wait_ready("kept").await;
        node.wait_ready("orphan").await;
        node.stop_runner().await;
        node.forget("pods", "orphan").await;
        fs::create_dir_all(node.folder("u-leftover").join("volumes")).unwrap();
        node.start();
        let folders = [node.folder("u-orphan"), node.folder("u-leftover")];
        node.until("the unknown pods are removed", || folders.iter().all(|folder| !folder.exists())).await;
        assert!(node.containers("u-orphan").await.is_empty());
        let after = node.wait_ready("kept").await;
        assert_eq!(
            after["status"]["containerStatuses"][0]["containerID"],
            before["status"]["containerStatuses"][0]["containerID"],
            "the same container runs on"
        );
        assert_eq!(restarts(&after), 0);
        node
    });
}

#[test]
fn a_pod_in_a_new_sandbox_keeps_its_addresses() {
    on_node(|mut node| async {
        let script = format!("cat /sys/class/net/eth0/address; {FOREVER}");
        node.apply_pod("moved", "u-moved", json!({"containers": [shell("c", &script)]})).await;
        let before = node.wait_ready("moved").await;
        let address: std::net::Ipv4Addr = before["status"]["podIP"].as_str().unwrap().parse().unwrap();
        let link: Vec<_> = edgecore::network::link_address::of(address).iter().map(|b| format!("{b:02x}")).collect();
        node.kill_sandbox("u-moved").await;
        let after = node.wait("moved", "in a new sandbox", |pod| restarts(pod) == 1 && node::is_ready(pod)).await;
        assert_eq!(after["status"]["podIPs"], before["status"]["podIPs"]);
        assert_eq!(after["status"]["podIPs"].as_array().map(Vec::len), Some(2), "{}", after["status"]);
        for attempt in [0, 1] {
            let log = || node.log("u-moved", "c", attempt);
            node.until("the container says its link address", || !log().is_empty()).await;
            assert_eq!(log().trim(), link.join(":"), "attempt {attempt}");
        }
        node
    });
}

#[test]
fn all_pods_return_after_a_reboot_from_the_store_alone() {
    on_node(|mut node| async {
        const PODS: usize = 5;
        let mut server = json!({"name": "server", "image": "edgemesh.dev/demo:1", "imagePullPolicy": "IfNotPresent"});
        for number in 0..PODS {
            node.apply_pod(&format!("p{number}"), &format!("u-{number}"), json!({"containers": [server]})).await;
        }
        node.apply_pod("done", "u-done", json!({"restartPolicy": "Never", "containers": [shell("c", "exit 0")]})).await;
        let mut before = Vec::new();
        for number in 0..PODS {
            let status = node.wait_ready(&format!("p{number}")).await["status"].clone();
            before.push((status["containerStatuses"][0]["containerID"].clone(), status["podIPs"].clone()));
        }
        node.wait("done", "done", |pod| pod["status"]["phase"] == "Succeeded").await;
        // No registry has this image: the container ran here before, so the copy on the node will do.
        server["imagePullPolicy"] = json!("Always");
        node.apply_pod("p0", "u-0", json!({"containers": [server]})).await;
        node.reboot().await;
        let begun = Instant::now();
        node.start();
        for (number, (id, addresses)) in before.iter().enumerate() {
            let pod = node
                .wait(&format!("p{number}"), "back", |pod| {
                    node::is_ready(pod) && pod["status"]["containerStatuses"][0]["containerID"] != *id
                })
                .await;
            assert_eq!(restarts(&pod), 1);
            assert_eq!(pod["status"]["podIPs"], *addresses);
            assert!(pod["status"]["containerStatuses"][0]["lastState"]["terminated"]["exitCode"].is_i64());
            let ip = pod["status"]["podIP"].as_str().unwrap().to_owned();
            let mut stream = connect(&ip).await;
            stream.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
        }
        println!("{PODS} pods back after {:?}", begun.elapsed());
        let done = node.pod("done").await.unwrap();
        assert_eq!(done["status"]["phase"], "Succeeded", "what was done is not done again");
        assert_eq!(restarts(&done), 0);
        node
    });
}
