//! The status of a Deployment and its conditions, in the words that `kubectl rollout status` reads.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{Deployment, DeploymentCondition, DeploymentStatus, ReplicaSet};
use kube::ResourceExt;

/// Condition types.
const AVAILABLE: &str = "Available";
pub(crate) const PROGRESSING: &str = "Progressing";
const FAILURE: &str = "ReplicaFailure";
/// Reasons of [`PROGRESSING`].
pub(crate) const CREATED: &str = "NewReplicaSetCreated";
pub(crate) const FOUND: &str = "FoundNewReplicaSet";
const UPDATED: &str = "ReplicaSetUpdated";
const COMPLETE: &str = "NewReplicaSetAvailable";
const TIMED_OUT: &str = "ProgressDeadlineExceeded";
pub(crate) const CREATE_ERROR: &str = "ReplicaSetCreateError";
const PAUSED: &str = "DeploymentPaused";
const RESUMED: &str = "DeploymentResumed";
/// `progressDeadlineSeconds` that stands for none.
const NO_DEADLINE: i32 = i32::MAX;

/// A condition of now.
pub(crate) fn condition(type_: &str, status: &str, reason: &str, message: String) -> DeploymentCondition {
    let now = super::now();
    DeploymentCondition {
        type_: type_.to_owned(),
        status: status.to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message),
        last_update_time: Some(now.clone()),
        last_transition_time: Some(now),
    }
}

fn find<'a>(conditions: &'a [DeploymentCondition], type_: &str) -> Option<&'a DeploymentCondition> {
    conditions.iter().find(|condition| condition.type_ == type_)
}

/// Sets a condition; one of the same status and reason stays as it is, one of the same status keeps its transition time.
pub(crate) fn set(conditions: &mut Vec<DeploymentCondition>, mut new: DeploymentCondition) {
    if let Some(old) = find(conditions, &new.type_) {
        if old.status == new.status && old.reason == new.reason {
            return;
        }
        if old.status == new.status {
            new.last_transition_time = old.last_transition_time.clone();
        }
    }
    conditions.retain(|condition| condition.type_ != new.type_);
    conditions.push(new);
}

/// Whether the rollout is over and all of its pods are available.
pub(crate) fn is_complete(deployment: &Deployment, status: &DeploymentStatus) -> bool {
    let wanted = replicas(deployment);
    status.updated_replicas.unwrap_or(0) == wanted
        && status.replicas.unwrap_or(0) == wanted
        && status.available_replicas.unwrap_or(0) == wanted
        && status.observed_generation >= deployment.metadata.generation
}

/// The wanted size.
pub(crate) fn replicas(deployment: &Deployment) -> i32 {
    deployment.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1).max(0)
}

/// The counts, and the conditions that follow from them alone. `noted` are conditions that this run found out.
pub(crate) fn compute(
    deployment: &Deployment,
    new: Option<&ReplicaSet>,
    all: &[Arc<ReplicaSet>],
    max_unavailable: i32,
    noted: Vec<DeploymentCondition>,
) -> DeploymentStatus {
    let before = deployment.status.clone().unwrap_or_default();
    let sum = |count: fn(&ReplicaSet) -> i32| all.iter().map(|set| count(set)).sum::<i32>();
    let asked = sum(|set| set.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(0));
    let available = sum(|set| set.status.as_ref().and_then(|status| status.available_replicas).unwrap_or(0));
    let mut conditions = before.conditions.clone().unwrap_or_default();
    for one in noted {
        set(&mut conditions, one);
    }
    let enough = available >= replicas(deployment) - max_unavailable;
    set(
        &mut conditions,
        if enough {
            let message = "Deployment has minimum availability.".to_owned();
            condition(AVAILABLE, "True", "MinimumReplicasAvailable", message)
        } else {
            let message = "Deployment does not have minimum availability.".to_owned();
            condition(AVAILABLE, "False", "MinimumReplicasUnavailable", message)
        },
    );
    let failing = all
        .iter()
        .find_map(|set| set.status.as_ref()?.conditions.as_ref()?.iter().find(|condition| condition.type_ == FAILURE));
    match failing {
        Some(failing) => {
            let reason = failing.reason.as_deref().unwrap_or("FailedCreate");
            let message = failing.message.clone().unwrap_or_default();
            set(&mut conditions, condition(FAILURE, &failing.status, reason, message));
        }
        None => conditions.retain(|condition| condition.type_ != FAILURE),
    }
    let updated = new.and_then(|new| new.status.as_ref()).map_or(0, |status| status.replicas);
    DeploymentStatus {
        observed_generation: deployment.metadata.generation,
        replicas: Some(sum(|set| set.status.as_ref().map_or(0, |status| status.replicas))),
        updated_replicas: Some(updated),
        ready_replicas: Some(sum(|set| set.status.as_ref().and_then(|status| status.ready_replicas).unwrap_or(0))),
        available_replicas: Some(available),
        unavailable_replicas: Some((asked - available).max(0)),
        collision_count: before.collision_count,
        conditions: Some(conditions),
    }
}

/// Brings the Progressing condition in line during a rollout; returns in what time to look again for the deadline.
pub(crate) fn progress(
    deployment: &Deployment,
    new: Option<&ReplicaSet>,
    status: &mut DeploymentStatus,
    now: Timestamp,
) -> Option<Duration> {
    let deadline = deployment.spec.as_ref().and_then(|spec| spec.progress_deadline_seconds).unwrap_or(600);
    let mut conditions = status.conditions.take().unwrap_or_default();
    let current = find(&conditions, PROGRESSING).cloned();
    let reason = current.as_ref().and_then(|current| current.reason.as_deref()).unwrap_or_default();
    let settled = status.replicas == status.updated_replicas && reason == COMPLETE;
    let mut again = None;
    if deadline != NO_DEADLINE && !settled {
        let subject = new.map_or_else(
            || format!("Deployment \"{}\"", deployment.name_any()),
            |new| format!("ReplicaSet \"{}\"", new.name_any()),
        );
        let before = deployment.status.clone().unwrap_or_default();
        if is_complete(deployment, status) {
            let message = format!("{subject} has successfully progressed.");
            set(&mut conditions, condition(PROGRESSING, "True", COMPLETE, message));
        } else if has_progressed(&before, status) {
            let mut progressing = condition(PROGRESSING, "True", UPDATED, format!("{subject} is progressing."));
            if let Some(current) = current.as_ref().filter(|current| current.status == "True") {
                progressing.last_transition_time = current.last_transition_time.clone();
            }
            // The update time is what the deadline counts from, so it is renewed even where nothing else changes.
            conditions.retain(|condition| condition.type_ != PROGRESSING);
            conditions.push(progressing);
            again = u64::try_from(deadline).ok().map(|seconds| Duration::from_secs(seconds + 1));
        } else if let Some(current) = &current {
            let updated = current.last_update_time.as_ref().map_or(now, |time| time.0);
            let left = updated.as_second() + i64::from(deadline) - now.as_second();
            if reason != TIMED_OUT && reason != COMPLETE && reason != PAUSED {
                if left < 0 {
                    let message = format!("{subject} has timed out progressing.");
                    set(&mut conditions, condition(PROGRESSING, "False", TIMED_OUT, message));
                } else {
                    again = u64::try_from(left).ok().map(|seconds| Duration::from_secs(seconds + 1));
                }
            }
        }
    }
    status.conditions = Some(conditions);
    again
}

fn has_progressed(before: &DeploymentStatus, after: &DeploymentStatus) -> bool {
    let old = |status: &DeploymentStatus| status.replicas.unwrap_or(0) - status.updated_replicas.unwrap_or(0);
    after.updated_replicas.unwrap_or(0) > before.updated_replicas.unwrap_or(0)
        || old(after) < old(before)
        || after.ready_replicas.unwrap_or(0) > before.ready_replicas.unwrap_or(0)
        || after.available_replicas.unwrap_or(0) > before.available_replicas.unwrap_or(0)
}

/// The condition to note when the Deployment was paused or resumed: the deadline doesn't run while it is paused.
pub(crate) fn pause_change(deployment: &Deployment) -> Option<DeploymentCondition> {
    let spec = deployment.spec.as_ref()?;
    spec.progress_deadline_seconds.filter(|deadline| *deadline != NO_DEADLINE)?;
    let conditions = deployment.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    let reason = find(conditions, PROGRESSING).and_then(|current| current.reason.as_deref());
    let paused = spec.paused.unwrap_or(false);
    match reason {
        Some(TIMED_OUT) => None,
        Some(PAUSED) if !paused => Some(condition(PROGRESSING, "Unknown", RESUMED, "Deployment is resumed".to_owned())),
        reason if paused && reason != Some(PAUSED) => {
            Some(condition(PROGRESSING, "Unknown", PAUSED, "Deployment is paused".to_owned()))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn deployment(status: serde_json::Value) -> Deployment {
        serde_json::from_value(json!({
            "metadata": {"name": "web", "generation": 2},
            "spec": {"replicas": 3, "progressDeadlineSeconds": 60, "selector": {}, "template": {}},
            "status": status
        }))
        .unwrap()
    }

    fn set_of(name: &str, spec: i32, ready: i32) -> Arc<ReplicaSet> {
        let value = json!({
            "metadata": {"name": name},
            "spec": {"replicas": spec, "selector": {}},
            "status": {"replicas": spec, "readyReplicas": ready, "availableReplicas": ready}
        });
        Arc::new(serde_json::from_value(value).unwrap())
    }

    fn reason(status: &DeploymentStatus, type_: &str) -> String {
        find(status.conditions.as_deref().unwrap(), type_).unwrap().reason.clone().unwrap()
    }

    #[test]
    fn a_rollout_is_complete_only_when_all_old_pods_are_gone_and_all_new_are_available() {
        let web = deployment(json!({}));
        let (old, new) = (set_of("old", 1, 1), set_of("new", 3, 3));
        let mut during = compute(&web, Some(&new), &[old, Arc::clone(&new)], 1, vec![]);
        progress(&web, Some(&new), &mut during, Timestamp::now());
        assert_eq!(reason(&during, PROGRESSING), UPDATED);
        assert_eq!(
            (during.replicas, during.updated_replicas, during.unavailable_replicas),
            (Some(4), Some(3), Some(0))
        );
        let mut after = compute(&web, Some(&new), &[Arc::clone(&new)], 1, vec![]);
        progress(&web, Some(&new), &mut after, Timestamp::now());
        assert_eq!(reason(&after, PROGRESSING), COMPLETE);
        assert_eq!(reason(&after, AVAILABLE), "MinimumReplicasAvailable");
        assert_eq!(after.observed_generation, Some(2));
    }

    #[test]
    fn a_rollout_without_progress_exceeds_its_deadline_and_says_so_once() {
        let began = "2026-01-01T00:00:00Z";
        let web = deployment(json!({"replicas": 3, "updatedReplicas": 1, "conditions": [
            {"type": PROGRESSING, "status": "True", "reason": UPDATED, "lastUpdateTime": began, "lastTransitionTime": began}
        ]}));
        let sets = [set_of("old", 2, 2), set_of("new", 1, 0)];
        let began: Timestamp = began.parse().unwrap();
        let mut early = compute(&web, Some(&sets[1]), &sets, 0, vec![]);
        early.ready_replicas = web.status.as_ref().unwrap().ready_replicas;
        early.available_replicas = Some(0);
        let again = progress(&web, Some(&sets[1]), &mut early, began + jiff::SignedDuration::from_secs(20));
        assert_eq!(again, Some(Duration::from_secs(41)));
        let mut late = early.clone();
        progress(&web, Some(&sets[1]), &mut late, began + jiff::SignedDuration::from_secs(61));
        assert_eq!(reason(&late, PROGRESSING), TIMED_OUT);
        assert_eq!(find(late.conditions.as_deref().unwrap(), PROGRESSING).unwrap().status, "False");
    }
}
