//! What the runtime is told about a container.

use std::collections::HashMap;

use k8s_cri::v1::{
    self, Capability, ContainerConfig, ContainerMetadata, KeyValue, LinuxContainerConfig,
    LinuxContainerSecurityContext, Mount,
};
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};
use sha2::{Digest, Sha256};

use super::{
    env::Environment,
    folders::PodFolder,
    resources::{Machine, linux_resources},
    sandbox::{PodIdentity, namespaces, seccomp, supplemental_groups},
};
use crate::runtime::LABEL_CONTAINER_NAME;

/// Annotation of a container: a digest of what it was made from, to see that its image was changed.
pub(crate) const ANNOTATION_HASH: &str = "edgemesh.dev/container-hash";
/// The API's default for `terminationMessagePath`.
const TERMINATION_MESSAGE_PATH: &str = "/dev/termination-log";

/// Kernel files that a container must not see (OCI runtime specification, "Masked Paths").
const MASKED_PATHS: [&str; 11] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
];
/// Kernel files that a container must not write.
const READONLY_PATHS: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Why a container may not run as its image or its spec asks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SecurityError {
    #[error("container has runAsNonRoot and runs as root")]
    Root,
    #[error("container has runAsNonRoot and image has non-numeric user ({0}), cannot verify that it is not root")]
    NamedUser(String),
}

/// What changes a container in place: the only mutable field of a running pod's container is its image.
pub(crate) fn container_hash(container: &Container) -> String {
    // Kept over upgrades of this program, so not the standard library's hash.
    let digest = Sha256::digest(format!("{}\0{}", container.name, container.image.as_deref().unwrap_or_default()));
    digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

/// Everything about a container that is decided before it's created.
pub(crate) struct Prepared<'a> {
    pub(crate) pod: &'a Pod,
    pub(crate) container: &'a Container,
    pub(crate) identity: &'a PodIdentity,
    pub(crate) folder: &'a PodFolder,
    pub(crate) attempt: u32,
    pub(crate) image: &'a v1::Image,
    pub(crate) environment: &'a Environment,
    pub(crate) mounts: Vec<Mount>,
    pub(crate) machine: Machine,
}

/// The container as the runtime takes it.
pub(crate) fn container_config(prepared: Prepared<'_>) -> Result<ContainerConfig, SecurityError> {
    let Prepared { pod, container, identity, folder, attempt, image, environment, mut mounts, machine } = prepared;
    let default = PodSpec::default();
    let spec = pod.spec.as_ref().unwrap_or(&default);
    let security = security_context(spec, container, image)?;
    let mounted = |path: &str, mounts: &[Mount]| mounts.iter().any(|m| m.container_path == path);
    let message_path = container.termination_message_path.as_deref().unwrap_or(TERMINATION_MESSAGE_PATH);
    if !message_path.is_empty() && !mounted(message_path, &mounts) {
        let file = folder.termination_message(&container.name, attempt);
        mounts.push(bind(message_path, &file.to_string_lossy()));
    }
    if spec.host_network != Some(true) && !mounted("/etc/hosts", &mounts) {
        mounts.push(bind("/etc/hosts", &folder.hosts().to_string_lossy()));
    }
    let mut labels = identity.labels();
    labels.insert(LABEL_CONTAINER_NAME.to_owned(), container.name.clone());
    Ok(ContainerConfig {
        metadata: Some(ContainerMetadata { name: container.name.clone(), attempt }),
        image: Some(v1::ImageSpec {
            // By its digest: the tag may move between the check and the start.
            image: image.id.clone(),
            user_specified_image: container.image.clone().unwrap_or_default(),
            ..Default::default()
        }),
        command: environment.expand_all(container.command.as_ref()),
        args: environment.expand_all(container.args.as_ref()),
        working_dir: container.working_dir.clone().unwrap_or_default(),
        envs: environment
            .iter()
            .map(|(key, value)| KeyValue { key: key.to_owned(), value: value.to_owned() })
            .collect(),
        mounts,
        labels,
        annotations: HashMap::from([(ANNOTATION_HASH.to_owned(), container_hash(container))]),
        log_path: PodFolder::log_name(&container.name, attempt),
        stdin: container.stdin == Some(true),
        stdin_once: container.stdin_once == Some(true),
        tty: container.tty == Some(true),
        linux: Some(LinuxContainerConfig {
            resources: Some(linux_resources(pod, container, machine)),
            security_context: Some(security),
        }),
        ..Default::default()
    })
}

fn bind(container_path: &str, host_path: &str) -> Mount {
    Mount { container_path: container_path.to_owned(), host_path: host_path.to_owned(), ..Default::default() }
}

fn security_context(
    spec: &PodSpec,
    container: &Container,
    image: &v1::Image,
) -> Result<LinuxContainerSecurityContext, SecurityError> {
    let own = container.security_context.as_ref();
    let pod = spec.security_context.as_ref();
    let user = own.and_then(|s| s.run_as_user).or_else(|| pod.and_then(|s| s.run_as_user));
    let group = own.and_then(|s| s.run_as_group).or_else(|| pod.and_then(|s| s.run_as_group));
    let non_root = own.and_then(|s| s.run_as_non_root).or_else(|| pod.and_then(|s| s.run_as_non_root));
    if non_root == Some(true) {
        // An image without a user says neither uid nor name: it runs as root.
        match (user, image.uid.as_ref().map(|uid| uid.value), image.username.as_str()) {
            (Some(0), ..) | (None, Some(0), _) | (None, None, "") => return Err(SecurityError::Root),
            (None, None, name) => return Err(SecurityError::NamedUser(name.to_owned())),
            _ => {}
        }
    }
    // As the kubelet does: the image's user is passed on, so that a group alone can be set.
    let image_user = image.uid.as_ref().map(|uid| uid.value);
    let run_as_user = user.or(image_user);
    let username = if run_as_user.is_none() { image.username.clone() } else { String::new() };
    let has_user = run_as_user.is_some() || !username.is_empty();
    let privileged = own.and_then(|s| s.privileged) == Some(true);
    let paths = |paths: &[&str]| if privileged { Vec::new() } else { paths.iter().map(|&p| p.to_owned()).collect() };
    let capabilities = own.and_then(|s| s.capabilities.as_ref()).map(|c| Capability {
        add_capabilities: c.add.clone().unwrap_or_default(),
        drop_capabilities: c.drop.clone().unwrap_or_default(),
        ..Default::default()
    });
    let profile = own
        .and_then(|s| s.seccomp_profile.as_ref())
        .or_else(|| pod.and_then(|s| s.seccomp_profile.as_ref()))
        .filter(|_| !privileged);
    let id = |value: Option<i64>| value.map(|value| v1::Int64Value { value });
    Ok(LinuxContainerSecurityContext {
        capabilities,
        privileged,
        namespace_options: Some(namespaces(spec)),
        run_as_user: id(run_as_user),
        run_as_username: username,
        run_as_group: id(group).filter(|_| has_user),
        readonly_rootfs: own.and_then(|s| s.read_only_root_filesystem) == Some(true),
        supplemental_groups: supplemental_groups(spec),
        no_new_privs: own.and_then(|s| s.allow_privilege_escalation) == Some(false),
        masked_paths: paths(&MASKED_PATHS),
        readonly_paths: paths(&READONLY_PATHS),
        seccomp: Some(seccomp(profile)),
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::pods::inputs::{Inputs, OwnFields};

    const MACHINE: Machine = Machine { memory_bytes: 1 << 30, cpus: 1, lowest_oom_score_adj: 0 };

    fn configure(spec: serde_json::Value, image: &v1::Image) -> Result<ContainerConfig, SecurityError> {
        let pod: Pod =
            serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "ns"}, "spec": spec})).unwrap();
        let container = &pod.spec.as_ref().unwrap().containers[0];
        let own = OwnFields { pod: &pod, pod_ips: &[], host_ips: &[], machine: MACHINE };
        let environment = Environment::build(container, &Inputs::default(), &own).unwrap();
        let identity = PodIdentity { namespace: "ns".to_owned(), name: "p".to_owned(), uid: "u".to_owned() };
        container_config(Prepared {
            pod: &pod,
            container,
            identity: &identity,
            folder: &PodFolder::new(std::path::Path::new("/pods"), "u"),
            attempt: 2,
            image,
            environment: &environment,
            mounts: Vec::new(),
            machine: MACHINE,
        })
    }

    fn root_image() -> v1::Image {
        v1::Image { id: "sha256:1".to_owned(), uid: Some(v1::Int64Value { value: 0 }), ..Default::default() }
    }

    #[test]
    fn command_and_args_have_their_variables_replaced() {
        let config = configure(
            json!({"containers": [{"name": "c", "image": "i:1", "command": ["/bin/$(WHAT)"], "args": ["$(WHAT)", "$$(X)"],
                "env": [{"name": "WHAT", "value": "run"}], "workingDir": "/w"}]}),
            &root_image(),
        )
        .unwrap();
        assert_eq!(config.command, ["/bin/run"]);
        assert_eq!(config.args, ["run", "$(X)"]);
        assert_eq!(config.working_dir, "/w");
        assert_eq!(config.log_path, "c/2.log");
        assert_eq!(config.image.unwrap().image, "sha256:1");
        let mounts: Vec<_> = config.mounts.iter().map(|m| (m.container_path.as_str(), m.host_path.as_str())).collect();
        assert_eq!(
            mounts,
            [("/dev/termination-log", "/pods/u/containers/c/termination-2"), ("/etc/hosts", "/pods/u/etc-hosts")]
        );
    }

    #[test]
    fn a_containers_security_settings_win_over_the_pods() {
        let config = configure(
            json!({"securityContext": {"runAsUser": 1000, "runAsGroup": 2000, "fsGroup": 3000},
                "containers": [{"name": "c", "securityContext": {"runAsUser": 1001, "readOnlyRootFilesystem": true,
                    "allowPrivilegeEscalation": false, "capabilities": {"add": ["NET_ADMIN"], "drop": ["ALL"]}}}]}),
            &root_image(),
        )
        .unwrap();
        let security = config.linux.unwrap().security_context.unwrap();
        assert_eq!(security.run_as_user.unwrap().value, 1001);
        assert_eq!(security.run_as_group.unwrap().value, 2000);
        assert_eq!(security.supplemental_groups, [3000]);
        assert!(security.readonly_rootfs && security.no_new_privs && !security.privileged);
        assert_eq!(security.capabilities.unwrap().add_capabilities, ["NET_ADMIN"]);
        assert!(security.masked_paths.contains(&"/proc/kcore".to_owned()));
    }

    #[test]
    fn run_as_non_root_refuses_root_images() {
        let spec = json!({"containers": [{"name": "c", "securityContext": {"runAsNonRoot": true}}]});
        assert_eq!(configure(spec.clone(), &root_image()).unwrap_err(), SecurityError::Root);
        assert_eq!(configure(spec.clone(), &v1::Image::default()).unwrap_err(), SecurityError::Root);
        let named = v1::Image { username: "web".to_owned(), ..Default::default() };
        assert_eq!(configure(spec.clone(), &named).unwrap_err(), SecurityError::NamedUser("web".to_owned()));
        let user = v1::Image { uid: Some(v1::Int64Value { value: 65532 }), ..Default::default() };
        let config = configure(spec, &user).unwrap();
        assert_eq!(config.linux.unwrap().security_context.unwrap().run_as_user.unwrap().value, 65532);
    }

    #[test]
    fn a_new_image_changes_the_hash() {
        let container =
            |image: &str| Container { name: "c".to_owned(), image: Some(image.to_owned()), ..Default::default() };
        assert_ne!(container_hash(&container("a:1")), container_hash(&container("a:2")));
        assert_eq!(container_hash(&container("a:1")), container_hash(&container("a:1")));
    }
}
