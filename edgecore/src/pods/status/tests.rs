//! Tests of the status computation.

use serde_json::{Value, json};

use super::{super::actual::Sandbox, *};

fn pod(spec: Value, status: Value) -> Pod {
    serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": spec, "status": status})).unwrap()
}

fn run(id: &str, attempt: u32, state: RunState, exit_code: i32) -> Run {
    let second = 1_000_000_000;
    Run {
        id: id.to_owned(),
        sandbox: "s".to_owned(),
        attempt,
        state,
        created_at: second,
        started_at: 100 * second,
        finished_at: if state == RunState::Running { 0 } else { 200 * second },
        exit_code,
        reason: String::new(),
        message: String::new(),
        image: "demo:1".to_owned(),
        image_ref: "sha256:1".to_owned(),
        hash: String::new(),
    }
}

fn status(pod: &Pod, runs: Vec<(&str, Run)>, waiting: Vec<(&str, &'static str)>, now: i64) -> Value {
    let mut actual = Actual::default();
    actual.sandboxes.push(Sandbox { id: "s".to_owned(), attempt: 0, ready: true, created_at: 0 });
    for (name, run) in runs {
        actual.runs.entry(name.to_owned()).or_default().push(run);
    }
    actual.sort();
    let waiting = waiting
        .into_iter()
        .map(|(name, reason)| (name.to_owned(), Waiting { reason, message: "why".to_owned() }))
        .collect();
    let observed = Observed {
        actual: &actual,
        waiting: &waiting,
        messages: &BTreeMap::new(),
        pod_ips: &["10.244.1.5".parse().unwrap()],
        host_ips: &["192.168.1.5".parse().unwrap()],
        start_time: Timestamp::from_second(50).unwrap(),
        runtime_name: "containerd",
        now: Timestamp::from_second(now).unwrap(),
        rejected: None,
    };
    serde_json::to_value(compute(pod, &observed)).unwrap()
}

fn condition(status: &Value, kind: &str) -> (String, String, String) {
    let all = status["conditions"].as_array().unwrap();
    let found = all.iter().find(|c| c["type"] == kind).unwrap();
    let text = |name: &str| found[name].as_str().unwrap_or_default().to_owned();
    (text("status"), text("reason"), text("lastTransitionTime"))
}

use RunState::{Exited, Running};

#[test]
fn a_running_pod_is_ready_and_keeps_its_transition_times() {
    let spec = json!({"containers": [{"name": "a", "image": "demo:1"}]});
    let first = status(&pod(spec.clone(), json!({})), vec![("a", run("1", 0, Running, 0))], vec![], 1000);
    assert_eq!(first["phase"], "Running");
    assert_eq!(
        (&first["podIP"], &first["podIPs"][0]["ip"], &first["hostIP"]),
        (&json!("10.244.1.5"), &json!("10.244.1.5"), &json!("192.168.1.5"))
    );
    assert_eq!(first["startTime"], "1970-01-01T00:00:50Z");
    let container = &first["containerStatuses"][0];
    assert_eq!(
        (&container["ready"], &container["started"], &container["restartCount"]),
        (&json!(true), &json!(true), &json!(0))
    );
    assert_eq!(container["containerID"], "containerd://1");
    assert_eq!(container["state"]["running"]["startedAt"], "1970-01-01T00:01:40Z");
    assert_eq!(condition(&first, "Ready"), ("True".into(), String::new(), "1970-01-01T00:16:40Z".into()));
    let second = status(&pod(spec, first.clone()), vec![("a", run("1", 0, Running, 0))], vec![], 2000);
    assert_eq!(first, second, "nothing changed, so nothing is written");
}

#[test]
fn a_crashing_container_waits_and_shows_its_last_end() {
    let spec = json!({"containers": [{"name": "a"}, {"name": "b"}]});
    let runs = vec![("a", run("2", 3, Exited, 7)), ("b", run("9", 0, Running, 0))];
    let status = status(&pod(spec, json!({})), runs, vec![("a", "CrashLoopBackOff")], 1000);
    assert_eq!(status["phase"], "Running");
    let container = &status["containerStatuses"][0];
    assert_eq!(container["state"]["waiting"]["reason"], "CrashLoopBackOff");
    assert_eq!(container["lastState"]["terminated"]["exitCode"], 7);
    assert_eq!(container["lastState"]["terminated"]["reason"], "Error");
    assert_eq!((&container["restartCount"], &container["ready"]), (&json!(3), &json!(false)));
    let (ready, reason, _) = condition(&status, "Ready");
    assert_eq!((ready.as_str(), reason.as_str()), ("False", "ContainersNotReady"));
    assert!(status["conditions"].to_string().contains("[a]"), "names who is not ready");
}

#[test]
fn a_container_that_can_not_be_configured_is_pending_with_the_reason() {
    let spec = json!({"containers": [{"name": "a", "image": "demo:1"}]});
    let status = status(&pod(spec, json!({})), vec![], vec![("a", "CreateContainerConfigError")], 1000);
    assert_eq!(status["phase"], "Pending");
    assert_eq!(
        status["containerStatuses"][0]["state"]["waiting"],
        json!({"reason": "CreateContainerConfigError", "message": "why"})
    );
    assert_eq!(status["containerStatuses"][0]["image"], "demo:1");
}

#[test]
fn phases_follow_the_restart_policy() {
    let phase_of = |policy: &str, codes: [i32; 2]| {
        let spec = json!({"restartPolicy": policy, "containers": [{"name": "a"}, {"name": "b"}]});
        let runs = vec![("a", run("1", 0, Exited, codes[0])), ("b", run("2", 0, Exited, codes[1]))];
        status(&pod(spec, json!({})), runs, vec![], 1000)["phase"].as_str().unwrap().to_owned()
    };
    assert_eq!(phase_of("Always", [0, 0]), "Running");
    assert_eq!(phase_of("Never", [0, 0]), "Succeeded");
    assert_eq!(phase_of("Never", [0, 1]), "Failed");
    assert_eq!(phase_of("OnFailure", [0, 0]), "Succeeded");
    assert_eq!(phase_of("OnFailure", [0, 1]), "Running");
}

#[test]
fn a_pod_with_init_containers_is_pending_until_they_are_done() {
    let spec = json!({"initContainers": [{"name": "i"}], "containers": [{"name": "a"}]});
    let pod_ = pod(spec, json!({}));
    let during = status(&pod_, vec![("i", run("1", 0, Running, 0))], vec![], 1000);
    assert_eq!(during["phase"], "Pending");
    assert_eq!(during["containerStatuses"][0]["state"]["waiting"]["reason"], "PodInitializing");
    assert_eq!(condition(&during, "Initialized").0, "False");
    let after = status(&pod_, vec![("i", run("1", 0, Exited, 0)), ("a", run("2", 0, Running, 0))], vec![], 1000);
    assert_eq!(after["phase"], "Running");
    assert_eq!(after["initContainerStatuses"][0]["ready"], true);
    assert_eq!(condition(&after, "Initialized").0, "True");
}

#[test]
fn the_end_of_a_run_that_went_with_its_sandbox_is_remembered() {
    let spec = json!({"containers": [{"name": "a"}]});
    let before = status(&pod(spec.clone(), json!({})), vec![("a", run("old", 2, Running, 0))], vec![], 1000);
    let after = status(&pod(spec, before), vec![("a", run("new", 3, Running, 0))], vec![], 2000);
    let last = &after["containerStatuses"][0]["lastState"]["terminated"];
    assert_eq!((&last["containerID"], &last["exitCode"]), (&json!("containerd://old"), &json!(137)));
    assert_eq!(after["containerStatuses"][0]["restartCount"], 3);
}

#[test]
fn conditions_of_others_stay_and_gates_hold_readiness_back() {
    let spec = json!({"readinessGates": [{"conditionType": "lb"}], "containers": [{"name": "a"}]});
    let runs = || vec![("a", run("1", 0, Running, 0))];
    let closed =
        status(&pod(spec.clone(), json!({"conditions": [{"type": "lb", "status": "False"}]})), runs(), vec![], 1000);
    assert_eq!(
        (condition(&closed, "Ready").0.as_str(), condition(&closed, "ContainersReady").0.as_str()),
        ("False", "True")
    );
    assert_eq!(condition(&closed, "lb").0, "False");
    let open = status(&pod(spec, json!({"conditions": [{"type": "lb", "status": "True"}]})), runs(), vec![], 1000);
    assert_eq!(condition(&open, "Ready").0, "True");
}
