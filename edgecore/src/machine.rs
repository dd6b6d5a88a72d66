//! What the machine is: capacity and system information for the Node's status.

use std::{fs, path::Path};

use serde_json::{Value, json};

/// Memory that is kept for the system and edgecore itself.
const RESERVED_MEMORY: u64 = 100 << 20;
/// Most pods on one node, as in Kubernetes.
const MAX_PODS: &str = "110";
/// The Kubernetes version whose node API edgecore follows.
const KUBERNETES_VERSION: &str = concat!("v1.32.0-edgemesh.", env!("CARGO_PKG_VERSION"));

/// The machine's resources and system.
#[derive(Debug, Clone)]
pub(crate) struct Machine {
    pub(crate) capacity: Value,
    pub(crate) allocatable: Value,
    pub(crate) info: Value,
}

impl Machine {
    /// Reads them; what can't be read is left out or empty. The file system of `folder` counts as the node's.
    pub(crate) fn read(folder: &Path) -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let memory = memory_bytes();
        let storage = nix::sys::statvfs::statvfs(folder).map_or(0, |fs| fs.blocks() * fs.fragment_size());
        let resources = |memory: u64, storage: u64| {
            json!({
                "cpu": cpus.to_string(), "memory": format!("{}Ki", memory >> 10),
                "ephemeral-storage": storage.to_string(), "pods": MAX_PODS,
            })
        };
        Self {
            capacity: resources(memory, storage),
            // A tenth of the disk stays free for logs and images, as kubelet's eviction threshold has it.
            allocatable: resources(memory.saturating_sub(RESERVED_MEMORY), storage / 10 * 9),
            info: json!({
                "machineID": text("/etc/machine-id"),
                "systemUUID": text("/sys/class/dmi/id/product_uuid"),
                "bootID": text("/proc/sys/kernel/random/boot_id"),
                "kernelVersion": text("/proc/sys/kernel/osrelease"),
                "osImage": os_image(),
                "containerRuntimeVersion": "",
                "kubeletVersion": KUBERNETES_VERSION,
                "kubeProxyVersion": KUBERNETES_VERSION,
                "operatingSystem": "linux",
                "architecture": architecture(),
            }),
        }
    }
}

/// The architecture by Kubernetes' name.
pub(crate) fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        other => other,
    }
}

fn text(path: &str) -> String {
    fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default()
}

fn memory_bytes() -> u64 {
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = info.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

fn os_image() -> String {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let name = release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    name.map_or_else(|| "Linux".to_owned(), |name| name.trim_matches('"').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_has_processors_memory_and_a_kernel() {
        let machine = Machine::read(Path::new("/"));
        assert_ne!(machine.capacity["cpu"], "0");
        assert_ne!(machine.capacity["memory"], "0Ki");
        assert_ne!(machine.info["kernelVersion"], "");
    }
}
