//! A node for tests: a network namespace, a containerd of its own, a store as the link fills it, and the pod runner.

use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use edgecore::pods::{PodRunner, PodRunnerConfig};
use edgemesh_api::{ObjectKey, ResourceName};
use edgemesh_apiserver::{Identity, ListOptions, Mode, ReplicaChange, RequestContext, StoreOptions, store::Store};
use edgemesh_telemetry::drain::Shutdown;
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};
use parking_lot::RwLock;
use prometheus_client::registry::Registry;
use serde_json::{Value, json};

pub const NODE: &str = "edge-t";
pub const POD_RANGE: &str = "10.88.7.0/24";
pub const POD_RANGE6: &str = "fd00:88:0:7::/64";
pub const NODE_ADDRESSES: [&str; 2] = ["192.168.88.7", "fd00:aa::7"];
/// Long enough for two slow cores that others use, too.
const DEADLINE: Duration = Duration::from_secs(60);

/// Runs a test inside of a new node. The thread has a network and mounts of its own, and with it everything that it starts.
pub fn on_node<F>(test: impl FnOnce(Node) -> F + Send + 'static)
where
    F: Future<Output = Node>,
{
    let body = move || {
        // Namespaces without a name: they go with the last process in them, whatever happens to the test.
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("these tests need root");
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        mount_run();
        run(&["ip", "link", "set", "lo", "up"]);
        let files = Files::new();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let node = Node::boot(files).await;
            let node = Box::pin(test(node)).await;
            node.stop().await;
        });
    };
    if let Err(panic) = std::thread::spawn(body).join() {
        std::panic::resume_unwind(panic);
    }
}

/// What survives a reboot, and is removed at the end of the test.
pub struct Files {
    folder: tempfile::TempDir,
    id: String,
}

impl Files {
    fn new() -> Self {
        let folder = tempfile::Builder::new().prefix("pods-").tempdir().unwrap();
        let id = folder.path().file_name().unwrap().to_str().unwrap().to_lowercase();
        let files = Self { folder, id };
        fs::write(files.path("resolv.conf"), "nameserver 192.0.2.1\nsearch lan.example\n").unwrap();
        fs::create_dir(files.path("cni")).unwrap();
        fs::write(files.path("containerd.toml"), files.containerd_config()).unwrap();
        files
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn cgroup_root(&self) -> String {
        format!("/{}/node", self.id)
    }

    fn containerd_config(&self) -> String {
        let path = |name: &str| self.path(name).display().to_string();
        format!(
            r#"version = 2
root = "{root}"
state = "/run/containerd"
disabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.devmapper"]
[grpc]
  address = "{socket}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "edgemesh.dev/pause:1"
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{cni}"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
    SystemdCgroup = false
"#,
            root = path("root"),
            socket = path("containerd.sock"),
            cni = path("cni"),
        )
    }

    /// Every process of this node: in its cgroups, the runtime and its shims.
    fn processes(&self) -> Vec<i32> {
        let mut found = Vec::new();
        let mounts = fs::read_to_string("/proc/thread-self/mounts").unwrap();
        for line in mounts.lines() {
            let fields: Vec<&str> = line.split(' ').collect();
            if matches!(fields[2], "cgroup" | "cgroup2") {
                pids_below(&Path::new(fields[1]).join(&self.id), &mut found);
            }
        }
        let socket = self.path("containerd.sock").display().to_string();
        let configuration = self.path("containerd.toml").display().to_string();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else { continue };
            let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command);
            let own_daemon = command.starts_with("containerd\0") && command.contains(&configuration);
            if own_daemon || command.contains("containerd-shim") && command.contains(&socket) {
                found.push(pid);
            }
        }
        found.sort_unstable();
        found.dedup();
        found
    }

    /// As when the power fails: everything that runs is gone.
    fn kill_all(&self) {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let processes = self.processes();
            if processes.is_empty() {
                return;
            }
            assert!(Instant::now() < deadline, "processes {processes:?} do not end");
            for pid in processes {
                let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        self.kill_all();
        let folder = self.folder.path().display().to_string();
        let mounts = fs::read_to_string("/proc/thread-self/mounts").unwrap_or_default();
        let mut points: Vec<&str> =
            mounts.lines().filter_map(|line| line.split(' ').nth(1)).filter(|at| at.starts_with(&folder)).collect();
        points.sort_unstable();
        for at in points.iter().rev() {
            let _ = umount2(*at, MntFlags::MNT_DETACH);
        }
        for line in mounts.lines() {
            let fields: Vec<&str> = line.split(' ').collect();
            if matches!(fields[2], "cgroup" | "cgroup2") {
                remove_cgroup(&Path::new(fields[1]).join(&self.id));
            }
        }
    }
}

fn mount_run() {
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), Some("mode=755")).unwrap();
}

fn pids_below(folder: &Path, found: &mut Vec<i32>) {
    let Ok(text) = fs::read_to_string(folder.join("cgroup.procs")) else { return };
    found.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|pid| *pid > 0));
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            pids_below(&entry.path(), found);
        }
    }
}

fn remove_cgroup(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            remove_cgroup(&entry.path());
        }
    }
    let _ = fs::remove_dir(folder);
}

pub fn run(words: &[&str]) -> String {
    let output = Command::new(words[0]).args(&words[1..]).output().unwrap();
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The lab's images as archives, built once.
fn images() -> &'static Path {
    static IMAGES: OnceLock<PathBuf> = OnceLock::new();
    IMAGES.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("images");
        let script = Path::new(&std::env::var("CARGO_MANIFEST_DIR").unwrap()).join("../scripts/build-images.sh");
        run(&[script.to_str().unwrap(), folder.to_str().unwrap()]);
        folder
    })
}

/// A node that runs.
pub struct Node {
    pub files: Files,
    pub store: Store,
    containerd: Child,
    shutdown: Shutdown,
    pub runner: Option<PodRunner>,
    version: u64,
}

impl Node {
    async fn boot(files: Files) -> Self {
        let options = StoreOptions::small();
        let mode = Mode::Replica { node: NODE.to_owned() };
        let store = Store::open(&files.path("store.db"), mode, options).await.unwrap();
        let containerd = start_containerd(&files).await;
        for archive in ["pause.tar", "demo.tar"] {
            let archive = images().join(archive);
            let socket = files.path("containerd.sock");
            let words = ["-a", socket.to_str().unwrap(), "-n", "k8s.io", "images", "import", archive.to_str().unwrap()];
            run(&[&["ctr"], words.as_slice()].concat());
        }
        let mut node = Self { files, store, containerd, shutdown: Shutdown::default(), runner: None, version: 0 };
        node.apply_node("n-1", [POD_RANGE, POD_RANGE6]).await;
        node.set_addresses(&NODE_ADDRESSES).await;
        node.start_runner();
        node
    }

    fn start_runner(&mut self) {
        let config = PodRunnerConfig {
            node_name: NODE.to_owned(),
            cri_socket: self.files.path("containerd.sock"),
            cgroup_root: self.files.cgroup_root(),
            pods_dir: self.files.path("pods"),
            cluster_dns: vec![IpAddr::from([10, 96, 0, 10])],
            cluster_domain: "cluster.local".to_owned(),
            resolv_conf: self.files.path("resolv.conf"),
            cni_conf_dir: self.files.path("cni"),
            cni_bin_dir: PathBuf::from("/usr/lib/cni"),
            cluster_ranges: ["10.88.0.0/16", "fd00:88::/48"].map(str::to_owned).into(),
        };
        self.shutdown = Shutdown::default();
        let registry = Arc::new(RwLock::new(Registry::default()));
        self.runner = Some(PodRunner::start(config, self.store.clone(), &self.shutdown, &registry).unwrap());
    }

    /// Stops the runner; the pods keep running.
    pub async fn stop_runner(&mut self) {
        self.runner = None;
        assert!(self.shutdown.drain(Duration::from_secs(10)).await, "the runner does not stop");
    }

    /// The power fails and comes back; `change` happens to the store in between.
    pub async fn reboot(&mut self) {
        self.runner = None;
        self.shutdown.drain(Duration::ZERO).await;
        self.containerd.kill().unwrap();
        self.containerd.wait().unwrap();
        self.files.kill_all();
        // No mount outlives a reboot, and /run is empty after it: the runtime's state, the pods' network namespaces.
        for line in fs::read_to_string("/proc/thread-self/mounts").unwrap().lines().rev() {
            let at = Path::new(line.split(' ').nth(1).unwrap());
            if at.starts_with(self.files.folder.path()) || at.starts_with("/run") {
                // One that is below another goes with it.
                let _ = umount2(at, MntFlags::MNT_DETACH);
            }
        }
        mount_run();
        self.containerd = start_containerd(&self.files).await;
    }

    /// After [`Self::reboot`], or [`Self::stop_runner`].
    pub fn start(&mut self) {
        self.start_runner();
    }

    /// Kills the process that holds a pod's sandbox.
    pub async fn kill_sandbox(&self, uid: &str) {
        let runtime = self.runner.as_ref().unwrap().runtime();
        let id = runtime.sandboxes(Some(uid)).await.unwrap().remove(0).id;
        let is_its_own = |pid: &&i32| {
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "pause")
                && fs::read_to_string(format!("/proc/{pid}/cgroup")).is_ok_and(|cgroups| cgroups.contains(&id))
        };
        let processes = self.files.processes();
        let pid = processes.iter().find(is_its_own).expect("a sandbox has a process");
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(*pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    }

    async fn stop(mut self) {
        self.stop_runner().await;
        self.containerd.kill().unwrap();
        self.containerd.wait().unwrap();
    }

    /// The cloud has this object now.
    pub async fn apply(&mut self, plural: &str, mut object: Value) {
        self.version += 1;
        let group = if plural == "leases" { "coordination.k8s.io" } else { "" };
        let meta = &mut object["metadata"];
        if meta.get("uid").is_none() {
            meta["uid"] = json!(format!("uid-{}", self.version));
        }
        meta["creationTimestamp"] = json!("2026-01-01T00:00:00Z");
        let text = |name: &str| object["metadata"][name].as_str().unwrap_or_default().to_owned();
        let key = ObjectKey::new(ResourceName::new(group, "v1", plural), text("namespace"), text("name"));
        let change = ReplicaChange::Upsert { key, origin_version: self.version.to_string(), object };
        self.store.apply_replica(vec![change]).await.unwrap();
    }

    /// The object is gone from the cloud.
    pub async fn forget(&mut self, plural: &str, name: &str) {
        let key = ObjectKey::new(ResourceName::new("", "v1", plural), "shop", name);
        self.store.apply_replica(vec![ReplicaChange::Delete { key, uid: None }]).await.unwrap();
    }

    /// The cloud has the own Node with these pod ranges.
    pub async fn apply_node(&mut self, uid: &str, ranges: [&str; 2]) {
        let spec = json!({"podCIDR": ranges[0], "podCIDRs": ranges});
        self.apply(
            "nodes",
            json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE, "uid": uid}, "spec": spec}),
        )
        .await;
    }

    /// The node says its addresses, as edgecore does when it has found them.
    pub async fn set_addresses(&self, addresses: &[&str]) {
        let key = ObjectKey::new(ResourceName::new("", "v1", "nodes"), "", NODE);
        let mut node = (*self.store.get(&key).await.unwrap()).clone();
        let addresses: Vec<_> = addresses.iter().map(|ip| json!({"type": "InternalIP", "address": ip})).collect();
        node["status"]["addresses"] = json!(addresses);
        self.store.update_status(&key, node, &RequestContext::new(Identity::node(NODE))).await.unwrap();
    }

    pub async fn apply_pod(&mut self, name: &str, uid: &str, spec: Value) {
        self.apply("pods", pod(name, uid, spec)).await;
    }

    /// Starts the graceful deletion of a pod, as the cloud does.
    pub async fn delete_pod(&mut self, name: &str, grace: u64) {
        let mut object = (*self.pod(name).await.expect("no such pod")).clone();
        object["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        object["metadata"]["deletionGracePeriodSeconds"] = json!(grace);
        self.apply("pods", object).await;
    }

    pub async fn pod(&self, name: &str) -> Option<Arc<Value>> {
        self.store.get(&ObjectKey::new(ResourceName::new("", "v1", "pods"), "shop", name)).await.ok()
    }

    /// Waits until a pod is as wanted.
    pub async fn wait(&self, name: &str, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let pod = self.pod(name).await;
            if let Some(pod) = &pod
                && wanted(pod)
            {
                return (**pod).clone();
            }
            let status = pod.map(|pod| format!("{:#}", pod["status"]));
            assert!(Instant::now() < deadline, "{name} is not {what}: {}", status.unwrap_or_default());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub async fn wait_ready(&self, name: &str) -> Value {
        self.wait(name, "ready", is_ready).await
    }

    /// Waits until something holds.
    pub async fn until(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !holds() {
            assert!(Instant::now() < deadline, "not so: {what}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub async fn wait_gone(&self, name: &str) {
        let deadline = Instant::now() + DEADLINE;
        while self.pod(name).await.is_some() {
            assert!(Instant::now() < deadline, "{name} is still there");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub fn folder(&self, uid: &str) -> PathBuf {
        self.files.path("pods").join(uid)
    }

    /// What a container has printed.
    pub fn log(&self, uid: &str, container: &str, attempt: u32) -> String {
        let path = self.folder(uid).join("logs").join(container).join(format!("{attempt}.log"));
        let text = fs::read_to_string(path).unwrap_or_default();
        // Each line: time, stream, flag, text.
        text.lines().filter_map(|line| line.splitn(4, ' ').nth(3)).map(|line| format!("{line}\n")).collect()
    }

    /// The ids of the pod's containers in the runtime.
    pub async fn containers(&self, uid: &str) -> Vec<String> {
        let runtime = self.runner.as_ref().unwrap().runtime();
        let mut ids: Vec<_> =
            runtime.containers(Some(uid)).await.unwrap().into_iter().map(|container| container.id).collect();
        ids.extend(runtime.sandboxes(Some(uid)).await.unwrap().into_iter().map(|sandbox| sandbox.id));
        ids
    }

    /// Waits until there are events about a pod with these reasons. They are written after the status that they explain.
    pub async fn wait_events(&self, pod: &str, reasons: &[&str]) {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let found = self.event_reasons(pod).await;
            if reasons.iter().all(|reason| found.iter().any(|found| found == reason)) {
                return;
            }
            assert!(Instant::now() < deadline, "events of {pod} have the reasons {found:?}, not all of {reasons:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn event_reasons(&self, pod: &str) -> Vec<String> {
        let list = self.store.list(&ResourceName::new("", "v1", "events"), &ListOptions::namespace("shop")).await;
        let events = list.unwrap().items;
        let about = events.iter().filter(|event| event["involvedObject"]["name"] == pod);
        about.map(|event| event["reason"].as_str().unwrap().to_owned()).collect()
    }

    /// Whether any hierarchy has a cgroup of the pod.
    pub fn has_cgroup(&self, uid: &str) -> bool {
        let mounts = fs::read_to_string("/proc/thread-self/mounts").unwrap();
        mounts.lines().any(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            let below = format!("{}/pod{uid}", self.files.cgroup_root().trim_start_matches('/'));
            matches!(fields[2], "cgroup" | "cgroup2") && Path::new(fields[1]).join(below).exists()
        })
    }
}

async fn start_containerd(files: &Files) -> Child {
    let log = fs::File::options().create(true).append(true).open(files.path("containerd.log")).unwrap();
    let child = Command::new("containerd")
        .args(["--config", files.path("containerd.toml").to_str().unwrap()])
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .expect("containerd is not installed");
    let deadline = Instant::now() + DEADLINE;
    let socket = files.path("containerd.sock");
    loop {
        let answers = Command::new("ctr").args(["-a", socket.to_str().unwrap(), "version"]).output().unwrap();
        if answers.status.success() {
            return child;
        }
        let log = fs::read_to_string(files.path("containerd.log")).unwrap_or_default();
        assert!(Instant::now() < deadline, "containerd does not answer: {log}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A pod of this node.
pub fn pod(name: &str, uid: &str, mut spec: Value) -> Value {
    spec["nodeName"] = json!(NODE);
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": "shop", "uid": uid, "labels": {"app": name}},
        "spec": spec,
    })
}

pub fn is_ready(pod: &Value) -> bool {
    let conditions = pod["status"]["conditions"].as_array().cloned().unwrap_or_default();
    pod["status"]["phase"] == "Running" && conditions.iter().any(|c| c["type"] == "Ready" && c["status"] == "True")
}

/// A container that runs a shell script in the demo image.
pub fn shell(name: &str, script: &str) -> Value {
    json!({"name": name, "image": "edgemesh.dev/demo:1", "command": ["/bin/sh", "-c", script]})
}
