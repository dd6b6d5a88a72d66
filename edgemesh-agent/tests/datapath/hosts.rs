//! Further hosts for a sandbox, which is a node: pods behind its bridge, and hosts in its network.

use std::{
    io::Write,
    net::{SocketAddr, TcpListener, UdpSocket},
    sync::mpsc,
    thread::{self, JoinHandle},
};

use nix::sched::{CloneFlags, unshare};

use crate::sandbox::{Sandbox, ip};

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace with a thread in it that does what it is told.
pub(crate) struct Host {
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Host {
    /// Behind a bridge of the node, with addresses in CIDR notation and default routes through gateways.
    pub(crate) fn new(name: &str, bridge: &str, addresses: &[&str], gateways: &[&str]) -> Self {
        let (jobs, todo) = mpsc::channel::<Job>();
        let thread = thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            todo.into_iter().for_each(|job| job());
        });
        let host = Self { jobs: Some(jobs), thread: Some(thread) };
        let id = host.run(nix::unistd::gettid);
        ip(&format!("link add {name} type veth peer name eth0 netns {id}"));
        ip(&format!("link set {name} master {bridge} up"));
        // As the CNI configuration has it (`hairpinMode`): a pod that calls itself comes back by the same port.
        ip(&format!("link set {name} type bridge_slave hairpin on"));
        let owned = |texts: &[&str]| texts.iter().map(|&text| text.to_owned()).collect::<Vec<String>>();
        let (addresses, gateways) = (owned(addresses), owned(gateways));
        host.run(move || {
            ip("link set lo up");
            for address in addresses {
                ip(&format!("address add {address} dev eth0{}", nodad(&address)));
            }
            ip("link set eth0 up");
            for gateway in gateways {
                ip(&format!("route add default via {gateway}"));
            }
        });
        host
    }

    /// Does something in the host's namespace.
    pub(crate) fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        self.begin(work).recv().expect("the work failed in the host")
    }

    /// Begins to do something there, of which the outcome is told.
    pub(crate) fn begin<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> mpsc::Receiver<T> {
        let (done, wait) = mpsc::channel();
        let job = Box::new(move || drop(done.send(work())));
        self.jobs.as_ref().unwrap().send(job).unwrap();
        wait
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.jobs = None;
        // A job that failed has failed the test already.
        let _ = self.thread.take().unwrap().join();
    }
}

/// No waiting for other hosts that could have an IPv6 address; IPv4 has no such thing.
fn nodad(address: &str) -> &'static str {
    if address.contains(':') { " nodad" } else { "" }
}

/// A node with a bridge of pods (10.244.1.1, fd00:1::1) and one to its network (192.168.1.11, fd00:a::11).
pub(crate) fn node() -> Sandbox {
    let sandbox = Sandbox::new(&[]);
    for (bridge, addresses) in
        [("pods", ["10.244.1.1/24", "fd00:1::1/64"]), ("lan", ["192.168.1.11/24", "fd00:a::11/64"])]
    {
        ip(&format!("link add {bridge} type bridge"));
        for address in addresses {
            ip(&format!("address add {address} dev {bridge}{}", nodad(address)));
        }
        ip(&format!("link set {bridge} up"));
    }
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
    std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap();
    sandbox
}

/// A pod of the node: 10.244.1.N and fd00:1::N.
pub(crate) fn pod(number: u8) -> Host {
    let addresses = [format!("10.244.1.{number}/24"), format!("fd00:1::{number}/64")];
    let gateways = ["10.244.1.1", "fd00:1::1"];
    Host::new(&format!("pod{number}"), "pods", &addresses.each_ref().map(String::as_str), &gateways)
}

/// A host in the node's network without a route to pods: 192.168.1.50 and fd00:a::50. Load balancers' addresses lead to the node.
pub(crate) fn client() -> Host {
    let host = Host::new("client", "lan", &["192.168.1.50/24", "fd00:a::50/64"], &[]);
    host.run(|| ip("route add 203.0.113.0/24 via 192.168.1.11"));
    host
}

/// Another node with a pod (10.244.2.5, fd00:2::5). It reaches the client by itself, not through the node.
pub(crate) fn other_node() -> Host {
    let host = Host::new("node2", "lan", &["192.168.1.12/24", "fd00:a::12/64"], &[]);
    host.run(|| {
        ip("address add 10.244.2.5/32 dev lo");
        ip("address add fd00:2::5/128 dev lo nodad");
        ip("route add 10.244.1.0/24 via 192.168.1.11");
        ip("route add fd00:1::/64 via fd00:a::11");
    });
    ip("route add 10.244.2.0/24 via 192.168.1.12");
    ip("route add fd00:2::/64 via fd00:a::12");
    host
}

/// TCP and UDP servers that tell each client where it was answered and from where it seems to call: `SERVER CLIENT`.
pub(crate) fn who_calls(address: &str) {
    let listener = TcpListener::bind(address).unwrap();
    let socket = UdpSocket::bind(address).unwrap();
    let address: SocketAddr = address.parse().unwrap();
    thread::spawn(move || {
        while let Ok((mut stream, from)) = listener.accept() {
            drop(write!(stream, "{address} {}", from.ip()));
        }
    });
    thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((_, from)) = socket.recv_from(&mut buffer) {
            drop(socket.send_to(format!("{address} {}", from.ip()).as_bytes(), from));
        }
    });
}
