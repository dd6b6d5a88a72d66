//! What a pod's status says: readiness, availability, whether it counts as running (Kubernetes, "Pod Lifecycle").

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodCondition};

/// The pod's condition of this type.
pub(crate) fn condition<'a>(pod: &'a Pod, type_: &str) -> Option<&'a PodCondition> {
    pod.status.as_ref()?.conditions.as_ref()?.iter().find(|condition| condition.type_ == type_)
}

/// `Pending`, `Running`, `Succeeded`, `Failed` or `Unknown`; a pod without a status is pending.
pub(crate) fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or("Pending")
}

/// All its containers ended for good.
pub(crate) fn is_terminal(pod: &Pod) -> bool {
    matches!(phase(pod), "Succeeded" | "Failed")
}

pub(crate) fn is_terminating(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_some()
}

/// Counts towards its owner's replicas.
pub(crate) fn is_active(pod: &Pod) -> bool {
    !is_terminal(pod) && !is_terminating(pod)
}

pub(crate) fn is_ready(pod: &Pod) -> bool {
    condition(pod, "Ready").is_some_and(|ready| ready.status == "True")
}

/// Since when the pod is ready.
pub(crate) fn ready_since(pod: &Pod) -> Option<Timestamp> {
    let ready = condition(pod, "Ready").filter(|ready| ready.status == "True")?;
    ready.last_transition_time.as_ref().map(|time| time.0)
}

/// Ready for at least `min_ready_seconds`; otherwise in how many seconds it may become so without another change.
pub(crate) fn available(pod: &Pod, min_ready_seconds: i32, now: Timestamp) -> Result<(), Option<u64>> {
    if !is_ready(pod) {
        return Err(None);
    }
    if min_ready_seconds <= 0 {
        return Ok(());
    }
    let Some(since) = ready_since(pod) else { return Err(None) };
    let left = since.as_second() + i64::from(min_ready_seconds) - now.as_second();
    if left <= 0 { Ok(()) } else { Err(u64::try_from(left).ok()) }
}

/// The node that the pod is bound to.
pub(crate) fn node(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref().filter(|name| !name.is_empty())
}
