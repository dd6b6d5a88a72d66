//! How a pod's sandbox and containers are started.

use std::{
    fs,
    net::IpAddr,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use k8s_cri::v1::{Image, PodSandboxConfig};
use k8s_openapi::api::core::v1::{Container, Pod};

use super::{
    actual::{Actual, Run, Sandbox},
    container::{Prepared, container_config},
    dns::{ClusterDns, HostResolver, dns_config, is_host_network},
    env::Environment,
    images::{PullPolicy, credentials},
    inputs::Inputs,
    logs,
    sandbox::{addresses, hosts_file, sandbox_config, spec_grace_seconds},
    status::Waiting,
    volumes::{self, VolumeError, VolumePaths},
    worker::{Step, Worker},
};
use crate::{network::link_address, runtime::RuntimeError};

/// Something that a person or the cloud must change first; it's tried again when it does, or after this time.
const CONFIG_RETRY: Duration = Duration::from_secs(20);
/// How long a container that ran here before waits for a newer image (`Always`), before it takes the copy on the node.
const RENEWAL_DEADLINE: Duration = Duration::from_secs(10);
/// The key of the sandbox's backoff: no container can have this name.
const SANDBOX_KEY: &str = "/sandbox";

/// Why a container can't be started now: the state that is shown, and when to try again.
struct Obstacle {
    reason: &'static str,
    message: String,
    retry: Duration,
}

impl Worker {
    /// Makes the volumes, then a new sandbox in the place of the old ones.
    pub(super) async fn make_sandbox(
        &mut self,
        pod: &Arc<Pod>,
        actual: &Actual,
        attempt: u32,
        old: &[String],
    ) -> Result<Step, RuntimeError> {
        let host_network = pod.spec.as_ref().is_some_and(is_host_network);
        let network = self.shared.conditions.borrow().network.clone();
        if !host_network && !network.ready {
            self.all_wait(
                pod,
                "ContainerCreating",
                format!("the node's pod network is not ready: {}", network.message),
            );
            return Ok(Step::Wait(super::worker::RETRY));
        }
        let remaining = self.backoff.remaining(SANDBOX_KEY, Instant::now());
        if !remaining.is_zero() {
            return Ok(Step::Wait(remaining));
        }
        if let Err(message) = self.make_volumes(pod).await {
            self.event(None, true, "FailedMount", message.clone());
            self.all_wait(pod, "ContainerCreating", message);
            return Ok(Step::Wait(CONFIG_RETRY));
        }
        for run in actual.all_runs() {
            if run.ended() {
                continue;
            }
            let grace = Duration::from_secs(spec_grace_seconds(pod).unsigned_abs());
            self.shared.runtime.stop_container(&run.id, grace).await?;
        }
        for id in old {
            self.event(
                None,
                false,
                "SandboxChanged",
                "Pod sandbox changed, it will be killed and re-created.".to_owned(),
            );
            self.shared.runtime.stop_sandbox(id).await?;
            self.shared.runtime.remove_sandbox(id).await?;
        }
        let config = self.sandbox_config(pod, attempt);
        let result = {
            let _slot = self.shared.sandbox_slots.acquire().await;
            if !host_network && let Err(error) = self.shared.addresses.prepare(self.folder.path()) {
                tracing::warn!(pod = %self.name(), %error, "the pod may get another address than before");
            }
            self.shared.runtime.run_sandbox(config, "").await
        };
        match result {
            Ok(id) => {
                tracing::debug!(pod = %self.name(), sandbox = id, attempt, "made a sandbox");
                self.backoff.succeeded(SANDBOX_KEY);
                if !host_network {
                    self.remember_address(&id).await?;
                }
                Ok(Step::Again)
            }
            Err(error) if error.is_unreachable() => Err(error),
            Err(error) => {
                let message = format!("Failed to create pod sandbox: {error}");
                self.event(None, true, "FailedCreatePodSandBox", message.clone());
                self.all_wait(pod, "ContainerCreating", message);
                self.backoff.failed(SANDBOX_KEY, Instant::now(), Duration::ZERO, true);
                Ok(Step::Wait(self.backoff.remaining(SANDBOX_KEY, Instant::now()).max(super::worker::RETRY)))
            }
        }
    }

    async fn remember_address(&self, sandbox: &str) -> Result<(), RuntimeError> {
        let (status, namespace) = self.shared.runtime.sandbox_with_namespace(sandbox).await?;
        let addresses = addresses(&status);
        if let Err(error) = self.shared.addresses.remember(self.folder.path(), &addresses) {
            tracing::warn!(pod = %self.name(), %error, "the pod's addresses can't be kept for its next sandbox");
        }
        if let Some(IpAddr::V4(address)) = addresses.iter().find(|address| address.is_ipv4())
            && let Some(namespace) = namespace
            && let Err(error) = link_address::set(&namespace, *address).await
        {
            tracing::warn!(pod = %self.name(), %error, "the pod keeps a random link address: if it gets a new sandbox, it may be out of reach for a minute");
        }
        Ok(())
    }

    fn sandbox_config(&self, pod: &Pod, attempt: u32) -> PodSandboxConfig {
        let config = &self.shared.config;
        let host = fs::read_to_string(&config.resolv_conf).unwrap_or_default();
        let cluster = ClusterDns { servers: &config.cluster_dns, domain: &config.cluster_domain };
        let dns = dns_config(pod, cluster, &HostResolver::parse(&host));
        sandbox_config(pod, &self.identity, attempt, dns, &config.cgroup_root, &config.cluster_domain, &self.folder)
    }

    /// All containers wait for the same reason.
    fn all_wait(&mut self, pod: &Pod, reason: &'static str, message: String) {
        for container in pod.spec.iter().flat_map(|s| s.init_containers.iter().flatten().chain(&s.containers)) {
            self.waiting.insert(container.name.clone(), Waiting { reason, message: message.clone() });
        }
    }

    async fn make_volumes(&mut self, pod: &Arc<Pod>) -> Result<(), String> {
        let inputs = self.shared.api.inputs(pod).await.map_err(|error| error.to_string())?;
        let made: Option<Result<VolumePaths, VolumeError>> = self
            .on_disk(pod, inputs, |pod, folder, inputs, own| Some(volumes::prepare(pod, folder, inputs, own)))
            .await;
        match made {
            Some(Ok(paths)) => {
                self.volumes = Some(paths);
                Ok(())
            }
            Some(Err(error)) => Err(error.to_string()),
            None => Err("the work on the volumes was cut off".to_owned()),
        }
    }

    /// Stops a container whose image was changed, so that it's started anew.
    pub(super) async fn stop_changed(&mut self, pod: &Pod, id: &str) -> Result<(), RuntimeError> {
        self.event(None, false, "Killing", "Container definition changed, will be restarted".to_owned());
        let grace = Duration::from_secs(spec_grace_seconds(pod).unsigned_abs());
        self.shared.runtime.stop_container(id, grace).await
    }

    /// Starts a container, if nothing stands in the way.
    pub(super) async fn start_container(
        &mut self,
        pod: &Arc<Pod>,
        name: &str,
        actual: &Actual,
        sandbox: &Sandbox,
    ) -> Result<Step, RuntimeError> {
        let Some(container) = find_container(pod, name) else { return Ok(Step::Wait(CONFIG_RETRY)) };
        let remaining = self.backoff.remaining(name, Instant::now());
        if !remaining.is_zero() {
            let wait = self.backoff.wait(name);
            let message = format!(
                "back-off {}s restarting failed container={name} pod={}_{}({})",
                wait.as_secs(),
                self.identity.name,
                self.identity.namespace,
                self.identity.uid
            );
            if self.waiting.get(name).is_none_or(|w| w.reason != "CrashLoopBackOff") {
                let text = format!("Back-off restarting failed container {name} in pod {}", self.name());
                self.event(Some(name), true, "BackOff", text);
            }
            self.waiting.insert(name.to_owned(), Waiting { reason: "CrashLoopBackOff", message });
            return Ok(Step::Wait(remaining));
        }
        match Box::pin(self.try_start(pod, container, actual, sandbox)).await? {
            Ok(()) => {
                self.waiting.remove(name);
                Ok(Step::Again)
            }
            Err(Obstacle { reason, message, retry }) => {
                let new = Waiting { reason, message: message.clone() };
                if self.waiting.get(name) != Some(&new) && reason != "ImagePullBackOff" {
                    let text = if reason == "ErrImagePull" { message } else { format!("Error: {message}") };
                    self.event(Some(name), true, "Failed", text);
                }
                self.waiting.insert(name.to_owned(), new);
                Ok(Step::Wait(retry))
            }
        }
    }

    async fn try_start(
        &mut self,
        pod: &Arc<Pod>,
        container: &Container,
        actual: &Actual,
        sandbox: &Sandbox,
    ) -> Result<Result<(), Obstacle>, RuntimeError> {
        let name = container.name.as_str();
        let inputs = match self.shared.api.inputs(pod).await {
            Ok(inputs) => inputs,
            Err(error) => return Ok(Err(config_error(error.to_string()))),
        };
        let sandbox_config = self.sandbox_config(pod, sandbox.attempt);
        let image = match Box::pin(self.image(pod, container, &inputs, &sandbox_config)).await? {
            Ok(image) => image,
            Err(obstacle) => return Ok(Err(obstacle)),
        };
        if self.volumes.is_none()
            && let Err(message) = self.make_volumes(pod).await
        {
            return Ok(Err(config_error(message)));
        }
        let environment = match Environment::build(container, &inputs, &self.own_fields(pod)) {
            Ok(environment) => environment,
            Err(error) => return Ok(Err(config_error(error.to_string()))),
        };
        let mounts = match volumes::mounts(container, self.volumes.as_ref().unwrap_or(&VolumePaths::new())) {
            Ok(mounts) => mounts,
            Err(error) => return Ok(Err(config_error(error.to_string()))),
        };
        let attempt = self.next_attempt(name, actual.newest(name));
        if let Err(error) = self.make_container_files(pod, name, attempt) {
            return Ok(Err(config_error(format!("{}: {error}", self.folder.path().display()))));
        }
        let config = container_config(Prepared {
            pod,
            container,
            identity: &self.identity,
            folder: &self.folder,
            attempt,
            image: &image,
            environment: &environment,
            mounts,
            machine: self.shared.machine,
        });
        let config = match config {
            Ok(config) => config,
            Err(error) => return Ok(Err(config_error(error.to_string()))),
        };
        let id = match Box::pin(self.shared.runtime.create_container(&sandbox.id, config, sandbox_config)).await {
            Ok(id) => id,
            Err(error) => {
                self.backoff.failed(name, Instant::now(), Duration::ZERO, false);
                let retry = self.backoff.remaining(name, Instant::now());
                return refused("CreateContainerError", error, retry);
            }
        };
        self.event(Some(name), false, "Created", format!("Created container {name}"));
        if let Err(error) = self.shared.runtime.start_container(&id).await {
            // The runtime has this as a run that ended at once: its backoff counts from there.
            return refused("RunContainerError", error, super::worker::RETRY);
        }
        self.event(Some(name), false, "Started", format!("Started container {name}"));
        if attempt > 0 {
            self.shared.metrics.restarts.inc();
        }
        logs::remove_old(&self.folder, name, attempt);
        Ok(Ok(()))
    }

    /// Restarts are counted in the runtime, and in the status for when the runtime lost its records.
    fn next_attempt(&self, name: &str, newest: Option<&Run>) -> u32 {
        let statuses = [&self.status.container_statuses, &self.status.init_container_statuses];
        let known = statuses.into_iter().flatten().flatten().find(|status| status.name == name);
        let known = known
            .filter(|status| status.container_id.as_ref().is_some_and(|id| !id.is_empty()))
            .map(|status| u32::try_from(status.restart_count).unwrap_or(0).saturating_add(1));
        newest.map(|run| run.attempt.saturating_add(1)).max(known).unwrap_or(0)
    }

    fn make_container_files(&self, pod: &Pod, name: &str, attempt: u32) -> std::io::Result<()> {
        use std::os::unix::fs::PermissionsExt;
        fs::create_dir_all(self.folder.container(name))?;
        fs::create_dir_all(self.folder.logs().join(name))?;
        let message = self.folder.termination_message(name, attempt);
        fs::write(&message, b"")?;
        // Whatever user the container has, it may write this file.
        fs::set_permissions(&message, fs::Permissions::from_mode(0o666))?;
        let hosts = self.folder.hosts();
        let text = hosts_file(pod, self.pod_ips(), &self.shared.config.cluster_domain);
        if fs::read_to_string(&hosts).is_ok_and(|present| present == text) {
            return Ok(());
        }
        // In place: it's mounted into running containers.
        fs::write(Path::new(&hosts), text)
    }

    /// The container's image: as it's here, or pulled.
    async fn image(
        &mut self,
        pod: &Pod,
        container: &Container,
        inputs: &Inputs,
        sandbox_config: &PodSandboxConfig,
    ) -> Result<Result<Image, Obstacle>, RuntimeError> {
        let name = container.name.as_str();
        let reference = container.image.as_deref().unwrap_or_default();
        let policy = PullPolicy::of(container);
        let present = match self.shared.runtime.image(reference).await {
            Ok(present) => present,
            Err(error) if error.is_unreachable() => return Err(error),
            Err(error) => {
                let message = format!("Failed to apply default image tag \"{reference}\": {error}");
                return Ok(Err(Obstacle { reason: "InvalidImageName", message, retry: CONFIG_RETRY }));
            }
        };
        match (policy, present) {
            (PullPolicy::IfNotPresent | PullPolicy::Never, Some(image)) => {
                let message = format!("Container image \"{reference}\" already present on machine");
                self.event(Some(name), false, "Pulled", message);
                Ok(Ok(image))
            }
            (PullPolicy::Never, None) => {
                let message = format!("Container image \"{reference}\" is not present with pull policy of Never");
                Ok(Err(Obstacle { reason: "ErrImageNeverPull", message, retry: CONFIG_RETRY }))
            }
            (_, present) => Box::pin(self.pull(pod, name, reference, present, inputs, sandbox_config)).await,
        }
    }

    async fn pull(
        &mut self,
        pod: &Pod,
        name: &str,
        reference: &str,
        present: Option<Image>,
        inputs: &Inputs,
        sandbox_config: &PodSandboxConfig,
    ) -> Result<Result<Image, Obstacle>, RuntimeError> {
        // With no cloud there is often no registry: what ran here before may run again from the copy that is here.
        let fallback = present.filter(|_| self.ran_before(name));
        let key = format!("/image/{reference}");
        let remaining = self.backoff.remaining(&key, Instant::now());
        if !remaining.is_zero() && fallback.is_none() {
            let message = format!("Back-off pulling image \"{reference}\"");
            self.event(Some(name), false, "BackOff", message.clone());
            return Ok(Err(Obstacle { reason: "ImagePullBackOff", message, retry: remaining }));
        }
        self.event(Some(name), false, "Pulling", format!("Pulling image \"{reference}\""));
        let begun = Instant::now();
        let pulled = {
            let _slot = self.shared.pull_slots.acquire().await;
            let auth = credentials(pod, reference, inputs);
            let pull = self.shared.runtime.pull_image(reference, auth, Some(sandbox_config.clone()));
            if fallback.is_some() { tokio::time::timeout(RENEWAL_DEADLINE, pull).await.ok() } else { Some(pull.await) }
        };
        let error = match pulled {
            Some(Ok(_)) => {
                self.backoff.succeeded(&key);
                let took = begun.elapsed().as_secs_f64();
                self.event(
                    Some(name),
                    false,
                    "Pulled",
                    format!("Successfully pulled image \"{reference}\" in {took:.1}s"),
                );
                match self.shared.runtime.image(reference).await? {
                    Some(image) => return Ok(Ok(image)),
                    None => format!("image \"{reference}\" is not there after it was pulled"),
                }
            }
            Some(Err(error)) => format!("Failed to pull image \"{reference}\": {error}"),
            None => format!("No newer image \"{reference}\" within {}s", RENEWAL_DEADLINE.as_secs()),
        };
        if let Some(image) = fallback {
            self.event(Some(name), true, "PullFailed", format!("{error}; using the copy on this machine"));
            return Ok(Ok(image));
        }
        self.backoff.failed(&key, Instant::now(), Duration::ZERO, false);
        let retry = self.backoff.remaining(&key, Instant::now());
        // The error is shown for a moment, then the wait.
        Ok(Err(Obstacle { reason: "ErrImagePull", message: error, retry: retry.min(Duration::from_secs(2)) }))
    }

    fn ran_before(&self, name: &str) -> bool {
        let statuses = [&self.status.container_statuses, &self.status.init_container_statuses];
        statuses.into_iter().flatten().flatten().any(|status| status.name == name && !status.image_id.is_empty())
    }
}

fn find_container<'p>(pod: &'p Pod, name: &str) -> Option<&'p Container> {
    let spec = pod.spec.as_ref()?;
    spec.init_containers.iter().flatten().chain(&spec.containers).find(|container| container.name == name)
}

/// The runtime refused a container.
fn refused(reason: &'static str, error: RuntimeError, retry: Duration) -> Result<Result<(), Obstacle>, RuntimeError> {
    if error.is_unreachable() {
        return Err(error);
    }
    Ok(Err(Obstacle { reason, message: error.to_string(), retry }))
}

fn config_error(message: String) -> Obstacle {
    Obstacle { reason: "CreateContainerConfigError", message, retry: CONFIG_RETRY }
}
