//! The configuration files that the lab writes for each daemon of a host.

use std::{fs, path::Path};

use anyhow::Result;
use serde_json::{Value, json};

use crate::{
    daemons::CONTAINERD_SOCKET,
    host::HostNamespace,
    topology::{Datapath, Host, INTERNET_DNS, INTERNET_GATEWAY},
};

/// The public port of the hub's link.
pub const LINK_PORT: u16 = 10443;

/// Range of IPv6 Service addresses of a dual-stack lab.
const SERVICE_CIDR6: &str = "fd00:10:96::/112";
/// Range of its pods' IPv6 addresses; edgecore's setting `clusterRanges` has it by default.
const POD_CIDR6: &str = "fd00:10:244::/48";

/// A domain whose names the agents ask at a server of its own: the internet's gateway, at [`STUB_DOMAIN_PORT`].
pub const STUB_DOMAIN: &str = "stub.example";
/// The port of that server.
pub const STUB_DOMAIN_PORT: u16 = 5353;

/// Writes the hub's configuration.
///
/// # Errors
/// When the file can't be written.
pub fn write_hub(host: &Host, namespace: &HostNamespace) -> Result<()> {
    let mut hub = json!({
        "dataDir": namespace.folder.join("hub"),
        "api": {"listen": "0.0.0.0:6443", "advertise": [host.address.to_string()]},
        "link": {"listen": format!("0.0.0.0:{LINK_PORT}"), "advertise": [host.address.to_string()]},
    });
    if host.address6.is_some() {
        hub["serviceCidr6"] = json!(SERVICE_CIDR6);
        hub["podCidr6"] = json!(POD_CIDR6);
    }
    write(&namespace.folder.join("hub.yaml"), &hub)
}

/// Writes the configuration of every daemon of a node.
///
/// # Errors
/// When a file can't be written.
pub fn write_node(host: &Host, namespace: &HostNamespace, datapath: Option<Datapath>) -> Result<()> {
    let folder = &namespace.folder;
    let in_cloud = host.site.is_none();
    let network = host.site.clone().unwrap_or_else(|| "cloud".to_owned());
    let cni = folder.join("cni");
    fs::create_dir_all(&cni)?;
    fs::write(folder.join("containerd.toml"), containerd(namespace, &cni))?;
    write(
        &folder.join("edgecore.yaml"),
        &json!({
            "dataDir": folder.join("edgecore"),
            "nodeName": host.name,
            "nodeIp": host.address.to_string(),
            "nodeIp6": host.address6,
            "network": network,
            "labels": host.zone.as_ref().map_or_else(|| json!({}), |zone| json!({"topology.kubernetes.io/zone": zone})),
            "role": if in_cloud { "cloud" } else { "edge" },
            "cgroupRoot": namespace.cgroup,
            "criSocket": CONTAINERD_SOCKET,
            "cniConfDir": cni,
        }),
    )?;
    // A cloud node's agent watches the cluster's API itself; at the edge the metaserver is the API.
    let source = if in_cloud {
        ("kubeconfig", json!(folder.join("edgecore/node.kubeconfig")))
    } else {
        ("apiServer", json!("http://127.0.0.1:10550"))
    };
    let mut agent = json!({
        "dataDir": folder.join("agent"),
        "nodeName": host.name,
        "cgroup": namespace.cgroup,
        // Mounted in the host's mount namespace, so that the programs go with the host.
        "bpffs": folder.join("bpf"),
        // Nobody answers for the domain of its own unless somebody starts a server there.
        "dns": {
            "upstreams": [format!("{INTERNET_DNS}:53")],
            "zones": {STUB_DOMAIN: [format!("{INTERNET_GATEWAY}:{STUB_DOMAIN_PORT}")]},
        },
        "tunnel": {"relay": host.relay},
    });
    agent[source.0] = source.1.clone();
    if let Some(datapath) = datapath {
        agent["datapath"] = json!(datapath);
    }
    write(&folder.join("agent.yaml"), &agent)?;
    if host.gateway {
        let mut gateway = json!({
            "dataDir": folder.join("gateway"),
            "nodeName": host.name,
        });
        gateway[source.0] = source.1;
        write(&folder.join("gateway.yaml"), &gateway)?;
    }
    Ok(())
}

/// JSON is YAML, too.
fn write(path: &Path, value: &Value) -> Result<()> {
    fs::write(path, format!("{value:#}\n"))?;
    Ok(())
}

fn containerd(namespace: &HostNamespace, cni: &Path) -> String {
    format!(
        r#"version = 2
root = "{root}"
state = "/run/containerd"
oom_score = 0
disabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.devmapper"]
[grpc]
  address = "{CONTAINERD_SOCKET}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "edgemesh.dev/pause:1"
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{cni}"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
    SystemdCgroup = false
"#,
        root = namespace.folder.join("containerd").display(),
        cni = cni.display(),
    )
}
