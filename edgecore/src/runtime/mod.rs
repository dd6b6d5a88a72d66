//! The container runtime: a client of the Container Runtime Interface v1 over its Unix socket, with deadlines and timings.

pub mod metrics;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use hyper_util::rt::TokioIo;
use k8s_cri::v1::{self, image_service_client::ImageServiceClient, runtime_service_client::RuntimeServiceClient};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};

pub use metrics::RuntimeMetrics;
use serde_json::Value;

/// Deadline of a call that only reads state.
const READ_DEADLINE: Duration = Duration::from_secs(10);
/// Deadline of a call that changes a sandbox or a container; network plugins run inside some of them.
const CHANGE_DEADLINE: Duration = Duration::from_secs(60);
/// Deadline of one image pull: large images on slow links take long.
const PULL_DEADLINE: Duration = Duration::from_secs(30 * 60);
/// Largest answer that is read from the runtime.
const MAX_ANSWER_BYTES: usize = 16 << 20;

/// Label of every sandbox and container: the pod's name.
pub const LABEL_POD_NAME: &str = "io.kubernetes.pod.name";
/// Label of every sandbox and container: the pod's namespace.
pub const LABEL_POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
/// Label of every sandbox and container: the pod's uid.
pub const LABEL_POD_UID: &str = "io.kubernetes.pod.uid";
/// Label of every container: its name in the pod's spec.
pub const LABEL_CONTAINER_NAME: &str = "io.kubernetes.container.name";

/// Why a call to the runtime failed.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The socket's path can't be used as an endpoint.
    #[error("the CRI socket {socket}: {source}")]
    Endpoint {
        /// The configured socket.
        socket: PathBuf,
        /// What was wrong with it.
        source: tonic::transport::Error,
    },
    /// The runtime answered with an error, or not at all.
    #[error("{operation}: {message}")]
    Call {
        /// The CRI method.
        operation: &'static str,
        /// The gRPC code.
        code: tonic::Code,
        /// The runtime's words.
        message: String,
    },
    /// The runtime did not answer in time.
    #[error("{operation}: no answer within {deadline:?}")]
    Deadline {
        /// The CRI method.
        operation: &'static str,
        /// How long was waited.
        deadline: Duration,
    },
    /// The runtime's answer lacks a part that it must have.
    #[error("{operation}: the answer has no {part}")]
    Incomplete {
        /// The CRI method.
        operation: &'static str,
        /// What is missing.
        part: &'static str,
    },
}

impl RuntimeError {
    /// Whether the runtime says that the thing does not exist.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Call { code: tonic::Code::NotFound, .. })
    }

    /// Whether the runtime itself could not be reached.
    pub fn is_unreachable(&self) -> bool {
        matches!(self, Self::Call { code: tonic::Code::Unavailable, .. } | Self::Deadline { .. })
    }
}

/// What the runtime calls itself, for the Node's `status.nodeInfo`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RuntimeVersion {
    /// For example `containerd`.
    pub name: String,
    /// For example `1.6.20`.
    pub version: String,
}

impl RuntimeVersion {
    /// `containerd://1.6.20`, as in `status.nodeInfo.containerRuntimeVersion`.
    pub fn node_info(&self) -> String {
        format!("{}://{}", self.name, self.version)
    }
}

/// One of the runtime's conditions (`RuntimeReady`, `NetworkReady`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RuntimeCondition {
    /// Whether it holds.
    pub ready: bool,
    /// One word for it.
    pub reason: String,
    /// A sentence for people.
    pub message: String,
}

/// The runtime's state as it reports it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RuntimeStatus {
    /// Whether containers can be run.
    pub runtime: RuntimeCondition,
    /// Whether sandboxes get a network.
    pub network: RuntimeCondition,
}

/// A client of the runtime. Cheap to clone; connects when it is used, and again after the runtime was restarted.
#[derive(Debug, Clone)]
pub struct Runtime {
    channel: Channel,
    socket: Arc<PathBuf>,
    metrics: RuntimeMetrics,
}

impl Runtime {
    /// A client of the runtime behind `socket`. The socket need not exist yet.
    ///
    /// # Errors
    /// When no endpoint can be made.
    pub fn new(socket: &Path, metrics: RuntimeMetrics) -> Result<Self, RuntimeError> {
        // The address is never resolved: the connector opens the socket.
        let endpoint = Endpoint::try_from("http://cri.invalid")
            .map_err(|source| RuntimeError::Endpoint { socket: socket.to_owned(), source })?
            .connect_timeout(READ_DEADLINE);
        let socket = Arc::new(socket.to_owned());
        let path = Arc::clone(&socket);
        let channel = endpoint.connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
            let path = Arc::clone(&path);
            async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(path.as_path()).await?)) }
        }));
        Ok(Self { channel, socket, metrics })
    }

    /// The runtime's socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    fn runtime(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_ANSWER_BYTES)
    }

    fn images(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_ANSWER_BYTES)
    }

    async fn call<T, F>(&self, operation: &'static str, deadline: Duration, call: F) -> Result<T, RuntimeError>
    where
        F: Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    {
        let begun = Instant::now();
        let result = match tokio::time::timeout(deadline, Box::pin(call)).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => {
                Err(RuntimeError::Call { operation, code: status.code(), message: one_line(status.message()) })
            }
            Err(_) => Err(RuntimeError::Deadline { operation, deadline }),
        };
        self.metrics.observe(operation, begun.elapsed(), result.is_ok());
        result
    }

    /// The runtime's name and version.
    ///
    /// # Errors
    /// When the runtime can't be reached.
    pub async fn version(&self) -> Result<RuntimeVersion, RuntimeError> {
        let request = v1::VersionRequest { version: "v1".to_owned() };
        let answer = self.call("version", READ_DEADLINE, self.runtime().version(request)).await?;
        // Debian writes `1.6.20~ds1`; a Node's field takes it as it is.
        Ok(RuntimeVersion { name: answer.runtime_name, version: answer.runtime_version })
    }

    /// Whether the runtime and its network are ready.
    ///
    /// # Errors
    /// When the runtime can't be reached.
    pub async fn status(&self) -> Result<RuntimeStatus, RuntimeError> {
        let request = v1::StatusRequest { verbose: false };
        let answer = self.call("status", READ_DEADLINE, self.runtime().status(request)).await?;
        let mut status = RuntimeStatus::default();
        for condition in answer.status.unwrap_or_default().conditions {
            let found =
                RuntimeCondition { ready: condition.status, reason: condition.reason, message: condition.message };
            match condition.r#type.as_str() {
                "RuntimeReady" => status.runtime = found,
                "NetworkReady" => status.network = found,
                _ => {}
            }
        }
        Ok(status)
    }

    /// All sandboxes, or those of one pod.
    ///
    /// # Errors
    /// When the runtime can't be reached.
    pub async fn sandboxes(&self, pod_uid: Option<&str>) -> Result<Vec<v1::PodSandbox>, RuntimeError> {
        let filter = pod_uid.map(|uid| v1::PodSandboxFilter { label_selector: uid_label(uid), ..Default::default() });
        let request = v1::ListPodSandboxRequest { filter };
        Ok(self.call("list_pod_sandbox", READ_DEADLINE, self.runtime().list_pod_sandbox(request)).await?.items)
    }

    /// All containers, or those of one pod.
    ///
    /// # Errors
    /// When the runtime can't be reached.
    pub async fn containers(&self, pod_uid: Option<&str>) -> Result<Vec<v1::Container>, RuntimeError> {
        let filter = pod_uid.map(|uid| v1::ContainerFilter { label_selector: uid_label(uid), ..Default::default() });
        let request = v1::ListContainersRequest { filter };
        Ok(self.call("list_containers", READ_DEADLINE, self.runtime().list_containers(request)).await?.containers)
    }

    /// The state of one sandbox, with its addresses.
    ///
    /// # Errors
    /// When the sandbox does not exist or the runtime can't be reached.
    pub async fn sandbox_status(&self, id: &str) -> Result<v1::PodSandboxStatus, RuntimeError> {
        let request = v1::PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: false };
        let operation = "pod_sandbox_status";
        let answer = self.call(operation, READ_DEADLINE, self.runtime().pod_sandbox_status(request)).await?;
        answer.status.ok_or(RuntimeError::Incomplete { operation, part: "status" })
    }

    /// The state of one sandbox, and the file of its network namespace, as the runtime tells it in its own words (containerd and
    /// CRI-O alike); none where it doesn't.
    ///
    /// # Errors
    /// When the sandbox does not exist or the runtime can't be reached.
    pub async fn sandbox_with_namespace(
        &self,
        id: &str,
    ) -> Result<(v1::PodSandboxStatus, Option<PathBuf>), RuntimeError> {
        let request = v1::PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: true };
        let operation = "pod_sandbox_status";
        let answer = self.call(operation, READ_DEADLINE, self.runtime().pod_sandbox_status(request)).await?;
        let info: Value = answer.info.get("info").and_then(|info| serde_json::from_str(info).ok()).unwrap_or_default();
        let namespaces = info["runtimeSpec"]["linux"]["namespaces"].as_array();
        let network = namespaces.into_iter().flatten().find(|namespace| namespace["type"] == "network");
        let file = network.and_then(|network| network["path"].as_str()).map(PathBuf::from);
        Ok((answer.status.ok_or(RuntimeError::Incomplete { operation, part: "status" })?, file))
    }

    /// The state of one container, with its exit code.
    ///
    /// # Errors
    /// When the container does not exist or the runtime can't be reached.
    pub async fn container_status(&self, id: &str) -> Result<v1::ContainerStatus, RuntimeError> {
        let request = v1::ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
        let operation = "container_status";
        let answer = self.call(operation, READ_DEADLINE, self.runtime().container_status(request)).await?;
        answer.status.ok_or(RuntimeError::Incomplete { operation, part: "status" })
    }

    /// Creates and starts a sandbox; returns its id.
    ///
    /// # Errors
    /// When the runtime refuses or the network plugins fail.
    pub async fn run_sandbox(&self, config: v1::PodSandboxConfig, handler: &str) -> Result<String, RuntimeError> {
        let request = v1::RunPodSandboxRequest { config: Some(config), runtime_handler: handler.to_owned() };
        let answer = self.call("run_pod_sandbox", CHANGE_DEADLINE, self.runtime().run_pod_sandbox(request)).await?;
        Ok(answer.pod_sandbox_id)
    }

    /// Stops a sandbox and all in it, and gives its address back. A sandbox that is gone is no error.
    ///
    /// # Errors
    /// When the runtime can't do it.
    pub async fn stop_sandbox(&self, id: &str) -> Result<(), RuntimeError> {
        let request = v1::StopPodSandboxRequest { pod_sandbox_id: id.to_owned() };
        absent_is_done(self.call("stop_pod_sandbox", CHANGE_DEADLINE, self.runtime().stop_pod_sandbox(request)).await)
    }

    /// Removes a stopped sandbox and its containers. A sandbox that is gone is no error.
    ///
    /// # Errors
    /// When the runtime can't do it.
    pub async fn remove_sandbox(&self, id: &str) -> Result<(), RuntimeError> {
        let request = v1::RemovePodSandboxRequest { pod_sandbox_id: id.to_owned() };
        absent_is_done(
            self.call("remove_pod_sandbox", CHANGE_DEADLINE, self.runtime().remove_pod_sandbox(request)).await,
        )
    }

    /// Creates a container in a sandbox; returns its id.
    ///
    /// # Errors
    /// When the runtime refuses it.
    pub async fn create_container(
        &self,
        sandbox_id: &str,
        config: v1::ContainerConfig,
        sandbox_config: v1::PodSandboxConfig,
    ) -> Result<String, RuntimeError> {
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: sandbox_id.to_owned(),
            config: Some(config),
            sandbox_config: Some(sandbox_config),
        };
        let answer = self.call("create_container", CHANGE_DEADLINE, self.runtime().create_container(request)).await?;
        Ok(answer.container_id)
    }

    /// Starts a created container.
    ///
    /// # Errors
    /// When its process can't be started.
    pub async fn start_container(&self, id: &str) -> Result<(), RuntimeError> {
        let request = v1::StartContainerRequest { container_id: id.to_owned() };
        self.call("start_container", CHANGE_DEADLINE, self.runtime().start_container(request)).await.map(|_| ())
    }

    /// Asks a container to stop (its stop signal, by default SIGTERM), and kills it after `grace`. A container that is gone is no error.
    ///
    /// # Errors
    /// When the runtime can't do it.
    pub async fn stop_container(&self, id: &str, grace: Duration) -> Result<(), RuntimeError> {
        // Whole seconds, rounded up: nobody gets less than what was promised.
        let seconds = i64::try_from(grace.as_millis().div_ceil(1000)).unwrap_or(i64::MAX);
        let request = v1::StopContainerRequest { container_id: id.to_owned(), timeout: seconds };
        let deadline = grace.saturating_add(CHANGE_DEADLINE);
        absent_is_done(self.call("stop_container", deadline, self.runtime().stop_container(request)).await)
    }

    /// Removes a container. A container that is gone is no error.
    ///
    /// # Errors
    /// When the runtime can't do it.
    pub async fn remove_container(&self, id: &str) -> Result<(), RuntimeError> {
        let request = v1::RemoveContainerRequest { container_id: id.to_owned() };
        absent_is_done(self.call("remove_container", CHANGE_DEADLINE, self.runtime().remove_container(request)).await)
    }

    /// Lets the runtime open a container's log file again, after the old one was moved away.
    ///
    /// # Errors
    /// When the container does not run.
    pub async fn reopen_log(&self, id: &str) -> Result<(), RuntimeError> {
        let request = v1::ReopenContainerLogRequest { container_id: id.to_owned() };
        self.call("reopen_container_log", READ_DEADLINE, self.runtime().reopen_container_log(request)).await.map(|_| ())
    }

    /// The image that a reference names, if the runtime has it.
    ///
    /// # Errors
    /// When the reference is malformed or the runtime can't be reached.
    pub async fn image(&self, reference: &str) -> Result<Option<v1::Image>, RuntimeError> {
        let request = v1::ImageStatusRequest { image: Some(image_spec(reference)), verbose: false };
        Ok(self.call("image_status", READ_DEADLINE, self.images().image_status(request)).await?.image)
    }

    /// Pulls an image; returns the reference by which containers name it.
    ///
    /// # Errors
    /// When the registry can't be reached or refuses.
    pub async fn pull_image(
        &self,
        reference: &str,
        auth: Option<v1::AuthConfig>,
        sandbox_config: Option<v1::PodSandboxConfig>,
    ) -> Result<String, RuntimeError> {
        let request = v1::PullImageRequest { image: Some(image_spec(reference)), auth, sandbox_config };
        Ok(self.call("pull_image", PULL_DEADLINE, self.images().pull_image(request)).await?.image_ref)
    }
}

fn image_spec(reference: &str) -> v1::ImageSpec {
    v1::ImageSpec { image: reference.to_owned(), ..Default::default() }
}

fn uid_label(uid: &str) -> std::collections::HashMap<String, String> {
    std::collections::HashMap::from([(LABEL_POD_UID.to_owned(), uid.to_owned())])
}

fn absent_is_done<T>(result: Result<T, RuntimeError>) -> Result<(), RuntimeError> {
    match result {
        Ok(_) => Ok(()),
        Err(error) if error.is_not_found() => Ok(()),
        Err(error) => Err(error),
    }
}

/// Runtimes put several lines and whole command lines into errors; statuses and events take one bounded line.
fn one_line(message: &str) -> String {
    const MAX_CHARS: usize = 1024;
    message.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(MAX_CHARS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_runtime_that_is_not_there_is_unreachable_not_fatal() {
        let folder = tempfile::tempdir().unwrap();
        let runtime = Runtime::new(&folder.path().join("none.sock"), RuntimeMetrics::default()).unwrap();
        let error = runtime.version().await.unwrap_err();
        assert!(error.is_unreachable(), "{error}");
        assert!(error.to_string().starts_with("version: "), "{error}");
    }

    #[test]
    fn errors_become_one_bounded_line() {
        assert_eq!(one_line("a\n  b\tc"), "a b c");
        assert_eq!(one_line(&"x".repeat(5000)).len(), 1024);
    }
}
