//! A pod's row in `kubectl get`: READY, STATUS and RESTARTS as kubectl's users know them.

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::kinds::tables::{age, human_duration, name, text, text_or_none};

fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

fn condition_is(pod: &Value, kind: &str, status: &str) -> bool {
    list(&pod["status"]["conditions"]).iter().any(|c| c["type"] == json!(kind) && c["status"] == json!(status))
}

/// Restarts of some containers, and when the last of them ended.
#[derive(Default)]
struct Restarts {
    count: i64,
    last: Option<Timestamp>,
}

impl Restarts {
    fn add(&mut self, status: &Value) {
        self.count += status["restartCount"].as_i64().unwrap_or(0);
        let ended = &status["lastState"]["terminated"]["finishedAt"];
        self.last = self.last.max(ended.as_str().and_then(|t| t.parse().ok()));
    }

    fn shown(&self, now: Timestamp) -> String {
        match self.last {
            Some(last) if self.count > 0 => {
                format!("{} ({} ago)", self.count, human_duration(now.as_second() - last.as_second()))
            }
            _ => self.count.to_string(),
        }
    }
}

/// The reason of a terminated state, or its signal or exit code.
fn ended(terminated: &Value) -> String {
    match (text(&terminated["reason"]), terminated["signal"].as_i64().unwrap_or(0)) {
        ("", 0) => format!("ExitCode:{}", terminated["exitCode"].as_i64().unwrap_or(0)),
        ("", signal) => format!("Signal:{signal}"),
        (reason, _) => reason.to_owned(),
    }
}

/// What the init containers say: the status word while they aren't done, their restarts, and how many sidecars are ready.
struct Init {
    word: Option<String>,
    restarts: Restarts,
    sidecar_restarts: Restarts,
    sidecars: usize,
    sidecars_ready: usize,
}

fn init_containers(pod: &Value) -> Init {
    let specs = list(&pod["spec"]["initContainers"]);
    let is_sidecar = |name: &Value| specs.iter().any(|c| c["name"] == *name && c["restartPolicy"] == json!("Always"));
    let mut init = Init {
        word: None,
        restarts: Restarts::default(),
        sidecar_restarts: Restarts::default(),
        sidecars: specs.iter().filter(|c| c["restartPolicy"] == json!("Always")).count(),
        sidecars_ready: 0,
    };
    for (i, status) in list(&pod["status"]["initContainerStatuses"]).iter().enumerate() {
        let sidecar = is_sidecar(&status["name"]);
        init.restarts.add(status);
        if sidecar {
            init.sidecar_restarts.add(status);
        }
        let state = &status["state"];
        let (terminated, waiting) = (&state["terminated"], text(&state["waiting"]["reason"]));
        let word = if terminated.is_object() && terminated["exitCode"].as_i64().unwrap_or(0) == 0 {
            continue;
        } else if sidecar && status["started"] == json!(true) {
            init.sidecars_ready += usize::from(status["ready"] == json!(true));
            continue;
        } else if terminated.is_object() {
            format!("Init:{}", ended(terminated))
        } else if !waiting.is_empty() && waiting != "PodInitializing" {
            format!("Init:{waiting}")
        } else {
            format!("Init:{i}/{}", specs.len())
        };
        init.word = Some(word);
        break;
    }
    init
}

pub(super) fn cells(pod: &Value, now: Timestamp) -> Vec<Value> {
    let (spec, status) = (&pod["spec"], &pod["status"]);
    let phase = text(&status["phase"]);
    let mut word = match text(&status["reason"]) {
        "" => phase.to_owned(),
        reason => reason.to_owned(),
    };
    if list(&status["conditions"])
        .iter()
        .any(|c| c["type"] == json!("PodScheduled") && c["reason"] == json!("SchedulingGated"))
    {
        "SchedulingGated".clone_into(&mut word);
    }
    let init = init_containers(pod);
    let mut ready = init.sidecars_ready;
    let initializing = init.word.is_some();
    if let Some(reason) = init.word {
        word = reason;
    }
    let mut restarts = init.restarts;
    if !initializing || condition_is(pod, "Initialized", "True") {
        restarts = init.sidecar_restarts;
        let mut running = false;
        for container in list(&status["containerStatuses"]).iter().rev() {
            restarts.add(container);
            let state = &container["state"];
            let waiting = text(&state["waiting"]["reason"]);
            if !waiting.is_empty() {
                waiting.clone_into(&mut word);
            } else if state["terminated"].is_object() {
                word = ended(&state["terminated"]);
            } else if container["ready"] == json!(true) && state["running"].is_object() {
                running = true;
                ready += 1;
            }
        }
        if word == "Completed" && running {
            let shown = if condition_is(pod, "Ready", "True") { "Running" } else { "NotReady" };
            shown.clone_into(&mut word);
        }
    }
    if !pod["metadata"]["deletionTimestamp"].is_null() {
        if status["reason"] == json!("NodeLost") {
            "Unknown".clone_into(&mut word);
        } else if phase != "Succeeded" && phase != "Failed" {
            "Terminating".clone_into(&mut word);
        }
    }
    let gates = list(&spec["readinessGates"]);
    let gates_open = gates.iter().filter(|g| condition_is(pod, text(&g["conditionType"]), "True")).count();
    vec![
        name(pod),
        json!(format!("{ready}/{}", list(&spec["containers"]).len() + init.sidecars)),
        json!(word),
        json!(restarts.shown(now)),
        age(pod, now),
        json!(text_or_none(&status["podIP"])),
        json!(text_or_none(&spec["nodeName"])),
        json!(text_or_none(&status["nominatedNodeName"])),
        json!(if gates.is_empty() { "<none>".to_owned() } else { format!("{gates_open}/{}", gates.len()) }),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(status: Value, deleted: bool) -> (String, String, String) {
        let mut pod = json!({"metadata": {"name": "p", "creationTimestamp": "2024-01-01T00:00:00Z"},
            "spec": {"containers": [{"name": "a"}, {"name": "b"}], "initContainers": [{"name": "i"}]}, "status": status});
        if deleted {
            pod["metadata"]["deletionTimestamp"] = json!("2024-01-01T00:00:00Z");
        }
        let row = cells(&pod, "2024-01-01T01:00:00Z".parse().unwrap());
        let cell = |i: usize| row[i].as_str().unwrap().to_owned();
        (cell(1), cell(2), cell(3))
    }

    #[test]
    fn the_status_word_is_the_one_that_kubectl_users_know() {
        let running = |ready: bool| json!({"ready": ready, "restartCount": 0, "state": {"running": {}}});
        let crash = json!({"ready": false, "restartCount": 3, "state": {"waiting": {"reason": "CrashLoopBackOff"}},
            "lastState": {"terminated": {"finishedAt": "2024-01-01T00:55:00Z"}}});
        let done = json!({"ready": false, "state": {"terminated": {"exitCode": 0, "reason": "Completed"}}});
        let failed = json!({"ready": false, "state": {"terminated": {"exitCode": 3}}});
        for (status, deleted, expected) in [
            (json!({"phase": "Pending"}), false, ("0/2", "Pending", "0")),
            (
                json!({"phase": "Running", "containerStatuses": [running(true), running(false)]}),
                false,
                ("1/2", "Running", "0"),
            ),
            (
                json!({"phase": "Running", "containerStatuses": [running(true), crash]}),
                false,
                ("1/2", "CrashLoopBackOff", "3 (5m ago)"),
            ),
            (
                json!({"phase": "Running", "containerStatuses": [running(true), running(true)]}),
                true,
                ("2/2", "Terminating", "0"),
            ),
            (json!({"phase": "Succeeded", "containerStatuses": [done, done]}), false, ("0/2", "Completed", "0")),
            (json!({"phase": "Running", "containerStatuses": [done, running(true)]}), false, ("1/2", "NotReady", "0")),
            (json!({"phase": "Failed", "containerStatuses": [failed, done]}), false, ("0/2", "ExitCode:3", "0")),
            (
                json!({"phase": "Pending", "initContainerStatuses": [{"name": "i", "state": {"running": {}}}]}),
                false,
                ("0/2", "Init:0/1", "0"),
            ),
            (
                json!({"phase": "Pending", "initContainerStatuses": [{"name": "i", "state": {"terminated": {"exitCode": 1, "reason": "Error"}}}]}),
                false,
                ("0/2", "Init:Error", "0"),
            ),
            (json!({"phase": "Failed", "reason": "Evicted"}), false, ("0/2", "Evicted", "0")),
        ] {
            let (ready, word, restarts) = shown(status, deleted);
            assert_eq!((ready.as_str(), word.as_str(), restarts.as_str()), expected);
        }
    }
}
