//! A small cluster for tests: the real `hub --standalone` as a child process, and real edgecores in this process.

use std::{
    net::{IpAddr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use edgecore::{
    app::Bound,
    config::{Config, ListenConfig},
};
use kube::{
    Client,
    config::{KubeConfigOptions, Kubeconfig},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// How long anything may take before a test fails.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// Waits until `condition` gives a value.
pub(crate) async fn eventually<T, F>(what: &str, mut condition: impl FnMut() -> F) -> T
where
    F: Future<Output = Result<T, String>>,
{
    let deadline = Instant::now() + DEADLINE;
    loop {
        match condition().await {
            Ok(value) => return value,
            Err(why) => assert!(Instant::now() < deadline, "{what}: not within {DEADLINE:?}: {why}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A hub in a process of its own.
pub(crate) struct Hub {
    child: Child,
    pub(crate) folder: tempfile::TempDir,
    pub(crate) api: SocketAddr,
    pub(crate) link: SocketAddr,
    pub(crate) admin: SocketAddr,
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.kill();
    }
}

/// An address that stays free for a hub that is started later, and started again: below the ports that the kernel gives to
/// outgoing connections (32768 and up), and given only once by this process.
fn free_address() -> SocketAddr {
    static GIVEN: AtomicU32 = AtomicU32::new(0);
    loop {
        let number = std::process::id().wrapping_mul(97).wrapping_add(GIVEN.fetch_add(1, Ordering::Relaxed));
        let address = SocketAddr::from(([127, 0, 0, 1], 20_000 + u16::try_from(number % 12_000).unwrap()));
        if TcpListener::bind(address).is_ok() {
            return address;
        }
    }
}

impl Hub {
    /// Starts one and waits until it is ready.
    pub(crate) async fn start() -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        edgemesh_telemetry::logging::start(
            "warn,edgecore=info,kube_client=off",
            edgemesh_telemetry::logging::LogFormat::Text,
        );
        let folder = tempfile::tempdir().unwrap();
        let (api, link, admin) = (free_address(), free_address(), free_address());
        let child = spawn(folder.path(), api, link, admin);
        let hub = Self { child, folder, api, link, admin };
        hub.wait_ready().await;
        hub
    }

    /// Starts one that takes its objects from the API of another.
    pub(crate) async fn beside(other: &Self) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (link, admin) = (free_address(), free_address());
        std::fs::copy(other.kubeconfig(), folder.path().join("admin.kubeconfig")).unwrap();
        let kubeconfig = format!("kubeconfig={}", folder.path().join("admin.kubeconfig").display());
        let child = program(folder.path(), link, admin).args(["--set", &kubeconfig]).spawn().unwrap();
        let hub = Self { child, folder, api: other.api, link, admin };
        hub.wait_ready().await;
        hub
    }

    /// kill -9, as from outside.
    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Starts it again on the same folder and ports.
    pub(crate) fn restart(&mut self) {
        self.child = spawn(self.folder.path(), self.api, self.link, self.admin);
    }

    /// Waits until `/readyz` says yes.
    pub(crate) async fn wait_ready(&self) {
        let admin = self.admin;
        eventually("the hub is ready", || async move {
            let answer = http_get(admin, "/readyz").await?;
            if answer.starts_with("HTTP/1.1 200") { Ok(()) } else { Err(answer) }
        })
        .await;
    }

    /// The administrator's kubeconfig.
    pub(crate) fn kubeconfig(&self) -> PathBuf {
        self.folder.path().join("admin.kubeconfig")
    }

    /// The administrator's client.
    pub(crate) async fn client(&self) -> Client {
        let file = Kubeconfig::read_from(self.kubeconfig()).unwrap();
        let config = kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.unwrap();
        Client::try_from(config).unwrap()
    }

    /// The address that nodes are given.
    pub(crate) fn url(&self) -> String {
        format!("https://{}", self.link)
    }

    /// Runs the hub's command.
    pub(crate) fn command(&self, arguments: &[&str]) -> Output {
        let data_dir = format!("dataDir={}", self.folder.path().display());
        Command::new(env!("CARGO_BIN_EXE_hub")).args(arguments).args(["--set", &data_dir]).output().unwrap()
    }

    /// A token for a node.
    pub(crate) fn token(&self, node: &str) -> String {
        let output = self.command(&["token", "create", "--node", node]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }
}

fn spawn(folder: &Path, api: SocketAddr, link: SocketAddr, admin: SocketAddr) -> Child {
    let listen = format!("api.listen=\"{api}\"");
    program(folder, link, admin).args(["--standalone", "--set", &listen]).spawn().unwrap()
}

fn program(folder: &Path, link: SocketAddr, admin: SocketAddr) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hub"));
    command
        .args(["--set", &format!("dataDir={}", folder.display())])
        .args(["--set", &format!("link.listen=\"{link}\"")])
        .args(["--set", &format!("admin.listen=\"{admin}\"")])
        .env("EDGEMESH_LOG", std::env::var("EDGEMESH_TEST_LOG").unwrap_or_else(|_| "warn".to_owned()))
        .stdin(Stdio::null());
    command
}

/// The answer to a plain GET, headers and all.
pub(crate) async fn http_get(address: SocketAddr, path: &str) -> Result<String, String> {
    let exchange = async {
        let mut stream = TcpStream::connect(address).await?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok::<_, std::io::Error>(answer)
    };
    let answer = tokio::time::timeout(Duration::from_secs(5), exchange).await.map_err(|_| "no answer".to_owned())?;
    answer.map_err(|error| error.to_string())
}

/// A node of the cluster: its folder, and its edgecore while it runs.
pub(crate) struct Edge {
    pub(crate) name: String,
    pub(crate) folder: tempfile::TempDir,
    pub(crate) bound: Option<Bound>,
}

impl Edge {
    /// Joins and starts a node without a container runtime.
    pub(crate) async fn join(hub: &Hub, name: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        edgecore::join::join(folder.path(), &hub.url(), &hub.token(name), name).await.unwrap();
        let mut edge = Self { name: name.to_owned(), folder, bound: None };
        edge.start().await;
        edge
    }

    /// Starts its edgecore.
    pub(crate) async fn start(&mut self) {
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let config = Config {
            data_dir: self.folder.path().to_owned(),
            node_ip: Some(IpAddr::from([127, 0, 0, 1])),
            network: Some("lan".to_owned()),
            cri_socket: PathBuf::new(),
            metaserver: ListenConfig { listen: any },
            admin: edgemesh_telemetry::AdminConfig { listen: any },
            ..Config::default()
        };
        self.bound = Some(edgecore::app::build(config).await.unwrap());
    }

    /// Stops its edgecore.
    pub(crate) async fn stop(&mut self) {
        if let Some(bound) = self.bound.take() {
            bound.stop().await;
        }
    }

    pub(crate) fn bound(&self) -> &Bound {
        self.bound.as_ref().unwrap()
    }

    /// A client of its metaserver.
    pub(crate) fn client(&self) -> Client {
        let url = format!("http://{}", self.bound().metaserver).parse().unwrap();
        Client::try_from(kube::Config::new(url)).unwrap()
    }

    /// Waits until it holds all that it should have held when it connected.
    pub(crate) async fn wait_live(&self) {
        eventually("the node is live", || async {
            let state = self.bound().link.describe();
            if state["state"] == "live" { Ok(()) } else { Err(state.to_string()) }
        })
        .await;
    }
}
