//! What the runtime is told about a pod's sandbox.

use std::{collections::HashMap, net::IpAddr};

use k8s_cri::v1::{
    self, DnsConfig, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceMode, NamespaceOption,
    PodSandboxConfig, PodSandboxMetadata, PodSandboxStatus, PortMapping, SecurityProfile,
    security_profile::ProfileType,
};
use k8s_openapi::api::core::v1::{Pod, PodSpec, SeccompProfile};

use super::{dns::is_host_network, folders::PodFolder};
use crate::runtime::{LABEL_POD_NAME, LABEL_POD_NAMESPACE, LABEL_POD_UID};

/// Annotation of a sandbox: how long its containers may take to stop, for when the pod's spec is gone.
pub(crate) const ANNOTATION_GRACE: &str = "edgemesh.dev/termination-grace-seconds";
/// The API's default for `terminationGracePeriodSeconds`.
pub(crate) const DEFAULT_GRACE_SECONDS: i64 = 30;
/// Linux: longest host name.
const MAX_HOSTNAME: usize = 63;

/// The name, namespace and uid of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PodIdentity {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) uid: String,
}

impl PodIdentity {
    /// The labels that every sandbox and container of the pod carries.
    pub(crate) fn labels(&self) -> HashMap<String, String> {
        HashMap::from([
            (LABEL_POD_NAME.to_owned(), self.name.clone()),
            (LABEL_POD_NAMESPACE.to_owned(), self.namespace.clone()),
            (LABEL_POD_UID.to_owned(), self.uid.clone()),
        ])
    }
}

/// The pod's cgroup below the node's cgroup root, as the runtime takes it with the cgroupfs driver.
pub(crate) fn cgroup_parent(cgroup_root: &str, uid: &str) -> String {
    format!("/{}/pod{uid}", cgroup_root.trim_matches('/')).replace("//", "/")
}

/// The pod's host name.
pub(crate) fn hostname(pod: &Pod) -> String {
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let wanted = pod.spec.as_ref().and_then(|s| s.hostname.as_deref()).unwrap_or(name);
    let cut: String = wanted.chars().take(MAX_HOSTNAME).collect();
    cut.trim_end_matches(['-', '.']).to_owned()
}

/// The pod's full name in the cluster, if it has a subdomain (Kubernetes, "Pod's hostname and subdomain fields").
pub(crate) fn fqdn(pod: &Pod, cluster_domain: &str) -> Option<String> {
    let subdomain = pod.spec.as_ref()?.subdomain.as_deref().filter(|s| !s.is_empty())?;
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
    Some(format!("{}.{subdomain}.{namespace}.svc.{cluster_domain}", hostname(pod)))
}

/// The grace period of a pod's spec.
pub(crate) fn spec_grace_seconds(pod: &Pod) -> i64 {
    pod.spec.as_ref().and_then(|s| s.termination_grace_period_seconds).unwrap_or(DEFAULT_GRACE_SECONDS).max(0)
}

/// The sandbox of a pod.
pub(crate) fn sandbox_config(
    pod: &Pod,
    identity: &PodIdentity,
    attempt: u32,
    dns: DnsConfig,
    cgroup_root: &str,
    cluster_domain: &str,
    folder: &PodFolder,
) -> PodSandboxConfig {
    let default = PodSpec::default();
    let spec = pod.spec.as_ref().unwrap_or(&default);
    let host_network = is_host_network(spec);
    let fqdn = fqdn(pod, cluster_domain).filter(|_| spec.set_hostname_as_fqdn == Some(true));
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: identity.name.clone(),
            uid: identity.uid.clone(),
            namespace: identity.namespace.clone(),
            attempt,
        }),
        // A pod in the node's network keeps the node's host name.
        hostname: if host_network { String::new() } else { fqdn.unwrap_or_else(|| hostname(pod)) },
        log_directory: folder.logs().to_string_lossy().into_owned(),
        dns_config: Some(dns),
        port_mappings: if host_network { Vec::new() } else { port_mappings(spec) },
        labels: identity.labels(),
        annotations: HashMap::from([(ANNOTATION_GRACE.to_owned(), spec_grace_seconds(pod).to_string())]),
        linux: Some(LinuxPodSandboxConfig {
            cgroup_parent: cgroup_parent(cgroup_root, &identity.uid),
            security_context: Some(security_context(spec)),
            sysctls: spec
                .security_context
                .iter()
                .flat_map(|s| s.sysctls.iter().flatten())
                .map(|s| (s.name.clone(), s.value.clone()))
                .collect(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// Which namespaces the pod shares with the node, and its containers with one another.
pub(crate) fn namespaces(spec: &PodSpec) -> NamespaceOption {
    let pid = if spec.host_pid == Some(true) {
        NamespaceMode::Node
    } else if spec.share_process_namespace == Some(true) {
        NamespaceMode::Pod
    } else {
        NamespaceMode::Container
    };
    let node_if = |host: bool| if host { NamespaceMode::Node } else { NamespaceMode::Pod };
    NamespaceOption {
        network: node_if(is_host_network(spec)).into(),
        pid: pid.into(),
        ipc: node_if(spec.host_ipc == Some(true)).into(),
        ..Default::default()
    }
}

/// A seccomp profile; none is unconfined, as on a kubelet without `seccompDefault`.
pub(crate) fn seccomp(profile: Option<&SeccompProfile>) -> SecurityProfile {
    let kind = match profile.map(|p| p.type_.as_str()) {
        Some("RuntimeDefault") => ProfileType::RuntimeDefault,
        Some("Localhost") => ProfileType::Localhost,
        _ => ProfileType::Unconfined,
    };
    let localhost_ref = profile.and_then(|p| p.localhost_profile.clone()).unwrap_or_default();
    SecurityProfile { profile_type: kind.into(), localhost_ref }
}

fn security_context(spec: &PodSpec) -> LinuxSandboxSecurityContext {
    let pod = spec.security_context.as_ref();
    let privileged = spec
        .init_containers
        .iter()
        .flatten()
        .chain(&spec.containers)
        .any(|c| c.security_context.as_ref().is_some_and(|s| s.privileged == Some(true)));
    let id = |value: Option<i64>| value.map(|value| v1::Int64Value { value });
    let user = id(pod.and_then(|s| s.run_as_user));
    LinuxSandboxSecurityContext {
        namespace_options: Some(namespaces(spec)),
        // The runtime takes no group without a user.
        run_as_group: id(pod.and_then(|s| s.run_as_group)).filter(|_| user.is_some()),
        run_as_user: user,
        supplemental_groups: supplemental_groups(spec),
        privileged,
        seccomp: Some(seccomp(pod.and_then(|s| s.seccomp_profile.as_ref()))),
        ..Default::default()
    }
}

/// The pod's extra groups, with the group of its volumes.
pub(crate) fn supplemental_groups(spec: &PodSpec) -> Vec<i64> {
    let context = spec.security_context.as_ref();
    let own = context.and_then(|s| s.supplemental_groups.as_ref()).into_iter().flatten().copied();
    own.chain(context.and_then(|s| s.fs_group)).collect()
}

fn port_mappings(spec: &PodSpec) -> Vec<PortMapping> {
    let ports = spec.containers.iter().flat_map(|c| c.ports.iter().flatten());
    ports
        .filter_map(|port| {
            let host_port = port.host_port.filter(|&p| p > 0)?;
            let protocol = match port.protocol.as_deref() {
                Some("UDP") => v1::Protocol::Udp,
                Some("SCTP") => v1::Protocol::Sctp,
                _ => v1::Protocol::Tcp,
            };
            let host_ip = port.host_ip.clone().unwrap_or_default();
            Some(PortMapping { protocol: protocol.into(), container_port: port.container_port, host_port, host_ip })
        })
        .collect()
}

/// The addresses of a sandbox, the pod's first one first.
pub(crate) fn addresses(status: &PodSandboxStatus) -> Vec<IpAddr> {
    let network = status.network.iter();
    let texts =
        network.flat_map(|network| [&network.ip].into_iter().chain(network.additional_ips.iter().map(|ip| &ip.ip)));
    texts.filter_map(|text| text.parse().ok()).collect()
}

/// The content of a pod's /etc/hosts.
pub(crate) fn hosts_file(pod: &Pod, pod_ips: &[IpAddr], cluster_domain: &str) -> String {
    let mut text = String::from(
        "# Written by edgecore; changes are lost when the pod restarts.\n\
         127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n\
         fe00::0\tip6-localnet\nfe00::0\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n",
    );
    let names = match fqdn(pod, cluster_domain) {
        Some(fqdn) => format!("{fqdn}\t{}", hostname(pod)),
        None => hostname(pod),
    };
    for ip in pod_ips {
        text.push_str(&format!("{ip}\t{names}\n"));
    }
    for alias in pod.spec.iter().flat_map(|s| s.host_aliases.iter().flatten()) {
        let names = alias.hostnames.iter().flatten().cloned().collect::<Vec<_>>().join("\t");
        text.push_str(&format!("{}\t{names}\n", alias.ip));
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(spec: serde_json::Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "web-0", "namespace": "shop", "uid": "u-1"}, "spec": spec}))
            .unwrap()
    }

    fn config(pod: &Pod) -> PodSandboxConfig {
        let identity = PodIdentity { namespace: "shop".to_owned(), name: "web-0".to_owned(), uid: "u-1".to_owned() };
        let folder = PodFolder::new(std::path::Path::new("/pods"), "u-1");
        sandbox_config(pod, &identity, 3, DnsConfig::default(), "/lab-1/edge-a1", "cluster.local", &folder)
    }

    #[test]
    fn a_sandbox_has_its_own_network_and_the_pods_cgroup() {
        let config = config(&pod(json!({"containers": [{"name": "c", "ports": [
            {"containerPort": 80, "hostPort": 8080}, {"containerPort": 53, "hostPort": 5353, "protocol": "UDP"},
            {"containerPort": 9000}]}], "terminationGracePeriodSeconds": 7})));
        let linux = config.linux.unwrap();
        assert_eq!(linux.cgroup_parent, "/lab-1/edge-a1/podu-1");
        let namespaces = linux.security_context.unwrap().namespace_options.unwrap();
        assert_eq!(namespaces.network(), NamespaceMode::Pod);
        assert_eq!(namespaces.pid(), NamespaceMode::Container);
        assert_eq!(config.hostname, "web-0");
        assert_eq!(config.log_directory, "/pods/u-1/logs");
        assert_eq!(config.metadata.unwrap().attempt, 3);
        assert_eq!(config.labels[LABEL_POD_UID], "u-1");
        assert_eq!(config.annotations[ANNOTATION_GRACE], "7");
        let ports: Vec<_> =
            config.port_mappings.iter().map(|p| (p.protocol(), p.container_port, p.host_port)).collect();
        assert_eq!(ports, [(v1::Protocol::Tcp, 80, 8080), (v1::Protocol::Udp, 53, 5353)]);
    }

    #[test]
    fn a_host_network_pod_shares_the_nodes_network_and_maps_no_ports() {
        let config = config(&pod(json!({"hostNetwork": true, "hostPID": true, "containers": [
            {"name": "c", "ports": [{"containerPort": 80, "hostPort": 80}], "securityContext": {"privileged": true}}]})));
        let context = config.linux.unwrap().security_context.unwrap();
        assert!(context.privileged);
        let namespaces = context.namespace_options.unwrap();
        assert_eq!((namespaces.network(), namespaces.pid()), (NamespaceMode::Node, NamespaceMode::Node));
        assert!(config.port_mappings.is_empty() && config.hostname.is_empty());
    }

    #[test]
    fn the_hosts_file_names_the_pod_and_its_aliases() {
        let pod = pod(json!({"containers": [], "subdomain": "db",
            "hostAliases": [{"ip": "10.9.9.9", "hostnames": ["a", "b"]}]}));
        let text = hosts_file(&pod, &["10.244.1.2".parse().unwrap()], "cluster.local");
        assert!(text.contains("10.244.1.2\tweb-0.db.shop.svc.cluster.local\tweb-0\n"), "{text}");
        assert!(text.ends_with("10.9.9.9\ta\tb\n"), "{text}");
    }

    #[test]
    fn long_names_are_cut_to_a_host_name() {
        let mut pod = pod(json!({"containers": []}));
        pod.metadata.name = Some(format!("{}-{}", "a".repeat(62), "b".repeat(40)));
        assert_eq!(hostname(&pod), "a".repeat(62));
    }
}
