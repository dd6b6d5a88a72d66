//! An endpoint that swallows SYNs while the API calls it ready: others get its connections until it answers again.

use std::{net::TcpStream, thread};

use serde_json::{Value, json};

use crate::{
    outside::nft,
    sandbox::{Mode, in_both_modes},
    sites::{DEADLINE, Host, POD_A, Site, Sites, call, counting_server, to, until},
};

/// A Service of two endpoints, by IPv4 and by IPv6.
const BOTH: [&str; 2] = ["10.96.0.30", "fd00:96::30"];
/// A Service of an endpoint that falls silent, and how a dual-stack socket names it.
const ONE: [&str; 2] = ["10.96.0.31", "::ffff:10.96.0.31"];
const SILENT: &str = "edgemesh_agent_datapath_silent_endpoints";

in_both_modes!(an_endpoint_that_swallows_syns_is_passed_over_until_it_answers);

/// A Service with endpoints at some ports of pod a, in as many families as it has addresses.
fn service(name: &str, ips: &[&str], ports: &[u16]) -> Vec<Value> {
    let mut objects = vec![json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default"},
        "spec": {"clusterIP": ips[0], "clusterIPs": ips, "ports": [{"port": 80, "protocol": "TCP"}]},
    })];
    for (pod, kind) in POD_A.into_iter().zip(["IPv4", "IPv6"]).take(ips.len()) {
        objects.extend(ports.iter().map(|port| {
            json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": kind,
                "metadata": {"name": format!("{name}-{kind}-{port}").to_lowercase(), "namespace": "default",
                             "labels": {"kubernetes.io/service-name": name}},
                "ports": [{"port": port, "protocol": "TCP", "name": ""}],
                "endpoints": [{"addresses": [pod], "nodeName": "a", "conditions": {"ready": true}}],
            })
        }));
    }
    objects
}

/// Has a pod drop all TCP segments to all endpoints but the first, or take them again.
fn silence(pod: &Host, silent: bool) {
    let rules = if silent {
        "table inet silence { chain in { type filter hook input priority 0; tcp dport 8081-8082 drop; }; }"
    } else {
        "delete table inet silence"
    };
    pod.run(move || nft(rules));
}

/// Calls a Service until both of its endpoints have answered.
fn reach_both(site: &Site, ip: &str) {
    for wanted in ["first 1", "second 1"] {
        until(wanted, || call(&site.host, to(ip, 80), 1).is_ok_and(|answer| answer == wanted));
    }
}

/// Begins calls of the Service: so many that some meet the silent endpoint, where they wait.
fn begin_calls(site: &Site, ip: &'static str) {
    site.host.run(move || {
        for _ in 0..32 {
            thread::spawn(move || TcpStream::connect_timeout(&to(ip, 80), DEADLINE));
        }
    });
}

fn an_endpoint_that_swallows_syns_is_passed_over_until_it_answers(mode: Mode) {
    let mut objects = service("both", &BOTH, &[8080, 8081]);
    objects.extend(service("one", &ONE[..1], &[8082]));
    let sites = Sites::start(&objects, |config| {
        config.silent_check_seconds = 2;
        config.island_check_seconds = 0;
        config.datapath = mode.into();
    });
    counting_server(&sites.a.pod, 8080, "first");
    counting_server(&sites.a.pod, 8081, "second");
    counting_server(&sites.a.pod, 8082, "only");
    for ip in BOTH {
        reach_both(&sites.a, ip);
    }
    assert_eq!(sites.a.metric(SILENT), 0);

    silence(&sites.a.pod, true);
    for (known, ip) in (1..).zip([BOTH[0], BOTH[1], ONE[1]]) {
        begin_calls(&sites.a, ip);
        until("the silent endpoint to be known", || sites.a.metric(SILENT) == known);
    }
    for ip in BOTH {
        for _ in 0..20 {
            assert_eq!(call(&sites.a.host, to(ip, 80), 1).unwrap(), "first 1");
        }
    }
    let trace: Value = page(&sites.a, "/debug/trace?pod=x&service=both");
    let endpoints = trace["ports"][0]["endpoints"].as_array().unwrap();
    let silent = json!(to(POD_A[0], 8081));
    let endpoint = endpoints.iter().find(|endpoint| endpoint["address"] == silent).unwrap();
    assert_eq!((&endpoint["chosen"], &endpoint["silent"]), (&json!(false), &json!(true)), "{trace}");
    // Where there is no other it is used all the same: the guess may be wrong.
    let trace = page(&sites.a, "/debug/trace?pod=x&service=one");
    assert_eq!(trace["ports"][0]["addresses"][0]["backends"], json!([to(POD_A[0], 8082)]), "{trace}");

    silence(&sites.a.pod, false);
    until("the endpoint to be back", || sites.a.metric(SILENT) == 0);
    for ip in BOTH {
        reach_both(&sites.a, ip);
    }
    assert_eq!(sites.a.metric("edgemesh_agent_datapath_turned_silent_total"), 3);
}

fn page(site: &Site, path: &'static str) -> Value {
    let answer = site.admin(path);
    serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap()
}
