//! What runs in the lab while it is measured, as manifests.

use std::path::Path;

use serde_json::{Value, json};

/// Port of the stream server of pods with a network of their own.
pub(crate) const STREAM_PORT: u16 = 7000;
/// Port of the server of short connections.
pub(crate) const CONNECT_PORT: u16 = 7001;
/// Port of the server that sends datagrams back.
pub(crate) const DATAGRAM_PORT: u16 = 7002;
/// Port of the HTTP server.
pub(crate) const HTTP_PORT: u16 = 8080;
/// Port of the stream server at site b. The site's router forwards it, so the same server is reached without the mesh.
pub(crate) const FORWARDED_PORT: u16 = 443;
/// Port of the Gateway's listener.
pub(crate) const GATEWAY_PORT: u16 = 8088;
/// Pods on edge-a1, of which two are the near server and the probe.
pub(crate) const PODS_ON_A1: usize = 10;

/// The servers of a pod with a network of its own.
const PLAIN: [(&str, u16); 3] =
    [("--stream", STREAM_PORT), ("--connect", CONNECT_PORT), ("--datagrams", DATAGRAM_PORT)];
const IMAGE: &str = "edgemesh.dev/demo:1";

/// A pod that runs the bench's own server: the machine's libraries are mounted, since the image has none.
fn server(name: &str, node: &str, bench: &Path, arguments: &[String], host_network: bool) -> Value {
    let folders = [
        ("bench", bench.display().to_string(), bench.display().to_string()),
        ("usr", "/usr".to_owned(), "/usr".to_owned()),
        ("lib", "/usr/lib".to_owned(), "/lib".to_owned()),
        ("lib64", "/usr/lib64".to_owned(), "/lib64".to_owned()),
    ];
    let mounts: Vec<_> =
        folders.iter().map(|(name, _, inside)| json!({"name": name, "mountPath": inside, "readOnly": true})).collect();
    let volumes: Vec<_> =
        folders.iter().map(|(name, outside, _)| json!({"name": name, "hostPath": {"path": outside}})).collect();
    let mut command = vec![bench.join("bench").display().to_string(), "serve".to_owned()];
    command.extend_from_slice(arguments);
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "nodeSelector": {"kubernetes.io/hostname": node}, "hostNetwork": host_network, "terminationGracePeriodSeconds": 1,
            "containers": [{"name": "server", "image": IMAGE, "command": command, "volumeMounts": mounts}], "volumes": volumes,
        },
    })
}

fn service(name: &str, ports: &[u16]) -> Value {
    let protocol = |port: u16| if port == DATAGRAM_PORT { "UDP" } else { "TCP" };
    let port = |port: &u16| json!({"name": format!("p{port}"), "port": port, "protocol": protocol(*port)});
    let ports: Vec<_> = ports.iter().map(port).collect();
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": {"selector": {"app": name}, "ports": ports}})
}

fn list(items: Vec<Value>) -> Value {
    json!({"apiVersion": "v1", "kind": "List", "items": items})
}

fn idle_names() -> impl Iterator<Item = String> {
    (2..PODS_ON_A1).map(|number| format!("idle-{number}"))
}

/// Names of the pods of [`servers`].
pub(crate) fn pod_names() -> Vec<String> {
    ["probe", "near", "lan", "far", "web"].map(str::to_owned).into_iter().chain(idle_names()).collect()
}

fn flags(words: &[(&str, u16)]) -> Vec<String> {
    words.iter().flat_map(|(flag, port)| [(*flag).to_owned(), port.to_string()]).collect()
}

/// The client and the server of the lab with many Services.
pub(crate) fn pair_on(node: &str, programs: &Path) -> Value {
    let server = |name: &str| server(name, node, programs, &flags(&PLAIN), false);
    list(vec![server("probe"), server("near"), service("near", &[STREAM_PORT, CONNECT_PORT])])
}

/// The servers of all rows, and the pods beside them that make ten on edge-a1.
pub(crate) fn servers(programs: &Path) -> Value {
    let plain = flags(&PLAIN);
    let mut items = vec![
        server("probe", "edge-a1", programs, &plain, false),
        server("near", "edge-a1", programs, &plain, false),
        server("lan", "edge-a2", programs, &plain, false),
        server("far", "edge-b1", programs, &flags(&[("--stream", FORWARDED_PORT)]), true),
        server("web", "edge-b1", programs, &flags(&[("--http", HTTP_PORT)]), false),
        service("near", &[STREAM_PORT, CONNECT_PORT]),
        service("lan", &[STREAM_PORT, CONNECT_PORT, DATAGRAM_PORT]),
        service("far", &[FORWARDED_PORT]),
        service("web", &[HTTP_PORT]),
    ];
    items.extend(idle_names().map(|name| {
        json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
            "spec": {
                "nodeSelector": {"kubernetes.io/hostname": "edge-a1"}, "terminationGracePeriodSeconds": 1,
                "containers": [{"name": "idle", "image": IMAGE}],
            },
        })
    }));
    list(items)
}

/// A Gateway on [`GATEWAY_PORT`] that sends everything to the Service `web`.
pub(crate) fn gateway() -> Value {
    list(vec![
        json!({
            "apiVersion": "gateway.networking.k8s.io/v1", "kind": "GatewayClass", "metadata": {"name": "edgemesh"},
            "spec": {"controllerName": "edgemesh.dev/gateway-controller"},
        }),
        json!({
            "apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway", "metadata": {"name": "bench"},
            "spec": {"gatewayClassName": "edgemesh", "listeners": [{"name": "http", "port": GATEWAY_PORT, "protocol": "HTTP"}]},
        }),
        json!({
            "apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": {"name": "bench"},
            "spec": {"parentRefs": [{"name": "bench"}], "rules": [{"backendRefs": [{"name": "web", "port": HTTP_PORT}]}]},
        }),
    ])
}

/// `count` Services that only have names and addresses.
pub(crate) fn names(count: usize) -> Value {
    list((0..count).map(|number| service(&format!("name-{number}"), &[80])).collect())
}

/// A Deployment of one pod at edge-a2, and its Service.
pub(crate) fn fresh(name: &str) -> Value {
    list(vec![
        json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name},
            "spec": {
                "replicas": 1, "selector": {"matchLabels": {"app": name}},
                "template": {
                    "metadata": {"labels": {"app": name}},
                    "spec": {
                        "nodeSelector": {"kubernetes.io/hostname": "edge-a2"}, "terminationGracePeriodSeconds": 1,
                        "containers": [{"name": "server", "image": IMAGE}],
                    },
                },
            },
        }),
        service(name, &[HTTP_PORT]),
    ])
}
