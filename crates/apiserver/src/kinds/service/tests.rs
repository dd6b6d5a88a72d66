//! Services that are accepted and rejected, as data.

use super::*;
use crate::kinds::{Registry, decode, default_object, prepare_update, table_row, validate_create, validate_update};

fn service(spec: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "n"}, "spec": spec})
}

fn problems(spec: Value) -> Vec<String> {
    let info = Registry::built_in().lookup("", "v1", "services").unwrap();
    let mut object = decode(&info, service(spec)).unwrap().object;
    default_object(&info, &mut object);
    validate_create(&info, &object).iter().map(ToString::to_string).collect()
}

#[test]
fn services_get_the_defaults_of_kubernetes() {
    let mut object = service(json!({"ports": [{"port": 80}], "selector": {"a": "b"}}));
    default(&mut object);
    assert_eq!(
        object["spec"],
        json!({"ports": [{"port": 80, "protocol": "TCP", "targetPort": 80}], "selector": {"a": "b"}, "type": "ClusterIP",
            "sessionAffinity": "None", "internalTrafficPolicy": "Cluster"})
    );
    assert_eq!(object["status"], json!({"loadBalancer": {}}));
    let mut external = service(json!({"type": "ExternalName", "externalName": "a.example"}));
    default(&mut external);
    assert_eq!(
        external["spec"],
        json!({"type": "ExternalName", "externalName": "a.example", "sessionAffinity": "None"})
    );
    let mut node_port = service(json!({"type": "NodePort", "ports": [{"port": 80}], "sessionAffinity": "ClientIP"}));
    default(&mut node_port);
    assert_eq!(node_port["spec"]["externalTrafficPolicy"], json!("Cluster"));
    assert_eq!(node_port["spec"]["sessionAffinityConfig"]["clientIP"]["timeoutSeconds"], json!(10800));
}

#[test]
fn good_services_are_accepted() {
    for spec in [
        json!({"ports": [{"port": 80}]}),
        json!({"ports": [{"name": "a", "port": 53}, {"name": "b", "port": 53, "protocol": "UDP"}]}),
        json!({"clusterIP": "None"}),
        json!({"type": "ExternalName", "externalName": "a.example."}),
        json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": 30080, "targetPort": "web"}]}),
        json!({"type": "LoadBalancer", "ports": [{"port": 80}], "loadBalancerSourceRanges": ["10.0.0.0/8"]}),
        json!({"ports": [{"port": 80, "appProtocol": "kubernetes.io/h2c"}], "externalIPs": ["203.0.113.9"], "trafficDistribution": "PreferClose"}),
        json!({"ports": [{"port": 80}], "trafficDistribution": "PreferSameZone"}),
        json!({"ports": [{"port": 80}], "trafficDistribution": "PreferSameNode"}),
    ] {
        assert_eq!(problems(spec.clone()), Vec::<String>::new(), "{spec}");
    }
}

#[test]
fn bad_services_are_rejected_with_the_field() {
    for (spec, expected) in [
        (json!({}), "spec.ports: Required value"),
        (json!({"ports": []}), "spec.ports: Required value"),
        (
            json!({"ports": [{"port": 0}]}),
            "spec.ports[0].port: Invalid value: 0: must be between 1 and 65535, inclusive",
        ),
        (json!({"ports": [{"port": 80}, {"port": 81}]}), "spec.ports[0].name: Required value"),
        (
            json!({"ports": [{"name": "a", "port": 80}, {"name": "a", "port": 81}]}),
            "spec.ports[1].name: Duplicate value: \"a\"",
        ),
        (
            json!({"ports": [{"name": "a", "port": 80}, {"name": "b", "port": 80}]}),
            "spec.ports[1]: Duplicate value: {\"port\":80,\"protocol\":\"TCP\"}",
        ),
        (
            json!({"ports": [{"port": 80, "protocol": "HTTP"}]}),
            "spec.ports[0].protocol: Unsupported value: \"HTTP\": supported values: \"SCTP\", \"TCP\", \"UDP\"",
        ),
        (
            json!({"ports": [{"port": 80, "targetPort": "a--b"}]}),
            "spec.ports[0].targetPort: Invalid value: \"a--b\": must not contain",
        ),
        (
            json!({"ports": [{"port": 80, "nodePort": 30000}]}),
            "spec.ports[0].nodePort: Forbidden: may not be used when `type` is 'ClusterIP'",
        ),
        (json!({"type": "Magic", "ports": [{"port": 80}]}), "spec.type: Unsupported value: \"Magic\""),
        (json!({"type": "ExternalName"}), "spec.externalName: Required value"),
        (
            json!({"type": "NodePort", "clusterIP": "None", "ports": [{"port": 80}]}),
            "spec.clusterIPs[0]: Invalid value: \"None\": may not be set to 'None' for NodePort services",
        ),
        (json!({"clusterIP": "1.2.3", "ports": [{"port": 80}]}), "spec.clusterIP: Invalid value: \"1.2.3\""),
        (
            json!({"sessionAffinity": "Cookie", "ports": [{"port": 80}]}),
            "spec.sessionAffinity: Unsupported value: \"Cookie\"",
        ),
        (json!({"selector": {"a": "b c"}, "ports": [{"port": 80}]}), "spec.selector: Invalid value: \"b c\""),
        (
            json!({"externalTrafficPolicy": "Local", "ports": [{"port": 80}]}),
            "spec.externalTrafficPolicy: Invalid value: \"Local\": may only be set for externally-accessible services",
        ),
        (json!({"externalIPs": ["x"], "ports": [{"port": 80}]}), "spec.externalIPs[0]: Invalid value: \"x\""),
    ] {
        let found = problems(spec);
        assert!(found.iter().any(|f| f.starts_with(expected)), "{expected}: {found:?}");
    }
}

fn updated(old: Value, new: Value) -> (Value, Vec<String>) {
    let info = Registry::built_in().lookup("", "v1", "services").unwrap();
    let (mut old, mut new) = (service(old), service(new));
    default_object(&info, &mut old);
    prepare_update(&info, &old, &mut new);
    default_object(&info, &mut new);
    let found = validate_update(&info, &old, &new).iter().map(ToString::to_string).collect();
    (new["spec"].take(), found)
}

#[test]
fn an_update_keeps_what_was_allocated() {
    let old = json!({"type": "NodePort", "clusterIP": "10.96.1.1", "ports": [{"port": 80, "nodePort": 30080}]});
    let (spec, found) =
        updated(old.clone(), json!({"type": "NodePort", "ports": [{"port": 80}, {"port": 81, "name": "x"}]}));
    assert_eq!(found.len(), 1, "only the missing name: {found:?}");
    assert_eq!((&spec["clusterIP"], &spec["clusterIPs"]), (&json!("10.96.1.1"), &json!(["10.96.1.1"])));
    assert_eq!(spec["ports"][0]["nodePort"], json!(30080));
    assert!(spec["ports"][1]["nodePort"].is_null());

    let (spec, found) = updated(
        old.clone(),
        json!({"type": "ClusterIP", "clusterIP": "10.96.1.1", "externalTrafficPolicy": "Cluster",
        "ports": [{"port": 80, "nodePort": 30080}]}),
    );
    assert_eq!(found, Vec::<String>::new());
    assert!(spec["ports"][0]["nodePort"].is_null() && spec["externalTrafficPolicy"].is_null());

    let (spec, found) = updated(
        old.clone(),
        json!({"type": "ExternalName", "externalName": "a.example", "clusterIP": "10.96.1.1",
        "clusterIPs": ["10.96.1.1"]}),
    );
    assert_eq!(found, Vec::<String>::new());
    assert!(spec["clusterIP"].is_null() && spec["clusterIPs"].is_null());

    let (_, found) = updated(old, json!({"type": "NodePort", "clusterIP": "10.96.1.2", "ports": [{"port": 80}]}));
    assert_eq!(found, ["spec.clusterIP: Invalid value: \"10.96.1.2\": field is immutable"]);
}

#[test]
fn a_node_port_belongs_to_the_name_of_its_port() {
    let old = json!({"type": "NodePort", "clusterIP": "10.96.1.1", "ports": [
        {"name": "web", "port": 80, "nodePort": 30080}, {"name": "dns", "port": 53, "protocol": "UDP", "nodePort": 30053}]});
    let node_ports = |ports: Value| {
        let (spec, found) = updated(old.clone(), json!({"type": "NodePort", "ports": ports}));
        assert_eq!(found, Vec::<String>::new());
        json!(list(&spec["ports"]).iter().map(|port| port["nodePort"].clone()).collect::<Vec<_>>())
    };
    assert_eq!(node_ports(json!([{"name": "web", "port": 8080}, {"name": "dns", "port": 53}])), json!([30080, 30053]));
    assert_eq!(node_ports(json!([{"name": "other", "port": 80}])), json!([null]));
    // Another port was given it.
    let taken = json!([{"name": "web", "port": 80}, {"name": "new", "port": 81, "nodePort": 30080}]);
    assert_eq!(node_ports(taken), json!([null, 30080]));

    let unnamed = json!({"type": "NodePort", "clusterIP": "10.96.1.1", "ports": [{"port": 80, "nodePort": 30080}]});
    let (spec, _) = updated(unnamed, json!({"type": "NodePort", "ports": [{"port": 8080}]}));
    assert_eq!(spec["ports"][0]["nodePort"], json!(30080));
}

#[test]
fn node_ports_of_a_load_balancer_go_when_somebody_removes_them() {
    let old = json!({"type": "LoadBalancer", "clusterIP": "10.96.1.1", "ports": [{"port": 80, "nodePort": 30080}]});
    let mut new = old.clone();
    new["allocateLoadBalancerNodePorts"] = json!(false);
    let (kept, found) = updated(old, new);
    assert_eq!((&kept["ports"][0]["nodePort"], found), (&json!(30080), Vec::new()));
    let mut without = kept.clone();
    without["ports"][0]["nodePort"] = Value::Null;
    let (removed, found) = updated(kept, without);
    assert_eq!((&removed["ports"][0]["nodePort"], found), (&Value::Null, Vec::new()));
}

#[test]
fn an_address_that_an_update_empties_stays() {
    for old in [
        json!({"clusterIP": "10.96.1.1", "clusterIPs": ["10.96.1.1"], "ports": [{"port": 80}]}),
        json!({"clusterIP": "None", "clusterIPs": ["None"], "ports": [{"port": 80}]}),
    ] {
        let mut new = old.clone();
        new["clusterIP"] = json!("");
        let (spec, found) = updated(old.clone(), new);
        assert_eq!(found, Vec::<String>::new());
        assert_eq!((&spec["clusterIP"], &spec["clusterIPs"]), (&old["clusterIP"], &old["clusterIPs"]));
    }
}

#[test]
fn a_changed_address_is_one_error_and_not_two() {
    let old = json!({"clusterIP": "10.96.1.1", "ports": [{"port": 80}]});
    let (_, found) = updated(
        old,
        json!({"clusterIP": "10.96.1.2", "clusterIPs": ["10.96.1.1"], "ipFamilies": ["IPv4"], "ports": [{"port": 80}]}),
    );
    assert_eq!(found, ["spec.clusterIP: Invalid value: \"10.96.1.2\": field is immutable"]);
}

#[test]
fn services_are_shown_as_kubectl_shows_them() {
    let info = Registry::built_in().lookup("", "v1", "services").unwrap();
    for (spec, expected) in [
        (
            json!({"type": "ClusterIP", "clusterIP": "10.96.0.9", "ports": [{"port": 80, "protocol": "TCP"}], "selector": {"b": "2", "a": "1"}}),
            ["ClusterIP", "10.96.0.9", "<none>", "80/TCP", "a=1,b=2"],
        ),
        (
            json!({"type": "NodePort", "clusterIP": "10.96.0.9", "ports": [{"port": 80, "nodePort": 30001, "protocol": "TCP"}, {"port": 53, "protocol": "UDP"}]}),
            ["NodePort", "10.96.0.9", "<none>", "80:30001/TCP,53/UDP", "<none>"],
        ),
        (
            json!({"type": "LoadBalancer", "clusterIP": "10.96.0.9", "ports": []}),
            ["LoadBalancer", "10.96.0.9", "<pending>", "<none>", "<none>"],
        ),
        (
            json!({"type": "ExternalName", "externalName": "a.example"}),
            ["ExternalName", "<none>", "a.example", "<none>", "<none>"],
        ),
        (
            json!({"type": "ClusterIP", "clusterIP": "None", "externalIPs": ["1.2.3.4"]}),
            ["ClusterIP", "None", "1.2.3.4", "<none>", "<none>"],
        ),
    ] {
        let row = table_row(&info, &service(spec), Timestamp::now());
        assert_eq!(json!([row[1], row[2], row[3], row[4], row[6]]), json!(expected));
    }
}

#[test]
fn a_huge_service_that_is_wrong_all_over_gives_a_short_answer() {
    let ports: Vec<Value> = (0..20_000).map(|_| json!({"port": 0, "x": 1})).collect();
    let info = Registry::built_in().lookup("", "v1", "services").unwrap();
    let decoded = decode(&info, service(json!({"ports": ports}))).unwrap();
    assert_eq!(decoded.unknown_fields.len(), 100);
    let mut object = decoded.object;
    default_object(&info, &mut object);
    assert_eq!(validate_create(&info, &object).len(), 100);
}
