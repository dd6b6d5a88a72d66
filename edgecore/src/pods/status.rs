//! A pod's status, computed from its spec, its last status and what the runtime has (Kubernetes, "Pod Lifecycle").

use std::{collections::BTreeMap, net::IpAddr};

use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{
        Container, ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting,
        ContainerStatus, HostIP, Pod, PodCondition, PodIP, PodSpec, PodStatus,
    },
    apimachinery::pkg::apis::meta::v1::Time,
};

use super::{
    actual::{Actual, Run, RunState, timestamp},
    plan::{RestartPolicy, is_sidecar},
    resources::Qos,
};

/// Why a container isn't running although it should.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Waiting {
    pub(crate) reason: &'static str,
    pub(crate) message: String,
}

/// What a status is computed from, beside the pod.
#[derive(Debug)]
pub(crate) struct Observed<'a> {
    pub(crate) actual: &'a Actual,
    /// By container name.
    pub(crate) waiting: &'a BTreeMap<String, Waiting>,
    /// The last words of ended runs, by the run's id.
    pub(crate) messages: &'a BTreeMap<String, String>,
    pub(crate) pod_ips: &'a [IpAddr],
    pub(crate) host_ips: &'a [IpAddr],
    pub(crate) start_time: Timestamp,
    /// For example `containerd`.
    pub(crate) runtime_name: &'a str,
    pub(crate) now: Timestamp,
    /// The pod is refused for good: reason and message.
    pub(crate) rejected: Option<(&'a str, &'a str)>,
}

/// The pod's status now.
pub(crate) fn compute(pod: &Pod, observed: &Observed<'_>) -> PodStatus {
    let default = PodSpec::default();
    let spec = pod.spec.as_ref().unwrap_or(&default);
    let before = pod.status.clone().unwrap_or_default();
    let policy = RestartPolicy::of(spec);
    let inits: Vec<&Container> = spec.init_containers.iter().flatten().collect();
    let has_init = !inits.is_empty();
    let init_statuses: Vec<_> = inits
        .iter()
        .map(|c| container_status(c, before.init_container_statuses.as_ref(), observed, "PodInitializing", true))
        .collect();
    let initialized = inits_done(&inits, &init_statuses, spec, observed);
    let default_reason = if has_init && !initialized { "PodInitializing" } else { "ContainerCreating" };
    let statuses: Vec<_> = spec
        .containers
        .iter()
        .map(|c| container_status(c, before.container_statuses.as_ref(), observed, default_reason, false))
        .collect();
    let phase = match (observed.rejected, before.phase.as_deref()) {
        (Some(_), _) => "Failed",
        // A pod that ended stays so.
        (None, Some("Succeeded")) => "Succeeded",
        (None, Some("Failed")) => "Failed",
        _ => phase(policy, &inits, &init_statuses, initialized, &statuses),
    };
    let (reason, message) = match observed.rejected {
        Some((reason, message)) => (Some(reason.to_owned()), Some(message.to_owned())),
        None => (before.reason, before.message),
    };
    let conditions =
        conditions(pod, &before.conditions.unwrap_or_default(), phase, initialized, &statuses, observed.now);
    let running_network = !matches!(phase, "Succeeded" | "Failed");
    let pod_ips: Vec<PodIP> = if running_network || before.pod_ips.is_none() {
        observed.pod_ips.iter().map(|ip| PodIP { ip: ip.to_string() }).collect()
    } else {
        before.pod_ips.unwrap_or_default()
    };
    let host_ips: Vec<HostIP> = match observed.host_ips {
        [] => before.host_ips.unwrap_or_default(),
        known => known.iter().map(|ip| HostIP { ip: ip.to_string() }).collect(),
    };
    PodStatus {
        phase: Some(phase.to_owned()),
        reason,
        message,
        conditions: Some(conditions),
        pod_ip: pod_ips.first().map(|ip| ip.ip.clone()),
        pod_ips: (!pod_ips.is_empty()).then_some(pod_ips),
        host_ip: host_ips.first().map(|ip| ip.ip.clone()),
        host_ips: (!host_ips.is_empty()).then_some(host_ips),
        start_time: before.start_time.or(Some(Time(observed.start_time))),
        qos_class: Some(Qos::of(pod).name().to_owned()),
        init_container_statuses: has_init.then_some(init_statuses),
        container_statuses: Some(statuses),
        nominated_node_name: before.nominated_node_name,
        ..PodStatus::default()
    }
}

/// Init containers are done when each ended well, sidecars when they run. Once the others began, they're done.
fn inits_done(inits: &[&Container], statuses: &[ContainerStatus], spec: &PodSpec, observed: &Observed<'_>) -> bool {
    let sandbox = observed.actual.sandboxes.first().map(|s| s.id.as_str()).unwrap_or_default();
    spec.containers.iter().any(|c| observed.actual.newest_in(&c.name, sandbox).is_some())
        || inits.iter().zip(statuses).all(|(container, status)| {
            let state = status.state.as_ref();
            if is_sidecar(container) {
                state.is_some_and(|s| s.running.is_some())
            } else {
                state.and_then(|s| s.terminated.as_ref()).is_some_and(|t| t.exit_code == 0)
            }
        })
}

fn container_status(
    container: &Container,
    before: Option<&Vec<ContainerStatus>>,
    observed: &Observed<'_>,
    default_reason: &str,
    init: bool,
) -> ContainerStatus {
    let before = before.and_then(|all| all.iter().find(|status| status.name == container.name));
    let runs = observed.actual.runs.get(&container.name).map(Vec::as_slice).unwrap_or_default();
    let newest = runs.first();
    let waiting = observed.waiting.get(&container.name).map(|w| ContainerStateWaiting {
        reason: Some(w.reason.to_owned()),
        message: (!w.message.is_empty()).then(|| w.message.clone()),
    });
    let terminated = |run: &Run| ContainerStateTerminated {
        container_id: Some(format!("{}://{}", observed.runtime_name, run.id)),
        exit_code: run.exit_code,
        started_at: timestamp(run.started_at).map(Time),
        finished_at: timestamp(run.finished_at).map(Time),
        reason: Some(termination_reason(run)),
        message: observed
            .messages
            .get(&run.id)
            .cloned()
            .or_else(|| (!run.message.is_empty()).then(|| run.message.clone())),
        ..Default::default()
    };
    let mut state = ContainerState::default();
    // What the run before the shown one ended with.
    let mut last = runs.iter().skip(1).find(|run| run.ended()).map(terminated);
    match newest {
        Some(run) if run.state == RunState::Running => {
            state.running = Some(ContainerStateRunning { started_at: timestamp(run.started_at).map(Time) });
        }
        Some(run) if run.ended() => match waiting {
            Some(waiting) => {
                state.waiting = Some(waiting);
                last = Some(terminated(run));
            }
            None => state.terminated = Some(terminated(run)),
        },
        _ => {
            state.waiting =
                Some(waiting.unwrap_or_else(|| ContainerStateWaiting {
                    reason: Some(default_reason.to_owned()),
                    message: None,
                }));
        }
    }
    let shown_id = newest.map(|run| format!("{}://{}", observed.runtime_name, run.id));
    let last = last.or_else(|| remembered(before, shown_id.as_deref()));
    let running = state.running.is_some();
    let succeeded = state.terminated.as_ref().is_some_and(|t| t.exit_code == 0);
    let run_count = newest.map(|run| i32::try_from(run.attempt).unwrap_or(i32::MAX));
    ContainerStatus {
        name: container.name.clone(),
        image: newest
            .map(|run| run.image.clone())
            .filter(|image| !image.is_empty())
            .or_else(|| container.image.clone())
            .unwrap_or_default(),
        image_id: newest
            .map(|run| run.image_ref.clone())
            .or_else(|| before.map(|b| b.image_id.clone()))
            .unwrap_or_default(),
        container_id: shown_id.or_else(|| before.and_then(|b| b.container_id.clone())),
        // Readiness and startup probes come later: what runs is ready.
        ready: if init && !is_sidecar(container) { succeeded } else { running },
        started: Some(running),
        restart_count: run_count.or_else(|| before.map(|b| b.restart_count)).unwrap_or(0),
        state: Some(state),
        last_state: last.map(|terminated| ContainerState { terminated: Some(terminated), ..Default::default() }),
        ..Default::default()
    }
}

/// The end of a run that the runtime no longer has, from the status before.
fn remembered(before: Option<&ContainerStatus>, shown_id: Option<&str>) -> Option<ContainerStateTerminated> {
    let before = before?;
    let last = before.last_state.as_ref().and_then(|s| s.terminated.clone());
    if before.container_id.as_deref() == shown_id {
        return last;
    }
    let state = before.state.as_ref()?;
    if let Some(terminated) = &state.terminated {
        return Some(terminated.clone());
    }
    let Some(running) = &state.running else { return last };
    // It ran when it was seen last, and its record is gone with its sandbox.
    Some(ContainerStateTerminated {
        container_id: before.container_id.clone(),
        exit_code: 137,
        started_at: running.started_at.clone(),
        reason: Some("ContainerStatusUnknown".to_owned()),
        message: Some("The container could not be located when the pod was restarted".to_owned()),
        ..Default::default()
    })
}

fn termination_reason(run: &Run) -> String {
    match (run.state, run.reason.as_str(), run.exit_code) {
        (RunState::Unknown, _, _) => "ContainerStatusUnknown".to_owned(),
        (_, "", 0) => "Completed".to_owned(),
        (_, "", _) => "Error".to_owned(),
        (_, reason, _) => reason.to_owned(),
    }
}

fn phase(
    policy: RestartPolicy,
    inits: &[&Container],
    init_statuses: &[ContainerStatus],
    initialized: bool,
    statuses: &[ContainerStatus],
) -> &'static str {
    if !initialized {
        let failed = inits.iter().zip(init_statuses).any(|(container, status)| {
            let terminated = status.state.as_ref().and_then(|s| s.terminated.as_ref());
            !is_sidecar(container) && terminated.is_some_and(|t| t.exit_code != 0)
        });
        return if failed && policy == RestartPolicy::Never { "Failed" } else { "Pending" };
    }
    let (mut waiting, mut running, mut stopped, mut succeeded) = (0, 0, 0, 0);
    for status in statuses {
        let state = status.state.as_ref();
        if state.is_some_and(|s| s.running.is_some()) {
            running += 1;
        } else if let Some(terminated) = state.and_then(|s| s.terminated.as_ref()) {
            stopped += 1;
            succeeded += usize::from(terminated.exit_code == 0);
        } else if status.last_state.as_ref().is_some_and(|s| s.terminated.is_some()) {
            stopped += 1;
        } else {
            waiting += 1;
        }
    }
    if waiting > 0 {
        "Pending"
    } else if running > 0 || policy == RestartPolicy::Always {
        "Running"
    } else if stopped == succeeded {
        "Succeeded"
    } else if policy == RestartPolicy::Never {
        "Failed"
    } else {
        "Running"
    }
}

fn conditions(
    pod: &Pod,
    before: &[PodCondition],
    phase: &str,
    initialized: bool,
    statuses: &[ContainerStatus],
    now: Timestamp,
) -> Vec<PodCondition> {
    let completed = phase == "Succeeded";
    let unready: Vec<&str> = statuses.iter().filter(|s| !s.ready).map(|s| s.name.as_str()).collect();
    let containers_ready = unready.is_empty() && !matches!(phase, "Succeeded" | "Failed");
    let gates: Vec<&str> = pod
        .spec
        .iter()
        .flat_map(|s| s.readiness_gates.iter().flatten())
        .map(|gate| gate.condition_type.as_str())
        .filter(|gate| !before.iter().any(|c| c.type_ == *gate && c.status == "True"))
        .collect();
    let not_ready = || match phase {
        "Succeeded" => ("PodCompleted", String::new()),
        "Failed" => ("PodFailed", String::new()),
        _ => ("ContainersNotReady", format!("containers with unready status: [{}]", unready.join(" "))),
    };
    let why = |ok: bool, reason: (&'static str, String)| if ok { None } else { Some(reason) };
    let init_reason = match (initialized, completed) {
        (true, true) => Some(("PodCompleted", String::new())),
        (true, false) => None,
        (false, _) => Some(("ContainersNotInitialized", "containers with incomplete status".to_owned())),
    };
    let ready_reason = if containers_ready {
        why(gates.is_empty(), ("ReadinessGatesNotReady", format!("readiness gates not true: [{}]", gates.join(" "))))
    } else {
        Some(not_ready())
    };
    let wanted = [
        ("PodScheduled", true, None),
        ("Initialized", initialized || completed, init_reason),
        ("ContainersReady", containers_ready, why(containers_ready, not_ready())),
        ("Ready", containers_ready && gates.is_empty(), ready_reason),
    ];
    let mut conditions: Vec<PodCondition> = wanted
        .into_iter()
        .map(|(kind, ok, reason)| {
            let status = if ok { "True" } else { "False" };
            let old = before.iter().find(|c| c.type_ == kind);
            let since = old.filter(|c| c.status == status).and_then(|c| c.last_transition_time.clone());
            let (reason, message) =
                reason.map_or((None, None), |(r, m)| (Some(r.to_owned()), (!m.is_empty()).then_some(m)));
            PodCondition {
                type_: kind.to_owned(),
                status: status.to_owned(),
                reason,
                message,
                last_transition_time: since.or(Some(Time(now))),
                ..Default::default()
            }
        })
        .collect();
    // Others own further conditions, readiness gates for example.
    conditions.extend(before.iter().filter(|c| !wanted_kind(&c.type_)).cloned());
    conditions
}

fn wanted_kind(kind: &str) -> bool {
    matches!(kind, "PodScheduled" | "Initialized" | "ContainersReady" | "Ready")
}

#[cfg(test)]
mod tests;
