//! Callers from outside of the node, with either datapath for the node's own sockets.

use std::{
    io::{ErrorKind, Read},
    net::{SocketAddr, TcpStream, UdpSocket},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use edgemesh_agent::datapath::{
    nftables::{Changes, Rules, TABLE},
    outside::OutsideTarget,
    plan::{Frontend, Target},
    stale::Swept,
};
use edgemesh_mesh::{
    cidr::Cidr,
    model::Protocol::{self, Tcp, Udp},
};

use crate::{
    hosts::{Host, client, node, other_node, pod, who_calls},
    sandbox::{Mode, Sandbox, at, in_both_modes},
};

const PATIENCE: Duration = Duration::from_secs(5);
/// How long a packet that is dropped is waited for: what is answered is so within a millisecond.
const DROPPED: Duration = Duration::from_millis(300);

in_both_modes! {
    node_ports_serve_tcp_and_udp_at_every_address_of_the_host_and_local_endpoints_see_who_calls,
    an_endpoint_on_another_node_is_reached_through_this_one,
    without_a_local_endpoint_the_local_policy_drops_and_the_cluster_policy_refuses,
    external_and_load_balancer_addresses_are_served_to_callers_from_outside,
    ipv6_callers_from_outside_reach_node_ports,
    who_is_in_no_source_range_of_a_load_balancer_is_dropped_wherever_it_is,
    a_load_balancer_admits_others_when_its_source_ranges_change,
    clients_from_outside_keep_their_endpoint,
    udp_flows_of_callers_from_outside_move_on,
    it_works_beside_kube_proxy_whoever_came_first,
    uninstall_leaves_nothing,
    connections_from_outside_go_on_while_agents_come_and_go,
}

pub(crate) fn rules(mode: Mode) -> Rules {
    let mut rules = match mode {
        Mode::Ebpf => Rules::for_outside(),
        Mode::Nftables => Rules::for_all().unwrap(),
    };
    rules.set_pods(["10.244.1.0/24", "fd00:1::/64"].iter().filter_map(|range| Cidr::parse(range)).collect());
    rules
}

pub(crate) fn is_local(backend: SocketAddr, _: Protocol) -> bool {
    ["10.244.1.0/24", "fd00:1::/64"].iter().any(|range| Cidr::parse(range).unwrap().contains(backend.ip()))
}

pub(crate) fn direct(backends: &[&str]) -> Target {
    match backends {
        [] => Target::Refuse,
        backends => Target::Direct(backends.iter().map(|backend| at(backend)).collect()),
    }
}

fn frontend(address: &str, protocol: Protocol) -> Frontend {
    Frontend { address: at(address), protocol }
}

/// Has TCP and UDP at an address lead to backends.
fn serve(rules: &mut Rules, address: &str, backends: &[&str]) {
    let target = OutsideTarget::Target(direct(backends));
    let outside = [Tcp, Udp].map(|protocol| (frontend(address, protocol), Some(target.clone()))).into();
    rules.apply(Changes { outside, ..Changes::default() }, &is_local).unwrap();
}

pub(crate) fn call(address: &str) -> std::io::Result<String> {
    call_within(address, PATIENCE)
}

fn call_within(address: &str, patience: Duration) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&at(address), patience)?;
    stream.set_read_timeout(Some(patience))?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// How many calls a host made while something was done. None may fail.
pub(crate) fn while_calling(host: &Host, address: &'static str, work: impl FnOnce()) -> usize {
    let done = Arc::new(AtomicBool::new(false));
    let stop = Arc::clone(&done);
    let calls = host.begin(move || {
        let mut calls = 0;
        while !stop.load(Ordering::Relaxed) {
            call(address).unwrap();
            calls += 1;
        }
        calls
    });
    work();
    done.store(true, Ordering::Relaxed);
    calls.recv().expect("a call failed")
}

pub(crate) fn call_udp(address: &str) -> std::io::Result<String> {
    ask(&udp_client(address)?)
}

/// A socket that is connected to an address.
fn udp_client(address: &str) -> std::io::Result<UdpSocket> {
    let any = if address.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" };
    let socket = UdpSocket::bind(any)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.connect(address)?;
    Ok(socket)
}

fn ask(socket: &UdpSocket) -> std::io::Result<String> {
    socket.send(b"?")?;
    let mut buffer = [0; 128];
    let length = socket.recv(&mut buffer)?;
    Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
}

/// Ends the flows of backends that are gone, as is done after a change. The thread that does it is in another namespace afterwards.
pub(crate) fn sweep(rules: &Rules, sandbox: &Sandbox, gone: &[&str]) -> Swept {
    let mut sweeper = rules.sweeper(Some(sandbox.cgroup_folder())).unwrap();
    let gone: Vec<SocketAddr> = gone.iter().map(|backend| at(backend)).collect();
    thread::scope(|scope| scope.spawn(|| sweeper.sweep(&|_, backend, _| gone.contains(&backend))).join().unwrap())
}

pub(crate) fn shown(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

pub(crate) fn nft(script: &str) {
    let output = Command::new("nft").arg(script).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn node_ports_serve_tcp_and_udp_at_every_address_of_the_host_and_local_endpoints_see_who_calls(mode: Mode) {
    let _node = node();
    let (pod5, client) = (pod(5), client());
    pod5.run(|| who_calls("10.244.1.5:8080"));
    client.run(|| crate::sandbox::ip("route add 10.244.1.0/24 via 192.168.1.11"));
    let mut rules = rules(mode);
    serve(&mut rules, "0.0.0.0:30080", &["10.244.1.5:8080"]);
    for address in ["192.168.1.11:30080", "10.244.1.1:30080"] {
        assert_eq!(client.run(|| call(address)).unwrap(), "10.244.1.5:8080 192.168.1.50", "{address}");
        assert_eq!(client.run(|| call_udp(address)).unwrap(), "10.244.1.5:8080 192.168.1.50", "{address}");
    }
    assert_eq!(
        client.run(|| call("192.168.1.11:30081")).unwrap_err().kind(),
        ErrorKind::ConnectionRefused,
        "the host's own"
    );
}

fn an_endpoint_on_another_node_is_reached_through_this_one(mode: Mode) {
    let _node = node();
    let (other, client) = (other_node(), client());
    other.run(|| who_calls("10.244.2.5:8080"));
    let mut rules = rules(mode);
    serve(&mut rules, "0.0.0.0:30080", &["10.244.2.5:8080"]);
    assert_eq!(client.run(|| call("192.168.1.11:30080")).unwrap(), "10.244.2.5:8080 192.168.1.11");
    assert_eq!(client.run(|| call_udp("192.168.1.11:30080")).unwrap(), "10.244.2.5:8080 192.168.1.11");
}

fn without_a_local_endpoint_the_local_policy_drops_and_the_cluster_policy_refuses(mode: Mode) {
    let _node = node();
    let client = client();
    let mut rules = rules(mode);
    let outside = vec![
        (frontend("0.0.0.0:30080", Tcp), Some(OutsideTarget::Drop)),
        (frontend("0.0.0.0:30081", Tcp), Some(OutsideTarget::Target(Target::Refuse))),
    ];
    rules.apply(Changes { outside, ..Changes::default() }, &is_local).unwrap();
    let dropped = client.run(|| call_within("192.168.1.11:30080", DROPPED)).unwrap_err();
    assert!(matches!(dropped.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock), "{dropped}");
    let refused = client.run(|| call("192.168.1.11:30081")).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::HostUnreachable, "{refused}");
}

fn external_and_load_balancer_addresses_are_served_to_callers_from_outside(mode: Mode) {
    let _node = node();
    let (pod5, client) = (pod(5), client());
    pod5.run(|| who_calls("10.244.1.5:8080"));
    let mut rules = rules(mode);
    for address in ["192.168.1.11:80", "203.0.113.7:80"] {
        serve(&mut rules, address, &["10.244.1.5:8080"]);
        assert_eq!(client.run(|| call(address)).unwrap(), "10.244.1.5:8080 192.168.1.50");
        assert_eq!(client.run(|| call_udp(address)).unwrap(), "10.244.1.5:8080 192.168.1.50");
    }
}

/// Has an address lead to a backend for those in ranges, on this node and outside.
fn admit(rules: &mut Rules, address: &str, backend: &str, ranges: Option<&[&str]>) {
    let ranges = ranges.map(|texts| texts.iter().map(|text| Cidr::parse(text).unwrap()).collect());
    let target = match ranges {
        Some(ranges) => OutsideTarget::Within(ranges, Some(direct(&[backend]))),
        None => OutsideTarget::Target(direct(&[backend])),
    };
    let at = frontend(address, Tcp);
    let changes = Changes { inside: vec![(at, Some(direct(&[backend])))], outside: vec![(at, Some(target))] };
    rules.apply(changes, &is_local).unwrap();
}

fn is_admitted(called: std::io::Result<String>) -> bool {
    match called {
        Ok(answer) => answer.contains(":8080 "),
        Err(error) => {
            assert!(matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock), "{error}");
            false
        }
    }
}

fn who_is_in_no_source_range_of_a_load_balancer_is_dropped_wherever_it_is(mode: Mode) {
    let _node = node();
    let (pod5, pod6, pod7, client) = (pod(5), pod(6), pod(7), client());
    pod5.run(|| ["10.244.1.5:8080", "[fd00:1::5]:8080"].map(who_calls));
    client.run(|| crate::sandbox::ip("route add 2001:db8::/64 via fd00:a::11"));
    // The host's own address on the way there is that of the nodes' network.
    crate::sandbox::ip("route add 203.0.113.0/24 via 192.168.1.12");
    crate::sandbox::ip("route add 2001:db8::/64 via fd00:a::12");
    let mut rules = rules(mode);
    for (address, backend, [of_client, of_pod6, of_host]) in [
        ("203.0.113.7:80", "10.244.1.5:8080", ["192.168.1.32/27", "10.244.1.6/32", "192.168.1.11/32"]),
        ("[2001:db8::7]:80", "[fd00:1::5]:8080", ["fd00:a::40/122", "fd00:1::6/128", "fd00:a::11/128"]),
    ] {
        let call = move || call_within(address, 5 * DROPPED);
        let callers = || {
            let [of_client, of_pod6, of_pod7] = [&client, &pod6, &pod7].map(|host| is_admitted(host.run(call)));
            [of_client, of_pod6, of_pod7, is_admitted(call())]
        };
        admit(&mut rules, address, backend, Some(&[of_client]));
        assert_eq!(callers(), [true, false, false, false], "{address}");
        admit(&mut rules, address, backend, Some(&[of_pod6, of_host]));
        assert_eq!(callers(), [false, true, false, true], "{address}");
        admit(&mut rules, address, backend, None);
        assert_eq!(callers(), [true; 4], "{address}");
    }
}

fn a_load_balancer_admits_others_when_its_source_ranges_change(mode: Mode) {
    let _node = node();
    let (pod5, client) = (pod(5), client());
    pod5.run(|| who_calls("10.244.1.5:8080"));
    let mut agent = rules(mode);
    let call = |address| client.run(move || is_admitted(call_within(address, DROPPED)));
    let (here, elsewhere) = ("203.0.113.7:80", "203.0.113.8:80");
    // Narrower, wider, of another family, and none at all.
    let steps: [(&[&str], bool); 6] = [
        (&["192.168.0.0/16"], true),
        (&["192.168.1.0/27"], false),
        (&["192.168.1.0/24"], true),
        (&["fd00:a::/64"], false),
        (&["0.0.0.0/0"], true),
        (&[], false),
    ];
    admit(&mut agent, elsewhere, "10.244.1.5:8080", Some(&["192.168.1.50/32"]));
    for (ranges, admitted) in steps {
        admit(&mut agent, here, "10.244.1.5:8080", Some(ranges));
        assert_eq!((call(here), call(elsewhere)), (admitted, true), "{ranges:?}");
    }
    // The next agent knows of one only.
    let target =
        OutsideTarget::Within(vec![Cidr::parse("192.168.1.50/32").unwrap()], Some(direct(&["10.244.1.5:8080"])));
    let plan = [(frontend(here, Tcp), target)].into_iter().collect();
    rules(mode).replace(&Default::default(), &plan, &is_local).unwrap();
    assert!(call(here));
    let guarded = shown("nft", &["list", "set", "inet", TABLE, "guarded4"]);
    assert!(guarded.contains("203.0.113.7") && !guarded.contains("203.0.113.8"), "{guarded}");
}

fn ipv6_callers_from_outside_reach_node_ports(mode: Mode) {
    let _node = node();
    let (pod5, other, client) = (pod(5), other_node(), client());
    pod5.run(|| who_calls("[fd00:1::5]:8080"));
    other.run(|| who_calls("[fd00:2::5]:8080"));
    let mut rules = rules(mode);
    serve(&mut rules, "[::]:30080", &["[fd00:1::5]:8080"]);
    serve(&mut rules, "[::]:30081", &["[fd00:2::5]:8080"]);
    for (port, answer) in [(30080, "[fd00:1::5]:8080 fd00:a::50"), (30081, "[fd00:2::5]:8080 fd00:a::11")] {
        let address: &'static str = format!("[fd00:a::11]:{port}").leak();
        assert_eq!(client.run(|| call(address)).unwrap(), answer);
        assert_eq!(client.run(|| call_udp(address)).unwrap(), answer);
    }
}

fn clients_from_outside_keep_their_endpoint(mode: Mode) {
    let _node = node();
    let client = client();
    let pods = [5, 6, 7].map(|number| {
        let host = pod(number);
        host.run(move || who_calls(&format!("10.244.1.{number}:8080")));
        host
    });
    let mut rules = rules(mode);
    let all = ["10.244.1.5:8080", "10.244.1.6:8080", "10.244.1.7:8080"].map(at).to_vec();
    let set = |rules: &mut Rules, backends: Vec<SocketAddr>| {
        let target = OutsideTarget::Target(Target::Sticky(backends, Duration::from_secs(60)));
        let outside = vec![(frontend("0.0.0.0:30080", Tcp), Some(target))];
        rules.apply(Changes { outside, ..Changes::default() }, &is_local).unwrap();
    };
    set(&mut rules, all.clone());
    let answer = || client.run(|| call("192.168.1.11:30080")).unwrap();
    let kept = answer();
    assert!((0..20).all(|_| answer() == kept));
    set(&mut rules, all.into_iter().filter(|backend| !kept.starts_with(&backend.to_string())).collect());
    let next = answer();
    assert_ne!(next, kept);
    assert!((0..20).all(|_| answer() == next));
    drop(pods);
}

/// An endpoint that is gone takes no flow with it, on this node or another, be it called at a node port or at a load balancer's address.
fn udp_flows_of_callers_from_outside_move_on(mode: Mode) {
    let sandbox = node();
    let (pod5, pod6, other, client) = (pod(5), pod(6), other_node(), client());
    pod5.run(|| {
        who_calls("10.244.1.5:8080");
        who_calls("[fd00:1::5]:8080");
    });
    pod6.run(|| {
        who_calls("10.244.1.6:8080");
        who_calls("[fd00:1::6]:8080");
    });
    other.run(|| who_calls("10.244.2.5:8080"));
    let mut rules = rules(mode);
    let cases = [
        ("0.0.0.0:30080", "192.168.1.11:30080", ["10.244.1.5:8080 192.168.1.50", "10.244.1.6:8080 192.168.1.50"]),
        ("0.0.0.0:30081", "192.168.1.11:30081", ["10.244.2.5:8080 192.168.1.11", "10.244.1.6:8080 192.168.1.50"]),
        ("203.0.113.7:80", "203.0.113.7:80", ["10.244.1.5:8080 192.168.1.50", "10.244.2.5:8080 192.168.1.11"]),
        ("[::]:30080", "[fd00:a::11]:30080", ["[fd00:1::5]:8080 fd00:a::50", "[fd00:1::6]:8080 fd00:a::50"]),
    ];
    for (frontend, called, answers) in cases {
        let [gone, next] = answers.map(|answer| answer.split_once(' ').unwrap().0);
        serve(&mut rules, frontend, &[gone]);
        let socket = client.run(move || udp_client(called).unwrap());
        let ask = |socket: UdpSocket| client.run(move || (ask(&socket), socket));
        let (answer, socket) = ask(socket);
        assert_eq!(answer.unwrap(), answers[0]);
        serve(&mut rules, frontend, &[next]);
        let swept = sweep(&rules, &sandbox, &[gone]);
        assert_eq!((swept.udp, swept.failed), (1, 0), "{called}: {swept:?}");
        assert_eq!(ask(socket).0.unwrap(), answers[1], "{called}");
    }
}

fn it_works_beside_kube_proxy_whoever_came_first(mode: Mode) {
    // What kube-proxy does, in short: its chain at the same hook sends the same node port elsewhere, and it marks and
    // masquerades what it sent.
    let kube_proxy = "table ip kube-proxy {
        chain services { tcp dport { 30080, 30090 } meta mark set meta mark | 0x4000 dnat to 10.244.1.6:8080; }
        chain nat-prerouting { type nat hook prerouting priority dstnat; jump services; }
        chain nat-output { type nat hook output priority -100; jump services; }
        chain nat-postrouting { type nat hook postrouting priority srcnat; meta mark & 0x4000 != 0 masquerade; }
    }";
    for kube_proxy_first in [true, false] {
        let _node = node();
        let (pod5, pod6, client) = (pod(5), pod(6), client());
        pod5.run(|| who_calls("10.244.1.5:8080"));
        pod6.run(|| who_calls("10.244.1.6:8080"));
        if kube_proxy_first {
            nft(kube_proxy);
        }
        let mut rules = rules(mode);
        serve(&mut rules, "0.0.0.0:30080", &["10.244.1.5:8080"]);
        if !kube_proxy_first {
            nft(kube_proxy);
        }
        let before = shown("nft", &["list", "table", "ip", "kube-proxy"]);
        assert_eq!(client.run(|| call("192.168.1.11:30080")).unwrap(), "10.244.1.5:8080 192.168.1.50");
        assert_eq!(
            client.run(|| call("192.168.1.11:30090")).unwrap(),
            "10.244.1.6:8080 10.244.1.1",
            "its own works on"
        );
        serve(&mut rules, "0.0.0.0:30080", &[]);
        assert_eq!(client.run(|| call("192.168.1.11:30080")).unwrap_err().kind(), ErrorKind::HostUnreachable);
        Rules::uninstall().unwrap();
        assert_eq!(shown("nft", &["list", "table", "ip", "kube-proxy"]), before);
        assert_eq!(client.run(|| call("192.168.1.11:30080")).unwrap(), "10.244.1.6:8080 10.244.1.1", "its turn");
    }
}

fn uninstall_leaves_nothing(mode: Mode) {
    let _node = node();
    let state = || {
        let commands: [(&str, &[&str]); 5] = [
            ("nft", &["list", "ruleset"]),
            ("ip", &["rule"]),
            ("ip", &["-6", "rule"]),
            ("ip", &["route", "show", "table", "all", "proto", "176"]),
            ("ip", &["-6", "route", "show", "table", "all", "proto", "176"]),
        ];
        commands.map(|(program, arguments)| shown(program, arguments)).concat()
    };
    let before = state();
    let mut rules = rules(mode);
    serve(&mut rules, "0.0.0.0:30080", &["10.244.1.5:8080"]);
    let inside = ["10.96.0.20:80", "10.96.0.20:0", "[fd00:96::20]:80"]
        .map(|address| (frontend(address, Tcp), Some(Target::Refuse)))
        .into();
    rules.apply(Changes { inside, ..Changes::default() }, &is_local).unwrap();
    assert!(state().contains(TABLE));
    drop(rules);
    Rules::uninstall().unwrap();
    assert_eq!(state(), before);
    Rules::uninstall().unwrap();
}

fn connections_from_outside_go_on_while_agents_come_and_go(mode: Mode) {
    let _node = node();
    let (pod5, client) = (pod(5), client());
    pod5.run(|| who_calls("10.244.1.5:8080"));
    // So many that a moment without them would be noticed.
    let plan = || {
        let target = OutsideTarget::Target(direct(&["10.244.1.5:8080"; 10]));
        (30_080..32_080).map(|port| (frontend(&format!("0.0.0.0:{port}"), Tcp), target.clone())).collect()
    };
    rules(mode).replace(&Default::default(), &plan(), &is_local).unwrap();
    let calls = while_calling(&client, "192.168.1.11:30080", || {
        let until = Instant::now() + Duration::from_secs(2);
        let mut agents = 0;
        while Instant::now() < until || agents < 3 {
            rules(mode).replace(&Default::default(), &plan(), &is_local).unwrap();
            agents += 1;
        }
        println!("{agents} agents");
    });
    assert!(calls > 50, "{calls} calls");
}
