//! Endpoint choice as a table: where the caller is, what the endpoints are like, and which it gets.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test ends where something fails")]

use std::{
    collections::HashSet,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Instant,
};

use edgemesh_mesh::{
    Call, Candidates, Catalog, CatalogStore, IpFamily, Reach, Tier, Viewpoint,
    choice::{PassedOver, Rule},
    health::{EndpointKey, Health, HealthSettings},
    model::{Protocol, ServicePort},
};
use serde_json::{Value, json};

/// The nodes of the lab: two in one network, one in another, one without a network; `edge-a3` isn't ready.
fn nodes(store: &CatalogStore) {
    for (name, network, zone, ready, range) in [
        ("edge-a1", Some("site-a"), Some("z1"), true, "10.244.1.0/24"),
        ("edge-a2", Some("site-a"), Some("z2"), true, "10.244.2.0/24"),
        ("edge-a3", Some("site-a"), Some("z1"), false, "10.244.3.0/24"),
        ("edge-b1", Some("site-b"), Some("z1"), true, "10.244.4.0/24"),
        ("cloud-1", None, None, true, "10.244.5.0/24"),
    ] {
        let mut labels = network.map_or(json!({}), |network| json!({"edgemesh.dev/network": network}));
        if let Some(zone) = zone {
            labels["topology.kubernetes.io/zone"] = json!(zone);
        }
        let status = if ready { "True" } else { "Unknown" };
        store.apply_node(
            &serde_json::from_value(json!({
                "metadata": {"name": name, "labels": labels}, "spec": {"podCIDR": range},
                "status": {"conditions": [{"type": "Ready", "status": status}]},
            }))
            .unwrap(),
        );
    }
}

/// An endpoint in short: `node:last byte of its address:state`. `-` is no node; the state is `r`eady, `n`ot ready,
/// `t`erminating but serving, or `d`ead (terminating, not serving). A fourth part is the zone that it is hinted for.
fn endpoint(short: &str) -> Value {
    let parts: Vec<&str> = short.split(':').collect();
    let third = match parts[0] {
        "edge-a1" => 1,
        "edge-a2" => 2,
        "edge-a3" => 3,
        "edge-b1" => 4,
        "cloud-1" => 5,
        _ => 200,
    };
    let (ready, serving, terminating) = match parts[2] {
        "r" => (true, true, false),
        "n" => (false, false, false),
        "t" => (false, true, true),
        _ => (false, false, true),
    };
    let mut endpoint = json!({"addresses": [format!("10.244.{third}.{}", parts[1])],
        "conditions": {"ready": ready, "serving": serving, "terminating": terminating}});
    if parts[0] != "-" {
        endpoint["nodeName"] = json!(parts[0]);
    }
    if let Some(zone) = parts.get(3) {
        endpoint["hints"] = json!({"forZones": [{"name": zone}]});
    }
    endpoint
}

/// What removed each endpoint: its last byte, and the rule in its short form; nothing for those chosen.
fn explain(viewpoint: &str, policy: Value, endpoints: &str, call: Call) -> Vec<(u8, Option<Rule>)> {
    let (catalog, port) = catalog(policy, json!({}), endpoints);
    let from = Viewpoint::of(&catalog, viewpoint);
    let explanation = from.explain(&catalog, &port, call, &PassedOver::new());
    assert_eq!(explanation.candidates, from.candidates_for(&catalog, &port, call), "it is the same choice");
    let chosen = explanation.endpoints.iter().filter(|explained| explained.removed.is_none());
    let chosen: Vec<_> = chosen.map(|explained| explained.endpoint.clone()).collect();
    assert_eq!(chosen, explanation.candidates.endpoints, "what no rule removed was chosen");
    let last = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => ip.octets()[3],
        IpAddr::V6(_) => 0,
    };
    explanation.endpoints.iter().map(|explained| (last(explained.endpoint.address), explained.removed)).collect()
}

#[test]
fn an_explanation_names_the_rule_that_removed_each_endpoint() {
    let call = Call::default();
    let nothing = json!({});
    let local = json!({"internalTrafficPolicy": "Local"});
    let same_zone = json!({"trafficDistribution": "PreferSameZone"});
    let all = "edge-a1:1:r edge-a2:2:r edge-b1:3:r edge-a1:4:n edge-a2:5:t";
    assert_eq!(
        explain("edge-a1", nothing.clone(), all, call),
        [
            (1, None),
            (4, Some(Rule::Condition)),
            (2, Some(Rule::Tier)),
            (5, Some(Rule::Condition)),
            (3, Some(Rule::Tier))
        ]
    );
    assert_eq!(
        explain("cloud-1", local.clone(), "edge-a1:1:r cloud-1:2:t", call),
        [(1, Some(Rule::TrafficPolicy)), (2, None)],
        "the own node's terminating endpoint is used, and what keeps the ready one away is the policy"
    );
    assert_eq!(
        explain("cloud-1", local, "edge-a1:1:t edge-a1:2:n", call),
        [(1, Some(Rule::TrafficPolicy)), (2, Some(Rule::Condition))],
        "nothing is chosen"
    );
    assert_eq!(
        explain("edge-a2", same_zone, "edge-a1:1:r edge-a2:2:r", call),
        [(1, Some(Rule::Distribution)), (2, None)]
    );
    assert_eq!(
        explain("edge-a1", nothing.clone(), "edge-a2:1:r:z2 edge-a2:2:r:z1", call),
        [(1, Some(Rule::Hints)), (2, None)]
    );
    assert_eq!(
        explain("edge-a1", nothing.clone(), "edge-a2:1:r edge-a3:2:r", call),
        [(1, None), (2, Some(Rule::NodeNotReady))]
    );
    let of_v6 = Call { family: Some(IpFamily::V6), ..call };
    assert_eq!(explain("edge-a1", nothing, "edge-a2:1:r", of_v6), [(1, Some(Rule::Family))]);
}

fn choose(viewpoint: &str, policy: Value, endpoints: &str) -> Candidates {
    choose_for(viewpoint, policy, json!({}), endpoints, Call::default())
}

fn choose_for(viewpoint: &str, policy: Value, annotations: Value, endpoints: &str, call: Call) -> Candidates {
    let (catalog, port) = catalog(policy, annotations, endpoints);
    Viewpoint::of(&catalog, viewpoint).candidates_for(&catalog, &port, call)
}

fn catalog(policy: Value, annotations: Value, endpoints: &str) -> (Arc<Catalog>, Arc<ServicePort>) {
    catalog_with_silent(policy, annotations, endpoints, HashSet::new())
}

fn catalog_with_silent(
    policy: Value,
    annotations: Value,
    endpoints: &str,
    silent: HashSet<SocketAddr>,
) -> (Arc<Catalog>, Arc<ServicePort>) {
    let store = CatalogStore::new();
    nodes(&store);
    let mut spec = json!({"clusterIP": "10.96.0.1", "ports": [{"port": 80}]});
    spec.as_object_mut().unwrap().extend(policy.as_object().unwrap().clone());
    store.apply_service(
        &serde_json::from_value(json!({
            "metadata": {"namespace": "d", "name": "s", "annotations": annotations}, "spec": spec,
        }))
        .unwrap(),
    );
    let endpoints: Vec<Value> = endpoints.split_whitespace().map(endpoint).collect();
    store.apply_endpoint_slice(
        &serde_json::from_value(json!({
            "addressType": "IPv4", "ports": [{"port": 8080}], "endpoints": endpoints,
            "metadata": {"namespace": "d", "name": "s-1", "labels": {"kubernetes.io/service-name": "s"}},
        }))
        .unwrap(),
    );
    store.publish();
    store.set_silent(silent);
    store.publish();
    let catalog = store.snapshot();
    let port = catalog.port_at("10.96.0.1".parse().unwrap(), 80, Protocol::Tcp).unwrap().clone();
    (catalog, port)
}

/// Third and last bytes of the endpoints' addresses.
fn short(candidates: &Candidates) -> String {
    let one = |e: &std::sync::Arc<edgemesh_mesh::model::Endpoint>| {
        e.address.to_string().trim_start_matches("10.244.").to_owned()
    };
    candidates.endpoints.iter().map(one).collect::<Vec<_>>().join(" ")
}

#[test]
fn the_nearest_tier_that_has_usable_endpoints_is_chosen() {
    let local = json!({"internalTrafficPolicy": "Local"});
    let publish = json!({"publishNotReadyAddresses": true});
    let any = json!({});
    let table: &[(&str, &Value, &str, Tier, &str)] = &[
        // viewpoint, policy, endpoints, expected tier, expected addresses (third and last byte)
        ("edge-a1", &any, "edge-a1:1:r edge-a2:1:r edge-b1:1:r", Tier::Node, "1.1"),
        ("edge-a1", &any, "edge-a2:1:r edge-a2:2:r edge-b1:1:r", Tier::Network, "2.1 2.2"),
        ("edge-a1", &any, "edge-b1:1:r cloud-1:1:r", Tier::Zone, "4.1"),
        ("edge-a2", &any, "edge-b1:1:r cloud-1:1:r", Tier::Remote, "4.1 5.1"),
        ("edge-b1", &any, "edge-a1:1:r edge-a2:1:r", Tier::Zone, "1.1"),
        // not ready ones don't hold a tier
        ("edge-a1", &any, "edge-a1:1:n edge-a2:1:r", Tier::Network, "2.1"),
        ("edge-a1", &any, "edge-a1:1:n edge-a2:1:n edge-b1:1:r", Tier::Zone, "4.1"),
        ("edge-a1", &any, "edge-a1:1:n", Tier::Remote, ""),
        ("edge-a1", &any, "", Tier::Remote, ""),
        // terminating ones serve only when nothing is ready anywhere
        ("edge-a1", &any, "edge-a1:1:t edge-b1:1:r", Tier::Zone, "4.1"),
        ("edge-a1", &any, "edge-a1:1:t edge-b1:1:t", Tier::Node, "1.1"),
        ("edge-a1", &any, "edge-a1:1:d edge-b1:1:t", Tier::Zone, "4.1"),
        ("edge-a1", &any, "edge-a1:1:d", Tier::Remote, ""),
        // publishNotReadyAddresses
        ("edge-a1", &publish, "edge-a1:1:n edge-a2:1:r", Tier::Node, "1.1"),
        // internalTrafficPolicy: Local
        ("edge-a1", &local, "edge-a1:1:r edge-a2:1:r", Tier::Node, "1.1"),
        ("edge-a1", &local, "edge-a2:1:r", Tier::Remote, ""),
        ("edge-a1", &local, "edge-a1:1:t edge-a2:1:r", Tier::Node, "1.1"),
        // nodes that are not Ready come last in their tier
        ("edge-a1", &any, "edge-a2:1:r edge-a3:1:r", Tier::Network, "2.1"),
        ("edge-a1", &any, "edge-a3:1:r edge-b1:1:r", Tier::Network, "3.1"),
        ("edge-a3", &any, "edge-a3:1:r edge-a2:1:r", Tier::Node, "3.1"),
        // outside of the cluster, and on nodes that nobody knows
        ("edge-a1", &any, "-:9:r", Tier::Network, "200.9"),
        ("edge-a1", &any, "ghost:9:r", Tier::Remote, "200.9"),
        ("edge-a1", &any, "ghost:9:r edge-a2:1:r", Tier::Network, "2.1"),
        // a viewpoint that the catalog doesn't know is in the default network
        ("new", &any, "cloud-1:1:r edge-a1:1:r", Tier::Network, "5.1"),
        ("cloud-1", &any, "edge-a1:1:r", Tier::Remote, "1.1"),
    ];
    for (viewpoint, policy, endpoints, tier, expected) in table {
        let got = choose(viewpoint, (*policy).clone(), endpoints);
        assert_eq!((got.tier, &*short(&got)), (*tier, *expected), "from {viewpoint}: {endpoints} {policy}");
    }
}

#[test]
fn traffic_distribution_and_hints_choose_the_place_and_the_mesh_the_rest() {
    let close = json!({"trafficDistribution": "PreferClose"});
    let zone = json!({"trafficDistribution": "PreferSameZone"});
    let node = json!({"trafficDistribution": "PreferSameNode"});
    let (any, strict, none) = (json!({}), json!({"edgemesh.dev/endpoint-choice": "kubernetes"}), json!({}));
    let table: &[(&str, &Value, &Value, &str, Tier, &str)] = &[
        // viewpoint, policy, annotations, endpoints, farthest tier, expected addresses
        ("edge-a1", &zone, &none, "edge-a1:1:r edge-a2:1:r edge-b1:1:r", Tier::Zone, "1.1 4.1"),
        ("edge-a1", &close, &none, "edge-a1:1:r edge-a2:1:r edge-b1:1:r", Tier::Zone, "1.1 4.1"),
        ("edge-a1", &node, &none, "edge-a1:1:r edge-a2:1:r edge-b1:1:r", Tier::Node, "1.1"),
        ("edge-a1", &node, &none, "edge-a2:1:r edge-b1:1:r", Tier::Zone, "4.1"),
        // nothing in the zone: the mesh's order, or everything
        ("edge-a1", &zone, &none, "edge-a2:1:r cloud-1:1:r", Tier::Network, "2.1"),
        ("edge-a1", &zone, &strict, "edge-a2:1:r cloud-1:1:r", Tier::Remote, "2.1 5.1"),
        // a caller without a zone
        ("cloud-1", &zone, &none, "cloud-1:1:r edge-a1:1:r", Tier::Node, "5.1"),
        // Kubernetes' own spreading
        ("edge-a1", &any, &strict, "edge-a1:1:r edge-a2:1:r edge-b1:1:r", Tier::Zone, "1.1 2.1 4.1"),
        ("edge-a1", &any, &strict, "edge-a1:1:r edge-a2:1:r", Tier::Network, "1.1 2.1"),
        ("edge-a1", &any, &strict, "edge-a1:1:n edge-a2:1:r edge-a3:1:r", Tier::Network, "2.1"),
        // hints: all endpoints must have them, and one must be for this zone
        ("edge-a1", &any, &strict, "edge-a1:1:r:z2 edge-a2:1:r:z1 edge-b1:1:r:z1", Tier::Zone, "2.1 4.1"),
        ("edge-a1", &any, &none, "edge-a1:1:r:z2 edge-a2:1:r:z1 edge-b1:1:r:z1", Tier::Network, "2.1"),
        ("edge-a1", &any, &strict, "edge-a1:1:r:z2 edge-a2:1:r edge-b1:1:r:z1", Tier::Zone, "1.1 2.1 4.1"),
        ("edge-a1", &any, &none, "edge-a1:1:r:z2 edge-a2:1:r:z2", Tier::Node, "1.1"),
        ("cloud-1", &any, &none, "cloud-1:1:r:z2 edge-a2:1:r:z1", Tier::Node, "5.1"),
    ];
    for (viewpoint, policy, annotations, endpoints, tier, expected) in table {
        let got = choose_for(viewpoint, (*policy).clone(), (*annotations).clone(), endpoints, Call::default());
        assert_eq!((got.tier, &*short(&got)), (*tier, *expected), "{viewpoint}: {endpoints} {policy} {annotations}");
    }
}

/// A connection's choice: the addresses (third and last byte), and whether it spilled. `ejected` and `tried` are such addresses.
fn choose_besides(policy: &Value, annotations: &Value, endpoints: &str, ejected: &str, tried: &str) -> (String, bool) {
    let (catalog, port) = catalog(policy.clone(), annotations.clone(), endpoints);
    let from = Viewpoint::of(&catalog, "edge-a1");
    let (health, now) = (Health::new(HealthSettings::default(), 1), Instant::now());
    let address = |short: &str| -> SocketAddr { format!("10.244.{short}:8080").parse().unwrap() };
    let ejected: HashSet<SocketAddr> = ejected.split_whitespace().map(address).collect();
    for &address in &ejected {
        health.failed(EndpointKey { address, protocol: Protocol::Tcp }, now, now).unwrap();
    }
    let tried: PassedOver = tried.split_whitespace().map(address).collect();
    let got = health.candidates(&from, &catalog, &port, Call::default(), &tried, now);
    if tried.is_empty() {
        let explanation = health.explain(&from, &catalog, &port, Call::default(), now);
        assert_eq!(explanation.candidates, got, "it is the same choice");
        for explained in &explanation.endpoints {
            let chosen = got.endpoints.contains(&explained.endpoint);
            assert_eq!(explained.removed.is_none(), chosen, "{explained:?}");
        }
        let (catalog, port) = catalog_with_silent(policy.clone(), annotations.clone(), endpoints, ejected);
        let silent = from.candidates_for(&catalog, &port, Call::default());
        assert_eq!(
            (short(&silent), silent.spilled),
            (short(&got), got.spilled),
            "silent endpoints are as ejected ones"
        );
    }
    (short(&got), got.spilled)
}

#[test]
fn when_all_that_is_preferred_is_ejected_the_choice_spills_as_far_as_the_policies_let_it() {
    let any = json!({});
    let local = json!({"internalTrafficPolicy": "Local"});
    let zone = json!({"trafficDistribution": "PreferSameZone"});
    let node = json!({"trafficDistribution": "PreferSameNode"});
    let (strict, none) = (json!({"edgemesh.dev/endpoint-choice": "kubernetes"}), json!({}));
    let tiers = "edge-a1:1:r edge-a1:2:r edge-a2:1:r edge-b1:1:r cloud-1:1:r";
    let table: &[(&Value, &Value, &str, &str, &str, &str, bool)] = &[
        // policy, annotations, endpoints, ejected, tried in vain, expected addresses, whether it spilled
        (&any, &none, tiers, "", "", "1.1 1.2", false),
        (&any, &none, tiers, "1.1", "", "1.2", false),
        (&any, &none, tiers, "2.1 4.1 5.1", "", "1.1 1.2", false),
        (&any, &none, tiers, "1.1 1.2", "", "2.1", true),
        (&any, &none, tiers, "1.1 1.2 2.1", "", "4.1", true),
        (&any, &none, tiers, "1.1 1.2 2.1 4.1", "", "5.1", true),
        // all of them: a wrong guess must not take the Service away
        (&any, &none, tiers, "1.1 1.2 2.1 4.1 5.1", "", "1.1 1.2", false),
        // within one connection: the healthy ones, then those that are ejected, each once
        (&any, &none, tiers, "1.2", "1.1", "2.1", true),
        (&any, &none, tiers, "1.2", "1.1 2.1 4.1", "5.1", true),
        (&any, &none, tiers, "1.2", "1.1 2.1 4.1 5.1", "1.2", false),
        (&any, &none, tiers, "1.2", "1.1 1.2 2.1 4.1 5.1", "", false),
        // not ready ones are none to spill to; terminating ones neither, while there are ready ones
        (&any, &none, "edge-a1:1:r edge-a2:1:n edge-b1:1:t", "1.1", "", "1.1", false),
        (&any, &none, "edge-a1:1:t edge-b1:1:t", "1.1", "", "4.1", true),
        // a node that is not Ready comes before what is farther away, as ever
        (&any, &none, "edge-a2:1:r edge-a3:1:r edge-b1:1:r", "2.1", "", "3.1", true),
        // Local never leaves the node
        (&local, &none, tiers, "1.1 1.2", "", "1.1 1.2", false),
        (&local, &none, tiers, "1.1", "", "1.2", false),
        (&local, &none, tiers, "", "1.1 1.2", "", false),
        // strict spreading has no order
        (&any, &strict, tiers, "1.1 1.2", "", "2.1 4.1 5.1", false),
        // trafficDistribution and hints are preferences
        (&zone, &none, tiers, "1.1 1.2", "", "4.1", false),
        (&zone, &none, tiers, "1.1 1.2 4.1", "", "2.1", true),
        (&zone, &strict, tiers, "1.1 1.2 4.1", "", "2.1 5.1", true),
        (&node, &none, tiers, "1.1 1.2", "", "4.1", true),
        (&any, &none, "edge-a2:1:r:z1 edge-a2:2:r:z2 edge-b1:1:r:z1", "2.1", "", "4.1", true),
        (&any, &none, "edge-a2:1:r:z1 edge-a2:2:r:z2 edge-b1:1:r:z1", "2.1 4.1", "", "2.2", true),
    ];
    for (policy, annotations, endpoints, ejected, tried, expected, spilled) in table {
        let got = choose_besides(policy, annotations, endpoints, ejected, tried);
        assert_eq!((&*got.0, got.1), (*expected, *spilled), "{endpoints} {policy}: ejected {ejected}, tried {tried}");
    }
}

#[test]
fn policies_for_cluster_addresses_do_not_hold_for_external_ones() {
    let external = Call { external: true, ..Call::default() };
    let policy = json!({"internalTrafficPolicy": "Local", "externalTrafficPolicy": "Local"});
    let got = choose_for("edge-a1", policy.clone(), json!({}), "edge-a2:1:r", external);
    assert_eq!(short(&got), "2.1", "from a node, every endpoint may be used");
    assert_eq!(short(&choose("edge-a1", policy, "edge-a2:1:r")), "");
}

#[test]
fn an_endpoint_without_a_node_name_is_placed_by_its_address() {
    let store = CatalogStore::new();
    nodes(&store);
    store.publish();
    let catalog = store.snapshot();
    let here = Viewpoint::of(&catalog, "edge-a1");
    let mut found = choose("edge-a1", json!({}), "-:9:r").endpoints[0].as_ref().clone();
    for (address, expected) in [
        ("10.244.1.7", Reach::Local),
        ("10.244.2.7", Reach::Direct),
        ("10.244.4.7", Reach::Tunnel { node: "edge-b1".into() }),
        ("203.0.113.7", Reach::Direct),
    ] {
        found.address = address.parse().unwrap();
        assert_eq!(here.reach(&catalog, &found), expected, "{address}");
    }
}

#[test]
fn random_keys_spread_and_a_client_keeps_its_endpoint() {
    let all = choose("cloud-1", json!({}), "edge-a1:1:r edge-a1:2:r edge-a2:1:r edge-a2:2:r");
    let mut counts = [0; 4];
    for key in 0..4000_u64 {
        let picked = all.pick(key).unwrap();
        counts[all.endpoints.iter().position(|e| e == picked).unwrap()] += 1;
    }
    assert_eq!(counts, [1000; 4]);
    let less = choose("cloud-1", json!({}), "edge-a1:1:r edge-a1:2:r edge-a2:1:r");
    let mut used = HashSet::new();
    for last in 0..200 {
        let client = IpAddr::from([10, 244, 4, last]);
        let before = all.pick_for_client(client, 0).unwrap();
        used.insert(before.address);
        // Only the clients of the endpoint that is gone move.
        if less.endpoints.contains(before) {
            assert_eq!(less.pick_for_client(client, 0).unwrap(), before);
        }
    }
    assert_eq!(used.len(), 4);
    let none = choose("cloud-1", json!({}), "");
    assert!(none.pick(7).is_none() && none.pick_for_client(IpAddr::from([10, 0, 0, 1]), 0).is_none());
}
