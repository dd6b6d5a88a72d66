//! The whole daemon, started as it is on a node: from its disk alone.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream, UdpSocket},
    path::Path,
    time::{Duration, Instant},
};

use edgemesh_agent::{
    app,
    config::{Config, DatapathMode},
};
use edgemesh_mesh::from_kubernetes::ServiceSelection;
use hickory_proto::{
    op::{Message, Query, ResponseCode},
    rr::RecordType,
};
use serde_json::{Value, json};

use crate::{
    sandbox::{Mode, Sandbox, in_both_modes, tcp_server},
    sites::until,
};

pub(crate) const POD: &str = "10.244.1.5:8080";

pub(crate) fn catalog() -> Value {
    let service = |name: &str, ip: &str, node_port: Option<u16>| {
        let mut port = json!({"port": 80, "protocol": "TCP", "targetPort": 8080});
        if let Some(node_port) = node_port {
            port["nodePort"] = node_port.into();
        }
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default"},
            "spec": {"clusterIP": ip, "clusterIPs": [ip], "type": node_port.map_or("ClusterIP", |_| "NodePort"), "ports": [port]},
        })
    };
    let slice = |service: &str, address: &str, node: &str| {
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": format!("{service}-1"), "namespace": "default",
                         "labels": {"kubernetes.io/service-name": service}},
            "ports": [{"port": 8080, "protocol": "TCP", "name": ""}],
            "endpoints": [{"addresses": [address], "nodeName": node, "conditions": {"ready": true}}],
        })
    };
    let node = |name: &str, network: &str, address: &str, range: &str| {
        json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": name, "labels": {"edgemesh.dev/network": network}},
            "spec": {"podCIDR": range, "podCIDRs": [range]},
            "status": {"addresses": [{"type": "InternalIP", "address": address}],
                       "conditions": [{"type": "Ready", "status": "True"}]},
        })
    };
    let mut here = service("here", "10.96.0.20", Some(30080));
    here["spec"]["externalIPs"] = json!(["192.168.1.11", "203.0.113.9"]);
    here["status"] = json!({"loadBalancer": {"ingress": [{"ip": "203.0.113.7"}]}});
    json!({"apiVersion": "v1", "kind": "List", "items": [
        here, slice("here", "10.244.1.5", "edge-a1"),
        service("there", "10.96.0.21", None), slice("there", "10.244.7.5", "edge-b1"),
        service("nowhere", "10.96.0.22", None),
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "talk", "namespace": "default"},
            "spec": {"clusterIP": "10.96.0.23", "ports": [{"port": 53, "protocol": "UDP"}]},
        }),
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": "talk-1", "namespace": "default", "labels": {"kubernetes.io/service-name": "talk"}},
            "ports": [{"port": 5353, "protocol": "UDP", "name": ""}],
            "endpoints": [{"addresses": ["10.244.1.5"], "nodeName": "edge-a1"}],
        }),
        node("edge-a1", "site-a", "192.168.1.11", "10.244.1.0/24"),
        node("edge-b1", "site-b", "192.168.2.11", "10.244.7.0/24"),
    ]})
}

pub(crate) fn admin(address: SocketAddr, path: &str) -> String {
    try_admin(address, path).unwrap()
}

/// A page of an admin endpoint that may not answer yet.
pub(crate) fn try_admin(address: SocketAddr, path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// What is answered when a pod asks for the IPv4 addresses of a name; nothing if nobody answers within 5 s.
fn answer(name: &str) -> Option<Message> {
    let mut query = Message::query();
    query.add_query(Query::query(name.parse().unwrap(), RecordType::A));
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    socket.send_to(&query.to_vec().unwrap(), "10.96.0.10:53").ok()?;
    let mut buffer = [0; 1500];
    let (length, from) = socket.recv_from(&mut buffer).ok()?;
    assert_eq!(from, "10.96.0.10:53".parse().unwrap());
    Some(Message::from_vec(&buffer[..length]).unwrap())
}

/// The IPv4 addresses of a name, as a pod asks for them.
fn lookup(name: &str) -> Vec<String> {
    answer(name).unwrap().answers.iter().map(|record| record.data.to_string()).collect()
}

/// A DNS server of the host that denies all names.
fn denying_upstream() -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 1500];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            // A response with "no such name": QR and RA are set, and the code is NXDOMAIN.
            (buffer[2], buffer[3]) = (buffer[2] | 0x80, 0x83);
            socket.send_to(&buffer[..length], from).unwrap();
        }
    });
    address
}

/// The pages that say what would be chosen, and why.
fn explains(address: SocketAddr) {
    let page = |path: &str| -> Value {
        let answer = admin(address, path);
        assert!(answer.starts_with("HTTP/1.1 200"), "{path}: {answer}");
        serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap()
    };
    let trace = page("/debug/trace?pod=default/shell&service=here&port=80");
    let port = &trace["ports"][0];
    assert_eq!((&port["target"], &port["tier"]), (&json!("direct"), &json!("Node")), "{trace}");
    assert_eq!(port["addresses"][0]["backends"], json!([POD]));
    assert_eq!((&port["endpoints"][0]["chosen"], &port["endpoints"][0]["reach"]), (&json!(true), &json!("local")));
    assert_eq!(trace["dns"]["steps"][0]["name"], "here.default.svc.cluster.local.");
    assert!(trace["dns"]["steps"][0]["records"][0].as_str().unwrap().ends_with("A 10.96.0.20"), "{trace}");
    assert!(trace["client"]["note"].is_string(), "no API says where the pod is: {trace}");
    let far = page("/debug/trace?pod=shell&service=there.default");
    let endpoint = &far["ports"][0]["endpoints"][0];
    assert_eq!((&endpoint["reach"], &endpoint["path"]), (&json!("tunnel"), &json!("no connection now")), "{far}");
    // A connection to it has failed above, and so it is passed over; as the only one it is used all the same.
    assert!(endpoint["ejectedSeconds"].is_number() && endpoint["chosen"] == true, "{far}");
    assert_ne!(far["counters"]["failures"]["unreachable"], 0, "{far}");
    assert_eq!(page("/debug/trace?pod=shell&service=nowhere")["ports"][0]["endpoints"], json!([]));
    let names = page("/debug/resolve?name=here.default&type=a&namespace=other");
    let codes: Vec<_> = names["steps"].as_array().unwrap().iter().map(|step| step["code"].as_str().unwrap()).collect();
    assert_eq!(codes.last(), Some(&"NOERROR"), "{names}");
    assert_eq!(names["found"], true);
    let services = page("/debug/services?namespace=default");
    let all = services["services"].as_array().unwrap();
    let here = all.iter().find(|service| service["name"] == "here").unwrap();
    assert_eq!((&here["ports"][0]["ready"], &here["ports"][0]["target"]), (&json!(1), &json!("direct")));
    for (path, status, word) in [
        ("/debug/trace?pod=shell", "400", "service"),
        ("/debug/trace?pod=shell&service=her", "404", "here.default"),
        ("/debug/trace?pod=shell&service=here&port=81", "404", "it has 80"),
        ("/debug/resolve?name=here&type=MX", "400", "SRV"),
        ("/debug/services?namespace=empty", "404", "empty"),
    ] {
        let answer = admin(address, path);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")) && answer.contains(word), "{path}: {answer}");
    }
}

/// Of an agent that starts from its disk.
pub(crate) fn config(sandbox: &Sandbox, data: &Path, datapath: DatapathMode) -> Config {
    // As main does; another test may have done so already.
    drop(rustls::crypto::ring::default_provider().install_default());
    let mut config = Config {
        data_dir: data.to_owned(),
        node_name: "edge-a1".to_owned(),
        api_server: Some("http://127.0.0.1:1".to_owned()),
        cgroup: sandbox.cgroup.clone(),
        bpffs: sandbox.bpffs.clone(),
        datapath,
        ..Config::default()
    };
    config.admin.listen = "127.0.0.1:0".parse().unwrap();
    config
}

in_both_modes! {
    the_agent_serves_services_from_its_disk_when_no_api_answers,
    source_ranges_of_a_load_balancer_hold_for_processes_of_the_host,
    with_neither_an_api_nor_a_copy_on_disk_cluster_names_fail_and_others_are_resolved,
}

fn source_ranges_of_a_load_balancer_hold_for_processes_of_the_host(mode: Mode) {
    let sandbox = Sandbox::new(&["10.244.1.5", "192.168.1.11"]);
    tcp_server(POD);
    crate::sandbox::ip("route add 203.0.113.0/24 dev lo src 192.168.1.11");
    let data = tempfile::tempdir().unwrap();
    std::fs::write(data.path().join("catalog.json"), catalog().to_string()).unwrap();
    let config = config(&sandbox, data.path(), mode.into());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let agent = runtime.block_on(async {
        let agent = app::build(config).await.unwrap();
        tokio::time::timeout(Duration::from_secs(10), agent.readiness.wait()).await.unwrap();
        agent
    });
    let mut here = catalog()["items"][0].clone();
    for (ranges, admitted) in [
        (json!(["198.51.100.0/24"]), false),
        (json!(["198.51.100.0/24", "192.168.1.0/24"]), true),
        (json!(["192.168.2.0/24"]), false),
        (json!(null), true),
    ] {
        here["spec"]["loadBalancerSourceRanges"] = ranges.clone();
        agent.catalog.apply_service(&serde_json::from_value(here.clone()).unwrap());
        agent.catalog.publish();
        let until = Instant::now() + Duration::from_secs(10);
        let call = || TcpStream::connect_timeout(&SocketAddr::from(([203, 0, 113, 7], 80)), Duration::from_millis(300));
        while call().is_ok() != admitted {
            assert!(Instant::now() < until, "{ranges}");
        }
        assert!(TcpStream::connect("192.168.1.11:80").is_ok(), "an external address is another matter");
    }
    runtime.block_on(agent.stop());
}

fn with_neither_an_api_nor_a_copy_on_disk_cluster_names_fail_and_others_are_resolved(mode: Mode) {
    let sandbox = Sandbox::new(&["10.244.1.5", "192.168.1.11"]);
    let data = tempfile::tempdir().unwrap();
    let mut config = config(&sandbox, data.path(), mode.into());
    config.dns.upstreams = vec![denying_upstream().to_string()];
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let agent = runtime.block_on(app::build(config)).unwrap();
    let code = |name: &str| answer(name).map(|answer| answer.metadata.response_code);
    let cluster_name = "here.default.svc.cluster.local.";
    until("the cluster DNS address", || code(cluster_name) == Some(ResponseCode::ServFail));
    // The upstream's own word: the agent would say SERVFAIL.
    assert_eq!(code("outside.example."), Some(ResponseCode::NXDomain));
    assert!(admin(agent.admin, "/readyz").starts_with("HTTP/1.1 503"), "there is no catalog");
    runtime.block_on(agent.stop());
}

fn the_agent_serves_services_from_its_disk_when_no_api_answers(mode: Mode) {
    let sandbox = Sandbox::new(&["10.244.1.5", "192.168.1.11"]);
    let ebpf = mode == Mode::Ebpf;
    tcp_server(POD);
    let data = tempfile::tempdir().unwrap();
    std::fs::write(data.path().join("catalog.json"), catalog().to_string()).unwrap();
    let config = config(&sandbox, data.path(), if ebpf { DatapathMode::Auto } else { DatapathMode::Nftables });
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let agent = runtime.block_on(async {
        let agent = app::build(config.clone()).await.unwrap();
        tokio::time::timeout(Duration::from_secs(10), agent.readiness.wait()).await.unwrap();
        agent
    });
    assert!(admin(agent.admin, "/readyz").starts_with("HTTP/1.1 200"));
    // What is sent to 127.0.0.1 can't be sent on by rules.
    let node_ports: &[&str] = if ebpf { &["192.168.1.11:30080", "127.0.0.1:30080"] } else { &["192.168.1.11:30080"] };
    for address in node_ports.iter().copied().chain(["10.96.0.20:80", "192.168.1.11:80", "203.0.113.7:80"]) {
        let mut stream = TcpStream::connect(address).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, POD, "{address}");
    }
    let not_the_hosts = TcpStream::connect("203.0.113.9:80").unwrap_err();
    assert_eq!(not_the_hosts.kind(), std::io::ErrorKind::NetworkUnreachable, "an external address of another host");
    assert_eq!(lookup("here.default.svc.cluster.local."), ["10.96.0.20"], "by the cluster DNS address");
    // The pod's node has published no peer: the agent takes the connection for it, and ends it.
    let mut far = TcpStream::connect("10.96.0.21:80").unwrap();
    far.set_read_timeout(Some(Duration::from_secs(15))).unwrap();
    assert!(matches!(far.read(&mut [0; 1]), Ok(0) | Err(_)));
    let refused = TcpStream::connect("10.96.0.22:80").unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::HostUnreachable);

    let page = admin(agent.admin, "/debug/datapath");
    let page: Value = serde_json::from_str(page.split_once("\r\n\r\n").unwrap().1).unwrap();
    let target = |frontend: &str| {
        let frontends = page["frontends"].as_array().unwrap();
        frontends.iter().find(|entry| entry["frontend"] == frontend).cloned().unwrap_or_default()
    };
    assert_eq!(page["network"], "site-a");
    assert_eq!(page["datapath"], if ebpf { "ebpf" } else { "nftables" });
    assert!(page["reason"].is_string());
    assert_eq!(target("10.96.0.20:80/tcp")["target"], "direct");
    assert_eq!(target("10.96.0.21:80/tcp")["target"], "listener", "its pod is in another network");
    assert_eq!(target("10.96.0.22:80/tcp")["target"], "refuse");
    assert_eq!(target("10.96.0.10:53/udp")["backends"], json!(["169.254.64.1:53"]));
    explains(agent.admin);
    let metrics = admin(agent.admin, "/metrics");
    let mode_line = format!("edgemesh_agent_datapath_mode{{mode=\"{}\"}} 1", if ebpf { "ebpf" } else { "nftables" });
    let listeners = "edgemesh_agent_datapath_frontends{target=\"listener\"} 3";
    for line in [listeners, mode_line.as_str(), "edgemesh_agent_datapath_outside_frontends 3"] {
        assert!(metrics.contains(line), "{line} is not in {metrics}");
    }
    assert!(!ebpf || metrics.contains("edgemesh_agent_socket_tcp_connects_total 6"), "{metrics}");
    // The endpoint of a connected UDP socket is deleted: the socket is told, and the next one has nowhere to go.
    let talk = UdpSocket::bind("0.0.0.0:0").unwrap();
    talk.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    talk.connect("10.96.0.23:53").unwrap();
    agent.catalog.delete_endpoint_slice("default", "talk-1");
    agent.catalog.publish();
    if ebpf {
        assert_eq!(talk.recv(&mut [0; 1]).unwrap_err().kind(), std::io::ErrorKind::ConnectionAborted);
    } else {
        // Rules follow flows, not sockets: it can send on, to where the Service leads then.
        let until = std::time::Instant::now() + Duration::from_secs(5);
        while talk.connect("10.96.0.23:53").is_ok() {
            assert!(std::time::Instant::now() < until, "its endpoint was deleted");
        }
    }
    assert_eq!(talk.connect("10.96.0.23:53").unwrap_err().kind(), std::io::ErrorKind::HostUnreachable);
    let ended = "edgemesh_agent_datapath_sockets_destroyed_total{protocol=\"udp\"} 1";
    let until = std::time::Instant::now() + Duration::from_secs(5);
    while ebpf && !admin(agent.admin, "/metrics").contains(ended) {
        assert!(std::time::Instant::now() < until, "{}", admin(agent.admin, "/metrics"));
    }

    let open = TcpStream::connect("10.96.0.20:80").unwrap();
    runtime.block_on(agent.stop());
    assert!(data.path().join("node-local.json").exists());
    let serves = || {
        let mut stream = TcpStream::connect("10.96.0.20:80").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, POD);
    };
    serves();

    // The next agent takes over; this one is told to leave nothing.
    let agent = runtime.block_on(async {
        let agent = app::build(Config { detach_on_stop: true, ..config.clone() }).await.unwrap();
        tokio::time::timeout(Duration::from_secs(10), agent.readiness.wait()).await.unwrap();
        agent
    });
    serves();
    assert_eq!(open.peer_addr().unwrap(), "10.96.0.20:80".parse().unwrap());
    let metrics = admin(agent.admin, "/metrics");
    // The endpoint that the first agent saw deleted is in the copy on disk again: its address, and nothing else, is written.
    assert!(!ebpf || metrics.contains("edgemesh_agent_datapath_changes_total 1\n"), "{metrics}");
    runtime.block_on(agent.stop());
    assert!(TcpStream::connect("10.96.0.20:80").is_err(), "the programs are gone");
}

#[test]
fn services_for_which_the_maps_have_no_room_hold_up_no_others() {
    let sandbox = Sandbox::new(&["10.244.1.5", "192.168.1.11"]);
    tcp_server(POD);
    let data = tempfile::tempdir().unwrap();
    let mut catalog = catalog();
    let crowd = |addresses: std::ops::Range<u8>| {
        let endpoint = |number| json!({"addresses": [format!("10.244.1.{number}")], "nodeName": "edge-a1"});
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": "crowd-1", "namespace": "default", "labels": {"kubernetes.io/service-name": "crowd"}},
            "ports": [{"port": 8080, "protocol": "TCP", "name": ""}],
            "endpoints": addresses.map(endpoint).collect::<Vec<_>>(),
        })
    };
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "crowd", "namespace": "default"},
        "spec": {"clusterIP": "10.96.0.30", "ports": [{"port": 80}]},
    });
    catalog["items"].as_array_mut().unwrap().extend([service, crowd(5..25)]);
    // Nothing but the failure itself has the agent look again: the host's addresses don't matter, nor what answers.
    catalog["items"][0]["spec"].as_object_mut().unwrap().remove("externalIPs");
    std::fs::write(data.path().join("catalog.json"), catalog.to_string()).unwrap();
    let config =
        Config { backend_slots: 16, island_check_seconds: 0, ..config(&sandbox, data.path(), DatapathMode::Ebpf) };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let agent = runtime.block_on(async {
        let agent = app::build(Config { detach_on_stop: true, ..config }).await.unwrap();
        tokio::time::timeout(Duration::from_secs(10), agent.readiness.wait()).await.unwrap();
        agent
    });
    let call = |address: &str| {
        let mut answer = String::new();
        TcpStream::connect(address).and_then(|mut stream| stream.read_to_string(&mut answer)).map(|_| answer)
    };
    assert_eq!(call("10.96.0.20:80").unwrap(), POD);
    call("10.96.0.30:80").unwrap_err();
    let failures = || -> u32 {
        let metrics = admin(agent.admin, "/metrics");
        let count = metrics.lines().find_map(|line| line.strip_prefix("edgemesh_agent_datapath_failures_total "));
        count.unwrap().parse().unwrap()
    };
    assert!(failures() >= 1);
    let metrics = admin(agent.admin, "/metrics");
    assert!(metrics.contains("backend_slots{family=\"ipv4\",state=\"free\"}"), "{metrics}");
    // What changes meanwhile, and fits, does not put the others off: as soon as another gives room they are served.
    let mut filler = crowd(5..13);
    filler["metadata"] =
        json!({"name": "filler-1", "namespace": "default", "labels": {"kubernetes.io/service-name": "filler"}});
    let of_filler = json!({"metadata": {"name": "filler", "namespace": "default"},
        "spec": {"clusterIP": "10.96.0.31", "ports": [{"port": 80}]}});
    agent.catalog.apply_service(&serde_json::from_value(of_filler).unwrap());
    agent.catalog.apply_endpoint_slice(&serde_json::from_value(filler).unwrap());
    agent.catalog.publish();
    let until = std::time::Instant::now() + Duration::from_secs(10);
    while call("10.96.0.31:80").ok().as_deref() != Some(POD) {
        assert!(std::time::Instant::now() < until);
    }
    // Eight of sixteen slots are taken: five more, which need eight, have no room beside those of the others.
    let before = failures();
    agent.catalog.apply_endpoint_slice(&serde_json::from_value(crowd(5..10)).unwrap());
    agent.catalog.publish();
    let until = std::time::Instant::now() + Duration::from_secs(10);
    while failures() == before {
        assert!(std::time::Instant::now() < until);
    }
    agent.catalog.delete_endpoint_slice("default", "filler-1");
    agent.catalog.publish();
    let until = std::time::Instant::now() + Duration::from_secs(30);
    while call("10.96.0.30:80").is_err() {
        assert!(std::time::Instant::now() < until, "it has room now");
        std::thread::sleep(Duration::from_millis(100));
    }
    // It shrinks, and fits.
    agent.catalog.apply_endpoint_slice(&serde_json::from_value(crowd(5..6)).unwrap());
    agent.catalog.publish();
    let until = std::time::Instant::now() + Duration::from_secs(10);
    while call("10.96.0.30:80").ok().as_deref() != Some(POD) {
        assert!(std::time::Instant::now() < until);
    }
    runtime.block_on(agent.stop());
}

#[test]
fn where_services_are_taken_in_by_label_the_others_are_left_to_whoever_serves_them() {
    let sandbox = Sandbox::new(&["10.244.1.5", "192.168.1.11"]);
    tcp_server(POD);
    let data = tempfile::tempdir().unwrap();
    let mut catalog = catalog();
    catalog["items"][0]["metadata"]["labels"] = json!({"edgemesh.dev/proxy": "true"});
    std::fs::write(data.path().join("catalog.json"), catalog.to_string()).unwrap();
    let config = Config {
        services: ServiceSelection::Labelled,
        detach_on_stop: true,
        ..config(&sandbox, data.path(), DatapathMode::Ebpf)
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let agent = runtime.block_on(async {
        let agent = app::build(config).await.unwrap();
        tokio::time::timeout(Duration::from_secs(10), agent.readiness.wait()).await.unwrap();
        agent
    });
    let mut answer = String::new();
    TcpStream::connect("10.96.0.20:80").unwrap().read_to_string(&mut answer).unwrap();
    assert_eq!(answer, POD);
    let left = TcpStream::connect("10.96.0.22:80").unwrap_err();
    assert_eq!(left.kind(), std::io::ErrorKind::NetworkUnreachable, "the kernel's own answer");
    assert_eq!(lookup("nowhere.default.svc.cluster.local."), ["10.96.0.22"]);
    runtime.block_on(agent.stop());
}
