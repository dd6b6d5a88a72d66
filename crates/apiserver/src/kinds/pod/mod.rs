//! Pods.

mod defaults;
mod table;
mod validate;

use k8s_openapi::api::core::v1::Pod;

use super::built_in::{AGE, BuiltIn, NAME, column, no_prepare, wide};
use super::{built_in, decode, merge_keys};

pub(crate) use defaults::default_spec;
pub(crate) use validate::{port_reference, validate_spec};

pub(crate) static POD: BuiltIn = BuiltIn {
    group: "",
    version: "v1",
    plural: "pods",
    singular: "pod",
    kind: "Pod",
    short_names: &["po"],
    categories: &["all"],
    namespaced: true,
    status: true,
    scale: false,
    generation: false,
    keeps_status_on_create: false,
    graceful: true,
    columns: &[
        NAME,
        column("Ready", "string", "Containers that are ready, of how many."),
        column("Status", "string", "Phase, or the reason of what keeps it from running."),
        column("Restarts", "string", "Restarts of its containers, and when the last one was."),
        AGE,
        wide("IP", "Address of the pod."),
        wide("Node", "Where it runs."),
        wide("Nominated Node", "Where it may run when others made room."),
        wide("Readiness Gates", "Conditions that it waits for beyond its containers."),
    ],
    selectable: &[
        "spec.nodeName",
        "spec.restartPolicy",
        "spec.schedulerName",
        "spec.serviceAccountName",
        "spec.hostNetwork",
        "status.phase",
        "status.podIP",
        "status.nominatedNodeName",
    ],
    merge_keys: merge_keys::POD,
    typed: decode::typed::<Pod>,
    schema: built_in::schema::<Pod>(),
    default: defaults::default,
    validate: validate::validate,
    prepare_update: no_prepare,
    validate_update: validate::validate_update,
    cells: table::cells,
};
