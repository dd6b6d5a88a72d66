//! Programs and maps that outlive the agent, and are taken over by the next one.

use std::{
    fs,
    io::{ErrorKind, Read},
    net::{SocketAddr, TcpStream, UdpSocket},
    path::PathBuf,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use edgemesh_agent::datapath::{
    ebpf::Programs,
    plan::{self, Change, Frontend, Plan, Target},
};
use edgemesh_ebpf_abi::Counter;
use edgemesh_mesh::model::Protocol::{Tcp, Udp};

use crate::sandbox::{Sandbox, at, set, tcp_server, udp_server};

const VIP: &str = "10.96.0.20:80";
const VIP6: &str = "[fd00:96::20]:80";
const PODS: [&str; 2] = ["10.244.1.5:8080", "10.244.1.6:8080"];
const POD6: &str = "[fd00:1::5]:8080";
const ADDRESSES: [&str; 3] = ["10.244.1.5", "10.244.1.6", "fd00:1::5"];

fn call(address: &str) -> std::io::Result<String> {
    let mut answer = String::new();
    TcpStream::connect(address)?.read_to_string(&mut answer)?;
    Ok(answer)
}

/// The folders of pins.
fn folders(sandbox: &Sandbox) -> Vec<PathBuf> {
    fs::read_dir(sandbox.bpffs.join("edgemesh")).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

#[test]
fn connections_old_and_new_go_on_while_no_agent_runs() {
    let sandbox = Sandbox::new(&ADDRESSES);
    let (mut programs, counters) = sandbox.pinned_programs();
    tcp_server(PODS[0]);
    tcp_server(POD6);
    udp_server(PODS[1]);
    set(&mut programs, Tcp, VIP, Some(&PODS[..1]));
    set(&mut programs, Tcp, VIP6, Some(&[POD6]));
    set(&mut programs, Udp, VIP, Some(&PODS[1..]));
    let open = TcpStream::connect(VIP).unwrap();
    drop((programs, counters));

    assert_eq!(open.peer_addr().unwrap(), at(VIP));
    assert_eq!((call(VIP).unwrap(), call(VIP6).unwrap()), (PODS[0].to_owned(), POD6.to_owned()));
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    socket.send_to(b"?", VIP).unwrap();
    let mut buffer = [0; 64];
    let (length, from): (usize, SocketAddr) = socket.recv_from(&mut buffer).unwrap();
    assert_eq!((&buffer[..length], from), (PODS[1].as_bytes(), at(VIP)));

    Programs::uninstall(&sandbox.cgroup, &sandbox.bpffs).unwrap();
    assert_eq!(call(VIP).unwrap_err().kind(), ErrorKind::NetworkUnreachable);
    assert!(!sandbox.bpffs.join("edgemesh").exists(), "nothing is left");
    Programs::uninstall(&sandbox.cgroup, &sandbox.bpffs).unwrap();
}

#[test]
fn the_next_agent_takes_over_what_is_programmed_and_writes_only_what_differs() {
    let sandbox = Sandbox::new(&ADDRESSES);
    let (mut programs, _) = sandbox.pinned_programs();
    for pod in PODS {
        tcp_server(pod);
    }
    tcp_server(POD6);
    let mut before = Plan::new();
    let tcp = |address: &str| Frontend { address: at(address), protocol: Tcp };
    before.insert(tcp(VIP), Target::Sticky(vec![at(PODS[0]), at(PODS[1])], Duration::from_secs(7)));
    before.insert(tcp(VIP6), Target::Direct(vec![at(POD6)]));
    before.insert(tcp("10.96.0.21:80"), Target::Listener(at("169.254.77.12:15001")));
    before.insert(tcp("10.96.0.21:0"), Target::Refuse);
    before.insert(Frontend { address: at("10.96.0.22:53"), protocol: Udp }, Target::Direct(vec![at(PODS[1])]));
    for change in plan::changes(&Plan::new(), &before) {
        programs.apply(&change).unwrap();
    }
    let kept = call(VIP).unwrap();
    let open = TcpStream::connect(VIP).unwrap();
    drop(programs);

    let (mut programs, counters) = sandbox.pinned_programs();
    let adopted = programs.take_adopted();
    assert_eq!(plan::changes(&adopted, &before), [], "{adopted:?}");
    assert_eq!((adopted.len(), programs.len()), (5, 5));
    assert_eq!(open.peer_addr().unwrap(), at(VIP), "names are remembered");
    assert!((0..10).all(|_| call(VIP).unwrap() == kept), "and so are clients");
    assert_eq!(counters.get(Counter::TcpConnects).unwrap(), 12, "and counts");
    // Its own changes don't take slots that are in use.
    for i in 0..200 {
        set(&mut programs, Tcp, &format!("10.96.1.{i}:80"), Some(&["10.244.9.9:9", "10.244.9.8:9", "10.244.9.7:9"]));
    }
    assert_eq!((call(VIP).unwrap(), call(VIP6).unwrap()), (kept, POD6.to_owned()));
    for (frontend, _) in adopted {
        programs.apply(&Change { frontend, target: None }).unwrap();
    }
    assert_eq!(call(VIP).unwrap_err().kind(), ErrorKind::NetworkUnreachable);
}

#[test]
fn no_connection_fails_while_agents_come_and_go() {
    let sandbox = Sandbox::new(&ADDRESSES);
    let (mut programs, counters) = sandbox.pinned_programs();
    tcp_server(PODS[0]);
    set(&mut programs, Tcp, VIP, Some(&PODS[..1]));
    drop((programs, counters));
    let (stop, connections) = (AtomicBool::new(false), AtomicUsize::new(0));
    let netns = fs::File::open("/proc/thread-self/ns/net").unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            nix::sched::setns(&netns, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            while !stop.load(Ordering::Relaxed) {
                let mut stream = TcpStream::connect(VIP).unwrap();
                assert_eq!(stream.peer_addr().unwrap(), at(VIP));
                let mut answer = String::new();
                stream.read_to_string(&mut answer).unwrap();
                assert_eq!(answer, PODS[0]);
                connections.fetch_add(1, Ordering::Relaxed);
            }
        });
        let until = Instant::now() + Duration::from_secs(3);
        let mut agents = 0;
        while Instant::now() < until || agents < 3 {
            let (mut programs, _) = sandbox.pinned_programs();
            assert_eq!(programs.take_adopted().len(), 1);
            agents += 1;
        }
        stop.store(true, Ordering::Relaxed);
        println!("{agents} agents, {} connections", connections.load(Ordering::Relaxed));
    });
    assert!(connections.load(Ordering::Relaxed) > 100);
}

#[test]
fn pins_of_another_layout_serve_until_they_are_replaced() {
    let sandbox = Sandbox::new(&ADDRESSES);
    let (mut programs, _) = sandbox.pinned_programs();
    tcp_server(PODS[0]);
    tcp_server(PODS[1]);
    set(&mut programs, Tcp, VIP, Some(&PODS[..1]));
    drop(programs);
    let [folder] = &folders(&sandbox)[..] else { panic!("one folder") };
    let older = PathBuf::from(format!("{}9", folder.display()));
    fs::create_dir(&older).unwrap();
    for pin in fs::read_dir(folder).unwrap() {
        let pin = pin.unwrap();
        fs::rename(pin.path(), older.join(pin.file_name())).unwrap();
    }
    fs::remove_dir(folder).unwrap();

    let (mut programs, _) = sandbox.pinned_programs();
    assert!(programs.take_adopted().is_empty(), "its maps are not read");
    assert_eq!(call(VIP).unwrap(), PODS[0], "the older programs serve");
    set(&mut programs, Tcp, VIP, Some(&PODS[1..]));
    programs.remove_older();
    assert!(!older.exists());
    assert_eq!(call(VIP).unwrap(), PODS[1]);
}

#[test]
fn a_start_that_was_cut_off_is_completed_by_the_next() {
    let sandbox = Sandbox::new(&ADDRESSES);
    let (mut programs, _) = sandbox.pinned_programs();
    tcp_server(PODS[0]);
    set(&mut programs, Tcp, VIP, Some(&PODS[..1]));
    drop(programs);
    let [folder] = &folders(&sandbox)[..] else { panic!("one folder") };
    fs::remove_file(folder.join("link_connect4")).unwrap();
    // The kernel detaches a program some time after its link's last pin is gone.
    let until = Instant::now() + Duration::from_secs(10);
    while call(VIP).is_ok() {
        assert!(Instant::now() < until, "still attached");
    }
    let (programs, _) = sandbox.pinned_programs();
    assert_eq!(call(VIP).unwrap(), PODS[0]);
    drop(programs);
    assert_eq!(call(VIP).unwrap(), PODS[0]);
}
