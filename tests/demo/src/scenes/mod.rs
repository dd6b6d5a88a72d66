//! The scenes, in the order in which they are shown. A scene leaves the lab as it found it: healed, everything running.

mod applications;
mod apply;
mod bad_input;
mod calls;
mod catch_up;
mod dns;
mod gateway;
mod hub_down;
mod island;
mod storm;

use anyhow::Result;

use crate::Stage;

/// One thing that must always work.
#[derive(Debug, Clone, Copy)]
pub struct Scene {
    /// Short name, for `--only`.
    pub name: &'static str,
    /// What is done.
    pub title: &'static str,
    /// What must come of it.
    pub expected: &'static str,
    /// Does it.
    pub run: fn(&Stage) -> Result<()>,
}

/// All scenes.
pub fn all() -> Vec<Scene> {
    vec![
        Scene {
            name: "apply",
            title: "kubectl apply a Deployment and a Service with pods at edge-a1, edge-a2, edge-b1 and cloud-1",
            expected: "Running within 15 s, kubectl shows the truth, kubectl delete removes the containers",
            run: apply::run,
        },
        Scene {
            name: "calls",
            title: "a pod on each node calls Services by short and full name, over TCP and UDP",
            expected: "the right endpoints answer; other sites are reached through the tunnel, the own LAN is not",
            run: calls::run,
        },
        Scene {
            name: "dns",
            title: "a pod asks DNS with the upstream cut off",
            expected: "cluster names answer at once; outside names come from the cache or fail fast",
            run: dns::run,
        },
        Scene {
            name: "gateway",
            title: "the client on the internet calls the gateway at site b, http and https, with backends at both sites",
            expected: "answers by weight; an unknown host gets 404, a Service without endpoints 503",
            run: gateway::run,
        },
        Scene {
            name: "hub-down",
            title: "the hub is killed",
            expected: "calls, DNS and the gateway go on, for new connections too",
            run: hub_down::run,
        },
        Scene {
            name: "island",
            title: "site a is cut from the internet, then edge-a2 reboots",
            expected: "its pods come back from disk; edge-a1 and edge-a2 reach one another by Service name",
            run: island::run,
        },
        Scene {
            name: "catch-up",
            title: "while site a is cut off, a port changes, a pod is deleted, a ConfigMap changes, a Service is added; then the link heals",
            expected: "the edge converges in less than 5 s, status is right on both sides, nothing deleted comes back",
            run: catch_up::run,
        },
        Scene {
            name: "storm",
            title: "the hub is killed and restarted 20 times while 200 objects change",
            expected: "every edge store equals the API at the end, object by object",
            run: storm::run,
        },
        Scene {
            name: "bad-input",
            title: "bad input: invalid objects, wrong and used tokens, a 50 MB object, garbage on every listening port",
            expected: "a clear error each; nothing falls over",
            run: bad_input::run,
        },
    ]
}
