//! The agent's pages as text for people.

use serde_json::Value;

use crate::table::table;

/// A value's text; `-` where there is none.
fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) if text.is_empty() => "-".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(all) if all.is_empty() => "-".to_owned(),
        Value::Array(all) => all.iter().map(text).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    }
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// `80/TCP http`.
fn port(port: &Value) -> String {
    let name = text(&port["name"]);
    let name = if name == "-" { String::new() } else { format!(" {name}") };
    format!("{}/{}{name}", port["port"], text(&port["protocol"]))
}

fn omitted(page: &Value, what: &str) -> String {
    match page["omitted"].as_u64() {
        Some(count) if count > 0 => format!("and {count} more {what}\n"),
        _ => String::new(),
    }
}

/// `edgemesh services`.
pub(crate) fn services(page: &Value) -> String {
    let mut rows = Vec::new();
    for service in list(&page["services"]) {
        let name = format!("{}/{}", text(&service["namespace"]), text(&service["name"]));
        let head = [name, text(&service["kind"]), text(&service["clusterIPs"])];
        let mut ports = list(&service["ports"]).peekable();
        if ports.peek().is_none() {
            rows.push([&head[..], &["-".to_owned(), "-".to_owned(), "-".to_owned(), "-".to_owned()]].concat());
        }
        for one in ports {
            let ready = format!("{}/{}", one["ready"], one["endpoints"]);
            let chosen = format!("{} {}", one["chosen"], text(&one["tier"]).to_lowercase());
            let chosen = chosen.trim_end_matches(" -").to_owned();
            rows.push([&head[..], &[port(one), ready, chosen, text(&one["target"])]].concat());
        }
    }
    let header = ["SERVICE", "KIND", "ADDRESS", "PORT", "READY", "CHOSEN", "PROGRAMMED"];
    table(&header, &rows) + &omitted(page, "Services")
}

fn steps(steps: &Value) -> String {
    let mut rows = Vec::new();
    for step in list(steps) {
        let records: Vec<_> = list(&step["records"]).map(text).collect();
        let mut lines = records.into_iter();
        rows.push(vec![text(&step["name"]), text(&step["code"]), lines.next().unwrap_or_else(|| "-".to_owned())]);
        rows.extend(lines.map(|record| vec![String::new(), String::new(), record]));
    }
    table(&["NAME", "CODE", "RECORD"], &rows)
}

fn client(view: &Value) -> String {
    let who = match text(&view["pod"]).as_str() {
        "-" => format!("a process of the node, in namespace {}", text(&view["namespace"])),
        pod => format!("pod {pod} at {}", text(&view["address"])),
    };
    match text(&view["note"]).as_str() {
        "-" => who,
        note => format!("{who} ({note})"),
    }
}

/// `edgemesh resolve`.
pub(crate) fn resolve(page: &Value) -> String {
    format!("client: {}\n\n{}", client(&page["client"]), steps(&page["steps"]))
}

/// `edgemesh trace`.
pub(crate) fn trace(page: &Value) -> String {
    let service = &page["service"];
    let mut out = format!(
        "client:   {}\nnode:     {} (network {}, zone {})\nservice:  {}/{} {} {}\npolicies: {}\n\nDNS for {:?}\n{}",
        client(&page["client"]),
        text(&page["node"]),
        text(&page["network"]),
        text(&page["zone"]),
        text(&service["namespace"]),
        text(&service["name"]),
        text(&service["kind"]),
        text(&service["clusterIPs"]),
        text(&service["policies"]),
        text(&page["dns"]["name"]),
        steps(&page["dns"]["steps"]),
    );
    for one in list(&page["ports"]) {
        out.push_str(&format!("\nport {}: {}\n", port(one), verdict(one)));
        for address in list(&one["addresses"]) {
            let sticky = match &address["affinitySeconds"] {
                Value::Null => String::new(),
                seconds => format!(", a client keeps its endpoint for {seconds} s"),
            };
            let (frontend, target) = (text(&address["frontend"]), text(&address["target"]));
            out.push_str(&format!("programmed: {frontend} {target} {}{sticky}\n", text(&address["backends"])));
        }
        let rows: Vec<_> = list(&one["endpoints"]).map(endpoint).collect();
        out.push_str(&table(&["", "ENDPOINT", "POD", "NODE", "NETWORK", "STATE", "TIER", "REACH", "WHY"], &rows));
        out.push_str(&omitted(one, "endpoints"));
    }
    let counters = &page["counters"];
    out.push_str(&format!(
        "\ncalls from this node so far: {}; failed: {}; bytes through the agent: {}\n",
        counts(&counters["connections"]),
        counts(&counters["failures"]),
        counts(&counters["bytes"])
    ));
    out
}

fn counts(counts: &Value) -> String {
    let all = counts.as_object().into_iter().flatten();
    all.map(|(name, count)| format!("{} {count}", name.replace('_', " "))).collect::<Vec<_>>().join(", ")
}

/// In a few words, where calls to a port go.
fn verdict(port: &Value) -> String {
    let chosen = port["chosen"].as_u64().unwrap_or_default();
    match port["target"].as_str() {
        _ if chosen == 0 => "no endpoint may be used, calls are refused".to_owned(),
        Some("direct") => format!("directly to one of {chosen}"),
        Some("listener") => format!("through the agent to one of {chosen}"),
        Some("refuse") => "refused".to_owned(),
        _ => format!("no address is programmed; names lead to the endpoints, {chosen} would be chosen"),
    }
}

fn endpoint(endpoint: &Value) -> Vec<String> {
    let state = match (&endpoint["ready"], &endpoint["terminating"], &endpoint["serving"]) {
        (Value::Bool(true), ..) => "ready",
        (_, Value::Bool(true), Value::Bool(true)) => "terminating",
        (_, Value::Bool(true), _) => "ending",
        _ => "not ready",
    };
    let reach = match text(&endpoint["path"]).as_str() {
        "-" => text(&endpoint["reach"]),
        path => format!("tunnel, {path}"),
    };
    let why = match endpoint["ejectedSeconds"].as_f64() {
        Some(seconds) => format!("{}; passed over for {seconds:.0} s more", text(&endpoint["why"])),
        None => text(&endpoint["why"]),
    };
    let mark = if endpoint["chosen"] == true { "*" } else { "" };
    let cells = [&endpoint["address"], &endpoint["pod"], &endpoint["node"], &endpoint["network"]].map(text);
    let mut row = vec![mark.to_owned()];
    row.extend(cells);
    row.extend([state.to_owned(), text(&endpoint["tier"]).to_lowercase(), reach, why]);
    row
}

/// Whether calls to every port that was asked about have somewhere to go.
pub(crate) fn every_port_has_an_endpoint(page: &Value) -> bool {
    list(&page["ports"]).all(|port| port["chosen"].as_u64().is_some_and(|chosen| chosen != 0))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_trace_shows_what_was_chosen_and_why_the_rest_was_not() {
        let endpoint = |address: &str, chosen: bool, why: &str| {
            json!({"address": address, "pod": "default/web-1", "node": "b1", "network": "site-b", "ready": true, "serving": true,
                   "terminating": false, "tier": "Remote", "reach": "tunnel", "path": "relayed via cloud-1", "chosen": chosen, "why": why})
        };
        let mut far = endpoint("10.244.2.5:8080", false, "it could not be reached lately");
        far["ejectedSeconds"] = json!(3.4);
        let page = json!({
            "node": "a1", "network": "site-a", "zone": null, "client": {"pod": "default/shell", "address": "10.244.1.7"},
            "service": {"namespace": "default", "name": "web", "kind": "ClusterIP", "clusterIPs": ["10.96.0.20"], "policies": []},
            "dns": {"name": "web", "steps": [{"name": "web.default.svc.cluster.local.", "code": "NOERROR", "records": ["r 5 A 10.96.0.20"]}]},
            "ports": [{"name": "", "protocol": "TCP", "port": 80, "target": "listener", "chosen": 1,
                "addresses": [{"frontend": "10.96.0.20:80/tcp", "target": "listener", "backends": ["169.254.64.2:15001"]}],
                "endpoints": [endpoint("10.244.3.5:8080", true, "chosen"), far]}],
            "counters": {"connections": {"tunnel": 2}, "failures": {"unreachable": 1}, "bytes": {"to_client": 9}},
        });
        let shown = trace(&page);
        for part in [
            "client:   pod default/shell at 10.244.1.7",
            "port 80/TCP: through the agent to one of 1",
            "programmed: 10.96.0.20:80/tcp listener 169.254.64.2:15001",
            "*  10.244.3.5:8080",
            "tunnel, relayed via cloud-1",
            "it could not be reached lately; passed over for 3 s more",
            "tunnel 2; failed: unreachable 1; bytes through the agent: to client 9",
        ] {
            assert!(shown.contains(part), "{part:?} is not in\n{shown}");
        }
        assert!(every_port_has_an_endpoint(&page));
        // Those that are shown need not be all.
        let mut none = page.clone();
        none["ports"][0]["chosen"] = 0.into();
        assert!(!every_port_has_an_endpoint(&none) && trace(&none).contains("calls are refused"));
        none["ports"][0]["chosen"] = 300.into();
        assert!(every_port_has_an_endpoint(&none) && trace(&none).contains("to one of 300"));
    }

    #[test]
    fn services_have_a_line_for_each_port() {
        let page = json!({"services": [
            {"namespace": "default", "name": "web", "kind": "ClusterIP", "clusterIPs": ["10.96.0.20"], "ports": [
                {"name": "http", "port": 80, "protocol": "TCP", "endpoints": 3, "ready": 2, "chosen": 1, "tier": "Node", "target": "direct"},
                {"name": "dns", "port": 53, "protocol": "UDP", "endpoints": 0, "ready": 0, "chosen": 0, "tier": null, "target": "refuse"}]},
            {"namespace": "default", "name": "alias", "kind": "ExternalName", "clusterIPs": [], "ports": []},
        ], "omitted": 4});
        let shown = services(&page);
        let lines: Vec<_> = shown.lines().collect();
        assert_eq!(lines.len(), 5);
        assert!(
            lines[1].contains("80/TCP http") && lines[1].contains("2/3") && lines[1].ends_with("1 node  direct"),
            "{shown}"
        );
        assert!(lines[2].ends_with("refuse") && lines[3].starts_with("default/alias"), "{shown}");
        assert_eq!(lines[4], "and 4 more Services");
    }
}
