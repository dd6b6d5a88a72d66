//! A network namespace for the thread of a test and a cgroup for its process. Tests take turns, because a process is in
//! one cgroup at a time.

use std::{
    fs,
    net::{SocketAddr, TcpListener, UdpSocket},
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, MutexGuard, PoisonError, mpsc},
    thread,
};

use edgemesh_agent::{
    config::DatapathMode,
    datapath::{
        ebpf::{Counters, Nowhere, Programs},
        map_sizes::MapSizes,
        nftables::{Changes, Rules},
        plan::{Change, Frontend, Target},
    },
};
use edgemesh_ebpf_abi::Counter;
use edgemesh_mesh::model::Protocol;
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};

static TURN: Mutex<()> = Mutex::new(());

/// The process is in a cgroup of its own while this lives, and the thread in a network namespace of its own.
pub(crate) struct Sandbox {
    /// Relative to the cgroup2 mount.
    pub(crate) cgroup: PathBuf,
    /// Where a BPF filesystem can be mounted: seen by this thread and those that it starts, and gone with them.
    pub(crate) bpffs: PathBuf,
    mount: PathBuf,
    before: PathBuf,
    _turn: MutexGuard<'static, ()>,
}

impl Sandbox {
    /// With the addresses on the loopback interface, as a host's pods would have them.
    pub(crate) fn new(addresses: &[&str]) -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("these tests need root");
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        ip("link set lo up");
        for address in addresses {
            let prefix = if address.contains(':') { 128 } else { 32 };
            ip(&format!("address add {address}/{prefix} dev lo nodad"));
        }
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let cgroup2 = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2")).expect("no cgroup2 mount");
        let cgroup2 = PathBuf::from(cgroup2.split(' ').nth(1).unwrap());
        let own = fs::read_to_string("/proc/self/cgroup").unwrap();
        let before = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap();
        let sandbox = Self {
            cgroup: PathBuf::from(format!("/datapath-{}", std::process::id())),
            bpffs: std::env::temp_dir().join(format!("datapath-bpffs-{}", std::process::id())),
            before: cgroup2.join(before),
            mount: cgroup2,
            _turn: turn,
        };
        fs::create_dir_all(sandbox.folder()).unwrap();
        enter(&sandbox.folder());
        sandbox
    }

    /// The eBPF programs, attached to this cgroup.
    pub(crate) fn programs(&self) -> (Programs, Counters) {
        self.sized_programs(0)
    }

    /// The same with so many slots for backends.
    pub(crate) fn sized_programs(&self, slots: u32) -> (Programs, Counters) {
        Programs::start(&self.cgroup, MapSizes::new(slots), Nowhere::default()).unwrap()
    }

    /// What translates Service addresses for this sandbox, in a mode.
    pub(crate) fn datapath(&self, mode: Mode) -> Datapath {
        match mode {
            Mode::Ebpf => {
                let (programs, counters) = self.programs();
                Datapath::Ebpf(Box::new(programs), Box::new(counters))
            }
            Mode::Nftables => Datapath::Nftables(Box::new(Rules::for_all().unwrap())),
        }
    }

    /// The eBPF programs, pinned, as an agent starts them.
    pub(crate) fn pinned_programs(&self) -> (Programs, Counters) {
        Programs::start_pinned(&self.cgroup, &self.bpffs, MapSizes::new(0), Nowhere::default()).unwrap()
    }

    /// A cgroup below this one, in which no process is.
    pub(crate) fn child_cgroup(&self) -> PathBuf {
        fs::create_dir_all(self.folder().join("child")).unwrap();
        self.cgroup.join("child")
    }

    /// The cgroup's folder.
    pub(crate) fn cgroup_folder(&self) -> PathBuf {
        self.folder()
    }

    fn folder(&self) -> PathBuf {
        self.mount.join(self.cgroup.strip_prefix("/").unwrap())
    }
}

/// How Service addresses are translated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Ebpf,
    Nftables,
}

impl From<Mode> for DatapathMode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Ebpf => Self::Ebpf,
            Mode::Nftables => Self::Nftables,
        }
    }
}

/// What translates them.
pub(crate) enum Datapath {
    Ebpf(Box<Programs>, Box<Counters>),
    Nftables(Box<Rules>),
}

impl Datapath {
    /// Checks what the programs counted; rules count nothing.
    pub(crate) fn assert_counted(&self, counter: Counter, expected: u64) {
        if let Self::Ebpf(_, counters) = self {
            assert_eq!(counters.get(counter).unwrap(), expected, "{counter:?}");
        }
    }
}

/// What frontends can be programmed into.
pub(crate) trait Apply {
    fn apply_change(&mut self, change: &Change<'_>);
}

impl Apply for Programs {
    fn apply_change(&mut self, change: &Change<'_>) {
        self.apply(change).unwrap();
    }
}

impl Apply for Rules {
    fn apply_change(&mut self, change: &Change<'_>) {
        let inside = vec![(change.frontend, change.target.cloned())];
        // Pods that call themselves are those of the tests that have pods.
        self.apply(Changes { inside, ..Changes::default() }, &|_, _| true).unwrap();
    }
}

impl Apply for Datapath {
    fn apply_change(&mut self, change: &Change<'_>) {
        match self {
            Self::Ebpf(programs, _) => programs.apply_change(change),
            Self::Nftables(rules) => rules.apply_change(change),
        }
    }
}

/// Makes a test for each mode of functions that take one.
macro_rules! in_both_modes {
    ($($test:ident),+ $(,)?) => {
        mod with_ebpf {
            $(#[test] fn $test() { super::$test($crate::sandbox::Mode::Ebpf); })+
        }
        mod with_nftables {
            $(#[test] fn $test() { super::$test($crate::sandbox::Mode::Nftables); })+
        }
    };
}
pub(crate) use in_both_modes;

impl Drop for Sandbox {
    fn drop(&mut self) {
        enter(&self.before);
        if self.bpffs.exists() {
            // Whatever a test left there ends here, though a thread may still hold the namespace.
            let _ = Programs::uninstall(&self.cgroup, &self.bpffs);
            let _ = Programs::uninstall(&self.cgroup.join("child"), &self.bpffs);
            let _ = umount2(&self.bpffs, MntFlags::MNT_DETACH);
            let _ = fs::remove_dir(&self.bpffs);
        }
        let child = self.folder().join("child");
        if child.exists() {
            fs::remove_dir(child).unwrap();
        }
        fs::remove_dir(self.folder()).unwrap();
    }
}

/// Runs work in a pod's network namespace: 10.244.1.5, behind a bridge of the sandbox's namespace, which is the pod's gateway.
pub(crate) fn in_pod<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    ip("link add edgemesh0 type bridge");
    ip("address add 10.244.1.1/24 dev edgemesh0");
    ip("link set edgemesh0 up");
    ip("link add pod0 type veth peer name eth0");
    ip("link set pod0 master edgemesh0 up");
    let (ready, wait) = mpsc::channel();
    let (go, went) = mpsc::channel();
    thread::scope(|scope| {
        let pod = scope.spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            ready.send(nix::unistd::gettid()).unwrap();
            went.recv().unwrap();
            ip("link set lo up");
            ip("address add 10.244.1.5/24 dev eth0");
            ip("link set eth0 up");
            ip("route add default via 10.244.1.1");
            work()
        });
        ip(&format!("link set eth0 netns {}", wait.recv().unwrap()));
        go.send(()).unwrap();
        pod.join().unwrap()
    })
}

fn enter(cgroup: &Path) {
    fs::write(cgroup.join("cgroup.procs"), std::process::id().to_string()).unwrap();
}

/// Runs `ip` in the thread's network namespace.
pub(crate) fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

pub(crate) fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// Programs one frontend, or takes it out with `None`.
pub(crate) fn set(datapath: &mut impl Apply, protocol: Protocol, frontend: &str, backends: Option<&[&str]>) {
    let target = backends.map(|backends| match backends {
        [] => Target::Refuse,
        backends => Target::Direct(backends.iter().map(|backend| at(backend)).collect()),
    });
    let frontend = Frontend { address: at(frontend), protocol };
    datapath.apply_change(&Change { frontend, target: target.as_ref() });
}

/// Makes an address a Service's as a whole, as cluster addresses are: its other ports are refused.
pub(crate) fn close_other_ports(datapath: &mut impl Apply, frontend: &str) {
    let address = SocketAddr::new(at(frontend).ip(), 0).to_string();
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        set(datapath, protocol, &address, Some(&[]));
    }
}

/// A TCP server in the namespace that writes its own address to each connection and closes it.
pub(crate) fn tcp_server(address: &str) -> SocketAddr {
    let listener = TcpListener::bind(address).unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            use std::io::Write;
            // A client that went away is not the server's trouble.
            drop(stream.unwrap().write_all(address.to_string().as_bytes()));
        }
    });
    address
}

/// A UDP server in the namespace that answers each datagram with its own address.
pub(crate) fn udp_server(address: &str) -> SocketAddr {
    let socket = UdpSocket::bind(address).unwrap();
    let address = socket.local_addr().unwrap();
    thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((_, from)) = socket.recv_from(&mut buffer) {
            socket.send_to(address.to_string().as_bytes(), from).unwrap();
        }
    });
    address
}
