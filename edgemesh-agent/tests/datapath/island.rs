//! While the cloud is away: endpoints that die leave, and those that return rejoin, with nobody to write EndpointSlices.

use std::{
    io::{BufRead, BufReader, ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use edgemesh_tunnel::{Carried, NO_ENDPOINT, StreamHeader, StreamTarget};
use hickory_proto::rr::RecordType;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::sites::{CLUSTER_DNS, Host, POD_A, POD_B, Sites, addresses_of, call, counting_server, node, to, until};

const VIP: &str = "10.96.0.30";
const API: &str = "127.0.0.1:10551";

/// A Service and a headless one, each with a pod on both nodes.
fn services() -> Vec<Value> {
    let mut objects = Vec::new();
    for (name, ip) in [("web", VIP), ("names", "None")] {
        objects.push(json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default"},
            "spec": {"clusterIP": ip, "clusterIPs": [ip], "ports": [{"port": 80, "protocol": "TCP"}]},
        }));
        let endpoint = |pod: &str, node| json!({"addresses": [pod], "nodeName": node, "conditions": {"ready": true}});
        objects.push(json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": name, "namespace": "default", "labels": {"kubernetes.io/service-name": name}},
            "ports": [{"port": 8080, "protocol": "TCP", "name": ""}],
            "endpoints": [endpoint(POD_A[0], "a"), endpoint(POD_B[0], "b")],
        }));
    }
    objects
}

/// A server that ends, with its port, when this is dropped.
struct Stoppable(Arc<AtomicBool>, Option<thread::JoinHandle<()>>);

impl Stoppable {
    fn start(at: &Host) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = stop.clone();
        let thread = at.run(move || {
            let listener = TcpListener::bind(to(POD_A[0], 8080)).unwrap();
            listener.set_nonblocking(true).unwrap();
            thread::spawn(move || {
                while !seen.load(Ordering::Relaxed) {
                    match listener.accept() {
                        Ok((mut stream, _)) => {
                            stream.set_nonblocking(false).unwrap();
                            thread::spawn(move || {
                                let _ = stream.read_to_end(&mut Vec::new());
                                let _ = stream.write_all(b"pod a");
                            });
                        }
                        Err(_) => thread::sleep(Duration::from_millis(5)),
                    }
                }
            })
        });
        Self(stop, Some(thread))
    }
}

impl Drop for Stoppable {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
        drop(self.1.take().map(thread::JoinHandle::join));
    }
}

/// A metaserver that is in step with the cloud and knows nothing else.
fn cloud(at: &Host) {
    at.run(|| {
        let listener = TcpListener::bind(API).unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
                let request = lines.next().unwrap_or_default();
                lines.take_while(|line| !line.is_empty()).for_each(drop);
                let (status, body) = if request.contains("/edgemesh/v1/cloud") {
                    ("200 OK", "{\"connected\":true}")
                } else {
                    ("503 Service Unavailable", "")
                };
                let length = body.len();
                let head = format!("HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {length}");
                let _ = write!(stream, "{head}\r\nconnection: close\r\n\r\n{body}");
            }
        });
    });
}

/// The addresses of the headless Service, as a pod finds them.
fn addresses_of_names(from: &Host) -> Vec<String> {
    let mut found = addresses_of(from, CLUSTER_DNS, "names.default.svc.cluster.local.", RecordType::A);
    found.sort();
    found
}

#[test]
fn dead_endpoints_leave_and_return_while_the_cloud_is_away_and_its_word_counts_when_it_is_back() {
    let sites = Sites::start(&services(), |config| {
        config.api_server = Some(format!("http://{API}"));
        config.island_check_seconds = 1;
    });
    sites.move_node("b", "site-a");
    counting_server(&sites.b.pod, 8080, "pod b");
    let server = Stoppable::start(&sites.a.pod);
    let vip: SocketAddr = to(VIP, 80);
    let answers = |wanted: &str| call(&sites.a.host, vip, 1).is_ok_and(|answer| answer == wanted);
    let names = || addresses_of_names(&sites.a.pod);
    until("the pod of this node", || answers("pod a"));
    until("the cloud to be missed", || sites.a.metric("edgemesh_agent_island_active") == 1);
    assert_eq!(names(), [POD_A[0], POD_B[0]]);

    drop(server);
    until("the pod of the other node", || answers("pod b 1"));
    until("the name without the dead pod", || names() == [POD_B[0]]);
    assert_eq!(sites.a.metric("edgemesh_agent_island_endpoints{state=\"dead\"}"), 1);
    assert!(
        sites.a.admin("/debug/island").contains("\"10.244.1.5:8080\": \"dead\""),
        "{}",
        sites.a.admin("/debug/island")
    );

    sites.b.host.run(|| crate::sandbox::ip("link set wan-b down"));
    until("nobody to be left", || {
        call(&sites.a.host, vip, 1).is_err_and(|error| error.kind() == ErrorKind::HostUnreachable)
            && sites.a.metric("edgemesh_agent_island_endpoints{state=\"dead\"}") == 2
    });
    sites.b.host.run(|| crate::sandbox::ip("link set wan-b up"));
    until("the neighbour to be back", || answers("pod b 1"));

    let server = Stoppable::start(&sites.a.pod);
    until("the pod of this node to be back", || answers("pod a"));
    until("both names", || names() == [POD_A[0], POD_B[0]]);

    drop(server);
    until("the pod of the other node", || answers("pod b 1"));
    cloud(&sites.a.host);
    until("the cloud to be back", || sites.a.metric("edgemesh_agent_island_active") == 0);
    // It says that the pod of this node is ready.
    until("its word", || call(&sites.a.host, vip, 1).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused));
    assert_eq!(names(), [POD_A[0], POD_B[0]]);
}

#[test]
fn an_agent_that_starts_on_an_island_gives_no_connections_to_what_the_one_before_found_dead() {
    // As the copy on disk has it: there is nobody to tell the agent anything after its start.
    let objects = [services(), vec![node("b", "site-a")]].concat();
    let mut sites = Sites::start(&objects, |config| {
        config.api_server = Some(format!("http://{API}"));
        config.island_check_seconds = 1;
    });
    counting_server(&sites.b.pod, 8080, "pod b");
    let vip: SocketAddr = to(VIP, 80);
    let answer = |sites: &Sites| call(&sites.a.host, vip, 1);
    let answers = |sites: &Sites, wanted: &str| answer(sites).is_ok_and(|answer| answer == wanted);
    let names = |sites: &Sites| addresses_of_names(&sites.a.pod);
    let is_island = |sites: &Sites, wanted| sites.a.metric("edgemesh_agent_island_active") == wanted;
    // Nobody listens at the pod of a.
    until("the pod of the other node", || answers(&sites, "pod b 1"));
    for _ in 0..2 {
        sites.a.stop();
        sites.a.start();
        for _ in 0..50 {
            assert_eq!(answer(&sites).unwrap(), "pod b 1");
        }
        assert_eq!(names(&sites), [POD_B[0]]);
        // The file of the second run is by its own checks.
        until("own checks", || is_island(&sites, 1) && sites.a.admin("/debug/island").contains("\"checked\": 2"));
    }
    let server = Stoppable::start(&sites.a.pod);
    until("the pod of this node to be back", || answers(&sites, "pod a"));
    drop(server);
    until("the pod of the other node again", || answers(&sites, "pod b 1"));

    cloud(&sites.a.host);
    until("the cloud to be back", || is_island(&sites, 0));
    sites.a.stop();
    sites.a.start();
    let refused = answer(&sites).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "what the cloud says counts: the pod is ready");
}

#[test]
fn pods_with_udp_ports_only_leave_when_they_are_gone_and_not_when_they_never_answered() {
    let endpoint = |pod: &str, node| json!({"addresses": [pod], "nodeName": node, "conditions": {"ready": true}});
    let objects = [
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "names", "namespace": "default"},
            "spec": {"clusterIP": "None", "clusterIPs": ["None"], "ports": [{"port": 5353, "protocol": "UDP"}]},
        }),
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": "names", "namespace": "default", "labels": {"kubernetes.io/service-name": "names"}},
            "ports": [{"port": 5353, "protocol": "UDP", "name": ""}],
            "endpoints": [endpoint(POD_A[0], "a"), endpoint(POD_B[0], "b")],
        }),
    ];
    let sites = Sites::start(&objects, |config| config.island_check_seconds = 1);
    sites.move_node("b", "site-a");
    let names = || addresses_of_names(&sites.a.pod);
    let checks = |result| sites.a.metric(&format!("edgemesh_agent_island_checks_total{{result=\"{result}\"}}"));
    // Only UDP gets to the pod of b, as a policy can have it.
    nft(&sites.b.pod, "table ip t { chain c { type filter hook input priority 0; meta l4proto tcp drop; }; }");
    until("the cloud to be missed", || sites.a.metric("edgemesh_agent_island_active") == 1);
    until("more silence than would be enough", || checks("failed") > 3);
    assert_eq!(names(), [POD_A[0], POD_B[0]]);
    nft(&sites.b.pod, "delete table ip t");
    let before = checks("answered");
    until("both to answer", || checks("answered") > before + 3);

    sites.b.host.run(|| crate::sandbox::ip("link set wan-b down"));
    until("the name without the pod that is cut off", || names() == [POD_A[0]]);
    sites.a.pod.run(|| crate::sandbox::ip("link set eth0 down"));
    let dead = "edgemesh_agent_island_endpoints{state=\"dead\"}";
    until("the pod of this node to be dead, too", || sites.a.metric(dead) == 2);
    sites.b.host.run(|| crate::sandbox::ip("link set wan-b up"));
    sites.a.pod.run(|| crate::sandbox::ip("link set eth0 up"));
    sites.a.pod.run(|| crate::sandbox::ip("route add default via 10.244.1.1"));
    until("both names", || names() == [POD_A[0], POD_B[0]]);
    assert_eq!(sites.a.metric("edgemesh_agent_island_endpoints{state=\"back\"}"), 0);
}

/// Connections of this host to the pod of b fail; those that it forwards don't.
const NO_WAY_TO_B: &str = "table ip t { chain c { type filter hook output priority 0; \
                           ip daddr 10.244.7.5 tcp dport 8080 reject with tcp reset; }; }";

/// Runs `nft` on a host.
fn nft(at: &Host, arguments: &'static str) {
    at.run(move || crate::outside::nft(arguments));
}

/// Sends bytes as a report of node b to node a, and gives the answer.
fn report_of_b(sites: &Sites, bytes: &[u8]) -> std::io::Result<u8> {
    let header = StreamHeader {
        target: StreamTarget::Island,
        protocol: Carried::Tcp,
        endpoint: NO_ENDPOINT,
        source: String::new(),
    };
    sites.b.runtime().block_on(async {
        let mut stream = sites.b.agent().overlay.tunnel().open("a", &header).await.map_err(std::io::Error::other)?;
        stream.write_all(bytes).await?;
        stream.shutdown().await?;
        stream.read_u8().await
    })
}

#[test]
fn a_node_of_the_network_is_believed_about_its_own_endpoints_until_it_is_silent() {
    let mut sites = Sites::start(&services(), |config| config.island_check_seconds = 1);
    sites.move_node("b", "site-a");
    counting_server(&sites.a.pod, 8080, "pod a");
    counting_server(&sites.b.pod, 8080, "pod b");
    let names = |sites: &Sites| addresses_of_names(&sites.a.pod);
    let page = |sites: &Sites, wanted: &str| sites.a.admin("/debug/island").contains(wanted);
    // Node a can't connect to the pod of b: only b itself can.
    nft(&sites.a.host, NO_WAY_TO_B);
    until("both to be islands", || {
        [&sites.a, &sites.b].iter().all(|site| site.metric("edgemesh_agent_island_active") == 1)
    });
    until("a to follow b", || page(&sites, "\"10.244.7.5:8080\": \"as known\"") && page(&sites, "\"checked\": 1"));
    until("the pod of b to be there", || names(&sites) == [POD_A[0], POD_B[0]]);

    // Now the other way round: everybody but b can connect.
    nft(&sites.a.host, "delete table ip t");
    nft(&sites.b.host, NO_WAY_TO_B);
    until("a to learn that it is dead", || names(&sites) == [POD_A[0]]);
    assert!(page(&sites, "\"10.244.7.5:8080\": \"dead\""), "{}", sites.a.admin("/debug/island"));
    nft(&sites.b.host, "delete table ip t");
    until("a to learn that it is back", || names(&sites) == [POD_A[0], POD_B[0]]);

    // What b says of the pod of a counts for nothing.
    let forged = [1, 0, 1, 4, 10, 244, 1, 5, 0x1f, 0x90, 0];
    assert_eq!(report_of_b(&sites, &forged).unwrap(), 1);
    assert_eq!(sites.a.metric("edgemesh_agent_island_reports_total{result=\"foreign\"}"), 1);
    let checks = || sites.a.metric("edgemesh_agent_island_checks_total{result=\"answered\"}");
    let before = checks();
    until("a few rounds", || checks() > before + 4);
    assert_eq!(names(&sites), [POD_A[0], POD_B[0]]);
    assert!(report_of_b(&sites, &[9, 0, 0]).is_err());
    assert_eq!(sites.a.metric("edgemesh_agent_island_reports_total{result=\"malformed\"}"), 1);

    // Held dead by its own node, which then says nothing any more: own checks find the pod.
    nft(&sites.b.host, NO_WAY_TO_B);
    until("a to learn that it is dead", || names(&sites) == [POD_A[0]]);
    sites.b.stop();
    until("the report to be forgotten", || page(&sites, "\"reports\": {}"));
    until("own checks to find the pod", || names(&sites) == [POD_A[0], POD_B[0]]);
    assert!(page(&sites, "\"checked\": 2"));
}
