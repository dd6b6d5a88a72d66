//! Where rows are played: a lab in one datapath mode, with pods that all rows share.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use edgemesh_lab::{
    Lab, Topology, command,
    lab::PodDoor,
    topology::{Datapath, NodeSpec, SiteSpec},
};
use parking_lot::{Mutex, RwLock};
use serde_json::{Value, json};

use crate::{case::Family, manifests};

/// The nodes. The two in the cloud share a network and a zone, and the outside client reaches their addresses; the others are
/// behind NAT, each in a network and a zone of its own.
pub const NODES: [&str; 4] = ["cloud-1", "cloud-2", "edge-a1", "edge-b1"];
/// Where all objects of the rows are.
pub const NAMESPACE: &str = "conformance";
const PODS_DEADLINE: Duration = Duration::from_secs(60);
/// Where labs have their files.
const ROOT: &str = "/var/lib/edgemesh-lab";

/// A datapath mode that all rows are played in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mode {
    /// Its name, which begins the names of its tests.
    pub name: &'static str,
    /// The lab's setting.
    pub datapath: Datapath,
}

/// The modes.
pub const MODES: &[Mode] =
    &[Mode { name: "ebpf", datapath: Datapath::Ebpf }, Mode { name: "nftables", datapath: Datapath::Nftables }];

/// A lab that is up.
#[derive(Debug)]
pub struct Field {
    /// The lab.
    pub lab: Lab,
    /// Its mode.
    pub mode: Mode,
    program: PathBuf,
    doors: Mutex<HashMap<String, PodDoor>>,
    /// Addresses by name, of IPv4 and of IPv6.
    nodes: BTreeMap<String, [String; 2]>,
    pods: BTreeMap<String, [String; 2]>,
    /// Rows that disturb others hold it for writing.
    pub(crate) undisturbed: RwLock<()>,
}

fn topology(mode: Mode) -> Topology {
    let node = |name: &str, zone: &str| NodeSpec {
        name: name.to_owned(),
        gateway: false,
        relay: name == "cloud-1",
        zone: Some(zone.to_owned()),
    };
    let site = |name: &str, node| SiteSpec { name: name.to_owned(), nodes: vec![node] };
    Topology {
        cloud: vec![node("cloud-1", "zone-c"), node("cloud-2", "zone-c")],
        sites: vec![site("site-a", node("edge-a1", "zone-a")), site("site-b", node("edge-b1", "zone-b"))],
        datapath: Some(mode.datapath),
        dual_stack: true,
    }
}

impl Field {
    /// [`Field::up`] for a test, whose program cargo put beside the others.
    ///
    /// # Errors
    /// As [`Field::up`].
    pub fn up_for_test(lab: &str, mode: Mode) -> Result<Self> {
        let program = std::env::current_exe()?;
        let programs = program.ancestors().nth(2).context("this program is in no folder")?;
        let root = Path::new(&std::env::var("CARGO_MANIFEST_DIR")?).join("../..").canonicalize()?;
        Self::up(lab, mode, programs, &root)
    }

    /// Brings a lab up and starts the shared pods: `server-NODE` and `client-NODE` on each node, and `host-NODE`, a server in the
    /// host's network. `purpose` begins the lab's name; `programs` is where the project's programs are, `root` the checkout.
    ///
    /// # Errors
    /// When something doesn't come up; the lab stays for a look.
    pub fn up(purpose: &str, mode: Mode, programs: &Path, root: &Path) -> Result<Self> {
        let lab = Lab::new(&format!("{purpose}{}", mode.name), Path::new(ROOT), programs.to_owned())?;
        let file = std::env::temp_dir().join(format!("edgemesh-{}.json", lab.id));
        std::fs::write(&file, serde_json::to_vec(&topology(mode))?)?;
        let field = Self {
            lab,
            mode,
            program: programs.join("lab"),
            doors: Mutex::default(),
            nodes: BTreeMap::new(),
            pods: BTreeMap::new(),
            undisturbed: RwLock::default(),
        };
        let mut up = field.lab_command(&["up", "--file", &file.display().to_string()]);
        up.env("EDGEMESH_IMAGES_SCRIPT", root.join("scripts/build-images.sh"));
        // Other checkouts have images of their own.
        up.env("EDGEMESH_IMAGES", programs.join("lab-images"));
        command::finish(&mut up)?;
        std::fs::remove_file(&file)?;
        field.populated()
    }

    /// Removes the lab.
    ///
    /// # Errors
    /// When something can't be removed.
    pub fn down(&self) -> Result<()> {
        command::finish(&mut self.lab_command(&["down"])).map(drop)
    }

    /// `./lab` for this lab.
    pub fn lab_command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(words).args(["--lab", &self.lab.id, "--root", ROOT]);
        command
    }

    fn populated(mut self) -> Result<Self> {
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}});
        self.kubectl("apply -f -", &namespace.to_string())?;
        for host in self.lab.topology()?.hosts() {
            let second = host.address6.context("the lab is dual-stack")?;
            self.nodes.insert(host.name, [host.address.to_string(), second.to_string()]);
        }
        let mut pods = Vec::new();
        for node in NODES {
            pods.push(manifests::pod(&format!("server-{node}"), node, &[("app", "server"), ("node", node)], &[]));
            pods.push(manifests::pod(&format!("client-{node}"), node, &[("app", "client")], &[]));
            let [address, second] = [Family::Primary, Family::Secondary].map(|family| self.address_of(node, family));
            let ports = ["--http", "18080", "--tcp", "17000", "--udp", "17000"];
            let ports = [&ports[..], &["--address", address?, "--address", second?]].concat();
            let mut host = manifests::pod(&format!("host-{node}"), node, &[("app", "host"), ("node", node)], &ports);
            host["spec"]["hostNetwork"] = json!(true);
            host["spec"]["dnsPolicy"] = json!("ClusterFirstWithHostNet");
            host["spec"]["containers"][0]["ports"] = json!([]);
            pods.push(host);
        }
        let count = pods.len();
        self.apply(&pods)?;
        let deadline = Instant::now() + PODS_DEADLINE;
        loop {
            let list = self.get("pods")?;
            let items = list["items"].as_array().context("a list has items")?;
            let ready: BTreeMap<_, _> = items.iter().filter_map(ready_pod).collect();
            if ready.len() == count {
                self.pods = ready;
                break;
            }
            ensure!(Instant::now() < deadline, "only {:?} are Ready", ready.keys());
            thread::sleep(Duration::from_millis(200));
        }
        let names: Vec<_> = self.pods.keys().cloned().collect();
        for name in names {
            let door = self.lab.pod_door(&format!("{NAMESPACE}/{name}"))?;
            self.doors.lock().insert(name, door);
        }
        Ok(self)
    }

    /// kubectl in the rows' namespace; `words` are split at spaces.
    ///
    /// # Errors
    /// When it fails, with what it said.
    pub fn kubectl(&self, words: &str, input: &str) -> Result<String> {
        let namespace = ["--namespace", NAMESPACE];
        let words: Vec<_> = namespace.into_iter().chain(words.split_whitespace()).map(str::to_owned).collect();
        command::feed(&mut self.lab.kubectl(&words), input)
    }

    /// Objects of the API.
    ///
    /// # Errors
    /// When there are none.
    pub fn get(&self, words: &str) -> Result<Value> {
        Ok(serde_json::from_str(&self.kubectl(&format!("get {words} -o json"), "")?)?)
    }

    /// Applies objects; gives them back as the API has them now.
    ///
    /// # Errors
    /// When one is refused.
    pub fn apply(&self, objects: &[Value]) -> Result<Vec<Value>> {
        let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
        let answer: Value = serde_json::from_str(&self.kubectl("apply -o json -f -", &list.to_string())?)?;
        Ok(match answer["items"].as_array() {
            Some(items) => items.clone(),
            None => vec![answer],
        })
    }

    /// A host's address.
    ///
    /// # Errors
    /// When there is no such host.
    pub fn address(&self, host: &str) -> Result<&str> {
        self.address_of(host, Family::Primary)
    }

    /// A host's address of a family.
    ///
    /// # Errors
    /// When there is no such host.
    pub fn address_of(&self, host: &str, family: Family) -> Result<&str> {
        let addresses = self.nodes.get(host).with_context(|| format!("no host {host}"))?;
        Ok(&addresses[family as usize])
    }

    /// Address of a shared pod.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn pod_ip(&self, pod: &str) -> Result<&str> {
        self.pod_ip_of(pod, Family::Primary)
    }

    /// Address of a shared pod, of a family.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn pod_ip_of(&self, pod: &str, family: Family) -> Result<&str> {
        let addresses = self.pods.get(pod).with_context(|| format!("no shared pod {pod}"))?;
        Ok(&addresses[family as usize])
    }

    /// A command in a pod of the rows' namespace.
    ///
    /// # Errors
    /// When no node runs it.
    pub fn in_pod(&self, pod: &str, program: &[String]) -> Result<Command> {
        let known = self.doors.lock().get(pod).cloned();
        match known {
            Some(door) => door.command(program),
            None => self.lab.pod_command(&format!("{NAMESPACE}/{pod}"), program),
        }
    }

    /// The program that pods call with, for hosts: an image's own file is of use in the image only.
    ///
    /// # Errors
    /// When the runtime of the node doesn't have it.
    pub fn call_program(&self) -> Result<PathBuf> {
        let path = self.lab.programs.join("lab-images/call");
        if !path.exists() {
            bail!("{}: scripts/build-images.sh makes it", path.display());
        }
        Ok(path)
    }
}

/// Name and addresses, if the pod is Ready.
fn ready_pod(pod: &Value) -> Option<(String, [String; 2])> {
    let conditions = pod["status"]["conditions"].as_array()?;
    let ready = conditions.iter().any(|condition| condition["type"] == "Ready" && condition["status"] == "True");
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let ip = |number: usize| text(&pod["status"]["podIPs"][number]["ip"]);
    if ready { Some((text(&pod["metadata"]["name"])?, [ip(0)?, ip(1)?])) } else { None }
}
