//! Objects that rows apply.

use serde_json::{Map, Value, json};

/// Port of the demo server for HTTP.
pub const HTTP: u16 = 8080;
/// Port of the demo server for plain TCP and for UDP.
pub const ECHO: u16 = 7000;

/// A pod of the demo server on a node, with further arguments for the server.
pub fn pod(name: &str, node: &str, labels: &[(&str, &str)], arguments: &[&str]) -> Value {
    let labels: Map<_, _> = labels.iter().map(|(key, value)| ((*key).to_owned(), json!(value))).collect();
    // As most servers do: one socket for both families.
    let everywhere: &[_] = if arguments.contains(&"--address") { &[] } else { &["--address", "::"] };
    let command: Vec<_> = ["/bin/demo-server"].iter().chain(arguments).chain(everywhere).collect();
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels},
        "spec": {
            "nodeName": node,
            "terminationGracePeriodSeconds": 30,
            "containers": [{
                "name": "server", "image": "edgemesh.dev/demo:1", "command": command,
                "env": [
                    {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
                    {"name": "NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
                ],
                "ports": [
                    {"name": "http", "containerPort": HTTP}, {"name": "tcp", "containerPort": ECHO},
                    {"name": "udp", "containerPort": ECHO, "protocol": "UDP"},
                ],
            }],
        },
    })
}

/// A pod that can't become Ready: it waits for a condition that nobody sets.
pub fn unready(mut pod: Value) -> Value {
    pod["spec"]["readinessGates"] = json!([{"conditionType": "conformance.example/never"}]);
    pod
}

/// The ports of a Service over the demo server: HTTP at 80, TCP and UDP at 90.
pub fn ports() -> Value {
    json!([
        {"name": "http", "port": 80, "targetPort": HTTP},
        {"name": "tcp", "port": 90, "targetPort": ECHO},
        {"name": "udp", "port": 90, "targetPort": ECHO, "protocol": "UDP"},
    ])
}

/// An EndpointSlice that nobody's selector makes.
pub fn slice(name: &str, service: &str, ports: Value, endpoints: Vec<Value>) -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": service}},
        "ports": ports, "endpoints": endpoints,
    })
}

/// The ports of a slice over the demo server, under the names of [`ports`].
pub fn slice_ports() -> Value {
    json!([
        {"name": "http", "port": HTTP, "protocol": "TCP"}, {"name": "tcp", "port": ECHO, "protocol": "TCP"},
        {"name": "udp", "port": ECHO, "protocol": "UDP"},
    ])
}

/// An endpoint of a slice.
pub fn endpoint(address: &str, node: &str, ready: bool) -> Value {
    json!({"addresses": [address], "nodeName": node, "conditions": {"ready": ready, "serving": ready, "terminating": false}})
}
