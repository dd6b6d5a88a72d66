//! Resource requests and limits as cgroup settings, and the pod's quality of service class.

use k8s_cri::v1::LinuxContainerResources;
use k8s_openapi::{
    api::core::v1::{Container, Pod},
    apimachinery::pkg::api::resource::Quantity,
};

use super::quantity;

/// The CFS period that runtimes and the kubelet use.
const CPU_PERIOD_US: i64 = 100_000;
/// The kernel's smallest CFS quota.
const MIN_QUOTA_US: i64 = 1_000;
/// The kernel's smallest CPU weight.
const MIN_SHARES: i64 = 2;

/// Quality of service (Kubernetes, "Pod Quality of Service Classes").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Qos {
    Guaranteed,
    Burstable,
    BestEffort,
}

impl Qos {
    /// The class of a pod, from the requests and limits of all its containers.
    pub(crate) fn of(pod: &Pod) -> Self {
        let Some(spec) = &pod.spec else { return Self::BestEffort };
        let mut any = false;
        let mut guaranteed = true;
        for container in spec.init_containers.iter().flatten().chain(&spec.containers) {
            for resource in ["cpu", "memory"] {
                let limit = limit(container, resource).and_then(quantity::milli).filter(|&v| v > 0);
                let request = request(container, resource).and_then(quantity::milli).filter(|&v| v > 0);
                any |= limit.is_some() || request.is_some();
                guaranteed &= limit.is_some() && request.or(limit) == limit;
            }
        }
        match (any, guaranteed) {
            (false, _) => Self::BestEffort,
            (true, true) => Self::Guaranteed,
            (true, false) => Self::Burstable,
        }
    }

    /// The name as in `status.qosClass`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Guaranteed => "Guaranteed",
            Self::Burstable => "Burstable",
            Self::BestEffort => "BestEffort",
        }
    }
}

/// A container's limit of a resource.
pub(crate) fn limit<'a>(container: &'a Container, resource: &str) -> Option<&'a Quantity> {
    container.resources.as_ref()?.limits.as_ref()?.get(resource)
}

/// A container's request of a resource; a limit alone is also the request.
pub(crate) fn request<'a>(container: &'a Container, resource: &str) -> Option<&'a Quantity> {
    let resources = container.resources.as_ref()?;
    resources.requests.as_ref().and_then(|r| r.get(resource)).or_else(|| limit(container, resource))
}

/// What this machine has and allows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Machine {
    /// Memory, in bytes.
    pub(crate) memory_bytes: i64,
    /// Logical CPUs.
    pub(crate) cpus: i64,
    /// The lowest `oom_score_adj` that a child of ours may get.
    pub(crate) lowest_oom_score_adj: i64,
}

impl Machine {
    /// Reads the machine's size and permissions from /proc.
    pub(crate) fn read() -> Self {
        let memory_bytes =
            std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| meminfo_total(&text)).unwrap_or(i64::MAX);
        let cpus = std::thread::available_parallelism().map_or(1, |n| i64::try_from(n.get()).unwrap_or(1));
        let may_lower =
            std::fs::read_to_string("/proc/self/status").is_ok_and(|text| has_capability(&text, CAP_SYS_RESOURCE));
        let own = std::fs::read_to_string("/proc/self/oom_score_adj").ok().and_then(|t| t.trim().parse().ok());
        let lowest_oom_score_adj = if may_lower { -1000 } else { own.unwrap_or(0) };
        Self { memory_bytes, cpus, lowest_oom_score_adj }
    }
}

/// Lowering `oom_score_adj` needs this capability (capabilities(7)).
const CAP_SYS_RESOURCE: u32 = 24;

fn has_capability(status: &str, capability: u32) -> bool {
    status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .is_some_and(|bits| bits >> capability & 1 == 1)
}

fn meminfo_total(text: &str) -> Option<i64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: i64 = line.split_whitespace().next()?.parse().ok()?;
    kib.checked_mul(1024)
}

/// A container's cgroup settings.
pub(crate) fn linux_resources(pod: &Pod, container: &Container, machine: Machine) -> LinuxContainerResources {
    let cpu_request = request(container, "cpu").and_then(quantity::milli).unwrap_or(0);
    let cpu_limit = limit(container, "cpu").and_then(quantity::milli).unwrap_or(0);
    let memory_limit = limit(container, "memory").and_then(quantity::whole).unwrap_or(0);
    let quota = if cpu_limit > 0 { (cpu_limit.saturating_mul(CPU_PERIOD_US) / 1000).max(MIN_QUOTA_US) } else { 0 };
    LinuxContainerResources {
        cpu_period: if quota > 0 { CPU_PERIOD_US } else { 0 },
        cpu_quota: quota,
        cpu_shares: (cpu_request.saturating_mul(1024) / 1000).max(MIN_SHARES),
        memory_limit_in_bytes: memory_limit,
        oom_score_adj: oom_score_adj(Qos::of(pod), container, machine),
        ..Default::default()
    }
}

/// Who is killed first when memory runs out (Kubernetes, "Node out of memory behavior").
fn oom_score_adj(qos: Qos, container: &Container, machine: Machine) -> i64 {
    let wanted = match qos {
        Qos::Guaranteed => -997,
        Qos::BestEffort => 1000,
        Qos::Burstable => {
            let asked = request(container, "memory").and_then(quantity::whole).unwrap_or(0);
            let share = i128::from(asked) * 1000 / i128::from(machine.memory_bytes.max(1));
            (1000 - i64::try_from(share).unwrap_or(1000)).clamp(3, 999)
        }
    };
    wanted.max(machine.lowest_oom_score_adj)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const MACHINE: Machine = Machine { memory_bytes: 1 << 30, cpus: 2, lowest_oom_score_adj: 0 };

    fn pod(resources: serde_json::Value) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "p"},
            "spec": {"containers": [{"name": "c", "resources": resources}]}
        }))
        .unwrap()
    }

    fn settings(pod: &Pod, machine: Machine) -> LinuxContainerResources {
        linux_resources(pod, &pod.spec.as_ref().unwrap().containers[0], machine)
    }

    #[test]
    fn limits_become_quota_and_memory() {
        let pod = pod(json!({"limits": {"cpu": "500m", "memory": "64Mi"}, "requests": {"cpu": "250m"}}));
        let settings = settings(&pod, MACHINE);
        assert_eq!((settings.cpu_period, settings.cpu_quota, settings.cpu_shares), (100_000, 50_000, 256));
        assert_eq!(settings.memory_limit_in_bytes, 64 << 20);
        assert_eq!(Qos::of(&pod), Qos::Burstable);
        assert_eq!(settings.oom_score_adj, 1000 - 62);
    }

    #[test]
    fn no_resources_means_the_smallest_weight_and_no_limit() {
        let pod = pod(json!({}));
        let settings = settings(&pod, MACHINE);
        assert_eq!((settings.cpu_period, settings.cpu_quota, settings.cpu_shares), (0, 0, 2));
        assert_eq!((settings.memory_limit_in_bytes, settings.oom_score_adj), (0, 1000));
        assert_eq!(Qos::of(&pod), Qos::BestEffort);
    }

    #[test]
    fn the_oom_score_is_never_lower_than_the_machine_allows() {
        let pod = pod(json!({"limits": {"cpu": "1", "memory": "64Mi"}}));
        assert_eq!(Qos::of(&pod), Qos::Guaranteed);
        assert_eq!(settings(&pod, MACHINE).oom_score_adj, 0);
        assert_eq!(settings(&pod, Machine { lowest_oom_score_adj: -1000, ..MACHINE }).oom_score_adj, -997);
    }

    #[test]
    fn proc_files_are_understood() {
        assert_eq!(meminfo_total("MemTotal:       1000 kB\nMemFree: 1 kB\n"), Some(1_024_000));
        assert!(has_capability("Name:\tx\nCapEff:\t0000000001000000\n", CAP_SYS_RESOURCE));
        assert!(!has_capability("CapEff:\t000001fffeffffff\n", CAP_SYS_RESOURCE));
    }
}
