//! What to do next for a pod: a pure function of its spec and of what the runtime has.

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};

use super::{
    actual::{Actual, Run, RunState},
    container::container_hash,
};

/// When containers are started again (Kubernetes, "Container restart policy").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RestartPolicy {
    Always,
    OnFailure,
    Never,
}

impl RestartPolicy {
    /// A pod's policy.
    pub(crate) fn of(spec: &PodSpec) -> Self {
        match spec.restart_policy.as_deref() {
            Some("OnFailure") => Self::OnFailure,
            Some("Never") => Self::Never,
            _ => Self::Always,
        }
    }

    /// Whether a container that ended like this is started again.
    pub(crate) fn restarts(self, run: &Run) -> bool {
        match self {
            Self::Always => true,
            Self::OnFailure => run.state == RunState::Unknown || run.exit_code != 0,
            Self::Never => false,
        }
    }
}

/// An init container that keeps running beside the others (Kubernetes, "Sidecar containers").
pub(crate) fn is_sidecar(container: &Container) -> bool {
    container.restart_policy.as_deref() == Some("Always")
}

/// The next steps, in this order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Sandboxes to stop and remove, with all in them.
    pub(crate) remove_sandboxes: Vec<String>,
    /// Runs to stop: their container changed.
    pub(crate) stop: Vec<String>,
    /// Ended or never started runs to remove.
    pub(crate) remove_runs: Vec<String>,
    /// A new sandbox with this attempt; nothing else can be done before.
    pub(crate) create_sandbox: Option<u32>,
    /// Containers to start, as far as their backoff allows.
    pub(crate) start: Vec<String>,
    /// All work is done for good: stop the sandbox.
    pub(crate) finished: bool,
}

/// How many ended runs of a container stay, for their logs and last state.
const KEEP_ENDED: usize = 1;

/// The next steps for a pod that should run.
pub(crate) fn plan(pod: &Pod, actual: &Actual) -> Plan {
    let default = PodSpec::default();
    let spec = pod.spec.as_ref().unwrap_or(&default);
    let policy = RestartPolicy::of(spec);
    let mut plan = Plan { finished: is_finished(spec, policy, actual), ..Plan::default() };
    if plan.finished {
        return plan;
    }
    let newest = actual.sandboxes.first();
    let Some(live) = actual.live_sandbox() else {
        plan.remove_sandboxes = actual.sandboxes.iter().map(|s| s.id.clone()).collect();
        plan.create_sandbox = Some(newest.map_or(0, |s| s.attempt.saturating_add(1)));
        return plan;
    };
    plan.remove_sandboxes = actual.sandboxes.iter().filter(|s| s.id != live.id).map(|s| s.id.clone()).collect();
    for runs in actual.runs.values() {
        let mut ended = runs.iter().filter(|run| run.sandbox == live.id && run.ended());
        // The newest run is kept in any case: it says how the container is.
        let keep = KEEP_ENDED + usize::from(runs.first().is_some_and(Run::ended));
        plan.remove_runs.extend(ended.by_ref().skip(keep).map(|run| run.id.clone()));
        // Made but never started, and something newer is there.
        plan.remove_runs.extend(
            runs.iter().skip(1).filter(|r| r.sandbox == live.id && r.state == RunState::Created).map(|r| r.id.clone()),
        );
    }

    let apps_began = spec.containers.iter().any(|c| actual.newest_in(&c.name, &live.id).is_some());
    for container in spec.init_containers.iter().flatten() {
        let run = actual.newest_in(&container.name, &live.id);
        if is_sidecar(container) {
            consider(container, run, RestartPolicy::Always, &mut plan);
            if run.is_none_or(|run| run.state != RunState::Running) && !apps_began {
                return plan;
            }
            continue;
        }
        if apps_began {
            continue;
        }
        match run {
            Some(run) if run.state == RunState::Exited && run.exit_code == 0 => {}
            Some(run) if run.ended() => {
                if policy != RestartPolicy::Never {
                    plan.start.push(container.name.clone());
                }
                return plan;
            }
            _ => {
                consider(container, run, policy, &mut plan);
                return plan;
            }
        }
    }
    for container in &spec.containers {
        let run = actual.newest_in(&container.name, &live.id);
        // A container that succeeded in an earlier sandbox isn't run again.
        let before = actual.newest(&container.name).filter(|run| run.ended());
        if run.is_none() && before.is_some_and(|run| !policy.restarts(run)) {
            continue;
        }
        consider(container, run, policy, &mut plan);
    }
    plan
}

fn consider(container: &Container, run: Option<&Run>, policy: RestartPolicy, plan: &mut Plan) {
    match run {
        None => plan.start.push(container.name.clone()),
        Some(run) => match run.state {
            RunState::Running if !run.hash.is_empty() && run.hash != container_hash(container) => {
                plan.stop.push(run.id.clone());
                plan.start.push(container.name.clone());
            }
            RunState::Running => {}
            RunState::Created => {
                plan.remove_runs.push(run.id.clone());
                plan.start.push(container.name.clone());
            }
            RunState::Exited | RunState::Unknown => {
                if policy.restarts(run) {
                    plan.start.push(container.name.clone());
                }
            }
        },
    }
}

/// Whether nothing will ever run in this pod again.
fn is_finished(spec: &PodSpec, policy: RestartPolicy, actual: &Actual) -> bool {
    if policy == RestartPolicy::Always {
        return false;
    }
    let over = |run: &Run| run.ended() && !policy.restarts(run);
    let failed_init = policy == RestartPolicy::Never
        && spec.init_containers.iter().flatten().filter(|c| !is_sidecar(c)).any(|c| {
            actual.newest(&c.name).is_some_and(|run| {
                run.state == RunState::Unknown || run.state == RunState::Exited && run.exit_code != 0
            })
        });
    failed_init || spec.containers.iter().all(|c| actual.newest(&c.name).is_some_and(over))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{super::actual::Sandbox, *};

    fn pod(policy: &str) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": {"restartPolicy": policy,
            "initContainers": [{"name": "i1"}, {"name": "i2"}], "containers": [{"name": "a"}, {"name": "b"}]}}))
        .unwrap()
    }

    fn sandbox(id: &str, attempt: u32, ready: bool) -> Sandbox {
        Sandbox { id: id.to_owned(), attempt, ready, created_at: 0 }
    }

    fn run(name: &str, sandbox: &str, attempt: u32, state: RunState, exit_code: i32) -> (String, Run) {
        let run = Run {
            id: format!("{name}-{sandbox}-{attempt}"),
            sandbox: sandbox.to_owned(),
            attempt,
            state,
            created_at: 1,
            started_at: 1,
            finished_at: 1,
            exit_code,
            reason: String::new(),
            message: String::new(),
            image: String::new(),
            image_ref: String::new(),
            hash: String::new(),
        };
        (name.to_owned(), run)
    }

    fn actual(sandboxes: Vec<Sandbox>, runs: Vec<(String, Run)>) -> Actual {
        let mut actual = Actual { sandboxes, ..Actual::default() };
        for (name, run) in runs {
            actual.runs.entry(name).or_default().push(run);
        }
        actual.sort();
        actual
    }

    use RunState::{Created, Exited, Running, Unknown};

    #[test]
    fn a_new_pod_gets_a_sandbox_first() {
        let plan = plan(&pod("Always"), &Actual::default());
        assert_eq!(plan, Plan { create_sandbox: Some(0), ..Plan::default() });
    }

    #[test]
    fn init_containers_run_one_after_the_other_then_all_others_at_once() {
        let pod = pod("Always");
        let live = || vec![sandbox("s", 0, true)];
        let start = |runs| plan(&pod, &actual(live(), runs)).start;
        assert_eq!(start(vec![]), ["i1"]);
        assert_eq!(start(vec![run("i1", "s", 0, Running, 0)]), Vec::<String>::new());
        assert_eq!(start(vec![run("i1", "s", 0, Exited, 1)]), ["i1"]);
        assert_eq!(start(vec![run("i1", "s", 0, Exited, 0)]), ["i2"]);
        let done = vec![run("i1", "s", 0, Exited, 0), run("i2", "s", 0, Exited, 0)];
        assert_eq!(start(done.clone()), ["a", "b"]);
        let mut with_a = done;
        with_a.push(run("a", "s", 0, Running, 0));
        assert_eq!(start(with_a), ["b"]);
        // The init containers' records may be gone once the others began.
        assert_eq!(start(vec![run("a", "s", 0, Exited, 1), run("b", "s", 0, Running, 0)]), ["a"]);
    }

    #[test]
    fn a_failed_init_container_ends_a_pod_that_never_restarts() {
        let failed = actual(vec![sandbox("s", 0, true)], vec![run("i1", "s", 0, Exited, 1)]);
        assert!(plan(&pod("Never"), &failed).finished);
        assert!(!plan(&pod("OnFailure"), &failed).finished);
    }

    #[test]
    fn the_restart_policy_decides_about_ended_containers() {
        let runs = vec![run("a", "s", 0, Exited, 0), run("b", "s", 0, Exited, 3)];
        let actual = actual(vec![sandbox("s", 0, true)], runs);
        assert_eq!(plan(&pod("Always"), &actual).start, ["a", "b"]);
        assert_eq!(plan(&pod("OnFailure"), &actual).start, ["b"]);
        assert!(plan(&pod("Never"), &actual).finished);
    }

    #[test]
    fn a_dead_sandbox_is_replaced_and_everything_starts_again() {
        let pod = pod("Always");
        let runs = vec![run("a", "s0", 4, Exited, 255), run("b", "s0", 0, Unknown, 255)];
        let after_reboot = actual(vec![sandbox("s0", 2, false)], runs.clone());
        let first = plan(&pod, &after_reboot);
        assert_eq!(first.create_sandbox, Some(3));
        assert_eq!(first.remove_sandboxes, ["s0"]);
        let renewed = actual(vec![sandbox("s1", 3, true), sandbox("s0", 2, false)], runs);
        let second = plan(&pod, &renewed);
        assert_eq!((second.start, second.remove_sandboxes), (vec!["i1".to_owned()], vec!["s0".to_owned()]));
    }

    #[test]
    fn a_job_that_was_killed_by_a_reboot_runs_again_only_if_it_may() {
        let runs = vec![run("a", "s0", 0, Exited, 0), run("b", "s0", 0, Exited, 255)];
        let dead = actual(vec![sandbox("s0", 0, false)], runs.clone());
        assert!(plan(&pod("Never"), &dead).finished);
        assert_eq!(plan(&pod("OnFailure"), &dead).create_sandbox, Some(1));
        let mut done = runs;
        done.extend([run("i1", "s1", 1, Exited, 0), run("i2", "s1", 1, Exited, 0)]);
        let renewed = actual(vec![sandbox("s1", 1, true), sandbox("s0", 0, false)], done);
        assert_eq!(plan(&pod("OnFailure"), &renewed).start, ["b"], "what succeeded isn't run again");
    }

    #[test]
    fn old_and_half_made_runs_are_removed() {
        let mut runs = vec![run("i1", "s", 0, Exited, 0), run("i2", "s", 0, Exited, 0), run("b", "s", 0, Running, 0)];
        runs.extend((0..4).map(|attempt| run("a", "s", attempt, Exited, 1)));
        let found = plan(&pod("Always"), &actual(vec![sandbox("s", 0, true)], runs));
        assert_eq!(found.remove_runs, ["a-s-1", "a-s-0"]);
        let made = vec![run("i1", "s", 0, Created, 0)];
        let found = plan(&pod("Always"), &actual(vec![sandbox("s", 0, true)], made));
        assert_eq!((found.remove_runs, found.start), (vec!["i1-s-0".to_owned()], vec!["i1".to_owned()]));
    }

    #[test]
    fn a_changed_image_replaces_the_running_container() {
        let pod: Pod =
            serde_json::from_value(json!({"spec": {"containers": [{"name": "a", "image": "i:2"}]}})).unwrap();
        let (name, mut old) = run("a", "s", 0, Running, 0);
        old.hash = "other".to_owned();
        let found = plan(&pod, &actual(vec![sandbox("s", 0, true)], vec![(name.clone(), old.clone())]));
        assert_eq!((found.stop, found.start), (vec!["a-s-0".to_owned()], vec!["a".to_owned()]));
        old.hash = container_hash(&pod.spec.as_ref().unwrap().containers[0]);
        let found = plan(&pod, &actual(vec![sandbox("s", 0, true)], vec![(name, old)]));
        assert!(found.stop.is_empty() && found.start.is_empty());
    }

    #[test]
    fn a_sidecar_starts_in_order_and_keeps_running() {
        let pod: Pod = serde_json::from_value(json!({"spec": {"restartPolicy": "Never",
            "initContainers": [{"name": "side", "restartPolicy": "Always"}], "containers": [{"name": "a"}]}}))
        .unwrap();
        let start = |runs| plan(&pod, &actual(vec![sandbox("s", 0, true)], runs)).start;
        assert_eq!(start(vec![]), ["side"]);
        assert_eq!(start(vec![run("side", "s", 0, Running, 0)]), ["a"]);
        assert_eq!(start(vec![run("side", "s", 0, Exited, 0), run("a", "s", 0, Running, 0)]), ["side"]);
        let over = vec![run("side", "s", 0, Running, 0), run("a", "s", 0, Exited, 0)];
        assert!(plan(&pod, &actual(vec![sandbox("s", 0, true)], over)).finished);
    }
}
