//! Two sites: hosts in network namespaces of their own, with a pod each and an agent each, that reach one another but not one
//! another's pods.

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    process::Command,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use edgemesh_agent::{
    app::{self, Bound},
    config::Config,
};
use edgemesh_api::{MeshNode, MeshNodeSpec, MeshPeer};
use hickory_proto::{
    op::{Message, Query},
    rr::RecordType,
};
use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::runtime::Runtime;

use crate::sandbox::{Sandbox, ip};

/// The cluster DNS address.
pub(crate) const CLUSTER_DNS: &str = "10.96.0.10";
/// What takes longer doesn't work.
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);
/// The pods, by IPv4 and IPv6.
pub(crate) const POD_A: [&str; 2] = ["10.244.1.5", "fd00:1::5"];
pub(crate) const POD_B: [&str; 2] = ["10.244.7.5", "fd00:7::5"];

type Job = Box<dyn FnOnce() + Send>;

/// A thread in a network namespace of its own, which does what it is told.
pub(crate) struct Host {
    jobs: mpsc::Sender<Job>,
    thread: nix::unistd::Pid,
}

impl Host {
    pub(crate) fn new() -> Self {
        let (jobs, work) = mpsc::channel::<Job>();
        let (tell, told) = mpsc::channel();
        thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            ip("link set lo up");
            tell.send(nix::unistd::gettid()).unwrap();
            for job in work {
                job();
            }
        });
        Self { jobs, thread: told.recv().unwrap() }
    }

    /// Does work in the namespace, and waits for it.
    pub(crate) fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let (tell, told) = mpsc::channel();
        let job = move || drop(tell.send(catch_unwind(AssertUnwindSafe(work))));
        self.jobs.send(Box::new(job)).unwrap();
        told.recv().unwrap().unwrap_or_else(|panic| resume_unwind(panic))
    }

    fn ip(&self, commands: &[&str]) {
        let commands: Vec<String> = commands.iter().map(|&command| command.to_owned()).collect();
        self.run(move || commands.iter().for_each(|command| ip(command)));
    }
}

/// A host with a pod, and an agent on it.
pub(crate) struct Site {
    pub(crate) name: &'static str,
    pub(crate) host: Host,
    pub(crate) pod: Host,
    config: Config,
    running: Option<(Runtime, Bound)>,
    _data: TempDir,
}

/// Both sites.
pub(crate) struct Sites {
    pub(crate) a: Site,
    pub(crate) b: Site,
    _sandbox: Sandbox,
}

impl Sites {
    /// Starts both agents with a catalog on their disks, and has them know each other.
    pub(crate) fn start(more: &[Value], change: impl Fn(&mut Config)) -> Self {
        let sandbox = Sandbox::new(&[]);
        drop(rustls::crypto::ring::default_provider().install_default());
        let child = sandbox.child_cgroup();
        let mut items = vec![node("a", "site-a"), node("b", "site-b")];
        items.extend_from_slice(more);
        let catalog = json!({"apiVersion": "v1", "kind": "List", "items": items}).to_string();
        let site = |name: &'static str, cgroup| {
            let data = tempfile::tempdir().unwrap();
            std::fs::write(data.path().join("catalog.json"), &catalog).unwrap();
            let mut config = Config {
                data_dir: data.path().to_owned(),
                node_name: name.to_owned(),
                api_server: Some("http://127.0.0.1:1".to_owned()),
                cgroup,
                bpffs: sandbox.bpffs.clone(),
                detach_on_stop: true,
                ..Config::default()
            };
            config.admin.listen = "127.0.0.1:0".parse().unwrap();
            change(&mut config);
            Site { name, host: Host::new(), pod: Host::new(), config, running: None, _data: data }
        };
        let (a, b) = (site("a", sandbox.cgroup.clone()), site("b", child));
        ip("link add wan-a type veth peer name wan-b");
        for (site, own, pods) in [(&a, "192.0.2.1/24", POD_A), (&b, "192.0.2.2/24", POD_B)] {
            ip(&format!("link set wan-{} netns {}", site.name, site.host.thread));
            let gateways = pods.map(|pod| pod.replace(".5", ".1").replace("::5", "::1"));
            site.host.ip(&[
                &format!("address add {own} dev wan-{}", site.name),
                &format!("link set wan-{} up", site.name),
                "link add edgemesh0 type bridge",
                &format!("address add {}/24 dev edgemesh0", gateways[0]),
                &format!("address add {}/64 dev edgemesh0 nodad", gateways[1]),
                "link set edgemesh0 up",
                "link add pod0 type veth peer name eth0",
                "link set pod0 master edgemesh0 up",
                &format!("link set eth0 netns {}", site.pod.thread),
            ]);
            site.pod.ip(&[
                &format!("address add {}/24 dev eth0", pods[0]),
                &format!("address add {}/64 dev eth0 nodad", pods[1]),
                "link set eth0 up",
                &format!("route add default via {}", gateways[0]),
                &format!("-6 route add default via {}", gateways[1]),
            ]);
        }
        let mut sites = Self { a, b, _sandbox: sandbox };
        sites.a.start();
        sites.b.start();
        sites.introduce();
        sites
    }

    /// Tells each agent where the other one is.
    pub(crate) fn introduce(&self) {
        let nodes = [self.a.mesh_node(), self.b.mesh_node()];
        for site in [&self.a, &self.b] {
            for node in &nodes {
                site.agent().catalog.apply_mesh_node(node);
            }
            site.agent().catalog.publish();
        }
    }

    /// Puts a site into another network.
    pub(crate) fn move_node(&self, name: &str, network: &str) {
        for site in [&self.a, &self.b] {
            site.agent().catalog.apply_node(&serde_json::from_value(node(name, network)).unwrap());
            site.agent().catalog.publish();
        }
    }
}

impl Drop for Sites {
    fn drop(&mut self) {
        self.a.stop();
        self.b.stop();
    }
}

impl Site {
    /// Starts its agent.
    pub(crate) fn start(&mut self) {
        let config = self.config.clone();
        self.running = Some(self.host.run(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
            let agent = runtime.block_on(async {
                let agent = app::build(config).await.unwrap();
                tokio::time::timeout(DEADLINE, agent.readiness.wait()).await.unwrap();
                agent
            });
            (runtime, agent)
        }));
    }

    /// Stops its agent.
    pub(crate) fn stop(&mut self) {
        if let Some((runtime, agent)) = self.running.take() {
            self.host.run(move || runtime.block_on(agent.stop()));
        }
    }

    pub(crate) fn agent(&self) -> &Bound {
        &self.running.as_ref().unwrap().1
    }

    pub(crate) fn runtime(&self) -> &Runtime {
        &self.running.as_ref().unwrap().0
    }

    /// Changes the configuration for its next agent.
    pub(crate) fn configure(&mut self, change: impl FnOnce(&mut Config)) {
        change(&mut self.config);
    }

    fn mesh_node(&self) -> MeshNode {
        let tunnel = self.agent().overlay.tunnel();
        let mut watch = tunnel.addresses();
        let addresses = self.runtime().block_on(async {
            let listening = watch.wait_for(|all| all.iter().filter(|one| one.contains("192.0.2.")).count() >= 2);
            tokio::time::timeout(DEADLINE, listening).await.unwrap().unwrap().clone()
        });
        let peer = MeshPeer { peer_id: tunnel.peer_id().to_string(), addresses, relay: false };
        MeshNode::new(self.name, MeshNodeSpec { peers: BTreeMap::from([("agent".to_owned(), peer)]) })
    }

    /// A page of its admin endpoint.
    pub(crate) fn admin(&self, path: &'static str) -> String {
        let address = self.agent().admin;
        self.host.run(move || {
            let mut stream = TcpStream::connect(address).unwrap();
            write!(stream, "GET {path} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n").unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            answer
        })
    }

    /// The value of a metric line, 0 if it isn't there.
    pub(crate) fn metric(&self, line: &str) -> u64 {
        let metrics = self.admin("/metrics");
        metrics.lines().find_map(|found| found.strip_prefix(line)?.trim().parse().ok()).unwrap_or(0)
    }

    /// What `ip` shows on its host.
    pub(crate) fn shown(&self, arguments: &'static str) -> String {
        self.host.run(move || {
            let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
            String::from_utf8(output.stdout).unwrap()
        })
    }
}

pub(crate) fn node(name: &str, network: &str) -> Value {
    let (address, ranges) = match name {
        "a" => ("192.0.2.1", ["10.244.1.0/24", "fd00:1::/64"]),
        _ => ("192.0.2.2", ["10.244.7.0/24", "fd00:7::/64"]),
    };
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "labels": {"edgemesh.dev/network": network}},
        "spec": {"podCIDR": ranges[0], "podCIDRs": ranges},
        "status": {"addresses": [{"type": "InternalIP", "address": address}],
                   "conditions": [{"type": "Ready", "status": "True"}]},
    })
}

/// Waits until a condition holds.
pub(crate) fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not within {DEADLINE:?}");
        thread::sleep(Duration::from_millis(20));
    }
}

pub(crate) fn to(ip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip.parse::<IpAddr>().unwrap(), port)
}

/// A TCP server at all addresses of a host or pod: it reads all, then answers with its name and the number of bytes.
pub(crate) fn counting_server(at: &Host, port: u16, name: &'static str) {
    at.run(move || {
        let listener = TcpListener::bind(("::", port)).unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                thread::spawn(move || {
                    let mut stream = stream.unwrap();
                    let mut all = Vec::new();
                    let _ = stream.read_to_end(&mut all);
                    let _ = stream.write_all(format!("{name} {}", all.len()).as_bytes());
                });
            }
        });
    });
}

/// A UDP server at an address that sends back what it gets.
pub(crate) fn echo_server(at: &Host, address: SocketAddr) {
    at.run(move || {
        let socket = UdpSocket::bind(address).unwrap();
        thread::spawn(move || {
            let mut buffer = vec![0; 65_536];
            while let Ok((length, from)) = socket.recv_from(&mut buffer) {
                let _ = socket.send_to(&buffer[..length], from);
            }
        });
    });
}

/// The addresses that cluster DNS has for a name, in the order of its answer.
pub(crate) fn addresses_of(from: &Host, server: &'static str, name: &'static str, kind: RecordType) -> Vec<String> {
    from.run(move || {
        let mut query = Message::query();
        query.add_query(Query::query(name.parse().unwrap(), kind));
        let server = to(server, 53);
        let any = if server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(any).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        socket.send_to(&query.to_vec().unwrap(), server).unwrap();
        let mut buffer = [0; 1500];
        let (length, answered) = socket.recv_from(&mut buffer).unwrap();
        assert_eq!(answered, server, "who was asked answers");
        addresses_in(&buffer[..length], kind)
    })
}

/// The addresses in an answer.
pub(crate) fn addresses_in(answer: &[u8], kind: RecordType) -> Vec<String> {
    let answers = Message::from_vec(answer).unwrap().answers;
    answers.iter().filter(|record| record.record_type() == kind).map(|record| record.data.to_string()).collect()
}

/// Sends bytes, ends the sending side, and reads the answer to its end.
pub(crate) fn call(from: &Host, address: SocketAddr, bytes: usize) -> io::Result<String> {
    from.run(move || {
        let mut stream = TcpStream::connect_timeout(&address, DEADLINE)?;
        stream.set_read_timeout(Some(DEADLINE))?;
        assert_eq!(stream.peer_addr()?, address);
        stream.write_all(&vec![7; bytes])?;
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })
}

/// Sends a datagram of a size from a new socket, and gives what comes back and from where.
pub(crate) fn ask(from: &Host, address: SocketAddr, size: usize) -> io::Result<(usize, SocketAddr)> {
    ask_and_keep(from, address, size).map(|(answer, _)| answer)
}

/// As [`ask`], with the socket: while it is open no other one has its port, and so its flow.
pub(crate) fn ask_and_keep(
    from: &Host,
    address: SocketAddr,
    size: usize,
) -> io::Result<((usize, SocketAddr), UdpSocket)> {
    from.run(move || {
        let any: IpAddr = if address.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
        let socket = UdpSocket::bind((any, 0))?;
        socket.set_read_timeout(Some(Duration::from_secs(5)))?;
        socket.send_to(&vec![3; size], address)?;
        Ok((socket.recv_from(&mut vec![0; 65_536])?, socket))
    })
}
