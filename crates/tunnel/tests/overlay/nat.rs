//! Two endpoints behind routers that translate addresses, in network namespaces: needs root, `ip` and `nft`.
//!
//! The routers give each flow another source port than its own, as many do: those of carriers always, Linux as soon as a second host of
//! its network uses the same port. They keep one mapping for all destinations, so a hole can be punched by whoever knows it.

use std::{
    io::Write,
    net::SocketAddr,
    os::fd::AsRawFd,
    process::{Command, Stdio},
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

use edgemesh_tunnel::TunnelPeer;
use nix::sched::{CloneFlags, unshare};
use tokio::sync::watch;

use crate::rig::{Endpoint, echo, round_trip, within};

const NAT: &str = "table ip nat {
    chain out {
        type nat hook postrouting priority srcnat;
        oifname wan meta l4proto { tcp, udp } masquerade to :20000-30000
    }
    chain in {
        type filter hook forward priority filter;
        iifname wan ct state established,related accept
        iifname wan drop
    }
    chain own {
        type filter hook input priority filter;
        iifname wan ct state established,related accept
        iifname wan drop
    }
}";

/// A network namespace, for as long as a process or a file has it.
#[derive(Clone)]
struct Namespace(Arc<std::fs::File>);

impl Namespace {
    fn new() -> Self {
        let made = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("this test needs root");
            Self(Arc::new(std::fs::File::open("/proc/thread-self/ns/net").unwrap()))
        });
        let namespace = made.join().unwrap();
        namespace.run(&["ip", "link", "set", "lo", "up"], "");
        namespace
    }

    /// A thread inside.
    fn thread<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
        let namespace = self.clone();
        thread::spawn(move || {
            nix::sched::setns(&*namespace.0, CloneFlags::CLONE_NEWNET).unwrap();
            work()
        })
    }

    fn run(&self, words: &[&str], input: &str) {
        let (words, input): (Vec<_>, _) = (words.iter().map(|word| (*word).to_owned()).collect(), input.to_owned());
        let done = self.thread(move || {
            let mut child = Command::new(&words[0]).args(&words[1..]).stdin(Stdio::piped()).spawn().unwrap();
            child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
            assert!(child.wait().unwrap().success(), "{words:?}");
        });
        done.join().unwrap();
    }

    fn ip(&self, line: &str) {
        self.run(&[&["ip"], &*line.split(' ').collect::<Vec<_>>()].concat(), "");
    }

    /// A cable from an interface here to one there, with their addresses.
    fn connect(&self, (name, address): (&str, &str), other: &Self, (peer, peer_address): (&str, &str)) {
        // A path that leads to the namespace from the process that `ip` is.
        let there = format!("/proc/{}/fd/{}", std::process::id(), other.0.as_raw_fd());
        self.ip(&format!("link add {name} type veth peer name {peer} netns {there}"));
        for (namespace, name, address) in [(self, name, address), (other, peer, peer_address)] {
            namespace.ip(&format!("address add {address} dev {name}"));
            namespace.ip(&format!("link set {name} up"));
        }
    }

    fn route_packets(&self) {
        let on = || std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        self.thread(on).join().unwrap();
    }
}

/// A host behind such a router, whose uplink goes to `internet`; and the router, which is there as long as somebody has it.
fn behind_nat(internet: &Namespace, number: u8) -> (Namespace, Namespace) {
    let (router, host) = (Namespace::new(), Namespace::new());
    let (public, gateway) = (format!("203.0.113.{}", 4 * number + 2), format!("203.0.113.{}", 4 * number + 1));
    router.connect(("wan", &format!("{public}/30")), internet, (&format!("to-{number}"), &format!("{gateway}/30")));
    let lan = format!("192.168.{number}");
    host.connect(("eth0", &format!("{lan}.2/24")), &router, ("lan", &format!("{lan}.1/24")));
    router.route_packets();
    router.ip(&format!("route add default via {gateway}"));
    host.ip(&format!("route add default via {lan}.1"));
    router.run(&["nft", "-f", "-"], NAT);
    (host, router)
}

/// What the endpoints tell one another.
#[derive(Clone)]
struct Meeting {
    peers: watch::Sender<Vec<TunnelPeer>>,
    /// The server at b, once b has a place with the relay.
    server: watch::Sender<Option<SocketAddr>>,
    over: watch::Sender<bool>,
}

impl Meeting {
    /// Runs an endpoint in a host, which knows the others as they publish themselves.
    fn attend(&self, host: &Namespace, name: &'static str, address: &str) -> JoinHandle<()> {
        let meeting = self.clone();
        let listen = [format!("/ip4/{address}/udp/4001/quic-v1"), format!("/ip4/{address}/tcp/4001")];
        let listen = listen.map(|address| address.parse().unwrap()).into();
        host.thread(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let endpoint = Endpoint::start(name, |config| {
                    config.listen = listen;
                    config.relay_server = name == "relay";
                    config.upgrade_pause = Duration::from_secs(1);
                });
                let own = endpoint.peer(2).await;
                meeting.peers.send_modify(|all| all.push(own.clone()));
                let mut all = meeting.peers.subscribe();
                let all = within("all to publish", all.wait_for(|all| all.len() == 3)).await.unwrap().clone();
                endpoint.tunnel.set_peers(&all.into_iter().filter(|peer| *peer != own).collect::<Vec<_>>());
                meeting.take_part(&endpoint, name).await;
                endpoint.stop().await;
            });
        })
    }

    async fn take_part(&self, endpoint: &Endpoint, name: &str) {
        if name != "relay" {
            endpoint.circuits().await;
        }
        if name == "b" {
            self.server.send_replace(Some(echo().await));
        }
        if name == "a" {
            let server = within("b", self.server.subscribe().wait_for(Option::is_some)).await.unwrap().unwrap();
            within("a direct path", async {
                while round_trip(&endpoint.tunnel, "b", server, "hello").await == "relay" {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            })
            .await;
            self.over.send_replace(true);
        }
        within("the end", self.over.subscribe().wait_for(|over| *over)).await.unwrap();
    }
}

#[test]
fn a_hole_is_punched_through_routers_that_change_ports() {
    let internet = Namespace::new();
    let ((a, _router_a), (b, _router_b)) = (behind_nat(&internet, 1), behind_nat(&internet, 2));
    internet.ip("address add 203.0.113.1/32 dev lo");
    internet.route_packets();
    let meeting =
        Meeting { peers: watch::Sender::default(), server: watch::Sender::default(), over: watch::Sender::default() };
    let threads = [(&internet, "relay", "203.0.113.1"), (&a, "a", "192.168.1.2"), (&b, "b", "192.168.2.2")]
        .map(|(host, name, address)| meeting.attend(host, name, address));
    for thread in threads {
        thread.join().unwrap();
    }
}
